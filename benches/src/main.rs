//! `edgellm-bench`: checks every GPU kernel against the CPU, then times it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use benches::{check, open, results, rows, time};
use clap::{Parser, Subcommand};
use engine::Error;
use engine::backend::cuda;
use serde_json::{Value, json};

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
        /// Only this tier (75, 80, 90).
        #[arg(long)]
        tier: Option<u32>,
        /// Only cases whose name contains this.
        #[arg(long, default_value = "")]
        filter: String,
    },
    /// Check, and if all is right, time every kernel.
    Kernels {
        /// Only this tier (75, 80, 90).
        #[arg(long)]
        tier: Option<u32>,
        /// Only kernels whose name contains this.
        #[arg(long, default_value = "")]
        filter: String,
        /// Folder that gets `<gpu>.jsonl`.
        #[arg(long, default_value = "benches/results")]
        results: PathBuf,
    },
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

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Command::List => {
            list();
            Ok(true)
        }
        Command::Tiers => {
            cuda::tiers().iter().for_each(|tier| println!("{tier}"));
            Ok(true)
        }
        Command::Ptx { folder } => write_ptx(&folder),
        Command::Check { tier, filter } => on_gpu(tier, |tier| run_tier(tier, &filter, None)),
        Command::Kernels {
            tier,
            filter,
            results,
        } => on_gpu(tier, |tier| run_tier(tier, &filter, Some(&results))),
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

/// Checks one tier, then times it if `results` says where to. False if a case failed.
fn run_tier(tier: u32, filter: &str, results: Option<&Path>) -> Result<bool, Error> {
    let Some(gpu) = open(tier)? else {
        println!("skipped: this GPU cannot run sm_{tier}");
        return Ok(true);
    };
    println!("{} with sm_{tier} kernels", gpu.name());
    let outcomes = check::run(&gpu, filter);
    let failed = check::report(tier, &outcomes);
    println!("sm_{tier}: {} cases, {failed} failed", outcomes.len());
    let Some(folder) = results else {
        return Ok(failed == 0);
    };
    if failed > 0 {
        println!("sm_{tier}: not timed, because a kernel that is wrong has no speed");
        return Ok(false);
    }
    let path = results::path(folder, gpu.name());
    let row = |kernel: &str, shape: &str, bytes: u64, timing: &time::Timing| {
        println!(
            "time  sm_{tier}  {kernel:<28} {shape:<28} {:>10.2} us  {:>8.1} GB/s",
            timing.median_us,
            timing.gb_per_second(bytes)
        );
        json!({
            "date": results::today(),
            "gpu": gpu.name(),
            "tier": format!("sm_{tier}"),
            "kernel": kernel,
            "shape": shape,
            "bytes": bytes,
            "us_median": timing.median_us,
            "us_min": timing.min_us,
            "us_max": timing.max_us,
            "gb_per_second": timing.gb_per_second(bytes),
            "launches": timing.launches,
            "copies": timing.copies,
            "samples": timing.samples,
        })
    };
    let copy = time::device_copy(&gpu)?;
    // Read once and written once.
    let mut lines: Vec<Value> = vec![row("device_copy", "bytes", 2 * time::ROTATE_BYTES, &copy)];
    for wanted in rows::all().iter().filter(|row| row.kernel.contains(filter)) {
        let timing = time::kernel(&gpu, wanted)?;
        lines.push(row(wanted.kernel, &wanted.shape, wanted.bytes, &timing));
    }
    results::append(&path, &lines)
        .map_err(|error| Error::machine(format!("writing {}: {error}", path.display())))?;
    println!("{} results appended to {}", lines.len(), path.display());
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
