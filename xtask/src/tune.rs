//! `cargo xtask tune`: the fastest launch of each kernel, by GPU and shape.

use std::path::PathBuf;
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
    /// The table.
    #[arg(long, value_name = "FILE", default_value = "gpu-kernels/tuned.toml")]
    table: PathBuf,
}

/// Runs the task.
pub fn run(args: &Args) -> Result<(), Error> {
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
    /// The command of `edgellm-bench`.
    fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["tune".to_owned()];
        arguments.extend(self.kernel.clone());
        for (name, value) in [
            ("--shape", self.shape.clone()),
            ("--model", self.model.clone()),
            ("--group", self.group.map(|group| group.to_string())),
            ("--tier", self.tier.map(|tier| tier.to_string())),
            ("--table", Some(self.table.display().to_string())),
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
