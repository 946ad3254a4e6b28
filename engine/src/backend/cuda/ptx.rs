//! The kernels as PTX, one text a tier, as the build script made them.

#[cfg(feature = "ptx")]
include!(concat!(env!("OUT_DIR"), "/ptx_tiers.rs"));

/// A program without kernels of its own.
#[cfg(not(feature = "ptx"))]
pub static TIERS: &[(u32, &str)] = &[];

#[cfg(all(test, feature = "ptx"))]
mod tests {
    use super::TIERS;

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
            [75, 80, 90]
        );
        for (tier, ptx) in TIERS {
            assert!(ptx.contains(&format!(".target sm_{tier}")), "sm_{tier}");
            for entry in gpu_kernels::ENTRIES {
                let found = parameters(ptx, entry.name);
                assert_eq!(found, Some(entry.arity), "{} in sm_{tier}", entry.name);
            }
        }
    }
}
