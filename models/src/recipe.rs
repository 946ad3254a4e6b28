//! The forward pass as data: a list of [`Step`]s over named activation [`Buffer`]s and weight ids.
//!
//! A recipe is the only "graph" in the project. Backends compile it once at load; an architecture
//! file in `arch/` produces it and never names a kernel. All shapes are per token: a buffer that
//! holds `T` tokens is `(T, elems)`.

use crate::arch::Config;

/// Index into [`Recipe::weights`].
pub type WeightId = usize;

/// What a tensor is used for; decides how `quant::decode` may store it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightKind {
    /// `(V, D)` lookup table, also the logits matrix when tied: becomes INT8.
    Embedding,
    /// The same in a model whose linear layers are floats: becomes F16.
    FloatTable,
    /// `(N, K)` matrix of a linear layer: INT4, INT8, ternary or F16, whatever keeps the numbers of
    /// the source.
    Linear,
    /// `(N,)` float vector: normalisation gain or bias.
    Vector,
}

/// Order of the rows of a stored matrix relative to the order that the kernels expect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowOrder {
    /// Rows are already in the order of the half-split rotary embedding.
    AsStored,
    /// Llama-style GGUF files store q and k rows so that rotary pairs are neighbours `(2i, 2i+1)`.
    /// The loader moves row `2i + s` of each head to `s * head_dim / 2 + i`, so that every
    /// backend only knows the half-split pairing `(i, i + head_dim / 2)`.
    Interleaved {
        /// Rows of one head.
        head_dim: usize,
    },
}

/// One tensor that a recipe needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightRef {
    /// Name in the model file.
    pub name: String,
    /// Rows N (1 for a vector).
    pub rows: usize,
    /// Columns K: the input width of the matrix, or the length of the vector.
    pub cols: usize,
    /// Use of the tensor.
    pub kind: WeightKind,
    /// Row order in the file.
    pub row_order: RowOrder,
}

/// Activation buffers of one token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Buffer {
    /// `(D,)` residual stream.
    Residual,
    /// `(D,)` normalised input of the next linear.
    Normed,
    /// `(H, Dh)` queries.
    Query,
    /// `(KV, Dh)` keys of this token.
    Key,
    /// `(KV, Dh)` values of this token.
    Value,
    /// `(H, Dh)` attention output.
    Attended,
    /// `(D,)` output of a projection before it joins the residual stream.
    Projected,
    /// `(F,)` gate projection.
    Gate,
    /// `(F,)` up projection.
    Up,
    /// `(F,)` gated activation.
    Gated,
    /// `(V,)` logits.
    Logits,
}

impl Buffer {
    /// Every buffer, in declaration order.
    pub const ALL: [Buffer; 11] = [
        Buffer::Residual,
        Buffer::Normed,
        Buffer::Query,
        Buffer::Key,
        Buffer::Value,
        Buffer::Attended,
        Buffer::Projected,
        Buffer::Gate,
        Buffer::Up,
        Buffer::Gated,
        Buffer::Logits,
    ];
}

