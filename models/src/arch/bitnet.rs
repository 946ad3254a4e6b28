//! BitNet b1.58 2B-4T (<https://arxiv.org/abs/2504.12285>): Llama's layers with ternary weights, a norm
//! before each output projection (`attn_sub_norm`, `ffn_sub_norm`), a squared ReLU in the gate, and the
//! input of every linear layer rounded to 8 bits, a scale a token.
//!
//! A checkpoint whose weights are plain floats, with no `quantization_config`, runs without that rounding,
//! as `transformers` runs it.

use super::Architecture;
use super::decoder::{Family, Gate};

/// Name of the architecture.
pub const NAME: &str = "bitnet";

/// Row of the registry. llama.cpp's own `bitnet` is an older model with another gate.
pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: NAME,
    gguf: &["bitnet-b1.58", "bitnet-25"],
    hugging_face: &[NAME],
    family: Family {
        sub_norms: true,
        gate: Gate::ReluSquared,
        ..Family::PLAIN
    },
};
