//! Weights of 2, 4 and 8 bits, multiplied.

use super::kernel::{Call, Product, Vector, ahead};
use super::layout::{Packed, Scales, Zero};
use super::{CHUNK_COLS, LINE_BYTES, TILE_ROWS};
use crate::levels::Levels;

/// What a group's offset is made of.
enum Offset {
    /// The scale, times minus a level.
    Level,
    /// A minimum.
    Min,
    /// The scale, times minus a zero.
    Zero,
}

/// What the sums of a group of a tile become, a number a row: `y += scale * Σ u x + offset * Σ x`.
struct OfGroup<V: Vector> {
    scale: V::Floats,
    /// None where level 0 is 0.
    offset: Option<V::Floats>,
}

impl Packed {
    /// # Safety
    /// The CPU must have the instructions of `V`; the tile and the group exist.
    #[inline(always)]
    unsafe fn of_group<V: Vector>(&self, tile: usize, group: usize) -> OfGroup<V> {
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

/// Weights of `BITS` bits, or pairs of two, by levels of `PLANES` bytes.
pub(super) struct Ints<'a, const BITS: usize, const PLANES: usize, const PAIRS: bool> {
    pub(super) call: &'a Call<'a>,
    pub(super) x: Levels<'a>,
}

impl<const BITS: usize, const PLANES: usize, const PAIRS: bool> Ints<'_, BITS, PLANES, PAIRS> {
    /// [`Vector::dots`] of a chunk in either order.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn dots<V: Vector, const T: usize>(
        lines: *const u8,
        levels: [[*const i8; T]; PLANES],
        sums: [[V::Ints; T]; PLANES],
    ) -> [[V::Ints; T]; PLANES] {
        // SAFETY: the caller's contract.
        unsafe {
            match PAIRS {
                true => {
                    let lines = V::by_row(lines);
                    V::dots::<BITS, T, PLANES>(lines.as_ptr().cast(), levels, sums)
                }
                false => V::dots::<BITS, T, PLANES>(lines, levels, sums),
            }
        }
    }
}

