//! Qwen3: Llama's layers with every head of q and k normalised before it is turned
//! (<https://arxiv.org/abs/2505.09388>). All files store q and k rows in half-split order.

use super::Architecture;
use super::decoder::Family;

/// Name of the architecture.
pub const NAME: &str = "qwen3";

/// Row of the registry.
pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: NAME,
    gguf: &[NAME],
    hugging_face: &[NAME],
    family: Family {
        head_norms: true,
        ..Family::PLAIN
    },
};
