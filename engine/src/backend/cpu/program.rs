//! The recipe of a model as the list that the team runs: checked once against the weights, with a
//! place for every buffer, cut into phases.
//!
//! Within a phase, share `i` of every step covers the same elements, by one of three cuts:
//!
//! | cut | steps | share |
//! |---|---|---|
//! | tokens | embed, rmsnorm, rounding to 8 bits | whole tokens |
//! | columns | linear (what it writes), add, gated activations | a range of columns of every token |
//! | heads | norm of heads, rope, KV append, attention | whole `(token, head)` pairs |
//!
//! Most matrices read their source as levels. Rounding to them follows whoever wrote the source, with the
//! same cut where 32 columns stay together, so that it seldom costs a phase of its own.
//!
//! What a share wrote it may read again by the same cut in the same phase. Whatever is cut
//! differently, above all the source of a linear step and the cache that attention reads, which are
//! read whole, waits for the next phase.

mod check;
mod cuts;

use std::ops::Range;

use cpu_kernels::levels::{self, Precision, token_words};
use cpu_kernels::linear::ternary::Form;
use cpu_kernels::linear::{TILE_ROWS, lookup};
use cpu_kernels::tuned::Tuned;
use models::quant::Weight;
use models::recipe::{Buffer, Step};

use self::check::check;
pub(super) use self::cuts::Cut;
use self::cuts::{Access, Place, accesses, accesses_of};
use super::super::LoadedModel;
use crate::Error;

/// What a share does.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Op {
    /// A step of the recipe; a matrix reads its source from these levels.
    Step(Step, Option<usize>),
    /// Rounds a buffer to levels.
    Round {
        src: Buffer,
        levels: usize,
        cut: Cut,
    },
}

/// Where the levels of a buffer lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct LevelsPlace {
    src: Buffer,
    pub precision: Precision,
    start: usize,
    /// Of the buffer, a token.
    pub cols: usize,
    /// Where the tables of a single token lie, if a matrix looks sums up.
    tables: Option<usize>,
}

/// Steps that need nothing from each other's shares, and what bounds the number of shares.
#[derive(Debug)]
pub(super) struct Phase {
    pub ops: Vec<Op>,
    /// Columns that stay in one share.
    pub unit: usize,
    /// Bytes of matrices that the phase reads.
    matrix_bytes: usize,
    /// Elements that a token's share of the other steps goes over.
    elems: usize,
    /// Cached bytes read for each token and position.
    cache_bytes: usize,
}

/// Bytes of work that are worth a share of their own: a few microseconds.
const SHARE_BYTES: usize = 32 * 1024;
/// Shares for each thread at most: more would not even the load out further.
const SHARES_PER_THREAD: usize = 4;

impl Phase {
    /// Shares into which a team of `threads` cuts the phase, for `tokens` tokens of which the last
    /// sees `positions` positions. A function of its arguments alone: all threads agree on it.
    pub(super) fn shares(&self, threads: usize, tokens: usize, positions: usize) -> usize {
        let per_token = 4 * self.elems + self.cache_bytes * positions;
        // With several tokens a weight costs a multiplication for each.
        let bytes = self.matrix_bytes * tokens + per_token * tokens;
        match threads {
            1 => 1,
            _ => (bytes / SHARE_BYTES).clamp(1, threads * SHARES_PER_THREAD),
        }
    }

    fn add(&mut self, model: &LoadedModel, op: Op) {
        let (recipe, config) = (&model.recipe, &model.recipe.config);
        match &op {
            Op::Step(Step::Linear { weight: id, .. } | Step::Logits { table: id, .. }, _) => {
                self.matrix_bytes += model.weights.get(*id).map_or(0, |w| w.bytes() as usize);
            }
            Op::Step(Step::Attention { query, .. }, _) => {
                // Every query head reads keys and values, two bytes each.
                self.cache_bytes += 2 * 2 * recipe.elems(*query);
            }
            Op::Step(Step::KvAppend { .. }, _) => {
                self.elems += 2 * config.kv_heads * config.head_dim;
            }
            Op::Step(
                Step::Embed { dst: buffer, .. }
                | Step::RmsNorm { dst: buffer, .. }
                | Step::HeadNorm { buffer, .. }
                | Step::RoundToInt8 { buffer }
                | Step::Rope { buffer, .. }
                | Step::SwiGlu { dst: buffer, .. }
                | Step::ReluSquaredGlu { dst: buffer, .. }
                | Step::Add { dst: buffer, .. },
                _,
            ) => self.elems += recipe.elems(*buffer),
            Op::Round { src, cut, .. } => {
                self.elems += recipe.elems(*src);
                if *cut == Cut::Columns {
                    self.unit = self.unit.max(levels::CHUNK_COLS);
                }
            }
        }
        self.ops.push(op);
    }
}

