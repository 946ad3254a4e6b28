//! `cargo xtask bench`: a kernel from its source to its figures, in one command.

mod cpu;
mod estimate;
mod known;
mod revision;
pub mod sass;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{self, sleep};
use std::time::{Duration, Instant, SystemTime};

use clap::Args as ClapArgs;
use cuda_builder::{CudaBuilder, NvvmArch, TIERS};

use crate::{Error, ptx, setup, workspace};
use revision::Revision;

/// Rebuilds the kernels, checks them against the CPU and, if all is right, times them on the GPU.
///
/// With a GPU it prints one table a tier: time a launch (median, 5th and 95th percentile) in a CUDA
/// graph over operands that no cache holds; bytes a second; that time over the time of a kernel
/// that only reads as many bytes; speed-up over the baseline variant, over the last recorded run and
/// over another revision, whose kernels are built and timed in the same run; registers, memory,
/// occupancy; torch's INT4 product and cuBLAS where python3 has torch. Every run is appended to
/// benches/results/<gpu>.jsonl.
///
/// Without one it checks the kernels on the emulator and shows what can be known: ptxas figures for
/// every GPU generation, and from the machine code what the main loop is made of, the bytes that it
/// loads and the instructions that it spends on a weight. It says that nothing was timed.
#[derive(Debug, ClapArgs)]
#[command(
    after_help = "Examples:\n  cargo xtask bench linear_gemv_int4 --shape 8960x1536 --tier sm_90\n  \
    cargo xtask bench --model qwen2.5-1.5b --json /tmp/1.5b.json\n  \
    cargo xtask bench attention --watch           (again whenever a kernel is saved)\n  \
    cargo xtask bench int4 --compare main~3       (that revision's kernels beside these)\n  \
    cargo xtask ptx --show linear_gemv_int4_multirow --sass   (the code, with Rust lines)\n  \
    cargo xtask bench --cpu ternary"
)]
pub struct Args {
    /// Only kernels whose name contains this.
    kernel: Option<String>,
    /// Only matrices of this shape, as in 8960x1536; one that is not listed is made.
    #[arg(long, value_name = "NxK")]
    shape: Option<String>,
    /// The matrices, the logits and the attention of this model, as in qwen2.5-1.5b, or of `all`.
    #[arg(long, conflicts_with = "shape")]
    model: Option<String>,
    /// Only this variant: its number, or its part of the kernel's name. Its baseline is timed too.
    #[arg(long, value_name = "ID")]
    variant: Option<String>,
    /// Weights that share a scale: 32, 64, 128.
    #[arg(long, value_name = "G")]
    group: Option<u32>,
    /// Weights with a scale and a minimum.
    #[arg(long)]
    minima: bool,
    /// Only the kernels of this tier: the others are not compiled either [default: all].
    #[arg(long, value_name = "SM", value_parser = ptx::parse_tier)]
    tier: Option<NvvmArch>,
    /// Compare with `baseline`, as is always done, or with the kernels of this git revision.
    #[arg(long, value_name = "BASELINE|REV")]
    compare: Option<String>,
    /// Write the figures of this run here, as a JSON array.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Run again whenever a source of the kernels changes, until interrupted.
    #[arg(long)]
    watch: bool,
    /// Leave out torch and cuBLAS.
    #[arg(long)]
    no_peers: bool,
    /// Compute what the INT4 products would take on this GPU, from machine code and bytes: t4.
    #[arg(long, value_name = "GPU", value_parser = estimate::gpu, conflicts_with_all = ["compare", "tier", "model"])]
    estimate: Option<&'static estimate::Gpu>,
    /// Show what can be known without a GPU, even where there is one.
    #[arg(long)]
    no_gpu: bool,
    /// The CPU's kernels instead: GB/s and products a second for every number of threads, beside what
    /// reading memory and products from the first cache reach. KERNEL also selects by shape.
    #[arg(long, conflicts_with_all = ["shape", "model", "variant", "group", "minima", "tier", "compare", "json", "watch", "estimate", "no_gpu"])]
    cpu: bool,
}

/// Runs the task.
pub fn run(args: &Args) -> Result<(), Error> {
    if args.cpu {
        return cpu::run(args.kernel.as_deref());
    }
    setup::core()?;
    if !args.watch {
        return once(args);
    }
    let sources = workspace::root().join("gpu-kernels");
    loop {
        let seen = newest(&sources);
        let start = Instant::now();
        match once(args) {
            // Another save will not mend a wrong command line.
            Err(error @ Error::Usage(_)) => return Err(error),
            Err(error) => eprintln!("error: {error}"),
            Ok(()) => {}
        }
        eprintln!(
            "-- {:.1} s; waiting for a change in {} (Ctrl-C ends)",
            start.elapsed().as_secs_f32(),
            sources.display()
        );
        while newest(&sources) == seen {
            sleep(Duration::from_millis(300));
        }
    }
}

