//! The recipe of a model as the list that the team runs: checked once against the weights, with a
//! place for every buffer and a barrier where one is needed.
//!
//! Share `i` of a step always covers the same elements, by one of three cuts:
//!
//! | cut | steps | share |
//! |---|---|---|
//! | tokens | embed, rmsnorm | whole tokens |
//! | columns | linear (what it writes), add, swiglu | a range of columns of every token |
//! | heads | rope, KV append, attention | whole `(token, head)` pairs |
//!
//! What a share wrote it may read again by the same cut at once. Everything else, above all the
//! source of a linear step and the cache that attention reads, which are read whole, waits for a
//! barrier.

use std::ops::Range;

use models::quant::Weight;
use models::recipe::{Buffer, Recipe, Step, WeightId};

use super::super::LoadedModel;
use crate::Error;

/// One step, and whether the team waits before it.
#[derive(Debug)]
pub(super) struct Call {
    pub step: Step,
    pub barrier: bool,
}

/// A compiled recipe.
#[derive(Debug)]
pub(super) struct Program {
    pub calls: Vec<Call>,
    /// Start of each buffer and its elements a token, by declaration order.
    places: [(usize, usize); Buffer::ALL.len()],
    /// Floats that all buffers take together.
    pub activation_elems: usize,
    /// Floats of scratch memory that the matrices need.
    pub matrix_scratch_elems: usize,
}

/// Buffers start at a cache line.
const LINE_ELEMS: usize = 16;

impl Program {
    /// Checks `model` and lays its buffers out for up to `tokens` tokens at once.
    pub(super) fn compile(model: &LoadedModel, tokens: usize) -> Result<Program, Error> {
        let recipe = &model.recipe;
        let mut matrix_cols = 0;
        for step in &recipe.steps {
            check(model, step)?;
            if let Step::Linear { src, .. } | Step::Logits { src, .. } = step {
                matrix_cols = matrix_cols.max(recipe.elems(*src));
            }
        }
        let mut places = [(0, 0); Buffer::ALL.len()];
        let mut next = 0;
        for buffer in Buffer::ALL {
            let elems = recipe.elems(buffer);
            // Logits exist for the last token only.
            let tokens = if buffer == Buffer::Logits { 1 } else { tokens };
            places[buffer as usize] = (next, elems);
            next += (tokens * elems).next_multiple_of(LINE_ELEMS);
        }
        Ok(Program {
            calls: calls(recipe),
            places,
            activation_elems: next,
            matrix_scratch_elems: cpu_kernels::linear::scratch_elems(matrix_cols),
        })
    }

    /// Where the first `tokens` tokens of `buffer` lie among the activations.
    pub(super) fn buffer(&self, buffer: Buffer, tokens: usize) -> Range<usize> {
        let (start, elems) = self.places[buffer as usize];
        start..start + tokens * elems
    }
}

