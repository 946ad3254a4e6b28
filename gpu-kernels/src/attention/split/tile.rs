//! A tile of 16 positions: its way from the cache, and both products.

use cuda_std::shared::Shared;
use cuda_std::{thread, warp};

use super::layout::Layout;
use super::{Place, TILE, WARPS};
use crate::product::{at_least_sm_80, even_bytes_to_f16x2, mma_k16};
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
    /// Eight elements of `elem_bytes` from `d` on of row `position`. What is past the end of either
    /// is replaced by the last there is: it has to be a number, as it is multiplied by 0.
    #[inline(always)]
    fn eight(&self, position: u32, d: u32, elem_bytes: u32) -> *const u32 {
        let row = position.min(self.keys - 1) * self.head_dim;
        let elem = row + d.min(self.head_dim - 8);
        self.base
            .wrapping_byte_add(elem as usize * elem_bytes as usize)
            .cast()
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

/// Bytes of eight halves.
const KEY_BYTES: u32 = 16;

/// A warp's tiles. From sm_80 on they are copied ahead to the warp's part of shared memory; `depth`
/// tiles are under way. Before, they are loaded where they are used.
///
/// ```text
/// a tile in the ring: 16 rows of keys, 4 NK chunks each; 4 NV chunks of values a lane
/// chunk: 8 elements   chunk c of keys in row r is at c ^ 4 (r % 2), where rows fill whole lines of banks
/// ```
///
/// Keys are copied row by row, 512 bytes in one piece, and taken by other lanes than those that copied
/// them; values each lane copies itself, in pieces of 128 bytes.
#[derive(Clone, Copy)]
pub struct Feed {
    pub keys: Rows,
    pub values: Rows,
    pub at: Place,
    pub smem: Shared,
    /// Offset of the warp's ring.
    pub ring: u32,
}

/// Bytes of a tile in the ring, with values of `value_bytes` an element.
pub const fn tile_bytes(key_loads: u32, value_loads: u32, value_bytes: u32) -> u32 {
    32 * (2 * key_loads * KEY_BYTES + 4 * value_loads * 8 * value_bytes)
}

impl Feed {
    /// Where a chunk of a row of keys is in the tile at `slot`.
    #[inline(always)]
    fn key_chunk<const NK: usize>(&self, slot: u32, row: u32, chunk: u32) -> u32 {
        let swapped = if NK.is_multiple_of(2) { row % 2 * 4 } else { 0 };
        self.ring + slot + (row * 4 * NK as u32 + (chunk ^ swapped)) * KEY_BYTES
    }

    /// The same of values of type V, which are behind the keys.
    #[inline(always)]
    fn value_chunk<const NK: usize, V: Values>(&self, slot: u32, chunk: u32) -> u32 {
        let values = self.ring + slot + 2 * NK as u32 * 32 * KEY_BYTES;
        values + (chunk * 32 + warp::lane_id()) * 8 * V::ELEM_BYTES
    }

    /// Starts to copy a tile. Lanes see each other's keys after a wait and a barrier of the warp.
    ///
    /// # Safety
    /// The cache holds the tile's rows, as far as there are `keys` of them; the warp has used up what
    /// was in the slot.
    #[inline(always)]
    pub unsafe fn copy<const NK: usize, const NV: usize, V: Values>(&self, tile: u32, slot: u32) {
        // SAFETY: rows and elements are clamped, aligned as the loads are wide; the lane's chunks are
        // its own.
        unsafe {
            let chunks = 4 * NK as u32;
            unroll!(R < 2 => {
                unroll!(I < NK => {
                    let number = 32 * (R * NK + I) as u32 + warp::lane_id();
                    let (row, chunk) = (number / chunks, number % chunks);
                    let from = self.keys.eight(tile * TILE + row, 8 * chunk, 2);
                    let to = self.key_chunk::<NK>(slot, row, chunk);
                    ptx::cp_async_16_onward(self.smem, to, from);
                });
            });
            let position = tile * TILE + 2 * self.at.t;
            unroll!(P < 4 => {
                unroll!(B < NV => {
                    let d = 64 * B as u32 + 8 * self.at.g;
                    let from = self.values.eight(position + near_or_far(P), d, V::ELEM_BYTES);
                    let to = self.value_chunk::<NK, V>(slot, (B * 4 + P) as u32);
                    V::copy(self.smem, to, from);
                });
            });
        }
    }

    /// Key loads `first .. first + N`.
    ///
    /// # Safety
    /// As [`Feed::copy`]; the tile has been waited for.
    #[inline(always)]
    pub unsafe fn keys<const NK: usize, const N: usize>(
        &self,
        tile: u32,
        slot: u32,
        first: usize,
    ) -> Keys<N> {
        let mut keys = [[[0; 4]; N]; 2];
        // SAFETY: by the caller's promise; clamped as there.
        unsafe {
            unroll!(R < 2 => {
                unroll!(I < N => {
                    let row = self.at.g + 8 * R as u32;
                    let chunk = 4 * (first + I) as u32 + self.at.t;
                    keys[R][I] = if at_least_sm_80() {
                        let from = self.key_chunk::<NK>(slot, row, chunk);
                        ptx::ld_shared_v4_u32(self.smem, from)
                    } else {
                        ptx::ld_global_once_v4_u32(self.keys.eight(tile * TILE + row, 8 * chunk, 2))
                    };
                });
            });
        }
        keys
    }

    /// The values of 64 elements.
    ///
    /// # Safety
    /// As [`Feed::keys`].
    #[inline(always)]
    pub unsafe fn values<const NK: usize, V: Values>(
        &self,
        tile: u32,
        slot: u32,
        block: usize,
    ) -> V {
        let d = 64 * block as u32 + 8 * self.at.g;
        let position = tile * TILE + 2 * self.at.t;
        // SAFETY: by the caller's promise; clamped as there.
        V::new(|p| unsafe {
            if at_least_sm_80() {
                let chunk = (block * 4 + p) as u32;
                V::shared(self.smem, self.value_chunk::<NK, V>(slot, chunk))
            } else {
                V::global(
                    self.values
                        .eight(position + near_or_far(p), d, V::ELEM_BYTES),
                )
            }
        })
    }
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

/// Values of a tile, 64 elements of them: of the positions 2t, 2t + 1, 2t + 8, 2t + 9, 8 elements
/// each.
pub trait Values: Copy {
    /// Bytes of an element in the cache.
    const ELEM_BYTES: u32;
    /// Eight elements.
    type Eight: Copy;
    /// What else there is of a position.
    type Scales: Copy;

    /// Of the four positions' elements.
    fn new(eight: impl Fn(usize) -> Self::Eight) -> Self;

    /// Starts to copy eight elements.
    ///
    /// # Safety
    /// As [`ptx::cp_async_16_onward`].
    unsafe fn copy(smem: Shared, to: u32, from: *const u32);

    /// Eight elements from shared memory.
    ///
    /// # Safety
    /// They are there.
    unsafe fn shared(smem: Shared, from: u32) -> Self::Eight;

    /// Eight elements from the cache.
    ///
    /// # Safety
    /// They are there.
    unsafe fn global(from: *const u32) -> Self::Eight;

    /// Fetches the scales of a tile's positions.
    ///
    /// # Safety
    /// The cache holds `keys` rows.
    unsafe fn scales(rows: &Rows, tile: u32, at: Place) -> Self::Scales;

    /// What the values count, from the weights of the positions.
    fn weigh(scales: Self::Scales, weights: [f32; 4]) -> [f32; 4];

    /// Adds the weighted values.
    fn add(&self, sums: &mut [[f32; 4]; 8], weights: [u32; 4]);
}

/// Halves.
#[derive(Clone, Copy)]
pub struct Halves([[u32; 4]; 4]);

impl Values for Halves {
    const ELEM_BYTES: u32 = 2;
    type Eight = [u32; 4];
    type Scales = ();

    #[inline(always)]
    fn new(eight: impl Fn(usize) -> [u32; 4]) -> Halves {
        Halves([eight(0), eight(1), eight(2), eight(3)])
    }

    #[inline(always)]
    unsafe fn copy(smem: Shared, to: u32, from: *const u32) {
        // SAFETY: passed on.
        unsafe { ptx::cp_async_16_onward(smem, to, from) };
    }

    #[inline(always)]
    unsafe fn shared(smem: Shared, from: u32) -> [u32; 4] {
        // SAFETY: passed on.
        unsafe { ptx::ld_shared_v4_u32(smem, from) }
    }

    #[inline(always)]
    unsafe fn global(from: *const u32) -> [u32; 4] {
        // SAFETY: passed on.
        unsafe { ptx::ld_global_once_v4_u32(from) }
    }

    #[inline(always)]
    unsafe fn scales(_: &Rows, _: u32, _: Place) {}

    #[inline(always)]
    fn weigh((): (), weights: [f32; 4]) -> [f32; 4] {
        weights
    }

    #[inline(always)]
    fn add(&self, sums: &mut [[f32; 4]; 8], weights: [u32; 4]) {
        let [a, b, c, d] = self.0;
        unroll!(W < 4 => {
            let pairs = |selector| [
                ptx::permute_bytes(a[W], b[W], selector),
                ptx::permute_bytes(c[W], d[W], selector),
            ];
            sums[2 * W] = mma_k16(weights, pairs(LOW_HALVES), sums[2 * W]);
            sums[2 * W + 1] = mma_k16(weights, pairs(HIGH_HALVES), sums[2 * W + 1]);
        });
    }
}

/// Signed bytes with a scale a position, which goes to the weight.
#[derive(Clone, Copy)]
pub struct Bytes([[u32; 2]; 4]);

impl Values for Bytes {
    const ELEM_BYTES: u32 = 1;
    type Eight = [u32; 2];
    type Scales = [u16; 4];

    #[inline(always)]
    fn new(eight: impl Fn(usize) -> [u32; 2]) -> Bytes {
        Bytes([eight(0), eight(1), eight(2), eight(3)])
    }

    #[inline(always)]
    unsafe fn copy(smem: Shared, to: u32, from: *const u32) {
        // SAFETY: passed on.
        unsafe { ptx::cp_async_8_onward(smem, to, from) };
    }

    #[inline(always)]
    unsafe fn shared(smem: Shared, from: u32) -> [u32; 2] {
        // SAFETY: passed on.
        unsafe { ptx::ld_shared_v2_u32(smem, from) }
    }

    #[inline(always)]
    unsafe fn global(from: *const u32) -> [u32; 2] {
        // SAFETY: passed on.
        unsafe { ptx::ld_global_once_v2_u32(from) }
    }

    #[inline(always)]
    unsafe fn scales(rows: &Rows, tile: u32, at: Place) -> [u16; 4] {
        let mut scales = [0; 4];
        unroll!(P < 4 => {
            // SAFETY: any position will do.
            scales[P] = unsafe { rows.scale(tile * TILE + 2 * at.t + near_or_far(P)) };
        });
        scales
    }

    #[inline(always)]
    fn weigh(scales: [u16; 4], weights: [f32; 4]) -> [f32; 4] {
        let scales = scales.map(ptx::f16_to_f32);
        [
            weights[0] * scales[0],
            weights[1] * scales[1],
            weights[2] * scales[2],
            weights[3] * scales[3],
        ]
    }

    #[inline(always)]
    fn add(&self, sums: &mut [[f32; 4]; 8], weights: [u32; 4]) {
        let [a, b, c, d] = self.0;
        unroll!(W < 2 => {
            unroll!(E < 4 => {
                // Byte E of either position, to the even bytes.
                let selector = (E | (4 + E) << 8) as u32;
                let pairs = [
                    even_bytes_to_f16x2(ptx::permute_bytes(a[W], b[W], selector)),
                    even_bytes_to_f16x2(ptx::permute_bytes(c[W], d[W], selector)),
                ];
                sums[4 * W + E] = mma_k16(weights, pairs, sums[4 * W + E]);
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
    quads: [[f32; 4]; 4],
}

/// Threads of a block.
const THREADS: u32 = WARPS * 32;

impl<const NK: usize> Query<NK> {
    /// Items of four elements that a thread stages, of one for each step and lane of the scores.
    const ITEMS: usize = {
        let items = NK as u32 * 64;
        assert!(items <= 4 * THREADS);
        items.div_ceil(THREADS) as usize
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
        let mut quads = [[0.0; 4]; 4];
        unroll!(I < 4 => {
            if I < Self::ITEMS {
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
        unroll!(I < 4 => {
            let (step, lane, _) = Self::item(I as u32);
            if I < Self::ITEMS && step < 2 * NK as u32 {
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
