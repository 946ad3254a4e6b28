//! What the tensors of a decoder are called in each format.

use crate::file::Naming;

/// A tensor outside the layers, without its suffix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outer {
    Embedding,
    Norm,
    Output,
}

impl Outer {
    pub fn name(self, naming: Naming) -> &'static str {
        match (naming, self) {
            (Naming::Gguf, Outer::Embedding) => "token_embd.weight",
            (Naming::Gguf, Outer::Norm) => "output_norm.weight",
            (Naming::Gguf, Outer::Output) => "output.weight",
            (Naming::HuggingFace, Outer::Embedding) => "model.embed_tokens.weight",
            (Naming::HuggingFace, Outer::Norm) => "model.norm.weight",
            (Naming::HuggingFace, Outer::Output) => "lm_head.weight",
        }
    }
}

/// A tensor of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    AttentionNorm,
    Query,
    Key,
    Value,
    QueryNorm,
    KeyNorm,
    AttentionSubNorm,
    AttentionOutput,
    FfnNorm,
    Gate,
    Up,
    FfnSubNorm,
    Down,
}

impl Part {
    /// Name in `layer`, without `.weight` or `.bias`.
    pub fn name(self, naming: Naming, layer: usize) -> String {
        let (prefix, part) = match naming {
            Naming::Gguf => ("blk", self.gguf()),
            Naming::HuggingFace => ("model.layers", self.hugging_face()),
        };
        format!("{prefix}.{layer}.{part}")
    }

    fn gguf(self) -> &'static str {
        match self {
            Part::AttentionNorm => "attn_norm",
            Part::Query => "attn_q",
            Part::Key => "attn_k",
            Part::Value => "attn_v",
            Part::QueryNorm => "attn_q_norm",
            Part::KeyNorm => "attn_k_norm",
            Part::AttentionSubNorm => "attn_sub_norm",
            Part::AttentionOutput => "attn_output",
            Part::FfnNorm => "ffn_norm",
            Part::Gate => "ffn_gate",
            Part::Up => "ffn_up",
            Part::FfnSubNorm => "ffn_sub_norm",
            Part::Down => "ffn_down",
        }
    }

    fn hugging_face(self) -> &'static str {
        match self {
            Part::AttentionNorm => "input_layernorm",
            Part::Query => "self_attn.q_proj",
            Part::Key => "self_attn.k_proj",
            Part::Value => "self_attn.v_proj",
            Part::QueryNorm => "self_attn.q_norm",
            Part::KeyNorm => "self_attn.k_norm",
            Part::AttentionSubNorm => "self_attn.attn_sub_norm",
            Part::AttentionOutput => "self_attn.o_proj",
            Part::FfnNorm => "post_attention_layernorm",
            Part::Gate => "mlp.gate_proj",
            Part::Up => "mlp.up_proj",
            Part::FfnSubNorm => "mlp.ffn_sub_norm",
            Part::Down => "mlp.down_proj",
        }
    }
}
