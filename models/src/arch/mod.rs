//! Architectures: model configuration -> [`Recipe`](crate::recipe::Recipe). One file each.

/// Dimensions and constants of a decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Architecture name as the model file spells it (`llama`, `qwen2`).
    pub architecture: String,
    /// Model name from the file, or the file stem.
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
