//! Appends one token's keys and values to the cache of a layer: f16, or values of 8 bits.
//!
//! Shapes: k and v `(KV, Dh)` f32; caches `(KV, S, Dh)` f16, so that one head's keys are
//! contiguous over the positions that attention walks. Values of 8 bits: `(KV, S, Dh)` i8 with
//! scales `(KV, S)` f16, 127 for the greatest magnitude of the head's elements.
//!
//! ```text
//! block h            -> kv head h
//! thread t           -> elements t, t + BLOCK, ... of the head, of k and of v
//! cache[h, position, t] = f16(k[h, t])      round to nearest even
//! 8 bits: block h, one warp; lane l -> elements 4l .. 4l + 4 of the head
//! ```
//!
//! Bytes moved: `8 KV Dh` read, `4 KV Dh` written. Coalesced, no shared memory. Keys and values go
//! in one launch because a launch costs more than the copy.

use cuda_std::{kernel, thread, warp};

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::ptx;

/// Dimensions of the cache.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// KV: key/value heads.
    pub kv_heads: usize,
    /// Dh: head width.
    pub head_dim: usize,
    /// S: positions that the cache holds.
    pub context: usize,
}

/// Buffers of the append.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(KV, Dh)` f32, already turned.
    pub k: DeviceSlice,
    /// `(KV, Dh)` f32.
    pub v: DeviceSlice,
    /// `(KV, S, Dh)` f16.
    pub k_cache: DeviceSlice,
    /// `(KV, S, Dh)` f16, or i8.
    pub v_cache: DeviceSlice,
    /// `(KV, S)` f16 where the values are i8, none where they are f16.
    pub v_scales: DeviceSlice,
    /// `(1,)` u32: the position, below S.
    pub state: DeviceSlice,
}

/// The launch of `kv_append_f16`, or with scales of `kv_append_v8`.
///
/// # Errors
/// A dimension of zero, a short or misaligned buffer; with scales a head width that is no multiple
/// of 4 or more than 128.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    let &Shape {
        kv_heads,
        head_dim,
        context,
    } = shape;
    let of_8_bits = ops.v_scales != DeviceSlice::NONE;
    let mut call = CallBuilder::new(if of_8_bits {
        "kv_append_v8"
    } else {
        "kv_append_f16"
    });
    call.require(
        (1..1 << 31).contains(&kv_heads),
        "kv_heads",
        kv_heads,
        "it must be in 1..2^31",
    )?;
    let token = tensor_bytes(&[kv_heads, head_dim], 4);
    let cache = [kv_heads, context, head_dim];
    // Four elements at a time to values of 8 bits.
    let quad = if of_8_bits { 4 } else { 1 };
    let value_bytes = if of_8_bits { 1 } else { 2 };
    call.tensor("k", ops.k, token, 4 * quad)?;
    call.tensor("v", ops.v, token, 4 * quad)?;
    call.tensor("k_cache", ops.k_cache, tensor_bytes(&cache, 2), 2 * quad)?;
    call.tensor("v_cache", ops.v_cache, tensor_bytes(&cache, value_bytes), 4)?;
    if of_8_bits {
        require_quads(&call, head_dim)?;
        let scales = tensor_bytes(&[kv_heads, context], 2);
        call.tensor("v_scales", ops.v_scales, scales, 2)?;
    }
    call.tensor("state", ops.state, 4, 4)?;
    let head_dim = call.dim("head_dim", head_dim)?;
    call.dim("context", context)?;
    let threads = if of_8_bits {
        warp::SIZE
    } else {
        head_dim.next_multiple_of(32).min(256)
    };
    call.build(device, Launch::linear(kv_heads as u32, threads, 0))
}

/// Writes row `position` of head `block_idx.x` in both caches.
///
/// # Safety
/// Launched as [`plan`] says, with a position below S.
#[kernel]
pub unsafe fn kv_append_f16(
    k: *const f32,     // (KV, Dh)
    v: *const f32,     // (KV, Dh)
    k_cache: *mut u16, // (KV, S, Dh) f16
    v_cache: *mut u16, // (KV, S, Dh) f16
    state: *const u32, // (1) position
    head_dim: u32,
    context: u32,
) {
    let head = thread::block_idx_x() as usize;
    let mut d = thread::thread_idx_x();
    // SAFETY: a block a kv head and `d < head_dim`; the plan checked the buffers and the caller
    // promises a position below S.
    unsafe {
        let position = ptx::ld_global_u32(state) as usize;
        let source = head * head_dim as usize;
        let row = (head * context as usize + position) * head_dim as usize;
        while d < head_dim {
            let i = d as usize;
            let key = ptx::ld_global_f32(k.wrapping_add(source + i));
            let value = ptx::ld_global_f32(v.wrapping_add(source + i));
            ptx::st_global_u16(k_cache.wrapping_add(row + i), ptx::f32_to_f16(key));
            ptx::st_global_u16(v_cache.wrapping_add(row + i), ptx::f32_to_f16(value));
            d += thread::block_dim_x();
        }
    }
}

