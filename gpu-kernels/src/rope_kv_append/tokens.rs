//! [`rope_kv_append`](super) of many tokens, with the norms that some models put on each head in front.
//!
//! Shapes: q `(T, H, Dh)`, k and v `(T, KV, Dh)` f32, each with a stride from token to token, as they
//! lie in the result of one product; turned queries `(T, H, Dh)` f16; cos and sin `(S, Dh/2)`; caches
//! `(KV, S, Dh)` f16, values also i8 with scales `(KV, S)` f16.
//!
//! ```text
//! warp (t, h < H)       query head h of token t: pairs (lane, lane + Dh/2), 32 further, ... turned
//! warp (t, H + h)       kv head h: the same pairs of k turned, of v as they are, to the caches
//! 8 bits: (t, H + KV + h) values of kv head h; lane l -> elements 4l .. 4l + 4
//! ```
//!
//! In a product whose heads are packed in tiles (`models::quant::Int4Tiled::pack_heads`) both elements of
//! a pair lie in the same 16: element i of the first half at `16 (i / 8) + i % 8`, its partner 8 further.
//!
//! Bytes moved: `4 T (H + 2 KV) Dh` read, half as many written, the tables once a token. Neighbouring
//! lanes touch neighbouring elements of both halves: coalesced, no shared memory. A head's norm reads
//! it twice, the second time from L1.

use cuda_std::{kernel, thread, warp};

#[cfg(not(target_arch = "nvptx64"))]
use super::Shape;
#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::unroll::unroll;
use crate::{kv_append, ptx};

/// Warps a block.
const WARPS: u32 = 4;

/// A buffer `(T, heads, Dh)` f32 whose tokens lie apart.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Strided {
    /// From the first element of the first token on.
    pub slice: DeviceSlice,
    /// Elements from a token to the next.
    pub stride: usize,
}

/// Buffers of the step.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Operands {
    /// H heads.
    pub q: Strided,
    /// KV heads.
    pub k: Strided,
    /// KV heads.
    pub v: Strided,
    /// Heads are packed in tiles; their width is a multiple of 16.
    pub in_tiles: bool,
    /// `((H + 2 KV) Dh,)` f32 in natural order, added first, or none.
    pub bias: DeviceSlice,
    /// `(Dh,)` f32: weights of an RMSNorm of each query head, or none.
    pub q_gain: DeviceSlice,
    /// `(Dh,)` f32: the same of the keys.
    pub k_gain: DeviceSlice,
    /// Added to the norms' mean square.
    pub eps: f32,
    /// `(S, Dh/2)` f32.
    pub cos: DeviceSlice,
    /// `(S, Dh/2)` f32.
    pub sin: DeviceSlice,
    /// `(T, H, Dh)` f16.
    pub turned: DeviceSlice,
    /// `(KV, S, Dh)` f16.
    pub k_cache: DeviceSlice,
    /// `(KV, S, Dh)` f16, or i8.
    pub v_cache: DeviceSlice,
    /// `(KV, S)` f16 where the values are i8, none where they are f16.
    pub v_scales: DeviceSlice,
    /// `(1,)` u32: position of the first token; with T at most S.
    pub state: DeviceSlice,
}

