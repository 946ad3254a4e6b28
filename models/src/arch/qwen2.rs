//! Qwen2 and Qwen2.5: Llama's layers with a bias on q, k and v
//! (<https://arxiv.org/abs/2407.10671>). All files store q and k rows in half-split order.

use super::Architecture;
use super::decoder::Family;

/// Name of the architecture.
pub const NAME: &str = "qwen2";

/// Row of the registry.
pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: NAME,
    gguf: &[NAME],
    hugging_face: &[NAME],
    family: Family::PLAIN,
};
