//! How tiles come from memory to a warp: through a ring in shared memory, or straight to registers.

use cuda_std::shared::Shared;

use super::super::tile::{Place, Slot, Weights};
use super::super::{TILE_COLS, TILE_ROWS};
use crate::ptx;
use crate::unroll::unroll;

/// Tiles that a warp has in flight.
pub(in super::super) const DEPTH: u32 = 4;
/// Those of them that are asked for before x: more would queue up in front of it in the L2 cache, and
/// no product starts without x.
const EARLY: u32 = 2;

/// Bytes of a lane's scales in a tile.
const fn scale_bytes(group: u32) -> u32 {
    4 * (TILE_COLS / group)
}

/// Offset of the scales in a tile of the ring.
const SCALES: u32 = TILE_ROWS * TILE_COLS / 2;

/// Bytes of a tile in the ring: each lane has its own copy of the scales that it needs.
pub(in super::super) const fn ring_tile_bytes(group: u32, mins: bool) -> u32 {
    SCALES + 32 * scale_bytes(group) * if mins { 2 } else { 1 }
}

/// What a warp works through: every `round`-th row tile from `first` on, of each the tiles along K
/// from the warp's number on, `split` apart.
#[derive(Clone, Copy)]
pub(super) struct Job {
    pub weights: Weights,
    pub place: Place,
    pub first: u32,
    pub round: u32,
    pub row_tiles: u32,
    pub depth_tiles: u32,
}

/// The tile that is asked for next.
#[derive(Clone, Copy)]
struct Ahead {
    row_tile: u32,
    tile: u32,
}

impl Ahead {
    #[inline(always)]
    fn new(job: &Job) -> Ahead {
        Ahead {
            row_tile: job.first,
            tile: job.place.member,
        }
    }

    /// Whether the warp's tile `skip` after it in the same row tile is there, and its number.
    #[inline(always)]
    fn tile(&self, job: &Job, skip: u32) -> (bool, u32) {
        let tile = self.tile + skip * job.place.split;
        let there = self.row_tile < job.row_tiles && tile < job.depth_tiles;
        (there, self.row_tile * job.depth_tiles + tile)
    }

    /// Goes on by `tiles`, to the next row tile where they end this one.
    #[inline(always)]
    fn advance(&mut self, job: &Job, tiles: u32) {
        self.tile += tiles * job.place.split;
        if self.tile >= job.depth_tiles {
            self.tile = job.place.member;
            self.row_tile += job.round;
        }
    }
}

/// Brings a warp its tiles in order.
pub(super) trait Feed<const GROUP: u32, const MINS: bool>: Sized {
    /// `ring` is the offset of the warp's part of the ring.
    fn new(job: &Job, base: Shared, ring: u32) -> Self;

    /// Asks for the tiles that go before x.
    ///
    /// # Safety
    /// The job's weights are what the plan checked.
    unsafe fn ask_early(&mut self, job: &Job);

    /// Asks for as many more as fit.
    ///
    /// # Safety
    /// As [`Feed::ask_early`].
    unsafe fn ask_more(&mut self, job: &Job);

    /// Hands the tiles of a row tile to `each`, with their numbers along K, and asks for as many.
    ///
    /// # Safety
    /// As [`Feed::ask_early`]; all lanes of the warp call it, for one row tile of the job after the
    /// other.
    unsafe fn row_tile(&mut self, job: &Job, row_tile: u32, each: impl FnMut(&Slot, u32));
}

/// A ring in shared memory, filled by asynchronous copies (sm_80 and up). A lane copies what it needs
/// itself, so no lane waits for another. Takes few registers: a block of the next launch fits beside.
pub(super) struct Ring {
    base: Shared,
    start: u32,
    at: u32,
    ahead: Ahead,
}

impl Ring {
    const fn end<const GROUP: u32, const MINS: bool>(&self) -> u32 {
        self.start + DEPTH * ring_tile_bytes(GROUP, MINS)
    }

