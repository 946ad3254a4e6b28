//! The launches of `linear_gemv_int4_mma` that are worth a try.

use super::plan::{Shape, Tiling, max_warps, rule};
use crate::launch::DeviceInfo;

/// Fewest and most warps a multiprocessor: fewer leave memory idle, more do not fit.
const WARPS: std::ops::RangeInclusive<u32> = 4..=32;
/// Most blocks a multiprocessor.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 4;

/// The rule's tiling, then every other: splits that divide the tiles along K differently, teams up
/// to what a block holds, blocks for one to four a multiprocessor.
pub fn candidates(device: &DeviceInfo, shape: &Shape) -> Vec<Tiling> {
    let depth = u32::try_from(shape.depth_tiles()).unwrap_or(u32::MAX);
    let row_tiles = u32::try_from(shape.row_tiles()).unwrap_or(u32::MAX);
    let most = max_warps(device, shape);
    let mut found = vec![rule(device, shape)];
    for split in 1..=most.min(depth) {
        // A split that leaves everybody as much to do as a smaller one is of no use.
        if split > 1 && depth.div_ceil(split) == depth.div_ceil(split - 1) {
            continue;
        }
        for teams in 1..=most / split {
            let all = row_tiles.div_ceil(teams);
            for per_multiprocessor in 1..=BLOCKS_PER_MULTIPROCESSOR {
                let places = device.multiprocessors * per_multiprocessor;
                let warps = split * teams * per_multiprocessor;
                // Blocks without work keep those of the next launch apart: see `rule`.
                let idle = (device.compute_capability >= 90 && all < places).then_some(places);
                for blocks in [Some(all.min(places)), idle].into_iter().flatten() {
                    let tiling = Tiling {
                        split,
                        teams,
                        blocks,
                    };
                    if WARPS.contains(&warps) && !found.contains(&tiling) {
                        found.push(tiling);
                    }
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_differ_and_fit_a_block() {
        for (n, k) in [(1536, 1536), (1536, 8960), (4096, 4096), (17, 32)] {
            let shape = Shape::plain(n, k, 128);
            let found = candidates(&DeviceInfo::T4, &shape);
            assert_eq!(found[0], rule(&DeviceInfo::T4, &shape));
            for (i, tiling) in found.iter().enumerate() {
                assert!(tiling.split * tiling.teams <= max_warps(&DeviceInfo::T4, &shape));
                assert!(!found[..i].contains(tiling));
            }
        }
    }
}
