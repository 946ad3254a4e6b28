//! Ternary products in forms other than two bits that are multiplied. They meet levels of 8 bits, a scale a
//! token, and their integers are exact: all forms give the same bits.

use super::kernel::{Call, Product, Vector, ahead};
use super::layout::{Bits, POWERS, Packed, Scales};
use super::{CHUNK_COLS, FIVES_COLS, LINE_BYTES, STEP_COLS, TILE_ROWS, lookup};
use crate::levels::{Levels, Precision};
use crate::pages::Line;

/// Lines of pairs with their bytes by row, by plain Rust: what a chunk of two bits is.
///
/// # Safety
/// A chunk of pairs at `lines`.
#[inline(always)]
pub(super) unsafe fn by_row(lines: *const u8) -> [Line; 2] {
    std::array::from_fn(|line| {
        // SAFETY: line `line` of the chunk.
        let bytes = unsafe { &*lines.add(line * LINE_BYTES).cast::<[u8; LINE_BYTES]>() };
        Line(std::array::from_fn(|i| {
            bytes[i % STEP_COLS * TILE_ROWS + i / STEP_COLS]
        }))
    })
}

/// [`Vector::fives`] by plain Rust.
///
/// # Safety
/// A line at `line`, 20 levels at each of `levels`.
#[inline(always)]
pub(super) unsafe fn fives<const T: usize>(
    line: *const u8,
    levels: [*const i8; T],
    sums: &mut [[i32; TILE_ROWS]; T],
) {
    // SAFETY: the caller's contract.
    let line = unsafe { &*line.cast::<[u8; LINE_BYTES]>() };
    for (sums, levels) in sums.iter_mut().zip(levels) {
        // SAFETY: as above.
        let levels = unsafe { &*levels.cast::<[i8; FIVES_COLS]>() };
        for (sum, bytes) in sums.iter_mut().zip(line.as_chunks::<STEP_COLS>().0) {
            for (power, x) in POWERS.iter().zip(levels.as_chunks::<STEP_COLS>().0) {
                for (byte, x) in bytes.iter().zip(x) {
                    *sum += i32::from(byte / power % 3) * i32::from(*x);
                }
            }
        }
    }
}

/// The scales of a group of a tile of ternary weights.
fn scales(w: &Packed, tile: usize, group: usize) -> *const f32 {
    match &w.scales {
        Scales::F32(scales) => {
            let at = (tile * w.cols.div_ceil(w.group) + group) * TILE_ROWS;
            scales[at..at + TILE_ROWS].as_ptr()
        }
        Scales::None | Scales::F16(_) => unreachable!("ternary weights have f32 scales"),
    }
}

/// One token by look-up.
pub(super) struct LookUp<'a> {
    pub(super) call: &'a Call<'a>,
    pub(super) x: Levels<'a>,
    /// The token's tables.
    pub(super) tables: &'a [f32],
}

impl Product for LookUp<'_> {
    #[inline(always)]
    unsafe fn sums<V: Vector, const T: usize>(&self, tile: usize, token: usize) -> [V::Floats; T] {
        let w = self.call.w;
        assert!(
            T == 1
                && w.bits == Bits::Pairs
                && self.x.precision() == Precision::Byte
                && self.tables.len() == lookup::table_words(w.cols),
            "linear: tables of the one token of 8-bit levels"
        );
        let chunks = w.cols / CHUNK_COLS;
        let scale = self.x.token(token).scales[0];
        // SAFETY: chunks `start..end` of the tile, and of the tables; 16 scales.
        unsafe {
            let lines: *const u8 = w
                .quants
                .as_ptr()
                .add(tile * Bits::Pairs.tile_lines(w.cols))
                .cast();
            let tables: *const u8 = self.tables.as_ptr().cast();
            let mut y = V::floats(0.0);
            for group in 0..w.cols.div_ceil(w.group) {
                let start = group * (w.group / CHUNK_COLS);
                let end = (start + w.group / CHUNK_COLS).min(chunks);
                let ints = V::look_up(
                    lines.add(start * 2 * LINE_BYTES),
                    tables.add(start * 2 * lookup::TABLES_OF_LINE),
                    end - start,
                );
                let in_group = V::mul_add(V::to_floats(ints), V::floats(scale), V::floats(0.0));
                y = V::mul_add(in_group, V::load_f32(scales(w, tile, group)), y);
            }
            [y; T]
        }
    }
}

/// Five weights a byte.
pub(super) struct Fives<'a> {
    pub(super) call: &'a Call<'a>,
    pub(super) x: Levels<'a>,
}

/// Sums that are kept apart for one token.
const CHAINS: usize = 4;

impl Product for Fives<'_> {
    #[inline(always)]
    unsafe fn sums<V: Vector, const T: usize>(&self, tile: usize, token: usize) -> [V::Floats; T] {
        let w = self.call.w;
        assert!(
            w.bits == Bits::Fives && self.x.precision() == Precision::Byte,
            "linear: five weights a byte meet levels of 8 bits"
        );
        let lines = Bits::Fives.tile_lines(w.cols);
        let used = if T == 1 { CHAINS } else { 1 };
        // SAFETY: the CPU has what `V` needs; so for all below.
        let mut chains = [[unsafe { V::ints(0) }; T]; CHAINS];
        let mut levels: [*const i8; T] = std::array::from_fn(|t| self.x.bytes(token + t).as_ptr());
        for (t, ints) in chains[0].iter_mut().enumerate() {
            let sum: i32 = self.x.token(token + t).sums.iter().sum();
            // SAFETY: as above. Level 1 is 0.
            *ints = unsafe { V::ints(-sum) };
        }
        // SAFETY: lines of the tile. The last one's columns may go beyond the matrix, by less than 20: a
        // token's levels are followed by a plane as long, and what is read of it meets zeros.
        unsafe {
            let mut line: *const u8 = w.quants.as_ptr().add(tile * lines).cast();
            let mut done = 0;
            while done < lines {
                for ints in chains.iter_mut().take(used.min(lines - done)) {
                    if T == 1 {
                        ahead::<1>(line);
                    }
                    *ints = V::fives::<T>(line, levels, *ints);
                    levels = levels.map(|levels| levels.wrapping_add(FIVES_COLS));
                    line = line.wrapping_add(LINE_BYTES);
                }
                done += used;
            }
            std::array::from_fn(|t| {
                let ints = chains
                    .iter()
                    .skip(1)
                    .fold(chains[0][t], |sum, ints| V::add(sum, ints[t]));
                let scale = V::floats(self.x.token(token + t).scales[0]);
                let in_row = V::mul_add(V::to_floats(ints), scale, V::floats(0.0));
                V::mul_add(in_row, V::load_f32(scales(w, tile, 0)), V::floats(0.0))
            })
        }
    }
}