/// A compiled recipe.
#[derive(Debug)]
pub(super) struct Program {
    pub phases: Vec<Phase>,
    /// Start of each buffer and its elements a token, by declaration order.
    places: [(usize, usize); Buffer::ALL.len()],
    /// Floats that all buffers take together.
    pub activation_elems: usize,
    /// Levels among the activations.
    levels: Vec<LevelsPlace>,
    /// By weight: the form of those that are ternary.
    pub forms: Vec<Form>,
}

/// Buffers start at a cache line.
const LINE_ELEMS: usize = 16;

impl Program {
    /// Checks `model` and lays its buffers out for up to `tokens` tokens at once.
    pub(super) fn compile(
        model: &LoadedModel,
        tokens: usize,
        tuned: &Tuned,
    ) -> Result<Program, Error> {
        let recipe = &model.recipe;
        for step in &recipe.steps {
            check(model, step)?;
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
        let (ops, mut levels, forms) = with_levels(model, tuned);
        for place in &mut levels {
            place.start = next;
            next += (tokens * token_words(place.cols)).next_multiple_of(LINE_ELEMS);
            if let Some(tables) = &mut place.tables {
                *tables = next;
                next += lookup::table_words(place.cols);
            }
        }
        Ok(Program {
            phases: phases(model, ops),
            places,
            activation_elems: next,
            levels,
            forms,
        })
    }

    /// Where the levels of the first `tokens` tokens lie among the activations.
    pub(super) fn levels(&self, id: usize, tokens: usize) -> (Range<usize>, LevelsPlace) {
        let place = self.levels[id];
        let words = tokens * token_words(place.cols);
        (place.start..place.start + words, place)
    }

    /// Where the tables of the token lie among the activations, if it is the only one and there are any.
    pub(super) fn tables(&self, id: usize, tokens: usize) -> Option<Range<usize>> {
        let place = self.levels[id];
        let start = place.tables.filter(|_| tokens == 1)?;
        Some(start..start + lookup::table_words(place.cols))
    }

    /// Where the first `tokens` tokens of `buffer` lie among the activations.
    pub(super) fn buffer(&self, buffer: Buffer, tokens: usize) -> Range<usize> {
        let (start, elems) = self.places[buffer as usize];
        start..start + tokens * elems
    }
}

/// The steps of the recipe with the roundings that their matrices need, the levels that these write, and the
/// form of each ternary matrix: only levels of 8 bits are looked up or meet five weights a byte.
fn with_levels(model: &LoadedModel, tuned: &Tuned) -> (Vec<Op>, Vec<LevelsPlace>, Vec<Form>) {
    let recipe = &model.recipe;
    let mut forms = vec![None; model.weights.len()];
    let mut places: Vec<LevelsPlace> = Vec::new();
    // After each step; the first entry: before all of them.
    let mut rounds: Vec<Vec<Op>> = vec![Vec::new(); recipe.steps.len() + 1];
    // For each buffer the step that wrote it last, from 1 on, and how that was cut.
    let mut writers = [(0, Cut::Tokens); Buffer::ALL.len()];
    let mut used: Vec<Option<usize>> = Vec::new();
    for (i, step) in recipe.steps.iter().enumerate() {
        let mut levels = None;
        if let Step::Linear { weight, src, .. }
        | Step::Logits {
            table: weight, src, ..
        } = step
            && matches!(
                model.weights.get(*weight),
                Some(Weight::Int4(_) | Weight::Int4Tiled(_) | Weight::Int8(_) | Weight::Ternary(_))
            )
        {
            let (writer, cut) = writers[*src as usize];
            let is_rounded =
                writer > 0 && matches!(recipe.steps[writer - 1], Step::RoundToInt8 { .. });
            let precision = match is_rounded {
                true => Precision::Byte,
                false => Precision::Word,
            };
            let same = |place: &LevelsPlace| (place.src, place.precision) == (*src, precision);
            let id = places.iter().position(same).unwrap_or_else(|| {
                places.push(LevelsPlace {
                    src: *src,
                    precision,
                    start: 0,
                    cols: recipe.elems(*src),
                    tables: None,
                });
                places.len() - 1
            });
            if let Weight::Ternary(matrix) = &model.weights[*weight] {
                let form = match precision {
                    Precision::Byte => tuned.choose(matrix.rows, matrix.cols).form,
                    Precision::Word => Form::Multiply,
                };
                let known = *forms[*weight].get_or_insert(form);
                if known != form {
                    forms[*weight] = Some(Form::Multiply);
                }
                if form == Form::LookUp {
                    places[id].tables = Some(0);
                }
            }
            let cut = match cut {
                Cut::Columns if precision == Precision::Word => Cut::Columns,
                Cut::Heads
                    if precision == Precision::Word
                        && recipe.config.head_dim.is_multiple_of(levels::CHUNK_COLS) =>
                {
                    Cut::Heads
                }
                _ => Cut::Tokens,
            };
            let round = Op::Round {
                src: *src,
                levels: id,
                cut,
            };
            if !rounds[writer].contains(&round) {
                rounds[writer].push(round);
            }
            levels = Some(id);
        }
        used.push(levels);
        for access in accesses(step).iter().filter(|access| access.write) {
            if let Place::Buffer(buffer) = access.place {
                writers[buffer as usize] = (i + 1, access.cut);
            }
        }
    }
    let mut ops = std::mem::take(&mut rounds[0]);
    for ((step, levels), rounds) in recipe.steps.iter().zip(used).zip(&mut rounds[1..]) {
        ops.push(Op::Step(step.clone(), levels));
        ops.append(rounds);
    }
    let forms = forms.into_iter().map(|form| form.unwrap_or(Form::Multiply));
    (ops, places, forms.collect())
}

fn phases(model: &LoadedModel, ops: Vec<Op>) -> Vec<Phase> {
    let mut touched: Vec<Access> = Vec::new();
    let mut phases: Vec<Phase> = Vec::new();
    for op in ops {
        let new = accesses_of(&op);
        let meets =
            |a: &Access, b: &Access| a.place == b.place && a.cut != b.cut && (a.write || b.write);
        let waits = new.iter().any(|a| touched.iter().any(|b| meets(a, b)));
        if waits || phases.is_empty() {
            touched.clear();
            phases.push(Phase {
                ops: Vec::new(),
                unit: TILE_ROWS,
                matrix_bytes: 0,
                elems: 0,
                cache_bytes: 0,
            });
        }
        touched.extend(new);
        let phase = phases.last_mut().expect("one was pushed");
        phase.add(model, op);
    }
    phases
}

#[cfg(test)]
mod tests {
    use models::recipe::Recipe;

