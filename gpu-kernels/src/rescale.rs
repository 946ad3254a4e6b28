//! A product of levels in the unit of its result: `y = x s r`, or `y += x s r`, `s` the scale that
//! [`round_int8`](crate::round_int8) left, `r` that of the matrix's row. Levels up to 127 are exact in f16 and
//! their sums with ternary weights in f32, so such a product loses nothing in front of the matrix units.
//!
//! Shapes: x, y `(elems,)`, s `(1,)`, r `(elems,)` or none.
//!
//! ```text
//! thread t of the grid -> elements 4t .. 4t+4 (16-byte loads)
//! ```
//!
//! Bytes moved: `8 elems`, `4 elems` more with scales of rows, and with adding. No shared memory. One form only: limited by the launch.

use cuda_std::{kernel, thread};

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::ptx;

/// Threads a block.
#[cfg(not(target_arch = "nvptx64"))]
const BLOCK: u32 = 128;
/// Elements a thread.
const ELEMS_PER_THREAD: u32 = 4;

/// Dimensions of the product.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Elements, a multiple of 4.
    pub elems: usize,
    /// Whether the result is added to what is there.
    pub adds: bool,
}

/// Buffers of the product.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(elems,)` f32.
    pub x: DeviceSlice,
    /// `(1,)` f32.
    pub scale: DeviceSlice,
    /// `(elems,)` f32, or none.
    pub row_scales: DeviceSlice,
    /// `(elems,)` f32; may be x.
    pub y: DeviceSlice,
}

/// The launch of `rescale_f32`.
///
/// # Errors
/// No elements or no multiple of 4, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    let &Shape { elems, adds } = shape;
    let mut call = CallBuilder::new("rescale_f32");
    call.require(
        elems.is_multiple_of(4),
        "elems",
        elems,
        "it must be a multiple of 4",
    )?;
    let bytes = tensor_bytes(&[elems], 4);
    call.tensor("x", ops.x, bytes, 16)?;
    call.tensor("scale", ops.scale, 4, 4)?;
    call.optional("row scales", ops.row_scales, bytes, 16)?;
    call.tensor("y", ops.y, bytes, 16)?;
    let elems = call.dim("elems", elems)?;
    call.u32(adds.into());
    call.build(
        device,
        Launch::linear(elems.div_ceil(BLOCK * ELEMS_PER_THREAD), BLOCK, 0),
    )
}

/// `y = x s r`, plus what is there if `adds` is not 0.
///
/// # Safety
/// Launched as [`plan`] says.
#[kernel]
pub unsafe fn rescale_f32(
    x: *const f32,          // (elems)
    scale: *const f32,      // (1)
    row_scales: *const f32, // (elems) or null
    y: *mut f32,            // (elems)
    elems: u32,
    adds: u32,
) {
    let first = thread::index_1d() * ELEMS_PER_THREAD;
    if first >= elems {
        return;
    }
    // SAFETY: `elems` is a multiple of 4, so every index is below it; the plan checked the buffers. A thread
    // reads what it writes before it does.
    unsafe {
        let scale = ptx::ld_global_f32(scale);
        let v = ptx::ld_global_v4_f32(x.wrapping_add(first as usize));
        let mut r = [1.0; 4];
        if !row_scales.is_null() {
            r = ptx::ld_global_v4_f32(row_scales.wrapping_add(first as usize));
        }
        let mut sum = [
            v[0] * (scale * r[0]),
            v[1] * (scale * r[1]),
            v[2] * (scale * r[2]),
            v[3] * (scale * r[3]),
        ];
        if adds != 0 {
            let b = ptx::ld_global_v4_f32(y.wrapping_add(first as usize));
            sum = [sum[0] + b[0], sum[1] + b[1], sum[2] + b[2], sum[3] + b[3]];
        }
        ptx::st_global_v4_f32(y.wrapping_add(first as usize), sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_covers_every_element() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 4 * 576,
        };
        let ops = Operands {
            x: slice,
            scale: slice,
            row_scales: DeviceSlice::NONE,
            y: slice,
        };
        let plan = |elems| plan(&DeviceInfo::T4, &Shape { elems, adds: true }, &ops);
        assert_eq!(plan(576).unwrap().launch.grid[0], 2);
        assert!(plan(580).is_err());
        assert!(plan(574).is_err());
        assert!(plan(0).is_err());
    }
}
