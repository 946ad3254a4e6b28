//! Activations of the one token in shared memory: halves, normed where there is a norm in front, with
//! the sums that the products are corrected by.

use cuda_std::shared::Shared;
use cuda_std::{thread, warp};

use super::super::tile::{Place, two_floats};
use super::super::{TILE_COLS, TILE_ROWS};
use super::Args;
use crate::ptx;
use crate::unroll::unroll;

/// Loads of x that a thread has in flight, 16 bytes each.
const BATCH: usize = 4;

/// What they bring; each is a warp's width times the warps after the one before.
pub(super) type Batch = [[u32; 4]; BATCH];

/// Byte offsets in a block's shared memory; x, halves, is at its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Regions {
    /// What the sums of products start from, f32: 4 a group that are the same.
    offsets: u32,
    /// Sums of x, f32: a group. Only with minima.
    sums: u32,
    /// Two times `(warps, 16)` f32; before that the warps' sums of squares.
    pub partials: u32,
    /// All of it.
    pub bytes: u32,
}

impl Regions {
    #[inline(always)]
    pub const fn new(depth_tiles: u32, group: u32, mins: bool, warps: u32) -> Regions {
        let offsets = depth_tiles * TILE_COLS * 2;
        let groups = depth_tiles * (TILE_COLS / group);
        let sums = offsets + groups * 16;
        let sum_bytes = if mins { groups * 4 } else { 0 };
        let partials = sums + sum_bytes.next_multiple_of(16);
        Regions {
            offsets,
            sums,
            partials,
            bytes: partials + 2 * warps * TILE_ROWS * 4,
        }
    }
}

/// Shared memory of a block.
#[derive(Clone, Copy)]
pub(super) struct Stage {
    pub base: Shared,
    pub regions: Regions,
}

impl Stage {
    /// Offset of what a group's products start from, four times.
    #[inline(always)]
    pub fn offset(&self, group: u32) -> u32 {
        self.regions.offsets + group * 16
    }

    /// Offset of the sum of x over a group.
    #[inline(always)]
    pub fn sum(&self, group: u32) -> u32 {
        self.regions.sums + group * 4
    }
}

/// Four words each, `step` words apart, from word `first` on; zeros from word `end` on.
///
/// # Safety
/// `x` has `end` words, a multiple of four, and is 16-byte aligned.
#[inline(always)]
unsafe fn load_batch(x: *const u32, first: u32, step: u32, end: u32) -> Batch {
    let mut batch = [[0; 4]; BATCH];
    unroll!(I < BATCH => {
        let word = first + I as u32 * step;
        // SAFETY: a load is made only of what is there.
        batch[I % BATCH] = unsafe {
            ptx::ld_global_v4_u32_if(word < end, x.wrapping_add(word as usize), batch[I % BATCH])
        };
    });
    batch
}

/// Words of x.
#[inline(always)]
fn words<const HALF_X: bool>(args: &Args) -> u32 {
    if HALF_X { args.cols / 2 } else { args.cols }
}

/// A thread's first batch of x.
///
/// # Safety
/// As the body of the entries.
#[inline(always)]
pub(super) unsafe fn first_batch<const HALF_X: bool>(args: &Args, place: &Place) -> Batch {
    // SAFETY: x has as many words.
    unsafe {
        load_batch(
            args.x,
            place.rank() * 4,
            place.warps() * 128,
            words::<HALF_X>(args),
        )
    }
}

/// Leaves what corrects a group's products in shared memory: `LANES` lanes next to each other hold
/// parts of `seen`, the sum of x as the matrix units see it, and of `sum`, of x itself.
///
/// # Safety
/// All lanes of the warp call it; the group is one of those staged if `there` says so.
#[inline(always)]
unsafe fn put_sums<const LANES: u32, const MINS: bool>(
    stage: &Stage,
    lane: u32,
    group: u32,
    there: bool,
    [seen, sum]: [f32; 2],
) {
    let mut sum = sum;
    let zero_point = if MINS { 0.0 } else { -8.0 };
    let mut offset = ptx::fma(-1024.0, seen, zero_point * sum);
    let mut mask = 1;
    while mask < LANES {
        offset += warp::shuffle_xor_f32(warp::FULL_MASK, offset, mask);
        if MINS {
            sum += warp::shuffle_xor_f32(warp::FULL_MASK, sum, mask);
        }
        mask *= 2;
    }
    if there && lane.is_multiple_of(LANES) {
        // SAFETY: inside the regions for them.
        unsafe {
            ptx::st_shared_v4_f32(stage.base, stage.offset(group), [offset; 4]);
            if MINS {
                ptx::st_shared_f32(stage.base, stage.sum(group), sum);
            }
        }
    }
}

/// The sum of what the matrix units see of four columns, and of the columns themselves.
#[inline(always)]
fn sums_of(pair: [u32; 2]) -> [f32; 2] {
    let [low, high] = pair.map(two_floats);
    let (low, high) = (low[0] + low[1], high[0] + high[1]);
    [low + high, ptx::fma(16.0, high, low)]
}

/// A sixteenth, twice: the high nibbles of a byte reach the matrix units as 16 q.
const SIXTEENTH: u32 = 0x2c00_2c00;

