//! `edgellm-bench`: checks every GPU kernel against the CPU, then times it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use benches::kernels::{self, Options};
use benches::select::{Selection, models, parse_shape};
use benches::{check, counters, emulate, open, rows};
use clap::{Parser, Subcommand};
use engine::Error;
use engine::backend::cuda;
use engine::backend::cuda::device::Gpu;
use serde_json::Value;

#[derive(Parser)]
#[command(
    version,
    about = "Checks every GPU kernel against the CPU, then times it"
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the kernel cases on the GPU, in every tier that it can run.
    Check {
        /// Only this tier: sm_75, sm_80, sm_90.
        #[arg(long, value_parser = parse_tier)]
        tier: Option<u32>,
        /// Only cases whose name contains this.
        #[arg(long, default_value = "")]
        filter: String,
    },
    /// Run the kernel cases on the emulator: needs no GPU.
    Emulate {
        #[command(flatten)]
        wanted: Wanted,
    },
    /// Check, and if all is right, time: one table a tier, appended to the results file.
    Kernels {
        #[command(flatten)]
        wanted: Wanted,
        /// Only this tier: sm_75, sm_80, sm_90 [default: every one that the GPU runs].
        #[arg(long, value_parser = parse_tier)]
        tier: Option<u32>,
        /// Show the speed-up over what this revision recorded, rather than over the last run.
        #[arg(long, value_name = "REVISION")]
        compare: Option<String>,
        /// Write the measurements of this run here, as a JSON array.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
        /// Folder that gets `<gpu>.jsonl`.
        #[arg(long, default_value = "benches/results")]
        results: PathBuf,
        /// Revision to record [default: what git says of the folder].
        #[arg(long)]
        revision: Option<String>,
    },
    /// Time an INT4 matrix on the matrix units in every tiling, and show the best.
    Tilings {
        /// Matrices, as in 8960x1536 [default: those of Qwen2.5-1.5B and Llama 8B].
        #[arg(value_name = "NxK", value_parser = parse_shape)]
        shapes: Vec<(usize, usize)>,
        /// Weights that share a scale.
        #[arg(long, default_value_t = 128, value_parser = parse_group)]
        group: usize,
        /// Only this tier: sm_75, sm_80, sm_90 [default: every one that the GPU runs].
        #[arg(long, value_parser = parse_tier)]
        tier: Option<u32>,
    },
    /// Read hardware counters of the kernels with Nsight Compute, and show what bounds them.
    Counters {
        #[command(flatten)]
        wanted: Wanted,
        /// The tier: sm_75, sm_80, sm_90 [default: the highest that the GPU runs].
        #[arg(long, value_parser = parse_tier)]
        tier: Option<u32>,
        /// The profiler.
        #[arg(long, value_name = "PROGRAM", default_value = "ncu")]
        ncu: PathBuf,
        /// Write all counters here.
        #[arg(long, value_name = "FILE", default_value = "counters.csv")]
        csv: PathBuf,
    },
    /// Launch every selected kernel a single time, for a profiler.
    Once {
        #[command(flatten)]
        wanted: Wanted,
        /// The tier: sm_75, sm_80, sm_90 [default: the highest that the GPU runs].
        #[arg(long, value_parser = parse_tier)]
        tier: Option<u32>,
    },
    /// Print the GPU's name and its highest tier; fails, with the reason, where there is none.
    Device,
    /// Print what would be timed, and the bytes that each has to move.
    List,
    /// Print the tiers that this program has kernels for.
    Tiers,
    /// Write the kernels of every tier as PTX files.
    Ptx {
        /// Folder for `sm_75.ptx` and so on.
        folder: PathBuf,
    },
}

