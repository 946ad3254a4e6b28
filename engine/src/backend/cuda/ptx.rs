//! The kernels as PTX, one text a tier, as the build script made them.

include!(concat!(env!("OUT_DIR"), "/ptx_tiers.rs"));
