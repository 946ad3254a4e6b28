//! The kernel for one token.

use cuda_std::shared::{self, Shared};
use cuda_std::{thread, warp};

use super::kernel::{HALVES_1024, Place, Slot, two_floats};
use super::{FLAG_ACCUMULATE, FLAG_HALF_Y, FLAG_SWIGLU, TILE_COLS, TILE_ROWS};
use crate::product::mma_k16;
use crate::unroll::unroll;
use crate::{ptx, swiglu};

/// Loads of x that a thread has in flight.
const BATCH: usize = 4;

/// Parameters of a launch.
#[derive(Clone, Copy)]
pub(super) struct OneArgs {
    pub quants: *const u32,
    pub scales: *const u32,
    pub mins: *const u32,
    pub bias: *const f32,
    pub x: *const u32,
    pub gain: *const f32,
    pub y: *mut f32,
    pub rows: u32,
    pub cols: u32,
    pub row_tiles: u32,
    pub depth_tiles: u32,
    pub eps: f32,
    pub flags: u32,
}

/// Byte offsets in a block's shared memory; x, halves, is at its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OneRegions {
    /// Sums of x, f32: a group. Only with minima.
    pub sums: u32,
    /// Two times `(warps, 16)` f32; before that the warps' sums of squares.
    pub partials: u32,
    /// All of it.
    pub bytes: u32,
}

impl OneRegions {
    #[inline(always)]
    pub const fn new(depth_tiles: u32, group: u32, mins: bool, warps: u32) -> OneRegions {
        let sums = depth_tiles * TILE_COLS * 2;
        let groups = depth_tiles * (TILE_COLS / group);
        let sum_bytes = if mins { groups * 4 } else { 0 };
        let partials = (sums + sum_bytes).next_multiple_of(16);
        OneRegions {
            sums,
            partials,
            bytes: partials + 2 * warps * TILE_ROWS * 4,
        }
    }
}

#[derive(Clone, Copy)]
struct Stage {
    base: Shared,
    regions: OneRegions,
}

/// Four words each, `step` words apart, from word `first` on; zeros from word `end` on.
#[inline(always)]
unsafe fn load_batch(x: *const u32, first: u32, step: u32, end: u32) -> [[u32; 4]; BATCH] {
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

/// Leaves the sum of a group's x in shared memory: `lanes` lanes next to each other hold parts of it.
#[inline(always)]
unsafe fn put_sum<const LANES: u32>(stage: &Stage, lane: u32, group: u32, there: bool, sum: f32) {
    let mut sum = sum;
    let mut mask = 1;
    while mask < LANES {
        sum += warp::shuffle_xor_f32(warp::FULL_MASK, sum, mask);
        mask *= 2;
    }
    if there && lane.is_multiple_of(LANES) {
        // SAFETY: inside the region for them.
        unsafe { ptx::st_shared_f32(stage.base, stage.regions.sums + group * 4, sum) };
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
#[inline(always)]
unsafe fn norm_scale(
    args: &OneArgs,
    stage: &Stage,
    place: &Place,
    rank: u32,
    first: &[[u32; 4]; BATCH],
) -> f32 {
    let step = place.warps() * 128;
    let mut batch = *first;
    let mut sum = 0.0;
    let mut column = rank * 4;
    loop {
        unroll!(I < BATCH => {
            let x = batch[I % BATCH].map(f32::from_bits);
            sum += (x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]);
        });
        column += BATCH as u32 * step;
        if column >= args.cols {
            break;
        }
        // SAFETY: as load_batch says.
        batch = unsafe { load_batch(args.x, column, step, args.cols) };
    }
    let total = warp::reduce_sum_f32(sum);
    // SAFETY: a slot a warp, of those of the partial sums, which come after the next barrier.
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

/// Stages x, floats, normed if there is a gain.
#[inline(always)]
unsafe fn stage_floats<const GROUP: u32, const MINS: bool>(
    args: &OneArgs,
    stage: &Stage,
    place: &Place,
    rank: u32,
    first: [[u32; 4]; BATCH],
) {
    let step = place.warps() * 128;
    let end = args.depth_tiles * TILE_COLS;
    let mut batch = first;
    let mut column = rank * 4;
    let mut tile = place.warp();
    // SAFETY: as the entries'.
    unsafe {
        let has_gain = !args.gain.is_null();
        let mut scale = 1.0;
        if has_gain {
            scale = norm_scale(args, stage, place, rank, &batch);
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
                    let halves = [ptx::f32x2_to_f16x2(x[0], x[1]), ptx::f32x2_to_f16x2(x[2], x[3])];
                    if MINS {
                        let [low, high] = halves.map(two_floats);
                        let sum = (low[0] + low[1]) + (high[0] + high[1]);
                        let group = column / GROUP;
                        match GROUP {
                            32 => put_sum::<8>(stage, place.lane, group, true, sum),
                            64 => put_sum::<16>(stage, place.lane, group, true, sum),
                            _ => put_sum::<32>(stage, place.lane, group, true, sum),
                        }
                    }
                    ptx::st_shared_v2_u32(stage.base, column * 2, halves);
                }
                tile += place.warps();
                column += step;
            });
            if tile * TILE_COLS >= end {
                break;
            }
            batch = load_batch(args.x, column, step, args.cols);
        }
    }
}

