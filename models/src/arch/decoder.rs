//! What the decoder-only families share: reading the configuration, the layer recipe, and the
//! check that the file holds the tensors of the recipe and no others.

use std::collections::HashSet;

use super::Config;
use crate::error::shown;
use crate::file::gguf::Gguf;
use crate::recipe::{Buffer, Recipe, RowOrder, Step, WeightId, WeightKind, WeightRef};
use crate::{Error, weights};

/// Tensor of the rotary frequency divisors, one for all layers.
const ROPE_DIVISORS: &str = "rope_freqs.weight";
/// Largest dimension or count taken from a file; sizes made of two of them cannot overflow.
const MAX_DIMENSION: u64 = i32::MAX as u64;

/// How a family differs from the others.
pub(super) struct Family {
    /// Prefix of its metadata keys.
    pub name: &'static str,
    /// q and k rows hold rotary pairs as neighbours.
    pub interleaved_rotary_rows: bool,
}

pub(super) fn recipe(gguf: &Gguf<'_>, family: &Family) -> Result<Recipe, Error> {
    let keys = Keys {
        gguf,
        family: family.name,
    };
    keys.refuse_unsupported()?;
    let config = keys.config()?;
    let rope_divisors = rope_divisors(&keys, config.head_dim)?;
    let mut builder = Builder {
        gguf,
        weights: Vec::new(),
        steps: Vec::new(),
    };
    builder.model(&config, family)?;
    builder.refuse_unknown_tensors()?;
    Ok(Recipe {
        config,
        weights: builder.weights,
        steps: builder.steps,
        rope_divisors,
    })
}

/// Metadata under the family's prefix.
struct Keys<'g, 'a> {
    gguf: &'g Gguf<'a>,
    family: &'static str,
}