/// When a file under `folder` was last changed.
fn newest(folder: &Path) -> Option<SystemTime> {
    let entries = folder.read_dir().ok()?.flatten();
    entries
        .filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            // An editor's own files are no change.
            let is_source = entry
                .path()
                .extension()
                .is_some_and(|e| e == "rs" || e == "toml");
            match metadata.is_dir() {
                true => newest(&entry.path()),
                false => metadata.modified().ok().filter(|_| is_source),
            }
        })
        .max()
}

fn once(args: &Args) -> Result<(), Error> {
    if let Some(gpu) = args.estimate {
        return estimated(gpu, args);
    }
    let tiers = args.tier.map_or(TIERS.to_vec(), |tier| vec![tier]);
    let other = match args.compare.as_deref() {
        None | Some("baseline") => None,
        Some(name) => Some(Revision::find(name)?),
    };
    if let Some(other) = &other {
        other.kernels(&tiers)?;
    }
    let (program, kernels) = build(&tiers)?;
    match gpu(&program, args.no_gpu)? {
        Ok(()) => on_gpu(&program, &kernels, args, other.as_ref()),
        Err(reason) => without_gpu(&program, &kernels, &tiers, args, other.as_ref(), &reason),
    }
}

/// Prints what a GPU would take.
fn estimated(gpu: &estimate::Gpu, args: &Args) -> Result<(), Error> {
    let tier = gpu.arch.tier();
    let shape = args.shape.as_deref().map(parse_shape).transpose()?;
    let files = files(&build_kernels(&[tier])?, &[tier]);
    let figures = known::figures(&files, |name| args.takes(name))?;
    print!("{}", estimate::table(gpu, &figures, shape)?);
    Ok(())
}

fn parse_shape(text: &str) -> Result<(usize, usize), Error> {
    let sides = text.split_once(['x', 'X']).and_then(|(n, k)| {
        let side = |text: &str| {
            text.trim()
                .parse()
                .ok()
                .filter(|side| (1..=1_000_000).contains(side))
        };
        Some((side(n)?, side(k)?))
    });
    sides.ok_or_else(|| {
        Error::Usage(format!(
            "`{text}` is no shape: rows x columns, each up to 1000000, as in 8960x1536"
        ))
    })
}

/// The PTX files of the tiers in a folder.
fn files(folder: &Path, tiers: &[NvvmArch]) -> Vec<(NvvmArch, PathBuf)> {
    let files = tiers
        .iter()
        .map(|tier| (*tier, folder.join(format!("{tier}.ptx"))));
    files.collect()
}

/// Builds the kernels of the tiers and, beside that, the program that runs them, which takes them
/// from the returned folder: a changed kernel is compiled for no other tier.
pub fn build(tiers: &[NvvmArch]) -> Result<(PathBuf, PathBuf), Error> {
    let start = Instant::now();
    let arguments = [
        "--package",
        "benches",
        "--bin",
        "edgellm-bench",
        "--no-default-features",
    ];
    let (program, kernels) = thread::scope(|scope| {
        let program = scope.spawn(|| workspace::build_program(&arguments, "edgellm-bench"));
        let kernels = build_kernels(tiers);
        let program = program.join().expect("building does not panic");
        (program, kernels)
    });
    let built = (program?, kernels?);
    eprintln!(
        "kernels and program built in {:.1} s",
        start.elapsed().as_secs_f32()
    );
    Ok(built)
}

/// Compiles the kernels into a folder of `sm_75.ptx` and so on.
fn build_kernels(tiers: &[NvvmArch]) -> Result<PathBuf, Error> {
    let target = workspace::target_dir()?;
    let folder = target.join("bench-ptx");
    std::fs::create_dir_all(&folder).map_err(Error::io("cannot make", &folder))?;
    for tier in tiers {
        let start = Instant::now();
        let output = CudaBuilder::new(workspace::root().join("gpu-kernels"))
            .arch(*tier)
            .target_dir(target.join("cuda"))
            .copy_to(folder.join(format!("{tier}.ptx")))
            .build()?;
        eprint!("{}", output.warnings);
        eprintln!("PTX for {tier} in {:.1} s", start.elapsed().as_secs_f32());
    }
    Ok(folder)
}

/// Whether there is a GPU to time on, or why not.
pub fn gpu(program: &Path, unwanted: bool) -> Result<Result<(), String>, Error> {
    if unwanted {
        return Ok(Err("--no-gpu".to_owned()));
    }
    let output = Command::new(program)
        .arg("device")
        .output()
        .map_err(Error::io("cannot run", program))?;
    Ok(if output.status.success() {
        Ok(())
    } else {
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(text.trim_start_matches("error: ").to_owned())
    })
}

