//! Queries, keys and values, turned and appended as they come out of their product:
//! [`rope_kv_append`](crate::rope_kv_append) without a launch of its own.
//!
//! A tile holds eight rows of a head's first half and the same eight of its second
//! (`models::quant::Int4Tiled::pack_heads`), so a lane has both elements of the pairs that are turned
//! together.

use super::super::tile::Place;
use super::{Args, Outputs};
use crate::ptx;

/// Where the rows of q, k and v go. [`Args::y`] is q, `(H, Dh)` f32.
#[derive(Clone, Copy)]
pub(in super::super) struct Heads {
    /// `(S, Dh/2)`.
    pub cos: *const f32,
    pub sin: *const f32,
    /// `(KV, S, Dh)` f16.
    pub k_cache: *mut u16,
    pub v_cache: *mut u16,
    /// `(1,)`: the position, below S.
    pub state: *const u32,
    /// H.
    pub heads: u32,
    /// KV.
    pub kv_heads: u32,
    /// Dh / 2, a multiple of 8.
    pub half: u32,
    /// S.
    pub context: u32,
}

/// A lane's element of a head, and the other one of its pair.
#[derive(Clone, Copy)]
pub(in super::super) struct Pair {
    /// Whether the lane stores one.
    there: bool,
    /// Whether its own is that of the first half.
    first: bool,
    /// Of q, then k, then v.
    head: u32,
    /// Its own place in the head.
    element: u32,
    position: u32,
    /// Of the first and of the second half.
    bias: [f32; 2],
    cos: f32,
    sin: f32,
}

impl Heads {
    /// What turns the lane's pair of a row tile, if the lane stores one.
    ///
    /// # Safety
    /// The row tile is there if `there` says so; `bias` has all rows, or is null.
    #[inline(always)]
    unsafe fn pair(
        &self,
        bias: *const f32,
        place: &Place,
        position: u32,
        row_tile: u32,
        there: bool,
    ) -> Pair {
        let tiles_a_head = self.half / 8;
        let head = row_tile / tiles_a_head;
        let i = (row_tile - head * tiles_a_head) * 8 + place.g;
        let turned = there && head < self.heads + self.kv_heads;
        let row = (head * 2 * self.half + i) as usize;
        let angle = position as usize * self.half as usize + i as usize;
        let mut biases = [0.0; 2];
        // SAFETY: loads are made only where the rows are there, and the position is below S.
        unsafe {
            if !bias.is_null() {
                let low = bias.wrapping_add(row);
                let high = low.wrapping_add(self.half as usize);
                biases = [
                    ptx::ld_global_f32_if(there, low, 0.0),
                    ptx::ld_global_f32_if(there, high, 0.0),
                ];
            }
            Pair {
                there,
                first: place.q == 0,
                head,
                element: i + self.half * place.q,
                position,
                bias: biases,
                cos: ptx::ld_global_f32_if(turned, self.cos.wrapping_add(angle), 1.0),
                sin: ptx::ld_global_f32_if(turned, self.sin.wrapping_add(angle), 0.0),
            }
        }
    }

    /// Stores the lane's element of a pair.
    ///
    /// # Safety
    /// `pair` is of [`Heads::pair`]; `q` has room for the queries.
    #[inline(always)]
    unsafe fn put(&self, q: *mut f32, pair: Pair, sums: [f32; 2]) {
        if !pair.there {
            return;
        }
        let (a, b) = (sums[0] + pair.bias[0], sums[1] + pair.bias[1]);
        // Values are not turned.
        let mut value = if pair.first { a } else { b };
        if pair.head < self.heads + self.kv_heads {
            value = if pair.first {
                ptx::fma(a, pair.cos, -(b * pair.sin))
            } else {
                ptx::fma(b, pair.cos, a * pair.sin)
            };
        }
        let width = 2 * self.half;
        // SAFETY: the head is one of q, k or v, the element in it, the position below S.
        unsafe {
            if pair.head < self.heads {
                let to = (pair.head * width + pair.element) as usize;
                ptx::st_global_f32(q.wrapping_add(to), value);
            } else {
                let kv_head = pair.head - self.heads;
                let (cache, head) = if kv_head < self.kv_heads {
                    (self.k_cache, kv_head)
                } else {
                    (self.v_cache, kv_head - self.kv_heads)
                };
                let row = head as usize * self.context as usize + pair.position as usize;
                let to = row * width as usize + pair.element as usize;
                ptx::st_global_u16(cache.wrapping_add(to), ptx::f32_to_f16(value));
            }
        }
    }
}

impl Outputs for Heads {
    /// The position.
    type Start = u32;
    type Held = Pair;

    #[inline(always)]
    unsafe fn start(&self) -> u32 {
        // SAFETY: a launch argument.
        unsafe { ptx::ld_global_u32(self.state) }
    }

    /// Lane 4g of a team's first warp stores element g of the tile's first half, lane 4g + 1 that of
    /// the second.
    #[inline(always)]
    unsafe fn ask(&self, args: &Args, place: &Place, position: u32, row_tile: u32) -> Pair {
        let there = row_tile < args.row_tiles && place.member == 0 && place.q < 2;
        // SAFETY: passed on.
        unsafe { self.pair(args.bias, place, position, row_tile, there) }
    }

    #[inline(always)]
    unsafe fn store(&self, args: &Args, held: Pair, sums: [f32; 2]) {
        // SAFETY: passed on.
        unsafe { self.put(args.y, held, sums) }
    }
}