/// Stages x from halves, eight columns a lane.
///
/// # Safety
/// As the body of the entries; the caller puts a barrier after it.
#[inline(always)]
pub(super) unsafe fn stage_halves<const GROUP: u32, const MINS: bool>(
    args: &Args,
    stage: &Stage,
    place: &Place,
    first: Batch,
) {
    let step = place.warps() * 128;
    let end = args.depth_tiles * (TILE_COLS / 2);
    let mut batch = first;
    let mut word = place.rank() * 4;
    // The word of the warp's first lane: all lanes agree on it.
    let mut warp_word = place.warp() * 128;
    // SAFETY: words below `end` lie in the region of x, their groups in those of the sums.
    unsafe {
        loop {
            unroll!(I < BATCH => {
                if warp_word < end {
                    let mut x = batch[I % BATCH];
                    x[1] = ptx::fma_f16x2(x[1], SIXTEENTH, 0);
                    x[3] = ptx::fma_f16x2(x[3], SIXTEENTH, 0);
                    let (a, b) = (sums_of([x[0], x[1]]), sums_of([x[2], x[3]]));
                    let sums = [a[0] + b[0], a[1] + b[1]];
                    let (group, there) = (word * 2 / GROUP, word < end);
                    match GROUP {
                        32 => put_sums::<4, MINS>(stage, place.lane, group, there, sums),
                        64 => put_sums::<8, MINS>(stage, place.lane, group, there, sums),
                        _ => put_sums::<16, MINS>(stage, place.lane, group, there, sums),
                    }
                    if there {
                        ptx::st_shared_v4_u32(stage.base, word * 4, x);
                    }
                }
                word += step;
                warp_word += step;
            });
            if warp_word >= end {
                break;
            }
            batch = load_batch(args.x, word, step, words::<true>(args));
        }
    }
}

/// `1 / sqrt(mean(x^2) + eps)`; `first` is the thread's first batch.
///
/// # Safety
/// As the body of the entries.
#[inline(always)]
unsafe fn norm_scale(args: &Args, stage: &Stage, place: &Place, first: &Batch) -> f32 {
    let step = place.warps() * 128;
    let mut batch = *first;
    let mut sum = 0.0;
    let mut column = place.rank() * 4;
    loop {
        unroll!(I < BATCH => {
            let x = batch[I % BATCH].map(f32::from_bits);
            sum += (x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]);
        });
        column += BATCH as u32 * step;
        if column >= args.cols {
            break;
        }
        // SAFETY: x has `cols` floats.
        batch = unsafe { load_batch(args.x, column, step, args.cols) };
    }
    let total = warp::reduce_sum_f32(sum);
    // SAFETY: a slot a warp, of those of the partial sums: these are written after another barrier.
    unsafe {
        if place.lane == 0 {
            ptx::st_shared_f32(stage.base, stage.regions.partials + place.warp() * 4, total);
        }
        thread::sync_threads();
        let mut sum = 0.0;
        if place.lane < place.warps() {
            sum = ptx::ld_shared_f32(stage.base, stage.regions.partials + place.lane * 4);
        }
        let mean = warp::reduce_sum_f32(sum) * ptx::rcp(args.cols as f32);
        ptx::rsqrt(mean + args.eps)
    }
}

/// Stages x from floats, four columns a lane, normed if there is a gain.
///
/// # Safety
/// As the body of the entries; the caller puts a barrier after it.
#[inline(always)]
pub(super) unsafe fn stage_floats<const GROUP: u32, const MINS: bool>(
    args: &Args,
    stage: &Stage,
    place: &Place,
    first: Batch,
) {
    let step = place.warps() * 128;
    let mut batch = first;
    let mut column = place.rank() * 4;
    let mut tile = place.warp();
    // SAFETY: a tile below `depth_tiles` lies in the region of x, its groups in those of the sums;
    // the gain has `cols` floats.
    unsafe {
        let has_gain = !args.gain.is_null();
        let mut scale = 1.0;
        if has_gain {
            scale = norm_scale(args, stage, place, &batch);
        }
        loop {
            let mut gains = [[0; 4]; BATCH];
            if has_gain {
                gains = load_batch(args.gain.cast(), column, step, args.cols);
            }
            unroll!(I < BATCH => {
                if tile < args.depth_tiles {
                    let mut x = batch[I % BATCH].map(f32::from_bits);
                    if has_gain {
                        let gain = gains[I % BATCH].map(f32::from_bits);
                        unroll!(J < 4 => {
                            x[J] = x[J] * scale * gain[J];
                        });
                    }
                    let halves = [
                        ptx::f32x2_to_f16x2(x[0], x[1]),
                        ptx::f32x2_to_f16x2(x[2] * 0.0625, x[3] * 0.0625),
                    ];
                    let sums = sums_of(halves);
                    let group = column / GROUP;
                    match GROUP {
                        32 => put_sums::<8, MINS>(stage, place.lane, group, true, sums),
                        64 => put_sums::<16, MINS>(stage, place.lane, group, true, sums),
                        _ => put_sums::<32, MINS>(stage, place.lane, group, true, sums),
                    }
                    ptx::st_shared_v2_u32(stage.base, column * 2, halves);
                }
                tile += place.warps();
                column += step;
            });
            if tile >= args.depth_tiles {
                break;
            }
            batch = load_batch(args.x, column, step, args.cols);
        }
    }
}
