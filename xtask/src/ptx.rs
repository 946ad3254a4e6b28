//! `cargo xtask ptx`: the kernels as every tier sees them.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use clap::Args as ClapArgs;
use cuda_builder::ptxas::{KernelFigures, Ptxas};
use cuda_builder::setup::{Progress, install_core, install_ptxas};
use cuda_builder::{BuildOutput, CudaBuilder, NvvmArch, TIERS, entries, entry_text};

use crate::progress::Shown;
use crate::{Error, workspace};

/// Builds the kernels of every tier and shows what `ptxas` makes of them: registers, shared memory,
/// stack, spills. Fails if a kernel keeps values in local memory.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Print the PTX of this kernel instead.
    #[arg(long, value_name = "KERNEL")]
    show: Option<String>,
    /// The tier to print [default: the highest].
    #[arg(long, value_name = "SM", value_parser = parse_arch, requires = "show")]
    tier: Option<NvvmArch>,
}

fn parse_arch(text: &str) -> Result<NvvmArch, String> {
    NvvmArch::parse(text).ok_or_else(|| {
        let known: Vec<String> = NvvmArch::ALL.iter().map(NvvmArch::to_string).collect();
        format!("known are {}", known.join(", "))
    })
}

/// Runs the task.
pub fn run(args: &Args) -> Result<(), Error> {
    let progress = Shown::new();
    install_core(&progress, false)?;
    if let Some(kernel) = &args.show {
        let arch = args.tier.unwrap_or(TIERS[TIERS.len() - 1]);
        let output = build(arch, &progress)?;
        drop(progress);
        let ptx = read(&output.ptx)?;
        let text = entry_text(&ptx, kernel).ok_or_else(|| {
            Error::Usage(format!(
                "no kernel `{kernel}`; there are {}",
                entries(&ptx).join(", ")
            ))
        })?;
        print!("{text}");
        return Ok(());
    }
    let ptxas = install_ptxas(&progress)?;
    let tiers = figures(&ptxas, &progress)?;
    drop(progress);
    print!("{}", table(&tiers));
    judge(&tiers)
}

/// Figures of every kernel, for each tier.
pub type TierFigures = Vec<(NvvmArch, Vec<KernelFigures>)>;

/// Builds every tier and asks `ptxas`.
pub fn figures(ptxas: &Ptxas, progress: &dyn Progress) -> Result<TierFigures, Error> {
    let outputs = build_tiers(progress)?;
    let mut tiers = Vec::new();
    for output in outputs {
        progress.step(&format!("ptxas {}", output.arch));
        tiers.push((output.arch, ptxas.figures(&output.ptx, output.arch)?));
    }
    Ok(tiers)
}

/// Builds every tier.
pub fn build_tiers(progress: &dyn Progress) -> Result<Vec<BuildOutput>, Error> {
    TIERS
        .into_iter()
        .map(|arch| build(arch, progress))
        .collect()
}

fn build(arch: NvvmArch, progress: &dyn Progress) -> Result<BuildOutput, Error> {
    progress.step(&format!("compiling the GPU kernels for {arch}"));
    // The folder that the engine's build script uses too: what is compiled here is not compiled there.
    let output = CudaBuilder::new(workspace::root().join("gpu-kernels"))
        .arch(arch)
        .target_dir(workspace::target_dir()?.join("cuda"))
        .build()?;
    if !output.warnings.is_empty() {
        progress.note(output.warnings.trim_end());
    }
    Ok(output)
}

fn read(path: &PathBuf) -> Result<String, Error> {
    fs::read_to_string(path).map_err(Error::io("cannot read", path))
}

