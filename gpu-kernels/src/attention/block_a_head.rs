//! A block a query head, for head widths that the split kernel does not take.
//!
//! ```text
//! block h            -> query head h
//! warp w             -> keys 32w .. 32w+32, then 32 WARPS further, ...: its own online softmax
//!   scores           -> lane l: key l of the 32, the whole row of Dh; q from shared memory
//!   values           -> lane l: element pairs l, l + 32, ... of each of the 32 rows in turn
//! end                -> thread t: element t of the head, over the warps' results in warp order
//! ```
//!
//! Bytes moved: `4 Dh (position + 1)` a query head; the H/KV heads of a kv head share theirs in
//! L2. A lane walks its key's row with 16-byte loads, so a line is fetched once and used up from
//! L1. q is read from shared memory by all lanes at once (broadcast), the warps' partial sums are
//! written by neighbouring lanes: no bank conflicts.
//!
//! Wins nowhere: with few heads most multiprocessors have nothing to do. It is here for head
//! widths that are even but no multiple of 8.

use cuda_std::shared::Shared;
use cuda_std::{kernel, shared, thread, warp};

#[cfg(not(target_arch = "nvptx64"))]
use super::{Operands, Shape};
#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, Launch, ShapeError};
use crate::ptx;

/// Warps a block.
const WARPS: u32 = 16;
/// Keys a warp handles at a time: one a lane.
const CHUNK_KEYS: u32 = 32;
/// Rows of V that a warp has in flight.
const ROWS_IN_FLIGHT: usize = 4;
const _: () = assert!(CHUNK_KEYS.is_multiple_of(ROWS_IN_FLIGHT as u32));
/// The launch of `attention_decode_f16`.
///
/// # Errors
/// Heads that kv heads do not divide, an odd or too wide head, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    let mut call = CallBuilder::new("attention_decode_f16");
    super::require_heads(&call, shape)?;
    super::tensors(&mut call, shape, ops, 4)?;
    let &Shape {
        heads,
        kv_heads,
        head_dim,
        context,
        scale,
        window,
    } = shape;
    call.require(window != Some(0), "window", 0, "it must be above 0")?;
    call.u32((heads / kv_heads) as u32);
    let head_dim = call.dim("head_dim", head_dim)?;
    call.dim("context", context)?;
    call.u32(shape.window());
    call.f32(scale);
    let shared_bytes = Layout::new(head_dim).bytes();
    call.build(
        device,
        Launch::linear(heads as u32, WARPS * 32, shared_bytes),
    )
}

/// Where things lie in shared memory, in bytes: q, then each warp's maximum, sum of weights and
/// weighted sum of values.
#[derive(Clone, Copy)]
struct Layout {
    head_dim: u32,
}

impl Layout {
    #[inline(always)]
    fn new(head_dim: u32) -> Layout {
        Layout { head_dim }
    }

    #[inline(always)]
    fn query(self, d: u32) -> u32 {
        d * 4
    }

    /// After q rounded up to 16 bytes.
    #[inline(always)]
    fn maximum(self, warp: u32) -> u32 {
        (self.head_dim * 4).next_multiple_of(16) + warp * 4
    }

    #[inline(always)]
    fn weight(self, warp: u32) -> u32 {
        self.maximum(WARPS) + warp * 4
    }

    #[inline(always)]
    fn value(self, warp: u32, d: u32) -> u32 {
        self.weight(WARPS) + (warp * self.head_dim + d) * 4
    }

    #[cfg(not(target_arch = "nvptx64"))]
    fn bytes(self) -> u32 {
        self.value(WARPS, 0)
    }
}

/// The two halves of a word, as floats.
#[inline(always)]
fn unpack(word: u32) -> [f32; 2] {
    [
        ptx::f16_to_f32(word as u16),
        ptx::f16_to_f32((word >> 16) as u16),
    ]
}

/// `sum_d q[d] k[d]` by one lane. Rows of a multiple of 8 are read 16 bytes at a time, others 4.
///
/// # Safety
/// `key` is a row of `head_dim` f16, aligned to 16 bytes if its length is a multiple of 16 bytes
/// and to 4 otherwise; q is staged.
#[inline(always)]
unsafe fn score(key: *const u32, head_dim: u32, smem: Shared, layout: Layout) -> f32 {
    let mut sums = [0.0f32; 2];
    let mut d = 0;
    // SAFETY: `d` steps through the row and through q, both of `head_dim`.
    unsafe {
        if head_dim.is_multiple_of(8) {
            while d < head_dim {
                let words = ptx::ld_global_v4_u32(key.wrapping_add((d / 2) as usize));
                let q = [
                    ptx::ld_shared_v4_f32(smem, layout.query(d)),
                    ptx::ld_shared_v4_f32(smem, layout.query(d + 4)),
                ];
                for half in 0..2 {
                    let [a, b] = unpack(words[2 * half]);
                    let [c, e] = unpack(words[2 * half + 1]);
                    sums[0] = ptx::fma(q[half][0], a, sums[0]);
                    sums[1] = ptx::fma(q[half][1], b, sums[1]);
                    sums[0] = ptx::fma(q[half][2], c, sums[0]);
                    sums[1] = ptx::fma(q[half][3], e, sums[1]);
                }
                d += 8;
            }
        } else {
            while d < head_dim {
                let [a, b] = unpack(ptx::ld_global_u32(key.wrapping_add((d / 2) as usize)));
                sums[0] = ptx::fma(ptx::ld_shared_f32(smem, layout.query(d)), a, sums[0]);
                sums[1] = ptx::fma(ptx::ld_shared_f32(smem, layout.query(d + 1)), b, sums[1]);
                d += 2;
            }
        }
    }
    sums[0] + sums[1]
}

