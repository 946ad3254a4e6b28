//! The GPU generations that kernels are compiled for.

use std::fmt;

/// A compute capability, the unit in which PTX is specialised.
///
/// PTX of a lower capability also runs on a newer GPU: the driver compiles it for the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum NvvmArch {
    /// Turing: T4, RTX 20.
    Compute75,
    /// Ampere: A100.
    Compute80,
    /// Ampere: A10, RTX 30.
    Compute86,
    /// Ampere: Orin.
    Compute87,
    /// Ada: L4, RTX 40.
    Compute89,
    /// Hopper: H100, H200.
    Compute90,
    /// Hopper alone, with what no later GPU has: `wgmma`.
    Compute90a,
    /// Blackwell: B200.
    Compute100,
    /// Blackwell: RTX 50.
    Compute120,
}

/// The tiers that the engine embeds. A device loads the highest one that it supports.
pub const TIERS: [NvvmArch; 4] = [
    NvvmArch::Compute75,
    NvvmArch::Compute80,
    NvvmArch::Compute90,
    NvvmArch::Compute90a,
];

impl NvvmArch {
    /// Every capability known here, lowest first.
    pub const ALL: [NvvmArch; 9] = [
        NvvmArch::Compute75,
        NvvmArch::Compute80,
        NvvmArch::Compute86,
        NvvmArch::Compute87,
        NvvmArch::Compute89,
        NvvmArch::Compute90,
        NvvmArch::Compute90a,
        NvvmArch::Compute100,
        NvvmArch::Compute120,
    ];

    /// Compute capability times ten: 75, 80, 90.
    pub const fn capability(self) -> u32 {
        match self {
            NvvmArch::Compute75 => 75,
            NvvmArch::Compute80 => 80,
            NvvmArch::Compute86 => 86,
            NvvmArch::Compute87 => 87,
            NvvmArch::Compute89 => 89,
            NvvmArch::Compute90 | NvvmArch::Compute90a => 90,
            NvvmArch::Compute100 => 100,
            NvvmArch::Compute120 => 120,
        }
    }

    /// PTX version times ten.
    ///
    /// The lowest that has what the kernels use, so that old drivers load it: 7.4 (CUDA 11.4) brings
    /// the cache hints of `ld.global.nc`, 7.8 (CUDA 11.8) is the first that knows sm_89 and sm_90,
    /// 8.0 (CUDA 12.0) brings `wgmma`,
    /// 8.6 (CUDA 12.7) and 8.7 (CUDA 12.8) are those of sm_100 and sm_120.
    pub const fn ptx_version(self) -> u32 {
        match self {
            NvvmArch::Compute75
            | NvvmArch::Compute80
            | NvvmArch::Compute86
            | NvvmArch::Compute87 => 74,
            NvvmArch::Compute89 | NvvmArch::Compute90 => 78,
            NvvmArch::Compute90a => 80,
            NvvmArch::Compute100 => 86,
            NvvmArch::Compute120 => 87,
        }
    }

    /// Whether PTX for it runs on devices of its own capability alone.
    pub const fn is_alone(self) -> bool {
        matches!(self, NvvmArch::Compute90a)
    }

    /// The tier that is loaded for code of this generation: the highest that runs on it. A device of
    /// capability 9.0 is [`Compute90a`](NvvmArch::Compute90a).
    pub fn tier(self) -> NvvmArch {
        let runs = |tier: &NvvmArch| *tier == self || *tier < self && !tier.is_alone();
        let loadable = TIERS.into_iter().filter(runs);
        loadable.max().unwrap_or(TIERS[0])
    }

    /// The name with or without `sm_`: `sm_75` or `75`.
    pub fn parse(text: &str) -> Option<NvvmArch> {
        let digits = text.strip_prefix("sm_").unwrap_or(text);
        NvvmArch::ALL
            .into_iter()
            .find(|arch| arch.to_string()["sm_".len()..] == *digits)
    }
}

impl fmt::Display for NvvmArch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = if self.is_alone() { "a" } else { "" };
        write!(formatter, "sm_{}{letter}", self.capability())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for arch in NvvmArch::ALL {
            assert_eq!(NvvmArch::parse(&arch.to_string()), Some(arch));
        }
        assert_eq!(NvvmArch::parse("90"), Some(NvvmArch::Compute90));
        assert_eq!(NvvmArch::parse("sm_61"), None);
    }

    #[test]
    fn devices_load_the_highest_tier_below() {
        assert_eq!(NvvmArch::Compute75.tier(), NvvmArch::Compute75);
        assert_eq!(NvvmArch::Compute89.tier(), NvvmArch::Compute80);
        assert_eq!(NvvmArch::Compute90.tier(), NvvmArch::Compute90);
        assert_eq!(NvvmArch::Compute90a.tier(), NvvmArch::Compute90a);
        assert_eq!(NvvmArch::Compute120.tier(), NvvmArch::Compute90);
    }

    #[test]
    fn tiers_rise() {
        assert!(NvvmArch::ALL.is_sorted_by(|low, high| low < high));
        assert!(TIERS.is_sorted_by(|low, high| low < high));
    }
}
