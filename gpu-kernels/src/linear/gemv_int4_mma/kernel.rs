//! What the entries of `linear_gemv_int4_mma` run.

use cuda_std::{shared, thread, warp};

use super::stage::{Stage, TILE_X_BYTES, load_batch, square_sums, stage_chunk};
use super::{FLAG_ACCUMULATE, FLAG_SWIGLU, Regions, TILE_COLS, TILE_ROWS};
use crate::product::mma_k16;
use crate::unroll::unroll;
use crate::{ptx, swiglu};

/// Tiles that a warp has in flight: two 16-byte loads a lane each, and the scales.
pub(super) const DEPTH: usize = 4;
/// Words of a tile.
const TILE_WORDS: usize = (TILE_ROWS * TILE_COLS / 8) as usize;

/// Parameters of a launch.
#[derive(Clone, Copy)]
pub(super) struct Args {
    pub quants: *const u32,
    pub scales: *const u32,
    /// Anything where the format has none.
    pub mins: *const u32,
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

/// Where a warp stands in its block.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub lane: u32,
    /// Row of the tile, and that plus 8.
    pub g: u32,
    /// Quarter of each 32 columns.
    pub q: u32,
    /// Number of the warp in its team: which tiles along K it takes.
    pub member: u32,
    pub team: u32,
    /// Warps a team.
    pub split: u32,
    pub teams: u32,
}

impl Place {
    /// Blocks are `(32, split, teams)`: no division.
    #[inline(always)]
    pub fn of_thread() -> Place {
        let lane = thread::thread_idx_x();
        // From lane 0, so that the assembler sees that the whole warp agrees on it.
        let warp = thread::thread_idx_y() | thread::thread_idx_z() << 8;
        let warp = warp::shuffle_idx_u32(warp::FULL_MASK, warp, 0);
        Place {
            lane,
            g: lane / 4,
            q: lane % 4,
            member: warp & 0xff,
            team: warp >> 8,
            split: thread::block_dim_y(),
            teams: thread::block_dim_z(),
        }
    }

    #[inline(always)]
    pub fn warp(&self) -> u32 {
        self.team * self.split + self.member
    }

