//! What stands between the projections and attention, in one launch: queries turned in place, keys
//! turned and appended to the cache with the values. [`rope`](crate::rope) of queries and keys and
//! [`kv_append`](crate::kv_append), without the turned keys in between.
//!
//! Shapes: q `(H, Dh)`, k and v `(KV, Dh)` f32; cos and sin `(S, Dh/2)`; caches `(KV, S, Dh)` f16,
//! values also i8 with scales `(KV, S)` f16.
//!
//! ```text
//! block b < H             -> query head b: pairs (t, t + Dh/2), t + BLOCK, ... turned in place
//! block H + h             -> kv head h: the same pairs of k turned, of v as they are, to the caches
//! 8 bits: block H + KV + h -> values of kv head h, by one warp; lane l -> elements 4l .. 4l + 4
//! ```
//!
//! Bytes moved: `8 H Dh` of queries, `8 KV Dh` of k and v, `4 KV Dh` of cache, one row of each table.
//! Neighbouring threads touch neighbouring elements of both halves: coalesced, no shared memory.
//! Limited by the launch, of which it saves two. Of many tokens at once: [`tokens`].

pub mod tokens;

use cuda_std::{kernel, thread, warp};

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::{kv_append, ptx};

/// Dimensions of the step.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// H: query heads.
    pub heads: usize,
    /// KV: key/value heads.
    pub kv_heads: usize,
    /// Dh: head width, even.
    pub head_dim: usize,
    /// S: positions of the cache, rows of the tables.
    pub context: usize,
}

/// Buffers of the step.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(H, Dh)` f32, turned in place.
    pub q: DeviceSlice,
    /// `(KV, Dh)` f32, left as it is.
    pub k: DeviceSlice,
    /// `(KV, Dh)` f32.
    pub v: DeviceSlice,
    /// `(S, Dh/2)` f32.
    pub cos: DeviceSlice,
    /// `(S, Dh/2)` f32.
    pub sin: DeviceSlice,
    /// `(KV, S, Dh)` f16.
    pub k_cache: DeviceSlice,
    /// `(KV, S, Dh)` f16, or i8.
    pub v_cache: DeviceSlice,
    /// `(KV, S)` f16 where the values are i8, none where they are f16.
    pub v_scales: DeviceSlice,
    /// `(1,)` u32: the position, below S.
    pub state: DeviceSlice,
}

/// The launch of `rope_kv_append_f16`, or with scales of `rope_kv_append_v8`.
///
/// # Errors
/// An odd head width, a dimension of zero, a short or misaligned buffer; with scales a head width that
/// is no multiple of 4 or more than 128.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    let &Shape {
        heads,
        kv_heads,
        head_dim,
        context,
    } = shape;
    let of_8_bits = ops.v_scales != DeviceSlice::NONE;
    let mut call = CallBuilder::new(if of_8_bits {
        "rope_kv_append_v8"
    } else {
        "rope_kv_append_f16"
    });
    call.waits();
    call.require(
        head_dim.is_multiple_of(2),
        "head_dim",
        head_dim,
        "it must be even",
    )?;
    call.require(
        (1..1 << 30).contains(&kv_heads),
        "kv_heads",
        kv_heads,
        "it must be in 1..2^30",
    )?;
    call.require(
        (1..1 << 30).contains(&heads),
        "heads",
        heads,
        "it must be in 1..2^30",
    )?;
    let token = tensor_bytes(&[kv_heads, head_dim], 4);
    let table = tensor_bytes(&[context, head_dim / 2], 4);
    let cache = tensor_bytes(&[kv_heads, context, head_dim], 2);
    call.tensor("q", ops.q, tensor_bytes(&[heads, head_dim], 4), 4)?;
    call.tensor("k", ops.k, token, 4)?;
    call.tensor("v", ops.v, token, if of_8_bits { 16 } else { 4 })?;
    call.tensor("cos", ops.cos, table, 4)?;
    call.tensor("sin", ops.sin, table, 4)?;
    call.tensor("k_cache", ops.k_cache, cache, 2)?;
    if of_8_bits {
        kv_append::require_quads(&call, head_dim)?;
        call.tensor("v_cache", ops.v_cache, cache / 2, 4)?;
        let scales = tensor_bytes(&[kv_heads, context], 2);
        call.tensor("v_scales", ops.v_scales, scales, 2)?;
    } else {
        call.tensor("v_cache", ops.v_cache, cache, 2)?;
    }
    call.tensor("state", ops.state, 4, 4)?;
    call.u32(heads as u32);
    if of_8_bits {
        call.u32(kv_heads as u32);
    }
    let half = call.dim("head_dim / 2", head_dim / 2)?;
    call.dim("context", context)?;
    let threads = half.next_multiple_of(32).min(128);
    let blocks = heads + kv_heads * if of_8_bits { 2 } else { 1 };
    call.build(device, Launch::linear(blocks as u32, threads, 0))
}