/// Weights of the right kind and shape, so that no kernel meets a surprise while the team runs.
fn check(model: &LoadedModel, step: &Step) -> Result<(), Error> {
    let recipe = &model.recipe;
    let name = |id: WeightId| recipe.weights.get(id).map_or("?", |w| w.name.as_str());
    let fail = |id: WeightId, wanted: String| {
        Err(Error::input(format!("tensor {:?}: not {wanted}", name(id))))
    };
    let vector = |id: WeightId, len: usize| match model.weights.get(id) {
        Some(Weight::Vector(v)) if v.len() == len => Ok(()),
        _ => fail(id, format!("a vector of {len}")),
    };
    let matrix = |id: WeightId, rows: usize, cols: usize| match model.weights.get(id) {
        Some(Weight::Int4(m)) if (m.rows, m.cols) == (rows, cols) => Ok(()),
        Some(Weight::Int8(m)) if (m.rows, m.cols) == (rows, cols) => Ok(()),
        _ => fail(id, format!("a ({rows}, {cols}) matrix")),
    };
    let same = |what: &str, elems: &[usize]| {
        if elems.windows(2).all(|pair| pair[0] == pair[1]) {
            return Ok(());
        }
        Err(Error::input(format!(
            "recipe: buffers of a {what} step differ in length"
        )))
    };
    let config = &recipe.config;
    let elems = |buffer: &Buffer| recipe.elems(*buffer);
    match step {
        Step::Embed { table, dst } => match model.weights.get(*table) {
            Some(Weight::Int8(m)) if m.rows >= config.vocab && m.cols == elems(dst) => Ok(()),
            _ => fail(
                *table,
                format!("an INT8 table ({}, {})", config.vocab, elems(dst)),
            ),
        },
        Step::RmsNorm {
            weight, src, dst, ..
        } => {
            same("norm", &[elems(src), elems(dst)])?;
            vector(*weight, elems(dst))
        }
        Step::Linear {
            weight,
            bias,
            src,
            dst,
        } => {
            matrix(*weight, elems(dst), elems(src))?;
            bias.map_or(Ok(()), |bias| vector(bias, elems(dst)))
        }
        Step::Logits { table, src, dst } => matrix(*table, elems(dst), elems(src)),
        Step::Rope { buffer, heads } => {
            same("rope", &[elems(buffer), heads * config.head_dim])?;
            same("rope", &[config.head_dim % 2, 0])
        }
        Step::KvAppend { layer, key, value } => {
            let elems = [elems(key), elems(value), config.kv_heads * config.head_dim];
            same("cache", &elems)?;
            check_layer(recipe, *layer)
        }
        Step::Attention {
            layer, query, dst, ..
        } => {
            same(
                "attention",
                &[elems(query), elems(dst), config.heads * config.head_dim],
            )?;
            check_layer(recipe, *layer)
        }
        Step::SwiGlu { gate, up, dst } => same("gate", &[elems(gate), elems(up), elems(dst)]),
        Step::Add { src, dst } => same("residual", &[elems(src), elems(dst)]),
    }
}

fn check_layer(recipe: &Recipe, layer: usize) -> Result<(), Error> {
    let c = &recipe.config;
    if layer >= c.layers || c.kv_heads == 0 || !c.heads.is_multiple_of(c.kv_heads) {
        return Err(Error::input(format!(
            "recipe: layer {layer} of {} with {} heads over {} key/value heads",
            c.layers, c.heads, c.kv_heads
        )));
    }
    Ok(())
}

/// How a step's work is cut into shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Tokens,
    Columns,
    Heads,
    /// Every share reads all of it.
    Whole,
}

/// What a step touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Buffer(Buffer),
    Cache { layer: usize },
}

#[derive(Debug, Clone, Copy)]
struct Access {
    place: Place,
    cut: Cut,
    write: bool,
}

fn accesses(step: &Step) -> Vec<Access> {
    let read = |buffer: &Buffer, cut| Access {
        place: Place::Buffer(*buffer),
        cut,
        write: false,
    };
    let write = |buffer: &Buffer, cut| Access {
        place: Place::Buffer(*buffer),
        cut,
        write: true,
    };
    let cache = |layer: &usize, cut, write| Access {
        place: Place::Cache { layer: *layer },
        cut,
        write,
    };
    match step {
        Step::Embed { dst, .. } => vec![write(dst, Cut::Tokens)],
        Step::RmsNorm { src, dst, .. } => vec![read(src, Cut::Tokens), write(dst, Cut::Tokens)],
        Step::Linear { src, dst, .. } | Step::Logits { src, dst, .. } => {
            vec![read(src, Cut::Whole), write(dst, Cut::Columns)]
        }
        Step::Rope { buffer, .. } => vec![write(buffer, Cut::Heads)],
        Step::KvAppend { layer, key, value } => vec![
            read(key, Cut::Heads),
            read(value, Cut::Heads),
            cache(layer, Cut::Heads, true),
        ],
        Step::Attention {
            layer, query, dst, ..
        } => vec![
            read(query, Cut::Heads),
            cache(layer, Cut::Whole, false),
            write(dst, Cut::Heads),
        ],
        Step::SwiGlu { gate, up, dst } => vec![
            read(gate, Cut::Columns),
            read(up, Cut::Columns),
            write(dst, Cut::Columns),
        ],
        Step::Add { src, dst } => vec![read(src, Cut::Columns), write(dst, Cut::Columns)],
    }
}

