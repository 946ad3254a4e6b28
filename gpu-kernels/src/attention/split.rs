//! The context split over blocks (flash-decoding: Dao et al. 2023), products by the matrix units.
//!
//! ```text
//! block (s, y)   -> split s of the positions, for up to 8 query heads of one kv head
//! warp w         -> tiles of 16 positions w, w + 8, ... of the split: its own online softmax
//! lane (g, t)    -> g = lane / 4, t = lane % 4
//!   keys         -> positions g, g + 8 of the tile, elements 32i + 8t .. +8:   16 bytes a load
//!   values       -> positions 2t, 2t + 1, 2t + 8, 2t + 9, elements 64b + 8g .. +8
//!   scores       -> head g, positions 2t, 2t + 1, 2t + 8, 2t + 9
//! end of a block -> thread: 4 elements of a head, over the warps' results in warp order
//! block (x, groups + y) -> head y splits + x: the same over the splits' results in split order
//! ```
//!
//! Both products are `mma.m16n8k16` with the heads as rows, so K and V are read once for all heads
//! of a kv head and no lane reduces anything across the warp but maxima. Half precision would cost
//! q and the softmax weights 13 bits: each is given as the sum of two halves, the high parts in
//! rows 0..8 and the low parts in rows 8..16 of the same product, which keeps 22 bits. Scores and
//! sums are single precision (scores of Qwen2 overflow halves). Which element of a head stands for
//! which k of the product is free as long as both factors agree: it is chosen so that every load
//! is 16 bytes of a row, straight from the cache into the product's registers.
//!
//! The grid is fixed by the device and the shape, while the position comes from device memory: a
//! split gets `max(tiles / splits, min_tiles)` tiles, up to 8 tiles are one split, and blocks
//! without any return at once. q is
//! fetched while the position is on its way. The next tile's keys are fetched as soon as the scores
//! are done, its values as soon as the weighted sum is.
//!
//! What is critical is latency, so the splits meet without a fence, a counter or a flag: a word of
//! a partial result tells by itself whether it is there. Before a launch all of them are
//! [`UNWRITTEN`](super::UNWRITTEN), a NaN that no split leaves; the blocks of the heads come last
//! in the grid, poll the words that they need and put the mark back. Blocks start in the order of
//! their index and no split waits for anything, so what a block polls for always comes. Each word
//! is polled by the one thread that uses it: nothing depends on the order of two words.
//!
//! Values of 8 bits have a scale a position and kv head, which goes to the softmax weights: a byte
//! becomes a half, exactly, on its way into the product.
//!
//! Bytes moved: `4 KV Dh (position + 1)`, with values of 8 bits `KV (3 Dh + 2) (position + 1)`, and `4 Dh` a head and split that is written, read back
//! and marked in L2. Shared memory: q in the order of the product's lanes; the warps' results in
//! rows of 8 words more than a multiple of 32, 16-byte chunks exchanged pairwise in half of them:
//! no bank conflicts in either direction.

mod combine;
mod layout;
#[cfg(not(target_arch = "nvptx64"))]
mod plan;
mod tile;

use cuda_std::shared::Shared;
use cuda_std::{kernel, shared, thread, warp};

use self::combine::{Partials, Target, combine_head, combine_warps};
use self::layout::Layout;
#[cfg(not(target_arch = "nvptx64"))]
pub use self::plan::{Tuning, kernel, kernel_v8, plan, takes};
use self::tile::{Bytes, Halves, Query, Rows, Sums, Values, add_scores, load_keys, pack_rest};
use crate::ptx;
use crate::unroll::unroll;

/// Warps a block.
const WARPS: u32 = 8;
/// Query heads a block: the high and low parts of 8 are the 16 rows of a product.
const HEADS: u32 = 8;
/// Positions of a tile: k of the second product.
const TILE: u32 = 16;
/// Splits at most: four a lane where a warp goes over them.
const MAX_SPLITS: u32 = 128;
/// Weights of the softmax are computed times 2^15, which is in the range of a half and leaves the
/// low parts of small ones above its subnormals. The factor cancels.
const WEIGHT_BITS: f32 = 15.0;

/// The lane's place in the operands of a product.
#[derive(Clone, Copy)]
struct Place {
    g: u32,
    t: u32,
}