/// One warp's share of the keys: leaves its maximum, sum of weights and weighted sum of values in
/// shared memory. `P` pairs of elements a lane, `64 P >= head_dim`.
///
/// # Safety
/// All lanes of the warp call it; the caches hold `keys` rows of `head_dim`; q is staged.
#[inline(always)]
unsafe fn warp_share<const P: usize>(
    keys_base: *const u16,
    values_base: *const u16,
    keys: u32,
    head_dim: u32,
    smem: Shared,
) {
    let layout = Layout::new(head_dim);
    let lane = warp::lane_id();
    let warp_id = warp::warp_id();
    let pairs = head_dim / 2;
    let row = |base: *const u16, key: u32| -> *const u32 {
        base.wrapping_add(key as usize * head_dim as usize).cast()
    };

    let mut maximum = f32::NEG_INFINITY;
    let mut weight = 0.0;
    let mut sums = [[0.0f32; 2]; P];
    let mut first = warp_id * CHUNK_KEYS;
    while first < keys {
        let key = first + lane;
        let mut s = f32::NEG_INFINITY;
        if key < keys {
            // SAFETY: the key is in the cache.
            s = unsafe { score(row(keys_base, key), head_dim, smem, layout) };
        }
        // Lane 0 always has a key, so the new maximum is finite and old weights scale by exp of
        // a number that is not NaN; a lane without a key weighs exp(-inf) = 0.
        let new_maximum = warp::reduce_max_f32(s).max(maximum);
        let p = ptx::exp(s - new_maximum);
        let correction = ptx::exp(maximum - new_maximum);
        maximum = new_maximum;
        weight = ptx::fma(weight, correction, warp::reduce_sum_f32(p));
        for sum in &mut sums {
            sum[0] *= correction;
            sum[1] *= correction;
        }

        let count = (keys - first).min(CHUNK_KEYS);
        let mut j = 0;
        while j < count {
            // Loads first, so that several rows are in flight. A row past the end is the last
            // row again: its weight is 0.
            let mut words = [[0u32; P]; ROWS_IN_FLIGHT];
            for (r, words) in words.iter_mut().enumerate() {
                let value = row(values_base, (first + j + r as u32).min(keys - 1));
                for (i, word) in words.iter_mut().enumerate() {
                    let pair = lane + 32 * i as u32;
                    if pair < pairs {
                        // SAFETY: the row is in the cache and the pair in the row.
                        *word = unsafe { ptx::ld_global_u32(value.wrapping_add(pair as usize)) };
                    }
                }
            }
            for (r, words) in words.iter().enumerate() {
                let p = warp::shuffle_idx_f32(warp::FULL_MASK, p, j + r as u32);
                for (sum, &word) in sums.iter_mut().zip(words) {
                    let [a, b] = unpack(word);
                    sum[0] = ptx::fma(p, a, sum[0]);
                    sum[1] = ptx::fma(p, b, sum[1]);
                }
            }
            j += ROWS_IN_FLIGHT as u32;
        }
        first += CHUNK_KEYS * WARPS;
    }

    // SAFETY: the slots of this warp, in the layout that the plan gave shared memory for.
    unsafe {
        if lane == 0 {
            ptx::st_shared_f32(smem, layout.maximum(warp_id), maximum);
            ptx::st_shared_f32(smem, layout.weight(warp_id), weight);
        }
        for (i, sum) in sums.iter().enumerate() {
            let pair = lane + 32 * i as u32;
            if pair < pairs {
                ptx::st_shared_f32(smem, layout.value(warp_id, 2 * pair), sum[0]);
                ptx::st_shared_f32(smem, layout.value(warp_id, 2 * pair + 1), sum[1]);
            }
        }
    }
}

