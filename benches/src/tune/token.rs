//! Launches of a model's products, chosen by what a whole token takes: by itself a launch knows nothing
//! of its neighbours, whose weights are asked for while it ends.

use std::sync::Arc;

use ::models::file::gguf::DType;
use ::models::quant::{Int4Matrix, Weight};
use engine::Error;
use engine::backend::LoadedModel;
use engine::backend::cuda::device::{DeviceMemory, Gpu};
use engine::backend::cuda::launch::Graph;
use engine::backend::cuda::plan::{self, Memory, Plan};
use engine::synthetic;
use gpu_kernels::launch::DeviceSlice;
use gpu_kernels::linear::gemv_int4_mma::{self, Shape, Tiling};
use gpu_kernels::tuned::{self, Launches, Row, Timed, Tuned};
use half::f16;

use super::{FINALISTS, shown};
use crate::models::{self, Model};
use crate::rows::Tiled;
use crate::select::Selection;
use crate::time;

/// Tokens before the timed ones.
const POSITION: usize = 512;
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
    let mut model = synthetic::load(name, POSITION + TOKENS, linear)?;
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

/// A product of a layer whose launch is looked for.
struct Product {
    kernel: &'static str,
    /// Shape, as the table names it.
    name: String,
    shape: Shape,
}

/// The products of a layer, the largest first: they decide most.
fn products(model: &Model, group: usize, mins: bool) -> Vec<Product> {
    let [heads, rest @ ..] = model
        .products()
        .map(|product| Tiled::of(&product, group, mins));
    let mut products = vec![Product {
        kernel: gemv_int4_mma::entry_heads(group, mins),
        name: format!("{} heads", heads.shape.name(heads.norm)),
        shape: heads.shape,
    }];
    products.extend(rest.map(|tiled| Product {
        kernel: tiled.kernel(),
        name: tiled.shape.name(tiled.norm),
        shape: tiled.shape,
    }));
    products.sort_by_key(|product| std::cmp::Reverse(product.shape.matrix_elems()));
    products
}

/// The plan of a model on a GPU, compiled again with other launches over the same memory.
struct Token<'a> {
    gpu: &'a Arc<Gpu>,
    model: &'a LoadedModel,
    memory: Again<DeviceMemory>,
}

/// A recorded token.
struct Recorded {
    graph: Graph,
    /// Position that it handles next.
    state: DeviceSlice,
}

impl<'a> Token<'a> {
    fn new(gpu: &'a Arc<Gpu>, model: &'a LoadedModel) -> Result<(Self, Plan), Error> {
        let mut token = Token {
            gpu,
            model,
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
        let plan = plan::compile(
            self.model,
            (POSITION + TOKENS).into(),
            &device,
            tuned,
            &mut self.memory,
        )?;
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

    /// Microseconds a token: the median of the samples.
    fn us(&mut self, token: &Recorded) -> Result<f64, Error> {
        let position = (POSITION as u32).to_le_bytes();
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

/// Finds the launches of the products of the model called `name` that `selection` takes, and passes
/// each row to `found`.
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
    let mut wanted = Vec::new();
    for dims in models::named(name)? {
        wanted.extend(products(&dims, group, mins));
    }
    wanted.retain(|product| selection.takes(product.kernel));
    if wanted.is_empty() {
        return Ok(());
    }
    println!("{name}, group {group}:");
    let model = model(name, group, mins)?;
    let (mut token, plan) = Token::new(gpu, &model)?;
    let mut tuned = gpu.tuned().clone();
    for product in wanted {
        let launched = plan.full.iter().zip(&plan.notes).any(|(call, note)| {
            call.kernel == product.kernel && note.launch.starts_with(&product.name)
        });
        if !launched {
            return Err(Error::machine(format!(
                "no token of this model runs {} at {}",
                product.kernel, product.name
            )));
        }
        let revision = tuned::revision(ptx, product.kernel)
            .ok_or_else(|| Error::machine(format!("{} is not in the PTX", product.kernel)))?;
        let row = |tiling: &Tiling| Row {
            gpu: gpu.name().to_owned(),
            tier: gpu.tier().capability(),
            kernel: product.kernel.to_owned(),
            shape: product.name.clone(),
            revision,
            launch: tiling.named(),
            timed: Timed::Token,
            us: 0.0,
            rule_us: 0.0,
        };
        let row = fastest(&mut token, &tuned, &product, row)?;
        tuned = tuned.with(row.clone());
        found(row)?;
    }
    Ok(())
}

/// Looks at every launch briefly, lets the best and the rule's compete in turns, and takes the fastest.
fn fastest(
    token: &mut Token<'_>,
    tuned: &Tuned,
    product: &Product,
    row: impl Fn(&Tiling) -> Row,
) -> Result<Row, Error> {
    let tilings = gemv_int4_mma::candidates(&token.gpu.info(), &product.shape);
    let mut first = Vec::with_capacity(tilings.len());
    for (form, tiling) in tilings.iter().enumerate() {
        let recorded = token.record(&tuned.with(row(tiling)))?;
        first.push((token.us(&recorded)?, form));
    }
    let (_, others) = first.split_at_mut(1);
    others.sort_by(|a, b| a.0.total_cmp(&b.0));
    let finalists: Vec<usize> = [0]
        .into_iter()
        .chain(others.iter().take(FINALISTS).map(|(_, form)| *form))
        .collect();
    let recorded = finalists
        .iter()
        .map(|form| token.record(&tuned.with(row(&tilings[*form]))))
        .collect::<Result<Vec<_>, Error>>()?;
    let mut us = vec![Vec::with_capacity(ROUNDS); finalists.len()];
    for _ in 0..ROUNDS {
        for (recorded, us) in recorded.iter().zip(&mut us) {
            us.push(token.us(recorded)?);
        }
    }
    let us: Vec<f64> = us.iter_mut().map(|us| median(us)).collect();
    let rule_us = us[0];
    let best = (1..us.len()).fold(0, |best, other| {
        let enough = if best == 0 { WORTH * rule_us } else { us[best] };
        if us[other] < enough { other } else { best }
    });
    let rule = row(&tilings[0]);
    let mut row = row(&tilings[finalists[best]]);
    (row.us, row.rule_us) = (us[best], rule_us);
    println!(
        "{} {}: a token takes {rule_us:.1} us by the rule ({}), by the best of {} {:.1} us ({})",
        product.kernel,
        product.name,
        shown(&rule.launch),
        tilings.len(),
        row.us,
        shown(&row.launch),
    );
    Ok(row)
}

#[cfg(test)]
mod tests {
    use gpu_kernels::launch::DeviceInfo;

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
        let model = synthetic::load("tiny-qwen2", 32, DType::Q4_0).expect("a model");
        let mut memory = Again::new(Kept::default());
        let mut compile = |tuned: &Tuned| {
            let plan =
                plan::compile(&model, 32.into(), &device, tuned, &mut memory).expect("a plan");
            memory.given = Some(0);
            plan
        };
        let rule = compile(&Tuned::none());
        for product in products(&dims, 32, false) {
            let tilings = gemv_int4_mma::candidates(&device, &product.shape);
            let other = tilings.last().expect("a tiling");
            assert_ne!(*other, tilings[0]);
            let tuned = Tuned::none().with(Row {
                gpu: "T4".into(),
                tier: 75,
                kernel: product.kernel.into(),
                shape: product.name.clone(),
                revision: 0,
                launch: other.named(),
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
                assert_eq!(call.kernel, product.kernel);
                assert!(note.launch.starts_with(&product.name), "{}", note.launch);
            }
            assert!(changed > 0, "{}", product.name);
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
