//! What the entries run: a block's stages and its products.

use cuda_std::shared::Shared;
use cuda_std::{shared, thread, warp};

use super::super::gemv_int4_mma::tile::{HALVES_1024, fragments};
use super::feed::Feed;
use super::store::{add_up, store};
use super::{BLOCK_ROWS, BLOCK_THREADS, FLAG_ZEROS};
use crate::product::{at_least_sm_80, mma_k16};
use crate::ptx;
use crate::unroll::unroll;

/// Rows a tile of the matrix.
pub(super) const TILE_ROWS: u32 = 16;
/// Columns a tile: those of a stage.
pub(super) const TILE_COLS: u32 = 128;
pub(super) const TILE_BYTES: u32 = TILE_ROWS * TILE_COLS / 2;
pub(super) const TILE_WORDS: u32 = TILE_BYTES / 4;
/// Row tiles a block.
pub(super) const BLOCK_TILES: u32 = BLOCK_ROWS / TILE_ROWS;
/// Bytes of a token's activations in a stage.
pub(super) const X_BYTES: u32 = TILE_COLS * 2;
/// Bytes that a copy moves.
pub(super) const COPY_BYTES: u32 = 16;

/// Parameters of a launch.
#[derive(Clone, Copy)]
pub(super) struct Args {
    pub quants: *const u32,
    pub scales: *const u32,
    /// Null: symmetric.
    pub mins: *const u32,
    /// `(rows,)`, or null.
    pub bias: *const f32,
    /// `(tokens, cols)` halves.
    pub x: *const u32,
    /// `(tokens, rows)` floats or halves.
    pub y: *mut f32,
    /// A thread's sums of each part of K, for each tile; null where K is not split.
    pub partials: *mut f32,
    /// Parts that are done, for each tile.
    pub arrived: *mut u32,
    /// Rows of y.
    pub rows: u32,
    pub cols: u32,
    pub tokens: u32,
    /// Tiles along N and K.
    pub row_tiles: u32,
    pub depth_tiles: u32,
    /// Columns of a group are `1 << group_shift`.
    pub group_shift: u32,
    pub flags: u32,
    /// Tiles of y that have a block each, with [`warpgroup`](super::warpgroup) alone; each of the others
    /// has `parts` blocks, which share the tiles along K.
    #[cfg_attr(target_arch = "nvptx64", allow(dead_code))]
    pub whole: u32,
    pub parts: u32,
}

impl Args {
    /// All bits or none: what lies in the place of minima is zeros.
    #[inline(always)]
    pub fn zeros_mask(&self) -> u32 {
        if self.flags & FLAG_ZEROS != 0 {
            u32::MAX
        } else {
            0
        }
    }
}

/// What a block does: a part of the tiles along K for a tile of y.
#[derive(Clone, Copy)]
pub(super) struct Work {
    pub row_block: u32,
    pub token_tile: u32,
    pub part: u32,
    pub parts: u32,
    /// Number of the tile of y among those that are split.
    pub split_tile: u32,
}

impl Work {
    /// Blocks `(token tiles, row blocks, parts)`.
    #[inline(always)]
    pub fn of_grid(args: &Args) -> Work {
        let (row_block, token_tile) = (thread::block_idx_y(), thread::block_idx_x());
        Work {
            row_block,
            token_tile,
            part: thread::block_idx_z(),
            parts: args.parts,
            split_tile: row_block * thread::grid_dim_x() + token_tile,
        }
    }

    /// Blocks in a row: of the whole tiles, then the parts of the others, tiles along the tokens first.
    #[cfg(any(not(target_arch = "nvptx64"), target_feature = "sm_90a"))]
    #[inline(always)]
    pub fn in_order(args: &Args, block_tokens: u32) -> Work {
        let block = thread::block_idx_x();
        let (tile, part, parts, split_tile) = if block < args.whole {
            (block, 0, 1, 0)
        } else {
            let rest = block - args.whole;
            let split_tile = rest / args.parts;
            let part = rest - split_tile * args.parts;
            (args.whole + split_tile, part, args.parts, split_tile)
        };
        let token_tiles = args.tokens.div_ceil(block_tokens);
        let row_block = tile / token_tiles;
        Work {
            row_block,
            token_tile: tile - row_block * token_tiles,
            part,
            parts,
            split_tile,
        }
    }