/// Attention of query head `block_idx.x`.
///
/// # Safety
/// Launched as [`plan`] says, with a position below S and the rows up to it filled.
#[kernel]
pub unsafe fn attention_decode_f16(
    q: *const f32,       // (H, Dh)
    k_cache: *const u16, // (KV, S, Dh) f16
    v_cache: *const u16, // (KV, S, Dh) f16
    state: *const u32,   // (1) position
    out: *mut f32,       // (H, Dh)
    heads_per_kv: u32,
    head_dim: u32,
    context: u32,
    window: u32,
    scale: f32,
) {
    let head = thread::block_idx_x();
    let tid = thread::thread_idx_x();
    let smem = shared::dynamic_shared_mem();
    let layout = Layout::new(head_dim);
    // SAFETY: a block a head, a multiple of kv heads; the caller promises the position; barriers
    // part the three uses of shared memory, which the plan sized.
    unsafe {
        let filled = ptx::ld_global_u32(state) + 1;
        let keys = filled.min(window);
        let query = q.wrapping_add(head as usize * head_dim as usize);
        let mut d = tid;
        while d < head_dim {
            let scaled = ptx::ld_global_f32(query.wrapping_add(d as usize)) * scale;
            ptx::st_shared_f32(smem, layout.query(d), scaled);
            d += thread::block_dim_x();
        }
        thread::sync_threads();

        let row = (head / heads_per_kv) as usize * context as usize + (filled - keys) as usize;
        let kv = row * head_dim as usize;
        let (k, v) = (k_cache.wrapping_add(kv), v_cache.wrapping_add(kv));
        match head_dim.div_ceil(64) {
            1 => warp_share::<1>(k, v, keys, head_dim, smem),
            2 => warp_share::<2>(k, v, keys, head_dim, smem),
            3 => warp_share::<3>(k, v, keys, head_dim, smem),
            _ => warp_share::<4>(k, v, keys, head_dim, smem),
        }
        thread::sync_threads();

        // A warp without keys has maximum -inf and so weighs nothing; warp 0 always has one.
        let mut maximum = f32::NEG_INFINITY;
        for w in 0..WARPS {
            maximum = maximum.max(ptx::ld_shared_f32(smem, layout.maximum(w)));
        }
        let mut d = tid;
        while d < head_dim {
            let (mut value, mut weight) = (0.0, 0.0);
            for w in 0..WARPS {
                let share = ptx::exp(ptx::ld_shared_f32(smem, layout.maximum(w)) - maximum);
                weight = ptx::fma(share, ptx::ld_shared_f32(smem, layout.weight(w)), weight);
                value = ptx::fma(share, ptx::ld_shared_f32(smem, layout.value(w, d)), value);
            }
            let attended = value * ptx::rcp(weight);
            ptx::st_global_f32(out.wrapping_add((head * head_dim + d) as usize), attended);
            d += thread::block_dim_x();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::DeviceSlice;

    #[test]
    fn shared_memory_regions_do_not_overlap() {
        for head_dim in [2, 32, 34, 64, 80, 96, 128, 254, 256] {
            let layout = Layout::new(head_dim);
            assert!(layout.query(head_dim - 1) + 4 <= layout.maximum(0));
            assert_eq!(layout.maximum(WARPS - 1) + 4, layout.weight(0));
            assert_eq!(layout.weight(WARPS - 1) + 4, layout.value(0, 0));
            assert_eq!(layout.value(0, head_dim - 1) + 4, layout.value(1, 0));
            assert_eq!(layout.value(WARPS - 1, head_dim - 1) + 4, layout.bytes());
        }
    }

    #[test]
    fn halves_unpack_low_first() {
        assert_eq!(unpack(0xc000_3c00), [1.0, -2.0]);
    }

    #[test]
    fn plan_takes_grouped_heads_and_refuses_ragged_ones() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 1 << 20,
        };
        let ops = Operands {
            q: slice,
            k_cache: slice,
            v_cache: slice,
            v_scales: DeviceSlice::NONE,
            state: slice,
            out: slice,
            partials: DeviceSlice::NONE,
        };
        let shape = Shape {
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            context: 512,
            scale: 0.125,
            window: None,
        };
        let call = plan(&DeviceInfo::T4, &shape, &ops).unwrap();
        assert_eq!(call.launch.grid, [9, 1, 1]);
        let (all, scale) = (1 << 30, u64::from(0.125f32.to_bits()));
        assert_eq!(call.args[5..], [3, 64, 512, all, scale]);
        let refused = |shape| plan(&DeviceInfo::T4, &shape, &ops).is_err();
        assert!(refused(Shape {
            kv_heads: 2,
            ..shape
        }));
        assert!(refused(Shape {
            kv_heads: 0,
            ..shape
        }));
        assert!(refused(Shape {
            window: Some(0),
            ..shape
        }));
        assert!(refused(Shape {
            head_dim: 65,
            ..shape
        }));
        assert!(refused(Shape {
            head_dim: 258,
            ..shape
        }));
        assert!(refused(Shape {
            context: 1 << 20,
            ..shape
        }));
    }
}
