//! Qwen3: Llama's layers with every head of q and k normalised before it is turned
//! (<https://arxiv.org/abs/2505.09388>). All files store q and k rows in half-split order.

use super::decoder::{self, Family, Gate};
use super::{Architecture, Config};
use crate::Error;
use crate::file::Source;
use crate::recipe::Recipe;

/// Name of the architecture.
pub const NAME: &str = "qwen3";

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
        head_norms: true,
        sub_norms: false,
        gate: Gate::Silu,
    };
    decoder::recipe(source, config, &family)
}