    #[inline(always)]
    fn step<const GROUP: u32, const MINS: bool>(&mut self) {
        self.at += ring_tile_bytes(GROUP, MINS);
        if self.at == self.end::<GROUP, MINS>() {
            self.at = self.start;
        }
    }

    /// Starts to copy the next tile to where the ring stands.
    ///
    /// # Safety
    /// As [`Feed::ask_early`]; the lane has taken what was there.
    #[inline(always)]
    unsafe fn ask<const GROUP: u32, const MINS: bool>(&mut self, job: &Job) {
        let (there, tile) = self.ahead.tile(job, 0);
        if there {
            let weights = &job.weights;
            let words = weights.words(&job.place, tile);
            let pair = weights.pair::<GROUP>(&job.place, tile);
            let own = self.at + job.place.lane * 16;
            let scales = self.at + SCALES + job.place.lane * scale_bytes(GROUP);
            // SAFETY: the tile is there, and the lane's part of the ring its own.
            unsafe {
                ptx::cp_async_16(self.base, own, words);
                ptx::cp_async_16(self.base, own + 512, words.wrapping_add(128));
                copy_groups::<GROUP>(self.base, scales, weights.scales.wrapping_add(pair));
                if MINS {
                    let mins = scales + 32 * scale_bytes(GROUP);
                    copy_groups::<GROUP>(self.base, mins, weights.mins.wrapping_add(pair));
                }
            }
        }
        // Also an empty group counts: `row_tile` waits for all but the last few.
        ptx::cp_async_commit();
        self.ahead.advance(job, 1);
    }

    /// Takes the tile where the ring stands to registers.
    ///
    /// # Safety
    /// It was asked for and has been waited for.
    #[inline(always)]
    unsafe fn take<const GROUP: u32, const MINS: bool>(&self, place: &Place) -> Slot {
        let own = self.at + place.lane * 16;
        let scales = self.at + SCALES + place.lane * scale_bytes(GROUP);
        // SAFETY: by the caller's promise.
        unsafe {
            Slot {
                words: [
                    ptx::ld_shared_v4_u32(self.base, own),
                    ptx::ld_shared_v4_u32(self.base, own + 512),
                ],
                scales: groups_at::<GROUP>(self.base, scales),
                mins: if MINS {
                    groups_at::<GROUP>(self.base, scales + 32 * scale_bytes(GROUP))
                } else {
                    [0; 4]
                },
            }
        }
    }
}

/// Copies a word for each of the `128 / GROUP` groups of a tile.
///
/// # Safety
/// As [`ptx::cp_async_16`].
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

/// A word for each of the `128 / GROUP` groups of a tile.
///
/// # Safety
/// They are there.
#[inline(always)]
unsafe fn groups_at<const GROUP: u32>(base: Shared, from: u32) -> [u32; 4] {
    // SAFETY: passed on.
    unsafe {
        match GROUP {
            32 => ptx::ld_shared_v4_u32(base, from),
            64 => [
                ptx::ld_shared_u32(base, from),
                ptx::ld_shared_u32(base, from + 4),
                0,
                0,
            ],
            _ => [ptx::ld_shared_u32(base, from), 0, 0, 0],
        }
    }
}

impl<const GROUP: u32, const MINS: bool> Feed<GROUP, MINS> for Ring {
    #[inline(always)]
    fn new(job: &Job, base: Shared, ring: u32) -> Ring {
        Ring {
            base,
            start: ring,
            at: ring,
            ahead: Ahead::new(job),
        }
    }

    #[inline(always)]
    unsafe fn ask_early(&mut self, job: &Job) {
        for _ in 0..EARLY {
            // SAFETY: passed on; nothing was there.
            unsafe { self.ask::<GROUP, MINS>(job) };
            self.step::<GROUP, MINS>();
        }
    }