/// The launch of `rope_kv_append_tokens_f16`, or with scales of `rope_kv_append_tokens_v8`.
///
/// # Errors
/// An odd head width, more tokens than the cache holds, a dimension of zero, a short or misaligned
/// buffer; with scales a head width that is no multiple of 4 or more than 128.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(
    device: &DeviceInfo,
    shape: &Shape,
    tokens: usize,
    ops: &Operands,
) -> Result<Call, ShapeError> {
    let &Shape {
        heads,
        kv_heads,
        head_dim,
        context,
    } = shape;
    let of_8_bits = ops.v_scales != DeviceSlice::NONE;
    let mut call = CallBuilder::new(if of_8_bits {
        "rope_kv_append_tokens_v8"
    } else {
        "rope_kv_append_tokens_f16"
    });
    call.waits();
    call.require(
        head_dim.is_multiple_of(2),
        "head_dim",
        head_dim,
        "it must be even",
    )?;
    call.require(
        (1..=context).contains(&tokens),
        "tokens",
        tokens,
        "it must be in 1..=context",
    )?;
    let table = tensor_bytes(&[context, head_dim / 2], 4);
    let cache = tensor_bytes(&[kv_heads, context, head_dim], 2);
    let gain = tensor_bytes(&[head_dim], 4);
    for (name, from, heads) in [
        ("q", ops.q, heads),
        ("k", ops.k, kv_heads),
        ("v", ops.v, kv_heads),
    ] {
        // The last token has no gap behind it.
        let before = tensor_bytes(&[tokens - 1, from.stride], 4);
        let need = before.saturating_add(tensor_bytes(&[heads, head_dim], 4));
        call.tensor(name, from.slice, need, 4)?;
    }
    call.require(
        !ops.in_tiles || head_dim.is_multiple_of(16),
        "head_dim",
        head_dim,
        "it must be a multiple of 16 where heads are packed in tiles",
    )?;
    let all_heads = heads.saturating_add(kv_heads.saturating_mul(2));
    let biases = tensor_bytes(&[all_heads, head_dim], 4);
    call.optional("bias", ops.bias, biases, 4)?;
    call.optional("q_gain", ops.q_gain, gain, 4)?;
    call.optional("k_gain", ops.k_gain, gain, 4)?;
    call.tensor("cos", ops.cos, table, 4)?;
    call.tensor("sin", ops.sin, table, 4)?;
    let rows = tensor_bytes(&[tokens, heads, head_dim], 2);
    call.tensor("turned", ops.turned, rows, 2)?;
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
    call.dim("q stride", ops.q.stride)?;
    call.dim("k stride", ops.k.stride)?;
    call.dim("v stride", ops.v.stride)?;
    let tokens = call.dim("tokens", tokens)?;
    let heads = call.dim("heads", heads)?;
    let kv_heads = call.dim("kv_heads", kv_heads)?;
    call.dim("head_dim / 2", head_dim / 2)?;
    call.dim("context", context)?;
    call.f32(ops.eps);
    call.u32(u32::from(ops.in_tiles));
    let appended = u64::from(kv_heads) * if of_8_bits { 2 } else { 1 };
    let warps = u64::from(tokens) * (u64::from(heads) + appended);
    call.require(
        warps < 1 << 31,
        "tokens",
        tokens as usize,
        "with all their heads they must be fewer than 2^31",
    )?;
    let blocks = (warps as u32).div_ceil(WARPS);
    call.build(device, Launch::linear(blocks, WARPS * 32, 0))
}

/// A head of a token.
#[derive(Clone, Copy)]
struct Head {
    from: *const f32,
    /// Of the head, or null.
    bias: *const f32,
    /// Dh / 2.
    half: usize,
    in_tiles: bool,
}

impl Head {
    /// Elements i and `i + Dh/2`, with their biases.
    ///
    /// # Safety
    /// `i` is below `half`.
    #[inline(always)]
    unsafe fn pair(&self, i: usize) -> [f32; 2] {
        let (low, high) = if self.in_tiles {
            let low = i / 8 * 16 + i % 8;
            (low, low + 8)
        } else {
            (i, i + self.half)
        };
        // SAFETY: both elements are there.
        unsafe {
            let mut pair = [
                ptx::ld_global_f32(self.from.wrapping_add(low)),
                ptx::ld_global_f32(self.from.wrapping_add(high)),
            ];
            if !self.bias.is_null() {
                let bias = self.bias.wrapping_add(i);
                pair[0] += ptx::ld_global_nc_f32(bias);
                pair[1] += ptx::ld_global_nc_f32(bias.wrapping_add(self.half));
            }
            pair
        }
    }

