//! Launches of a model's products and attention, chosen by what a whole token takes: by itself a launch knows
//! nothing of its neighbours, whose weights are asked for while it ends.

use std::sync::Arc;

use ::models::file::gguf::DType;
use ::models::quant::{Int4Matrix, Weight};
use engine::Error;
use engine::backend::cuda::device::{DeviceMemory, Gpu};
use engine::backend::cuda::launch::Graph;
use engine::backend::cuda::plan::{self, Memory, Plan};
use engine::backend::{KvCache, KvForm, LoadedModel};
use engine::synthetic;
use gpu_kernels::attention::split;
use gpu_kernels::launch::{DeviceInfo, DeviceSlice};
use gpu_kernels::linear::gemv_int4_mma;
use gpu_kernels::tuned::{self, Launches, Row, Timed, Tuned};
use half::f16;

use super::{FINALISTS, mean, shown};
use crate::models::{self, Model};
use crate::rows::Tiled;
use crate::rows::attention::Attended;
use crate::select::Selection;
use crate::time;

/// Tokens before the timed ones: of products, and of attention, whose launch serves every position. A
/// token's time is the geometric mean over them.
const POSITIONS: &[usize] = &[512];
const POSITIONS_OF_ATTENTION: &[usize] = &[512, 4096, 16_384];
/// Positions of the cache: as many as leave no launch of attention without work for all of its blocks.
const CONTEXT: usize = 16_384 + TOKENS;
/// Tokens of a sample.
const TOKENS: usize = 6;
/// Samples of a first look, and of each of the rounds in which the best compete.
const SAMPLES: usize = 3;
/// Those rounds.
const ROUNDS: usize = 5;
/// By how much a launch has to beat the one before it.
const WORTH: f64 = 0.997;

/// Memory that a plan is compiled into again and again: each compilation is given the buffers of the
/// first, in their order, and what they hold.
struct Again<M> {
    memory: M,
    buffers: Vec<DeviceSlice>,
    /// Buffers that the compilation at hand has been given; none in the first.
    given: Option<usize>,
}

impl<M: Memory> Again<M> {
    fn new(memory: M) -> Again<M> {
        Again {
            memory,
            buffers: Vec::new(),
            given: None,
        }
    }

    fn buffer(
        &mut self,
        bytes: u64,
        make: impl FnOnce(&mut M) -> Result<DeviceSlice, Error>,
    ) -> Result<DeviceSlice, Error> {
        let Some(given) = &mut self.given else {
            let buffer = make(&mut self.memory)?;
            self.buffers.push(buffer);
            return Ok(buffer);
        };
        let buffer = self.buffers.get(*given).copied();
        *given += 1;
        buffer
            .filter(|buffer| buffer.bytes == bytes)
            .ok_or_else(|| {
                Error::machine(format!(
                    "buffer {given} of the plan has {bytes} bytes, and had others before"
                ))
            })
    }
}

impl<M: Memory> Memory for Again<M> {
    fn upload(&mut self, bytes: &[u8]) -> Result<DeviceSlice, Error> {
        self.buffer(bytes.len() as u64, |memory| memory.upload(bytes))
    }

    fn upload_made(
        &mut self,
        bytes: u64,
        make: &mut dyn FnMut() -> Vec<u8>,
    ) -> Result<DeviceSlice, Error> {
        self.buffer(bytes, |memory| memory.upload_made(bytes, make))
    }

    fn reserve(&mut self, bytes: u64) -> Result<DeviceSlice, Error> {
        self.buffer(bytes, |memory| memory.reserve(bytes))
    }

    fn keeps(&self) -> bool {
        self.given.is_none() && self.memory.keeps()
    }
}

/// Whether tokens of the model are made to tune its products: of random weights, where there is a shape
/// for them whose layers are those of [`Model::products`].
pub fn is_made(name: &str) -> bool {
    let made = ::models::synthetic::shape(name);
    made.is_ok_and(|shape| !models::is_tiny(name) && !shape.architecture.starts_with("bitnet"))
}

/// The model of random weights in the format at hand.
fn model(name: &str, group: usize, mins: bool) -> Result<LoadedModel, Error> {
    let linear = if mins { DType::Q4_1 } else { DType::Q4_0 };
    let mut model = synthetic::load(name, CONTEXT, linear)?;
    for weight in &mut model.weights {
        if let Weight::Int4(matrix) = weight {
            regroup(matrix, group);
        }
    }
    Ok(model)
}

