//! What can be known of a kernel without running it: resources and machine code, for every GPU
//! generation that loads it.

use std::path::PathBuf;

use cuda_builder::NvvmArch;
use cuda_builder::ptxas::KernelFigures;
use cuda_builder::setup::{Progress, install_nvdisasm, install_ptxas};
use serde_json::{Value, json};

use super::sass::{self, Mix};
use crate::Error;
use crate::progress::Shown;

/// One kernel on one GPU generation.
#[derive(Debug, PartialEq)]
pub struct Figures {
    /// The generation.
    pub arch: NvvmArch,
    /// What ptxas says.
    pub resources: KernelFigures,
    /// All of the code.
    pub whole: Mix,
    /// Its main loop.
    pub main_loop: Option<Mix>,
}

/// Assembles each PTX for the generations that load it, and reads the code of the wanted kernels.
pub fn figures(
    tiers: &[(NvvmArch, PathBuf)],
    wanted: impl Fn(&str) -> bool,
) -> Result<Vec<Figures>, Error> {
    let progress = Shown::new();
    let ptxas = install_ptxas(&progress)?;
    let nvdisasm = install_nvdisasm(&progress)?;
    let mut figures = Vec::new();
    for (tier, ptx) in tiers {
        for arch in NvvmArch::ALL.into_iter().filter(|a| a.tier() == *tier) {
            progress.step(&format!("assembling for {arch}"));
            let (cubin, resources) = ptxas.assemble(ptx, arch)?;
            let kernels = sass::parse(&nvdisasm.sass(&cubin)?);
            for resources in resources.into_iter().filter(|f| wanted(&f.kernel)) {
                let code = kernels
                    .iter()
                    .find(|kernel| kernel.name == resources.kernel)
                    .ok_or_else(|| {
                        Error::failed(format!("{} has no code for {arch}", resources.kernel))
                    })?;
                figures.push(Figures {
                    arch,
                    resources,
                    whole: code.mix(),
                    main_loop: code.main_loop(),
                });
            }
        }
    }
    figures.sort_by(|a, b| (&a.resources.kernel, a.arch).cmp(&(&b.resources.kernel, b.arch)));
    Ok(figures)
}

/// Weights in a byte that a kernel streams, by its name; `None` where it has no weights.
fn weights_a_byte(kernel: &str) -> Option<usize> {
    if kernel.contains("_int4") {
        Some(2)
    } else if kernel.contains("_int8") {
        Some(1)
    } else {
        None
    }
}

impl Figures {
    /// Global bytes and instructions that the main loop spends on a weight.
    fn a_weight(&self) -> Option<(f64, f64)> {
        let mix = self.main_loop.as_ref()?;
        let weights = mix.weight_bytes * weights_a_byte(&self.resources.kernel)?;
        let a_weight = |count: usize| count as f64 / weights as f64;
        (weights > 0).then(|| (a_weight(mix.load_bytes), a_weight(mix.instructions)))
    }
}

/// A line a kernel and generation; below it, where they differ, that of another revision.
pub fn table(figures: &[Figures], against: Option<(&str, &[Figures])>) -> String {
    let at = against.map(|(revision, _)| format!("  at {revision}"));
    let at = at.unwrap_or_default();
    let names = figures.iter().map(|figures| figures.resources.kernel.len());
    let width = names.chain(["kernel".len(), at.len()]).max().unwrap_or(0);
    let mut text = format!(
        "{:width$}  {:<6} {:>4} {:>6} {:>5} {:>5} {:>6} | {:>5} {:>5} {:>8} {:>8}  in the main loop\n",
        "kernel",
        "gpu",
        "regs",
        "shared",
        "stack",
        "spill",
        "instrs",
        "loop",
        "bytes",
        "B/weight",
        "i/weight"
    );
    let mut same = 0;
    for figures in figures {
        text.push_str(&line(figures, &figures.resources.kernel, width));
        let Some((_, others)) = against else {
            continue;
        };
        let other = others.iter().find(|other| {
            (other.arch, &other.resources.kernel) == (figures.arch, &figures.resources.kernel)
        });
        match other {
            Some(other) if other == figures => same += 1,
            Some(other) => text.push_str(&line(other, &at, width)),
            None => text.push_str(&format!("{at} there is none\n")),
        }
    }
    if let Some((revision, _)) = against {
        text.push_str(&format!(
            "{same} of {} are as at {revision}\n",
            figures.len()
        ));
    }
    text.push_str(
        "loop, bytes: instructions and global bytes of one thread and pass of the loop that loads most weights; \
         weights: 16-byte loads that leave the L1 alone\n",
    );
    text
}

