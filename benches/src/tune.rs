//! Kernels in every launch that is worth a try: what `gpu-kernels/tuned.toml` is made of.
//!
//! Bare matrices and products of many tokens are timed by themselves, the products and the attention of a
//! model's layers in a whole token, where one can be made of random weights.

mod token;

use std::path::Path;
use std::sync::Arc;

use engine::Error;
use engine::backend::cuda::device::Gpu;
use gpu_kernels::attention::split;
use gpu_kernels::launch::{Call, DeviceInfo};
use gpu_kernels::linear::{gemm_int4, gemv_int4_mma};
use gpu_kernels::tuned::{self, Launches, Row, Timed};

use crate::models;
use crate::rows::attention::Attended;
use crate::rows::{self, Operands, Tiled};
use crate::select::{SEVEN, Selection};
use crate::time::{self, Forms};

/// Samples of a first look at a launch.
const FIRST_SAMPLES: usize = 5;
/// Launches that get a second look, besides the rule's.
const FINALISTS: usize = 6;
/// By how much a launch has to beat the rule's: differences below come and go between runs.
const WORTH: f64 = 0.99;

/// Positions that attention is tuned at: its launch serves all of them, so each counts as much.
const TOKENS: [usize; 4] = [512, 4096, 16_384, 65_536];
/// Positions that its launches leave no multiprocessor idle at: one for a cache of 4,096 would do so for the
/// rest of a long one.
const LONG: usize = 131_072;

/// Plans the calls of all launches over one copy of the operands.
type Make = Box<dyn Fn(&DeviceInfo, &mut dyn Operands) -> Result<Vec<Call>, Error>>;

/// A kernel at a shape, with its launches.
struct Job {
    kernel: &'static str,
    /// Shape, as the table names it.
    shape: String,
    /// Names and numbers of each launch, the rule's first.
    launches: Vec<Vec<(String, u32)>>,
    /// What a launch serves: its time is the geometric mean of these.
    cases: Vec<Case>,
}

/// Operands of all launches.
struct Case {
    bytes: u64,
    make: Make,
}

impl Job {
    /// A job of a kernel's own launches.
    fn new<L: Launches>(
        kernel: &'static str,
        shape: String,
        launches: &[L],
        cases: Vec<Case>,
    ) -> Job {
        Job {
            kernel,
            shape,
            launches: launches.iter().map(L::named).collect(),
            cases,
        }
    }

    /// The INT4 product on the matrix units.
    fn tiled(device: &DeviceInfo, product: Tiled) -> Job {
        let tilings = gemv_int4_mma::candidates(device, &product.shape);
        let launches = tilings.clone();
        let case = Case {
            bytes: rows::gemv_int4_mma(&product).bytes,
            make: Box::new(move |device, memory| {
                rows::gemv_int4_mma_in(&product, &tilings, device, memory)
            }),
        };
        let name = product.shape.name(product.norm);
        Job::new(product.kernel(), name, &launches, vec![case])
    }

    /// A product of many tokens.
    fn many(device: &DeviceInfo, shape: gemm_int4::Shape, mins: bool) -> Job {
        let tilings = gemm_int4::candidates(device, &shape);
        let launches = tilings.clone();
        let case = Case {
            bytes: rows::prompt::product_bytes(&shape, mins),
            make: Box::new(move |device, memory| {
                rows::prompt::products_in(&shape, mins, &tilings, device, memory)
            }),
        };
        let name = gemm_int4::name(&shape, mins);
        Job::new(gemm_int4::FAMILY, name, &launches, vec![case])
    }

    /// Attention split over the context.
    fn attention(device: &DeviceInfo, long: Attended) -> Job {
        let tunings = split::candidates(device, &long.shape());
        let cases = TOKENS.map(|tokens| {
            let attended = Attended { tokens, ..long };
            let tunings = tunings.clone();
            Case {
                bytes: attended.bytes(),
                make: Box::new(move |device, memory| attended.calls(&tunings, device, memory)),
            }
        });
        let name = split::name(&long.shape());
        Job::new(long.kernel(), name, &tunings, cases.into())
    }
}

