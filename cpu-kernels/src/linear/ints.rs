//! Weights of 2, 4 and 8 bits by levels of 8 bits, multiplied.

use super::kernel::{Call, Product, Vector, ahead};
use super::layout::{Packed, Scales, Zero};
use super::{CHUNK_COLS, LINE_BYTES, TILE_ROWS};
use crate::levels::Levels;

/// What the sums of a group of a tile become, a number a row: `y += scale * Σ u x + offset * Σ x`.
pub(super) struct OfGroup<V: Vector> {
    pub(super) scale: V::Floats,
    /// None where level 0 is 0.
    pub(super) offset: Option<V::Floats>,
}

impl Packed {
    /// # Safety
    /// The CPU must have the instructions of `V`; the tile and the group exist.
    #[inline(always)]
    pub(super) unsafe fn of_group<V: Vector>(&self, tile: usize, group: usize) -> OfGroup<V> {
        let at = (tile * self.cols.div_ceil(self.group) + group) * TILE_ROWS;
        // SAFETY: 16 numbers of a group.
        unsafe {
            let scale = match &self.scales {
                Scales::F16(scales) => V::load_f16(scales.as_ptr().add(at)),
                Scales::F32(scales) => V::load_f32(scales.as_ptr().add(at)),
                Scales::None => V::floats(1.0),
            };
            let offset = match &self.zero {
                Zero::Level(0) => None,
                Zero::Level(level) => Some(V::mul(scale, V::floats(-level as f32))),
                Zero::Levels(zeros) => {
                    let zeros = V::load_f16(zeros.as_ptr().add(at));
                    Some(V::mul(V::mul(scale, zeros), V::floats(-1.0)))
                }
                Zero::Mins(mins) => Some(V::load_f16(mins.as_ptr().add(at))),
            };
            OfGroup { scale, offset }
        }
    }
}

/// Sums that are kept apart where products of many chunks are added up.
const CHAINS: usize = 4;

/// Weights of `BITS` bits, or pairs of two.
pub(super) struct Bytes<'a, const BITS: usize, const PAIRS: bool> {
    pub(super) call: &'a Call<'a>,
    pub(super) x: Levels<'a>,
}

impl<const BITS: usize, const PAIRS: bool> Bytes<'_, BITS, PAIRS> {
    /// [`Vector::dots`] of a chunk in either order.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn dots<V: Vector, const T: usize>(
        lines: *const u8,
        levels: [*const i8; T],
        sums: [V::Ints; T],
    ) -> [V::Ints; T] {
        // SAFETY: the caller's contract.
        let [sums] = unsafe {
            match PAIRS {
                true => {
                    let lines = V::by_row(lines);
                    V::dots::<BITS, T, 1>(lines.as_ptr().cast(), [levels], [sums])
                }
                false => V::dots::<BITS, T, 1>(lines, [levels], [sums]),
            }
        };
        sums
    }
}

impl<const BITS: usize, const PAIRS: bool> Product for Bytes<'_, BITS, PAIRS> {
    #[inline(always)]
    unsafe fn sums<V: Vector, const T: usize>(&self, tile: usize, token: usize) -> [V::Floats; T] {
        let w = self.call.w;
        let (chunks, groups) = (w.cols / CHUNK_COLS, w.cols.div_ceil(w.group));
        let mut scales = [0.0; T];
        let mut sums: [&[i32]; T] = [&[]; T];
        for t in 0..T {
            let x = self.x.token(token + t);
            (scales[t], sums[t]) = (x.scales[0], &x.sums[..chunks]);
        }
        let zero_level = match w.zero {
            Zero::Level(level) => level,
            Zero::Mins(_) | Zero::Levels(_) => 0,
        };
        // One pointer for all tokens: that many would not fit the registers.
        let stride = self.x.token_bytes();
        let mut levels = self.x.bytes(token).as_ptr();
        let of = |levels: *const i8| -> [*const i8; T] {
            std::array::from_fn(|t| levels.wrapping_add(t * stride))
        };
        // SAFETY: chunk `chunk < chunks` of a tile of the matrix and of each token; 16 numbers of a group.
        unsafe {
            let mut lines: *const u8 = w.quants.as_ptr().add(tile * chunks * BITS).cast();
            let mut y = [V::floats(0.0); T];
            let mut chunk = 0;
            for group in 0..groups {
                let end = ((group + 1) * (w.group / CHUNK_COLS)).min(chunks);
                // Of scale times level, without the scale of the weights.
                let mut total = [0.0f32; T];
                // A chain of additions alone would wait for itself; those of many tokens hardly do.
                let used = if T < CHAINS { CHAINS } else { 2 };
                let mut chains = [[V::ints(0); T]; CHAINS];
                for t in 0..T {
                    let sum: i32 = sums[t].get_unchecked(chunk..end).iter().sum();
                    chains[0][t] = V::ints(-zero_level * sum);
                    total[t] = scales[t] * sum as f32;
                }
                while chunk < end {
                    for ints in chains.iter_mut().take(used.min(end - chunk)) {
                        ahead::<BITS>(lines);
                        *ints = Self::dots::<V, T>(lines, of(levels), *ints);
                        levels = levels.wrapping_add(CHUNK_COLS);
                        lines = lines.wrapping_add(BITS * LINE_BYTES);
                    }
                    chunk += used;
                }
                chunk = end;
                let mut ints = chains[0];
                for chain in &chains[1..used] {
                    for t in 0..T {
                        ints[t] = V::add(ints[t], chain[t]);
                    }
                }
                let of_row = w.of_group::<V>(tile, group);
                for t in 0..T {
                    let scale = V::floats(scales[t]);
                    let in_group = V::mul_add(V::to_floats(ints[t]), scale, V::floats(0.0));
                    y[t] = V::mul_add(in_group, of_row.scale, y[t]);
                }
                // A level's zero is among the integers.
                if let Some(offset) = of_row.offset
                    && zero_level == 0
                {
                    for t in 0..T {
                        y[t] = V::mul_add(offset, V::floats(total[t]), y[t]);
                    }
                }
            }
            y
        }
    }
}
