//! `edgellm-bench`: checks every GPU kernel against the CPU, then times it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use benches::kernels::{self, Compare, Options};
use benches::ptx::Ptx;
use benches::select::{Selection, parse_shape};
use benches::{check, counters, emulate, models, peers, rows, tune};
use clap::{Parser, Subcommand};
use engine::Error;
use engine::backend::Tier;
use engine::backend::cuda;
use engine::backend::cuda::device::Gpu;
use serde_json::Value;

#[derive(Parser)]
#[command(
    version,
    about = "Checks every GPU kernel against the CPU, then times it"
)]
struct Args {
    /// Run the kernels of this folder, sm_75.ptx and so on, rather than the program's own.
    #[arg(long, global = true, value_name = "FOLDER")]
    ptx: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the kernel cases on the GPU, in every tier that it can run.
    Check {
        /// Only this tier: sm_75, sm_80, sm_90, sm_90a.
        #[arg(long)]
        tier: Option<Tier>,
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
        /// Only this tier: sm_75, sm_80, sm_90, sm_90a [default: every one that the GPU runs].
        #[arg(long)]
        tier: Option<Tier>,
        /// Show the speed-up over this revision too: over what it recorded.
        #[arg(long, value_name = "REVISION")]
        compare: Option<String>,
        /// Time the kernels of this folder, those of the revision to compare with, in the same run.
        #[arg(long, value_name = "FOLDER", requires = "compare")]
        compare_ptx: Option<PathBuf>,
        /// Leave out torch and cuBLAS, which are timed where python3 has torch.
        #[arg(long)]
        no_peers: bool,
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
    /// Time kernels in every launch worth a try, and put the fastest into the table of launches.
    Tune {
        #[command(flatten)]
        wanted: Wanted,
        /// The tier: sm_75, sm_80, sm_90, sm_90a [default: the highest that the GPU runs].
        #[arg(long)]
        tier: Option<Tier>,
        /// The table; made of the checked-in one if it is not there.
        #[arg(long, value_name = "FILE", default_value = "gpu-kernels/tuned.toml")]
        table: PathBuf,
    },
    /// Read hardware counters of the kernels with Nsight Compute, and show what bounds them.
    Counters {
        #[command(flatten)]
        wanted: Wanted,
        /// The tier: sm_75, sm_80, sm_90, sm_90a [default: the highest that the GPU runs].
        #[arg(long)]
        tier: Option<Tier>,
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
        /// The tier: sm_75, sm_80, sm_90, sm_90a [default: the highest that the GPU runs].
        #[arg(long)]
        tier: Option<Tier>,
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
    /// The matrices, the logits and the attention of this model, or of `all`.
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(models::names()))]
    model: Option<String>,
    /// Only this variant: its number, or its part of the kernel's name. Its baseline is timed too.
    #[arg(long, value_name = "ID")]
    variant: Option<String>,
    /// Weights that share a scale, for --model and for a shape that is not listed.
    #[arg(long, default_value_t = 128, value_parser = parse_group)]
    group: usize,
    /// The format with minima, likewise.
    #[arg(long)]
    minima: bool,
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
        if self.minima {
            arguments.push("--minima".to_owned());
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
            mins: self.minima,
        }
    }
}

