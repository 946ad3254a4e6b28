//! RMSNorm: `out[d] = x[d] / sqrt(mean(x^2) + eps) * weight[d]` (<https://arxiv.org/abs/1910.07467>).
//!
//! Shapes: x and out `(T, D)`, weight `(D,)`; out f32 or f16.
//!
//! ```text
//! block b      -> token b
//! thread t     -> elements 4t + 4 BLOCK i .. +4, i = 0, 1, ...   (16-byte loads)
//! ```
//!
//! The squares are summed exactly enough that other orders give the same float, and the factor is correctly
//! rounded: the CPU gets the same bits. It matters where the result is rounded to 8 bits: numbers of few bits, as
//! embeddings are, make exact ties, and the last bit of the factor would decide them.
//!
//! Bytes moved: `8 D` read (x a second time from L1), `4 D` weight, `4 D` or `2 D` written, a token. Shared
//! memory holds two floats a warp: no bank conflicts that cost. A block a token wins nothing
//! on one token beyond being a single launch, and is what batches need.

use cuda_std::{kernel, shared, thread};

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::ptx;
use crate::reduce::{self, Twofold};

/// Dimensions of the normalisation.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// T: rows normalised each by itself.
    pub tokens: usize,
    /// D: elements a row, a multiple of 4.
    pub width: usize,
    /// Added to the mean square.
    pub eps: f32,
}

/// Buffers of the normalisation.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(T, D)` f32.
    pub x: DeviceSlice,
    /// `(D,)` f32.
    pub weight: DeviceSlice,
    /// `(T, D)` f32, which may be `x`; or f16.
    pub out: DeviceSlice,
}

/// The launch of `rmsnorm_f32`.
///
/// # Errors
/// A width that is no multiple of 4, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    plan_of("rmsnorm_f32", 4, device, shape, ops)
}

/// The launch of `rmsnorm_f16`, which writes halves.
///
/// # Errors
/// As [`plan`].
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan_f16(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    plan_of("rmsnorm_f16", 2, device, shape, ops)
}

#[cfg(not(target_arch = "nvptx64"))]
fn plan_of(
    kernel: &'static str,
    elem_bytes: u64,
    device: &DeviceInfo,
    shape: &Shape,
    ops: &Operands,
) -> Result<Call, ShapeError> {
    let &Shape { tokens, width, eps } = shape;
    let mut call = CallBuilder::new(kernel);
    call.waits();
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
    call.tensor("x", ops.x, tensor_bytes(&[tokens, width], 4), 16)?;
    call.tensor("weight", ops.weight, tensor_bytes(&[width], 4), 16)?;
    let out_bytes = tensor_bytes(&[tokens, width], elem_bytes);
    call.tensor("out", ops.out, out_bytes, 4 * elem_bytes)?;
    let width = call.dim("width", width)?;
    call.f32(1.0 / width as f32);
    call.f32(eps);
    call.build(
        device,
        Launch::linear(
            tokens as u32,
            block_threads(width),
            reduce::TWOFOLD_SCRATCH_BYTES,
        ),
    )
}

/// Threads a block: one 16-byte load each where the width allows, whole warps.
#[cfg(not(target_arch = "nvptx64"))]
fn block_threads(width: u32) -> u32 {
    (width / 4).next_multiple_of(32).clamp(32, 1024)
}

/// Normalises row `block_idx.x`.
///
/// # Safety
/// Launched as [`plan`] says.
#[kernel]
pub unsafe fn rmsnorm_f32(
    x: *const f32,      // (T, D)
    weight: *const f32, // (D)
    out: *mut f32,      // (T, D)
    width: u32,
    inverse_width: f32,
    eps: f32,
) {
    // SAFETY: launched as `plan` says.
    unsafe { normalise::<false>(x, weight, out, width, inverse_width, eps) }
}

/// Normalises row `block_idx.x`, to halves.
///
/// # Safety
/// Launched as [`plan_f16`] says.
#[kernel]
pub unsafe fn rmsnorm_f16(
    x: *const f32,      // (T, D)
    weight: *const f32, // (D)
    out: *mut f32,      // (T, D) f16
    width: u32,
    inverse_width: f32,
    eps: f32,
) {
    // SAFETY: launched as `plan_f16` says.
    unsafe { normalise::<true>(x, weight, out, width, inverse_width, eps) }
}

/// # Safety
/// Launched as the plan says; `out` are halves if `HALVES` says so.
#[inline(always)]
unsafe fn normalise<const HALVES: bool>(
    x: *const f32,
    weight: *const f32,
    out: *mut f32,
    width: u32,
    inverse_width: f32,
    eps: f32,
) {
    ptx::griddep_launch();
    ptx::griddep_wait();
    let row = thread::block_idx_x() as usize * width as usize;
    let step = thread::block_dim_x() * 4;
    let first = thread::thread_idx_x() * 4;
    let scratch = shared::dynamic_shared_mem();
    // SAFETY: the grid has a block a row and every index stays below `width`, a multiple of 4;
    // the plan checked the buffers and gave the scratch; each thread rereads only elements that
    // it alone overwrites, so `out` may be `x`.
    unsafe {
        let x = x.wrapping_add(row);
        let mut squares = Twofold::ZERO;
        let mut d = first;
        while d < width {
            let v = ptx::ld_global_v4_f32(x.wrapping_add(d as usize));
            squares = squares.plus_square(v[0]);
            squares = squares.plus_square(v[1]);
            squares = squares.plus_square(v[2]);
            squares = squares.plus_square(v[3]);
            d += step;
        }
        let mean = reduce::block_sum_twofold(squares, scratch) * inverse_width;
        let factor = 1.0 / ptx::sqrt(mean + eps);
        let mut d = first;
        while d < width {
            let v = ptx::ld_global_v4_f32(x.wrapping_add(d as usize));
            let w = ptx::ld_global_nc_v4_f32(weight.wrapping_add(d as usize));
            let scaled = [
                v[0] * factor * w[0],
                v[1] * factor * w[1],
                v[2] * factor * w[2],
                v[3] * factor * w[3],
            ];
            let to = row + d as usize;
            if HALVES {
                let low = ptx::f32x2_to_f16x2(scaled[0], scaled[1]);
                let high = ptx::f32x2_to_f16x2(scaled[2], scaled[3]);
                let out = out.cast::<u32>().wrapping_add(to / 2);
                ptx::st_global_v2_u32(out, [low, high]);
            } else {
                ptx::st_global_v4_f32(out.wrapping_add(to), scaled);
            }
            d += step;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_whole_warps() {
        assert_eq!(block_threads(4), 32);
        assert_eq!(block_threads(576), 160);
        assert_eq!(block_threads(4096), 1024);
        assert_eq!(block_threads(8192), 1024);
    }

    #[test]
    fn plan_rejects_a_width_that_would_be_cut() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 1 << 20,
        };
        let ops = Operands {
            x: slice,
            weight: slice,
            out: slice,
        };
        let shape = Shape {
            tokens: 3,
            width: 576,
            eps: 1e-5,
        };
        assert_eq!(
            plan(&DeviceInfo::T4, &shape, &ops).unwrap().launch.grid,
            [3, 1, 1]
        );
        assert!(
            plan(
                &DeviceInfo::T4,
                &Shape {
                    width: 578,
                    ..shape
                },
                &ops
            )
            .is_err()
        );
        assert!(plan(&DeviceInfo::T4, &Shape { tokens: 0, ..shape }, &ops).is_err());
    }
}