    #[inline(always)]
    pub fn warps(&self) -> u32 {
        self.teams * self.split
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

/// A lane's part of a tile.
#[derive(Clone, Copy)]
pub(super) struct Slot {
    pub words: [[u32; 4]; 2],
    /// Scales of rows g and g + 8, two halves a word, a word a group.
    pub scales: [u32; 4],
    pub mins: [u32; 4],
}

impl Slot {
    pub const EMPTY: Slot = Slot {
        words: [[0; 4]; 2],
        scales: [0; 4],
        mins: [0; 4],
    };

    /// Starts the loads of tile `tile` of the matrix, or leaves the slot as it is if it is not there.
    ///
    /// # Safety
    /// Launched as the plan says.
    #[inline(always)]
    pub unsafe fn load_tile<const GROUP: u32, const MINS: bool>(
        self,
        quants: *const u32,
        scales: *const u32,
        mins: *const u32,
        place: &Place,
        there: bool,
        tile: u32,
    ) -> Slot {
        let tile = tile as usize;
        let words = quants.wrapping_add(tile * TILE_WORDS + place.lane as usize * 4);
        let groups = (TILE_COLS / GROUP) as usize;
        let pair = tile * 8 * groups + place.g as usize * groups;
        // SAFETY: a load is made only of a tile that is there.
        unsafe {
            let words = [
                ptx::ld_global_nc_v4_u32_if(there, words, self.words[0]),
                ptx::ld_global_nc_v4_u32_if(there, words.wrapping_add(128), self.words[1]),
            ];
            let scales = load_groups::<GROUP>(there, scales.wrapping_add(pair), self.scales);
            let mut own_mins = self.mins;
            if MINS {
                own_mins = load_groups::<GROUP>(there, mins.wrapping_add(pair), own_mins);
            }
            Slot {
                words,
                scales,
                mins: own_mins,
            }
        }
    }

    /// Starts the loads of a tile, or leaves the slot as it is if there is none.
    ///
    /// # Safety
    /// Launched as the plan says.
    #[inline(always)]
    unsafe fn load<const GROUP: u32, const MINS: bool>(
        self,
        args: &Args,
        place: &Place,
        cursor: &Cursor,
        slot: u32,
        row_tiles: u32,
    ) -> Slot {
        let row_tile = cursor.own_row_tile(place);
        let depth_tile = cursor.depth_tile(place, slot);
        let there = row_tile < row_tiles && depth_tile < cursor.chunk[1];
        let tile = (row_tile * args.depth_tiles() + depth_tile) as usize;
        let words = args
            .quants
            .wrapping_add(tile * TILE_WORDS + place.lane as usize * 4);
        let groups = (TILE_COLS / GROUP) as usize;
        let pair = tile * 8 * groups + place.g as usize * groups;
        // SAFETY: a load is made only of a tile that is there.
        unsafe {
            let words = [
                ptx::ld_global_nc_v4_u32_if(there, words, self.words[0]),
                ptx::ld_global_nc_v4_u32_if(there, words.wrapping_add(128), self.words[1]),
            ];
            let scales = load_groups::<GROUP>(there, args.scales.wrapping_add(pair), self.scales);
            let mut mins = self.mins;
            if MINS {
                mins = load_groups::<GROUP>(there, args.mins.wrapping_add(pair), mins);
            }
            Slot {
                words,
                scales,
                mins,
            }
        }
    }
}

/// A word for each of the `128 / GROUP` groups of a tile.
///
/// # Safety
/// They are there if `there` says so.
#[inline(always)]
unsafe fn load_groups<const GROUP: u32>(there: bool, p: *const u32, old: [u32; 4]) -> [u32; 4] {
    // SAFETY: by the caller's promise; the tiles' scales are aligned to their own size.
    unsafe {
        match GROUP {
            32 => ptx::ld_global_nc_v4_u32_if(there, p, old),
            64 => {
                let [a, b] = ptx::ld_global_nc_v2_u32_if(there, p, [old[0], old[1]]);
                [a, b, 0, 0]
            }
            _ => [ptx::ld_global_nc_u32_if(there, p, old[0]), 0, 0, 0],
        }
    }
}

/// The half 1024, twice.
pub(super) const HALVES_1024: u32 = 0x6400_6400;

/// Eight weights of two rows as halves: `1024 + q` of the low nibbles, `1024 + 16 q` of the high.
/// `halves` is [`HALVES_1024`] in a register.
#[inline(always)]
pub(super) fn fragments(word: u32, halves: u32) -> [u32; 4] {
    const LOW: u32 = 0x000f_000f;
    const HIGH: u32 = 0x00f0_00f0;
    let other = word >> 8;
    [
        (word & LOW) | halves,
        (other & LOW) | halves,
        (word & HIGH) | halves,
        (other & HIGH) | halves,
    ]
}

/// Low and high half of a word, as floats.
#[inline(always)]
pub(super) fn two_floats(word: u32) -> [f32; 2] {
    [
        ptx::f16_to_f32(word as u16),
        ptx::f16_to_f32((word >> 16) as u16),
    ]
}

/// Adds a tile's products to the sums: of rows g and g + 8 and tokens 2q and 2q + 1.
///
/// # Safety
/// All lanes of the warp call it, `tile` is staged, and the slot is loaded.
#[inline(always)]
unsafe fn multiply<const GROUP: u32, const MINS: bool, const ONE: bool>(
    slot: &Slot,
    stage: &Stage,
    place: &Place,
    tile: u32,
    [tokens, halves]: [u32; 2],
    sums: &mut [f32; 4],
) {
    // Lanes without a token of their own read the last: their columns of the product are not used.
    let (column, pair) = if ONE {
        (0, [0, 0])
    } else {
        let last = tokens - 1;
        (
            place.g.min(last),
            [(2 * place.q).min(last), (2 * place.q + 1).min(last)],
        )
    };
    let x = stage.x(column) + tile * TILE_X_BYTES + place.q * 16;
    let groups = TILE_COLS / GROUP;
    // SAFETY: by the caller's promise.
    unsafe {
        unroll!(I < (TILE_COLS / GROUP) as usize => {
            let group = tile * groups + I as u32;
            // Two chains of products: one that starts from what has to be taken off, one from zero.
            let mut even = if ONE {
                ptx::ld_shared_v4_f32(stage.base, stage.offset::<ONE>(group, 0))
            } else {
                let of = |token| ptx::ld_shared_f32(stage.base, stage.offset::<ONE>(group, token));
                let (left, right) = (of(pair[0]), of(pair[1]));
                [left, right, left, right]
            };
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
                let [upper, lower] = two_floats(slot.mins[I % 4]);
                let of = |token| ptx::ld_shared_f32(stage.base, stage.sum::<ONE>(group, token));
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
/// Launched as the plan says, and `mins` are there if `MINS` says so, one token if `ONE` does.
#[inline(always)]
pub(super) unsafe fn gemv<const GROUP: u32, const MINS: bool, const ONE: bool>(args: &Args) {
    let place = Place::of_thread();
    // Not a constant to the assembler, which does not know that the lane is below 32: as a literal
    // it would take the one place for it that the and-or has, and the masks would be moved to
    // registers anew for every word.
    let halves = HALVES_1024 - (place.lane >> 5);
    let tokens = if ONE { 1 } else { args.tokens };
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
        slots[0] = slots[0].load::<GROUP, MINS>(args, &place, &now, 0, row_tiles);
        let first = load_batch(args.x, place.warp(), args.depth_tiles(), args, &place);
        unroll!(I < DEPTH - 1 => {
            let slot = &mut slots[(I + 1) % DEPTH];
            *slot = slot.load::<GROUP, MINS>(args, &place, &now, I as u32 + 1, row_tiles);
        });
        if !args.gain.is_null() {
            square_sums(args, &stage, &place, first);
            thread::sync_threads();
        }
        stage_chunk::<GROUP, MINS, ONE>(args, &stage, &place, now.chunk, first);
        thread::sync_threads();
        let mut staged = 0;

        while now.row_tile < row_tiles {
            let row_tile = now.own_row_tile(&place);
            // The lane's row of y, if its warp is the one that adds up.
            let row = row_tile * tile_outputs + place.lane % tile_outputs;
            let mut added = 0.0;
            if ONE && place.member == 0 {
                let there = place.lane < tile_outputs && row < args.rows;
                added = addend(args, there, row, 0);
            }

            let mut sums = [0.0f32; 4];
            loop {
                if now.chunk[0] != staged {
                    staged = now.chunk[0];
                    let tile = staged + place.warp();
                    let first = load_batch(args.x, tile, now.chunk[1], args, &place);
                    thread::sync_threads();
                    stage_chunk::<GROUP, MINS, ONE>(args, &stage, &place, now.chunk, first);
                    thread::sync_threads();
                }
                let next = now.next(args, &place);
                unroll!(I < DEPTH => {
                    let slot = &mut slots[I % DEPTH];
                    let tile = now.depth_tile(&place, I as u32);
                    if tile < now.chunk[1] && row_tile < row_tiles {
                        let tile = tile - now.chunk[0];
                        let constants = [tokens, halves];
                        multiply::<GROUP, MINS, ONE>(
                            slot, &stage, &place, tile, constants, &mut sums,
                        );
                    }
                    *slot = slot.load::<GROUP, MINS>(args, &place, &next, I as u32, row_tiles);
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
            if ONE {
                if place.q < 2 {
                    let sum = if place.q == 0 { sums[0] } else { sums[2] };
                    ptx::st_shared_f32(stage.base, own + (place.g + 8 * place.q) * 4, sum);
                }
            } else {
                unroll!(I < 4 => {
                    let token = 2 * place.q + I as u32 % 2;
                    if token < tokens {
                        let to = own + (token * 16 + place.g + I as u32 / 2 * 8) * 4;
                        ptx::st_shared_f32(stage.base, to, sums[I % 4]);
                    }
                });
            }
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
                    if !ONE {
                        added = addend(args, there, row, token);
                    }
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
