//! Weights of 2, 4 and 8 bits by levels of 16 bits, multiplied.

use half::f16;

use super::kernel::{Call, Product, Vector, ahead};
use super::layout::{Packed, Scales, Zero};
use super::{CHUNK_COLS, LINE_BYTES, TILE_ROWS};
use crate::levels::{Levels, Record};

/// What the offset of a group is: a parameter, as nothing in a loop over chunks may branch; loads of all levels
/// would be moved ahead of the branch, out of the registers.
type Offset = u8;
/// None: zero is level 8, and among the integers.
const CENTRE: Offset = 0;
/// The scale, times minus a level.
const LEVEL: Offset = 1;
/// A minimum.
const MIN: Offset = 2;
/// The scale, times minus a zero.
const ZERO: Offset = 3;

/// Weights of `BITS` bits.
pub(super) struct Words<'a, const BITS: usize> {
    pub(super) call: &'a Call<'a>,
    pub(super) x: Levels<'a>,
}

impl<const BITS: usize> Product for Words<'_, BITS> {
    #[inline(always)]
    unsafe fn sums<V: Vector, const T: usize>(&self, tile: usize, token: usize) -> [V::Floats; T] {
        let w = self.call.w;
        let chunks = w.cols / CHUNK_COLS;
        let (records, stride) = self.x.records(token);
        assert!(
            (chunks - 1) * stride + T <= records.len(),
            "linear: {T} tokens from {token} on"
        );
        let is_centred = BITS == 4 && w.zero == Zero::Level(8);
        // SAFETY: `chunks` chunks of a tile of the matrix and of each token.
        unsafe {
            let tile = Tile::<BITS> {
                w,
                tile,
                chunks,
                lines: w.quants.as_ptr().add(tile * chunks * BITS).cast(),
                records: records.as_ptr(),
                stride,
            };
            match (&w.scales, &w.zero) {
                (Scales::F16(scales), zero) if w.group == CHUNK_COLS => match zero {
                    Zero::Level(_) if is_centred => tile.by_chunk::<V, T, CENTRE>(scales, scales),
                    Zero::Level(_) => tile.by_chunk::<V, T, LEVEL>(scales, scales),
                    Zero::Mins(mins) => tile.by_chunk::<V, T, MIN>(scales, mins),
                    Zero::Levels(zeros) => tile.by_chunk::<V, T, ZERO>(scales, zeros),
                },
                _ if is_centred => tile.by_group::<V, T, true>(),
                _ => tile.by_group::<V, T, false>(),
            }
        }
    }
}

/// A tile of a matrix, and the levels that it meets.
struct Tile<'a, const BITS: usize> {
    w: &'a Packed,
    tile: usize,
    chunks: usize,
    lines: *const u8,
    records: *const Record,
    /// Records from a chunk to the next.
    stride: usize,
}

impl<const BITS: usize> Tile<'_, BITS> {
    /// Sums for `T` tokens, where every chunk has f16 scales of its own: `scales` `(tiles, chunks, 16)`, and what
    /// its offset is made of, `offsets`, the same.
    ///
    /// # Safety
    /// The CPU must have the instructions of `V`; tile and levels exist.
    #[inline(always)]
    unsafe fn by_chunk<V: Vector, const T: usize, const OFFSET: Offset>(
        &self,
        scales: &[f16],
        offsets: &[f16],
    ) -> [V::Floats; T] {
        let of_tile = self.tile * self.chunks * TILE_ROWS;
        let (mut lines, mut records) = (self.lines, self.records);
        // SAFETY: the caller's contract.
        unsafe {
            let (scales, offsets) = (scales[of_tile..].as_ptr(), offsets[of_tile..].as_ptr());
            let minus_level = match self.w.zero {
                Zero::Level(level) => V::floats(-level as f32),
                Zero::Mins(_) | Zero::Levels(_) => V::floats(-1.0),
            };
            let mut y = [V::floats(0.0); T];
            for chunk in 0..self.chunks {
                ahead::<BITS>(lines);
                let ints = match OFFSET {
                    CENTRE => V::words::<BITS, T, true>(lines, records),
                    _ => V::words::<BITS, T, false>(lines, records),
                };
                let of_row = V::load_f16(scales.add(chunk * TILE_ROWS));
                let offset = match OFFSET {
                    CENTRE | LEVEL => V::mul(of_row, minus_level),
                    MIN => V::load_f16(offsets.add(chunk * TILE_ROWS)),
                    _ => {
                        let zero = V::load_f16(offsets.add(chunk * TILE_ROWS));
                        V::mul(V::mul(of_row, zero), minus_level)
                    }
                };
                for t in 0..T {
                    let record = records.wrapping_add(t);
                    let scale = V::mul(of_row, V::floats((*record).scale));
                    y[t] = V::mul_add(V::to_floats(ints[t]), scale, y[t]);
                    if OFFSET != CENTRE {
                        y[t] = V::mul_add(offset, V::floats((*record).total), y[t]);
                    }
                }
                records = records.wrapping_add(self.stride);
                lines = lines.wrapping_add(BITS * LINE_BYTES);
            }
            y
        }
    }

    /// Sums for `T` tokens, where groups are longer than a chunk.
    ///
    /// # Safety
    /// As [`Tile::by_chunk`].
    #[inline(always)]
    unsafe fn by_group<V: Vector, const T: usize, const CENTRED: bool>(&self) -> [V::Floats; T] {
        let (w, chunks) = (self.w, self.chunks);
        let (mut lines, mut records) = (self.lines, self.records);
        // SAFETY: the caller's contract.
        unsafe {
            let mut y = [V::floats(0.0); T];
            let mut chunk = 0;
            for group in 0..w.cols.div_ceil(w.group) {
                let end = ((group + 1) * (w.group / CHUNK_COLS)).min(chunks);
                // Of scale times dot, and of scale times level, without the scale of the weights.
                let mut in_group = [V::floats(0.0); T];
                let mut total = [0.0f32; T];
                while chunk < end {
                    ahead::<BITS>(lines);
                    let ints = V::words::<BITS, T, CENTRED>(lines, records);
                    for t in 0..T {
                        let record = records.wrapping_add(t);
                        let scale = V::floats((*record).scale);
                        in_group[t] = V::mul_add(V::to_floats(ints[t]), scale, in_group[t]);
                        if !CENTRED {
                            total[t] += (*record).total;
                        }
                    }
                    records = records.wrapping_add(self.stride);
                    lines = lines.wrapping_add(BITS * LINE_BYTES);
                    chunk += 1;
                }
                let of_row = w.of_group::<V>(self.tile, group);
                for t in 0..T {
                    y[t] = V::mul_add(in_group[t], of_row.scale, y[t]);
                }
                if !CENTRED && let Some(offset) = of_row.offset {
                    for t in 0..T {
                        y[t] = V::mul_add(offset, V::floats(total[t]), y[t]);
                    }
                }
            }
            y
        }
    }
}
