//! A tile of 16 positions: its loads and both products.

use cuda_std::shared::Shared;
use cuda_std::{thread, warp};

use super::layout::Layout;
use super::{Place, TILE, WARPS};
use crate::product::{even_bytes_to_f16x2, mma_k16};
use crate::ptx;
use crate::unroll::unroll;

/// Selectors of `prmt`: the low or the high half of each of two words.
const LOW_HALVES: u32 = 0x5410;
const HIGH_HALVES: u32 = 0x7632;

/// The rows of one kv head's cache.
#[derive(Clone, Copy)]
pub struct Rows {
    /// Position 0: halves, or bytes.
    pub base: *const u16,
    /// A scale a position, for bytes.
    pub scales: *const u16,
    pub head_dim: u32,
    /// Positions that are filled.
    pub keys: u32,
}

impl Rows {
    /// Eight elements from `d` on of row `position`. What is past the end of either is replaced by
    /// the last there is: it has to be a number, as it is multiplied by 0.
    ///
    /// # Safety
    /// The cache holds `keys` rows.
    #[inline(always)]
    unsafe fn eight(&self, position: u32, d: u32) -> [u32; 4] {
        let row = position.min(self.keys - 1) * self.head_dim;
        let elems = self
            .base
            .wrapping_add((row + d.min(self.head_dim - 8)) as usize);
        // SAFETY: row and elements are clamped; both are multiples of 16 bytes from the base.
        unsafe { ptx::ld_global_once_v4_u32(elems.cast()) }
    }
}

impl Rows {
    /// As [`Rows::eight`], of rows of bytes.
    ///
    /// # Safety
    /// The cache holds `keys` rows.
    #[inline(always)]
    unsafe fn eight_bytes(&self, position: u32, d: u32) -> [u32; 2] {
        let row = position.min(self.keys - 1) * self.head_dim;
        let bytes = self.base.cast::<u8>();
        let from = bytes.wrapping_add((row + d.min(self.head_dim - 8)) as usize);
        // SAFETY: row and elements are clamped; both are multiples of 8 bytes from the base.
        unsafe { ptx::ld_global_once_v2_u32(from.cast()) }
    }

    /// The scale of a position, as it is stored: converting it waits for the load.
    ///
    /// # Safety
    /// The cache holds `keys` rows.
    #[inline(always)]
    unsafe fn scale(&self, position: u32) -> u16 {
        let from = self
            .scales
            .wrapping_add(position.min(self.keys - 1) as usize);
        // SAFETY: the position is clamped.
        unsafe { ptx::ld_global_u16(from) }
    }
}

/// What two halves lack of the floats that they were rounded from, as halves.
#[inline(always)]
pub fn pack_rest(low: f32, high: f32, halves: u32) -> u32 {
    ptx::f32x2_to_f16x2(
        low - ptx::f16_to_f32(halves as u16),
        high - ptx::f16_to_f32((halves >> 16) as u16),
    )
}

/// Keys of a tile: positions g and g + 8, a load of 8 elements for each 32.
pub type Keys<const NK: usize> = [[[u32; 4]; NK]; 2];
/// Weighted sums: `[b][j]` is a product's result for the elements 64b + 8 (2t) + j and
/// 64b + 8 (2t + 1) + j, high parts, then low.
pub type Sums<const NV: usize> = [[[f32; 4]; 8]; NV];

/// The loads from number `first` on.
///
/// # Safety
/// As [`Rows::eight`].
#[inline(always)]
pub unsafe fn load_keys<const N: usize>(
    rows: &Rows,
    tile: u32,
    first: usize,
    at: Place,
) -> Keys<N> {
    let mut keys = [[[0; 4]; N]; 2];
    let position = tile * TILE + at.g;
    unroll!(I < N => {
        let d = 32 * (first + I) as u32 + 8 * at.t;
        // SAFETY: any position and element will do.
        unsafe {
            keys[0][I] = rows.eight(position, d);
            keys[1][I] = rows.eight(position + 8, d);
        }
    });
    keys
}

