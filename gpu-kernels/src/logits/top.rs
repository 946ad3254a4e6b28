//! The greatest 64 logits, by the last block that is done.
//!
//! ```text
//! every warp  -> the best of its rows, to the scratch memory
//! last block  -> block b's best is the best of its warps': the 64th of these is a bound that 64
//!                logits reach
//!             -> warps whose best reaches it, compacted: about 64 of 2,000
//!             -> their rows' logits that reach it, compacted: about 64 again
//!             -> each of them counts those before it: its place
//! ```
//!
//! The order is total, value and then index, so the result does not depend on the order in which
//! anything is found. Where more than [`SEGMENT`] logits a warp reach the bound, which takes
//! hundreds of equal ones, the block goes over all logits once a candidate instead.
//!
//! Bytes moved: 8 a warp of the grid, and the logits of the warps that are gone over, in L2.

use cuda_std::shared::Shared;
use cuda_std::{thread, warp};

use super::{ROWS, WARPS};
use crate::ptx;
use crate::sample::{BEST_BYTES, Best, MAX_CANDIDATES};
use crate::unroll::unroll;

/// Candidates that a warp has room for.
const SEGMENT: u32 = 128;
/// Chunks of four logits that a thread has in flight.
const IN_FLIGHT: usize = 4;
const _: () = assert!(IN_FLIGHT == 4, "they are unrolled");
const THREADS: u32 = WARPS * warp::SIZE;
/// Bests that a thread compares at a time.
const COMPARED: u32 = 8;
/// Blocks of a grid at most: a thread remembers a bit for each of its share of their warps.
#[cfg(not(target_arch = "nvptx64"))]
pub const MAX_BLOCKS: u32 = 32 * THREADS / WARPS;

/// Where things lie in shared memory, in bytes. Nothing of the product is needed any more.
#[derive(Clone, Copy)]
pub struct Layout {
    blocks: u32,
}

impl Layout {
    #[inline(always)]
    pub fn new(blocks: u32) -> Layout {
        Layout { blocks }
    }

    /// The bound: a candidate.
    const BOUND: u32 = 0;
    /// What a warp has found: warps, then candidates.
    #[inline(always)]
    fn count(phase: u32, warp: u32) -> u32 {
        16 + (phase * WARPS + warp) * 4
    }

    #[inline(always)]
    fn block(self, block: u32) -> u32 {
        Self::count(2, 0) + block * BEST_BYTES
    }

    /// Places for the blocks' bests.
    #[inline(always)]
    fn places(self) -> u32 {
        self.blocks.next_multiple_of(COMPARED)
    }

    /// A warp of the grid that is gone over.
    #[inline(always)]
    fn listed(self, i: u32) -> u32 {
        self.block(self.places()) + i * 4
    }

    #[inline(always)]
    fn candidate(self, warp: u32, i: u32) -> u32 {
        self.listed(self.blocks * WARPS) + (warp * SEGMENT + i) * BEST_BYTES
    }

    #[cfg(not(target_arch = "nvptx64"))]
    pub fn bytes(self) -> u32 {
        self.candidate(WARPS, 0)
    }
}

/// The product's logits as the warps of the grid have them.
#[derive(Clone, Copy)]
pub struct Rows {
    /// `(V,)`.
    pub logits: *const f32,
    pub vocab: u32,
    /// `(blocks, WARPS, 2)`: value and index of each warp's best.
    pub bests: *const u32,
    pub blocks: u32,
}

impl Rows {
    /// # Safety
    /// The warp has left its best.
    #[inline(always)]
    unsafe fn best(&self, warp: u32) -> Best {
        // SAFETY: by the caller's promise.
        unsafe { Best::of_global(self.bests.wrapping_add(2 * warp as usize)) }
    }

    /// Four logits of a row of items that start at `row`, a multiple of 4; NaN past the end, which
    /// never is a candidate.
    ///
    /// # Safety
    /// The logits are written.
    #[inline(always)]
    unsafe fn four(&self, row: u32) -> [f32; 4] {
        let mut values = [f32::NAN; 4];
        let from = self.logits.wrapping_add(row as usize);
        // SAFETY: by the caller's promise, below V.
        unsafe {
            if row + 4 <= self.vocab {
                values = ptx::ld_global_v4_f32(from);
            } else {
                unroll!(I < 4 => {
                    if row + (I as u32) < self.vocab {
                        values[I] = ptx::ld_global_f32(from.wrapping_add(I));
                    }
                });
            }
        }
        values
    }
}

