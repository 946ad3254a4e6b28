//! From the warps' sums to a block's, from the blocks' to the result.

use cuda_std::shared::Shared;
use cuda_std::{atomic, thread, warp};

use super::layout::{Layout, pass_elems};
use super::tile::Sums;
use super::{HEADS, MAX_SPLITS, PART_CHUNKS, Place, WARPS};
use crate::attention::UNWRITTEN;
use crate::ptx;
use crate::unroll::unroll;

/// Threads that share the splits of a chunk.
const SUBS: u32 = WARPS * warp::SIZE / PART_CHUNKS;
/// Splits that a thread adds up.
const THREAD_SPLITS: usize = (MAX_SPLITS / SUBS) as usize;
/// Splits whose weights a lane goes over.
const LANE_SPLITS: usize = (MAX_SPLITS / warp::SIZE) as usize;
const _: () = assert!(
    THREAD_SPLITS == 4 && LANE_SPLITS == 4 && WARPS == 8 && PART_CHUNKS == 8,
    "they are unrolled"
);

/// Parts of a head, a block each: 8 chunks of 4 elements, the last one maybe fewer.
#[inline(always)]
pub const fn parts(head_dim: u32) -> u32 {
    head_dim.div_ceil(4 * PART_CHUNKS)
}

/// What a launch's splits leave for the blocks of the heads: `(groups, 8, splits, Dh)` weighted
/// sums, then `(groups, 8, splits, parts, 4)` maxima, sums of weights and two zeros, once for each
/// block that reads them.
#[derive(Clone, Copy)]
pub struct Partials {
    pub base: *mut f32,
    pub head_dim: u32,
    pub splits: u32,
    pub groups: u32,
}

impl Partials {
    #[inline(always)]
    fn slot(&self, group: u32, row: u32, split: u32) -> usize {
        ((group * HEADS + row) * self.splits + split) as usize
    }

    /// Four elements of a weighted sum.
    #[inline(always)]
    fn sum(&self, slot: usize, chunk: u32) -> *mut u32 {
        let elems = slot * self.head_dim as usize + 4 * chunk as usize;
        self.base.wrapping_add(elems).cast()
    }

    #[inline(always)]
    fn weight(&self, slot: usize, part: u32) -> *mut u32 {
        let slots = (self.groups * HEADS * self.splits) as usize;
        let record = slot * parts(self.head_dim) as usize + part as usize;
        let elems = slots * self.head_dim as usize + 4 * record;
        self.base.wrapping_add(elems).cast()
    }
}

/// The bits of a number, none of which are [`UNWRITTEN`].
#[inline(always)]
fn written(values: [f32; 4]) -> [u32; 4] {
    values.map(|value| value.to_bits().min(UNWRITTEN - 1))
}

/// Whether all words are there.
#[inline(always)]
fn there<const N: usize>(words: &[[u32; 4]; N]) -> bool {
    let mut greatest = 0;
    unroll!(I < N => {
        let [a, b, c, d] = words[I];
        greatest = greatest.max(a.max(b)).max(c.max(d));
    });
    greatest != UNWRITTEN
}

/// Where a block's result goes.
#[derive(Clone, Copy)]
pub struct Target {
    /// The group's first head.
    pub out: *mut f32,
    /// Whether there is no other split.
    pub alone: bool,
    pub split: u32,
    pub group: u32,
    /// Heads of the group.
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
            let slot = partials.slot(target.group, row, target.split);
            atomic::store_relaxed_gpu_v4_u32(partials.sum(slot, d / 4), written(sum));
            if (d / 4).is_multiple_of(PART_CHUNKS) {
                let weights = written([maximum, weight, 0.0, 0.0]);
                let part = d / (4 * PART_CHUNKS);
                atomic::store_relaxed_gpu_v4_u32(partials.weight(slot, part), weights);
            }
        }
    }
}

