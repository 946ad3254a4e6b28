//! Activations of a block in shared memory: normed, rounded to halves, with the sums that the
//! products are corrected by.

use cuda_std::shared::Shared;
use cuda_std::warp;

use super::super::TILE_COLS;
use super::super::tile::{Place, two_floats};
use super::{Args, Regions};
use crate::ptx;
use crate::unroll::unroll;

/// Bytes of a tile's activations, halves.
pub(super) const TILE_X_BYTES: u32 = TILE_COLS * 2;

/// Tiles whose activations a warp fetches together.
const BATCH: usize = 2;

/// Their activations, four columns a lane; each is `warps` tiles after the one before.
pub(super) type Batch = [[f32; 4]; BATCH];

/// Elements of `row` `(cols,)` from tile `tile` on; zero from tile `end` or the row's end on.
///
/// # Safety
/// `row` has `cols` floats and is 16-byte aligned.
#[inline(always)]
pub(super) unsafe fn load_batch(
    row: *const f32,
    tile: u32,
    end: u32,
    args: &Args,
    place: &Place,
) -> Batch {
    let mut batch = [[0.0; 4]; BATCH];
    unroll!(I < BATCH => {
        let tile = tile + I as u32 * place.warps();
        let column = tile * TILE_COLS + place.lane * 4;
        let there = tile < end && column < args.cols;
        // SAFETY: a load is made only of columns that are there, all four or none.
        batch[I % BATCH] = unsafe {
            ptx::ld_global_v4_f32_if(there, row.wrapping_add(column as usize), batch[I % BATCH])
        };
    });
    batch
}

/// Shared memory of a block.
#[derive(Clone, Copy)]
pub(super) struct Stage {
    pub base: Shared,
    pub regions: Regions,
}

impl Stage {
    /// What a token's staged activations and the lane's offset in them come to.
    #[inline(always)]
    pub fn x(&self, token: u32) -> u32 {
        token * self.regions.x_stride
    }

    /// Offset of what a group's products start from for a token.
    #[inline(always)]
    pub fn offset(&self, group: u32, token: u32) -> u32 {
        self.regions.offsets + group * 32 + token * 4
    }

    /// Offset of the sum of x over a group.
    #[inline(always)]
    pub fn sum(&self, group: u32, token: u32) -> u32 {
        self.regions.sums + (group * 8 + token) * 4
    }
}

/// Puts four columns of a tile in place, and the sums of each group.
///
/// # Safety
/// All lanes of the warp call it; the tile is below the staged number, and barriers stand before
/// and after staging.
#[inline(always)]
unsafe fn put<const GROUP: u32, const MINS: bool>(
    stage: &Stage,
    place: &Place,
    tile: u32,
    token: u32,
    x: [f32; 4],
) {
    // The high nibbles of a byte reach the matrix units as 16 q: x takes the 16 out.
    let words = [
        ptx::f32x2_to_f16x2(x[0], x[1]),
        ptx::f32x2_to_f16x2(x[2] * 0.0625, x[3] * 0.0625),
    ];
    // Sums of what the matrix units see, rounded as they see it.
    let [low, high] = words.map(two_floats);
    let (low, high) = (low[0] + low[1], high[0] + high[1]);
    let mut sum = ptx::fma(16.0, high, low);
    let zero_point = if MINS { 0.0 } else { -8.0 };
    let mut offset = ptx::fma(-1024.0, low + high, zero_point * sum);
    let mut lanes = 1;
    while lanes < GROUP / 4 {
        offset += warp::shuffle_xor_f32(warp::FULL_MASK, offset, lanes);
        if MINS {
            sum += warp::shuffle_xor_f32(warp::FULL_MASK, sum, lanes);
        }
        lanes *= 2;
    }
    let group = tile * (TILE_COLS / GROUP) + place.lane / (GROUP / 4);
    // SAFETY: the tile's columns and groups lie in the regions for them.
    unsafe {
        let to = stage.x(token) + tile * TILE_X_BYTES + place.lane * 8;
        ptx::st_shared_v2_u32(stage.base, to, words);
        if place.lane.is_multiple_of(GROUP / 4) {
            let to = stage.offset(group, token);
            ptx::st_shared_f32(stage.base, to, offset);
            if MINS {
                ptx::st_shared_f32(stage.base, stage.sum(group, token), sum);
            }
        }
    }
}