    use super::*;

    #[test]
    fn phases_end_only_where_shares_cross() {
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
                rope_divisors: None,
                norm_eps: 1e-5,
                tied: true,
                int8_activations: false,
                window: None,
            },
            weights: Vec::new(),
            steps: layer(),
        };
        let model = LoadedModel::new(recipe, Vec::new());
        let ops = model
            .recipe
            .steps
            .iter()
            .map(|step| Op::Step(step.clone(), None));
        let phases = phases(&model, ops.collect());
        let lengths: Vec<usize> = phases.iter().map(|phase| phase.ops.len()).collect();
        let expected = [
            (2, "embed and norm: the same tokens"),
            (3, "q, k, v read the norm whole"),
            (3, "rope q and k, append: columns become heads"),
            (1, "attention reads the cache whole"),
            (2, "o reads attention whole; add has the same columns"),
            (1, "norm: columns become tokens"),
            (3, "gate, up, swiglu: the same columns"),
            (2, "down, add"),
            (1, "norm"),
            (1, "logits"),
        ];
        assert_eq!(lengths, expected.map(|(length, _)| length));
        let ops = phases.into_iter().flat_map(|phase| phase.ops);
        let steps: Vec<Step> = ops
            .map(|op| match op {
                Op::Step(step, None) => step,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(steps, layer());
    }

    #[test]
    fn shares_grow_with_the_work_up_to_a_bound() {
        let phase = Phase {
            ops: vec![],
            unit: TILE_ROWS,
            matrix_bytes: 200_000,
            elems: 100,
            cache_bytes: 0,
        };
        assert_eq!(phase.shares(1, 32, 10), 1);
        assert_eq!(phase.shares(2, 1, 10), 6);
        assert_eq!(phase.shares(2, 32, 10), 2 * SHARES_PER_THREAD);
        let phase = Phase {
            ops: vec![],
            unit: TILE_ROWS,
            matrix_bytes: 0,
            elems: 0,
            cache_bytes: 2304,
        };
        assert_eq!(phase.shares(2, 1, 1), 1);
        assert_eq!(phase.shares(2, 1, 100), 7);
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
                window: None,
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