/// What turns the heads.
#[derive(Clone, Copy)]
struct Args {
    q: *mut f32,
    k: *const f32,
    cos: *const f32,
    sin: *const f32,
    k_cache: *mut u16,
    /// H.
    heads: u32,
    /// Dh / 2.
    half: usize,
    /// S.
    context: u32,
}

/// Turns query head `block_idx.x`, or appends kv head `block_idx.x - heads`; with halves as values
/// those too.
///
/// # Safety
/// Launched as [`plan`] says, a block a head, with `position` below S.
#[inline(always)]
unsafe fn turn(args: &Args, position: usize, values: Option<(*const f32, *mut u16)>) {
    let block = thread::block_idx_x();
    let half = args.half;
    let mut i = thread::thread_idx_x() as usize;
    // SAFETY: a block a head and `i < half`, so both elements of the pair lie in the head; the plan
    // checked buffers, tables and caches for S positions and the caller promises one below S.
    unsafe {
        while i < half {
            let c = ptx::ld_global_nc_f32(args.cos.wrapping_add(position * half + i));
            let s = ptx::ld_global_nc_f32(args.sin.wrapping_add(position * half + i));
            if block < args.heads {
                let low = args.q.wrapping_add(2 * half * block as usize + i);
                let high = low.wrapping_add(half);
                let (a, b) = (ptx::ld_global_f32(low), ptx::ld_global_f32(high));
                ptx::st_global_f32(low, ptx::fma(a, c, -(b * s)));
                ptx::st_global_f32(high, ptx::fma(b, c, a * s));
            } else {
                let head = (block - args.heads) as usize;
                let from = 2 * half * head + i;
                let to = 2 * half * (head * args.context as usize + position) + i;
                let a = ptx::ld_global_f32(args.k.wrapping_add(from));
                let b = ptx::ld_global_f32(args.k.wrapping_add(from + half));
                let low = ptx::fma(a, c, -(b * s));
                let high = ptx::fma(b, c, a * s);
                let keys = args.k_cache.wrapping_add(to);
                ptx::st_global_u16(keys, ptx::f32_to_f16(low));
                ptx::st_global_u16(keys.wrapping_add(half), ptx::f32_to_f16(high));
                if let Some((v, v_cache)) = values {
                    let low = ptx::ld_global_f32(v.wrapping_add(from));
                    let high = ptx::ld_global_f32(v.wrapping_add(from + half));
                    ptx::st_global_u16(v_cache.wrapping_add(to), ptx::f32_to_f16(low));
                    ptx::st_global_u16(v_cache.wrapping_add(to + half), ptx::f32_to_f16(high));
                }
            }
            i += thread::block_dim_x() as usize;
        }
    }
}