/// Makes groups of `group` weights: each takes the scale of its first 32.
fn regroup(matrix: &mut Int4Matrix, group: usize) {
    let (each, per_row) = (group / matrix.group, matrix.cols.div_ceil(matrix.group));
    let thinned = |values: &[f16]| -> Vec<f16> {
        let rows = values.chunks_exact(per_row);
        rows.flat_map(|row| row.iter().step_by(each).copied())
            .collect()
    };
    matrix.scales = thinned(&matrix.scales).into();
    matrix.mins = matrix.mins.take().map(|mins| thinned(&mins).into());
    matrix.group = group;
}

/// A step of a layer whose launch is looked for.
struct Wanted {
    kernel: &'static str,
    /// Shape, as the table names it.
    name: String,
    /// Names and numbers of each launch, the rule's first.
    launches: Vec<Vec<(String, u32)>>,
    positions: &'static [usize],
}

/// The products of a layer, the largest first: they decide most.
fn products(device: &DeviceInfo, model: &Model, group: usize, mins: bool) -> Vec<Wanted> {
    let [heads, rest @ ..] = model
        .products()
        .map(|product| Tiled::of(&product, group, mins));
    let heads_name = format!("{} heads", heads.shape.name(heads.norm));
    let mut products = vec![(
        gemv_int4_mma::entry_heads(group, mins),
        heads_name,
        heads.shape,
    )];
    products.extend(rest.map(|tiled| {
        let name = tiled.shape.name(tiled.norm);
        (tiled.kernel(), name, tiled.shape)
    }));
    products.sort_by_key(|(_, _, shape)| std::cmp::Reverse(shape.matrix_elems()));
    let wanted = products.into_iter().map(|(kernel, name, shape)| Wanted {
        kernel,
        name,
        launches: named(&gemv_int4_mma::candidates(device, &shape)),
        positions: POSITIONS,
    });
    wanted.collect()
}

/// The attention of a model, in the launches that need as much scratch memory as the rule's: the plans
/// share it.
fn attention(device: &DeviceInfo, model: &Model, form: KvForm) -> Wanted {
    let attended = Attended {
        dims: [model.heads, model.kv_heads, model.head_dim],
        tokens: CONTEXT,
        of_8_bits: form == KvForm::K16V8,
    };
    let shape = attended.shape();
    let mut tunings = split::candidates(device, &shape);
    let bytes = tunings[0].scratch_bytes(&shape);
    tunings.retain(|tuning| tuning.scratch_bytes(&shape) == bytes);
    Wanted {
        kernel: attended.kernel(),
        name: split::name(&shape),
        launches: named(&tunings),
        positions: POSITIONS_OF_ATTENTION,
    }
}

fn named<L: Launches>(launches: &[L]) -> Vec<Vec<(String, u32)>> {
    launches.iter().map(L::named).collect()
}

/// The plan of a model on a GPU, compiled again with other launches over the same memory.
struct Token<'a> {
    gpu: &'a Arc<Gpu>,
    model: &'a LoadedModel,
    cache: KvCache,
    memory: Again<DeviceMemory>,
}

/// A recorded token.
struct Recorded {
    graph: Graph,
    /// Position that it handles next.
    state: DeviceSlice,
}

impl<'a> Token<'a> {
    fn new(gpu: &'a Arc<Gpu>, model: &'a LoadedModel, form: KvForm) -> Result<(Self, Plan), Error> {
        let cache = KvCache {
            tokens: CONTEXT,
            form,
        };
        let mut token = Token {
            gpu,
            model,
            cache,
            memory: Again::new(DeviceMemory::new(gpu)),
        };
        let plan = token.plan(gpu.tuned())?;
        token.memory.memory.write(plan.state, &[0; 4])?;
        // Outside of a graph: the driver loads the kernels now.
        for call in &plan.full {
            // SAFETY: the plan took every address from `memory`, which outlives the work.
            unsafe { gpu.queue(call) }?;
            gpu.synchronize()
                .map_err(|error| Error::machine(format!("{}: {error}", call.kernel)))?;
        }
        Ok((token, plan))
    }

    fn plan(&mut self, tuned: &Tuned) -> Result<Plan, Error> {
        let device = self.gpu.info();
        let plan = plan::compile(self.model, self.cache, &device, tuned, &mut self.memory)?;
        self.memory.given = Some(0);
        Ok(plan)
    }

