//! What the entries for several tokens run.

mod stage;

use cuda_std::{shared, thread, warp};

use super::tile::{HALVES_1024, Place, Slot, Weights, fragments, two_floats};
use super::{FLAG_ACCUMULATE, FLAG_SWIGLU, FLAG_ZEROS, TILE_COLS, TILE_ROWS};
use crate::product::mma_k16;
use crate::unroll::unroll;
use crate::{ptx, swiglu};
use stage::{Stage, TILE_X_BYTES, load_batch, square_sums, stage_chunk};

/// Tiles that a warp has in flight: two 16-byte loads a lane each, and the scales.
pub(super) const DEPTH: usize = 4;

/// Extra bytes a token's activations: puts neighbouring tokens in different banks.
const TOKEN_PAD_BYTES: u32 = 64;

/// Byte offsets in a block's shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Regions {
    /// Bytes a token's activations: halves, `chunk` tiles.
    pub x_stride: u32,
    /// What the sums of products start from, f32: 8 a group.
    pub offsets: u32,
    /// Sums of x, f32: 8 a group. Only with minima.
    pub sums: u32,
    /// Sums of squares, f32: a warp and token.
    pub norm: u32,
    /// Two times `(warps, tokens, 16)` f32.
    pub partials: u32,
    /// All of it.
    pub bytes: u32,
}

impl Regions {
    #[inline(always)]
    pub const fn new(chunk: u32, group: u32, mins: bool, tokens: u32, warps: u32) -> Regions {
        let x_stride = chunk * TILE_COLS * 2 + TOKEN_PAD_BYTES;
        let groups = chunk * (TILE_COLS / group);
        let offsets = tokens * x_stride;
        let sums = offsets + groups * 32;
        let norm = if mins { sums + groups * 32 } else { sums };
        let partials = norm + tokens * warps * 4;
        Regions {
            x_stride,
            offsets,
            sums,
            norm,
            partials,
            bytes: partials + 2 * warps * tokens * TILE_ROWS * 4,
        }
    }
}

/// Parameters of a launch.
#[derive(Clone, Copy)]
pub(super) struct Args {
    pub weights: Weights,
    /// `(rows,)`, or null.
    pub bias: *const f32,
    /// `(tokens, cols)`.
    pub x: *const f32,
    /// Weights of the norm in front `(cols,)`, or null: none.
    pub gain: *const f32,
    /// `(tokens, rows)`.
    pub y: *mut f32,
    /// Rows of y.
    pub rows: u32,
    pub cols: u32,
    pub tokens: u32,
    /// Tiles along K whose activations are staged at a time.
    pub chunk: u32,
    /// Added to the norm's mean square.
    pub eps: f32,
    pub flags: u32,
}

impl Args {
    /// Tiles along K.
    #[inline(always)]
    pub fn depth_tiles(&self) -> u32 {
        self.cols.div_ceil(TILE_COLS)
    }

    /// Rows of y a tile.
    #[inline(always)]
    fn tile_outputs(&self) -> u32 {
        if self.flags & FLAG_SWIGLU != 0 {
            TILE_ROWS / 2
        } else {
            TILE_ROWS
        }
    }
}

/// Where the block stands: the same in all its warps.
#[derive(Clone, Copy)]
struct Cursor {
    /// Row tile of team 0; team t has the one t grids further on.
    row_tile: u32,
    /// Tile along K of slot 0 of the first warp of a team.
    first: u32,
    /// The tiles along K that are staged.
    chunk: [u32; 2],
}

impl Cursor {
    #[inline(always)]
    fn start(args: &Args) -> Cursor {
        Cursor {
            row_tile: thread::block_idx_x(),
            first: 0,
            chunk: [0, args.chunk.min(args.depth_tiles())],
        }
    }

    /// The slots' next tiles: further along K, then of the next row tiles.
    #[inline(always)]
    fn next(self, args: &Args, place: &Place) -> Cursor {
        let mut next = self;
        next.first += DEPTH as u32 * place.split;
        if next.first >= self.chunk[1] {
            next.first = self.chunk[1];
            if next.first == args.depth_tiles() {
                next.first = 0;
                next.row_tile += place.teams * thread::grid_dim_x();
            }
            let end = (next.first + args.chunk).min(args.depth_tiles());
            next.chunk = [next.first, end];
        }
        next
    }

    /// The warp's row tile.
    #[inline(always)]
    fn own_row_tile(&self, place: &Place) -> u32 {
        self.row_tile + place.team * thread::grid_dim_x()
    }

    /// Tile along K of the warp's slot `slot`.
    #[inline(always)]
    fn depth_tile(&self, place: &Place, slot: u32) -> u32 {
        self.first + slot * place.split + place.member
    }
}

