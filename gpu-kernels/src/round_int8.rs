//! Activations rounded to 8 bits and back, a scale a token: `x = round(x s) / s`, ties to even,
//! `s = 127 / max(|x|, 1e-5)` (BitNet b1.58, <https://arxiv.org/abs/2402.17764>).
//!
//! Shapes: x `(T, D)`, in place; scales `(T,)`, or none. With scales x becomes levels, -127 to 127, and `1 / s` lies
//! there.
//!
//! ```text
//! block b      -> token b
//! thread t     -> elements 4t + 4 BLOCK i .. +4, i = 0, 1, ...   (16-byte loads)
//! ```
//!
//! Bytes moved: `8 D` read (the second time from L1), `4 D` written, a token. Shared memory holds one
//! float a warp: no bank conflicts. One form only.

use cuda_std::{kernel, shared, thread, warp};

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::ptx;
#[cfg(not(target_arch = "nvptx64"))]
use crate::reduce;

/// Largest level.
const MAX_LEVEL: f32 = 127.0;
/// Least magnitude that a token's scale is made of.
const LEAST_EXTREME: f32 = 1e-5;

/// Dimensions of the rounding.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// T: rows with a scale each.
    pub tokens: usize,
    /// D: elements a row, a multiple of 4.
    pub width: usize,
}

/// The launch of `round_int8_f32` on `x` `(T, D)` f32; with `scales`, `(T,)` f32, it leaves levels.
///
/// # Errors
/// A width that is no multiple of 4, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(
    device: &DeviceInfo,
    shape: &Shape,
    x: DeviceSlice,
    scales: DeviceSlice,
) -> Result<Call, ShapeError> {
    let &Shape { tokens, width } = shape;
    let mut call = CallBuilder::new("round_int8_f32");
    call.require(
        width.is_multiple_of(4),
        "width",
        width,
        "it must be a multiple of 4",
    )?;
    call.require(
        (1..1 << 31).contains(&tokens),
        "tokens",
        tokens,
        "it must be in 1..2^31",
    )?;
    call.tensor("x", x, tensor_bytes(&[tokens, width], 4), 16)?;
    call.optional("scales", scales, tensor_bytes(&[tokens], 4), 4)?;
    let width = call.dim("width", width)?;
    let threads = (width / 4).next_multiple_of(warp::SIZE).clamp(32, 1024);
    call.build(
        device,
        Launch::linear(tokens as u32, threads, reduce::SCRATCH_BYTES),
    )
}

/// The level nearest to `x * scale`.
#[inline(always)]
fn level(x: f32, scale: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer, ties to even; levels are far below it.
    const ROUND: f32 = 12_582_912.0;
    (x * scale + ROUND) - ROUND
}

#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// Rounds row `block_idx.x`.
///
/// # Safety
/// Launched as [`plan`] says.
#[kernel]
pub unsafe fn round_int8_f32(
    x: *mut f32,      // (T, D)
    scales: *mut f32, // (T) or null
    width: u32,
) {
    let row = thread::block_idx_x() as usize * width as usize;
    let step = thread::block_dim_x() * 4;
    let first = thread::thread_idx_x() * 4;
    let scratch = shared::dynamic_shared_mem();
    let lane = warp::lane_id();
    // SAFETY: the grid has a block a row and every index stays below `width`, a multiple of 4; the
    // plan checked the buffer and gave the scratch, which each warp writes before the barrier; each
    // thread rereads only elements that it alone overwrites.
    unsafe {
        let x = x.wrapping_add(row);
        let mut extreme = LEAST_EXTREME;
        let mut d = first;
        while d < width {
            let v = ptx::ld_global_v4_f32(x.wrapping_add(d as usize));
            extreme = greater(extreme, v[0].abs());
            extreme = greater(extreme, v[1].abs());
            extreme = greater(extreme, v[2].abs());
            extreme = greater(extreme, v[3].abs());
            d += step;
        }
        let extreme = warp::reduce_max_f32(extreme);
        if lane == 0 {
            ptx::st_shared_f32(scratch, warp::warp_id() * 4, extreme);
        }
        thread::sync_threads();
        let mut partial = LEAST_EXTREME;
        if lane < thread::block_dim_x() / warp::SIZE {
            partial = ptx::ld_shared_f32(scratch, lane * 4);
        }
        let scale = MAX_LEVEL / warp::reduce_max_f32(partial);
        let mut divisor = scale;
        if !scales.is_null() {
            divisor = 1.0;
            if thread::thread_idx_x() == 0 {
                let token = thread::block_idx_x() as usize;
                ptx::st_global_f32(scales.wrapping_add(token), 1.0 / scale);
            }
        }
        let mut d = first;
        while d < width {
            let v = ptx::ld_global_v4_f32(x.wrapping_add(d as usize));
            let values = [
                level(v[0], scale) / divisor,
                level(v[1], scale) / divisor,
                level(v[2], scale) / divisor,
                level(v[3], scale) / divisor,
            ];
            ptx::st_global_v4_f32(x.wrapping_add(d as usize), values);
            d += step;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_even_levels() {
        let levels = [0.5, 1.5, 2.5, -0.5, -1.5, 126.6].map(|x| level(x, 1.0));
        assert_eq!(levels, [0.0, 2.0, 2.0, 0.0, -2.0, 127.0]);
    }

    #[test]
    fn plan_rejects_a_width_that_would_be_cut() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 1 << 20,
        };
        let plan = |tokens, width| {
            let shape = Shape { tokens, width };
            plan(&DeviceInfo::T4, &shape, slice, DeviceSlice::NONE)
        };
        assert_eq!(plan(3, 576).unwrap().launch.grid, [3, 1, 1]);
        assert!(plan(3, 578).is_err());
        assert!(plan(0, 576).is_err());
    }
}
