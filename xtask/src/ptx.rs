//! `cargo xtask ptx`: the kernels as every tier sees them.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use clap::Args as ClapArgs;
use cuda_builder::ptxas::{KernelFigures, Ptxas};
use cuda_builder::setup::{Progress, install_core, install_nvdisasm, install_ptxas};
use cuda_builder::{BuildOutput, CudaBuilder, NvvmArch, TIERS, entries, entry_text};

use crate::bench::sass;
use crate::progress::Shown;
use crate::{Error, workspace};

mod limits;
mod show;

/// Builds the kernels of every tier and shows what `ptxas` makes of them: registers, shared memory,
/// stack, spills. Fails if a kernel keeps values in local memory on any GPU generation, or takes
/// more registers than gpu-kernels/limits.toml allows.
#[derive(Debug, ClapArgs)]
#[command(
    after_help = "Examples:\n  cargo xtask ptx\n  cargo xtask ptx --show rmsnorm_f32 --tier sm_75\n  \
    cargo xtask ptx --show linear_gemv_int4_multirow --sass --tier sm_86"
)]
pub struct Args {
    /// Print the code of this kernel instead, with the Rust lines that it comes from.
    #[arg(long, value_name = "KERNEL")]
    show: Option<String>,
    /// The machine code (SASS) rather than the PTX.
    #[arg(long, requires = "show")]
    sass: bool,
    /// The tier to print, with --sass any GPU generation [default: the highest tier].
    #[arg(long, value_name = "SM", value_parser = parse_arch, requires = "show")]
    tier: Option<NvvmArch>,
}

/// A tier that the engine embeds, as `sm_75` or `75`.
pub fn parse_tier(text: &str) -> Result<NvvmArch, String> {
    NvvmArch::parse(text)
        .filter(|arch| TIERS.contains(arch))
        .ok_or_else(|| {
            let tiers = TIERS.map(|arch| arch.to_string());
            format!("tiers are {}", tiers.join(", "))
        })
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
        let text = show(kernel, arch, args.sass, &progress)?;
        drop(progress);
        print!("{text}");
        return Ok(());
    }
    let ptxas = install_ptxas(&progress)?;
    let generations = figures(&ptxas, &progress)?;
    drop(progress);
    let tiers = generations
        .iter()
        .filter(|(arch, _)| TIERS.contains(arch))
        .cloned()
        .collect();
    print!("{}", table(&tiers));
    judge(&generations)
}

/// The code of a kernel with its Rust lines.
fn show(
    kernel: &str,
    arch: NvvmArch,
    machine_code: bool,
    progress: &dyn Progress,
) -> Result<String, Error> {
    // Machine code is made from the PTX that a device of that generation loads.
    let output = build_with_lines(if machine_code { arch.tier() } else { arch }, progress)?;
    let ptx = read(&output.ptx)?;
    let text = entry_text(&ptx, kernel).ok_or_else(|| {
        Error::Usage(format!(
            "no kernel `{kernel}`; there are {}",
            entries(&ptx).join(", ")
        ))
    })?;
    let mut sources = show::Sources::new(&workspace::root());
    if !machine_code {
        return Ok(show::ptx(text, &ptx, &mut sources));
    }
    let ptxas = install_ptxas(progress)?;
    let nvdisasm = install_nvdisasm(progress)?;
    let (cubin, _) = ptxas.assemble(&output.ptx, arch)?;
    let code = nvdisasm.sass(&cubin)?;
    let code = sass::text(&code, kernel)
        .ok_or_else(|| Error::failed(format!("{kernel} has no code for {arch}")))?;
    Ok(show::sass(code, &mut sources))
}

/// Figures of every kernel, for each GPU generation.
pub type TierFigures = Vec<(NvvmArch, Vec<KernelFigures>)>;

/// Builds every tier and asks `ptxas` what each GPU generation makes of the tier that it loads.
pub fn figures(ptxas: &Ptxas, progress: &dyn Progress) -> Result<TierFigures, Error> {
    let outputs = build_tiers(progress)?;
    let mut figures = Vec::new();
    for arch in NvvmArch::ALL {
        for output in outputs.iter().filter(|output| output.arch == arch.tier()) {
            progress.step(&format!("ptxas {arch}"));
            figures.push((arch, ptxas.figures(&output.ptx, arch)?));
        }
    }
    Ok(figures)
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

/// As [`build`], with line directives; apart from it, so that neither undoes the other's work.
fn build_with_lines(arch: NvvmArch, progress: &dyn Progress) -> Result<BuildOutput, Error> {
    progress.step(&format!("compiling the GPU kernels for {arch}, with lines"));
    let output = CudaBuilder::new(workspace::root().join("gpu-kernels"))
        .arch(arch)
        .line_directives(true)
        .target_dir(workspace::target_dir()?.join("cuda-lines"))
        .build()?;
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

/// Fails when a kernel uses local memory, takes more registers than it may, or is missing where the lowest
/// tier has it.
pub fn judge(tiers: &TierFigures) -> Result<(), Error> {
    let limits = limits::Limits::read(&workspace::root().join("gpu-kernels/limits.toml"))?;
    verdict(tiers, limits.faults(tiers))
}

/// The faults of [`judge`] besides those of the register ceilings, which are given.
fn verdict(tiers: &TierFigures, mut faults: Vec<String>) -> Result<(), Error> {
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
        let here = names(kernels);
        let missing = names(&tiers[0].1)
            .into_iter()
            .find(|name| !here.contains(name));
        if let Some(name) = missing {
            faults.push(format!("{arch} lacks {name}, which {} has", tiers[0].0));
        }
        for figures in kernels.iter().filter(|figures| figures.serialized) {
            faults.push(format!(
                "{} for {arch} waits after every wgmma: something touches sums or weights between them",
                figures.kernel
            ));
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
        "{}\n(unroll loops over register arrays fully, give each thread less work, or, where more registers pay, \
         raise the ceiling in gpu-kernels/limits.toml)",
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
        verdict(&tiers, Vec::new()).unwrap();
        assert!(verdict(&tiers, vec!["too many registers".into()]).is_err());
    }

    #[test]
    fn spills_and_missing_kernels_are_faults() {
        let spilled = vec![(NvvmArch::Compute75, vec![kernel("a", 8)])];
        assert!(
            verdict(&spilled, Vec::new())
                .unwrap_err()
                .to_string()
                .contains("a for sm_75")
        );
        let missing = vec![
            (NvvmArch::Compute75, vec![kernel("a", 0)]),
            (NvvmArch::Compute90, vec![kernel("b", 0)]),
        ];
        assert!(verdict(&missing, Vec::new()).is_err());
        assert!(table(&missing).contains("absent"), "{}", table(&missing));
        assert!(verdict(&vec![(NvvmArch::Compute75, Vec::new())], Vec::new()).is_err());
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
        assert_eq!(parse_tier("75"), Ok(NvvmArch::Compute75));
        assert!(parse_tier("sm_86").unwrap_err().contains("sm_80"));
    }
}
