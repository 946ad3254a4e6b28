//! What the entries for one token run.

mod feed;
mod heads;
mod stage;

use cuda_std::{shared, thread};

use super::tile::{HALVES_1024, Place, Slot, Weights, fragments, two_floats};
use super::{FLAG_ACCUMULATE, FLAG_HALF_Y, FLAG_SWIGLU, FLAG_ZEROS, TILE_COLS, TILE_ROWS};
use crate::product::{at_least_sm_80, mma_k16};
use crate::unroll::unroll;
use crate::{ptx, swiglu};
#[cfg(not(target_arch = "nvptx64"))]
pub(super) use feed::{DEPTH, ring_tile_bytes};
use feed::{Feed, Job, Registers, Ring};
pub(super) use heads::Heads;
pub(super) use stage::Regions;
use stage::{Batch, Stage, first_batch, stage_floats, stage_halves};

/// Parameters of a launch.
#[derive(Clone, Copy)]
pub(super) struct Args {
    pub weights: Weights,
    /// `(rows,)`, or null.
    pub bias: *const f32,
    /// `(cols,)` floats or halves.
    pub x: *const u32,
    /// Weights of the norm in front `(cols,)`, or null: none.
    pub gain: *const f32,
    /// `(rows,)` floats or halves.
    pub y: *mut f32,
    /// Rows of y.
    pub rows: u32,
    pub cols: u32,
    /// Tiles along N and K.
    pub row_tiles: u32,
    pub depth_tiles: u32,
    /// Added to the norm's mean square.
    pub eps: f32,
    pub flags: u32,
}

/// Whether a launch starts before the one before it has ended, and has weights to ask for first.
const DEPENDENT: bool = cfg!(all(target_arch = "nvptx64", target_feature = "sm_90"));

/// What becomes of the products of a row tile.
pub(super) trait Outputs {
    /// What a block asks for once: it is there when x is.
    type Start: Copy;
    /// What a lane asks for before a row tile's product: it is there after it.
    type Held: Copy;

    /// # Safety
    /// As [`gemv`].
    unsafe fn start(&self) -> Self::Start;

    /// # Safety
    /// As [`gemv`].
    unsafe fn ask(
        &self,
        args: &Args,
        place: &Place,
        start: Self::Start,
        row_tile: u32,
    ) -> Self::Held;

    /// # Safety
    /// As [`gemv`]; `sums` are the products of rows g and g + 8 of the tile.
    unsafe fn store(&self, args: &Args, held: Self::Held, sums: [f32; 2]);
}

/// The body of every entry.
///
/// # Safety
/// Launched as the plan says; `mins` are there if `MINS` says so, x are halves if `HALF_X` does.
#[inline(always)]
pub(super) unsafe fn gemv<const GROUP: u32, const MINS: bool, const HALF_X: bool>(
    args: &Args,
    outputs: &impl Outputs,
) {
    // SAFETY: passed on.
    unsafe {
        if at_least_sm_80() {
            run::<GROUP, MINS, HALF_X, Ring>(args, outputs);
        } else {
            run::<GROUP, MINS, HALF_X, Registers>(args, outputs);
        }
    }
}

