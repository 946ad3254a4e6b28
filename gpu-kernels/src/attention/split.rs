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
//! block (x, groups + y) -> part y splits + x: 32 elements of a head over the splits, in their order
//! ```
//!
//! Both products are `mma.m16n8k16` with the heads as rows, so K and V are read once for all heads
//! of a kv head and no lane reduces anything across the warp but maxima. Half precision would cost
//! q and the softmax weights 13 bits: each is given as the sum of two halves, the high parts in
//! rows 0..8 and the low parts in rows 8..16 of the same product, which keeps 22 bits. Scores and
//! sums are single precision (scores of Qwen2 overflow halves). Which element of a head stands for
//! which k of the product is free as long as both factors agree: it is chosen so that every load
//! is 16 bytes of a row, in the order of the product's registers.
//!
//! The grid is fixed by the device and the shape, while the position comes from device memory: a
//! split gets `max(tiles / splits, min_tiles)` tiles, up to 16 tiles are one split, and blocks
//! without any return at once.
//!
//! From sm_80 on tiles go through a ring in shared memory, filled by asynchronous copies: bytes in
//! flight come from the ring rather than from registers, which leaves room for blocks of the launches
//! before and after. On sm_90 a block starts while the launch before it still runs, and
//! asks for all tiles that are full before it waits. What is in them was written before the last
//! attention, and that one lets launches after it start only once all before it have ended. The
//! position may be one too old then, which is checked after the wait.
//!
//! What is critical is latency, so the splits meet without a fence, a counter or a flag: a word of
//! a partial result tells by itself whether it is there. Before a launch all of them are
//! [`UNWRITTEN`](super::UNWRITTEN), a NaN that no split leaves; the blocks of the heads come last
//! in the grid, poll the words that they need and put the mark back. Blocks start in the order of
//! their index and no split waits for anything, so what a block polls for always comes. Each word
//! is polled by the one thread that uses it: nothing depends on the order of two words.
//!
//! With a window the oldest position that counts is the first of the first tile: nothing else changes,
//! and what is older is neither read nor split.
//!
//! Values of 8 bits have a scale a position and kv head, which goes to the softmax weights: a byte
//! becomes a half, exactly, on its way into the product.
//!
//! Bytes moved: `4 KV Dh` a position that counts, with values of 8 bits `KV (3 Dh + 2)`, and
//! `4 Dh` a head and split that is written, read back and marked in L2. Shared memory: q in the order
//! of the product's lanes; each warp's tiles, later its results in rows of 8 words more than a
//! multiple of 32, 16-byte chunks exchanged pairwise in half of them: no bank conflicts.

mod combine;
mod layout;
#[cfg(not(target_arch = "nvptx64"))]
mod plan;
mod tile;

use cuda_std::{atomic, kernel, shared, thread, warp};

use self::combine::{Partials, Target, combine_part, combine_warps, parts};
use self::layout::Layout;
#[cfg(not(target_arch = "nvptx64"))]
pub use self::plan::{Tuning, candidates, kernel, kernel_v8, name, plan, takes};
use self::tile::{
    Bytes, Feed, Halves, Query, Rows, Sums, Values, add_scores, pack_rest, tile_bytes,
};
use crate::product::at_least_sm_80;
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
/// Chunks of four elements that a block combines.
const PART_CHUNKS: u32 = 8;
/// Tiles of a warp under way at most, and bytes of them that a block has: with one block a
/// multiprocessor they cover the memory's latency several times over, and a second block on one while
/// another has none costs more than anything gains.
const MAX_DEPTH: u32 = 3;
#[cfg(not(target_arch = "nvptx64"))]
const MAX_RING_BYTES: u32 = 128 * 1024;
/// Tiles that are one split: they take less time than to combine several.
const ALONE_TILES: u32 = 2 * WARPS;
/// Pause of a block that waits for the splits, for each of a split's tiles: a small part of what a
/// tile takes a multiprocessor, 8 KB of some 20 bytes a nanosecond.
const PAUSE_NS: u32 = 16;
/// Weights of the softmax are computed times 2^15, which is in the range of a half and leaves the
/// low parts of small ones above its subnormals. The factor cancels.
const WEIGHT_BITS: f32 = 15.0;