/// Adding and taking away 1.5 2^23 rounds to the nearest whole number, ties to even.
const ROUND: f32 = 12_582_912.0;

/// Writes row `position` of head `block_idx.x` in both caches, the values as bytes with a scale.
///
/// # Safety
/// Launched as [`plan`] says, with a position below S.
#[kernel]
pub unsafe fn kv_append_v8(
    k: *const f32,      // (KV, Dh)
    v: *const f32,      // (KV, Dh)
    k_cache: *mut u16,  // (KV, S, Dh) f16
    v_cache: *mut u8,   // (KV, S, Dh) i8
    v_scales: *mut u16, // (KV, S) f16
    state: *const u32,  // (1) position
    head_dim: u32,
    context: u32,
) {
    let head = thread::block_idx_x() as usize;
    let d = thread::thread_idx_x() * 4;
    let there = d < head_dim;
    // SAFETY: a block a kv head and `d` in the head, whose width is a multiple of 4; the plan
    // checked the buffers and the caller promises a position below S.
    unsafe {
        let position = ptx::ld_global_u32(state) as usize;
        let row = head * context as usize + position;
        let from = head * head_dim as usize + d as usize;
        let to = row * head_dim as usize + d as usize;
        let key = ptx::ld_global_v4_f32_if(there, k.wrapping_add(from), [0.0; 4]);
        let value = ptx::ld_global_v4_f32_if(there, v.wrapping_add(from), [0.0; 4]);
        if there {
            let keys = k_cache.wrapping_add(to).cast();
            ptx::st_global_u32(keys, ptx::f32x2_to_f16x2(key[0], key[1]));
            ptx::st_global_u32(keys.wrapping_add(1), ptx::f32x2_to_f16x2(key[2], key[3]));
        }
        put_bytes(
            value,
            there,
            v_cache.wrapping_add(to),
            v_scales.wrapping_add(row),
        );
    }
}

/// Writes a head's values as bytes: the four of each lane that is there to `to`, their scale to
/// `scale`. Zeros stand in for what is not there.
///
/// # Safety
/// All lanes of a warp call it; lane 0 is there. `to` is a multiple of 4 bytes.
#[inline(always)]
pub(crate) unsafe fn put_bytes(value: [f32; 4], there: bool, to: *mut u8, scale: *mut u16) {
    let [a, b, c, e] = value.map(f32::abs);
    let greatest = warp::reduce_max_f32(a.max(b).max(c.max(e)));
    let bits = ptx::f32_to_f16(greatest * (1.0 / 127.0));
    let step = ptx::f16_to_f32(bits);
    let mut inverse = 0.0;
    if step > 0.0 {
        inverse = 1.0 / step;
    }
    // A scale that was rounded down leaves a little more than 127.
    let level = |v: f32| {
        let rounded = (v * inverse + ROUND) - ROUND;
        rounded.clamp(-127.0, 127.0) as i32 as u32 & 0xff
    };
    // SAFETY: the lane's four, and the head's scale, by one lane.
    unsafe {
        if there {
            let levels = value.map(level);
            let word = levels[0] | levels[1] << 8 | levels[2] << 16 | levels[3] << 24;
            ptx::st_global_u32(to.cast(), word);
        }
        if warp::lane_id() == 0 {
            ptx::st_global_u16(scale, bits);
        }
    }
}

/// What values of 8 bits want of a head width: a warp takes it four elements a lane.
#[cfg(not(target_arch = "nvptx64"))]
pub(crate) fn require_quads(call: &CallBuilder, head_dim: usize) -> Result<(), ShapeError> {
    call.require(
        head_dim.is_multiple_of(4) && head_dim <= 128,
        "head_dim",
        head_dim,
        "with values of 8 bits it must be a multiple of 4 up to 128",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_checks_the_whole_cache() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 3 * 16 * 64 * 2,
        };
        let ops = Operands {
            k: slice,
            v: slice,
            k_cache: slice,
            v_cache: slice,
            v_scales: DeviceSlice::NONE,
            state: slice,
        };
        let shape = Shape {
            kv_heads: 3,
            head_dim: 64,
            context: 16,
        };
        assert_eq!(
            plan(&DeviceInfo::T4, &shape, &ops).unwrap().launch.grid[0],
            3
        );
        let shape = Shape {
            context: 17,
            ..shape
        };
        assert!(matches!(
            plan(&DeviceInfo::T4, &shape, &ops),
            Err(ShapeError::ShortBuffer {
                buffer: "k_cache",
                ..
            })
        ));
    }
}
