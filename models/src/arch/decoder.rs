//! What the decoder-only families share: the layer recipe, and the check that the source holds the
//! tensors of the recipe and no others.

use std::collections::HashSet;

use super::Config;
use super::names::{Outer, Part};
use crate::file::gguf::ROPE_DIVISORS;
use crate::file::{Naming, Source};
use crate::recipe::{Buffer, Recipe, RowOrder, Step, WeightId, WeightKind, WeightRef};
use crate::{Error, weights};

/// How a family differs from the others.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Family {
    /// q and k rows of its GGUF files hold rotary pairs as neighbours.
    pub interleaved_in_gguf: bool,
    /// Every head of q and k is normalised before it is turned.
    pub head_norms: bool,
    /// Attention output and gated activation are normalised before their projections.
    pub sub_norms: bool,
    /// What the gate projection goes through.
    pub gate: Gate,
}

impl Family {
    /// Norm, attention, norm, SwiGLU; rotary pairs half a head apart in every file.
    pub const PLAIN: Family = Family {
        interleaved_in_gguf: false,
        head_norms: false,
        sub_norms: false,
        gate: Gate::Silu,
    };
}

/// Activation of the feed-forward gate.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Gate {
    Silu,
    ReluSquared,
}

impl Gate {
    /// Its name in `hidden_act`.
    pub fn activation(self) -> &'static str {
        match self {
            Gate::Silu => "silu",
            Gate::ReluSquared => "relu2",
        }
    }
}

pub(super) fn recipe(
    source: &dyn Source,
    config: Config,
    family: &Family,
) -> Result<Recipe, Error> {
    let mut builder = Builder {
        source,
        config: &config,
        family,
        weights: Vec::new(),
        steps: Vec::new(),
        used: HashSet::new(),
    };
    builder.model()?;
    builder.refuse_unknown_tensors()?;
    let Builder { weights, steps, .. } = builder;
    Ok(Recipe {
        config,
        weights,
        steps,
    })
}

/// A linear layer: tensor name without suffix, output and input width, row order, buffers.
struct Linear {
    part: Part,
    layer: usize,
    rows: usize,
    row_order: RowOrder,
    src: Buffer,
    dst: Buffer,
}

/// Collects weights and steps; each tensor is checked as it is named, so that a layer count that
/// the file merely claims ends at the first layer that is not there.
struct Builder<'s> {
    source: &'s dyn Source,
    config: &'s Config,
    family: &'s Family,
    weights: Vec<WeightRef>,
    steps: Vec<Step>,
    /// Tensors that the weights are made of.
    used: HashSet<String>,
}

