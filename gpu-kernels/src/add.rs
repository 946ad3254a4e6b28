//! Residual addition: `y += x`.
//!
//! Shapes: x, y `(elems,)`.
//!
//! ```text
//! thread t of the grid -> elements 4t .. 4t+4 (16-byte loads; the last thread one by one)
//! ```
//!
//! Bytes moved: `12 elems`. No shared memory. One form only: limited by the launch.

use cuda_std::{kernel, thread};

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::ptx;

/// Threads a block.
#[cfg(not(target_arch = "nvptx64"))]
const BLOCK: u32 = 128;
/// Elements a thread.
const ELEMS_PER_THREAD: u32 = 4;

/// Dimensions of the sum.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Elements: D, or T times D.
    pub elems: usize,
}

/// Buffers of the sum.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(elems,)` f32.
    pub x: DeviceSlice,
    /// `(elems,)` f32, accumulated in place.
    pub y: DeviceSlice,
}

/// The launch of `residual_add_f32`.
///
/// # Errors
/// No elements, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    let mut call = CallBuilder::new("residual_add_f32");
    let bytes = tensor_bytes(&[shape.elems], 4);
    call.tensor("x", ops.x, bytes, 16)?;
    call.tensor("y", ops.y, bytes, 16)?;
    let elems = call.dim("elems", shape.elems)?;
    call.build(
        device,
        Launch::linear(elems.div_ceil(BLOCK * ELEMS_PER_THREAD), BLOCK, 0),
    )
}

/// `y += x`.
///
/// # Safety
/// Launched as [`plan`] says.
#[kernel]
pub unsafe fn residual_add_f32(
    x: *const f32, // (elems)
    y: *mut f32,   // (elems)
    elems: u32,
) {
    let first = thread::index_1d() * ELEMS_PER_THREAD;
    if first >= elems {
        return;
    }
    // SAFETY: every index is below `elems`, which the plan checked the buffers for.
    unsafe {
        if elems - first >= ELEMS_PER_THREAD {
            let a = ptx::ld_global_v4_f32(x.wrapping_add(first as usize));
            let b = ptx::ld_global_v4_f32(y.wrapping_add(first as usize));
            let sum = [a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]];
            ptx::st_global_v4_f32(y.wrapping_add(first as usize), sum);
            return;
        }
        let mut i = first;
        while i < elems {
            let sum = ptx::ld_global_f32(x.wrapping_add(i as usize))
                + ptx::ld_global_f32(y.wrapping_add(i as usize));
            ptx::st_global_f32(y.wrapping_add(i as usize), sum);
            i += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_covers_every_element() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 4 * 577,
        };
        let ops = Operands { x: slice, y: slice };
        let call = plan(&DeviceInfo::T4, &Shape { elems: 577 }, &ops).unwrap();
        assert_eq!(call.launch.grid[0], 2);
        assert!(plan(&DeviceInfo::T4, &Shape { elems: 578 }, &ops).is_err());
    }
}
