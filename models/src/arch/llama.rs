//! Llama: pre-norm decoder with grouped-query attention, rotary positions and SwiGLU
//! (<https://arxiv.org/abs/2307.09288>). Also SmolLM2, Mistral 7B and Llama 3.x.
//!
//! Its GGUF files store the rows of q and k with rotary pairs as neighbours; Llama 3.x files
//! stretch the context with a tensor of frequency divisors.

use super::decoder::{self, Family};
use crate::Error;
use crate::file::gguf::Gguf;
use crate::recipe::Recipe;

/// Name in `general.architecture`.
pub const NAME: &str = "llama";

/// Makes the recipe of a Llama file.
///
/// # Errors
/// See [`recipe_from_gguf`](super::recipe_from_gguf).
pub fn recipe(gguf: &Gguf<'_>) -> Result<Recipe, Error> {
    decoder::recipe(
        gguf,
        &Family {
            name: NAME,
            interleaved_rotary_rows: true,
        },
    )
}
