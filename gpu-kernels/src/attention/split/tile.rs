//! A tile of 16 positions: its loads and both products.

use cuda_std::shared::Shared;
use cuda_std::{thread, warp};

use super::layout::Layout;
use super::{Place, TILE, WARPS};
use crate::product::mma_k16;
use crate::ptx;
use crate::unroll::unroll;

/// Selectors of `prmt`: the low or the high half of each of two words.
const LOW_HALVES: u32 = 0x5410;
const HIGH_HALVES: u32 = 0x7632;

/// The rows of one kv head's cache.
#[derive(Clone, Copy)]
pub struct Rows {
    /// Position 0.
    pub base: *const u16,
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
/// Values of a tile: a load of 8 elements for each 64, of the positions 2t, 2t + 1, 2t + 8, 2t + 9.
pub type Values<const NV: usize> = [[[u32; 4]; 4]; NV];
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

/// The loads from block `first` of 64 elements on.
///
/// # Safety
/// As [`Rows::eight`].
#[inline(always)]
pub unsafe fn load_values<const NV: usize>(
    rows: &Rows,
    tile: u32,
    first: usize,
    at: Place,
) -> Values<NV> {
    let mut values = [[[0; 4]; 4]; NV];
    let position = tile * TILE + 2 * at.t;
    unroll!(B < NV => {
        let d = 64 * (first + B) as u32 + 8 * at.g;
        // SAFETY: any position and element will do.
        unsafe {
            values[B][0] = rows.eight(position, d);
            values[B][1] = rows.eight(position + 1, d);
            values[B][2] = rows.eight(position + 8, d);
            values[B][3] = rows.eight(position + 9, d);
        }
    });
    values
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

/// Adds the weighted values of the blocks of 64 elements from `first`, a constant, on.
#[inline(always)]
pub fn add_values<const N: usize, const NV: usize>(
    sums: &mut Sums<NV>,
    weights: [u32; 4],
    values: &Values<N>,
    first: usize,
) {
    unroll!(B < N => {
        unroll!(W < 4 => {
            let words = [values[B][0][W], values[B][1][W], values[B][2][W], values[B][3][W]];
            let low = [
                ptx::permute_bytes(words[0], words[1], LOW_HALVES),
                ptx::permute_bytes(words[2], words[3], LOW_HALVES),
            ];
            let high = [
                ptx::permute_bytes(words[0], words[1], HIGH_HALVES),
                ptx::permute_bytes(words[2], words[3], HIGH_HALVES),
            ];
            let block = &mut sums[first + B];
            block[2 * W] = mma_k16(weights, low, block[2 * W]);
            block[2 * W + 1] = mma_k16(weights, high, block[2 * W + 1]);
        });
    });
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