/// # Safety
/// As [`gemv`].
#[inline(always)]
unsafe fn run<const GROUP: u32, const MINS: bool, const HALF_X: bool, F: Feed<GROUP, MINS>>(
    args: &Args,
    outputs: &impl Outputs,
) {
    let place = Place::of_thread();
    // Not a constant to the assembler, which does not know that the lane is below 32: as a literal
    // it would take the one place for it that the and-or has, and the masks would be moved to
    // registers anew for every word.
    let halves = HALVES_1024 - (place.lane >> 5);
    let stage = Stage {
        base: shared::dynamic_shared_mem(),
        regions: Regions::new(args.depth_tiles, GROUP, MINS, place.warps()),
    };
    let zeros = args.flags & FLAG_ZEROS != 0;
    let grid = thread::grid_dim_x();
    let job = Job {
        weights: args.weights,
        place,
        first: thread::block_idx_x() + place.team * grid,
        round: place.teams * grid,
        row_tiles: args.row_tiles,
        depth_tiles: args.depth_tiles,
    };
    let ring =
        stage.regions.bytes + place.warp() * feed::DEPTH * feed::ring_tile_bytes(GROUP, MINS);
    let mut feed = F::new(&job, stage.base, ring);

    // SAFETY: the plan checked the buffers and gave the shared memory of `Regions` and the ring;
    // a barrier stands between the staging of x and its use.
    unsafe {
        let mut first = Batch::default();
        if DEPENDENT {
            ptx::griddep_launch();
        } else {
            first = first_batch::<HALF_X>(args, &place);
        }
        feed.ask_early(&job);
        if DEPENDENT {
            ptx::griddep_wait();
            first = first_batch::<HALF_X>(args, &place);
        }
        let start = outputs.start();
        if HALF_X {
            stage_halves::<GROUP, MINS>(args, &stage, &place, first);
        } else {
            stage_floats::<GROUP, MINS>(args, &stage, &place, first);
        }
        feed.ask_more(&job);
        thread::sync_threads();

        let mut row_tile = job.first;
        let mut block_tile = thread::block_idx_x();
        let mut parity = 0;
        loop {
            let held = outputs.ask(args, &place, start, row_tile);
            let mut sums = [0.0f32; 2];
            feed.row_tile(&job, row_tile, |slot, tile| {
                multiply::<GROUP, MINS>(slot, &stage, &place, tile, (halves, zeros), &mut sums);
            });
            if place.split > 1 {
                sums = combine(&stage, &place, parity, sums);
                parity ^= 1;
            }
            outputs.store(args, held, sums);
            row_tile += job.round;
            block_tile += job.round;
            if block_tile >= args.row_tiles {
                break;
            }
        }
    }
}

/// Adds a tile's products to the sums of rows g and g + 8. Every column of the matrix units' result
/// is the same, as every column of operand B is x.
///
/// # Safety
/// All lanes of the warp call it, `tile` is staged, and the slot is loaded.
#[inline(always)]
unsafe fn multiply<const GROUP: u32, const MINS: bool>(
    slot: &Slot,
    stage: &Stage,
    place: &Place,
    tile: u32,
    (halves, zeros): (u32, bool),
    sums: &mut [f32; 2],
) {
    let x = tile * TILE_COLS * 2 + place.q * 16;
    let groups = TILE_COLS / GROUP;
    // SAFETY: by the caller's promise.
    unsafe {
        unroll!(I < (TILE_COLS / GROUP) as usize => {
            let group = tile * groups + I as u32;
            // Chains of products, short so that they overlap: one starts from what has to be taken
            // off, the others from zero.
            let mut chains = [[0.0f32; 4]; 4];
            chains[0] = ptx::ld_shared_v4_f32(stage.base, stage.offset(group));
            unroll!(J < (GROUP / 32) as usize => {
                let quarter = I * (GROUP / 32) as usize + J;
                let b = ptx::ld_shared_v4_u32(stage.base, x + quarter as u32 * 64);
                let words = slot.words[quarter / 2];
                let word = quarter % 2 * 2;
                let (left, right) =
                    (fragments(words[word], halves), fragments(words[word + 1], halves));
                let chain = J % 2 * 2;
                chains[chain] = mma_k16(left, [b[0], b[1]], chains[chain]);
                chains[chain + 1] = mma_k16(right, [b[2], b[3]], chains[chain + 1]);
            });
            let of = |row: usize| {
                let pair = chains[0][row] + chains[1][row];
                if GROUP > 32 { pair + (chains[2][row] + chains[3][row]) } else { pair }
            };
            let [upper, lower] = two_floats(slot.scales[I % 4]);
            sums[0] = ptx::fma(upper, of(0), sums[0]);
            sums[1] = ptx::fma(lower, of(2), sums[1]);
            if MINS {
                let [upper, lower] = slot.minima(I % 4, [upper, lower], zeros);
                let x = ptx::ld_shared_f32(stage.base, stage.sum(group));
                sums[0] = ptx::fma(upper, x, sums[0]);
                sums[1] = ptx::fma(lower, x, sums[1]);
            }
        });
    }
}