/// The kernels and shapes that a selection has timed by themselves: of a model the products of many tokens, and
/// where no token of it is made its attention and its products as the engine fuses them; a bare matrix; or the
/// seven bare ones and every model.
fn jobs(device: &DeviceInfo, selection: &Selection) -> Result<Vec<Job>, Error> {
    let (group, mins) = (selection.group, selection.mins);
    let bare = |(n, k)| Tiled {
        mins,
        ..Tiled::plain(n, k, group)
    };
    let named = of_models(selection);
    let mut products: Vec<Tiled> = match (&selection.model, selection.shape) {
        (Some(_), _) => Vec::new(),
        (None, Some(shape)) => vec![bare(shape)],
        (None, None) => SEVEN.into_iter().map(bare).collect(),
    };
    let mut dims = Vec::new();
    let mut many: Vec<gemm_int4::Shape> = Vec::new();
    for name in named {
        let found = models::named(name)?;
        let fused = found.iter().flat_map(models::Model::products);
        many.extend(fused.flat_map(|product| of_many_tokens(&product, group)));
        if !token::is_made(name) {
            let fused = found.iter().flat_map(models::Model::products);
            products.extend(fused.map(|product| Tiled::of(&product, group, mins)));
            dims.extend(found);
        }
    }
    let attended = dims.iter().flat_map(|model| {
        [false, true].map(|of_8_bits| Attended {
            dims: [model.heads, model.kv_heads, model.head_dim],
            tokens: LONG,
            of_8_bits,
        })
    });
    let products = products
        .into_iter()
        .map(|product| Job::tiled(device, product));
    let attended = attended.map(|attended| Job::attention(device, attended));
    let many = many.into_iter().map(|shape| Job::many(device, shape, mins));
    let mut jobs: Vec<Job> = Vec::new();
    for job in products.chain(attended).chain(many) {
        let known = |other: &Job| other.kernel == job.kernel && other.shape == job.shape;
        let choice = job.launches.len() > 1;
        if choice && selection.takes(job.kernel) && !jobs.iter().any(known) {
            jobs.push(job);
        }
    }
    Ok(jobs)
}

/// The product for each number of tokens that has a tiling of its own.
fn of_many_tokens(product: &models::Product, group: usize) -> [gemm_int4::Shape; 8] {
    gemm_int4::TOKENS.map(|tokens| gemm_int4::Shape {
        rows: product.rows,
        cols: product.cols,
        group,
        tokens,
        epilogue: product.epilogue,
        half_y: product.half_y,
    })
}

/// The models that a selection means.
fn of_models(selection: &Selection) -> Vec<&str> {
    match (&selection.model, selection.shape) {
        (Some(name), _) if name != models::ALL => vec![name],
        (None, Some(_)) => Vec::new(),
        _ => {
            let mut names = models::names();
            names.retain(|name| *name != models::ALL && !models::is_tiny(name));
            names
        }
    }
}

/// Times every selected kernel in all its launches on `gpu`, whose kernels are `ptx`, and puts the
/// fastest into the table at `path`.
///
/// # Errors
/// [`Error::Machine`] from the device or the file, [`Error::Input`] for a selection that leaves
/// nothing or a table that cannot be read.
pub fn run(gpu: &Arc<Gpu>, ptx: &str, selection: &Selection, path: &Path) -> Result<(), Error> {
    let mut table = match std::fs::read_to_string(path) {
        Ok(text) => tuned::rows(&text)
            .map_err(|reason| Error::input(format!("{}: {reason}", path.display())))?,
        Err(_) => tuned::checked_in(),
    };
    let mut rows = 0;
    let mut keep = |row: Row| {
        table.retain(|known| !row.replaces(known));
        table.push(row);
        rows += 1;
        // After each: an interrupted run keeps what it found.
        write(path, &tuned::text(&table))
    };
    for job in &jobs(&gpu.info(), selection)? {
        keep(fastest(gpu, ptx, job)?)?;
    }
    for name in of_models(selection)
        .into_iter()
        .filter(|name| token::is_made(name))
    {
        token::tune(gpu, ptx, name, selection, &mut keep)?;
    }
    if rows == 0 {
        return Err(Error::input(
            "no kernel of that name has launches to choose from",
        ));
    }
    println!("{rows} rows written to {}", path.display());
    Ok(())
}

/// Writes the table whole or not at all.
fn write(path: &Path, text: &str) -> Result<(), Error> {
    let part = path.with_extension("toml.part");
    std::fs::write(&part, text)
        .and_then(|()| std::fs::rename(&part, path))
        .map_err(|error| Error::machine(format!("writing {}: {error}", path.display())))
}