fn calls(recipe: &Recipe) -> Vec<Call> {
    let mut since_barrier: Vec<Access> = Vec::new();
    let mut calls = Vec::with_capacity(recipe.steps.len());
    for step in &recipe.steps {
        let new = accesses(step);
        let meets =
            |a: &Access, b: &Access| a.place == b.place && a.cut != b.cut && (a.write || b.write);
        let barrier = new
            .iter()
            .any(|a| since_barrier.iter().any(|b| meets(a, b)));
        if barrier {
            since_barrier.clear();
        }
        since_barrier.extend(new);
        calls.push(Call {
            step: step.clone(),
            barrier,
        });
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn barriers_stand_only_where_shares_cross() {
        let recipe = Recipe {
            config: models::arch::Config {
                architecture: "test".into(),
                name: "test".into(),
                layers: 1,
                width: 64,
                heads: 2,
                kv_heads: 1,
                head_dim: 32,
                ffn: 96,
                vocab: 10,
                context: 8,
                rope_theta: 1e4,
                norm_eps: 1e-5,
                tied: true,
            },
            weights: Vec::new(),
            steps: layer(),
            rope_divisors: None,
        };
        let barriers: Vec<bool> = calls(&recipe).iter().map(|c| c.barrier).collect();
        let expected = [
            (false, "embed"),
            (false, "norm: the same tokens"),
            (true, "q reads the norm whole"),
            (false, "k"),
            (false, "v"),
            (true, "rope q: columns become heads"),
            (false, "rope k"),
            (false, "append: the same heads"),
            (true, "attention reads the cache whole"),
            (true, "o reads attention whole"),
            (false, "add: the same columns"),
            (true, "norm: columns become tokens"),
            (true, "gate"),
            (false, "up"),
            (false, "swiglu: the same columns"),
            (true, "down"),
            (false, "add"),
            (true, "last norm"),
            (true, "logits"),
        ];
        assert_eq!(barriers.len(), expected.len());
        for (got, (wanted, what)) in barriers.into_iter().zip(expected) {
            assert_eq!(got, wanted, "{what}");
        }
    }

    fn layer() -> Vec<Step> {
        use Buffer::*;
        let norm = |src| Step::RmsNorm {
            weight: 0,
            eps: 1e-5,
            src,
            dst: Normed,
        };
        let linear = |src, dst| Step::Linear {
            weight: 0,
            bias: None,
            src,
            dst,
        };
        let add = Step::Add {
            src: Projected,
            dst: Residual,
        };
        vec![
            Step::Embed {
                table: 0,
                dst: Residual,
            },
            norm(Residual),
            linear(Normed, Query),
            linear(Normed, Key),
            linear(Normed, Value),
            Step::Rope {
                buffer: Query,
                heads: 2,
            },
            Step::Rope {
                buffer: Key,
                heads: 1,
            },
            Step::KvAppend {
                layer: 0,
                key: Key,
                value: Value,
            },
            Step::Attention {
                layer: 0,
                query: Query,
                dst: Attended,
                scale: 0.2,
            },
            linear(Attended, Projected),
            add.clone(),
            norm(Residual),
            linear(Normed, Gate),
            linear(Normed, Up),
            Step::SwiGlu {
                gate: Gate,
                up: Up,
                dst: Gated,
            },
            linear(Gated, Projected),
            add,
            norm(Residual),
            Step::Logits {
                table: 0,
                src: Normed,
                dst: Logits,
            },
        ]
    }
}
