//! The tiers of GPU kernels: which devices run which PTX.

use std::fmt;
use std::str::FromStr;

/// Kernels compiled for one compute capability. Higher tiers come later in the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tier {
    /// Times ten: 75, 80, 90.
    capability: u32,
    /// Whether only devices of this very capability run it: those of `sm_90a` do not run on what follows.
    alone: bool,
}

impl Tier {
    /// Turing and newer.
    pub const SM_75: Tier = Tier::new(75, false);
    /// Ampere and newer.
    pub const SM_80: Tier = Tier::new(80, false);
    /// Hopper and newer.
    pub const SM_90: Tier = Tier::new(90, false);
    /// Hopper alone, with what only it has: `wgmma`.
    pub const SM_90A: Tier = Tier::new(90, true);
    /// Every tier that there can be kernels for, lowest first.
    pub const ALL: [Tier; 4] = [Tier::SM_75, Tier::SM_80, Tier::SM_90, Tier::SM_90A];

    /// The tier of a capability, or of its devices alone.
    pub const fn new(capability: u32, alone: bool) -> Tier {
        Tier { capability, alone }
    }

    /// Compute capability times ten.
    pub const fn capability(self) -> u32 {
        self.capability
    }

    /// Whether it has kernels with `wgmma`.
    pub const fn has_warpgroup_products(self) -> bool {
        self.alone
    }

    /// Whether a device of this capability, times ten, runs it.
    pub const fn runs_on(self, capability: u32) -> bool {
        self.capability == capability || self.capability < capability && !self.alone
    }
}

/// `sm_90a`
impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = if self.alone { "a" } else { "" };
        write!(f, "sm_{}{letter}", self.capability)
    }
}

/// With and without `sm_`.
impl FromStr for Tier {
    type Err = String;

    fn from_str(text: &str) -> Result<Tier, String> {
        let name = format!("sm_{}", text.strip_prefix("sm_").unwrap_or(text));
        let known = Tier::ALL.into_iter().find(|tier| tier.to_string() == name);
        known.ok_or_else(|| {
            let tiers = Tier::ALL.map(|tier| tier.to_string());
            format!("tiers are {}", tiers.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for tier in Tier::ALL {
            assert_eq!(tier.to_string().parse(), Ok(tier));
        }
        assert_eq!("90a".parse(), Ok(Tier::SM_90A));
        assert!("sm_86".parse::<Tier>().unwrap_err().contains("sm_90a"));
    }

    #[test]
    fn a_tier_alone_runs_on_its_own_devices() {
        assert!(Tier::SM_90A.runs_on(90));
        assert!(!Tier::SM_90A.runs_on(120));
        assert!(Tier::SM_90.runs_on(120));
        assert!(!Tier::SM_90.runs_on(89));
        assert!(Tier::SM_90 < Tier::SM_90A);
    }
}