/// The lane's place in the operands of a product.
#[derive(Clone, Copy)]
struct Place {
    g: u32,
    t: u32,
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
    /// Positions that a token sees at most.
    window: u32,
    min_tiles: u32,
    /// Tiles of a warp under way.
    depth: u32,
}

impl Dims {
    /// Groups of a kv head: 8 heads each but the last.
    #[inline(always)]
    fn groups_per_kv(self) -> u32 {
        self.heads_per_kv.div_ceil(HEADS)
    }

    /// Positions that the token at `position` sees.
    #[inline(always)]
    fn keys(self, position: u32) -> u32 {
        (position + 1).min(self.window)
    }

    /// Tiles that the token at `position` sees, and those of a split.
    #[inline(always)]
    fn spread(self, position: u32, splits: u32) -> (u32, u32) {
        let tiles = self.keys(position).div_ceil(TILE);
        let mut per_split = self.min_tiles;
        if tiles <= ALONE_TILES {
            per_split = per_split.max(ALONE_TILES);
        }
        if tiles > splits * per_split {
            per_split = tiles.div_ceil(splits);
        }
        (tiles, per_split)
    }
}

/// What a warp works through: the tiles `first, first + 8, ...` below `end`.
#[derive(Clone, Copy)]
struct Tiles {
    /// The first position that counts, position 0 of the first tile, and how many there are.
    oldest: u32,
    keys: u32,
    first: u32,
    end: u32,
    /// Whether the block has any, and whether nobody else has.
    some: bool,
    alone: bool,
}

impl Tiles {
    #[inline(always)]
    fn new(dims: Dims, position: u32, split: u32, splits: u32, warp: u32) -> Tiles {
        let (tiles, per_split) = dims.spread(position, splits);
        let first = split * per_split;
        let keys = dims.keys(position);
        Tiles {
            oldest: position + 1 - keys,
            keys,
            first: first + warp,
            end: (first + per_split).min(tiles),
            some: first < tiles,
            alone: per_split >= tiles,
        }
    }

    /// Whether the tile is one of the warp's, and all its rows are older than the newest.
    #[inline(always)]
    fn is_full(self, tile: u32) -> bool {
        tile < self.end && (tile + 1) * TILE < self.keys
    }
}

