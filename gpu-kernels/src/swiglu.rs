//! SwiGLU: `out = silu(gate) * up`, `silu(g) = g / (1 + exp(-g))` (<https://arxiv.org/abs/2002.05202>).
//!
//! Shapes: gate, up, out `(elems,)`.
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

/// Dimensions of the activation.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Elements: F, or T times F.
    pub elems: usize,
}

/// Buffers of the activation.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(elems,)` f32.
    pub gate: DeviceSlice,
    /// `(elems,)` f32.
    pub up: DeviceSlice,
    /// `(elems,)` f32; may be `gate` or `up`.
    pub out: DeviceSlice,
}

/// The launch of `swiglu_f32`.
///
/// # Errors
/// No elements, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    plan_gated("swiglu_f32", device, shape, ops)
}

/// The launch of a kernel that is [`gate_all`] with another gate.
#[cfg(not(target_arch = "nvptx64"))]
pub(crate) fn plan_gated(
    kernel: &'static str,
    device: &DeviceInfo,
    shape: &Shape,
    ops: &Operands,
) -> Result<Call, ShapeError> {
    let mut call = CallBuilder::new(kernel);
    let bytes = tensor_bytes(&[shape.elems], 4);
    call.tensor("gate", ops.gate, bytes, 16)?;
    call.tensor("up", ops.up, bytes, 16)?;
    call.tensor("out", ops.out, bytes, 16)?;
    let elems = call.dim("elems", shape.elems)?;
    call.build(
        device,
        Launch::linear(elems.div_ceil(BLOCK * ELEMS_PER_THREAD), BLOCK, 0),
    )
}

/// `silu(gate) * up`. A very negative gate gives `exp = inf`, whose reciprocal is 0.
#[inline(always)]
pub(crate) fn gated(gate: f32, up: f32) -> f32 {
    gate * ptx::rcp(1.0 + ptx::exp(-gate)) * up
}

/// `out = silu(gate) * up`.
///
/// # Safety
/// Launched as [`plan`] says.
#[kernel]
pub unsafe fn swiglu_f32(
    gate: *const f32, // (elems)
    up: *const f32,   // (elems)
    out: *mut f32,    // (elems)
    elems: u32,
) {
    // SAFETY: launched as `plan` says.
    unsafe { gate_all(gate, up, out, elems, gated) };
}

/// `out = gated(gate, up)`, four elements a thread.
///
/// # Safety
/// Launched as [`plan_gated`] says, with these arguments.
#[inline(always)]
pub(crate) unsafe fn gate_all(
    gate: *const f32,
    up: *const f32,
    out: *mut f32,
    elems: u32,
    gated: impl Fn(f32, f32) -> f32,
) {
    let first = thread::index_1d() * ELEMS_PER_THREAD;
    if first >= elems {
        return;
    }
    // SAFETY: every index is below `elems`, which the plan checked the buffers for.
    unsafe {
        if elems - first >= ELEMS_PER_THREAD {
            let g = ptx::ld_global_v4_f32(gate.wrapping_add(first as usize));
            let u = ptx::ld_global_v4_f32(up.wrapping_add(first as usize));
            let values = [
                gated(g[0], u[0]),
                gated(g[1], u[1]),
                gated(g[2], u[2]),
                gated(g[3], u[3]),
            ];
            ptx::st_global_v4_f32(out.wrapping_add(first as usize), values);
            return;
        }
        let mut i = first;
        while i < elems {
            let g = ptx::ld_global_f32(gate.wrapping_add(i as usize));
            let u = ptx::ld_global_f32(up.wrapping_add(i as usize));
            ptx::st_global_f32(out.wrapping_add(i as usize), gated(g, u));
            i += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_saturates_without_nan() {
        assert_eq!(gated(-200.0, 1.0), 0.0);
        assert_eq!(gated(200.0, 2.0), 400.0);
        assert!((gated(1.0, 1.0) - 0.731_058_6).abs() < 1e-6);
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
