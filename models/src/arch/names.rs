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

impl Outer {
    const ALL: [Outer; 3] = [Outer::Embedding, Outer::Norm, Outer::Output];
}

impl Part {
    const ALL: [Part; 13] = [
        Part::AttentionNorm,
        Part::Query,
        Part::Key,
        Part::Value,
        Part::QueryNorm,
        Part::KeyNorm,
        Part::AttentionSubNorm,
        Part::AttentionOutput,
        Part::FfnNorm,
        Part::Gate,
        Part::Up,
        Part::FfnSubNorm,
        Part::Down,
    ];
}

/// The Hugging Face name of a tensor of a recipe. `None` for a name that no recipe has.
pub fn hugging_face_name(name: &str) -> Option<String> {
    let to = Naming::HuggingFace;
    for naming in [Naming::Gguf, to] {
        if let Some(outer) = Outer::ALL.iter().find(|outer| outer.name(naming) == name) {
            return Some(outer.name(to).to_owned());
        }
    }
    let (stem, suffix) = name.rsplit_once('.')?;
    let gguf = stem.strip_prefix("blk.").map(|rest| (rest, Naming::Gguf));
    let (rest, naming) = gguf.or_else(|| Some((stem.strip_prefix("model.layers.")?, to)))?;
    let (layer, part) = rest.split_once('.')?;
    let layer = layer.parse().ok()?;
    let part = Part::ALL.iter().find(|candidate| {
        part == match naming {
            Naming::Gguf => candidate.gguf(),
            Naming::HuggingFace => candidate.hugging_face(),
        }
    })?;
    Some(format!("{}.{suffix}", part.name(to, layer)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_both_formats_become_hugging_face_names() {
        for part in Part::ALL {
            let name = format!("{}.weight", part.name(Naming::HuggingFace, 7));
            let gguf = format!("{}.weight", part.name(Naming::Gguf, 7));
            assert_eq!(hugging_face_name(&gguf).as_ref(), Some(&name));
            assert_eq!(hugging_face_name(&name).as_ref(), Some(&name));
        }
        for (from, to) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            (
                "blk.11.attn_q.bias",
                "model.layers.11.self_attn.q_proj.bias",
            ),
            ("lm_head.weight", "lm_head.weight"),
        ] {
            assert_eq!(hugging_face_name(from).as_deref(), Some(to));
        }
        for other in ["", "blk.x.attn_q.weight", "blk.1.other.weight", "blk.1"] {
            assert_eq!(hugging_face_name(other), None, "{other}");
        }
    }
}