fn line(figures: &Figures, name: &str, width: usize) -> String {
    let resources = &figures.resources;
    let (count, bytes, shares) = match &figures.main_loop {
        Some(mix) => (
            mix.instructions.to_string(),
            mix.load_bytes.to_string(),
            mix.shares(),
        ),
        None => ("-".into(), "-".into(), "no loop loads".into()),
    };
    let (bytes_a_weight, instructions_a_weight) = match figures.a_weight() {
        Some((bytes, instructions)) => (format!("{bytes:.3}"), format!("{instructions:.2}")),
        None => ("-".into(), "-".into()),
    };
    format!(
        "{name:width$}  {:<6} {:>4} {:>6} {:>5} {:>5} {:>6} | {count:>5} {bytes:>5} \
         {bytes_a_weight:>8} {instructions_a_weight:>8}  {shares}\n",
        figures.arch.to_string(),
        resources.registers,
        resources.shared_bytes,
        resources.stack_bytes,
        resources.spill_store_bytes + resources.spill_load_bytes,
        figures.whole.instructions,
    )
}

/// The same as a JSON array.
pub fn json(figures: &[Figures]) -> String {
    let rows: Vec<Value> = figures
        .iter()
        .map(|figures| {
            let resources = &figures.resources;
            let mix = |mix: &Mix| {
                let kinds: serde_json::Map<String, Value> = mix
                    .kinds
                    .iter()
                    .map(|(kind, count)| ((*kind).to_owned(), json!(count)))
                    .collect();
                json!({
                    "instructions": mix.instructions,
                    "load_bytes": mix.load_bytes,
                    "kinds": kinds,
                })
            };
            json!({
                "kernel": resources.kernel,
                "gpu": figures.arch.to_string(),
                "registers": resources.registers,
                "shared_bytes": resources.shared_bytes,
                "stack_bytes": resources.stack_bytes,
                "spill_bytes": resources.spill_store_bytes + resources.spill_load_bytes,
                "code": mix(&figures.whole),
                "main_loop": figures.main_loop.as_ref().map(mix),
                "bytes_a_weight": figures.a_weight().map(|(bytes, _)| bytes),
                "instructions_a_weight": figures.a_weight().map(|(_, count)| count),
            })
        })
        .collect();
    format!("{:#}\n", Value::Array(rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(name: &str) -> Figures {
        Figures {
            arch: NvvmArch::Compute90,
            resources: KernelFigures {
                kernel: name.into(),
                registers: 40,
                ..KernelFigures::default()
            },
            whole: Mix::default(),
            main_loop: Some(Mix {
                instructions: 96,
                kinds: vec![("integer", 90), ("global load", 6)],
                load_bytes: 36,
                weight_bytes: 32,
            }),
        }
    }

    #[test]
    fn weights_are_counted_by_format() {
        // 32 bytes are 64 weights of 4 bits, or 32 of 8.
        assert_eq!(kernel("linear_gemv_int4_x").a_weight(), Some((0.5625, 1.5)));
        assert_eq!(kernel("logits_int8").a_weight(), Some((1.125, 3.0)));
        assert_eq!(kernel("rmsnorm_f32").a_weight(), None);
    }

    #[test]
    fn tables_and_json_have_every_kernel() {
        let figures = [kernel("logits_int8"), kernel("rmsnorm_f32")];
        let table = table(&figures, None);
        assert!(table.contains("integer 94%, global load 6%"), "{table}");
        let rows: Value = serde_json::from_str(&json(&figures)).unwrap();
        assert_eq!(rows[0]["instructions_a_weight"], 3.0);
        assert_eq!(rows[1]["bytes_a_weight"], Value::Null);
        assert_eq!(rows[1]["main_loop"]["kinds"]["integer"], 90);
    }

    #[test]
    fn another_revision_is_shown_where_it_differs() {
        let figures = [kernel("logits_int8"), kernel("rmsnorm_f32"), kernel("new")];
        let mut others = [kernel("logits_int8"), kernel("rmsnorm_f32")];
        others[1].resources.registers = 41;
        let table = table(&figures, Some(("20e476e", &others)));
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[1].starts_with("logits_int8") && lines[2].starts_with("rmsnorm_f32"));
        assert!(
            lines[3].starts_with("  at 20e476e") && lines[3].contains(" 41 "),
            "{table}"
        );
        assert!(lines[5].contains("there is none"), "{table}");
        assert!(table.contains("1 of 3 are as at 20e476e"), "{table}");
    }
}