/// Which kernels and shapes.
#[derive(clap::Args)]
struct Wanted {
    /// Only kernels whose name contains this.
    #[arg(default_value = "")]
    kernel: String,
    /// The same.
    #[arg(long, hide = true, conflicts_with = "kernel")]
    filter: Option<String>,
    /// Only matrices of this shape, as in 8960x1536; one that is not listed is made.
    #[arg(long, value_name = "NxK", value_parser = parse_shape)]
    shape: Option<(usize, usize)>,
    /// The matrices, the logits and the attention of this model.
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(models()))]
    model: Option<String>,
    /// Only this variant: its number, or its part of the kernel's name. Its baseline is timed too.
    #[arg(long, value_name = "ID")]
    variant: Option<String>,
    /// Weights that share a scale, for --model and for a shape that is not listed.
    #[arg(long, default_value_t = 128, value_parser = parse_group)]
    group: usize,
}

impl Wanted {
    /// The arguments that say the same.
    fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["--group".to_owned(), self.group.to_string()];
        let shape = self.shape.map(|(n, k)| format!("{n}x{k}"));
        for (name, value) in [
            ("--shape", &shape),
            ("--model", &self.model),
            ("--variant", &self.variant),
            ("--filter", &self.filter),
        ] {
            if let Some(value) = value {
                arguments.extend([name.to_owned(), value.clone()]);
            }
        }
        if !self.kernel.is_empty() {
            arguments.push(self.kernel.clone());
        }
        arguments
    }

    fn selection(self) -> Selection {
        Selection {
            kernel: self.filter.unwrap_or(self.kernel),
            shape: self.shape,
            model: self.model,
            variant: self.variant,
            group: self.group,
        }
    }
}

fn parse_tier(text: &str) -> Result<u32, String> {
    let tier = text.strip_prefix("sm_").unwrap_or(text).parse().ok();
    let built = cuda::tiers();
    tier.filter(|tier| built.contains(tier)).ok_or_else(|| {
        let names: Vec<String> = built.iter().map(|tier| format!("sm_{tier}")).collect();
        format!("there are {}", names.join(", "))
    })
}

fn parse_group(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(group @ (32 | 64 | 128)) => Ok(group),
        _ => Err("groups are of 32, 64 or 128 weights".to_owned()),
    }
}

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Command::Device => device(),
        Command::List => {
            list();
            Ok(true)
        }
        Command::Tiers => {
            cuda::tiers().iter().for_each(|tier| println!("{tier}"));
            Ok(true)
        }
        Command::Ptx { folder } => write_ptx(&folder),
        Command::Check { tier, filter } => on_gpu(tier, |tier| check_tier(tier, &filter)),
        Command::Tilings {
            shapes,
            group,
            tier,
        } => tilings(tier, &shapes, group),
        Command::Counters {
            wanted,
            tier,
            ncu,
            csv,
        } => counted(wanted, tier, ncu, csv),
        Command::Once { wanted, tier } => Gpu::open(tier)
            .and_then(|gpu| counters::once(&gpu, &wanted.selection()))
            .map(|()| true),
        Command::Emulate { wanted } => emulated(&wanted.selection()),
        Command::Kernels {
            wanted,
            tier,
            compare,
            json,
            results,
            revision,
        } => {
            let options = Options {
                selection: wanted.selection(),
                compare,
                results,
                revision: revision.unwrap_or_else(kernels::revision),
            };
            timed(tier, &options, json.as_deref())
        }
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Runs `work` for one tier or all; without a GPU, says so and counts it as skipped.
fn on_gpu(
    tier: Option<u32>,
    mut work: impl FnMut(u32) -> Result<bool, Error>,
) -> Result<bool, Error> {
    let tiers = tier.map_or_else(cuda::tiers, |tier| vec![tier]);
    if let Err(reason) = cuda::available() {
        println!("skipped: no GPU ({reason})");
        println!("0 tiers checked, {} skipped", tiers.len());
        return Ok(true);
    }
    let mut all_right = true;
    for tier in tiers {
        all_right &= work(tier)?;
    }
    Ok(all_right)
}

/// Matrices whose tilings are timed if none is named.
const TILED: [(usize, usize); 7] = [
    (1536, 1536),
    (8960, 1536),
    (1536, 8960),
    (4096, 4096),
    (14_336, 4096),
    (4096, 14_336),
    (151_936, 1536),
];