    #[inline(always)]
    unsafe fn ask_more(&mut self, job: &Job) {
        for _ in EARLY..DEPTH {
            // SAFETY: passed on; nothing was there.
            unsafe { self.ask::<GROUP, MINS>(job) };
            self.step::<GROUP, MINS>();
        }
    }

    #[inline(always)]
    unsafe fn row_tile(&mut self, job: &Job, row_tile: u32, mut each: impl FnMut(&Slot, u32)) {
        if row_tile >= job.row_tiles {
            return;
        }
        let mut tile = job.place.member;
        while tile < job.depth_tiles {
            ptx::cp_async_wait::<{ DEPTH - 1 }>();
            // SAFETY: of the groups so far all but the last `DEPTH - 1` are there, so this one is.
            let slot = unsafe { self.take::<GROUP, MINS>(&job.place) };
            each(&slot, tile);
            // SAFETY: passed on; the tile has been taken.
            unsafe { self.ask::<GROUP, MINS>(job) };
            self.step::<GROUP, MINS>();
            tile += job.place.split;
        }
    }
}

/// Tiles in registers, where there are no asynchronous copies. A slot has no number that a loop could
/// count, so a row tile starts with the first: one that ends before the last leaves slots empty.
pub(super) struct Registers {
    slots: [Slot; DEPTH as usize],
    /// The tile of the first slot.
    ahead: Ahead,
}

/// Tiles that fit into registers: the scales and minima of small groups take more.
const fn register_depth(group: u32, mins: bool) -> u32 {
    match (group, mins) {
        (32, true) => 2,
        (32, false) | (64, true) => 3,
        _ => DEPTH,
    }
}

impl Registers {
    /// Starts to load a slot's next tile.
    ///
    /// # Safety
    /// As [`Feed::ask_early`].
    #[inline(always)]
    unsafe fn ask<const GROUP: u32, const MINS: bool>(&self, job: &Job, slot: usize) -> Slot {
        let (there, tile) = self.ahead.tile(job, slot as u32);
        // SAFETY: passed on.
        unsafe { self.slots[slot].load::<GROUP, MINS>(&job.weights, &job.place, there, tile) }
    }
}

impl<const GROUP: u32, const MINS: bool> Feed<GROUP, MINS> for Registers {
    #[inline(always)]
    fn new(job: &Job, _: Shared, _: u32) -> Registers {
        Registers {
            slots: [Slot::EMPTY; DEPTH as usize],
            ahead: Ahead::new(job),
        }
    }

    #[inline(always)]
    unsafe fn ask_early(&mut self, job: &Job) {
        // SAFETY: passed on.
        self.slots[0] = unsafe { self.ask::<GROUP, MINS>(job, 0) };
    }

    #[inline(always)]
    unsafe fn ask_more(&mut self, job: &Job) {
        unroll!(I < 4 => {
            if I > 0 && (I as u32) < register_depth(GROUP, MINS) {
                // SAFETY: passed on.
                self.slots[I] = unsafe { self.ask::<GROUP, MINS>(job, I) };
            }
        });
        self.ahead.advance(job, register_depth(GROUP, MINS));
    }

    #[inline(always)]
    unsafe fn row_tile(&mut self, job: &Job, row_tile: u32, mut each: impl FnMut(&Slot, u32)) {
        if row_tile >= job.row_tiles {
            return;
        }
        let mut tile = job.place.member;
        while tile < job.depth_tiles {
            unroll!(I < 4 => {
                if (I as u32) < register_depth(GROUP, MINS) {
                    if tile < job.depth_tiles {
                        each(&self.slots[I], tile);
                    }
                    // SAFETY: passed on.
                    self.slots[I] = unsafe { self.ask::<GROUP, MINS>(job, I) };
                    tile += job.place.split;
                }
            });
            self.ahead.advance(job, register_depth(GROUP, MINS));
        }
    }
}
