//! What becomes of the sums of a block by warpgroups: parts of K are added up, each block a share of
//! the tokens, and y is written by way of shared memory, four rows of a token a thread.
//!
//! ```text
//! y of the block in shared memory: a token a row, of as many floats as the block has rows, and four
//! more, so that the eight rows and four pairs of tokens that a warp leaves at once hit different banks
//! ```
//!
//! The blocks of a tile wait for each other. They are next to each other and the last of the grid, so all
//! of them have started, or will as soon as blocks end that wait for none of them.

use cuda_std::shared::Shared;
use cuda_std::{atomic, thread};

use super::block::{Args, TILE_ROWS, Work};
use super::store::Output;
use super::{FLAG_ACCUMULATE, FLAG_HALF_Y, FLAG_SWIGLU};
use crate::unroll::unroll;
use crate::{ptx, swiglu};

/// Rows that a thread writes of a token.
const RUN: u32 = 4;
/// Tokens that a thread has loads under way for.
const TOKENS: u32 = 4;

/// A thread's sums of eight tokens.
#[inline(always)]
fn four<const SUMS: usize>(sums: &[f32; SUMS], eight: usize) -> [f32; 4] {
    [0, 1, 2, 3].map(|i| sums[(4 * eight + i) % SUMS])
}

/// Where the y of a block lies in shared memory.
#[derive(Clone, Copy)]
struct Staged {
    base: Shared,
    swiglu: bool,
    /// Rows of y of the block.
    rows: u32,
    /// Bytes from token to token.
    pitch: u32,
    /// Where a thread's first sum goes, of the first eight tokens.
    own: u32,
}

impl Staged {
    #[inline(always)]
    fn new(args: &Args, base: Shared, thread: u32, tiles: u32) -> Staged {
        let swiglu = args.flags & FLAG_SWIGLU != 0;
        let tile_rows = if swiglu { TILE_ROWS / 2 } else { TILE_ROWS };
        let rows = tiles * tile_rows;
        let pitch = 4 * (rows + RUN);
        let (tile, lane) = (thread / 32, thread % 32);
        let row = tile * tile_rows + lane / 4;
        Staged {
            base,
            swiglu,
            rows,
            pitch,
            own: 2 * (lane % 4) * pitch + 4 * row,
        }
    }

    /// Leaves a thread's four sums of eight tokens, or what its pairs of gate and up come to.
    ///
    /// # Safety
    /// Nobody else touches them before a barrier.
    #[inline(always)]
    unsafe fn put(&self, eight: u32, sums: [f32; 4]) {
        let (base, pitch) = (self.base, self.pitch);
        let at = self.own + eight * 8 * pitch;
        // SAFETY: by the caller's promise.
        unsafe {
            if self.swiglu {
                ptx::st_shared_f32(base, at, swiglu::gated(sums[0], sums[2]));
                ptx::st_shared_f32(base, at + pitch, swiglu::gated(sums[1], sums[3]));
            } else {
                ptx::st_shared_f32(base, at, sums[0]);
                ptx::st_shared_f32(base, at + pitch, sums[1]);
                ptx::st_shared_f32(base, at + 32, sums[2]);
                ptx::st_shared_f32(base, at + pitch + 32, sums[3]);
            }
        }
    }
}

/// Adds up what the parts of a tile's work have come to, and writes y. `sums` are a thread's, four of each
/// eight of the block's `2 SUMS` tokens.
///
/// # Safety
/// All threads of the block call it, launched as the plan says; nobody uses shared memory any more.
#[inline(always)]
pub(super) unsafe fn finish<const THREADS: u32, const SUMS: usize>(
    args: &Args,
    work: &Work,
    base: Shared,
    thread: u32,
    sums: &[f32; SUMS],
) {
    let staged = Staged::new(args, base, thread, THREADS / 32);
    // SAFETY: by the caller's promise; a barrier stands between what is put and what is written.
    unsafe {
        if work.parts > 1 {
            share::<THREADS, SUMS>(args, work, thread, &staged, sums);
            return;
        }
        unroll!(N < (SUMS / 4) => {
            staged.put(N as u32, four(sums, N));
        });
        thread::sync_threads();
        write::<THREADS, SUMS>(args, work, thread, &staged, [0, SUMS as u32 / 4]);
    }
}

