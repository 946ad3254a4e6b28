//! A tile of the matrix in a lane's registers, and where a warp stands in its block.

use cuda_std::{thread, warp};

use super::{TILE_COLS, TILE_ROWS};
use crate::ptx;

/// Words of a tile.
pub(super) const TILE_WORDS: usize = (TILE_ROWS * TILE_COLS / 8) as usize;

/// The matrix in device memory.
#[derive(Clone, Copy)]
pub(super) struct Weights {
    pub quants: *const u32,
    pub scales: *const u32,
    /// Anything where the format has none.
    pub mins: *const u32,
}

impl Weights {
    /// A lane's first four words of a tile; the others are 128 words on.
    #[inline(always)]
    pub fn words(&self, place: &Place, tile: u32) -> *const u32 {
        let word = tile as usize * TILE_WORDS + place.lane as usize * 4;
        self.quants.wrapping_add(word)
    }

    /// Index of a lane's first pair of scales of a tile.
    #[inline(always)]
    pub fn pair<const GROUP: u32>(&self, place: &Place, tile: u32) -> usize {
        let groups = (TILE_COLS / GROUP) as usize;
        (tile as usize * 8 + place.g as usize) * groups
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

    /// Number of the thread in its block.
    #[inline(always)]
    pub fn rank(&self) -> u32 {
        self.warp() * 32 + self.lane
    }

    #[inline(always)]
    pub fn warps(&self) -> u32 {
        self.teams * self.split
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
    /// Minima of rows g and g + 8 of a group, given its scales: what is stored, or what zeros come to.
    #[inline(always)]
    pub fn minima(&self, group: usize, scales: [f32; 2], zeros: bool) -> [f32; 2] {
        let [upper, lower] = two_floats(self.mins[group]);
        let [a, b] = if zeros { scales.map(|s| -s) } else { [1.0; 2] };
        [upper * a, lower * b]
    }

    pub const EMPTY: Slot = Slot {
        words: [[0; 4]; 2],
        scales: [0; 4],
        mins: [0; 4],
    };

    /// Starts the loads of tile `tile` of the matrix, or leaves the slot as it is if it is not there.
    ///
    /// # Safety
    /// Launched as the plan says; `tile` is one of the matrix if `there` says so.
    #[inline(always)]
    pub unsafe fn load<const GROUP: u32, const MINS: bool>(
        self,
        weights: &Weights,
        place: &Place,
        there: bool,
        tile: u32,
    ) -> Slot {
        let words = weights.words(place, tile);
        let pair = weights.pair::<GROUP>(place, tile);
        // SAFETY: a load is made only of a tile that is there.
        unsafe {
            let words = [
                ptx::ld_global_nc_v4_u32_if(there, words, self.words[0]),
                ptx::ld_global_nc_v4_u32_if(there, words.wrapping_add(128), self.words[1]),
            ];
            let scales =
                load_groups::<GROUP>(there, weights.scales.wrapping_add(pair), self.scales);
            let mut mins = self.mins;
            if MINS {
                mins = load_groups::<GROUP>(there, weights.mins.wrapping_add(pair), mins);
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
pub(in super::super) const HALVES_1024: u32 = 0x6400_6400;

/// Eight weights of two rows as halves: `1024 + q` of the low nibbles, `1024 + 16 q` of the high.
/// `halves` is [`HALVES_1024`] in a register.
#[inline(always)]
pub(in super::super) fn fragments(word: u32, halves: u32) -> [u32; 4] {
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