/// Leaves each warp's share of the tokens' sums of squares in shared memory.
///
/// # Safety
/// As the body of the entries; `first` is the first batch of token 0.
#[inline(always)]
pub(super) unsafe fn square_sums(args: &Args, stage: &Stage, place: &Place, first: Batch) {
    let tiles = args.depth_tiles();
    let mut token = 0;
    let mut batch = first;
    let mut tile = place.warp();
    let mut sum = 0.0;
    loop {
        unroll!(I < BATCH => {
            let x = batch[I % BATCH];
            sum += (x[0] * x[0] + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]);
        });
        tile += BATCH as u32 * place.warps();
        if tile >= tiles {
            let total = warp::reduce_sum_f32(sum);
            if place.lane == 0 {
                let to = stage.regions.norm + (token * place.warps() + place.warp()) * 4;
                // SAFETY: a slot a warp and token.
                unsafe { ptx::st_shared_f32(stage.base, to, total) };
            }
            sum = 0.0;
            tile = place.warp();
            token += 1;
            if token == args.tokens {
                break;
            }
        }
        let row = args.x.wrapping_add((token * args.cols) as usize);
        // SAFETY: x has `tokens` rows.
        batch = unsafe { load_batch(row, tile, tiles, args, place) };
    }
}

/// `1 / sqrt(mean(x^2) + eps)` of a token; 1 without a norm.
///
/// # Safety
/// All lanes call it, after [`square_sums`] and a barrier.
#[inline(always)]
unsafe fn norm_scale(args: &Args, stage: &Stage, place: &Place, token: u32) -> f32 {
    if args.gain.is_null() {
        return 1.0;
    }
    let mut sum = 0.0;
    if place.lane < place.warps() {
        let from = stage.regions.norm + (token * place.warps() + place.lane) * 4;
        // SAFETY: every warp has written its slot.
        sum = unsafe { ptx::ld_shared_f32(stage.base, from) };
    }
    let mean = warp::reduce_sum_f32(sum) * ptx::rcp(args.cols as f32);
    ptx::rsqrt(mean + args.eps)
}

/// Stages the tiles `chunk[0] .. chunk[1]` of every token; `first` is the first batch of token 0.
///
/// # Safety
/// As the body of the entries; the caller puts barriers around.
#[inline(always)]
pub(super) unsafe fn stage_chunk<const GROUP: u32, const MINS: bool>(
    args: &Args,
    stage: &Stage,
    place: &Place,
    chunk: [u32; 2],
    first: Batch,
) {
    let has_gain = !args.gain.is_null();
    let mut token = 0;
    let mut batch = first;
    let mut tile = chunk[0] + place.warp();
    // SAFETY: the tile is checked before it is put, x has `tokens` rows, the gain one if it is there.
    unsafe {
        let mut scale = norm_scale(args, stage, place, 0);
        loop {
            if has_gain {
                let gains = load_batch(args.gain, tile, chunk[1], args, place);
                unroll!(I < BATCH => {
                    unroll!(J < 4 => {
                        let x = &mut batch[I % BATCH][J % 4];
                        *x = *x * scale * gains[I % BATCH][J % 4];
                    });
                });
            }
            unroll!(I < BATCH => {
                if tile < chunk[1] {
                    put::<GROUP, MINS>(stage, place, tile - chunk[0], token, batch[I % BATCH]);
                }
                tile += place.warps();
            });
            if tile >= chunk[1] {
                tile = chunk[0] + place.warp();
                token += 1;
                if token == args.tokens {
                    break;
                }
                scale = norm_scale(args, stage, place, token);
            }
            let row = args.x.wrapping_add((token * args.cols) as usize);
            batch = load_batch(row, tile, chunk[1], args, place);
        }
    }
}
