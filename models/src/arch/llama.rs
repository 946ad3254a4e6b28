//! Llama: pre-norm decoder with grouped-query attention, rotary positions and SwiGLU
//! (<https://arxiv.org/abs/2307.09288>). Also SmolLM2, Mistral 7B and Llama 3.x.
//!
//! Its GGUF files store the rows of q and k with rotary pairs as neighbours. Llama 3.x stretches the
//! context: GGUF files hold a tensor of frequency divisors, `config.json` the numbers to make them.

use super::decoder::{self, Family, Gate};
use super::{Architecture, Config};
use crate::Error;
use crate::file::Source;
use crate::recipe::Recipe;

/// Name of the architecture.
pub const NAME: &str = "llama";

/// Row of the registry.
pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: NAME,
    gguf: &[NAME],
    hugging_face: &[NAME, "mistral"],
    activation: "silu",
    recipe,
};

fn recipe(source: &dyn Source, config: Config) -> Result<Recipe, Error> {
    let family = Family {
        interleaved_in_gguf: true,
        head_norms: false,
        sub_norms: false,
        gate: Gate::Silu,
    };
    decoder::recipe(source, config, &family)
}
