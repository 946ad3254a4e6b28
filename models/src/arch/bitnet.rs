//! BitNet b1.58 2B-4T (<https://arxiv.org/abs/2504.12285>): Llama's layers with ternary weights, a norm
//! before each output projection (`attn_sub_norm`, `ffn_sub_norm`), a squared ReLU in the gate, and the
//! input of every linear layer rounded to 8 bits, a scale a token.
//!
//! A checkpoint whose weights are plain floats, with no `quantization_config`, runs without that rounding,
//! as `transformers` runs it.

use super::decoder::{self, Family, Gate};
use super::{Architecture, Config};
use crate::Error;
use crate::file::Source;
use crate::recipe::Recipe;

/// Name of the architecture.
pub const NAME: &str = "bitnet";

/// Row of the registry. llama.cpp's own `bitnet` is an older model with another gate.
pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: NAME,
    gguf: &["bitnet-b1.58", "bitnet-25"],
    hugging_face: &[NAME],
    activation: "relu2",
    recipe,
};

fn recipe(source: &dyn Source, config: Config) -> Result<Recipe, Error> {
    let family = Family {
        interleaved_in_gguf: false,
        head_norms: false,
        sub_norms: true,
        gate: Gate::ReluSquared,
    };
    decoder::recipe(source, config, &family)
}