/// Adds up the sums of a team's warps, in order; only its first warp gets them. Two buffers in turn,
/// `parity` says which, so that one barrier a round is enough.
///
/// # Safety
/// All threads of the block call it, with the same parity.
#[inline(always)]
unsafe fn combine(stage: &Stage, place: &Place, parity: u32, sums: [f32; 2]) -> [f32; 2] {
    const WARP_BYTES: u32 = TILE_ROWS * 4;
    let buffer = stage.regions.partials + parity * place.warps() * WARP_BYTES;
    // SAFETY: a warp writes its own part; the barrier stands between writing and reading.
    unsafe {
        if place.q < 2 {
            let own = buffer + place.warp() * WARP_BYTES + (place.g + 8 * place.q) * 4;
            ptx::st_shared_f32(
                stage.base,
                own,
                if place.q == 0 { sums[0] } else { sums[1] },
            );
        }
        thread::sync_threads();
        let mut total = [0.0f32; 2];
        if place.member == 0 {
            let team = buffer + place.team * place.split * WARP_BYTES + place.g * 4;
            for member in 0..place.split {
                let from = team + member * WARP_BYTES;
                total[0] += ptx::ld_shared_f32(stage.base, from);
                total[1] += ptx::ld_shared_f32(stage.base, from + WARP_BYTES / 2);
            }
        }
        total
    }
}

/// Rows of y, with what [`Args::flags`] ask for.
pub(super) struct Rows;

/// The row of y that a lane stores.
#[derive(Clone, Copy)]
pub(super) struct Row {
    row: u32,
    /// Whether there is one.
    there: bool,
    /// Whether it is of the upper half of the tile's rows.
    upper: bool,
    /// What is added to the product: the bias, and what y was.
    addend: f32,
}

impl Outputs for Rows {
    type Start = ();
    type Held = Row;

    #[inline(always)]
    unsafe fn start(&self) {}

    /// Lanes 4g and 4g + 1 of a team's first warp store rows g and g + 8, or with SwiGLU lane 4g what
    /// the two come to.
    #[inline(always)]
    unsafe fn ask(&self, args: &Args, place: &Place, (): (), row_tile: u32) -> Row {
        let swiglu = args.flags & FLAG_SWIGLU != 0;
        let (outputs, lanes) = if swiglu {
            (TILE_ROWS / 2, 1)
        } else {
            (TILE_ROWS, 2)
        };
        let row = row_tile * outputs + place.g + 8 * place.q;
        let there =
            row_tile < args.row_tiles && place.member == 0 && place.q < lanes && row < args.rows;
        let mut addend = 0.0;
        // SAFETY: loads are made only where a row is there.
        unsafe {
            if !args.bias.is_null() {
                addend += ptx::ld_global_f32_if(there, args.bias.wrapping_add(row as usize), 0.0);
            }
            if args.flags & FLAG_ACCUMULATE != 0 {
                let y = args.y.wrapping_add(row as usize).cast_const();
                addend += ptx::ld_global_f32_if(there, y, 0.0);
            }
        }
        Row {
            row,
            there,
            upper: place.q == 0,
            addend,
        }
    }

    #[inline(always)]
    unsafe fn store(&self, args: &Args, held: Row, [upper, lower]: [f32; 2]) {
        if !held.there {
            return;
        }
        let product = if args.flags & FLAG_SWIGLU != 0 {
            swiglu::gated(upper, lower)
        } else if held.upper {
            upper
        } else {
            lower
        };
        let value = product + held.addend;
        let row = held.row as usize;
        // SAFETY: the row is there.
        unsafe {
            if args.flags & FLAG_HALF_Y != 0 {
                let y = args.y.cast::<u16>().wrapping_add(row);
                ptx::st_global_u16(y, ptx::f32_to_f16(value));
            } else {
                ptx::st_global_f32(args.y.wrapping_add(row), value);
            }
        }
    }
}