/// How the values of a tile are fetched.
trait Tile<const NV: usize> {
    /// Bytes of an element in the cache.
    const ELEM_BYTES: usize;
    /// Whether keys and values are fetched a tile ahead.
    const AHEAD: bool;
    /// All values of a tile.
    type Ahead: Values<NV>;
    /// 64 elements of them.
    type One: Values<1>;
}

/// Halves, a tile ahead.
struct HalvesAhead;
/// Halves, 64 elements at a time.
struct HalvesInTurn;
/// Bytes, a tile ahead.
struct BytesAhead;

impl<const NV: usize> Tile<NV> for HalvesAhead {
    const ELEM_BYTES: usize = 2;
    const AHEAD: bool = true;
    type Ahead = Halves<NV>;
    type One = Halves<1>;
}

impl<const NV: usize> Tile<NV> for HalvesInTurn {
    const ELEM_BYTES: usize = 2;
    const AHEAD: bool = false;
    type Ahead = Halves<NV>;
    type One = Halves<1>;
}

impl<const NV: usize> Tile<NV> for BytesAhead {
    const ELEM_BYTES: usize = 1;
    const AHEAD: bool = true;
    type Ahead = Bytes<NV>;
    type One = Bytes<1>;
}

/// The cache of a layer.
#[derive(Clone, Copy)]
struct Caches {
    keys: *const u16,
    /// Halves or bytes.
    values: *const u16,
    /// A scale a position of bytes, else null.
    scales: *const u16,
}

/// Weights as the product takes them: two halves each, high and low parts alternating.
#[inline(always)]
fn pack(p: [f32; 4]) -> [u32; 4] {
    let halves = [
        ptx::f32x2_to_f16x2(p[0], p[1]),
        ptx::f32x2_to_f16x2(p[2], p[3]),
    ];
    [
        halves[0],
        pack_rest(p[0], p[1], halves[0]),
        halves[1],
        pack_rest(p[2], p[3], halves[1]),
    ]
}

/// What the blocks of a launch share.
#[derive(Clone, Copy)]
struct Dims {
    /// H.
    heads: u32,
    heads_per_kv: u32,
    head_dim: u32,
    context: u32,
    min_tiles: u32,
}

impl Dims {
    /// Groups of a kv head: 8 heads each but the last.
    #[inline(always)]
    fn groups_per_kv(self) -> u32 {
        self.heads_per_kv.div_ceil(HEADS)
    }
}

/// The body. `NK` loads of keys cover a head, `NV` of values. With `AHEAD` they are fetched a tile
/// ahead, which a wide head leaves no registers for: `V` is then of one block of 64.
///
/// # Safety
/// Launched as [`plan`] says.
#[inline(always)]
unsafe fn attend<const NK: usize, const NV: usize, V: Tile<NV>>(
    q: *const f32,
    caches: Caches,
    state: *const u32,
    out: *mut f32,
    partials: *mut f32,
    groups: u32,
    dims: Dims,
    scale_log2: f32,
) {
    ptx::griddep_launch();
    ptx::griddep_wait();
    let (split, y) = (thread::block_idx_x(), thread::block_idx_y());
    let splits = thread::grid_dim_x();
    // SAFETY: a launch argument.
    let position = unsafe { ptx::ld_global_u32(state) };
    let partials = Partials {
        base: partials,
        head_dim: dims.head_dim,
        splits,
        groups,
    };
    let spread = |keys: u32| {
        let tiles = keys.div_ceil(TILE);
        let mut per_split = dims.min_tiles;
        // What the warps of one block take at once is not worth a second one.
        if tiles <= WARPS {
            per_split = per_split.max(WARPS);
        }
        if tiles > splits * per_split {
            per_split = tiles.div_ceil(splits);
        }
        (tiles, per_split)
    };
    let smem = shared::dynamic_shared_mem();
    let layout = Layout::new(NK as u32, NV as u32, dims.heads_per_kv.min(HEADS));
    if y >= groups {
        let head = (y - groups) * splits + split;
        let (tiles, per_split) = spread(position + 1);
        if head < dims.heads && per_split < tiles {
            let (kv, of_kv) = (head / dims.heads_per_kv, head % dims.heads_per_kv);
            let group = kv * dims.groups_per_kv() + of_kv / HEADS;
            let to = out.wrapping_add((head * dims.head_dim) as usize);
            // SAFETY: all threads of the block get here, and the plan sized buffers and memory.
            unsafe {
                let active = tiles.div_ceil(per_split);
                combine_head(&partials, group, of_kv % HEADS, active, to, smem, layout);
            }
        }
        return;
    }
    let (kv, group) = (y / dims.groups_per_kv(), y % dims.groups_per_kv());
    let head = kv * dims.heads_per_kv + group * HEADS;
    let heads = (dims.heads_per_kv - group * HEADS).min(HEADS);
    let first = (head * dims.head_dim) as usize;
    // SAFETY: the heads are among those of q.
    let query = unsafe { Query::<NK>::load(q.wrapping_add(first), heads, dims.head_dim) };

    let keys = position + 1;
    let (tiles, per_split) = spread(keys);
    let first_tile = split * per_split;
    if first_tile >= tiles {
        return;
    }
    let target = Target {
        out: out.wrapping_add(first),
        alone: per_split >= tiles,
        split,
        group: y,
        heads,
        partials,
    };
    let end = (first_tile + per_split).min(tiles);
    // SAFETY: the tiles are below those that are filled.
    unsafe {
        attend_tiles::<NK, NV, V>(
            query, caches, kv, keys, first_tile, end, dims, scale_log2, smem, layout, &target,
        );
    }
}