/// Starts the loads of a warp's slot `slot`.
///
/// # Safety
/// Launched as the plan says.
#[inline(always)]
unsafe fn load<const GROUP: u32, const MINS: bool>(
    old: Slot,
    args: &Args,
    place: &Place,
    cursor: &Cursor,
    slot: u32,
    row_tiles: u32,
) -> Slot {
    let row_tile = cursor.own_row_tile(place);
    let depth_tile = cursor.depth_tile(place, slot);
    let there = row_tile < row_tiles && depth_tile < cursor.chunk[1];
    let tile = row_tile * args.depth_tiles() + depth_tile;
    // SAFETY: passed on.
    unsafe { old.load::<GROUP, MINS>(&args.weights, place, there, tile) }
}

/// Adds a tile's products to the sums: of rows g and g + 8 and tokens 2q and 2q + 1.
///
/// # Safety
/// All lanes of the warp call it, `tile` is staged, and the slot is loaded.
#[inline(always)]
unsafe fn multiply<const GROUP: u32, const MINS: bool>(
    slot: &Slot,
    stage: &Stage,
    place: &Place,
    tile: u32,
    [tokens, halves, flags]: [u32; 3],
    sums: &mut [f32; 4],
) {
    // Lanes without a token of their own read the last: their columns of the product are not used.
    let last = tokens - 1;
    let column = place.g.min(last);
    let pair = [(2 * place.q).min(last), (2 * place.q + 1).min(last)];
    let x = stage.x(column) + tile * TILE_X_BYTES + place.q * 16;
    let groups = TILE_COLS / GROUP;
    // SAFETY: by the caller's promise.
    unsafe {
        unroll!(I < (TILE_COLS / GROUP) as usize => {
            let group = tile * groups + I as u32;
            // Two chains of products: one that starts from what has to be taken off, one from zero.
            let of = |token| ptx::ld_shared_f32(stage.base, stage.offset(group, token));
            let (left, right) = (of(pair[0]), of(pair[1]));
            let mut even = [left, right, left, right];
            let mut odd = [0.0f32; 4];
            unroll!(J < (GROUP / 32) as usize => {
                let quarter = I * (GROUP / 32) as usize + J;
                let b = ptx::ld_shared_v4_u32(stage.base, x + quarter as u32 * 64);
                let words = slot.words[quarter / 2];
                let word = quarter % 2 * 2;
                even = mma_k16(fragments(words[word], halves), [b[0], b[1]], even);
                odd = mma_k16(fragments(words[word + 1], halves), [b[2], b[3]], odd);
            });
            let [upper, lower] = two_floats(slot.scales[I % 4]);
            sums[0] = ptx::fma(upper, even[0] + odd[0], sums[0]);
            sums[1] = ptx::fma(upper, even[1] + odd[1], sums[1]);
            sums[2] = ptx::fma(lower, even[2] + odd[2], sums[2]);
            sums[3] = ptx::fma(lower, even[3] + odd[3], sums[3]);
            if MINS {
                let zeros = flags & FLAG_ZEROS != 0;
                let [upper, lower] = slot.minima(I % 4, [upper, lower], zeros);
                let of = |token| ptx::ld_shared_f32(stage.base, stage.sum(group, token));
                let x = [of(pair[0]), of(pair[1])];
                sums[0] = ptx::fma(upper, x[0], sums[0]);
                sums[1] = ptx::fma(upper, x[1], sums[1]);
                sums[2] = ptx::fma(lower, x[0], sums[2]);
                sums[3] = ptx::fma(lower, x[1], sums[3]);
            }
        });
    }
}

/// What is added to a row of y besides the product: its bias, and what it was.
///
/// # Safety
/// `row` is a row of y if `there` says so, `token` a token.
#[inline(always)]
unsafe fn addend(args: &Args, there: bool, row: u32, token: u32) -> f32 {
    let mut sum = 0.0;
    // SAFETY: loads are made only where a row is there.
    unsafe {
        if !args.bias.is_null() {
            sum += ptx::ld_global_f32_if(there, args.bias.wrapping_add(row as usize), 0.0);
        }
        if args.flags & FLAG_ACCUMULATE != 0 {
            let y = args.y.wrapping_add((token * args.rows + row) as usize);
            sum += ptx::ld_global_f32_if(there, y.cast_const(), 0.0);
        }
    }
    sum
}

