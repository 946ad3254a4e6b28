//! Qwen2 and Qwen2.5: Llama's layers with a bias on q, k and v
//! (<https://arxiv.org/abs/2407.10671>). All files store q and k rows in half-split order.

use super::decoder::{self, Family, Gate};
use super::{Architecture, Config};
use crate::Error;
use crate::file::Source;
use crate::recipe::Recipe;

/// Name of the architecture.
pub const NAME: &str = "qwen2";

/// Row of the registry.
pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: NAME,
    gguf: &[NAME],
    hugging_face: &[NAME],
    activation: "silu",
    recipe,
};

fn recipe(source: &dyn Source, config: Config) -> Result<Recipe, Error> {
    let family = Family {
        interleaved_in_gguf: false,
        head_norms: false,
        sub_norms: false,
        gate: Gate::Silu,
    };
    decoder::recipe(source, config, &family)
}