/// Attention over the tiles `first_tile .. end` of a kv head, by all warps of the block.
///
/// # Safety
/// As [`attend`]; there is at least one tile, and the cache holds `keys` rows.
#[inline(always)]
unsafe fn attend_tiles<const NK: usize, const NV: usize, V: Tile<NV>>(
    query: Query<NK>,
    caches: Caches,
    kv: u32,
    keys: u32,
    first_tile: u32,
    end: u32,
    dims: Dims,
    scale_log2: f32,
    smem: Shared,
    layout: Layout,
    target: &Target,
) {
    let lane = warp::lane_id();
    let warp_id = warp::warp_id();
    let at = Place {
        g: lane / 4,
        t: lane % 4,
    };
    let head_dim = dims.head_dim;
    let first_row = kv as usize * dims.context as usize;
    let elems = first_row * head_dim as usize;
    let k_rows = Rows {
        base: caches.keys.wrapping_add(elems),
        scales: core::ptr::null(),
        head_dim,
        keys,
    };
    let v_rows = Rows {
        base: caches.values.wrapping_byte_add(elems * V::ELEM_BYTES),
        scales: caches.scales.wrapping_add(first_row),
        ..k_rows
    };

    let mut tile = first_tile + warp_id;
    let mut next_keys = [[[0; 4]; NK]; 2];
    let mut next_values = V::Ahead::NONE;
    let mut maximum = f32::NEG_INFINITY;
    // Of this lane's positions only, until the end.
    let mut weight = 0.0f32;
    let mut sums: Sums<NV> = [[[0.0; 4]; 8]; NV];
    // SAFETY: rows are clamped to those that are filled; q is staged before the barrier.
    unsafe {
        if V::AHEAD && tile < end {
            next_keys = load_keys::<NK>(&k_rows, tile, 0, at);
            next_values = V::Ahead::load(&v_rows, tile, 0, at);
        }
        query.stage(smem, layout);
        thread::sync_threads();

        while tile < end {
            let next = tile + WARPS;
            let mut products = [[0.0; 4]; 2];
            if V::AHEAD {
                add_scores::<NK>(&mut products, &next_keys, 0, smem, layout);
                if next < end {
                    next_keys = load_keys::<NK>(&k_rows, next, 0, at);
                }
            } else {
                unroll!(I < NK => {
                    let keys = load_keys::<1>(&k_rows, tile, I, at);
                    add_scores::<1>(&mut products, &keys, I, smem, layout);
                });
            }
            let [near, far] = products;
            let mut s = [
                near[0] + near[2],
                near[1] + near[3],
                far[0] + far[2],
                far[1] + far[3],
            ];

            let position = tile * TILE + 2 * at.t;
            unroll!(I < 4 => {
                let position = position + (I % 2 + I / 2 * 8) as u32;
                let scaled = s[I] * scale_log2;
                s[I] = if position < keys { scaled } else { f32::NEG_INFINITY };
            });
            let mut new_maximum = s[0].max(s[1]).max(s[2].max(s[3])).max(maximum);
            new_maximum = new_maximum.max(warp::shuffle_xor_f32(warp::FULL_MASK, new_maximum, 1));
            new_maximum = new_maximum.max(warp::shuffle_xor_f32(warp::FULL_MASK, new_maximum, 2));
            // A tile has at least one position, so the maximum is finite from here on. It soon
            // stops growing: then there is nothing to correct.
            if warp::any(warp::FULL_MASK, new_maximum > maximum) {
                let correction = ptx::exp2(maximum - new_maximum);
                maximum = new_maximum;
                weight *= correction;
                unroll!(B < NV => {
                    unroll!(J < 8 => {
                        unroll!(I < 4 => { sums[B][J][I] *= correction; });
                    });
                });
            }
            let offset = WEIGHT_BITS - maximum;
            let p = [
                ptx::exp2(s[0] + offset),
                ptx::exp2(s[1] + offset),
                ptx::exp2(s[2] + offset),
                ptx::exp2(s[3] + offset),
            ];
            weight += (p[0] + p[1]) + (p[2] + p[3]);
            if V::AHEAD {
                next_values.add(&mut sums, pack(next_values.weigh(p)), 0);
                if next < end {
                    next_values = V::Ahead::load(&v_rows, next, 0, at);
                }
            } else {
                unroll!(B < NV => {
                    let values = V::One::load(&v_rows, tile, B, at);
                    values.add(&mut sums, pack(values.weigh(p)), B);
                });
            }
            tile = next;
        }

        weight += warp::shuffle_xor_f32(warp::FULL_MASK, weight, 1);
        weight += warp::shuffle_xor_f32(warp::FULL_MASK, weight, 2);
        if at.t == 0 {
            ptx::st_shared_f32(smem, layout.maximum(warp_id, at.g), maximum);
            ptx::st_shared_f32(smem, layout.weight(warp_id, at.g), weight);
        }
    }

    // SAFETY: all threads get here; the plan sized shared memory and buffers.
    unsafe { combine_warps::<NV>(&sums, at, smem, layout, target) };
}