/// The body of every entry.
///
/// # Safety
/// Launched as the plan says, and `mins` are there if `MINS` says so.
#[inline(always)]
pub(super) unsafe fn gemv<const GROUP: u32, const MINS: bool>(args: &Args) {
    let place = Place::of_thread();
    // Not a constant to the assembler, which does not know that the lane is below 32: as a literal
    // it would take the one place for it that the and-or has, and the masks would be moved to
    // registers anew for every word.
    let halves = HALVES_1024 - (place.lane >> 5);
    let tokens = args.tokens;
    let stage = Stage {
        base: shared::dynamic_shared_mem(),
        regions: Regions::new(args.chunk, GROUP, MINS, tokens, place.warps()),
    };
    let tile_outputs = args.tile_outputs();
    let row_tiles = args.rows.div_ceil(tile_outputs);
    let mut now = Cursor::start(args);
    let mut slots = [Slot::EMPTY; DEPTH];
    let mut parity = 0;

    // SAFETY: the plan checked the buffers and gave the shared memory of `Regions`; tiles are
    // loaded only where they are there; barriers stand around what is staged.
    unsafe {
        // One tile's weights on their way first, then the activations, which every warp waits for
        // and which come from L2, then the other slots.
        slots[0] = load::<GROUP, MINS>(slots[0], args, &place, &now, 0, row_tiles);
        let first = load_batch(args.x, place.warp(), args.depth_tiles(), args, &place);
        unroll!(I < DEPTH - 1 => {
            let slot = &mut slots[(I + 1) % DEPTH];
            *slot = load::<GROUP, MINS>(*slot, args, &place, &now, I as u32 + 1, row_tiles);
        });
        if !args.gain.is_null() {
            square_sums(args, &stage, &place, first);
            thread::sync_threads();
        }
        stage_chunk::<GROUP, MINS>(args, &stage, &place, now.chunk, first);
        thread::sync_threads();
        let mut staged = 0;

        while now.row_tile < row_tiles {
            let row_tile = now.own_row_tile(&place);
            let mut sums = [0.0f32; 4];
            loop {
                if now.chunk[0] != staged {
                    staged = now.chunk[0];
                    let tile = staged + place.warp();
                    let first = load_batch(args.x, tile, now.chunk[1], args, &place);
                    thread::sync_threads();
                    stage_chunk::<GROUP, MINS>(args, &stage, &place, now.chunk, first);
                    thread::sync_threads();
                }
                let next = now.next(args, &place);
                unroll!(I < DEPTH => {
                    let slot = &mut slots[I % DEPTH];
                    let tile = now.depth_tile(&place, I as u32);
                    if tile < now.chunk[1] && row_tile < row_tiles {
                        let tile = tile - now.chunk[0];
                        let constants = [tokens, halves, args.flags];
                        multiply::<GROUP, MINS>(
                            slot, &stage, &place, tile, constants, &mut sums,
                        );
                    }
                    *slot = load::<GROUP, MINS>(*slot, args, &place, &next, I as u32, row_tiles);
                });
                let done = next.row_tile != now.row_tile;
                now = next;
                if done {
                    break;
                }
            }

            // Every warp leaves its sums; the first of each team adds them up in order. Two
            // buffers in turn, so that one barrier a round is enough.
            let team = stage.regions.partials
                + (parity * place.warps() + place.team * place.split) * tokens * 64;
            parity ^= 1;
            let own = team + place.member * tokens * 64;
            unroll!(I < 4 => {
                let token = 2 * place.q + I as u32 % 2;
                if token < tokens {
                    let to = own + (token * 16 + place.g + I as u32 / 2 * 8) * 4;
                    ptx::st_shared_f32(stage.base, to, sums[I % 4]);
                }
            });
            if place.split == 1 {
                warp::sync_warp(warp::FULL_MASK);
            } else {
                thread::sync_threads();
            }
            if place.member == 0 {
                let mut first = 0;
                while first < tokens * 16 {
                    let output = first + place.lane;
                    // Past the end a lane adds up the last: it stores nothing.
                    let from = team + output.min(tokens * 16 - 1) * 4;
                    let mut sum = 0.0;
                    for member in 0..place.split {
                        sum += ptx::ld_shared_f32(stage.base, from + member * tokens * 64);
                    }
                    let token = output / 16;
                    let mut row = row_tile * tile_outputs + output % 16;
                    let mut there = output < tokens * 16;
                    if args.flags & FLAG_SWIGLU != 0 {
                        let up = warp::shuffle_xor_f32(warp::FULL_MASK, sum, 8);
                        sum = swiglu::gated(sum, up);
                        there &= output % 16 < 8;
                        row = row_tile * tile_outputs + output % 8;
                    }
                    there &= row < args.rows && row_tile < row_tiles;
                    let added = addend(args, there, row, token);
                    if there {
                        let y = args.y.wrapping_add((token * args.rows + row) as usize);
                        ptx::st_global_f32(y, sum + added);
                    }
                    first += 32;
                }
            }
        }
    }
}