/// One line a kernel, one column group a tier.
fn table(tiers: &TierFigures) -> String {
    let mut rows: BTreeMap<&str, Vec<Option<&KernelFigures>>> = BTreeMap::new();
    for (column, (_, kernels)) in tiers.iter().enumerate() {
        for figures in kernels {
            rows.entry(&figures.kernel)
                .or_insert_with(|| vec![None; tiers.len()])[column] = Some(figures);
        }
    }
    let width = rows
        .keys()
        .map(|name| name.len())
        .max()
        .unwrap_or(0)
        .max("kernel".len());
    let mut text = format!("{:width$}", "kernel");
    for (arch, _) in tiers {
        text.push_str(&format!(" | {:^27}", arch.to_string()));
    }
    text.push_str(&format!("\n{:width$}", ""));
    for _ in tiers {
        text.push_str(" |  regs  shared  stack  spill");
    }
    text.push('\n');
    for (name, columns) in rows {
        text.push_str(&format!("{name:width$}"));
        for figures in columns {
            text.push_str(&match figures {
                Some(f) => format!(
                    " | {:>5} {:>7} {:>6} {:>6}",
                    f.registers,
                    f.shared_bytes,
                    f.stack_bytes,
                    f.spill_store_bytes + f.spill_load_bytes
                ),
                None => format!(" | {:>27}", "absent"),
            });
        }
        text.push('\n');
    }
    text
}

/// Fails when a kernel uses local memory, or is missing in a tier.
pub fn judge(tiers: &TierFigures) -> Result<(), Error> {
    let mut faults = Vec::new();
    let names = |kernels: &[KernelFigures]| -> Vec<String> {
        let mut names: Vec<String> = kernels
            .iter()
            .map(|figures| figures.kernel.clone())
            .collect();
        names.sort();
        names
    };
    for (arch, kernels) in tiers {
        if kernels.is_empty() {
            faults.push(format!("{arch} has no kernels"));
        }
        if names(kernels) != names(&tiers[0].1) {
            faults.push(format!("{arch} and {} hold different kernels", tiers[0].0));
        }
        for figures in kernels.iter().filter(|figures| figures.uses_local_memory()) {
            faults.push(format!(
                "{} for {arch} keeps values in local memory: {figures}",
                figures.kernel
            ));
        }
    }
    if faults.is_empty() {
        return Ok(());
    }
    Err(Error::failed(format!(
        "{}\n(unroll loops over register arrays fully, or give each thread less work)",
        faults.join("\n")
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(name: &str, spill_store_bytes: u32) -> KernelFigures {
        KernelFigures {
            kernel: name.into(),
            registers: 40,
            spill_store_bytes,
            ..KernelFigures::default()
        }
    }

    #[test]
    fn clean_kernels_pass() {
        let tiers = vec![
            (NvvmArch::Compute75, vec![kernel("a", 0), kernel("b", 0)]),
            (NvvmArch::Compute90, vec![kernel("b", 0), kernel("a", 0)]),
        ];
        judge(&tiers).unwrap();
    }

    #[test]
    fn spills_and_missing_kernels_are_faults() {
        let spilled = vec![(NvvmArch::Compute75, vec![kernel("a", 8)])];
        assert!(
            judge(&spilled)
                .unwrap_err()
                .to_string()
                .contains("a for sm_75")
        );
        let missing = vec![
            (NvvmArch::Compute75, vec![kernel("a", 0)]),
            (NvvmArch::Compute90, vec![kernel("b", 0)]),
        ];
        assert!(judge(&missing).is_err());
        assert!(table(&missing).contains("absent"), "{}", table(&missing));
        assert!(judge(&vec![(NvvmArch::Compute75, Vec::new())]).is_err());
    }

    #[test]
    fn columns_line_up() {
        let tiers = vec![(
            NvvmArch::Compute75,
            vec![kernel("linear_gemv", 0), kernel("b", 12)],
        )];
        let table = table(&tiers);
        let lengths: Vec<usize> = table.lines().map(str::len).collect();
        assert!(
            lengths.iter().all(|&length| length == lengths[0]),
            "{table}"
        );
    }

    #[test]
    fn tiers_are_parsed() {
        assert_eq!(parse_arch("sm_80"), Ok(NvvmArch::Compute80));
        assert!(parse_arch("sm_10").unwrap_err().contains("sm_75"));
    }
}