    fn record(&mut self, tuned: &Tuned) -> Result<Recorded, Error> {
        let plan = self.plan(tuned)?;
        // SAFETY: the plan took every address from `memory`, and a graph is timed, to its end, by
        // `us` alone, which borrows it.
        let graph = unsafe { Graph::capture(self.gpu, &plan.full) }?;
        Ok(Recorded {
            graph,
            state: plan.state,
        })
    }

    /// Microseconds a token at these positions.
    fn us(&mut self, token: &Recorded, positions: &[usize]) -> Result<f64, Error> {
        mean(positions.iter().map(|at| self.us_at(token, *at)))
    }

    /// The median of the samples.
    fn us_at(&mut self, token: &Recorded, position: usize) -> Result<f64, Error> {
        let position = (position as u32).to_le_bytes();
        let memory = &mut self.memory.memory;
        let mut samples = (0..SAMPLES)
            .map(|_| {
                memory.write(token.state, &position)?;
                time::once(self.gpu, || {
                    (0..TOKENS).try_for_each(|_| token.graph.launch())
                })
            })
            .collect::<Result<Vec<f64>, Error>>()?;
        Ok(median(&mut samples) / TOKENS as f64)
    }
}

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// Finds the launches of the products and of the attention of the model called `name` that `selection`
/// takes, and passes each row to `found`.
///
/// # Errors
/// [`Error::Machine`] from the device, and what `found` fails with.
pub fn tune(
    gpu: &Arc<Gpu>,
    ptx: &str,
    name: &str,
    selection: &Selection,
    mut found: impl FnMut(Row) -> Result<(), Error>,
) -> Result<(), Error> {
    let (group, mins) = (selection.group, selection.mins);
    let device = gpu.info();
    let [mut f16, mut of_8_bits] = [Vec::new(), Vec::new()];
    for dims in models::named(name)? {
        f16.extend(products(&device, &dims, group, mins));
        f16.push(attention(&device, &dims, KvForm::K16V16));
        of_8_bits.push(attention(&device, &dims, KvForm::K16V8));
    }
    let mut made = None;
    let mut tuned = gpu.tuned().clone();
    for (form, mut wanted) in [(KvForm::K16V16, f16), (KvForm::K16V8, of_8_bits)] {
        wanted.retain(|step| selection.takes(step.kernel) && step.launches.len() > 1);
        if wanted.is_empty() {
            continue;
        }
        let model = match &made {
            Some(model) => model,
            None => {
                println!("{name}, group {group}:");
                made.insert(model(name, group, mins)?)
            }
        };
        let (mut token, plan) = Token::new(gpu, model, form)?;
        for step in wanted {
            let launched = plan.full.iter().zip(&plan.notes).any(|(call, note)| {
                call.kernel == step.kernel && note.launch.starts_with(&step.name)
            });
            if !launched {
                return Err(Error::machine(format!(
                    "no token of this model runs {} at {}",
                    step.kernel, step.name
                )));
            }
            let revision = tuned::revision(ptx, step.kernel)
                .ok_or_else(|| Error::machine(format!("{} is not in the PTX", step.kernel)))?;
            let row = |launch: &[(String, u32)]| Row {
                gpu: gpu.name().to_owned(),
                tier: gpu.tier().capability(),
                kernel: step.kernel.to_owned(),
                shape: step.name.clone(),
                revision,
                launch: launch.to_vec(),
                timed: Timed::Token,
                us: 0.0,
                rule_us: 0.0,
            };
            let row = fastest(&mut token, &tuned, &step, row)?;
            tuned = tuned.with(row.clone());
            found(row)?;
        }
    }
    Ok(())
}