    /// First tile along K, and the one after the last.
    #[inline(always)]
    pub fn depth(&self, args: &Args) -> (u32, u32) {
        let of = |part: u32| args.depth_tiles * part / self.parts;
        (of(self.part), of(self.part + 1))
    }
}

/// Byte offsets in a stage, whose first bytes are tiles.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stage {
    pub x: u32,
    pub scales: u32,
    pub mins: u32,
    /// All of it.
    pub bytes: u32,
}

impl Stage {
    /// A stage of so many row tiles and tokens.
    #[inline(always)]
    pub const fn new(tiles: u32, tokens: u32, group_shift: u32, mins: bool) -> Stage {
        let values = tiles * scale_bytes(group_shift);
        let x = tiles * TILE_BYTES;
        let scales = x + tokens * X_BYTES;
        Stage {
            x,
            scales,
            mins: scales + values,
            bytes: scales + values * if mins { 2 } else { 1 },
        }
    }
}

/// Bytes of a tile's scales.
#[inline(always)]
pub(super) const fn scale_bytes(group_shift: u32) -> u32 {
    (TILE_ROWS * TILE_COLS * 2) >> group_shift
}

/// Offset of eight columns of a token's activations in a stage's x; `eight` of 16.
#[inline(always)]
pub(super) fn x_offset(token: u32, eight: u32) -> u32 {
    token * X_BYTES + ((eight ^ ((token & 1) << 2)) * COPY_BYTES)
}

/// The half `half` (0 or 1) of a word, twice.
#[inline(always)]
fn twice(word: u32, half: u32) -> u32 {
    ptx::permute_bytes(word, word, if half == 0 { 0x1010 } else { 0x3232 })
}

/// Where a warp stands.
#[derive(Clone, Copy)]
struct Place {
    /// Row of a tile, and that plus 8; token of an eight as operand B.
    g: u32,
    /// Quarter of each 32 columns; pair of tokens of an eight in the result.
    q: u32,
    /// Row tile in the block: the warp's number.
    tile: u32,
}

/// What turns the words of a row tile into weights: of rows g and g + 8, twice each.
#[derive(Clone, Copy)]
pub(super) struct Group {
    scales: [u32; 2],
    mins: [u32; 2],
    zeros: [Zero; 2],
}

impl Group {
    pub const SYMMETRIC: Group = Group {
        scales: [0; 2],
        mins: [0; 2],
        zeros: [Zero::EIGHT; 2],
    };

    /// The group's pair of scales lies at `scales`, that of minima at `mins`, or of zeros with all bits of
    /// `zeros` set rather than none.
    ///
    /// # Safety
    /// They are there; minima with `MINS` alone.
    #[inline(always)]
    pub unsafe fn load<const MINS: bool>(
        self,
        base: Shared,
        scales: u32,
        mins: u32,
        zeros: u32,
    ) -> Group {
        let mut group = self;
        // SAFETY: by the caller's promise.
        unsafe {
            let pair = ptx::ld_shared_u32(base, scales);
            group.scales = [twice(pair, 0), twice(pair, 1)];
            if MINS {
                let pair = ptx::ld_shared_u32(base, mins);
                let pair = [twice(pair, 0), twice(pair, 1)];
                group.mins = [pair[0] & !zeros, pair[1] & !zeros];
                group.zeros = [Zero::of(pair[0] & zeros), Zero::of(pair[1] & zeros)];
            }
        }
        group
    }
}

/// The half 1/16, twice.
const SIXTEENTHS: u32 = 0x2c00_2c00;

/// Minus the zero point: 1024 + z, as it comes with the low nibbles, and 64 + z of the high ones.
#[derive(Clone, Copy)]
struct Zero {
    low: u32,
    minus_high: u32,
}