impl<const BITS: usize, const PLANES: usize, const PAIRS: bool> Product
    for Ints<'_, BITS, PLANES, PAIRS>
{
    #[inline(always)]
    unsafe fn sums<V: Vector, const T: usize>(&self, tile: usize, token: usize) -> [V::Floats; T] {
        let w = self.call.w;
        let (chunks, groups) = (w.cols / CHUNK_COLS, w.cols.div_ceil(w.group));
        let mut scales: [&[f32]; T] = [&[]; T];
        let mut totals: [&[f32]; T] = [&[]; T];
        let mut level_sums: [&[i32]; T] = [&[]; T];
        for t in 0..T {
            let x = self.x.token(token + t);
            scales[t] = &x.scales[..chunks];
            (totals[t], level_sums[t]) = (&x.totals[..chunks], &x.sums[..chunks]);
        }
        let zero_level = match w.zero {
            Zero::Level(level) => level,
            Zero::Mins(_) | Zero::Levels(_) => 0,
        };
        // One pointer for all tokens and planes: that many would not fit the registers.
        let stride = self.x.token_bytes();
        let mut levels = self.x.bytes(token).as_ptr();
        let of = |levels: *const i8| -> [[*const i8; T]; PLANES] {
            std::array::from_fn(|plane| {
                std::array::from_fn(|t| levels.wrapping_add(plane * w.cols + t * stride))
            })
        };
        // SAFETY: chunk `chunk < chunks` of a tile of the matrix and of each token; 16 numbers of a group.
        unsafe {
            let mut lines: *const u8 = w.quants.as_ptr().add(tile * chunks * BITS).cast();
            let mut y = [V::floats(0.0); T];
            let mut chunk = 0;
            if PLANES == 2
                && w.group == CHUNK_COLS
                && let Scales::F16(of_rows) = &w.scales
            {
                let of_rows = of_rows[tile * chunks * TILE_ROWS..].as_ptr();
                let (kind, offsets) = match &w.zero {
                    Zero::Level(_) => (Offset::Level, of_rows),
                    Zero::Mins(mins) => (Offset::Min, mins[tile * chunks * TILE_ROWS..].as_ptr()),
                    Zero::Levels(zeros) => {
                        (Offset::Zero, zeros[tile * chunks * TILE_ROWS..].as_ptr())
                    }
                };
                // What an offset is of: nothing in the loop may branch, or loads of all levels are moved ahead of
                // the branch, out of the registers.
                let zero_level = V::floats(-zero_level as f32);
                macro_rules! chunks {
                    ($kind:expr) => {
                        for chunk in 0..chunks {
                            if T == 1 {
                                ahead::<BITS>(lines);
                            }
                            let zeros = [[V::ints(0); T]; PLANES];
                            let ints = Self::dots::<V, T>(lines, of(levels), zeros);
                            let of_row = V::load_f16(of_rows.add(chunk * TILE_ROWS));
                            let offset = match $kind {
                                Offset::Level => V::mul(of_row, zero_level),
                                Offset::Min => V::load_f16(offsets.add(chunk * TILE_ROWS)),
                                Offset::Zero => {
                                    let zero = V::load_f16(offsets.add(chunk * TILE_ROWS));
                                    V::mul(V::mul(of_row, zero), V::floats(-1.0))
                                }
                            };
                            for t in 0..T {
                                let dot = V::to_floats(V::join(ints[0][t], ints[PLANES - 1][t]));
                                let scale = V::floats(*scales[t].get_unchecked(chunk));
                                let total = V::floats(*totals[t].get_unchecked(chunk));
                                y[t] = V::mul_add(dot, V::mul(of_row, scale), y[t]);
                                y[t] = V::mul_add(offset, total, y[t]);
                            }
                            levels = levels.wrapping_add(CHUNK_COLS);
                            lines = lines.wrapping_add(BITS * LINE_BYTES);
                        }
                    };
                }
                match kind {
                    Offset::Level => chunks!(Offset::Level),
                    Offset::Min => chunks!(Offset::Min),
                    Offset::Zero => chunks!(Offset::Zero),
                }
                return y;
            }
            for group in 0..groups {
                let end = ((group + 1) * (w.group / CHUNK_COLS)).min(chunks);
                // Of scale times dot, and of scale times level, without the scale of the weights.
                let mut in_group = [V::floats(0.0); T];
                let mut total = [0.0f32; T];
                if PLANES == 2 {
                    while chunk < end {
                        if T == 1 {
                            ahead::<BITS>(lines);
                        }
                        let zeros = [[V::ints(0); T]; PLANES];
                        let ints = Self::dots::<V, T>(lines, of(levels), zeros);
                        for t in 0..T {
                            let scale = V::floats(*scales[t].get_unchecked(chunk));
                            let dot = V::to_floats(V::join(ints[0][t], ints[PLANES - 1][t]));
                            in_group[t] = V::mul_add(dot, scale, in_group[t]);
                            total[t] += *totals[t].get_unchecked(chunk);
                        }
                        levels = levels.wrapping_add(CHUNK_COLS);
                        lines = lines.wrapping_add(BITS * LINE_BYTES);
                        chunk += 1;
                    }
                } else {
                    // A chain of additions alone would wait for itself; those of many tokens hardly do.
                    let used = if T < CHAINS { CHAINS } else { 2 };
                    let mut chains = [[[V::ints(0); T]; PLANES]; CHAINS];
                    for t in 0..T {
                        let sum: i32 = level_sums[t].get_unchecked(chunk..end).iter().sum();
                        chains[0][0][t] = V::ints(-zero_level * sum);
                        total[t] = scales[t][0] * sum as f32;
                    }
                    while chunk < end {
                        for ints in chains.iter_mut().take(used.min(end - chunk)) {
                            if T == 1 {
                                ahead::<BITS>(lines);
                            }
                            *ints = Self::dots::<V, T>(lines, of(levels), *ints);
                            levels = levels.wrapping_add(CHUNK_COLS);
                            lines = lines.wrapping_add(BITS * LINE_BYTES);
                        }
                        chunk += used;
                    }
                    chunk = end;
                    let mut ints = chains[0][0];
                    for chain in &chains[1..used] {
                        for t in 0..T {
                            ints[t] = V::add(ints[t], chain[0][t]);
                        }
                    }
                    for t in 0..T {
                        let scale = V::floats(scales[t][0]);
                        in_group[t] = V::mul_add(V::to_floats(ints[t]), scale, in_group[t]);
                    }
                }
                let of_row = w.of_group::<V>(tile, group);
                for t in 0..T {
                    y[t] = V::mul_add(in_group[t], of_row.scale, y[t]);
                }
                // Levels of 8 bits have a level's zero among their integers.
                if let Some(offset) = of_row.offset
                    && (PLANES == 2 || zero_level == 0)
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