/// Eight weights of two rows as halves, without their zero point 8; with minima there is none.
#[inline(always)]
fn weights<const MINS: bool>(word: u32, halves: u32) -> [u32; 4] {
    const LOW: u32 = 0x000f_000f;
    const HIGH: u32 = 0x00f0_00f0;
    // The halves 1032 and -72, or 1024 and -64, twice each.
    let (low_zero, high_zero) = if MINS {
        (0x6400_6400, 0xd400_d400)
    } else {
        (0x6408_6408, 0xd480_d480)
    };
    // A sixteenth.
    const SIXTEENTH: u32 = 0x2c00_2c00;
    let other = word >> 8;
    [
        ptx::sub_f16x2((word & LOW) | halves, low_zero),
        ptx::sub_f16x2((other & LOW) | halves, low_zero),
        ptx::fma_f16x2((word & HIGH) | halves, SIXTEENTH, high_zero),
        ptx::fma_f16x2((other & HIGH) | halves, SIXTEENTH, high_zero),
    ]
}

#[inline(always)]
unsafe fn multiply<const GROUP: u32, const MINS: bool>(
    slot: &Slot,
    stage: &Stage,
    x: u32,
    tile: u32,
    halves: u32,
    sums: &mut [f32; 2],
) {
    let groups = TILE_COLS / GROUP;
    // SAFETY: by the caller's promise.
    unsafe {
        unroll!(I < (TILE_COLS / GROUP) as usize => {
            let mut chains = [[0.0f32; 4]; 4];
            unroll!(J < (GROUP / 32) as usize => {
                let quarter = I * (GROUP / 32) as usize + J;
                let b = ptx::ld_shared_v4_u32(stage.base, x + quarter as u32 * 64);
                let words = slot.words[quarter / 2];
                let word = quarter % 2 * 2;
                let left = weights::<MINS>(words[word], halves);
                let right = weights::<MINS>(words[word + 1], halves);
                let chain = J % 2 * 2;
                chains[chain] = mma_k16(left, [b[0], b[1]], chains[chain]);
                chains[chain + 1] = mma_k16(right, [b[2], b[3]], chains[chain + 1]);
            });
            let [upper, lower] = two_floats(slot.scales[I % 4]);
            let of = |i: usize| {
                let pair = chains[0][i] + chains[1][i];
                if GROUP > 32 { pair + (chains[2][i] + chains[3][i]) } else { pair }
            };
            sums[0] = ptx::fma(upper, of(0), sums[0]);
            sums[1] = ptx::fma(lower, of(2), sums[1]);
            if MINS {
                let [upper, lower] = two_floats(slot.mins[I % 4]);
                let group = tile * groups + I as u32;
                let x = ptx::ld_shared_f32(stage.base, stage.regions.sums + group * 4);
                sums[0] = ptx::fma(upper, x, sums[0]);
                sums[1] = ptx::fma(lower, x, sums[1]);
            }
        });
    }
}

/// Where a lane keeps its part of a tile: no other lane touches it.
#[derive(Clone, Copy)]
struct Ring {
    base: Shared,
    /// Offset of the warp's first stage.
    first: u32,
    /// Bytes of a stage.
    stage_bytes: u32,
}

/// Bytes of a lane's scales in a tile.
const fn scale_bytes(group: u32) -> u32 {
    4 * (TILE_COLS / group)
}

/// Bytes of a tile in shared memory.
pub(super) const fn tile_bytes(group: u32, mins: bool) -> u32 {
    TILE_ROWS * TILE_COLS / 2 + 32 * scale_bytes(group) * if mins { 2 } else { 1 }
}

/// Offset of a lane's scales in a stage.
const SCALES: u32 = TILE_ROWS * TILE_COLS / 2;