/// Lanes below this one for which `predicate` holds, and how many of the warp's.
#[inline(always)]
fn place(predicate: bool) -> (u32, u32) {
    let lanes = warp::ballot(warp::FULL_MASK, predicate);
    let below = lanes & ((1 << warp::lane_id()) - 1);
    (below.count_ones(), lanes.count_ones())
}

/// Writes the greatest logits to `out`, `(64, 2)`: bits of the value and index.
///
/// # Safety
/// All threads of one block call it, when all others have written their logits and bests; shared
/// memory is [`Layout::bytes`] and of no other use.
#[inline(always)]
pub unsafe fn select(rows: &Rows, out: *mut u32, smem: Shared) {
    let layout = Layout::new(rows.blocks);
    // SAFETY: by the caller's promise; barriers part writing from reading, and places are below the
    // counts that the layout has room for.
    unsafe {
        bound(rows, smem, layout);
        let listed = list(rows, smem, layout);
        gather(rows, listed, smem, layout);
        let mut counts = [0; WARPS as usize];
        let mut fits = true;
        unroll!(W < 8 => {
            counts[W] = ptx::ld_shared_u32(smem, Layout::count(1, W as u32));
            fits &= counts[W] <= SEGMENT;
        });
        if fits {
            rank(counts, out, smem, layout);
        } else {
            one_by_one(rows, out, smem, layout);
        }
    }
}

/// Leaves the bound: the 64th of the blocks' bests, or nothing where there are fewer.
///
/// # Safety
/// As [`select`].
#[inline(always)]
unsafe fn bound(rows: &Rows, smem: Shared, layout: Layout) {
    // SAFETY: as `select`.
    unsafe {
        let mut block = thread::thread_idx_x();
        if block == 0 {
            Best::NONE.put(smem, Layout::BOUND);
        }
        while block < layout.places() {
            let mut best = Best::NONE;
            if block < rows.blocks {
                unroll!(W < 8 => { best = best.or(rows.best(block * WARPS + W as u32)); });
            }
            best.put(smem, layout.block(block));
            block += THREADS;
        }
        thread::sync_threads();
        let mut block = thread::thread_idx_x();
        while block < rows.blocks {
            let best = Best::of_shared(smem, layout.block(block));
            let mut before = 0;
            let mut other = 0;
            while other < rows.blocks {
                unroll!(I < 8 => {
                    let other = Best::of_shared(smem, layout.block(other + I as u32));
                    before += u32::from(other.before(best));
                });
                other += COMPARED;
            }
            // Equal ones are blocks without any number.
            if before == MAX_CANDIDATES as u32 - 1 && best != Best::NONE {
                best.put(smem, Layout::BOUND);
            }
            block += THREADS;
        }
        thread::sync_threads();
    }
}

/// Lists the warps of the grid whose best reaches the bound; how many.
///
/// # Safety
/// As [`select`], after [`bound`].
#[inline(always)]
unsafe fn list(rows: &Rows, smem: Shared, layout: Layout) -> u32 {
    let warp_id = warp::warp_id();
    let warps = rows.blocks * WARPS;
    // SAFETY: as `select`.
    unsafe {
        let bound = Best::of_shared(smem, Layout::BOUND);
        // Once to count, and remembered to write.
        let mut reach = 0u32;
        let mut count = 0;
        let mut round = 0;
        while round * THREADS < warps {
            let mut bests = [Best::NONE; IN_FLIGHT];
            unroll!(I < 4 => {
                let grid_warp = (round + I as u32) * THREADS + thread::thread_idx_x();
                if grid_warp < warps {
                    bests[I] = rows.best(grid_warp);
                }
            });
            unroll!(I < 4 => {
                let round = round + I as u32;
                let there = round * THREADS + thread::thread_idx_x() < warps;
                let there = there && bests[I].reaches(bound);
                if there {
                    reach |= 1 << round;
                }
                count += place(there).1;
            });
            round += IN_FLIGHT as u32;
        }
        if warp::lane_id() == 0 {
            ptx::st_shared_u32(smem, Layout::count(0, warp_id), count);
        }
        thread::sync_threads();
        let mut at = 0;
        let mut all = 0;
        unroll!(W < 8 => {
            if W as u32 == warp_id {
                at = all;
            }
            all += ptx::ld_shared_u32(smem, Layout::count(0, W as u32));
        });
        let mut round = 0;
        while round * THREADS < warps {
            let there = reach >> round & 1 != 0;
            let (before, of_warp) = place(there);
            if there {
                let grid_warp = round * THREADS + thread::thread_idx_x();
                ptx::st_shared_u32(smem, layout.listed(at + before), grid_warp);
            }
            at += of_warp;
            round += 1;
        }
        thread::sync_threads();
        all
    }
}