impl Zero {
    /// 8: symmetric.
    const EIGHT: Zero = Zero {
        low: 0x6408_6408,
        minus_high: 0xd480_d480,
    };
    /// 0: with minima.
    const NONE: Zero = Zero {
        low: 0x6400_6400,
        minus_high: 0xd400_d400,
    };

    /// A whole number from 0 to 16, a half, twice: sums with 1024 and 64 are exact.
    #[inline(always)]
    fn of(zero: u32) -> Zero {
        Zero {
            low: ptx::add_f16x2(zero, Zero::NONE.low),
            minus_high: ptx::sub_f16x2(Zero::NONE.minus_high, zero),
        }
    }
}

/// Operand A of a product: eight weights of rows g and g + 8.
#[inline(always)]
pub(super) fn weights(word: u32, halves: u32, group: &Group) -> [u32; 4] {
    let [a, b, c, d] = fragments(word, halves);
    let low = |q: u32, i: usize| {
        let q = ptx::sub_f16x2(q, group.zeros[i].low);
        ptx::fma_f16x2(q, group.scales[i], group.mins[i])
    };
    let high = |q: u32, i: usize| {
        let q = ptx::fma_f16x2(q, SIXTEENTHS, group.zeros[i].minus_high);
        ptx::fma_f16x2(q, group.scales[i], group.mins[i])
    };
    [low(a, 0), low(b, 1), high(c, 0), high(d, 1)]
}

/// Adds the products of a stage to the warp's sums. `ONCE`: a group is as long as a tile; `MINS`: there
/// are minima or zeros. Forms of their own, because a condition in between would keep the compiler from
/// moving loads and the making of weights between products.
///
/// # Safety
/// All lanes of the warp call it; the stage is there.
#[inline(always)]
unsafe fn multiply<const NT: usize, const ONCE: bool, const MINS: bool>(
    args: &Args,
    stage: &Stage,
    place: &Place,
    base: Shared,
    at: u32,
    halves: u32,
    sums: &mut [[f32; 4]; NT],
) {
    let tile = at + place.tile * TILE_BYTES + (4 * place.g + place.q) * 16;
    // The pairs of scales of a row lie side by side: one to four.
    let shift = if ONCE {
        TILE_COLS.trailing_zeros()
    } else {
        args.group_shift
    };
    let scales = at + stage.scales + place.tile * scale_bytes(shift) + (place.g << (9 - shift));
    let mins = scales + (stage.mins - stage.scales);
    let x = at + stage.x + place.g * X_BYTES;
    let odd = (place.g & 1) << 2;
    let zeros = args.zeros_mask();
    let mut words = [0u32; 4];
    let mut group = Group::SYMMETRIC;
    // SAFETY: by the caller's promise.
    unsafe {
        unroll!(Q < 4 => {
            let quarter = Q as u32;
            if !ONCE || Q == 0 {
                let offset = (quarter * 32) >> shift << 2;
                group = group.load::<MINS>(base, scales + offset, mins + offset, zeros);
            }
            if Q % 2 == 0 {
                words = ptx::ld_shared_v4_u32(base, tile + quarter / 2 * (TILE_BYTES / 2));
            }
            let a = [
                weights(words[Q % 2 * 2], halves, &group),
                weights(words[Q % 2 * 2 + 1], halves, &group),
            ];
            let eight = ((quarter * 4 + place.q) ^ odd) * COPY_BYTES;
            unroll!(N < (NT) => {
                let b = ptx::ld_shared_v4_u32(base, x + N as u32 * 8 * X_BYTES + eight);
                unroll!(S < 2 => {
                    let sum = &mut sums[N % NT];
                    *sum = mma_k16(a[S], [b[2 * S], b[2 * S + 1]], *sum);
                });
            });
        });
    }
}