/// One operation of the forward pass.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// `dst = table[token]`.
    Embed {
        /// `(V, D)` table.
        table: WeightId,
        /// Destination.
        dst: Buffer,
    },
    /// `dst = src / rms(src) * weight`.
    RmsNorm {
        /// `(D,)` gain.
        weight: WeightId,
        /// Added to the mean square.
        eps: f32,
        /// Source.
        src: Buffer,
        /// Destination.
        dst: Buffer,
    },
    /// `dst = weight * src + bias`.
    Linear {
        /// `(N, K)` matrix.
        weight: WeightId,
        /// `(N,)` bias.
        bias: Option<WeightId>,
        /// `(K,)` source.
        src: Buffer,
        /// `(N,)` destination.
        dst: Buffer,
    },
    /// [`Step::RmsNorm`] of every head of `buffer` `(heads, head_dim)` by itself, in place.
    HeadNorm {
        /// `(Dh,)` gain, the same for all heads.
        weight: WeightId,
        /// Added to the mean square.
        eps: f32,
        /// Buffer normalised in place.
        buffer: Buffer,
        /// Heads in the buffer.
        heads: usize,
    },
    /// Rounds `buffer` in place to 8 bits with one scale a token: `x = round(x / s) * s`, ties to
    /// even, with `s = max(|x|, 1e-5) / 127`.
    RoundToInt8 {
        /// Buffer rounded in place.
        buffer: Buffer,
    },
    /// Half-split rotary position embedding, in place on `(heads, head_dim)`.
    /// Angles come from [`Recipe::rope_inverse_frequencies`].
    Rope {
        /// Buffer turned in place.
        buffer: Buffer,
        /// Heads in the buffer.
        heads: usize,
    },
    /// Appends this token's key and value to the cache of `layer`.
    KvAppend {
        /// Layer index.
        layer: usize,
        /// `(KV, Dh)` keys, already turned.
        key: Buffer,
        /// `(KV, Dh)` values.
        value: Buffer,
    },
    /// Causal grouped-query attention over the cache of `layer`, this token included.
    Attention {
        /// Layer index.
        layer: usize,
        /// `(H, Dh)` queries, already turned.
        query: Buffer,
        /// `(H, Dh)` destination.
        dst: Buffer,
        /// Multiplies the scores: `1 / sqrt(Dh)`.
        scale: f32,
        /// The most tokens that are seen, the newest included; none for all.
        window: Option<usize>,
    },
    /// `dst = silu(gate) * up`.
    SwiGlu {
        /// `(F,)` gate.
        gate: Buffer,
        /// `(F,)` up.
        up: Buffer,
        /// `(F,)` destination.
        dst: Buffer,
    },
    /// `dst = relu(gate)² * up`.
    ReluSquaredGlu {
        /// `(F,)` gate.
        gate: Buffer,
        /// `(F,)` up.
        up: Buffer,
        /// `(F,)` destination.
        dst: Buffer,
    },
    /// `dst += src`.
    Add {
        /// Source.
        src: Buffer,
        /// Accumulated in place.
        dst: Buffer,
    },
    /// `dst = table * src`, only for the last token of a prompt.
    Logits {
        /// `(V, D)` matrix, the embedding table when tied.
        table: WeightId,
        /// `(D,)` source.
        src: Buffer,
        /// `(V,)` destination.
        dst: Buffer,
    },
}

/// The forward pass of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// Dimensions and constants.
    pub config: Config,
    /// Tensors needed, in file-independent order.
    pub weights: Vec<WeightRef>,
    /// Steps in order.
    pub steps: Vec<Step>,
}

impl Config {
    /// Elements of `buffer` for one token.
    pub fn elems(&self, buffer: Buffer) -> usize {
        match buffer {
            Buffer::Residual | Buffer::Normed | Buffer::Projected => self.width,
            Buffer::Query | Buffer::Attended => self.heads * self.head_dim,
            Buffer::Key | Buffer::Value => self.kv_heads * self.head_dim,
            Buffer::Gate | Buffer::Up | Buffer::Gated => self.ffn,
            Buffer::Logits => self.vocab,
        }
    }
}

impl Recipe {
    /// Elements of `buffer` for one token.
    pub fn elems(&self, buffer: Buffer) -> usize {
        self.config.elems(buffer)
    }

    /// `(head_dim / 2,)` inverse frequencies in radians a position: `theta^(-2i / head_dim)`
    /// (RoFormer, <https://arxiv.org/abs/2104.09864>), each divided by its entry of
    /// [`Config::rope_divisors`] where there is one.
    pub fn rope_inverse_frequencies(&self) -> Vec<f64> {
        let c = &self.config;
        (0..c.head_dim / 2)
            .map(|i| {
                let frequency = (c.rope_theta as f64).powf(-2.0 * i as f64 / c.head_dim as f64);
                match &c.rope_divisors {
                    Some(divisors) => frequency / divisors[i] as f64,
                    None => frequency,
                }
            })
            .collect()
    }

    /// Cosine and sine tables `(positions, head_dim / 2)` in float32, angles computed in float64.
    /// Both backends read these, so they turn by identical angles.
    pub fn rope_tables(&self, positions: usize) -> (Vec<f32>, Vec<f32>) {
        let inv = self.rope_inverse_frequencies();
        let mut cos = Vec::with_capacity(positions * inv.len());
        let mut sin = Vec::with_capacity(positions * inv.len());
        for p in 0..positions {
            for f in &inv {
                let (s, c) = (p as f64 * f).sin_cos();
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        (cos, sin)
    }
}
