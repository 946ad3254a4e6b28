//! A matrix product in every way to spread it over warps and blocks: what the kernel's rule is
//! made from.

use std::sync::Arc;

use engine::Error;
use engine::backend::cuda::device::Gpu;
use gpu_kernels::launch::DeviceInfo;
use gpu_kernels::linear::gemv_int4_mma::{Shape, Tiling, max_warps, rule};

use crate::rows::{self, Tiled};
use crate::time;

/// Rows shown a matrix, besides the rule's.
const SHOWN: usize = 8;

/// Every tiling that is worth a try: splits that divide the tiles along K differently, teams up to
/// what a block holds, and blocks for one to four a multiprocessor.
fn candidates(device: &DeviceInfo, shape: &Shape) -> Vec<Tiling> {
    let depth = shape.cols.div_ceil(128) as u32;
    let row_tiles = shape.rows.div_ceil(16) as u32;
    let most = max_warps(device, shape);
    let mut found = vec![rule(device, shape)];
    for split in 1..=most.min(depth) {
        // A split that leaves everybody as much to do as a smaller one is of no use.
        if split > 1 && depth.div_ceil(split) == depth.div_ceil(split - 1) {
            continue;
        }
        for teams in 1..=most / split {
            let all = row_tiles.div_ceil(teams);
            for per_multiprocessor in 1..=4 {
                let blocks = all.min(device.multiprocessors * per_multiprocessor);
                let tiling = Tiling {
                    split,
                    teams,
                    blocks,
                };
                let warps = split * teams * per_multiprocessor;
                if (4..=32).contains(&warps) && !found.contains(&tiling) {
                    found.push(tiling);
                }
            }
        }
    }
    found
}

/// Times an `(n, k)` matrix in every tiling, and prints the best and the rule's.
///
/// # Errors
/// [`Error::Machine`] from the device.
pub fn run(gpu: &Arc<Gpu>, n: usize, k: usize, group: usize) -> Result<(), Error> {
    let product = Tiled::plain(n, k, group);
    let bytes = rows::gemv_int4_mma(&product).bytes;
    let (read, _) = time::kernel(gpu, &rows::read(bytes, true))?;
    let tilings = candidates(&gpu.info(), &product.shape);
    let timings = time::forms(gpu, bytes, |device, memory| {
        rows::gemv_int4_mma_in(&product, &tilings, device, memory)
    })?;
    println!(
        "{n} x {k} group {group}: read {:.2} us; split/teams/blocks of {}",
        read.median_us,
        tilings.len()
    );
    let mut order: Vec<usize> = (0..tilings.len()).collect();
    order.sort_by(|&a, &b| timings[a].median_us.total_cmp(&timings[b].median_us));
    let shown = order.iter().take(SHOWN).copied();
    let rest = (!order[..SHOWN.min(order.len())].contains(&0)).then_some(0);
    for i in shown.chain(rest) {
        let Tiling {
            split,
            teams,
            blocks,
        } = tilings[i];
        println!(
            "  {:>12} {:>8.2} us {:>6.2} x read {:>7.0} GB/s{}",
            format!("{split}/{teams}/{blocks}"),
            timings[i].median_us,
            timings[i].median_us / read.median_us,
            timings[i].gb_per_second(bytes),
            if i == 0 { "  the rule" } else { "" }
        );
    }
    Ok(())
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
