//! Architectures: model configuration -> [`Recipe`]. One file each.

mod decoder;
pub mod llama;
pub mod qwen2;

use crate::Error;
use crate::error::shown;
use crate::file::gguf::Gguf;
use crate::recipe::Recipe;

/// Dimensions and constants of a decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Architecture name as the model file spells it (`llama`, `qwen2`).
    pub architecture: String,
    /// Model name from the file; the architecture where it has none.
    pub name: String,
    /// Layers.
    pub layers: usize,
    /// D: model width.
    pub width: usize,
    /// H: query heads.
    pub heads: usize,
    /// KV: key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Dh: head width, even.
    pub head_dim: usize,
    /// F: feed-forward width.
    pub ffn: usize,
    /// V: vocabulary size.
    pub vocab: usize,
    /// Trained context in tokens.
    pub context: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Epsilon of RMSNorm.
    pub norm_eps: f32,
    /// Logits use the embedding table.
    pub tied: bool,
}

/// One row of the registry.
#[derive(Debug, Clone, Copy)]
pub struct Architecture {
    /// Name as `general.architecture` spells it.
    pub name: &'static str,
    /// Makes the recipe of a file of this architecture.
    pub recipe: fn(&Gguf<'_>) -> Result<Recipe, Error>,
}

/// Every architecture that can run.
pub const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        name: llama::NAME,
        recipe: llama::recipe,
    },
    Architecture {
        name: qwen2::NAME,
        recipe: qwen2::recipe,
    },
];

/// Metadata key of the architecture's name.
pub const ARCHITECTURE_KEY: &str = "general.architecture";

/// Makes the recipe of a model file.
///
/// # Errors
/// An unknown architecture; metadata that is missing, out of range or asks for something that the
/// recipe cannot express; tensors that are missing, unknown or have another shape than the
/// metadata says. Every message names the key or tensor.
pub fn recipe_from_gguf(gguf: &Gguf<'_>) -> Result<Recipe, Error> {
    let name = gguf.metadata.string(ARCHITECTURE_KEY)?;
    match ARCHITECTURES.iter().find(|a| a.name == name) {
        Some(architecture) => (architecture.recipe)(gguf),
        None => Err(Error::UnknownArchitecture {
            found: shown(name),
            known: ARCHITECTURES
                .iter()
                .map(|a| a.name)
                .collect::<Vec<_>>()
                .join(", "),
        }),
    }
}