/// Leaves the sums to the other parts of the tile, waits for theirs, and writes the share of this part: some
/// eights of tokens. Each value is added up in the order of the parts.
///
/// # Safety
/// As [`finish`].
#[inline(always)]
unsafe fn share<const THREADS: u32, const SUMS: usize>(
    args: &Args,
    work: &Work,
    thread: u32,
    staged: &Staged,
    sums: &[f32; SUMS],
) {
    let step = 4 * THREADS as usize;
    let part_floats = SUMS / 4 * step;
    let tile = work.split_tile as usize * (work.parts as usize * part_floats);
    let first = args.partials.wrapping_add(tile + 4 * thread as usize);
    let arrived = args.arrived.wrapping_add(work.split_tile as usize);
    let of = |part: u32| SUMS as u32 / 4 * part / work.parts;
    let (begin, end) = (of(work.part), of(work.part + 1));
    // SAFETY: by the caller's promise; others' sums are read when all have left theirs.
    unsafe {
        let own = first.wrapping_add(work.part as usize * part_floats);
        unroll!(N < (SUMS / 4) => {
            ptx::st_global_v4_f32(own.wrapping_add(N * step), four(sums, N));
        });
        thread::sync_threads();
        if thread == 0 {
            // Releases what the block wrote, ordered before this thread by the barrier, and
            // acquires what the others wrote, for the block by the barrier below.
            atomic::fence_acq_rel_gpu();
            atomic::add_relaxed_gpu_u32(arrived, 1);
            while atomic::load_acquire_gpu_u32(arrived) < work.parts {}
        }
        thread::sync_threads();
        let mut eight = begin;
        while eight < end {
            // Four values of four parts are on their way at a time.
            let mut totals = [[0.0f32; 4]; 4];
            let mut part = 0;
            while part < work.parts {
                let mut loaded = [[[0.0f32; 4]; 4]; 4];
                unroll!(P < 4 => {
                    let from = first.wrapping_add((part + P as u32) as usize * part_floats);
                    unroll!(E < 4 => {
                        let there = part + (P as u32) < work.parts && eight + (E as u32) < end;
                        let from = from.wrapping_add((eight + E as u32) as usize * step);
                        loaded[P][E] = ptx::ld_global_v4_f32_if(there, from.cast_const(), [0.0; 4]);
                    });
                });
                unroll!(P < 4 => {
                    unroll!(E < 4 => {
                        unroll!(I < 4 => {
                            totals[E][I] += loaded[P][E][I];
                        });
                    });
                });
                part += 4;
            }
            unroll!(E < 4 => {
                if eight + (E as u32) < end {
                    staged.put(eight + E as u32, totals[E]);
                }
            });
            eight += 4;
        }
        thread::sync_threads();
        write::<THREADS, SUMS>(args, work, thread, staged, [begin, end]);
        if thread == 0 {
            // The last that has seen all of them leaves zero for the next launch.
            let before = atomic::add_relaxed_gpu_u32(arrived, 1);
            if before + 1 == 2 * work.parts {
                ptx::st_global_u32(arrived, 0);
            }
        }
    }
}

/// Writes y of some eights of the block's tokens: from the first to the second.
///
/// # Safety
/// As [`finish`]; it is staged, behind a barrier.
#[inline(always)]
unsafe fn write<const THREADS: u32, const SUMS: usize>(
    args: &Args,
    work: &Work,
    thread: u32,
    staged: &Staged,
    eights: [u32; 2],
) {
    // A power of two.
    let runs = staged.rows / RUN;
    let (run, step) = (thread & (runs - 1), THREADS / runs);
    let row = work.row_block * staged.rows + RUN * run;
    let token = work.token_tile * (2 * SUMS as u32);
    let end = (8 * eights[1]).min(args.tokens - token);
    let half_y = args.flags & FLAG_HALF_Y != 0;
    let adds = args.flags & FLAG_ACCUMULATE != 0;
    let aligned = args.y.addr() & if half_y { 7 } else { 15 } == 0;
    let whole = aligned && args.rows.is_multiple_of(RUN) && row < args.rows;
    let mut bias = [0.0; 4];
    // SAFETY: by the caller's promise; loads and stores are made where there are elements.
    unsafe {
        if !args.bias.is_null() {
            unroll!(I < 4 => {
                let there = row + (I as u32) < args.rows;
                let at = args.bias.wrapping_add((row + I as u32) as usize);
                bias[I] = ptx::ld_global_f32_if(there, at, 0.0);
            });
        }
        let mut at = 8 * eights[0] + thread / runs;
        while at < end {
            let index = (token + at) as usize * args.rows as usize + row as usize;
            let token_step = step as usize * args.rows as usize;
            let mut values = [bias; TOKENS as usize];
            unroll!(T < 4 => {
                let at = at + T as u32 * step;
                if at < end {
                    let y = ptx::ld_shared_v4_f32(staged.base, at * staged.pitch + 16 * run);
                    unroll!(I < 4 => {
                        values[T][I] += y[I];
                    });
                }
                if adds {
                    let y = args.y.wrapping_add(index + T * token_step).cast_const();
                    let before = ptx::ld_global_v4_f32_if(whole && at < end, y, [0.0; 4]);
                    unroll!(I < 4 => {
                        values[T][I] += before[I];
                    });
                }
            });
            unroll!(T < 4 => {
                let at = at + T as u32 * step;
                let (index, values) = (index + T * token_step, values[T]);
                if at < end && whole {
                    if half_y {
                        let halves = [
                            ptx::f32x2_to_f16x2(values[0], values[1]),
                            ptx::f32x2_to_f16x2(values[2], values[3]),
                        ];
                        let y = args.y.cast::<u16>().wrapping_add(index);
                        ptx::st_global_v2_u32(y.cast(), halves);
                    } else {
                        ptx::st_global_v4_f32(args.y.wrapping_add(index), values);
                    }
                } else if at < end {
                    unroll!(I < 4 => {
                        let output = Output::new(args, row + I as u32, token + at);
                        output.store(args, values[I] + output.before(args));
                    });
                }
            });
            at += TOKENS * step;
        }
    }
}
