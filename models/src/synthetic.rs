//! Models of real shapes with random weights: for speed, plumbing and tests, never for text.
//!
//! A file is a function of its shape and [`Options`] alone: every tensor has a random stream of
//! its own, keyed by seed and name. Weights are scaled so that activations stay near unit size
//! through all layers.

mod random;
mod tokenizer;

use std::io::Write;

use crate::Error;
use crate::arch::{Stretch, llama, qwen2};
use crate::error::shown;
use crate::file::gguf::{DType, Writer};
use random::{Spread, fill_tensor};

/// Dimensions and constants of a model to make.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// Name under which [`shape`] finds it.
    pub name: &'static str,
    /// `llama`, `qwen2` or `bitnet-b1.58`.
    pub architecture: &'static str,
    /// Layers.
    pub layers: usize,
    /// D: model width.
    pub width: usize,
    /// H: query heads.
    pub heads: usize,
    /// KV: key/value heads.
    pub kv_heads: usize,
    /// Dh: head width.
    pub head_dim: usize,
    /// F: feed-forward width.
    pub ffn: usize,
    /// V: vocabulary size, at least [`MIN_VOCAB`].
    pub vocab: usize,
    /// Trained context in tokens.
    pub context: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Llama 3 stretching of the rotary frequencies.
    pub rope_stretch: Option<Stretch>,
    /// Epsilon of RMSNorm.
    pub norm_eps: f32,
    /// Logits use the embedding table.
    pub tied: bool,
    /// q, k and v have a bias.
    pub qkv_bias: bool,
    /// A norm before each output projection.
    pub sub_norms: bool,
    /// Pre-tokeniser that the metadata names (`tokenizer.ggml.pre`).
    pub pre_tokenizer: &'static str,
}

/// Smallest vocabulary: the bytes and the special tokens.
pub const MIN_VOCAB: usize = 256 + tokenizer::SPECIAL.len();

const QWEN2_5: Shape = Shape {
    name: "qwen2.5-0.5b",
    architecture: qwen2::NAME,
    layers: 24,
    width: 896,
    heads: 14,
    kv_heads: 2,
    head_dim: 64,
    ffn: 4864,
    vocab: 151_936,
    context: 32_768,
    rope_theta: 1e6,
    rope_stretch: None,
    norm_eps: 1e-6,
    tied: true,
    qkv_bias: true,
    sub_norms: false,
    pre_tokenizer: "qwen2",
};

const LLAMA_3_2: Shape = Shape {
    name: "llama-3.2-1b",
    architecture: llama::NAME,
    layers: 16,
    width: 2048,
    heads: 32,
    kv_heads: 8,
    head_dim: 64,
    ffn: 8192,
    vocab: 128_256,
    context: 131_072,
    rope_theta: 5e5,
    rope_stretch: Some(Stretch {
        factor: 32.0,
        low_turns: 1.0,
        high_turns: 4.0,
        original_context: 8192.0,
    }),
    norm_eps: 1e-5,
    tied: true,
    qkv_bias: false,
    sub_norms: false,
    pre_tokenizer: "llama-bpe",
};

const SMOLLM2: Shape = Shape {
    name: "smollm2-135m",
    architecture: llama::NAME,
    layers: 30,
    width: 576,
    heads: 9,
    kv_heads: 3,
    head_dim: 64,
    ffn: 1536,
    vocab: 49_152,
    context: 8192,
    rope_theta: 1e5,
    rope_stretch: None,
    norm_eps: 1e-5,
    tied: true,
    qkv_bias: false,
    sub_norms: false,
    pre_tokenizer: "smollm",
};

/// BitNet b1.58 2B-4T (<https://arxiv.org/abs/2504.12285>).
const BITNET_2B: Shape = Shape {
    name: "bitnet-2b-4t",
    architecture: "bitnet-b1.58",
    layers: 30,
    width: 2560,
    heads: 20,
    kv_heads: 5,
    head_dim: 128,
    ffn: 6912,
    vocab: 128_256,
    context: 4096,
    rope_theta: 5e5,
    rope_stretch: None,
    norm_eps: 1e-5,
    tied: true,
    qkv_bias: false,
    sub_norms: true,
    pre_tokenizer: "llama-bpe",
};

