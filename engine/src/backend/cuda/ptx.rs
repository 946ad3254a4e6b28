//! The kernels as PTX, one text a tier, as the build script made them.

use crate::backend::Tier;

#[cfg(feature = "ptx")]
include!(concat!(env!("OUT_DIR"), "/ptx_tiers.rs"));

/// A program without kernels of its own.
#[cfg(not(feature = "ptx"))]
pub static TIERS: &[(Tier, &str)] = &[];

#[cfg(all(test, feature = "ptx"))]
mod tests {
    use super::{TIERS, Tier};
    use gpu_kernels::linear::gemm_int4;

    /// Parameters of the kernel `name` in `ptx`, or `None` if it is not there.
    fn parameters(ptx: &str, name: &str) -> Option<usize> {
        let (_, after) = ptx.split_once(&format!(".entry {name}("))?;
        let (list, _) = after.split_once(')')?;
        Some(list.matches(".param").count())
    }

    #[test]
    fn every_tier_has_every_kernel_with_the_parameters_that_calls_pass() {
        assert_eq!(
            TIERS.iter().map(|(tier, _)| *tier).collect::<Vec<_>>(),
            Tier::ALL
        );
        for (tier, ptx) in TIERS {
            assert!(ptx.contains(&format!(".target {tier}\n")), "{tier}");
            for entry in gpu_kernels::ENTRIES {
                let found = parameters(ptx, entry.name);
                // Kernels by warpgroups are those of a tier with `wgmma`.
                let there = tier.has_warpgroup_products()
                    || !gemm_int4::needs_warpgroup_products(entry.name);
                let wanted = there.then_some(entry.arity);
                assert_eq!(found, wanted, "{} in {tier}", entry.name);
            }
        }
    }
}