/// Adds up the partials of `active` splits of a part of a head in their order, and marks them as
/// unwritten.
///
/// ```text
/// thread (sub, chunk) -> 4 elements over the splits sub, sub + 32, ...   chunk fastest
/// lane of warp 0      -> what the splits lane, lane + 32, ... count
/// ```
///
/// Looks every `pause_ns` whether they are there: what is polled takes from what the splits read.
///
/// # Safety
/// All threads of the block call it, one block a part; `out` is the head's row.
#[inline(always)]
pub unsafe fn combine_part(
    partials: &Partials,
    group: u32,
    row: u32,
    part: u32,
    active: u32,
    pause_ns: u32,
    out: *mut f32,
    smem: Shared,
    layout: Layout,
) {
    let thread = thread::thread_idx_x();
    let (sub, own) = (thread / PART_CHUNKS, thread % PART_CHUNKS);
    let chunk = part * PART_CHUNKS + own;
    let there_is = 4 * chunk < partials.head_dim;
    let weighs = warp::warp_id() == 0;
    let lane = warp::lane_id();
    let sum_of = |split: u32| partials.sum(partials.slot(group, row, split), chunk);
    let weight_of = |split: u32| partials.weight(partials.slot(group, row, split), part);
    // SAFETY: splits below `active` leave their partials in every launch, and each word is this
    // thread's alone; shared memory has room for shares and sums.
    unsafe {
        let mut weights = [[0; 4]; LANE_SPLITS];
        let mut sums = [[0; 4]; THREAD_SPLITS];
        // Everything is in flight at once, until all of it is there.
        loop {
            if weighs {
                unroll!(I < 4 => {
                    let split = lane + warp::SIZE * I as u32;
                    if split < active {
                        weights[I] = atomic::load_relaxed_gpu_v4_u32(weight_of(split));
                    }
                });
            }
            unroll!(I < 4 => {
                let split = sub + I as u32 * SUBS;
                if there_is && split < active {
                    sums[I] = atomic::load_relaxed_gpu_v4_u32(sum_of(split));
                }
            });
            if there(&weights) && there(&sums) {
                break;
            }
            ptx::nanosleep(pause_ns);
        }
        if weighs {
            let mut maxima = [f32::NEG_INFINITY; LANE_SPLITS];
            let mut maximum = f32::NEG_INFINITY;
            unroll!(I < 4 => {
                let split = lane + warp::SIZE * I as u32;
                if split < active {
                    maxima[I] = f32::from_bits(weights[I][0]);
                    maximum = maximum.max(maxima[I]);
                    atomic::store_relaxed_gpu_v4_u32(weight_of(split), [UNWRITTEN; 4]);
                }
            });
            maximum = warp::reduce_max_f32(maximum);
            let mut sum = 0.0;
            unroll!(I < 4 => {
                maxima[I] = ptx::exp2(maxima[I] - maximum);
                sum = ptx::fma(maxima[I], f32::from_bits(weights[I][1]), sum);
            });
            let inverse = ptx::rcp(warp::reduce_sum_f32(sum));
            unroll!(I < 4 => {
                let split = lane + warp::SIZE * I as u32;
                ptx::st_shared_f32(smem, layout.share(split), maxima[I] * inverse);
            });
        }
        thread::sync_threads();

        let mut sum = [0.0f32; 4];
        unroll!(I < 4 => {
            let split = sub + I as u32 * SUBS;
            if there_is && split < active {
                let share = ptx::ld_shared_f32(smem, layout.share(split));
                unroll!(D < 4 => {
                    sum[D] = ptx::fma(share, f32::from_bits(sums[I][D]), sum[D]);
                });
                atomic::store_relaxed_gpu_v4_u32(sum_of(split), [UNWRITTEN; 4]);
            }
        });
        // The warp's four subs, then the warps.
        unroll!(D < 4 => {
            sum[D] += warp::shuffle_xor_f32(warp::FULL_MASK, sum[D], PART_CHUNKS);
            sum[D] += warp::shuffle_xor_f32(warp::FULL_MASK, sum[D], 2 * PART_CHUNKS);
        });
        if lane < PART_CHUNKS {
            ptx::st_shared_v4_f32(smem, layout.part_sum(warp::warp_id(), lane), sum);
        }
        thread::sync_threads();
        if thread < PART_CHUNKS && there_is {
            let mut total = [0.0f32; 4];
            unroll!(W < 8 => {
                let part = ptx::ld_shared_v4_f32(smem, layout.part_sum(W as u32, thread));
                unroll!(D < 4 => { total[D] += part[D]; });
            });
            ptx::st_global_v4_f32(out.wrapping_add((chunk * 4) as usize), total);
        }
    }
}