fn parse_group(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(group @ (32 | 64 | 128)) => Ok(group),
        _ => Err("groups are of 32, 64 or 128 weights".to_owned()),
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let ptx = match &args.ptx {
        Some(folder) => Ptx::read(folder),
        None => Ok(Ptx::embedded()),
    };
    match ptx.and_then(|ptx| run(args.command, &ptx)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Runs a command; `false` if a kernel is wrong.
fn run(command: Command, ptx: &Ptx) -> Result<bool, Error> {
    match command {
        Command::Device => device(ptx).map(|()| true),
        Command::List => {
            list();
            Ok(true)
        }
        Command::Tiers => {
            ptx.tiers().iter().for_each(|tier| println!("{tier}"));
            Ok(true)
        }
        Command::Ptx { folder } => ptx.write(&folder).map(|()| true),
        Command::Check { tier, filter } => on_gpu(ptx, tier, |gpu| Ok(checked(gpu, &filter))),
        Command::Tune {
            wanted,
            tier,
            table,
        } => on_best(ptx, tier, |gpu| {
            tune::run(gpu, ptx.text(gpu.tier())?, &wanted.selection(), &table)
        }),
        Command::Counters {
            wanted,
            tier,
            ncu,
            csv,
        } => counted(ptx, wanted, tier, ncu, csv),
        Command::Once { wanted, tier } => {
            on_best(ptx, tier, |gpu| counters::once(gpu, &wanted.selection()))
        }
        Command::Emulate { wanted } => emulated(&wanted.selection()),
        Command::Kernels {
            wanted,
            tier,
            compare,
            compare_ptx,
            no_peers,
            json,
            results,
            revision,
        } => {
            let others = compare_ptx.as_deref().map(Ptx::read).transpose()?;
            let options = Options {
                selection: wanted.selection(),
                compare: compare.map(|revision| Compare {
                    revision,
                    ptx: others,
                }),
                results,
                revision: revision.unwrap_or_else(kernels::revision),
            };
            timed(ptx, tier, &options, no_peers, json.as_deref())
        }
    }
}

/// Why there is no GPU, said once; `None` where there is one.
fn no_gpu() -> Option<()> {
    let reason = cuda::available().err()?;
    println!("skipped: no GPU ({reason})");
    Some(())
}

/// Runs `work` for one tier or all; without a GPU, says so and counts it as skipped.
fn on_gpu(
    ptx: &Ptx,
    tier: Option<Tier>,
    mut work: impl FnMut(&Arc<Gpu>) -> Result<bool, Error>,
) -> Result<bool, Error> {
    let tiers = tier.map_or_else(|| ptx.tiers(), |tier| vec![tier]);
    if no_gpu().is_some() {
        println!("0 tiers checked, {} skipped", tiers.len());
        return Ok(true);
    }
    let mut all_right = true;
    for tier in tiers {
        match ptx.open(tier)? {
            Some(gpu) => all_right &= work(&gpu)?,
            None => println!("skipped: this GPU cannot run {tier}"),
        }
    }
    Ok(all_right)
}

/// Runs `work` for one tier or the highest; without a GPU, says so.
fn on_best(
    ptx: &Ptx,
    tier: Option<Tier>,
    work: impl FnOnce(&Arc<Gpu>) -> Result<(), Error>,
) -> Result<bool, Error> {
    if no_gpu().is_none() {
        work(&ptx.open_best(tier)?)?;
    }
    Ok(true)
}

fn checked(gpu: &Arc<Gpu>, filter: &str) -> bool {
    let tier = gpu.tier();
    println!("{} with {tier} kernels", gpu.name());
    let outcomes = check::run(gpu, |case| case.name.contains(filter));
    let failed = check::report(&tier.to_string(), &outcomes);
    println!("{tier}: {} cases, {failed} failed", outcomes.len());
    failed == 0
}

fn timed(
    ptx: &Ptx,
    tier: Option<Tier>,
    options: &Options,
    no_peers: bool,
    json: Option<&Path>,
) -> Result<bool, Error> {
    let beside = match cuda::available().is_err() || no_peers {
        true => Vec::new(),
        false => peers::measure(&options.selection.rows()?)?,
    };
    let mut lines = Vec::new();
    let all_right = on_gpu(ptx, tier, |gpu| {
        let measured = kernels::run(gpu, ptx, options, &beside)?;
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

fn counted(
    ptx: &Ptx,
    wanted: Wanted,
    tier: Option<Tier>,
    ncu: PathBuf,
    csv: PathBuf,
) -> Result<bool, Error> {
    if no_gpu().is_some() {
        return Ok(true);
    }
    let mut arguments = wanted.arguments();
    if let Some(tier) = tier {
        arguments.extend(["--tier".to_owned(), tier.to_string()]);
    }
    // The profiled program runs the same kernels.
    let folder = csv.with_extension("ptx");
    std::fs::create_dir_all(&folder)
        .map_err(|error| Error::machine(format!("making {}: {error}", folder.display())))?;
    ptx.write(&folder)?;
    arguments.extend(["--ptx".to_owned(), folder.display().to_string()]);
    let options = counters::Options {
        arguments,
        ncu,
        csv,
    };
    let done = counters::run(&wanted.selection(), &options);
    let _ = std::fs::remove_dir_all(&folder);
    done.map(|()| true)
}

fn emulated(selection: &Selection) -> Result<bool, Error> {
    let emulated = emulate::run(|case| selection.takes(case.kernel));
    let outcomes = emulated.outcomes;
    if outcomes.is_empty() {
        return Err(Error::input("no case is of such a kernel"));
    }
    let failed = check::report("emulator", &outcomes);
    println!("emulator: {} cases, {failed} failed", outcomes.len());
    print!("\n{}", emulate::conflicts(&emulated.conflicts));
    Ok(failed == 0)
}

fn device(ptx: &Ptx) -> Result<(), Error> {
    cuda::available().map_err(Error::machine)?;
    let gpu = ptx.open_best(None)?;
    println!("{} {}", gpu.name(), gpu.tier());
    Ok(())
}

fn list() {
    for row in rows::all() {
        println!(
            "{:<28} {:<32} {:>12} bytes",
            row.kernel, row.shape, row.bytes
        );
    }
}