/// Turns query head `block_idx.x`, or appends kv head `block_idx.x - heads`.
///
/// # Safety
/// Launched as [`plan`] says, with a position below S.
#[kernel]
pub unsafe fn rope_kv_append_f16(
    q: *mut f32,       // (H, Dh)
    k: *const f32,     // (KV, Dh)
    v: *const f32,     // (KV, Dh)
    cos: *const f32,   // (S, Dh/2)
    sin: *const f32,   // (S, Dh/2)
    k_cache: *mut u16, // (KV, S, Dh) f16
    v_cache: *mut u16, // (KV, S, Dh) f16
    state: *const u32, // (1) position
    heads: u32,
    half: u32,
    context: u32,
) {
    ptx::griddep_launch();
    ptx::griddep_wait();
    let half = half as usize;
    let args = Args {
        q,
        k,
        cos,
        sin,
        k_cache,
        heads,
        half,
        context,
    };
    // SAFETY: passed on.
    unsafe {
        turn(
            &args,
            ptx::ld_global_u32(state) as usize,
            Some((v, v_cache)),
        )
    }
}

/// Turns query head `block_idx.x`, or appends the keys of the heads after those, or the values, as
/// bytes with a scale, of those after them.
///
/// # Safety
/// Launched as [`plan`] says, with a position below S.
#[kernel]
pub unsafe fn rope_kv_append_v8(
    q: *mut f32,        // (H, Dh)
    k: *const f32,      // (KV, Dh)
    v: *const f32,      // (KV, Dh)
    cos: *const f32,    // (S, Dh/2)
    sin: *const f32,    // (S, Dh/2)
    k_cache: *mut u16,  // (KV, S, Dh) f16
    v_cache: *mut u8,   // (KV, S, Dh) i8
    v_scales: *mut u16, // (KV, S) f16
    state: *const u32,  // (1) position
    heads: u32,
    kv_heads: u32,
    half: u32,
    context: u32,
) {
    ptx::griddep_launch();
    ptx::griddep_wait();
    let half = half as usize;
    let args = Args {
        q,
        k,
        cos,
        sin,
        k_cache,
        heads,
        half,
        context,
    };
    let block = thread::block_idx_x();
    // SAFETY: a block a head; of the values whole warps go or stay, and lanes take what lies in the
    // head, whose width is a multiple of 4. The rest is passed on.
    unsafe {
        let position = ptx::ld_global_u32(state) as usize;
        if block < heads + kv_heads {
            turn(&args, position, None);
        } else if thread::thread_idx_x() < warp::SIZE {
            let head = (block - heads - kv_heads) as usize;
            let d = thread::thread_idx_x() as usize * 4;
            let there = d < 2 * half;
            let row = head * context as usize + position;
            let from = v.wrapping_add(head * 2 * half + d);
            let value = ptx::ld_global_v4_f32_if(there, from, [0.0; 4]);
            let to = v_cache.wrapping_add(row * 2 * half + d);
            kv_append::put_bytes(value, there, to, v_scales.wrapping_add(row));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_checks_heads_tables_and_caches() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 2 * 16 * 80 * 2,
        };
        let ops = Operands {
            q: slice,
            k: slice,
            v: slice,
            cos: slice,
            sin: slice,
            k_cache: slice,
            v_cache: slice,
            v_scales: DeviceSlice::NONE,
            state: slice,
        };
        let shape = Shape {
            heads: 9,
            kv_heads: 2,
            head_dim: 80,
            context: 16,
        };
        let call = plan(&DeviceInfo::T4, &shape, &ops).unwrap();
        assert_eq!((call.launch.grid[0], call.launch.block[0]), (11, 64));
        let bytes = Operands {
            v_scales: slice,
            ..ops
        };
        let call = plan(&DeviceInfo::T4, &shape, &bytes).unwrap();
        assert_eq!(
            (call.kernel, call.launch.grid[0]),
            ("rope_kv_append_v8", 13)
        );
        let short = |shape: Shape| match plan(&DeviceInfo::T4, &shape, &ops) {
            Err(ShapeError::ShortBuffer { buffer, .. }) => buffer,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            short(Shape {
                context: 17,
                ..shape
            }),
            "k_cache"
        );
        assert_eq!(short(Shape { heads: 17, ..shape }), "q");
        let odd = Shape {
            head_dim: 79,
            ..shape
        };
        assert!(plan(&DeviceInfo::T4, &odd, &ops).is_err());
    }
}
