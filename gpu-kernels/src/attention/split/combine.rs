//! From the warps' sums to a block's, from the blocks' to the result.

use cuda_std::shared::Shared;
use cuda_std::{thread, warp};

use super::layout::{Layout, pass_elems};
use super::tile::Sums;
use super::{HEADS, MAX_SPLITS, Place, WARPS};
use crate::ptx;
use crate::unroll::unroll;

/// Splits that the last block has in flight a thread.
const SPLITS_IN_FLIGHT: usize = 8;
/// Splits that a lane goes over.
const LANE_SPLITS: usize = (MAX_SPLITS / warp::SIZE) as usize;
const _: () = assert!(
    SPLITS_IN_FLIGHT == 8 && LANE_SPLITS == 4,
    "they are unrolled"
);

/// What a launch's blocks leave for the last one. The weighted sums come first.
#[derive(Clone, Copy)]
pub struct Partials {
    pub base: *mut f32,
    pub head_dim: u32,
    pub splits: u32,
    /// The group of heads.
    pub y: u32,
}

impl Partials {
    #[inline(always)]
    fn sum(self, split: u32, row: u32) -> *mut f32 {
        let slot = (self.y * self.splits + split) * HEADS + row;
        self.base
            .wrapping_add(slot as usize * self.head_dim as usize)
    }

    /// Maximum and sum of weights.
    #[inline(always)]
    fn weight(self, split: u32, row: u32) -> *mut f32 {
        let slots = thread::grid_dim_y() * self.splits * HEADS;
        let slot = (self.y * HEADS + row) * self.splits + split;
        let sums = slots as usize * self.head_dim as usize;
        self.base.wrapping_add(sums + 2 * slot as usize)
    }
}

/// Where a block's result goes.
#[derive(Clone, Copy)]
pub struct Target {
    /// The group's first head.
    pub out: *mut f32,
    /// Whether there is no other split.
    pub alone: bool,
    pub split: u32,
    pub heads: u32,
    pub partials: Partials,
}

/// Adds up what the warps have, in warp order: the block's result for each head.
///
/// # Safety
/// All threads of the block call it, after their warp has left maxima and weights in shared memory.
#[inline(always)]
pub unsafe fn combine_warps<const NV: usize>(
    sums: &Sums<NV>,
    at: Place,
    smem: Shared,
    layout: Layout,
    target: &Target,
) {
    let head_dim = target.partials.head_dim;
    // Two blocks of 64 elements a pass.
    unroll!(P < NV.div_ceil(2) => {
        // SAFETY: the warp's rows of the pass; barriers part writing from reading.
        unsafe {
            if P != 0 {
                thread::sync_threads();
            }
            if at.g < target.heads {
                unroll!(I < 2 => {
                    if 2 * P + I < NV {
                        store_sums(&sums[2 * P + I], I as u32, at, smem, layout);
                    }
                });
            }
            thread::sync_threads();
            let first = P as u32 * 128;
            let chunks = (head_dim - first.min(head_dim)).min(pass_elems(NV as u32)) / 4;
            let mut item = thread::thread_idx_x();
            while item < target.heads * chunks {
                let (row, chunk) = (item / chunks, item % chunks);
                combine_chunk(row, chunk, first, smem, layout, target);
                item += WARPS * 32;
            }
        }
    });
}

/// Stores the lane's weighted sums of 64 elements: 16 of head g, which are 4 chunks.
///
/// # Safety
/// Head g is one of the block's.
#[inline(always)]
unsafe fn store_sums(sums: &[[f32; 4]; 8], block: u32, at: Place, smem: Shared, layout: Layout) {
    let first = block * 16 + at.t * 4;
    let warp_id = warp::warp_id();
    unroll!(C < 4 => {
        // The first 8 elements are the products' even columns, the others the odd ones.
        let (odd, j) = (C / 2, C % 2 * 4);
        let values = [
            sums[j][odd] + sums[j][odd + 2],
            sums[j + 1][odd] + sums[j + 1][odd + 2],
            sums[j + 2][odd] + sums[j + 2][odd + 2],
            sums[j + 3][odd] + sums[j + 3][odd + 2],
        ];
        // SAFETY: the chunk is one of the pass's.
        unsafe {
            ptx::st_shared_v4_f32(smem, layout.sum(warp_id, at.g, first + C as u32), values);
        }
    });
}