impl Builder<'_> {
    fn weight(&mut self, weight: WeightRef) -> Result<WeightId, Error> {
        self.used.extend(weights::check(self.source, &weight)?);
        self.weights.push(weight);
        Ok(self.weights.len() - 1)
    }

    fn vector(
        &mut self,
        name: String,
        cols: usize,
        row_order: RowOrder,
    ) -> Result<WeightId, Error> {
        self.weight(WeightRef {
            name,
            rows: 1,
            cols,
            kind: WeightKind::Vector,
            row_order,
        })
    }

    /// A vocabulary table. It stays as precise as the linear layers are.
    fn table(&mut self, outer: Outer) -> Result<WeightId, Error> {
        let naming = self.source.naming();
        let first = format!("{}.weight", Part::Query.name(naming, 0));
        let kind = match self.source.tensor(&first) {
            Some(tensor) if tensor.dtype.is_float() => WeightKind::FloatTable,
            _ => WeightKind::Embedding,
        };
        self.weight(WeightRef {
            name: outer.name(naming).to_owned(),
            rows: self.config.vocab,
            cols: self.config.width,
            kind,
            row_order: RowOrder::AsStored,
        })
    }

    fn norm(&mut self, name: String, src: Buffer, dst: Buffer, elems: usize) -> Result<(), Error> {
        let weight = self.vector(format!("{name}.weight"), elems, RowOrder::AsStored)?;
        self.steps.push(Step::RmsNorm {
            weight,
            eps: self.config.norm_eps,
            src,
            dst,
        });
        Ok(())
    }

    /// The norm between the residual stream and the linear layers that read it.
    fn input_norm(&mut self, part: Part, layer: usize) -> Result<(), Error> {
        let name = part.name(self.source.naming(), layer);
        self.norm(name, Buffer::Residual, Buffer::Normed, self.config.width)?;
        self.round(Buffer::Normed);
        Ok(())
    }

    /// Rounds the input of a linear layer where the model was trained so.
    fn round(&mut self, buffer: Buffer) {
        if self.config.int8_activations {
            self.steps.push(Step::RoundToInt8 { buffer });
        }
    }

    /// A linear layer, with its bias if the file has one.
    fn linear(&mut self, linear: Linear) -> Result<(), Error> {
        let Linear {
            part,
            layer,
            rows,
            row_order,
            src,
            dst,
        } = linear;
        let name = part.name(self.source.naming(), layer);
        let weight = self.weight(WeightRef {
            name: format!("{name}.weight"),
            rows,
            cols: self.config.elems(src),
            kind: WeightKind::Linear,
            row_order,
        })?;
        let bias = format!("{name}.bias");
        let bias = match self.source.tensor(&bias) {
            Some(_) => Some(self.vector(bias, rows, row_order)?),
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

    fn model(&mut self) -> Result<(), Error> {
        let table = self.table(Outer::Embedding)?;
        self.steps.push(Step::Embed {
            table,
            dst: Buffer::Residual,
        });
        for layer in 0..self.config.layers {
            self.attention(layer)?;
            self.feed_forward(layer)?;
        }
        let norm = Outer::Norm.name(self.source.naming());
        let weight = self.vector(norm.to_owned(), self.config.width, RowOrder::AsStored)?;
        self.steps.push(Step::RmsNorm {
            weight,
            eps: self.config.norm_eps,
            src: Buffer::Residual,
            dst: Buffer::Normed,
        });
        let table = if self.config.tied {
            table
        } else {
            self.table(Outer::Output)?
        };
        self.steps.push(Step::Logits {
            table,
            src: Buffer::Normed,
            dst: Buffer::Logits,
        });
        Ok(())
    }

    fn attention(&mut self, layer: usize) -> Result<(), Error> {
        let Config {
            width,
            heads,
            kv_heads,
            head_dim,
            ..
        } = *self.config;
        let rotary = match (self.source.naming(), self.family.interleaved_in_gguf) {
            (Naming::Gguf, true) => RowOrder::Interleaved { head_dim },
            _ => RowOrder::AsStored,
        };
        self.input_norm(Part::AttentionNorm, layer)?;
        for (part, heads, row_order, dst) in [
            (Part::Query, heads, rotary, Buffer::Query),
            (Part::Key, kv_heads, rotary, Buffer::Key),
            (Part::Value, kv_heads, RowOrder::AsStored, Buffer::Value),
        ] {
            self.linear(Linear {
                part,
                layer,
                rows: heads * head_dim,
                row_order,
                src: Buffer::Normed,
                dst,
            })?;
        }
        let turned = [
            (Part::QueryNorm, Buffer::Query, heads),
            (Part::KeyNorm, Buffer::Key, kv_heads),
        ];
        if self.family.head_norms {
            for (part, buffer, heads) in turned {
                let name = format!("{}.weight", part.name(self.source.naming(), layer));
                let weight = self.vector(name, head_dim, RowOrder::AsStored)?;
                self.steps.push(Step::HeadNorm {
                    weight,
                    eps: self.config.norm_eps,
                    buffer,
                    heads,
                });
            }
        }
        let rope = |(_, buffer, heads)| Step::Rope { buffer, heads };
        self.steps.extend(turned.map(rope));
        self.steps.extend([
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
                window: self.config.window_of(layer),
            },
        ]);
        // The queries were read: their buffer has the width that the sub-norm needs.
        let src = self.sub_norm(
            Part::AttentionSubNorm,
            layer,
            Buffer::Attended,
            Buffer::Query,
        )?;
        self.projection(Part::AttentionOutput, layer, width, src)
    }

    fn feed_forward(&mut self, layer: usize) -> Result<(), Error> {
        let Config { width, ffn, .. } = *self.config;
        self.input_norm(Part::FfnNorm, layer)?;
        for (part, dst) in [(Part::Gate, Buffer::Gate), (Part::Up, Buffer::Up)] {
            self.linear(Linear {
                part,
                layer,
                rows: ffn,
                row_order: RowOrder::AsStored,
                src: Buffer::Normed,
                dst,
            })?;
        }
        let (gate, up, dst) = (Buffer::Gate, Buffer::Up, Buffer::Gated);
        self.steps.push(match self.family.gate {
            Gate::Silu => Step::SwiGlu { gate, up, dst },
            Gate::ReluSquared => Step::ReluSquaredGlu { gate, up, dst },
        });
        // The gate was read, too.
        let src = self.sub_norm(Part::FfnSubNorm, layer, Buffer::Gated, Buffer::Gate)?;
        self.projection(Part::Down, layer, width, src)
    }

    /// Normalises `src` into `free` where the family does; gives the buffer that the projection reads.
    fn sub_norm(
        &mut self,
        part: Part,
        layer: usize,
        src: Buffer,
        free: Buffer,
    ) -> Result<Buffer, Error> {
        if !self.family.sub_norms {
            return Ok(src);
        }
        let name = part.name(self.source.naming(), layer);
        self.norm(name, src, free, self.config.elems(src))?;
        Ok(free)
    }

    /// A linear layer whose result joins the residual stream.
    fn projection(
        &mut self,
        part: Part,
        layer: usize,
        width: usize,
        src: Buffer,
    ) -> Result<(), Error> {
        self.round(src);
        self.linear(Linear {
            part,
            layer,
            rows: width,
            row_order: RowOrder::AsStored,
            src,
            dst: Buffer::Projected,
        })?;
        self.steps.push(Step::Add {
            src: Buffer::Projected,
            dst: Buffer::Residual,
        });
        Ok(())
    }

    /// A tensor that no step reads is a part of the model that would be left out of the result.
    fn refuse_unknown_tensors(&self) -> Result<(), Error> {
        let tied_output = Outer::Output.name(self.source.naming());
        let known = |name: &str| {
            self.used.contains(name)
                || match self.source.naming() {
                    Naming::Gguf => name == ROPE_DIVISORS,
                    // A copy of the embedding table, and a table that older files keep.
                    Naming::HuggingFace => {
                        (self.config.tied && name == tied_output)
                            || name.ends_with(".rotary_emb.inv_freq")
                    }
                }
        };
        match self.source.tensors().iter().find(|t| !known(t.name)) {
            None => Ok(()),
            Some(tensor) => Err(tensor.fail("is no part of this architecture".to_owned())),
        }
    }
}