const TINY: Shape = Shape {
    name: "tiny",
    layers: 2,
    width: 64,
    heads: 4,
    kv_heads: 2,
    head_dim: 16,
    ffn: 160,
    vocab: 320,
    context: 256,
    rope_theta: 1e4,
    ..SMOLLM2
};

/// The shapes that have names. The `tiny` ones are for tests: `tiny` is a tied Llama,
/// `tiny-qwen2` has biases and a separate output table, `tiny-llama3` stretched frequencies and
/// heads that are wider together than the model.
pub const SHAPES: &[Shape] = &[
    QWEN2_5,
    Shape {
        name: "qwen2.5-1.5b",
        layers: 28,
        width: 1536,
        heads: 12,
        head_dim: 128,
        ffn: 8960,
        ..QWEN2_5
    },
    Shape {
        name: "qwen2.5-3b",
        layers: 36,
        width: 2048,
        heads: 16,
        head_dim: 128,
        ffn: 11_008,
        ..QWEN2_5
    },
    LLAMA_3_2,
    Shape {
        name: "llama-3.2-3b",
        layers: 28,
        width: 3072,
        heads: 24,
        head_dim: 128,
        ..LLAMA_3_2
    },
    SMOLLM2,
    BITNET_2B,
    TINY,
    Shape {
        name: "tiny-qwen2",
        architecture: qwen2::NAME,
        rope_theta: 1e6,
        norm_eps: 1e-6,
        tied: false,
        qkv_bias: true,
        pre_tokenizer: "qwen2",
        ..TINY
    },
    Shape {
        name: "tiny-llama3",
        head_dim: 32,
        rope_theta: 5e5,
        rope_stretch: Some(Stretch {
            factor: 8.0,
            low_turns: 1.0,
            high_turns: 4.0,
            original_context: 64.0,
        }),
        pre_tokenizer: "llama-bpe",
        ..TINY
    },
];

/// Finds a shape by name.
///
/// # Errors
/// An unknown name; the message lists the known ones.
pub fn shape(name: &str) -> Result<&'static Shape, Error> {
    SHAPES
        .iter()
        .find(|s| s.name == name)
        .ok_or_else(|| Error::UnknownName {
            what: "shape",
            found: shown(name),
            known: SHAPES.iter().map(|s| s.name).collect::<Vec<_>>().join(", "),
        })
}

/// Seed and weight types of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Two files of one shape are equal exactly when their options are.
    pub seed: u64,
    /// Type of the linear layers: Q4_0, Q4_1, Q8_0 or TQ2_0.
    pub linear: DType,
    /// Type of the embedding and output tables: Q8_0, Q4_0, Q4_1, F16, BF16 or F32.
    pub embedding: DType,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            seed: 1,
            linear: DType::Q4_0,
            embedding: DType::Q8_0,
        }
    }
}

/// One tensor to make.
struct Tensor {
    name: String,
    dims: Vec<u64>,
    dtype: DType,
    content: Content,
}

enum Content {
    Random(Spread),
    Values(Vec<f32>),
}

/// Writes a model file; gives `out` back. The file is streamed, a few kilobytes at a time.
///
/// # Errors
/// A shape that the types cannot hold (widths that are no multiple of 32, a vocabulary below
/// [`MIN_VOCAB`]), a type that is not listed in [`Options`], or a failure of `out`.
pub fn write<W: Write>(shape: &Shape, options: &Options, out: W) -> Result<W, Error> {
    let mut writer = Writer::new();
    put_config(&mut writer, shape);
    tokenizer::put(&mut writer, shape)?;
    let tensors = tensors(shape, options);
    for tensor in &tensors {
        writer.tensor(&tensor.name, &tensor.dims, tensor.dtype)?;
    }
    let mut data = writer.begin(out)?;
    for tensor in &tensors {
        match &tensor.content {
            Content::Random(spread) => {
                let elems = tensor.dims.iter().product();
                fill_tensor(
                    &tensor.name,
                    tensor.dtype,
                    elems,
                    *spread,
                    options.seed,
                    &mut |bytes| data.write(bytes),
                )?;
            }
            Content::Values(values) => {
                data.write(
                    &values
                        .iter()
                        .flat_map(|v| v.to_le_bytes())
                        .collect::<Vec<u8>>(),
                )?;
            }
        }
    }
    data.finish()
}