/// Four elements of head `row` over the warps: to `out` if there is no other split, else to the
/// partials.
///
/// # Safety
/// The warps' results are in shared memory; the chunk lies in the head.
#[inline(always)]
unsafe fn combine_chunk(
    row: u32,
    chunk: u32,
    first: u32,
    smem: Shared,
    layout: Layout,
    target: &Target,
) {
    // SAFETY: by the caller's promise.
    unsafe {
        let mut maxima = [0.0; WARPS as usize];
        unroll!(W < 8 => {
            maxima[W] = ptx::ld_shared_f32(smem, layout.maximum(W as u32, row));
        });
        // Warp 0 has a tile, so this is finite, and a warp without any weighs nothing.
        let mut maximum = maxima[0];
        unroll!(W < 8 => { maximum = maximum.max(maxima[W]); });
        let mut weight = 0.0;
        let mut sum = [0.0f32; 4];
        unroll!(W < 8 => {
            let share = ptx::exp2(maxima[W] - maximum);
            weight = ptx::fma(share, ptx::ld_shared_f32(smem, layout.weight(W as u32, row)), weight);
            let part = ptx::ld_shared_v4_f32(smem, layout.sum(W as u32, row, chunk));
            unroll!(I < 4 => { sum[I] = ptx::fma(share, part[I], sum[I]); });
        });
        let d = first + chunk * 4;
        let partials = target.partials;
        if target.alone {
            let inverse = ptx::rcp(weight);
            let to = target
                .out
                .wrapping_add((row * partials.head_dim + d) as usize);
            ptx::st_global_v4_f32(to, sum.map(|sum| sum * inverse));
        } else {
            ptx::st_global_v4_f32(
                partials.sum(target.split, row).wrapping_add(d as usize),
                sum,
            );
            if d == 0 {
                let to = partials.weight(target.split, row);
                ptx::st_global_f32(to, maximum);
                ptx::st_global_f32(to.wrapping_add(1), weight);
            }
        }
    }
}

/// Adds up the partials of `active` splits in their order.
///
/// # Safety
/// All threads of the block call it, after [`crate::arrive::last_to_arrive`] said so.
#[inline(always)]
pub unsafe fn combine_splits(active: u32, smem: Shared, layout: Layout, target: &Target) {
    let lane = warp::lane_id();
    let partials = target.partials;
    let head_dim = partials.head_dim;
    // SAFETY: splits below `active` have left their partials; shares lie in the room of the sums,
    // which the barrier in `last_to_arrive` has freed.
    unsafe {
        // Warp w: what each split counts in head w.
        let row = warp::warp_id();
        if row < target.heads {
            let mut maxima = [f32::NEG_INFINITY; LANE_SPLITS];
            let mut weights = [0.0f32; LANE_SPLITS];
            unroll!(I < 4 => {
                let split = lane + warp::SIZE * I as u32;
                if split < active {
                    let from = partials.weight(split, row);
                    maxima[I] = ptx::ld_global_f32(from);
                    weights[I] = ptx::ld_global_f32(from.wrapping_add(1));
                }
            });
            let mut maximum = maxima[0];
            unroll!(I < 4 => { maximum = maximum.max(maxima[I]); });
            maximum = warp::reduce_max_f32(maximum);
            let mut weight = 0.0;
            unroll!(I < 4 => {
                maxima[I] = ptx::exp2(maxima[I] - maximum);
                weight = ptx::fma(maxima[I], weights[I], weight);
            });
            let inverse = ptx::rcp(warp::reduce_sum_f32(weight));
            unroll!(I < 4 => {
                let split = lane + warp::SIZE * I as u32;
                ptx::st_shared_f32(smem, layout.share(row, split), maxima[I] * inverse);
            });
        }
        thread::sync_threads();

        let chunks = head_dim / 4;
        let mut item = thread::thread_idx_x();
        while item < target.heads * chunks {
            let (row, chunk) = (item / chunks, item % chunks);
            let from = partials.sum(0, row).wrapping_add((chunk * 4) as usize);
            let stride = (HEADS * head_dim) as usize;
            let mut sum = [0.0f32; 4];
            let mut split = 0;
            while split < active {
                // Loads first, so that all are in flight. Past the end it is the last again, and
                // its share 0.
                let mut parts = [[0.0f32; 4]; SPLITS_IN_FLIGHT];
                unroll!(I < 8 => {
                    let split = (split + I as u32).min(active - 1) as usize;
                    parts[I] = ptx::ld_global_v4_f32(from.wrapping_add(split * stride));
                });
                unroll!(I < 8 => {
                    let share = ptx::ld_shared_f32(smem, layout.share(row, split + I as u32));
                    let share = if split + (I as u32) < active { share } else { 0.0 };
                    unroll!(D < 4 => { sum[D] = ptx::fma(share, parts[I][D], sum[D]); });
                });
                split += SPLITS_IN_FLIGHT as u32;
            }
            let to = target
                .out
                .wrapping_add((row * head_dim + chunk * 4) as usize);
            ptx::st_global_v4_f32(to, sum);
            item += WARPS * 32;
        }
    }
}