#[inline(always)]
unsafe fn copy_groups<const GROUP: u32>(base: Shared, to: u32, from: *const u32) {
    // SAFETY: passed on.
    unsafe {
        match GROUP {
            32 => ptx::cp_async_16(base, to, from),
            64 => ptx::cp_async_8(base, to, from),
            _ => ptx::cp_async_4(base, to, from),
        }
    }
}

#[inline(always)]
unsafe fn fetch<const GROUP: u32, const MINS: bool>(
    args: &OneArgs,
    place: &Place,
    base: Shared,
    stage: u32,
    there: bool,
    tile: u32,
) {
    if there {
        let tile = tile as usize;
        let words = args.quants.wrapping_add(tile * 256 + place.lane as usize * 4);
        let groups = (TILE_COLS / GROUP) as usize;
        let pair = tile * 8 * groups + place.g as usize * groups;
        let own = stage + place.lane * 16;
        let scales = stage + SCALES + place.lane * scale_bytes(GROUP);
        // SAFETY: the tile is there.
        unsafe {
            ptx::cp_async_16(base, own, words);
            ptx::cp_async_16(base, own + 512, words.wrapping_add(128));
            copy_groups::<GROUP>(base, scales, args.scales.wrapping_add(pair));
            if MINS {
                let to = scales + 32 * scale_bytes(GROUP);
                copy_groups::<GROUP>(base, to, args.mins.wrapping_add(pair));
            }
        }
    }
    ptx::cp_async_commit();
}

#[inline(always)]
unsafe fn groups_of<const GROUP: u32>(base: Shared, from: u32) -> [u32; 4] {
    // SAFETY: passed on.
    unsafe {
        match GROUP {
            32 => ptx::ld_shared_v4_u32(base, from),
            64 => [ptx::ld_shared_u32(base, from), ptx::ld_shared_u32(base, from + 4), 0, 0],
            _ => [ptx::ld_shared_u32(base, from), 0, 0, 0],
        }
    }
}

#[inline(always)]
unsafe fn take<const GROUP: u32, const MINS: bool>(place: &Place, base: Shared, stage: u32) -> Slot {
    let own = stage + place.lane * 16;
    let scales = stage + SCALES + place.lane * scale_bytes(GROUP);
    // SAFETY: fetched and waited for.
    unsafe {
        Slot {
            words: [ptx::ld_shared_v4_u32(base, own), ptx::ld_shared_v4_u32(base, own + 512)],
            scales: groups_of::<GROUP>(base, scales),
            mins: if MINS { groups_of::<GROUP>(base, scales + 32 * scale_bytes(GROUP)) } else { [0; 4] },
        }
    }
}