/// Looks at every launch briefly, at the best ones and the rule's again, and takes the fastest.
fn fastest(gpu: &Arc<Gpu>, ptx: &str, job: &Job) -> Result<Row, Error> {
    let revision = tuned::revision(ptx, job.kernel)
        .ok_or_else(|| Error::machine(format!("{} is not in the PTX", job.kernel)))?;
    let reads = job.cases.iter().map(|case| {
        let (read, _) = time::kernel(gpu, &rows::read(case.bytes, true))?;
        Ok(read.median_us)
    });
    let read_us = mean(reads)?;
    let cases = job.cases.iter();
    let cases = cases
        .map(|case| Forms::new(gpu, case.bytes, &case.make))
        .collect::<Result<Vec<_>, Error>>()?;
    let time = |form, samples| {
        let times = cases.iter().map(|forms| forms.time(form, samples));
        mean(times.map(|timing| Ok(timing?.median_us)))
    };
    let mut first = (0..job.launches.len())
        .map(|form| Ok((time(form, FIRST_SAMPLES)?, form)))
        .collect::<Result<Vec<_>, Error>>()?;
    first.sort_by(|a, b| a.0.total_cmp(&b.0));
    let rule_us = time(0, time::SAMPLES)?;
    let mut best = (rule_us, 0);
    for &(_, form) in first.iter().take(FINALISTS).filter(|(_, form)| *form != 0) {
        let us = time(form, time::SAMPLES)?;
        if us < best.0 && us < WORTH * rule_us {
            best = (us, form);
        }
    }
    let (us, form) = best;
    println!(
        "{} {}: read {:.2} us; rule {rule_us:.2} us, {:.2} x read ({}); best of {} {us:.2} us, {:.2} x read ({})",
        job.kernel,
        job.shape,
        read_us,
        rule_us / read_us,
        shown(&job.launches[0]),
        job.launches.len(),
        us / read_us,
        shown(&job.launches[form]),
    );
    Ok(Row {
        gpu: gpu.name().to_owned(),
        tier: gpu.tier().capability(),
        kernel: job.kernel.to_owned(),
        shape: job.shape.clone(),
        revision,
        launch: job.launches[form].clone(),
        timed: Timed::Launch,
        us,
        rule_us,
    })
}

/// The geometric mean.
fn mean(times: impl ExactSizeIterator<Item = Result<f64, Error>>) -> Result<f64, Error> {
    let count = times.len() as f64;
    let logarithms = times.map(|us| Ok(us?.ln()));
    Ok((logarithms.sum::<Result<f64, Error>>()? / count).exp())
}

/// `split 2, teams 6, blocks 132`.
fn shown(launch: &[(String, u32)]) -> String {
    let numbers = launch.iter().map(|(name, n)| format!("{name} {n}"));
    numbers.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shapes(selection: &Selection) -> Vec<String> {
        let jobs = jobs(&DeviceInfo::T4, selection).expect("jobs");
        jobs.iter()
            .filter(|job| job.kernel != gemm_int4::FAMILY)
            .map(|job| format!("{} {}", job.kernel, job.shape))
            .collect()
    }

    #[test]
    fn products_of_many_tokens_are_those_of_the_layers() {
        let selection = Selection {
            kernel: "linear_gemm".into(),
            model: Some("qwen2.5-1.5b".into()),
            group: 32,
            ..Selection::default()
        };
        let jobs = jobs(&DeviceInfo::H100, &selection).expect("jobs");
        let shapes: Vec<&str> = jobs.iter().map(|job| &*job.shape).collect();
        for shape in [
            "2048x1536 group 32, 8 tokens",
            "1536x1536 add group 32, 64 tokens",
            "8960x1536 swiglu group 32, 1024 tokens",
            "1536x8960 add group 32, 512 tokens",
        ] {
            assert!(shapes.contains(&shape), "{shape}: {shapes:?}");
        }
        assert!(shapes.len() <= 4 * gemm_int4::TOKENS.len());
    }

    #[test]
    fn a_model_that_is_not_made_is_tuned_as_the_engine_fuses_it() {
        let selection = |model: &str| Selection {
            model: Some(model.into()),
            group: 32,
            ..Selection::default()
        };
        assert_eq!(
            shapes(&selection("qwen2.5-7b")),
            [
                "linear_gemv_int4_mma_g32 4608x3584 norm",
                "linear_gemv_int4_mma_g32 3584x3584 add",
                "linear_gemv_int4_mma_g32 18944x3584 norm swiglu to halves",
                "linear_gemv_int4_mma_g32_half 3584x18944 add",
                "attention_split_f16_d128 heads 28/4 x 128",
                "attention_split_v8_d128 heads 28/4 x 128",
            ]
        );
        assert!(shapes(&selection("qwen2.5-1.5b")).is_empty());
    }

    #[test]
    fn every_job_has_a_launch_by_the_rule_and_others() {
        let selection = Selection {
            group: 128,
            ..Selection::default()
        };
        let jobs = jobs(&DeviceInfo::T4, &selection).expect("jobs");
        assert!(jobs.len() > 20);
        for job in &jobs {
            let least = if job.kernel == gemm_int4::FAMILY {
                2
            } else {
                5
            };
            assert!(job.launches.len() >= least, "{} {}", job.kernel, job.shape);
        }
        let splits = |job: &Job| job.launches.iter().map(|launch| launch[0].1).min();
        let attention = jobs
            .iter()
            .filter(|job| job.kernel.starts_with("attention"));
        for job in attention {
            assert_eq!(splits(job), Some(job.launches[0][0].1), "{}", job.shape);
        }
        let other = Selection {
            kernel: "rmsnorm".into(),
            ..selection
        };
        let none = super::jobs(&DeviceInfo::T4, &other).expect("jobs");
        assert!(none.is_empty());
    }

    #[test]
    fn tables_are_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tuned.toml");
        write(&path, "a").unwrap();
        write(&path, "b").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "b");
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
    }
}
