//! Appends one token's keys and values to the f16 cache of a layer.
//!
//! Shapes: k and v `(KV, Dh)` f32; caches `(KV, S, Dh)` f16, so that one head's keys are
//! contiguous over the positions that attention walks.
//!
//! ```text
//! block h            -> kv head h
//! thread t           -> elements t, t + BLOCK, ... of the head, of k and of v
//! cache[h, position, t] = f16(k[h, t])      round to nearest even
//! ```
//!
//! Bytes moved: `8 KV Dh` read, `4 KV Dh` written. Coalesced, no shared memory. Keys and values go
//! in one launch because a launch costs more than the copy.

use cuda_std::{kernel, thread};

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
    /// `(KV, S, Dh)` f16.
    pub v_cache: DeviceSlice,
    /// `(1,)` u32: the position, below S.
    pub state: DeviceSlice,
}

/// The launch of `kv_append_f16`.
///
/// # Errors
/// A dimension of zero, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    let &Shape {
        kv_heads,
        head_dim,
        context,
    } = shape;
    let mut call = CallBuilder::new("kv_append_f16");
    call.require(
        (1..1 << 31).contains(&kv_heads),
        "kv_heads",
        kv_heads,
        "it must be in 1..2^31",
    )?;
    let token = tensor_bytes(&[kv_heads, head_dim], 4);
    let cache = tensor_bytes(&[kv_heads, context, head_dim], 2);
    call.tensor("k", ops.k, token, 4)?;
    call.tensor("v", ops.v, token, 4)?;
    call.tensor("k_cache", ops.k_cache, cache, 2)?;
    call.tensor("v_cache", ops.v_cache, cache, 2)?;
    call.tensor("state", ops.state, 4, 4)?;
    let head_dim = call.dim("head_dim", head_dim)?;
    call.dim("context", context)?;
    let threads = head_dim.next_multiple_of(32).min(256);
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