/// Gathers the logits of the listed warps that reach the bound, a segment a warp.
///
/// # Safety
/// As [`select`], after [`list`].
#[inline(always)]
unsafe fn gather(rows: &Rows, listed: u32, smem: Shared, layout: Layout) {
    let warp_id = warp::warp_id();
    let stride = rows.blocks * WARPS;
    let rounds = rows.vocab.div_ceil(ROWS).div_ceil(stride);
    let chunks = listed * rounds * 2;
    let mut count = 0;
    // SAFETY: as `select`.
    unsafe {
        let bound = Best::of_shared(smem, Layout::BOUND);
        let mut first = 0;
        while first < chunks {
            let mut found = [([f32::NAN; 4], 0); IN_FLIGHT];
            unroll!(I < 4 => {
                let chunk = first + I as u32 * THREADS + thread::thread_idx_x();
                if chunk < chunks {
                    let (i, rest) = (chunk / (2 * rounds), chunk % (2 * rounds));
                    let grid_warp = ptx::ld_shared_u32(smem, layout.listed(i));
                    let row = (grid_warp + rest / 2 * stride) * ROWS + rest % 2 * 4;
                    if row < rows.vocab {
                        found[I] = (rows.four(row), row);
                    }
                }
            });
            unroll!(I < 4 => {
                let (values, row) = found[I];
                let greatest = values[0].max(values[1]).max(values[2].max(values[3]));
                if warp::any(warp::FULL_MASK, greatest >= bound.value) {
                    unroll!(J < 4 => {
                        let best = Best {
                            value: values[J],
                            index: row + J as u32,
                        };
                        let (before, of_warp) = place(best.reaches(bound));
                        if best.reaches(bound) && count + before < SEGMENT {
                            best.put(smem, layout.candidate(warp_id, count + before));
                        }
                        count += of_warp;
                    });
                }
            });
            first += IN_FLIGHT as u32 * THREADS;
        }
        if warp::lane_id() == 0 {
            ptx::st_shared_u32(smem, Layout::count(1, warp_id), count);
        }
        thread::sync_threads();
    }
}

/// Puts each candidate where it belongs, and nothing where there are too few.
///
/// # Safety
/// As [`select`], after [`gather`].
#[inline(always)]
unsafe fn rank(counts: [u32; WARPS as usize], out: *mut u32, smem: Shared, layout: Layout) {
    // SAFETY: as `select`.
    unsafe {
        let mut all = 0;
        unroll!(W < 8 => { all += counts[W]; });
        let mut number = thread::thread_idx_x();
        while number < all {
            // Segments one after the other.
            let mut at = (0, number);
            let mut first = 0;
            unroll!(W < 8 => {
                if number >= first && number - first < counts[W] {
                    at = (W as u32, number - first);
                }
                first += counts[W];
            });
            let best = Best::of_shared(smem, layout.candidate(at.0, at.1));
            let mut before = 0;
            unroll!(W < 8 => {
                let mut i = 0;
                while i < counts[W] {
                    let other = Best::of_shared(smem, layout.candidate(W as u32, i));
                    before += u32::from(other.before(best));
                    i += 1;
                }
            });
            if before < MAX_CANDIDATES as u32 {
                best.leave(out.wrapping_add(2 * before as usize));
            }
            number += THREADS;
        }
        let thread = thread::thread_idx_x();
        if thread >= all && thread < MAX_CANDIDATES as u32 {
            Best::NONE.leave(out.wrapping_add(2 * thread as usize));
        }
    }
}

/// The same, by going over all logits once a candidate.
///
/// # Safety
/// As [`select`].
#[inline(always)]
unsafe fn one_by_one(rows: &Rows, out: *mut u32, smem: Shared, layout: Layout) {
    let warp_id = warp::warp_id();
    // SAFETY: as `select`.
    unsafe {
        let mut last = Best::NONE;
        let mut number = 0;
        while number < MAX_CANDIDATES {
            let mut best = Best::NONE;
            let mut row = thread::thread_idx_x() * 4;
            while row < rows.vocab {
                let values = rows.four(row);
                unroll!(J < 4 => {
                    let other = Best {
                        value: values[J],
                        index: row + J as u32,
                    };
                    if number == 0 || last.before(other) {
                        best = best.or(other);
                    }
                });
                row += THREADS * 4;
            }
            best.of_warp().store(smem, layout.block(warp_id));
            thread::sync_threads();
            best = Best::NONE;
            unroll!(W < 8 => {
                best = best.or(Best::of_shared(smem, layout.block(W as u32)));
            });
            thread::sync_threads();
            if thread::thread_idx_x() == 0 {
                best.leave(out.wrapping_add(2 * number));
            }
            last = best;
            number += 1;
        }
    }
}
