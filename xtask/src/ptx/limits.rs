//! Register ceilings of the kernels, from `gpu-kernels/limits.toml`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use cuda_builder::NvvmArch;
use toml::{Table, Value};

use super::TierFigures;
use crate::Error;

/// Registers a thread at most.
#[derive(Debug, PartialEq)]
pub struct Limits {
    /// Of a kernel that is not listed.
    default: u32,
    /// By kernel, then tier.
    kernels: BTreeMap<String, BTreeMap<NvvmArch, u32>>,
}

impl Limits {
    /// Reads the file.
    ///
    /// # Errors
    /// It cannot be read, or says something else than ceilings.
    pub fn read(path: &Path) -> Result<Limits, Error> {
        let text = fs::read_to_string(path).map_err(Error::io("cannot read", path))?;
        Limits::parse(&text)
            .map_err(|reason| Error::failed(format!("{}: {reason}", path.display())))
    }

    fn parse(text: &str) -> Result<Limits, String> {
        let table: Table = text.parse().map_err(|error| format!("{error}"))?;
        let ceiling = |value: &Value| match value.as_integer() {
            Some(registers @ 1..=255) => Ok(registers as u32),
            _ => Err(format!("{value} is no number of registers, 1 to 255")),
        };
        let default = ceiling(table.get("default").ok_or("`default` is missing")?)?;
        let mut kernels = BTreeMap::new();
        for (name, value) in &table {
            if name == "default" {
                continue;
            }
            let tiers = value
                .as_table()
                .ok_or_else(|| format!("`{name}` is no table of tiers"))?;
            let mut ceilings = BTreeMap::new();
            for (tier, value) in tiers {
                let tier = NvvmArch::parse(tier).ok_or_else(|| {
                    format!("`{name}` has a ceiling for `{tier}`, which is no tier")
                })?;
                ceilings.insert(tier, ceiling(value)?);
            }
            kernels.insert(name.clone(), ceilings);
        }
        Ok(Limits { default, kernels })
    }

    /// The kernels that take more than they may, and the listed ones that are nowhere. A device
    /// that has no ceiling of its own has that of the tier that it loads, and sm_90a that of sm_90.
    pub fn faults(&self, tiers: &TierFigures) -> Vec<String> {
        let mut faults = Vec::new();
        for (arch, kernels) in tiers {
            for figures in kernels {
                let listed = self.kernels.get(&figures.kernel);
                let ceiling = listed
                    .and_then(|ceilings| {
                        let tiers = [*arch, arch.tier(), without_letter(*arch)];
                        tiers.into_iter().find_map(|tier| ceilings.get(&tier))
                    })
                    .copied()
                    .unwrap_or(self.default);
                if figures.registers > ceiling {
                    faults.push(format!(
                        "{} for {arch} takes {} registers, limits.toml allows {ceiling}",
                        figures.kernel, figures.registers
                    ));
                }
            }
        }
        for name in self.kernels.keys() {
            let known = |(_, kernels): &(NvvmArch, Vec<_>)| {
                kernels
                    .iter()
                    .any(|figures: &cuda_builder::ptxas::KernelFigures| figures.kernel == *name)
            };
            if !tiers.iter().any(known) {
                faults.push(format!("limits.toml names `{name}`, which is no kernel"));
            }
        }
        faults
    }
}

/// `sm_90` for `sm_90a`.
fn without_letter(arch: NvvmArch) -> NvvmArch {
    let same = |other: &NvvmArch| other.capability() == arch.capability() && !other.is_alone();
    NvvmArch::ALL.into_iter().find(same).unwrap_or(arch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cuda_builder::ptxas::KernelFigures;

    const TEXT: &str = "default = 40\n[gemv]\nsm_75 = 64\nsm_80 = 56\n";

    fn taking(registers: u32) -> Vec<KernelFigures> {
        vec![KernelFigures {
            kernel: "gemv".into(),
            registers,
            ..KernelFigures::default()
        }]
    }

    #[test]
    fn ceilings_are_of_the_kernel_its_tier_or_all() {
        let limits = Limits::parse(TEXT).unwrap();
        let faults = |arch, registers| limits.faults(&vec![(arch, taking(registers))]).len();
        assert_eq!(faults(NvvmArch::Compute75, 64), 0);
        assert_eq!(faults(NvvmArch::Compute75, 65), 1);
        assert_eq!(faults(NvvmArch::Compute89, 57), 1, "loads sm_80");
        assert_eq!(faults(NvvmArch::Compute90, 41), 1, "the default");
        assert_eq!(faults(NvvmArch::Compute90, 40), 0);
        let limits = Limits::parse("default = 40\n[gemv]\nsm_90 = 64\n").unwrap();
        let alone = vec![(NvvmArch::Compute90a, taking(64))];
        assert!(limits.faults(&alone).is_empty(), "as sm_90");
    }

    #[test]
    fn a_stale_name_is_a_fault() {
        let limits = Limits::parse("default = 40\n[gone]\nsm_75 = 64\n").unwrap();
        let faults = limits.faults(&vec![(NvvmArch::Compute75, taking(1))]);
        assert_eq!(faults, ["limits.toml names `gone`, which is no kernel"]);
    }

    #[test]
    fn other_contents_are_refused() {
        for text in [
            "",
            "default = 0",
            "default = 256",
            "default = 40\ngemv = 3",
            "default = 40\n[gemv]\nsm_61 = 3",
            "default = 40\n[gemv]\nsm_75 = \"many\"",
            "default",
        ] {
            assert!(Limits::parse(text).is_err(), "{text}");
        }
    }
}