/// The kernels: one for each count of loads that cover a head, and kind of values.
macro_rules! kernels {
    ($($name:ident$([$scales:ident])?: $limits:literal, [$nk:literal, $nv:literal, $tile:ty];)*) => {$(
        #[doc = concat!("Attention of a split of the positions, heads of ", $limits, ".")]
        ///
        /// # Safety
        /// Launched as [`plan`] says, with a position below S and the rows up to it filled.
        #[kernel]
        pub unsafe fn $name(
            q: *const f32,       // (H, Dh)
            k_cache: *const u16, // (KV, S, Dh) f16
            v_cache: *const u16, // (KV, S, Dh) f16, or int8
            state: *const u32,   // (1) position
            out: *mut f32,       // (H, Dh)
            $($scales: *const u16,)? // (KV, S) f16
            partials: *mut f32,  // (groups, 8, splits, Dh), then (groups, 8, splits, 4)
            groups: u32,
            heads: u32,
            heads_per_kv: u32,
            head_dim: u32,
            context: u32,
            min_tiles: u32,
            scale_log2: f32,
        ) {
            let dims = Dims {
                heads,
                heads_per_kv,
                head_dim,
                context,
                min_tiles,
            };
            let scales = [$($scales,)? core::ptr::null()][0];
            let caches = Caches {
                keys: k_cache,
                values: v_cache,
                scales,
            };
            // SAFETY: launched as `plan` says.
            unsafe {
                attend::<$nk, $nv, $tile>(
                    q, caches, state, out, partials, groups, dims, scale_log2,
                );
            }
        }
    )*};
}

kernels! {
    attention_split_f16_d64: "8 to 64 elements", [2, 1, HalvesAhead];
    attention_split_f16_d96: "72 to 96 elements", [3, 2, HalvesAhead];
    attention_split_f16_d128: "104 to 128 elements", [4, 2, HalvesAhead];
    attention_split_f16_d256: "136 to 256 elements", [8, 4, HalvesInTurn];
    attention_split_v8_d64[v_scales]: "8 to 64 elements, values of 8 bits", [2, 1, BytesAhead];
    attention_split_v8_d96[v_scales]: "72 to 96 elements, values of 8 bits", [3, 2, BytesAhead];
    attention_split_v8_d128[v_scales]: "104 to 128 elements, values of 8 bits", [4, 2, BytesAhead];
}