fn on_gpu(
    program: &Path,
    kernels: &Path,
    args: &Args,
    other: Option<&Revision>,
) -> Result<(), Error> {
    let mut command = Command::new(program);
    command
        .arg("--ptx")
        .arg(kernels)
        .arg("kernels")
        .args(args.selection());
    if let Some(tier) = args.tier {
        command.args(["--tier", &tier.to_string()]);
    }
    if let Some(other) = other {
        command
            .args(["--compare", &other.commit, "--compare-ptx"])
            .arg(other.kernels(&[])?);
    }
    if args.no_peers {
        command.arg("--no-peers");
    }
    if let Some(json) = &args.json {
        command
            .arg("--json")
            .arg(std::path::absolute(json).map_err(Error::io("no path", json))?);
    }
    finish(command.current_dir(workspace::root()), program)
}

fn without_gpu(
    program: &Path,
    kernels: &Path,
    tiers: &[NvvmArch],
    args: &Args,
    other: Option<&Revision>,
    reason: &str,
) -> Result<(), Error> {
    let mut emulate = Command::new(program);
    emulate.arg("emulate").args(args.selection());
    let checked = finish(&mut emulate, program);
    if matches!(checked, Err(Error::Usage(_))) {
        return checked;
    }
    let wanted = |name: &str| args.takes(name);
    let figures = known::figures(&files(kernels, tiers), wanted)?;
    let others = match other {
        Some(other) => known::figures(&files(other.kernels(&[])?, tiers), wanted)?,
        None => Vec::new(),
    };
    let against = other.map(|other| (other.commit.as_str(), others.as_slice()));
    print!("\n{}", known::table(&figures, against));
    println!("nothing was timed: {reason}");
    if let Some(json) = &args.json {
        std::fs::write(json, known::json(&figures)).map_err(Error::io("cannot write", json))?;
    }
    checked
}

pub fn finish(command: &mut Command, program: &Path) -> Result<(), Error> {
    let status = command.status().map_err(Error::io("cannot run", program))?;
    match status.code() {
        Some(0) => Ok(()),
        Some(2) => Err(Error::Usage("see above".into())),
        _ => Err(Error::failed(
            "the kernels are wrong, or the run failed: see above",
        )),
    }
}

impl Args {
    /// Whether a kernel is asked for, as far as its name tells.
    fn takes(&self, name: &str) -> bool {
        name.contains(self.kernel.as_deref().unwrap_or_default())
            && self
                .variant
                .as_deref()
                // A number stands in a table of the program.
                .is_none_or(|id| {
                    id.parse::<u32>().is_ok() || format!("{name}_").contains(&format!("_{id}_"))
                })
    }

    /// The arguments that choose kernels and shapes, as `edgellm-bench` takes them.
    fn selection(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        let group = self.group.map(|group| group.to_string());
        for (name, value) in [
            ("--shape", &self.shape),
            ("--model", &self.model),
            ("--variant", &self.variant),
            ("--group", &group),
        ] {
            if let Some(value) = value {
                arguments.extend([name.to_owned(), value.clone()]);
            }
        }
        if self.minima {
            arguments.push("--minima".to_owned());
        }
        arguments.extend(self.kernel.clone());
        arguments
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn choices_are_passed_on() {
        assert_eq!(parse_shape("7 x 32").ok(), Some((7, 32)));
        for wrong in ["8960", "0x32", "1x-1", "2000000x32"] {
            assert!(parse_shape(wrong).is_err(), "{wrong}");
        }
        let line = "bench int4 --shape 8960x1536 --variant multirow --tier 90 --watch";
        let args = Cli::parse_from(line.split(' ')).args;
        assert_eq!(
            args.selection().join(" "),
            "--shape 8960x1536 --variant multirow int4"
        );
        assert_eq!(args.tier, Some(NvvmArch::Compute90));
        assert!(args.watch);
        assert!(Cli::try_parse_from(["bench", "--tier", "sm_86"]).is_err());
        assert!(Cli::try_parse_from(["bench", "--model", "a", "--shape", "1x1"]).is_err());
    }

    #[test]
    fn a_saved_source_is_noticed_and_other_files_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("src");
        std::fs::create_dir(&inner).unwrap();
        assert_eq!(newest(folder.path()), None);
        std::fs::write(inner.join(".kernel.rs.swp"), "").unwrap();
        assert_eq!(newest(folder.path()), None);
        std::fs::write(inner.join("kernel.rs"), "").unwrap();
        assert!(newest(folder.path()).is_some());
    }
}