impl Keys<'_, '_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.family)
    }

    fn fail(&self, name: &str, reason: String) -> Error {
        Error::KeyValue {
            key: shown(&self.key(name)),
            reason,
        }
    }

    fn dimension_opt(&self, name: &str) -> Result<Option<usize>, Error> {
        match self.gguf.metadata.u64_opt(&self.key(name))? {
            Some(v) if v == 0 || v > MAX_DIMENSION => {
                Err(self.fail(name, format!("{v} is not between 1 and {MAX_DIMENSION}")))
            }
            // No truncation: at most MAX_DIMENSION.
            v => Ok(v.map(|v| v as usize)),
        }
    }

    fn dimension(&self, name: &str) -> Result<usize, Error> {
        self.dimension_opt(name)?.ok_or_else(|| Error::MissingKey {
            key: shown(&self.key(name)),
        })
    }

    fn positive_opt(&self, name: &str) -> Result<Option<f32>, Error> {
        match self.gguf.metadata.f64_opt(&self.key(name))? {
            Some(v) if !(v as f32).is_finite() || v as f32 <= 0.0 => {
                Err(self.fail(name, format!("{v} is not a positive number")))
            }
            v => Ok(v.map(|v| v as f32)),
        }
    }

    fn multiple_of_32(&self, name: &str, value: usize) -> Result<usize, Error> {
        if value.is_multiple_of(32) {
            return Ok(value);
        }
        Err(self.fail(name, format!("{value} is not a multiple of 32")))
    }

    /// Settings that change the result and that the recipe cannot express.
    fn refuse_unsupported(&self) -> Result<(), Error> {
        let metadata = &self.gguf.metadata;
        if let Some(experts) = metadata.u64_opt(&self.key("expert_count"))?
            && experts > 0
        {
            return Err(self.fail(
                "expert_count",
                "mixtures of experts are not supported".into(),
            ));
        }
        if let Some(window) = self.dimension_opt("attention.sliding_window")?
            && window < self.dimension("context_length")?
        {
            let reason = format!("attention windows ({window} tokens) are not supported");
            return Err(self.fail("attention.sliding_window", reason));
        }
        for name in [
            "logit_scale",
            "embedding_scale",
            "residual_scale",
            "attention.scale",
        ] {
            if let Some(scale) = metadata.f64_opt(&self.key(name))?
                && scale != 0.0
            {
                return Err(self.fail(name, format!("{scale} is not supported")));
            }
        }
        if metadata.bool_opt(&self.key("attention.causal"))? == Some(false) {
            let reason = "attention to later tokens is not supported".to_owned();
            return Err(self.fail("attention.causal", reason));
        }
        Ok(())
    }

    fn config(&self) -> Result<Config, Error> {
        let metadata = &self.gguf.metadata;
        let width = self.multiple_of_32("embedding_length", self.dimension("embedding_length")?)?;
        let ffn = self.multiple_of_32(
            "feed_forward_length",
            self.dimension("feed_forward_length")?,
        )?;
        let heads = self.dimension("attention.head_count")?;
        let kv_heads = self
            .dimension_opt("attention.head_count_kv")?
            .unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let reason = format!("{kv_heads} key/value heads do not divide {heads} heads");
            return Err(self.fail("attention.head_count_kv", reason));
        }
        let norm_eps = self
            .positive_opt("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| Error::MissingKey {
                key: shown(&self.key("attention.layer_norm_rms_epsilon")),
            })?;
        Ok(Config {
            architecture: self.family.to_owned(),
            name: metadata
                .string_opt("general.name")?
                .unwrap_or(self.family)
                .to_owned(),
            layers: self.dimension("block_count")?,
            width,
            heads,
            kv_heads,
            head_dim: self.head_dim(width, heads)?,
            ffn,
            vocab: self.vocab()?,
            context: self.dimension("context_length")?,
            rope_theta: self.positive_opt("rope.freq_base")?.unwrap_or(10_000.0),
            norm_eps,
            tied: self.gguf.tensor("output.weight").is_none(),
        })
    }

    fn head_dim(&self, width: usize, heads: usize) -> Result<usize, Error> {
        let key_length = self.dimension_opt("attention.key_length")?;
        let head_dim = match key_length {
            Some(length) => length,
            None if width.is_multiple_of(heads) => width / heads,
            None => {
                let reason = format!("{heads} heads do not divide the width {width}");
                return Err(self.fail("attention.head_count", reason));
            }
        };
        let name = if key_length.is_some() {
            "attention.key_length"
        } else {
            "embedding_length"
        };
        if !head_dim.is_multiple_of(2) {
            return Err(self.fail(name, format!("head width {head_dim} is odd")));
        }
        match heads.checked_mul(head_dim) {
            Some(all) if all as u64 <= MAX_DIMENSION => self.multiple_of_32(name, all)?,
            _ => return Err(self.fail(name, format!("{heads} heads of {head_dim} are too wide"))),
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(other) = self.dimension_opt(name)?
                && other != head_dim
            {
                let reason = format!("{other} differs from the head width {head_dim}");
                return Err(self.fail(name, reason));
            }
        }
        Ok(head_dim)
    }

    /// Rows of the embedding table, which tokenizer and metadata have to agree with.
    fn vocab(&self) -> Result<usize, Error> {
        let table = self.gguf.require_tensor("token_embd.weight")?;
        let rows = table.dims.get(1).copied().unwrap_or(1);
        let tokens = self.gguf.metadata.array_opt("tokenizer.ggml.tokens")?;
        let claims = [
            (
                "tokenizer.ggml.tokens".to_owned(),
                tokens.map(|tokens| tokens.len() as u64),
            ),
            (
                self.key("vocab_size"),
                self.gguf.metadata.u64_opt(&self.key("vocab_size"))?,
            ),
        ];
        for (key, claim) in claims {
            if let Some(claim) = claim
                && claim != rows
            {
                return Err(Error::KeyValue {
                    key: shown(&key),
                    reason: format!(
                        "vocabulary of {claim} tokens, but token_embd.weight has {rows} rows"
                    ),
                });
            }
        }
        if rows > MAX_DIMENSION {
            return Err(Error::Tensor {
                name: shown(table.name),
                reason: format!("{rows} rows are more than {MAX_DIMENSION}"),
            });
        }
        Ok(rows as usize)
    }

    /// Factor by which positions are stretched uniformly.
    fn linear_rope_factor(&self) -> Result<f32, Error> {
        let kind = self
            .gguf
            .metadata
            .string_opt(&self.key("rope.scaling.type"))?;
        match kind {
            Some("none") => Ok(1.0),
            // The older key, and files with a factor and no type, mean linear scaling.
            None | Some("linear") => Ok(match self.positive_opt("rope.scaling.factor")? {
                Some(factor) => factor,
                None => self.positive_opt("rope.scale_linear")?.unwrap_or(1.0),
            }),
            Some(other) => {
                let reason = format!("{} is not supported: none and linear are", shown(other));
                Err(self.fail("rope.scaling.type", reason))
            }
        }
    }
}