/// [`write()`] into memory.
///
/// # Errors
/// As [`write()`].
pub fn to_vec(shape: &Shape, options: &Options) -> Result<Vec<u8>, Error> {
    write(shape, options, Vec::new())
}

fn put_config(writer: &mut Writer, shape: &Shape) {
    let key = |name: &str| format!("{}.{name}", shape.architecture);
    writer
        .string(crate::arch::ARCHITECTURE_KEY, shape.architecture)
        .string("general.name", &format!("{} (random weights)", shape.name));
    for (name, value) in [
        ("block_count", shape.layers),
        ("context_length", shape.context),
        ("embedding_length", shape.width),
        ("feed_forward_length", shape.ffn),
        ("attention.head_count", shape.heads),
        ("attention.head_count_kv", shape.kv_heads),
        ("attention.key_length", shape.head_dim),
        ("attention.value_length", shape.head_dim),
        ("rope.dimension_count", shape.head_dim),
        ("vocab_size", shape.vocab),
    ] {
        writer.u32(&key(name), value as u32);
    }
    writer
        .f32(&key("attention.layer_norm_rms_epsilon"), shape.norm_eps)
        .f32(&key("rope.freq_base"), shape.rope_theta);
}

/// The tensors of a shape, in the order in which they are stored.
fn tensors(shape: &Shape, options: &Options) -> Vec<Tensor> {
    let (width, ffn) = (shape.width as u64, shape.ffn as u64);
    let attended = (shape.heads * shape.head_dim) as u64;
    let keys = (shape.kv_heads * shape.head_dim) as u64;
    let table = |name: &str| Tensor {
        name: name.to_owned(),
        dims: vec![width, shape.vocab as u64],
        dtype: options.embedding,
        content: Content::Random(Spread {
            mean: 0.0,
            deviation: 0.3,
        }),
    };
    let vector = |name: String, len: u64, mean: f32, deviation: f32| Tensor {
        name,
        dims: vec![len],
        dtype: DType::F32,
        content: Content::Random(Spread { mean, deviation }),
    };
    // Unit-size inputs give outputs of size `gain`.
    let linear = |name: String, rows: u64, cols: u64, gain: f32| Tensor {
        name,
        dims: vec![cols, rows],
        dtype: options.linear,
        content: Content::Random(Spread {
            mean: 0.0,
            deviation: gain / (cols as f32).sqrt(),
        }),
    };
    // What each of the `2 * layers` branches adds to the residual stream.
    let branch = 1.0 / (2.0 * shape.layers as f32).sqrt();

    let mut tensors = vec![table("token_embd.weight")];
    if let Some(stretch) = &shape.rope_stretch {
        let divisors = stretch.divisors(shape.head_dim, shape.rope_theta.into());
        tensors.push(Tensor {
            name: "rope_freqs.weight".to_owned(),
            dims: vec![divisors.len() as u64],
            dtype: DType::F32,
            content: Content::Values(divisors),
        });
    }
    for layer in 0..shape.layers {
        let name = |part: &str| format!("blk.{layer}.{part}");
        tensors.push(vector(name("attn_norm.weight"), width, 1.0, 0.1));
        for (part, rows) in [("attn_q", attended), ("attn_k", keys), ("attn_v", keys)] {
            tensors.push(linear(name(&format!("{part}.weight")), rows, width, 1.0));
            if shape.qkv_bias {
                tensors.push(vector(name(&format!("{part}.bias")), rows, 0.0, 0.3));
            }
        }
        if shape.sub_norms {
            tensors.push(vector(name("attn_sub_norm.weight"), attended, 1.0, 0.1));
            tensors.push(vector(name("ffn_sub_norm.weight"), ffn, 1.0, 0.1));
        }
        tensors.push(linear(name("attn_output.weight"), width, attended, branch));
        tensors.push(vector(name("ffn_norm.weight"), width, 1.0, 0.1));
        tensors.push(linear(name("ffn_gate.weight"), ffn, width, 1.0));
        tensors.push(linear(name("ffn_up.weight"), ffn, width, 1.0));
        tensors.push(linear(name("ffn_down.weight"), width, ffn, branch));
    }
    tensors.push(vector("output_norm.weight".to_owned(), width, 1.0, 0.1));
    if !shape.tied {
        tensors.push(table("output.weight"));
    }
    tensors
}
