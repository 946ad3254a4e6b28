//! `cargo xtask tune`: the fastest launch of each kernel, by GPU and shape; on the CPU the fastest form of ternary
//! weights.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args as ClapArgs;
use cuda_builder::{NvvmArch, TIERS};

use crate::{Error, bench, ptx, setup, workspace};

/// Times kernels in every launch worth a try on this machine's GPU, and writes the fastest into the
/// table that the engine reads when it loads a model, gpu-kernels/tuned.toml.
///
/// The products of a model's layers are tuned where they run, in whole tokens of random weights; bare
/// matrices and attention by themselves. Where the table has no row, the kernel's own rule decides; `edgellm bench --trace` shows which launch runs and why.
/// A row is of one version of its kernel: after a change it is passed over until this runs again.
#[derive(Debug, ClapArgs)]
#[command(
    after_help = "Examples:\n  cargo xtask tune                              (the seven matrices of the targets, all models)\n  \
    cargo xtask tune --model qwen2.5-1.5b --group 32\n  cargo xtask tune int4 --shape 8960x1536\n\
  cargo xtask tune --cpu                        (forms of ternary weights; EDGELLM_CPU_TERNARY forces one)\n\
    On a machine without Rust: `cargo xtask gpu`, there `./run.sh tune --table out/tuned.toml`, and that file back"
)]
pub struct Args {
    /// Only kernels whose name contains this.
    kernel: Option<String>,
    /// Only a bare matrix of this shape, as in 8960x1536.
    #[arg(long, value_name = "NxK", conflicts_with = "model")]
    shape: Option<String>,
    /// Only the products and the attention of this model, as in qwen2.5-1.5b.
    #[arg(long)]
    model: Option<String>,
    /// Weights that share a scale: 32, 64, 128 [default: 128].
    #[arg(long, value_name = "G")]
    group: Option<u32>,
    /// Weights with a scale and a minimum.
    #[arg(long)]
    minima: bool,
    /// The kernels of this tier [default: the highest that the GPU runs].
    #[arg(long, value_name = "SM", value_parser = ptx::parse_tier)]
    tier: Option<NvvmArch>,
    /// The table [default: gpu-kernels/tuned.toml, with --cpu cpu-kernels/tuned.toml].
    #[arg(long, value_name = "FILE")]
    table: Option<PathBuf>,
    /// The CPU instead: which form of ternary weights is fastest for one token, by instruction set, shape and
    /// number of threads.
    #[arg(long, conflicts_with_all = ["kernel", "model", "group", "minima", "tier"])]
    cpu: bool,
    /// With --cpu: only this instruction set, as in avx2 [default: all that this CPU has].
    #[arg(long, value_name = "NAME", requires = "cpu")]
    isa: Option<String>,
}

/// Runs the task.
pub fn run(args: &Args) -> Result<(), Error> {
    if args.cpu {
        return args.on_cpu();
    }
    setup::core()?;
    let tiers = args.tier.map_or(TIERS.to_vec(), |tier| vec![tier]);
    let (program, kernels) = bench::build(&tiers)?;
    if let Err(reason) = bench::gpu(&program, false)? {
        return Err(Error::failed(format!(
            "there is no GPU to tune on: {reason} (`cargo xtask gpu` packs what one elsewhere needs)"
        )));
    }
    let mut command = Command::new(&program);
    command.arg("--ptx").arg(kernels).args(args.arguments());
    bench::finish(command.current_dir(workspace::root()), &program)
}

impl Args {
    /// The table, from the root of the workspace.
    fn table(&self, default: &str) -> String {
        let table = self.table.as_deref().unwrap_or(Path::new(default));
        table.display().to_string()
    }

    fn on_cpu(&self) -> Result<(), Error> {
        // Cargo starts a benchmark in the folder of its package.
        let table = workspace::root().join(self.table("cpu-kernels/tuned.toml"));
        let table = table.display().to_string();
        let mut arguments = vec!["bench", "--package", "cpu-kernels", "--bench", "tune", "--"];
        arguments.extend(["--table", &table]);
        for (name, value) in [("--isa", &self.isa), ("--shape", &self.shape)] {
            if let Some(value) = value {
                arguments.extend([name, value]);
            }
        }
        workspace::run_cargo(&arguments)
    }

    /// The command of `edgellm-bench`.
    fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["tune".to_owned()];
        arguments.extend(self.kernel.clone());
        for (name, value) in [
            ("--shape", self.shape.clone()),
            ("--model", self.model.clone()),
            ("--group", self.group.map(|group| group.to_string())),
            ("--tier", self.tier.map(|tier| tier.to_string())),
            ("--table", Some(self.table("gpu-kernels/tuned.toml"))),
        ] {
            if let Some(value) = value {
                arguments.extend([name.to_owned(), value]);
            }
        }
        if self.minima {
            arguments.push("--minima".to_owned());
        }
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
        let line = "tune int4 --model qwen2.5-1.5b --group 32 --minima --tier 90 --table t.toml";
        let args = Cli::parse_from(line.split(' ')).args;
        assert_eq!(
            args.arguments().join(" "),
            "tune int4 --model qwen2.5-1.5b --group 32 --tier sm_90 --table t.toml --minima"
        );
    }
}
