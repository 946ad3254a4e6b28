//! Qwen2 and Qwen2.5: Llama's layers with a bias on q, k and v
//! (<https://arxiv.org/abs/2407.10671>). GGUF files store q and k rows in half-split order.

use super::decoder::{self, Family};
use crate::Error;
use crate::file::gguf::Gguf;
use crate::recipe::Recipe;

/// Name in `general.architecture`.
pub const NAME: &str = "qwen2";

/// Makes the recipe of a Qwen2 file.
///
/// # Errors
/// See [`recipe_from_gguf`](super::recipe_from_gguf).
pub fn recipe(gguf: &Gguf<'_>) -> Result<Recipe, Error> {
    decoder::recipe(
        gguf,
        &Family {
            name: NAME,
            interleaved_rotary_rows: false,
        },
    )
}
