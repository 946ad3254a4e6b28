//! Cached values of 8 bits as halves, for the attention of many tokens, whose products take nothing
//! else.
//!
//! Shapes: levels `(KV, S, Dh)` i8, scales `(KV, S)` f16, values `(KV, S, Dh)` f16, of the positions
//! below `position + T`.
//!
//! ```text
//! block (x, h)   kv head h: eights of elements t, t + THREADS gridDim.x, ... of its rows
//! ```
//!
//! Bytes moved: `(3 Dh + 2) KV (position + T)`, a layer's values once for all the queries of a run;
//! attention reads them in the order of the run's queries, 16 times and more. Neighbouring threads
//! take neighbouring eights: coalesced, no shared memory.

use cuda_std::{kernel, thread};

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::ptx;
use crate::unroll::unroll;

/// Threads a block.
const THREADS: u32 = 256;
/// Elements a thread takes at a time.
#[cfg(not(target_arch = "nvptx64"))]
const EIGHT: u32 = 8;
/// Blocks a multiprocessor at most.
#[cfg(not(target_arch = "nvptx64"))]
const BLOCKS: u32 = 8;

/// Dimensions of the cache.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// KV: key/value heads.
    pub kv_heads: usize,
    /// Dh: head width, a multiple of 8.
    pub head_dim: usize,
    /// S: positions that the cache holds.
    pub context: usize,
}

/// Buffers of the conversion.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(KV, S, Dh)` i8.
    pub levels: DeviceSlice,
    /// `(KV, S)` f16.
    pub scales: DeviceSlice,
    /// `(1,)` u32: position of the first token; with T at most S.
    pub state: DeviceSlice,
    /// `(KV, S, Dh)` f16.
    pub values: DeviceSlice,
}

/// The launch of `kv_values_f16` for the positions up to those of `tokens` tokens.
///
/// # Errors
/// A head width that is no multiple of 8, more tokens than the cache holds, a dimension of zero, a
/// short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(
    device: &DeviceInfo,
    shape: &Shape,
    tokens: usize,
    ops: &Operands,
) -> Result<Call, ShapeError> {
    let &Shape {
        kv_heads,
        head_dim,
        context,
    } = shape;
    let mut call = CallBuilder::new("kv_values_f16");
    call.waits();
    call.require(
        head_dim.is_multiple_of(EIGHT as usize),
        "head_dim",
        head_dim,
        "it must be a multiple of 8",
    )?;
    call.require(
        (1..=context).contains(&tokens),
        "tokens",
        tokens,
        "it must be in 1..=context",
    )?;
    call.require(
        (1..=65_535).contains(&kv_heads),
        "kv_heads",
        kv_heads,
        "it must be in 1..=65535",
    )?;
    let eights = (context as u64).saturating_mul((head_dim / EIGHT as usize) as u64);
    call.require(
        eights < 1 << 31,
        "context",
        context,
        "the eights of a head's cache must be below 2^31",
    )?;
    let cache = tensor_bytes(&[kv_heads, context, head_dim], 1);
    let scales = tensor_bytes(&[kv_heads, context], 2);
    call.tensor("levels", ops.levels, cache, 8)?;
    call.tensor("scales", ops.scales, scales, 2)?;
    call.tensor("state", ops.state, 4, 4)?;
    call.tensor("values", ops.values, cache.saturating_mul(2), 16)?;
    call.dim("head_dim / 8", head_dim / EIGHT as usize)?;
    call.dim("context", context)?;
    call.dim("tokens", tokens)?;
    let kv_heads = kv_heads as u32;
    let blocks = (device.multiprocessors * BLOCKS / kv_heads).max(1);
    let useful = (eights as u32).div_ceil(THREADS);
    call.build(
        device,
        Launch {
            grid: [blocks.min(useful), kv_heads, 1],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
        },
    )
}

/// Converts the rows of kv head `block_idx.y`.
///
/// # Safety
/// Launched as [`plan`] says, with a position of at most S - T and the rows up to there filled.
#[kernel]
pub unsafe fn kv_values_f16(
    levels: *const u32, // (KV, S, Dh) i8
    scales: *const u16, // (KV, S) f16
    state: *const u32,  // (1) position
    values: *mut f32,   // (KV, S, Dh) f16
    eights: u32,
    context: u32,
    tokens: u32,
) {
    ptx::griddep_launch();
    ptx::griddep_wait();
    let first_row = thread::block_idx_y() as usize * context as usize;
    let mut i = thread::block_idx_x() * THREADS + thread::thread_idx_x();
    // SAFETY: `i` is below the eights of the filled rows of the head, which the plan checked.
    unsafe {
        let end = (ptx::ld_global_u32(state) + tokens) * eights;
        while i < end {
            let eight = first_row * eights as usize + i as usize;
            let row = first_row + (i / eights) as usize;
            let words = ptx::ld_global_once_v2_u32(levels.wrapping_add(2 * eight));
            let scale = ptx::f16_to_f32(ptx::ld_global_u16(scales.wrapping_add(row)));
            let mut halves = [0.0; 4];
            unroll!(I < 4 => {
                // Bytes 2I and 2I + 1, with their sign.
                let pair = words[I / 2] >> (I % 2 * 16);
                let low = (pair as i8) as f32 * scale;
                let high = ((pair >> 8) as i8) as f32 * scale;
                halves[I] = f32::from_bits(ptx::f32x2_to_f16x2(low, high));
            });
            ptx::st_global_v4_f32(values.wrapping_add(4 * eight), halves);
            i += thread::grid_dim_x() * THREADS;
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
            bytes: 3 * 16 * 64,
        };
        let ops = Operands {
            levels: slice,
            scales: slice,
            state: slice,
            values: DeviceSlice {
                bytes: 2 * slice.bytes,
                ..slice
            },
        };
        let shape = Shape {
            kv_heads: 3,
            head_dim: 64,
            context: 16,
        };
        let planned = |shape, tokens| plan(&DeviceInfo::T4, &shape, tokens, &ops);
        assert_eq!(planned(shape, 16).unwrap().launch.grid, [1, 3, 1]);
        assert!(planned(shape, 17).is_err());
        let more = Shape {
            context: 17,
            ..shape
        };
        assert!(planned(more, 16).is_err());
        let odd = Shape {
            head_dim: 60,
            ..shape
        };
        assert!(planned(odd, 16).is_err());
    }
}
