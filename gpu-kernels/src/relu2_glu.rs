//! Gated squared ReLU: `out = max(gate, 0)^2 * up` (<https://arxiv.org/abs/2109.08668>), of BitNet.
//!
//! Shapes: gate, up, out `(elems,)`.
//!
//! ```text
//! thread t of the grid -> elements 4t .. 4t+4 (16-byte loads; the last thread one by one)
//! ```
//!
//! Bytes moved: `12 elems`. No shared memory. One form only: limited by the launch.

use cuda_std::kernel;

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, DeviceInfo, ShapeError};
use crate::swiglu;
#[cfg(not(target_arch = "nvptx64"))]
pub use crate::swiglu::{Operands, Shape};

/// The launch of `relu2_glu_f32`.
///
/// # Errors
/// No elements, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    swiglu::plan_gated("relu2_glu_f32", device, shape, ops)
}

/// `max(gate, 0)^2 * up`; not by `max`, which would make a NaN a zero.
#[inline(always)]
fn gated(gate: f32, up: f32) -> f32 {
    let open = if gate < 0.0 { 0.0 } else { gate };
    open * open * up
}

/// `out = max(gate, 0)^2 * up`.
///
/// # Safety
/// Launched as [`plan`] says.
#[kernel]
pub unsafe fn relu2_glu_f32(
    gate: *const f32, // (elems)
    up: *const f32,   // (elems)
    out: *mut f32,    // (elems)
    elems: u32,
) {
    // SAFETY: launched as `plan` says.
    unsafe { swiglu::gate_all(gate, up, out, elems, gated) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::DeviceSlice;

    #[test]
    fn closed_gates_are_zero_and_nan_stays() {
        assert_eq!(gated(-3.0, 5.0), 0.0);
        assert_eq!(gated(2.0, -1.5), -6.0);
        assert!(gated(f32::NAN, 1.0).is_nan());
    }

    #[test]
    fn plan_covers_every_element() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 4 * 1537,
        };
        let ops = Operands {
            gate: slice,
            up: slice,
            out: slice,
        };
        let call = plan(&DeviceInfo::T4, &Shape { elems: 1537 }, &ops).unwrap();
        assert_eq!(call.launch.grid[0], 4);
        assert!(plan(&DeviceInfo::T4, &Shape { elems: 1538 }, &ops).is_err());
        assert!(plan(&DeviceInfo::T4, &Shape { elems: 0 }, &ops).is_err());
    }
}