    /// Elements d to d + 4, with their biases.
    ///
    /// # Safety
    /// They lie in the head, and `d` is a multiple of 4.
    #[inline(always)]
    unsafe fn quad(&self, d: usize) -> [f32; 4] {
        let mut first = d;
        if self.in_tiles {
            let second = usize::from(d >= self.half);
            let i = d - second * self.half;
            first = i / 8 * 16 + second * 8 + i % 8;
        }
        let mut quad = [0.0; 4];
        // SAFETY: four elements side by side, as eight of them are in a tile.
        unsafe {
            unroll!(I < 4 => {
                quad[I] = ptx::ld_global_f32(self.from.wrapping_add(first + I));
                if !self.bias.is_null() {
                    quad[I] += ptx::ld_global_nc_f32(self.bias.wrapping_add(d + I));
                }
            });
        }
        quad
    }

    /// What the head is multiplied by for its norm.
    ///
    /// # Safety
    /// All lanes of the warp call it.
    #[inline(always)]
    unsafe fn norm_factor(&self, eps: f32) -> f32 {
        let mut squares = 0.0;
        let mut i = warp::lane_id() as usize;
        while i < self.half {
            // SAFETY: below `half`.
            let [a, b] = unsafe { self.pair(i) };
            squares = ptx::fma(a, a, ptx::fma(b, b, squares));
            i += 32;
        }
        let mean = warp::reduce_sum_f32(squares) * ptx::rcp(2.0 * self.half as f32);
        ptx::rsqrt(mean + eps)
    }
}

/// Parameters of a launch but for the values' cache.
#[derive(Clone, Copy)]
struct Args {
    q: *const f32,
    k: *const f32,
    v: *const f32,
    bias: *const f32,
    q_gain: *const f32,
    k_gain: *const f32,
    cos: *const f32,
    sin: *const f32,
    turned: *mut u16,
    k_cache: *mut u16,
    state: *const u32,
    q_stride: u32,
    k_stride: u32,
    v_stride: u32,
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    half: u32,
    context: u32,
    eps: f32,
    in_tiles: u32,
}

/// Where values go.
#[derive(Clone, Copy)]
enum Values {
    /// f16, with the keys.
    Halves(*mut u16),
    /// i8 and scales, by warps of their own.
    Bytes(*mut u8, *mut u16),
}

