//! F16 matrix by one token's activations: `y[n] = sum_k w[n, k] x[k] + bias[n]`. Also the logits of a
//! model whose tables are F16.
//!
//! Shapes: w `(N, K)` f16, x `(K,)`, y `(N,)`.
//!
//! ```text
//! warp w of the grid -> rows 2w, 2w + 1
//! lane l             -> units l, l + 32, l + 64, ... of both rows
//! a unit             -> 8 weights: one 16-byte load a row, 2 chunks of x from shared memory
//! ```
//!
//! Bytes moved: `2 N K` of weights, `4 K` of x a block from L2. Shared memory holds x rotated: eight
//! lanes that are served at once ask for chunks 2 apart, which lie in eight different bank groups (see
//! [`super`]). One form only: float checkpoints are run to be compared with, not for speed.

use cuda_std::shared::Shared;
use cuda_std::{kernel, shared, thread, warp};

use super::{CHUNK_ELEMS, TILE_COLS, chunk_offset_bytes, stage_columns};
#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, ShapeError, tensor_bytes};
use crate::ptx;

/// Weights of one 16-byte load.
const UNIT_WEIGHTS: u32 = 8;
/// Words of one.
const UNIT_WORDS: usize = 4;
/// Rows a warp: two share each read of x.
const ROWS_PER_WARP: u32 = 2;

/// Dimensions of the product.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// N.
    pub rows: usize,
    /// K, a multiple of 32.
    pub cols: usize,
}

/// Buffers of the product.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(N, K)` f16.
    pub weights: DeviceSlice,
    /// `(N,)` f32, or none.
    pub bias: DeviceSlice,
    /// `(K,)` f32.
    pub x: DeviceSlice,
    /// `(N,)` f32.
    pub y: DeviceSlice,
}

/// The launch of `linear_gemv_f16`.
///
/// # Errors
/// A K that is no multiple of 32, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    let &Shape { rows, cols } = shape;
    let mut call = CallBuilder::new("linear_gemv_f16");
    call.require(
        cols.is_multiple_of(32),
        "cols",
        cols,
        "it must be a multiple of 32",
    )?;
    call.tensor("weights", ops.weights, tensor_bytes(&[rows, cols], 2), 16)?;
    call.optional("bias", ops.bias, tensor_bytes(&[rows], 4), 4)?;
    call.tensor("x", ops.x, tensor_bytes(&[cols], 4), 16)?;
    call.tensor("y", ops.y, tensor_bytes(&[rows], 4), 4)?;
    let rows = call.dim("rows", rows)?;
    let cols = call.dim("cols", cols)?;
    call.build(
        device,
        super::multirow_launch(device, rows, cols, ROWS_PER_WARP),
    )
}

/// `sum_j w_j x_j + start` over the two halves of `word`.
#[inline(always)]
fn dot2(word: u32, x: [f32; 2], start: f32) -> f32 {
    let sum = ptx::fma(ptx::f16_to_f32(word as u16), x[0], start);
    ptx::fma(ptx::f16_to_f32((word >> 16) as u16), x[1], sum)
}

/// Product of a unit with its 8 columns, from the two chunks at `chunk` on.
///
/// # Safety
/// Both chunks are staged.
#[inline(always)]
unsafe fn dot8(words: [u32; UNIT_WORDS], tile: Shared, chunk: u32) -> f32 {
    // SAFETY: by the caller's promise.
    let (a, b) = unsafe {
        (
            ptx::ld_shared_v4_f32(tile, chunk_offset_bytes(chunk)),
            ptx::ld_shared_v4_f32(tile, chunk_offset_bytes(chunk + 1)),
        )
    };
    let even = dot2(words[1], [a[2], a[3]], dot2(words[0], [a[0], a[1]], 0.0));
    let odd = dot2(words[3], [b[2], b[3]], dot2(words[2], [b[0], b[1]], 0.0));
    even + odd
}

/// `y = W x + b`, two rows a warp.
///
/// # Safety
/// Launched as [`plan`] says.
#[kernel]
pub unsafe fn linear_gemv_f16(
    weights: *const u16, // (N, K) f16
    bias: *const f32,    // (N), or null
    x: *const f32,       // (K)
    y: *mut f32,         // (N)
    rows: u32,
    cols: u32,
) {
    let lane = warp::lane_id();
    let first_row = thread::index_1d() / warp::SIZE * ROWS_PER_WARP;
    let tile = shared::dynamic_shared_mem();
    // Rows past the end are computed as the last row and not stored: every thread keeps reaching the
    // barriers. A lane without a next unit loads the last again.
    let last_row = rows - 1;
    let last_unit = cols / UNIT_WEIGHTS - 1;
    let start = |row: u32| -> *const u32 {
        let row = row.min(last_row) as usize;
        weights.wrapping_add(row * cols as usize).cast()
    };
    let (upper, lower) = (start(first_row), start(first_row + 1));
    // SAFETY: rows and units are clamped to the matrix, the plan checked the buffers and gave a tile of
    // shared memory, and barriers stand before and after staging.
    unsafe {
        let load = |row: *const u32, unit: u32| {
            ptx::ld_global_nc_v4_u32(row.wrapping_add(unit.min(last_unit) as usize * UNIT_WORDS))
        };
        let mut sums = [0.0f32; 2];
        let (mut next_upper, mut next_lower) = (load(upper, lane), load(lower, lane));
        let mut first = 0;
        while first < cols {
            let count = (cols - first).min(TILE_COLS);
            if first > 0 {
                thread::sync_threads();
            }
            stage_columns(x, first, count, tile);
            thread::sync_threads();
            let first_unit = first / UNIT_WEIGHTS;
            let end = first_unit + count / UNIT_WEIGHTS;
            let mut unit = first_unit + lane;
            while unit < end {
                let (now_upper, now_lower) = (next_upper, next_lower);
                next_upper = load(upper, unit + warp::SIZE);
                next_lower = load(lower, unit + warp::SIZE);
                let chunk = (unit - first_unit) * (UNIT_WEIGHTS / CHUNK_ELEMS);
                sums[0] += dot8(now_upper, tile, chunk);
                sums[1] += dot8(now_lower, tile, chunk);
                unit += warp::SIZE;
            }
            first += count;
        }
        super::store_rows(sums, first_row, rows, bias, y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_meet_their_columns() {
        // 1.0 in the low half, -2.0 in the high one.
        assert_eq!(dot2(0xc000_3c00, [3.0, 0.5], 10.0), 12.0);
    }

    #[test]
    fn plan_refuses_widths_and_short_buffers() {
        let slice = |bytes| DeviceSlice {
            address: 0x1000,
            bytes,
        };
        let ops = Operands {
            weights: slice(2 * 193 * 1120),
            bias: DeviceSlice::NONE,
            x: slice(1 << 20),
            y: slice(1 << 20),
        };
        let plan = |rows, cols| plan(&DeviceInfo::T4, &Shape { rows, cols }, &ops);
        assert_eq!(plan(193, 1120).unwrap().launch.grid[0], 25);
        assert!(plan(194, 1120).is_err());
        assert!(plan(193, 1112).is_err());
    }
}