/// The body of every entry: NT eights of tokens, and `UNDER_WAY` stages that may be under way while one is
/// worked on, and one more that is asked for.
///
/// # Safety
/// Launched as the plan says.
#[inline(always)]
pub(super) unsafe fn gemm<const NT: usize, const UNDER_WAY: u32>(args: &Args) {
    let tokens = NT as u32 * 8;
    let thread = thread::thread_idx_x();
    let lane = thread % 32;
    let place = Place {
        g: lane / 4,
        q: lane % 4,
        // From lane 0, so that the assembler sees that the whole warp agrees on it.
        tile: warp::shuffle_idx_u32(warp::FULL_MASK, thread / 32, 0),
    };
    // In a register, which it stays in where the compiler does not see that nothing is taken off.
    let halves = HALVES_1024 - (place.tile >> 5);
    let base = shared::dynamic_shared_mem();
    let has_mins = !args.mins.is_null();
    let stage = Stage::new(BLOCK_TILES, tokens, args.group_shift, has_mins);
    let work = Work::of_grid(args);
    let (first, end) = work.depth(args);
    let ring = (UNDER_WAY + 2) * stage.bytes;
    let next = |at: u32| {
        let next = at + stage.bytes;
        if next == ring { 0 } else { next }
    };

    ptx::griddep_launch();
    let mut sums = [[0.0f32; 4]; NT];
    // SAFETY: the plan checked the buffers and gave the stages; a barrier stands between the arrival
    // of a stage and its use, and between its use and the next copies to its place.
    unsafe {
        let at = |token, eight| x_offset(token, eight);
        let mut feed = Feed::<BLOCK_THREADS, X_BYTES>::new(args, &work, thread, tokens, at);
        // What no launch writes is asked for while others may still run.
        let mut into = 0;
        let mut ahead = first;
        while at_least_sm_80() && ahead < (first + UNDER_WAY + 1).min(end) {
            feed.bring_weights(args, &stage, thread, base, into);
            into += stage.bytes;
            ahead += 1;
        }
        ptx::griddep_wait();
        into = 0;
        ahead = first;
        while at_least_sm_80() && ahead < first + UNDER_WAY + 1 {
            if ahead < end {
                feed.bring_x(args, &stage, tokens, thread, base, into);
            }
            // Also an empty group counts.
            ptx::cp_async_commit();
            into += stage.bytes;
            ahead += 1;
        }
        let mut at = 0;
        let mut tile = first;
        while tile < end {
            if at_least_sm_80() {
                ptx::cp_async_wait::<UNDER_WAY>();
                thread::sync_threads();
                if ahead < end {
                    feed.bring(args, &stage, tokens, thread, base, into);
                }
                ptx::cp_async_commit();
                (into, ahead) = (next(into), ahead + 1);
            } else {
                // Copies are not asynchronous: one place, between barriers.
                thread::sync_threads();
                feed.bring(args, &stage, tokens, thread, base, at);
                ptx::cp_async_commit();
                ptx::cp_async_wait::<0>();
                thread::sync_threads();
            }
            let sums = &mut sums;
            let once = args.group_shift == TILE_COLS.trailing_zeros();
            match (once, has_mins) {
                (true, false) => {
                    multiply::<NT, true, false>(args, &stage, &place, base, at, halves, sums);
                }
                (true, true) => {
                    multiply::<NT, true, true>(args, &stage, &place, base, at, halves, sums);
                }
                (false, false) => {
                    multiply::<NT, false, false>(args, &stage, &place, base, at, halves, sums);
                }
                (false, true) => {
                    multiply::<NT, false, true>(args, &stage, &place, base, at, halves, sums);
                }
            }
            at = if at_least_sm_80() { next(at) } else { 0 };
            tile += 1;
        }
        let one_of = work.parts > 1;
        if one_of && !add_up::<NT, BLOCK_THREADS>(args, &work, base, thread, &mut sums) {
            return;
        }
        let row_tile = work.row_block * BLOCK_TILES + place.tile;
        store(args, row_tile, work.token_tile * tokens, lane, &mut sums);
    }
}