/// The body. `NK` loads of keys cover a head, `NV` blocks of 64 values.
///
/// # Safety
/// Launched as [`plan`] says.
#[inline(always)]
unsafe fn attend<const NK: usize, const NV: usize, V: Values>(
    q: *const f32,
    caches: Caches,
    state: *const u32,
    out: *mut f32,
    partials: *mut f32,
    groups: u32,
    dims: Dims,
    scale_log2: f32,
) {
    let (split, y) = (thread::block_idx_x(), thread::block_idx_y());
    let splits = thread::grid_dim_x();
    let tile_bytes = tile_bytes(NK as u32, NV as u32, V::ELEM_BYTES);
    let smem = shared::dynamic_shared_mem();
    let layout = Layout::new(
        NK as u32,
        NV as u32,
        dims.heads_per_kv.min(HEADS),
        dims.depth * tile_bytes,
    );
    let partials = Partials {
        base: partials,
        head_dim: dims.head_dim,
        splits,
        groups,
    };
    if y >= groups {
        ptx::griddep_wait();
        ptx::griddep_launch();
        let parts = parts(dims.head_dim);
        let block = (y - groups) * splits + split;
        let (head, part) = (block / parts, block % parts);
        // SAFETY: a launch argument; all threads of the block get here, and the plan sized buffers
        // and memory.
        unsafe {
            let (tiles, per_split) = dims.spread(ptx::ld_global_u32(state), splits);
            if head < dims.heads && per_split < tiles {
                let (kv, of_kv) = (head / dims.heads_per_kv, head % dims.heads_per_kv);
                let group = kv * dims.groups_per_kv() + of_kv / HEADS;
                let to = out.wrapping_add((head * dims.head_dim) as usize);
                let active = tiles.div_ceil(per_split);
                let row = of_kv % HEADS;
                let pause_ns = (per_split * PAUSE_NS).min(1000);
                combine_part(
                    &partials, group, row, part, active, pause_ns, to, smem, layout,
                );
            }
        }
        return;
    }
    let (kv, group) = (y / dims.groups_per_kv(), y % dims.groups_per_kv());
    let head = kv * dims.heads_per_kv + group * HEADS;
    let heads = (dims.heads_per_kv - group * HEADS).min(HEADS);
    let first = (head * dims.head_dim) as usize;
    let (lane, warp_id) = (warp::lane_id(), warp::warp_id());
    let at = Place {
        g: lane / 4,
        t: lane % 4,
    };
    let first_row = kv as usize * dims.context as usize;
    // SAFETY: the tiles are below those that are filled, copies are made of full ones before the wait
    // and of the others after it; the heads are among those of q.
    unsafe {
        // Another block of the launch before this one may be moving it on, by one.
        let expected = ptx::ld_global_u32(state);
        let mut tiles = Tiles::new(dims, expected, split, splits, warp_id);
        let feed = |tiles: Tiles| {
            let first_row = first_row + tiles.oldest as usize;
            let elems = first_row * dims.head_dim as usize;
            let rows = Rows {
                base: caches.keys.wrapping_add(elems),
                scales: caches.scales.wrapping_add(first_row),
                head_dim: dims.head_dim,
                keys: tiles.keys,
            };
            Feed {
                keys: rows,
                values: Rows {
                    base: caches
                        .values
                        .wrapping_byte_add(elems * V::ELEM_BYTES as usize),
                    ..rows
                },
                at,
                smem,
                ring: layout.warp(warp_id),
            }
        };
        let copy = |tiles: Tiles, full: bool| {
            let feed = feed(tiles);
            for ahead in 0..dims.depth {
                let tile = tiles.first + ahead * WARPS;
                if tile < tiles.end && tiles.is_full(tile) == full {
                    feed.copy::<NK, NV, V>(tile, ahead * tile_bytes);
                }
            }
        };
        copy(tiles, true);
        ptx::griddep_wait();
        ptx::griddep_launch();
        let query = Query::<NK>::load(q.wrapping_add(first), heads, dims.head_dim);
        // Past the caches, which may hold what it was.
        let position = atomic::load_acquire_gpu_u32(state);
        if position != expected {
            ptx::cp_async_commit();
            ptx::cp_async_wait::<0>();
            tiles = Tiles::new(dims, position, split, splits, warp_id);
            copy(tiles, true);
        }
        if !tiles.some {
            return;
        }
        copy(tiles, false);
        let target = Target {
            out: out.wrapping_add(first),
            alone: tiles.alone,
            split,
            group: y,
            heads,
            partials,
        };
        let feed = feed(tiles);
        attend_tiles::<NK, NV, V>(query, &feed, tiles, dims.depth, scale_log2, layout, &target);
    }
}

/// Waits until the copies that a ring of `depth` tiles had under way before its last `depth - 1`
/// groups are there.
#[inline(always)]
fn wait_for_oldest(depth: u32) {
    const { assert!(MAX_DEPTH == 3) };
    match depth {
        0 | 1 => ptx::cp_async_wait::<0>(),
        2 => ptx::cp_async_wait::<1>(),
        _ => ptx::cp_async_wait::<2>(),
    }
}