/// Adds the scores over the elements of the key loads from number `first` on: of head g at the
/// positions 2t, 2t + 1, then at 2t + 8, 2t + 9, high parts, then low.
///
/// # Safety
/// q is staged.
#[inline(always)]
pub unsafe fn add_scores<const N: usize>(
    sums: &mut [[f32; 4]; 2],
    keys: &Keys<N>,
    first: usize,
    smem: Shared,
    layout: Layout,
) {
    let lane = warp::lane_id();
    unroll!(I < N => {
        unroll!(H < 2 => {
            let step = (2 * (first + I) + H) as u32;
            // SAFETY: the step is one of those that are staged.
            let q = unsafe { ptx::ld_shared_v4_f32(smem, layout.query(step, lane)) };
            let q = [q[0].to_bits(), q[1].to_bits(), q[2].to_bits(), q[3].to_bits()];
            let near = [keys[0][I][2 * H], keys[0][I][2 * H + 1]];
            let far = [keys[1][I][2 * H], keys[1][I][2 * H + 1]];
            sums[0] = mma_k16(q, near, sums[0]);
            sums[1] = mma_k16(q, far, sums[1]);
        });
    });
}

/// Values of a tile, of `N` blocks of 64 elements.
pub trait Values<const N: usize>: Copy {
    /// Nothing fetched yet.
    const NONE: Self;

    /// Fetches the blocks from `first` on.
    ///
    /// # Safety
    /// The rows are of this kind of values.
    unsafe fn load(rows: &Rows, tile: u32, first: usize, at: Place) -> Self;

    /// What the values count, from the weights of the positions 2t, 2t + 1, 2t + 8, 2t + 9.
    fn weigh(&self, weights: [f32; 4]) -> [f32; 4];

    /// Adds the weighted values of the blocks from `first`, a constant, on.
    fn add<const NV: usize>(&self, sums: &mut Sums<NV>, weights: [u32; 4], first: usize);
}

/// Halves: a load of 8 elements for each 64, of the positions 2t, 2t + 1, 2t + 8, 2t + 9.
#[derive(Clone, Copy)]
pub struct Halves<const N: usize>([[[u32; 4]; 4]; N]);

impl<const N: usize> Values<N> for Halves<N> {
    const NONE: Self = Halves([[[0; 4]; 4]; N]);

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    unsafe fn load(rows: &Rows, tile: u32, first: usize, at: Place) -> Self {
        let mut values = Self::NONE;
        let position = tile * TILE + 2 * at.t;
        unroll!(B < N => {
            let d = 64 * (first + B) as u32 + 8 * at.g;
            unroll!(P < 4 => {
                // SAFETY: any position and element will do.
                values.0[B][P] = unsafe { rows.eight(position + near_or_far(P), d) };
            });
        });
        values
    }

    #[inline(always)]
    fn weigh(&self, weights: [f32; 4]) -> [f32; 4] {
        weights
    }

    #[inline(always)]
    fn add<const NV: usize>(&self, sums: &mut Sums<NV>, weights: [u32; 4], first: usize) {
        unroll!(B < N => {
            let [a, b, c, d] = self.0[B];
            unroll!(W < 4 => {
                let pairs = |selector| [
                    ptx::permute_bytes(a[W], b[W], selector),
                    ptx::permute_bytes(c[W], d[W], selector),
                ];
                let block = &mut sums[first + B];
                block[2 * W] = mma_k16(weights, pairs(LOW_HALVES), block[2 * W]);
                block[2 * W + 1] = mma_k16(weights, pairs(HIGH_HALVES), block[2 * W + 1]);
            });
        });
    }
}

/// Signed bytes with a scale a position, which goes to the weight: a load of 8 elements for each
/// 64, of the same positions.
#[derive(Clone, Copy)]
pub struct Bytes<const N: usize> {
    words: [[[u32; 2]; 4]; N],
    scales: [u16; 4],
}

impl<const N: usize> Values<N> for Bytes<N> {
    const NONE: Self = Bytes {
        words: [[[0; 2]; 4]; N],
        scales: [0; 4],
    };

    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    unsafe fn load(rows: &Rows, tile: u32, first: usize, at: Place) -> Self {
        let mut values = Self::NONE;
        let position = tile * TILE + 2 * at.t;
        // SAFETY: any position and element will do.
        unsafe {
            unroll!(P < 4 => { values.scales[P] = rows.scale(position + near_or_far(P)); });
            unroll!(B < N => {
                let d = 64 * (first + B) as u32 + 8 * at.g;
                unroll!(P < 4 => {
                    values.words[B][P] = rows.eight_bytes(position + near_or_far(P), d);
                });
            });
        }
        values
    }

    #[inline(always)]
    fn weigh(&self, weights: [f32; 4]) -> [f32; 4] {
        let scales = self.scales.map(ptx::f16_to_f32);
        [
            weights[0] * scales[0],
            weights[1] * scales[1],
            weights[2] * scales[2],
            weights[3] * scales[3],
        ]
    }

