//! Logits of one token: `logits[v] = sum_d scale q[v, d] x[d]` over the INT8 output matrix, the
//! embedding table when tied.
//!
//! Shapes: quants `(V, D)` i8, scales `(V, ceil(D/group))` f16, x `(D,)`, logits `(V,)`.
//!
//! The thread -> element diagram, bytes moved and banks are those of
//! [`gemv_int8`], whose body this is. It has an entry of its own so that profiles and bench rows
//! tell the two apart.

use cuda_std::kernel;

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, ShapeError, tensor_bytes};
#[cfg(not(target_arch = "nvptx64"))]
use crate::linear;
use crate::linear::gemv_int8;

/// Dimensions of the product.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// V: rows.
    pub vocab: usize,
    /// D: columns, a multiple of 32.
    pub width: usize,
    /// Weights that share a scale: a power of two from 32 on, or D.
    pub group: usize,
}

/// Buffers of the product.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(V, D)` i8.
    pub quants: DeviceSlice,
    /// `(V, ceil(D/group))` f16.
    pub scales: DeviceSlice,
    /// `(D,)` f32.
    pub x: DeviceSlice,
    /// `(V,)` f32.
    pub logits: DeviceSlice,
}

/// The launch of `logits_int8`.
///
/// # Errors
/// A width that is no multiple of 32, an unsupported group, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    let &Shape {
        vocab,
        width,
        group,
    } = shape;
    let mut call = CallBuilder::new("logits_int8");
    call.require(
        width.is_multiple_of(32),
        "width",
        width,
        "it must be a multiple of 32",
    )?;
    let shift = linear::int8_group_shift(&call, group, width)?;
    call.tensor("quants", ops.quants, tensor_bytes(&[vocab, width], 1), 16)?;
    call.tensor(
        "scales",
        ops.scales,
        tensor_bytes(&[vocab, width.div_ceil(group)], 2),
        2,
    )?;
    call.tensor("x", ops.x, tensor_bytes(&[width], 4), 16)?;
    call.tensor("logits", ops.logits, tensor_bytes(&[vocab], 4), 4)?;
    let vocab = call.dim("vocab", vocab)?;
    let width = call.dim("width", width)?;
    call.u32(shift);
    let rows_per_warp = gemv_int8::ROWS_PER_WARP as u32;
    call.build(
        device,
        linear::multirow_launch(device, vocab, width, rows_per_warp),
    )
}

/// `logits = W x`, two rows a warp.
///
/// # Safety
/// Launched as [`plan`] says.
#[kernel]
pub unsafe fn logits_int8(
    quants: *const i8,  // (V, D) int8
    scales: *const u16, // (V, ceil(D/group)) f16
    x: *const f32,      // (D)
    logits: *mut f32,   // (V)
    vocab: u32,
    width: u32,
    group_shift: u32,
) {
    // SAFETY: launched as `plan` says; there is no bias.
    unsafe {
        let shape = [vocab, width, group_shift];
        gemv_int8::multirow(quants, scales, core::ptr::null(), x, logits, shape);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::Launch;

    #[test]
    fn plan_fills_the_device_with_a_real_vocabulary() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 1 << 30,
        };
        let ops = Operands {
            quants: slice,
            scales: slice,
            x: slice,
            logits: slice,
        };
        let shape = Shape {
            vocab: 49_152,
            width: 576,
            group: 32,
        };
        let call = plan(&DeviceInfo::T4, &shape, &ops).unwrap();
        assert_eq!(call.launch, Launch::linear(49_152 / 16, 256, 576 * 4));
        assert_eq!(call.args[4..], [49_152, 576, 5]);
        let ops = Operands {
            logits: DeviceSlice {
                address: 0x1000,
                bytes: 4,
            },
            ..ops
        };
        assert!(plan(&DeviceInfo::T4, &shape, &ops).is_err());
    }
}