/// Attention over a warp's tiles, the first `depth` of which have been asked for.
///
/// # Safety
/// As [`attend`]; the block has at least one tile.
#[inline(always)]
unsafe fn attend_tiles<const NK: usize, const NV: usize, V: Values>(
    query: Query<NK>,
    feed: &Feed,
    tiles: Tiles,
    depth: u32,
    scale_log2: f32,
    layout: Layout,
    target: &Target,
) {
    let (at, smem) = (feed.at, feed.smem);
    let mut tile = tiles.first;
    let tile_bytes = tile_bytes(NK as u32, NV as u32, V::ELEM_BYTES);
    let mut slot = 0;
    let mut maximum = f32::NEG_INFINITY;
    // Of this lane's positions only, until the end.
    let mut weight = 0.0f32;
    let mut sums: Sums<NV> = [[[0.0; 4]; 8]; NV];
    // SAFETY: rows are clamped to those that are filled; q is staged before the barrier.
    unsafe {
        // The first group is all that has been asked for, the others are empty.
        unroll!(I < 4 => {
            if (I as u32) < depth {
                ptx::cp_async_commit();
            }
        });
        let mut next_scales = V::scales(&feed.values, tile, at);
        query.stage(smem, layout);
        thread::sync_threads();

        while tile < tiles.end {
            if at_least_sm_80() {
                wait_for_oldest(depth);
                warp::sync_warp(warp::FULL_MASK);
            }
            let scales = next_scales;
            next_scales = V::scales(&feed.values, tile + WARPS, at);
            let mut products = [[0.0; 4]; 2];
            if NK > 4 {
                unroll!(I < NK => {
                    let keys = feed.keys::<NK, 1>(tile, slot, I);
                    add_scores::<1>(&mut products, &keys, I, smem, layout);
                });
            } else {
                let keys = feed.keys::<NK, NK>(tile, slot, 0);
                add_scores::<NK>(&mut products, &keys, 0, smem, layout);
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
                s[I] = if position < tiles.keys { scaled } else { f32::NEG_INFINITY };
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
            let p = pack(V::weigh(scales, p));
            unroll!(B < NV => {
                feed.values::<NK, V>(tile, slot, B).add(&mut sums[B], p);
            });
            let ahead = tile + depth * WARPS;
            if at_least_sm_80() {
                // All lanes have taken what they need of the slot.
                warp::sync_warp(warp::FULL_MASK);
                if ahead < tiles.end {
                    feed.copy::<NK, NV, V>(ahead, slot);
                }
                ptx::cp_async_commit();
                slot += tile_bytes;
                if slot == depth * tile_bytes {
                    slot = 0;
                }
            }
            tile += WARPS;
        }

        weight += warp::shuffle_xor_f32(warp::FULL_MASK, weight, 1);
        weight += warp::shuffle_xor_f32(warp::FULL_MASK, weight, 2);
        if at.t == 0 {
            ptx::st_shared_f32(smem, layout.maximum(warp::warp_id(), at.g), maximum);
            ptx::st_shared_f32(smem, layout.weight(warp::warp_id(), at.g), weight);
        }
    }

    // SAFETY: all threads get here; the plan sized shared memory and buffers.
    unsafe { combine_warps::<NV>(&sums, at, smem, layout, target) };
}

/// The kernels: one for each count of loads that cover a head, and kind of values.
macro_rules! kernels {
    ($($name:ident$([$scales:ident])?: $limits:literal, [$nk:literal, $nv:literal, $values:ty];)*) => {$(
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
            partials: *mut f32,  // (groups, 8, splits, Dh), then (groups, 8, splits, parts, 4)
            groups: u32,
            heads: u32,
            heads_per_kv: u32,
            head_dim: u32,
            context: u32,
            window: u32,
            min_tiles: u32,
            depth: u32,
            scale_log2: f32,
        ) {
            let dims = Dims {
                heads,
                heads_per_kv,
                head_dim,
                context,
                window,
                min_tiles,
                depth,
            };
            let scales = [$($scales,)? core::ptr::null()][0];
            let caches = Caches {
                keys: k_cache,
                values: v_cache,
                scales,
            };
            // SAFETY: launched as `plan` says.
            unsafe {
                attend::<$nk, $nv, $values>(
                    q, caches, state, out, partials, groups, dims, scale_log2,
                );
            }
        }
    )*};
}

kernels! {
    attention_split_f16_d64: "8 to 64 elements", [2, 1, Halves];
    attention_split_f16_d96: "72 to 96 elements", [3, 2, Halves];
    attention_split_f16_d128: "104 to 128 elements", [4, 2, Halves];
    attention_split_f16_d256: "136 to 256 elements", [8, 4, Halves];
    attention_split_v8_d64[v_scales]: "8 to 64 elements, values of 8 bits", [2, 1, Bytes];
    attention_split_v8_d96[v_scales]: "72 to 96 elements, values of 8 bits", [3, 2, Bytes];
    attention_split_v8_d128[v_scales]: "104 to 128 elements, values of 8 bits", [4, 2, Bytes];
}