    #[inline(always)]
    fn add<const NV: usize>(&self, sums: &mut Sums<NV>, weights: [u32; 4], first: usize) {
        unroll!(B < N => {
            let [a, b, c, d] = self.words[B];
            unroll!(W < 2 => {
                unroll!(E < 4 => {
                    // Byte E of either position, to the even bytes.
                    let selector = (E | (4 + E) << 8) as u32;
                    let pairs = [
                        even_bytes_to_f16x2(ptx::permute_bytes(a[W], b[W], selector)),
                        even_bytes_to_f16x2(ptx::permute_bytes(c[W], d[W], selector)),
                    ];
                    let sum = &mut sums[first + B][4 * W + E];
                    *sum = mma_k16(weights, pairs, *sum);
                });
            });
        });
    }
}

/// Where a lane's four positions are from 2t on.
#[inline(always)]
const fn near_or_far(number: usize) -> u32 {
    (number % 2 + number / 2 * 8) as u32
}

/// A thread's share of q: what it stages.
pub struct Query<const NK: usize> {
    quads: [[f32; 4]; 2],
}

/// Threads of a block.
const THREADS: u32 = WARPS * 32;

impl<const NK: usize> Query<NK> {
    /// Items of four elements: one a step and lane of the scores.
    const ITEMS: u32 = NK as u32 * 64;
    const TWO_A_THREAD: bool = {
        assert!(Self::ITEMS <= 2 * THREADS);
        Self::ITEMS > THREADS
    };

    /// Step, lane and first element of the thread's items: step 2i + h of the scores takes the
    /// elements 32i + 8t + 4h .. +4 of head g.
    #[inline(always)]
    fn item(number: u32) -> (u32, u32, u32) {
        let item = thread::thread_idx_x() + number * THREADS;
        let (step, lane) = (item / 32, item % 32);
        (
            step,
            lane,
            32 * (step / 2) + 8 * (lane % 4) + 4 * (step % 2),
        )
    }

    /// Fetches them; zeros stand in for heads and elements that there are not.
    ///
    /// # Safety
    /// `query` holds `heads` rows of `head_dim`.
    #[inline(always)]
    pub unsafe fn load(query: *const f32, heads: u32, head_dim: u32) -> Query<NK> {
        let mut quads = [[0.0; 4]; 2];
        unroll!(I < 2 => {
            if I == 0 || Self::TWO_A_THREAD {
                let (step, lane, d) = Self::item(I as u32);
                let g = lane / 4;
                let there = step < 2 * NK as u32 && g < heads && d < head_dim;
                let from = query.wrapping_add((g * head_dim + d) as usize);
                // SAFETY: the elements are in the row; widths are multiples of 4.
                quads[I] = unsafe { ptx::ld_global_v4_f32_if(there, from, [0.0; 4]) };
            }
        });
        Query { quads }
    }

    /// Stages them, the two halves of each pair in a register, high parts and low parts
    /// alternating.
    ///
    /// # Safety
    /// All threads call it; the caller puts a barrier before the first use.
    #[inline(always)]
    pub unsafe fn stage(&self, smem: Shared, layout: Layout) {
        unroll!(I < 2 => {
            let (step, lane, _) = Self::item(I as u32);
            if (I == 0 || Self::TWO_A_THREAD) && step < 2 * NK as u32 {
                let q = self.quads[I];
                let halves = [
                    ptx::f32x2_to_f16x2(q[0], q[1]),
                    ptx::f32x2_to_f16x2(q[2], q[3]),
                ];
                let words = [
                    halves[0],
                    pack_rest(q[0], q[1], halves[0]),
                    halves[1],
                    pack_rest(q[2], q[3], halves[1]),
                ];
                let words = words.map(f32::from_bits);
                // SAFETY: the item's slot.
                unsafe { ptx::st_shared_v4_f32(smem, layout.query(step, lane), words) };
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_halves_hold_22_bits() {
        let x = [core::f32::consts::PI, -1.0 / 3.0];
        let high = ptx::f32x2_to_f16x2(x[0], x[1]);
        let low = pack_rest(x[0], x[1], high);
        for (i, x) in x.into_iter().enumerate() {
            let part = |word: u32| ptx::f16_to_f32((word >> (16 * i)) as u16);
            assert!((part(high) + part(low) - x).abs() <= x.abs() * 2f32.powi(-22));
        }
    }
}