/// The body of both kernels.
///
/// # Safety
/// Launched as [`plan`] says, with a position of at most S - T.
#[inline(always)]
unsafe fn turn(args: &Args, to_values: Values) {
    ptx::griddep_launch();
    ptx::griddep_wait();
    let Args {
        heads, kv_heads, ..
    } = *args;
    let warp = thread::block_idx_x() * WARPS + thread::thread_idx_x() / 32;
    let all = heads
        + kv_heads
            * if let Values::Bytes(..) = to_values {
                2
            } else {
                1
            };
    let (token, head) = ((warp / all) as usize, warp % all);
    if token >= args.tokens as usize {
        return;
    }
    let (is_query, is_value) = (head < heads, head >= heads + kv_heads);
    // Of q, k and v, and of its own kind.
    let row = head as usize;
    let head = if is_query {
        head
    } else if is_value {
        head - heads - kv_heads
    } else {
        head - heads
    } as usize;
    let half = args.half as usize;
    let width = 2 * half;
    let head_of = |from: *const f32, stride: u32, row: usize| Head {
        from: from.wrapping_add(token * stride as usize + head * width),
        bias: if args.bias.is_null() {
            args.bias
        } else {
            args.bias.wrapping_add(row * width)
        },
        half,
        in_tiles: args.in_tiles != 0,
    };
    // SAFETY: a warp a head of a token, and `i` below half the head, so both elements of a pair lie in
    // the head; the plan checked buffers, tables and caches for S positions, and the caller promises
    // that the tokens end below S.
    unsafe {
        let position = ptx::ld_global_u32(args.state) as usize + token;
        let cached = head * args.context as usize + position;
        if let Values::Bytes(v_cache, v_scales) = to_values
            && is_value
        {
            let d = warp::lane_id() as usize * 4;
            let there = d < width;
            let mut value = [0.0; 4];
            if there {
                value = head_of(args.v, args.v_stride, row).quad(d);
            }
            let to = v_cache.wrapping_add(cached * width + d);
            kv_append::put_bytes(value, there, to, v_scales.wrapping_add(cached));
            return;
        }
        let (turns, gain, to) = if is_query {
            let to = (token * heads as usize + head) * width;
            let turns = head_of(args.q, args.q_stride, row);
            (turns, args.q_gain, args.turned.wrapping_add(to))
        } else {
            let turns = head_of(args.k, args.k_stride, row);
            (
                turns,
                args.k_gain,
                args.k_cache.wrapping_add(cached * width),
            )
        };
        let values = head_of(args.v, args.v_stride, row + kv_heads as usize);
        let factor = if gain.is_null() {
            1.0
        } else {
            turns.norm_factor(args.eps)
        };
        let mut i = warp::lane_id() as usize;
        while i < half {
            let c = ptx::ld_global_nc_f32(args.cos.wrapping_add(position * half + i));
            let s = ptx::ld_global_nc_f32(args.sin.wrapping_add(position * half + i));
            let [mut a, mut b] = turns.pair(i);
            if !gain.is_null() {
                a *= factor * ptx::ld_global_nc_f32(gain.wrapping_add(i));
                b *= factor * ptx::ld_global_nc_f32(gain.wrapping_add(i + half));
            }
            let low = ptx::f32_to_f16(ptx::fma(a, c, -(b * s)));
            let high = ptx::f32_to_f16(ptx::fma(b, c, a * s));
            ptx::st_global_u16(to.wrapping_add(i), low);
            ptx::st_global_u16(to.wrapping_add(i + half), high);
            if let Values::Halves(v_cache) = to_values
                && !is_query
            {
                let [low, high] = values.pair(i);
                let to = v_cache.wrapping_add(cached * width + i);
                ptx::st_global_u16(to, ptx::f32_to_f16(low));
                ptx::st_global_u16(to.wrapping_add(half), ptx::f32_to_f16(high));
            }
            i += 32;
        }
    }
}

macro_rules! entries {
    ($($(#[$doc:meta])* $name:ident($value:ident: $ty:ty $(, $scales:ident)?) -> $to:expr;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// Launched as [`plan`] says, with a position of at most S - T.
        #[kernel]
        pub unsafe fn $name(
            q: *const f32,      // (T, H, Dh), strided
            k: *const f32,      // (T, KV, Dh), strided
            v: *const f32,      // (T, KV, Dh), strided
            bias: *const f32,   // ((H + 2 KV) Dh), or null
            q_gain: *const f32, // (Dh), or null
            k_gain: *const f32, // (Dh), or null
            cos: *const f32,    // (S, Dh/2)
            sin: *const f32,    // (S, Dh/2)
            turned: *mut u16,   // (T, H, Dh) f16
            k_cache: *mut u16,  // (KV, S, Dh) f16
            $value: $ty,        // (KV, S, Dh) f16 or i8
            $($scales: *mut u16,)? // (KV, S) f16
            state: *const u32,  // (1) position
            q_stride: u32,
            k_stride: u32,
            v_stride: u32,
            tokens: u32,
            heads: u32,
            kv_heads: u32,
            half: u32,
            context: u32,
            eps: f32,
            in_tiles: u32,
        ) {
            let args = Args {
                q, k, v, bias, q_gain, k_gain, cos, sin, turned, k_cache, state, q_stride,
                k_stride, v_stride, tokens, heads, kv_heads, half, context, eps, in_tiles,
            };
            // SAFETY: passed on.
            unsafe { turn(&args, $to) }
        }
    )*};
}

entries! {
    /// Turns the queries of `tokens` tokens, and appends their keys and values.
    rope_kv_append_tokens_f16(v_cache: *mut u16) -> Values::Halves(v_cache);
    /// The same, the values as bytes with a scale.
    rope_kv_append_tokens_v8(v_cache: *mut u8, v_scales) -> Values::Bytes(v_cache, v_scales);
}