/// The body of every entry.
#[inline(always)]
pub(super) unsafe fn gemv_ring<const GROUP: u32, const MINS: bool, const HALF_X: bool, const DEPTH: u32, const EARLY: u32>(args: &OneArgs) {
    let place = Place::of_thread();
    let halves = HALVES_1024 - (place.lane >> 5);
    let depth = args.depth_tiles;
    let row_tiles = args.row_tiles;
    let grid = thread::grid_dim_x();
    let rank = place.warp() * 32 + place.lane;
    let stage = Stage {
        base: shared::dynamic_shared_mem(),
        regions: OneRegions::new(depth, GROUP, MINS, place.warps()),
    };
    let base = stage.base;
    let stage_bytes = tile_bytes(GROUP, MINS);
    let ring_start = stage.regions.bytes + place.warp() * DEPTH * stage_bytes;
    let ring_end = ring_start + DEPTH * stage_bytes;
    let swiglu = args.flags & FLAG_SWIGLU != 0;
    let outputs = if swiglu { TILE_ROWS / 2 } else { TILE_ROWS };
    let round = place.teams * grid;

    let mut block_tile = thread::block_idx_x();
    let mut row_tile = block_tile + place.team * grid;
    // The next tile to fetch.
    let mut ahead_row = row_tile;
    let mut ahead = place.member;
    let mut at = ring_start;
    let mut parity = 0;
    // SAFETY: tiles are fetched only where they are there; a stage is fetched into only after the
    // lane has taken what it held.
    unsafe {
        let mut first = [[0; 4]; BATCH];
        if HALF_X {
            let words = args.cols / 2;
            let mut word = rank * 4;
            while word < words {
                ptx::cp_async_16(base, word * 4, args.x.wrapping_add(word as usize));
                word += place.warps() * 128;
            }
            // Columns that fill up the last tile.
            let end = depth * (TILE_COLS / 2);
            let pad = words + rank;
            if pad < end {
                ptx::st_shared_u32(base, pad * 4, 0);
            }
            ptx::cp_async_commit();
        } else {
            first = load_batch(args.x, rank * 4, place.warps() * 128, args.cols);
        }
        let mut count = 0;
        while count < EARLY {
            let there = ahead_row < row_tiles && ahead < depth;
            fetch::<GROUP, MINS>(args, &place, base, at, there, ahead_row * depth + ahead);
            at += stage_bytes;
            ahead += place.split;
            if ahead >= depth {
                ahead = place.member;
                ahead_row += round;
            }
            count += 1;
        }
        if HALF_X {
            ptx::cp_async_wait::<EARLY>();
        } else {
            stage_floats::<GROUP, MINS>(args, &stage, &place, rank, first);
        }
        while count < DEPTH {
            let there = ahead_row < row_tiles && ahead < depth;
            fetch::<GROUP, MINS>(args, &place, base, at, there, ahead_row * depth + ahead);
            at += stage_bytes;
            ahead += place.split;
            if ahead >= depth {
                ahead = place.member;
                ahead_row += round;
            }
            count += 1;
        }
        at = ring_start;
        thread::sync_threads();

        let x_base = place.q * 16;
        loop {
            // The lane's row of y, if it is one that stores.
            let half = place.q;
            let row = row_tile * outputs + place.g + 8 * half;
            let there = row_tile < row_tiles
                && place.member == 0
                && half < if swiglu { 1 } else { 2 }
                && row < args.rows;
            let mut sums = [0.0f32; 2];
            if row_tile < row_tiles {
                let mut tile = place.member;
                while tile < depth {
                    match DEPTH { 2 => ptx::cp_async_wait::<1>(), 3 => ptx::cp_async_wait::<2>(), 4 => ptx::cp_async_wait::<3>(), 6 => ptx::cp_async_wait::<5>(), _ => ptx::cp_async_wait::<7>() }
                    let slot = take::<GROUP, MINS>(&place, base, at);
                    multiply::<GROUP, MINS>(
                        &slot, &stage, x_base + tile * TILE_COLS * 2, tile, halves, &mut sums,
                    );
                    let there = ahead_row < row_tiles && ahead < depth;
                    fetch::<GROUP, MINS>(args, &place, base, at, there, ahead_row * depth + ahead);
                    at += stage_bytes;
                    if at == ring_end {
                        at = ring_start;
                    }
                    ahead += place.split;
                    if ahead >= depth {
                        ahead = place.member;
                        ahead_row += round;
                    }
                    tile += place.split;
                }
            }
            row_tile += round;
            let mut upper = sums[0];
            let mut lower = sums[1];
            if place.split > 1 {
                let own = stage.regions.partials + (parity * place.warps() + place.warp()) * 64;
                let team = stage.regions.partials
                    + (parity * place.warps() + place.team * place.split) * 64;
                parity ^= 1;
                if place.q < 2 {
                    let sum = if place.q == 0 { upper } else { lower };
                    ptx::st_shared_f32(stage.base, own + (place.g + 8 * place.q) * 4, sum);
                }
                thread::sync_threads();
                if place.member == 0 {
                    let mut total = [0.0f32; 2];
                    let from = team + place.g * 4;
                    for member in 0..place.split {
                        total[0] += ptx::ld_shared_f32(stage.base, from + member * 64);
                        total[1] += ptx::ld_shared_f32(stage.base, from + member * 64 + 32);
                    }
                    upper = total[0];
                    lower = total[1];
                }
            }
            if there {
                let mut value = if half == 0 { upper } else { lower };
                if swiglu {
                    value = swiglu::gated(upper, lower);
                }
                if !args.bias.is_null() {
                    value += ptx::ld_global_f32(args.bias.wrapping_add(row as usize));
                }
                if args.flags & FLAG_ACCUMULATE != 0 {
                    value += ptx::ld_global_f32(args.y.wrapping_add(row as usize));
                }
                if args.flags & FLAG_HALF_Y != 0 {
                    let y = args.y.cast::<u16>().wrapping_add(row as usize);
                    ptx::st_global_u16(y, ptx::f32_to_f16(value));
                } else {
                    ptx::st_global_f32(args.y.wrapping_add(row as usize), value);
                }
            }
            block_tile += round;
            if block_tile >= row_tiles {
                break;
            }
        }
    }
}