/// The divisors of the rotary frequencies: those of the file times the linear factor.
fn rope_divisors(keys: &Keys<'_, '_>, head_dim: usize) -> Result<Option<Vec<f32>>, Error> {
    let factor = keys.linear_rope_factor()?;
    if keys.gguf.tensor(ROPE_DIVISORS).is_none() {
        return Ok((factor != 1.0).then(|| vec![factor; head_dim / 2]));
    }
    let weight = vector(ROPE_DIVISORS.to_owned(), head_dim / 2, RowOrder::AsStored);
    let mut divisors = weights::decode_vector(keys.gguf, &weight)?;
    for divisor in &mut divisors {
        *divisor *= factor;
        if !divisor.is_finite() || *divisor <= 0.0 {
            return Err(Error::Tensor {
                name: shown(ROPE_DIVISORS),
                reason: format!("{divisor} cannot divide a frequency"),
            });
        }
    }
    Ok(Some(divisors))
}

fn vector(name: String, cols: usize, row_order: RowOrder) -> WeightRef {
    WeightRef {
        name,
        rows: 1,
        cols,
        kind: WeightKind::Vector,
        row_order,
    }
}

/// A linear layer: tensor name without suffix, output and input width, row order, buffers.
struct Linear {
    name: String,
    rows: usize,
    cols: usize,
    row_order: RowOrder,
    src: Buffer,
    dst: Buffer,
}

/// Collects weights and steps; each tensor is checked as it is named, so that a layer count that
/// the file merely claims ends at the first layer that is not there.
struct Builder<'g, 'a> {
    gguf: &'g Gguf<'a>,
    weights: Vec<WeightRef>,
    steps: Vec<Step>,
}

impl Builder<'_, '_> {
    fn weight(&mut self, weight: WeightRef) -> Result<WeightId, Error> {
        weights::check_shape(self.gguf.require_tensor(&weight.name)?, &weight)?;
        self.weights.push(weight);
        Ok(self.weights.len() - 1)
    }

    fn table(&mut self, name: &str, config: &Config) -> Result<WeightId, Error> {
        self.weight(WeightRef {
            name: name.to_owned(),
            rows: config.vocab,
            cols: config.width,
            kind: WeightKind::Embedding,
            row_order: RowOrder::AsStored,
        })
    }

    fn norm(&mut self, name: String, config: &Config) -> Result<(), Error> {
        let weight = self.weight(vector(name, config.width, RowOrder::AsStored))?;
        self.steps.push(Step::RmsNorm {
            weight,
            eps: config.norm_eps,
            src: Buffer::Residual,
            dst: Buffer::Normed,
        });
        Ok(())
    }

    /// A linear layer, with its bias if the file has one.
    fn linear(&mut self, linear: Linear) -> Result<(), Error> {
        let Linear {
            name,
            rows,
            cols,
            row_order,
            src,
            dst,
        } = linear;
        let weight = self.weight(WeightRef {
            name: format!("{name}.weight"),
            rows,
            cols,
            kind: WeightKind::Linear,
            row_order,
        })?;
        let bias = format!("{name}.bias");
        let bias = match self.gguf.tensor(&bias) {
            Some(_) => Some(self.weight(vector(bias, rows, row_order))?),
            None => None,
        };
        self.steps.push(Step::Linear {
            weight,
            bias,
            src,
            dst,
        });
        Ok(())
    }

