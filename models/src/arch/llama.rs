//! Llama: pre-norm decoder with grouped-query attention, rotary positions and SwiGLU
//! (<https://arxiv.org/abs/2307.09288>). Also SmolLM2, Mistral 7B and Llama 3.x.
//!
//! Its GGUF files store the rows of q and k with rotary pairs as neighbours. Llama 3.x stretches the
//! context: GGUF files hold a tensor of frequency divisors, `config.json` the numbers to make them.

use super::Architecture;
use super::decoder::Family;

/// Name of the architecture.
pub const NAME: &str = "llama";

/// Row of the registry.
pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: NAME,
    gguf: &[NAME],
    hugging_face: &[NAME, "mistral"],
    family: Family {
        interleaved_in_gguf: true,
        ..Family::PLAIN
    },
};