/// Looks at every launch briefly, lets the best and the rule's compete in turns, and takes the fastest.
fn fastest(
    token: &mut Token<'_>,
    tuned: &Tuned,
    step: &Wanted,
    row: impl Fn(&[(String, u32)]) -> Row,
) -> Result<Row, Error> {
    let launches = &step.launches;
    let mut first = Vec::with_capacity(launches.len());
    for (form, launch) in launches.iter().enumerate() {
        let recorded = token.record(&tuned.with(row(launch)))?;
        first.push((token.us(&recorded, step.positions)?, form));
    }
    let (_, others) = first.split_at_mut(1);
    others.sort_by(|a, b| a.0.total_cmp(&b.0));
    let finalists: Vec<usize> = [0]
        .into_iter()
        .chain(others.iter().take(FINALISTS).map(|(_, form)| *form))
        .collect();
    let recorded = finalists
        .iter()
        .map(|form| token.record(&tuned.with(row(&launches[*form]))))
        .collect::<Result<Vec<_>, Error>>()?;
    let mut us = vec![Vec::with_capacity(ROUNDS); finalists.len()];
    for _ in 0..ROUNDS {
        for (recorded, us) in recorded.iter().zip(&mut us) {
            us.push(token.us(recorded, step.positions)?);
        }
    }
    let us: Vec<f64> = us.iter_mut().map(|us| median(us)).collect();
    let rule_us = us[0];
    let best = (1..us.len()).fold(0, |best, other| {
        let enough = if best == 0 { WORTH * rule_us } else { us[best] };
        if us[other] < enough { other } else { best }
    });
    let mut row = row(&launches[finalists[best]]);
    (row.us, row.rule_us) = (us[best], rule_us);
    println!(
        "{} {}: a token takes {rule_us:.1} us by the rule ({}), by the best of {} {:.1} us ({})",
        step.kernel,
        step.name,
        shown(&launches[0]),
        launches.len(),
        row.us,
        shown(&row.launch),
    );
    Ok(row)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts as `Counter` does, and says that it keeps what it is given.
    #[derive(Default)]
    struct Kept(u64);

    impl Memory for Kept {
        fn upload(&mut self, bytes: &[u8]) -> Result<DeviceSlice, Error> {
            self.reserve(bytes.len() as u64)
        }

        fn reserve(&mut self, bytes: u64) -> Result<DeviceSlice, Error> {
            let address = 256 + self.0;
            self.0 += bytes.next_multiple_of(256);
            Ok(DeviceSlice { address, bytes })
        }
    }

    #[test]
    fn a_plan_is_compiled_again_over_the_same_buffers() {
        let device = DeviceInfo::T4;
        let dims = models::named("tiny-qwen2").expect("a model")[0];
        let model = synthetic::load("tiny-qwen2", CONTEXT, DType::Q4_0).expect("a model");
        let mut memory = Again::new(Kept::default());
        let mut compile = |tuned: &Tuned| {
            let cache = CONTEXT.into();
            let plan = plan::compile(&model, cache, &device, tuned, &mut memory).expect("a plan");
            memory.given = Some(0);
            plan
        };
        let rule = compile(&Tuned::none());
        let mut wanted = products(&device, &dims, 32, false);
        wanted.push(attention(&device, &dims, KvForm::K16V16));
        for step in wanted {
            let other = step.launches.last().expect("a launch");
            assert_ne!(*other, step.launches[0]);
            let tuned = Tuned::none().with(Row {
                gpu: "T4".into(),
                tier: 75,
                kernel: step.kernel.into(),
                shape: step.name.clone(),
                revision: 0,
                launch: other.clone(),
                timed: Timed::Token,
                us: 1.0,
                rule_us: 1.0,
            });
            let plan = compile(&tuned);
            let mut changed = 0;
            for ((call, before), note) in plan.full.iter().zip(&rule.full).zip(&plan.notes) {
                if call == before {
                    continue;
                }
                changed += 1;
                assert_eq!(call.kernel, step.kernel);
                assert!(note.launch.starts_with(&step.name), "{}", note.launch);
            }
            assert!(changed > 0, "{}", step.name);
        }
    }

    #[test]
    fn groups_are_made_larger() {
        let mut model = synthetic::load("tiny-qwen2", 32, DType::Q4_1).expect("a model");
        let grouped = model.weights.iter_mut().find_map(|weight| match weight {
            Weight::Int4(matrix) if matrix.cols == 160 => Some(matrix),
            _ => None,
        });
        let matrix = grouped.expect("a matrix of 160 columns");
        let before = matrix.clone();
        regroup(matrix, 128);
        assert_eq!(matrix.scales.len(), 2 * matrix.rows);
        assert_eq!(
            matrix.mins.as_ref().map(|mins| mins.len()),
            Some(2 * matrix.rows)
        );
        assert_eq!(matrix.scales[2..4], [before.scales[5], before.scales[9]]);
        assert_eq!(matrix.quants[..], before.quants[..]);
    }
}