    fn model(&mut self, config: &Config, family: &Family) -> Result<(), Error> {
        let table = self.table("token_embd.weight", config)?;
        self.steps.push(Step::Embed {
            table,
            dst: Buffer::Residual,
        });
        for layer in 0..config.layers {
            self.attention(layer, config, family)?;
            self.feed_forward(layer, config)?;
        }
        self.norm("output_norm.weight".to_owned(), config)?;
        let table = if config.tied {
            table
        } else {
            self.table("output.weight", config)?
        };
        self.steps.push(Step::Logits {
            table,
            src: Buffer::Normed,
            dst: Buffer::Logits,
        });
        Ok(())
    }

    fn attention(&mut self, layer: usize, config: &Config, family: &Family) -> Result<(), Error> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let Config {
            width,
            heads,
            kv_heads,
            head_dim,
            ..
        } = *config;
        let rotary = match family.interleaved_rotary_rows {
            true => RowOrder::Interleaved { head_dim },
            false => RowOrder::AsStored,
        };
        self.norm(name("attn_norm.weight"), config)?;
        for (part, heads, row_order, dst) in [
            ("attn_q", heads, rotary, Buffer::Query),
            ("attn_k", kv_heads, rotary, Buffer::Key),
            ("attn_v", kv_heads, RowOrder::AsStored, Buffer::Value),
        ] {
            let rows = heads * head_dim;
            let src = Buffer::Normed;
            self.linear(Linear {
                name: name(part),
                rows,
                cols: width,
                row_order,
                src,
                dst,
            })?;
        }
        self.steps.extend([
            Step::Rope {
                buffer: Buffer::Query,
                heads,
            },
            Step::Rope {
                buffer: Buffer::Key,
                heads: kv_heads,
            },
            Step::KvAppend {
                layer,
                key: Buffer::Key,
                value: Buffer::Value,
            },
            Step::Attention {
                layer,
                query: Buffer::Query,
                dst: Buffer::Attended,
                scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            },
        ]);
        self.linear(Linear {
            name: name("attn_output"),
            rows: width,
            cols: heads * head_dim,
            row_order: RowOrder::AsStored,
            src: Buffer::Attended,
            dst: Buffer::Projected,
        })?;
        self.steps.push(Step::Add {
            src: Buffer::Projected,
            dst: Buffer::Residual,
        });
        Ok(())
    }

    fn feed_forward(&mut self, layer: usize, config: &Config) -> Result<(), Error> {
        let name = |part: &str| format!("blk.{layer}.{part}");
        let Config { width, ffn, .. } = *config;
        let row_order = RowOrder::AsStored;
        self.norm(name("ffn_norm.weight"), config)?;
        for (part, dst) in [("ffn_gate", Buffer::Gate), ("ffn_up", Buffer::Up)] {
            let src = Buffer::Normed;
            self.linear(Linear {
                name: name(part),
                rows: ffn,
                cols: width,
                row_order,
                src,
                dst,
            })?;
        }
        self.steps.push(Step::SwiGlu {
            gate: Buffer::Gate,
            up: Buffer::Up,
            dst: Buffer::Gated,
        });
        let (src, dst) = (Buffer::Gated, Buffer::Projected);
        let name = name("ffn_down");
        self.linear(Linear {
            name,
            rows: width,
            cols: ffn,
            row_order,
            src,
            dst,
        })?;
        self.steps.push(Step::Add {
            src: Buffer::Projected,
            dst: Buffer::Residual,
        });
        Ok(())
    }

    /// A tensor that no step reads is a part of the model that would be left out of the result.
    fn refuse_unknown_tensors(&self) -> Result<(), Error> {
        let known: HashSet<&str> = self.weights.iter().map(|w| w.name.as_str()).collect();
        let unknown = |name: &str| name != ROPE_DIVISORS && !known.contains(name);
        match self.gguf.tensors.iter().find(|tensor| unknown(tensor.name)) {
            None => Ok(()),
            Some(tensor) => Err(Error::Tensor {
                name: shown(tensor.name),
                reason: "is no part of this architecture".to_owned(),
            }),
        }
    }
}