fn tilings(tier: Option<u32>, shapes: &[(usize, usize)], group: usize) -> Result<bool, Error> {
    on_gpu(tier, |tier| {
        let Some(gpu) = open(tier)? else {
            println!("skipped: this GPU cannot run sm_{tier}");
            return Ok(true);
        };
        println!("{} with sm_{tier} kernels", gpu.name());
        let shapes = if shapes.is_empty() { &TILED } else { shapes };
        for (n, k) in shapes {
            benches::tilings::run(&gpu, *n, *k, group)?;
        }
        Ok(true)
    })
}

fn check_tier(tier: u32, filter: &str) -> Result<bool, Error> {
    let Some(gpu) = open(tier)? else {
        println!("skipped: this GPU cannot run sm_{tier}");
        return Ok(true);
    };
    println!("{} with sm_{tier} kernels", gpu.name());
    let outcomes = check::run(&gpu, |case| case.name.contains(filter));
    let failed = check::report(&format!("sm_{tier}"), &outcomes);
    println!("sm_{tier}: {} cases, {failed} failed", outcomes.len());
    Ok(failed == 0)
}

fn timed(tier: Option<u32>, options: &Options, json: Option<&Path>) -> Result<bool, Error> {
    let mut lines = Vec::new();
    let all_right = on_gpu(tier, |tier| {
        let Some(gpu) = open(tier)? else {
            println!("skipped: this GPU cannot run sm_{tier}");
            return Ok(true);
        };
        let measured = kernels::run(&gpu, options)?;
        let right = measured.is_some();
        lines.extend(measured.unwrap_or_default());
        Ok(right)
    })?;
    if let Some(path) = json {
        std::fs::write(path, format!("{:#}\n", Value::Array(lines)))
            .map_err(|error| Error::machine(format!("writing {}: {error}", path.display())))?;
    }
    Ok(all_right)
}

fn counted(wanted: Wanted, tier: Option<u32>, ncu: PathBuf, csv: PathBuf) -> Result<bool, Error> {
    if let Err(reason) = cuda::available() {
        println!("skipped: no GPU ({reason})");
        return Ok(true);
    }
    let mut arguments = wanted.arguments();
    if let Some(tier) = tier {
        arguments.extend(["--tier".to_owned(), tier.to_string()]);
    }
    let options = counters::Options {
        arguments,
        ncu,
        csv,
    };
    counters::run(&wanted.selection(), &options)?;
    Ok(true)
}

fn emulated(selection: &Selection) -> Result<bool, Error> {
    let outcomes = emulate::run(|case| selection.takes(case.kernel));
    if outcomes.is_empty() {
        return Err(Error::input("no case is of such a kernel"));
    }
    let failed = check::report("emulator", &outcomes);
    println!("emulator: {} cases, {failed} failed", outcomes.len());
    Ok(failed == 0)
}

fn device() -> Result<bool, Error> {
    cuda::available().map_err(Error::machine)?;
    let capability = cuda::device::capability()?;
    let tier = cuda::tiers()
        .into_iter()
        .filter(|tier| *tier <= capability)
        .max();
    let tier = tier.ok_or_else(|| {
        Error::machine(format!(
            "the GPU is sm_{capability}, too old for the kernels"
        ))
    })?;
    let name = open(tier)?.map_or_else(String::new, |gpu| gpu.name().to_owned());
    println!("{name} sm_{tier}");
    Ok(true)
}

fn write_ptx(folder: &Path) -> Result<bool, Error> {
    for (tier, text) in cuda::ptx() {
        let path = folder.join(format!("sm_{tier}.ptx"));
        std::fs::write(&path, text)
            .map_err(|error| Error::machine(format!("writing {}: {error}", path.display())))?;
    }
    Ok(true)
}

fn list() {
    for row in rows::all() {
        println!(
            "{:<28} {:<32} {:>12} bytes",
            row.kernel, row.shape, row.bytes
        );
    }
}
