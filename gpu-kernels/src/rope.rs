//! Half-split rotary position embedding, in place (<https://arxiv.org/abs/2104.09864>):
//! element `i` of a head is paired with `i + Dh/2` and the pair turned by the angle of
//! `(position, i)`, read from tables so that every backend turns by identical angles.
//!
//! Shapes: x `(heads, Dh)`, cos and sin `(S, Dh/2)`.
//!
//! ```text
//! block h                 -> head h
//! thread t, t < Dh/2      -> pairs t, t + BLOCK, ...: elements (t, t + Dh/2)
//! ```
//!
//! Bytes moved: `8 heads Dh` and one row of each table. Neighbouring threads touch neighbouring
//! elements of both halves: coalesced, no shared memory. One form only.

use cuda_std::{kernel, thread};

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::ptx;

/// Dimensions of the rotation.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Heads in `x`: H for queries, KV for keys.
    pub heads: usize,
    /// Dh: head width, even.
    pub head_dim: usize,
    /// S: rows of the tables.
    pub context: usize,
}

/// Buffers of the rotation.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(heads, Dh)` f32, turned in place.
    pub x: DeviceSlice,
    /// `(S, Dh/2)` f32.
    pub cos: DeviceSlice,
    /// `(S, Dh/2)` f32.
    pub sin: DeviceSlice,
    /// `(1,)` u32: the position, below S.
    pub state: DeviceSlice,
}

/// The launch of `rope_f32`.
///
/// # Errors
/// An odd head width, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    let &Shape {
        heads,
        head_dim,
        context,
    } = shape;
    let mut call = CallBuilder::new("rope_f32");
    call.require(
        head_dim.is_multiple_of(2),
        "head_dim",
        head_dim,
        "it must be even",
    )?;
    call.require(
        (1..1 << 31).contains(&heads),
        "heads",
        heads,
        "it must be in 1..2^31",
    )?;
    let table = tensor_bytes(&[context, head_dim / 2], 4);
    call.tensor("x", ops.x, tensor_bytes(&[heads, head_dim], 4), 4)?;
    call.tensor("cos", ops.cos, table, 4)?;
    call.tensor("sin", ops.sin, table, 4)?;
    call.tensor("state", ops.state, 4, 4)?;
    let half = call.dim("head_dim / 2", head_dim / 2)?;
    let threads = half.next_multiple_of(32).min(128);
    call.build(device, Launch::linear(heads as u32, threads, 0))
}

/// Turns head `block_idx.x` by the angles of the current position.
///
/// # Safety
/// Launched as [`plan`] says, with a position below S.
#[kernel]
pub unsafe fn rope_f32(
    x: *mut f32,       // (heads, Dh)
    cos: *const f32,   // (S, Dh/2)
    sin: *const f32,   // (S, Dh/2)
    state: *const u32, // (1) position
    half: u32,
) {
    let head = thread::block_idx_x() as usize * 2 * half as usize;
    let mut i = thread::thread_idx_x();
    // SAFETY: a block a head and `i < half`, so both elements of the pair lie in the head; the
    // plan checked the tables for S rows and the caller promises a position below S.
    unsafe {
        let table = ptx::ld_global_u32(state) as usize * half as usize;
        while i < half {
            let low = x.wrapping_add(head + i as usize);
            let high = low.wrapping_add(half as usize);
            let c = ptx::ld_global_nc_f32(cos.wrapping_add(table + i as usize));
            let s = ptx::ld_global_nc_f32(sin.wrapping_add(table + i as usize));
            let (a, b) = (ptx::ld_global_f32(low), ptx::ld_global_f32(high));
            ptx::st_global_f32(low, ptx::fma(a, c, -(b * s)));
            ptx::st_global_f32(high, ptx::fma(b, c, a * s));
            i += thread::block_dim_x();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_wants_an_even_head_and_whole_tables() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 1 << 20,
        };
        let ops = Operands {
            x: slice,
            cos: slice,
            sin: slice,
            state: slice,
        };
        let shape = Shape {
            heads: 9,
            head_dim: 80,
            context: 16,
        };
        let call = plan(&DeviceInfo::T4, &shape, &ops).unwrap();
        assert_eq!(
            (call.launch.grid[0], call.launch.block[0], call.args[4]),
            (9, 64, 40)
        );
        assert!(
            plan(
                &DeviceInfo::T4,
                &Shape {
                    head_dim: 63,
                    ..shape
                },
                &ops
            )
            .is_err()
        );
        let ops = Operands {
            sin: DeviceSlice {
                address: 0x1000,
                bytes: 16 * 40 * 4 - 4,
            },
            ..ops
        };
        assert!(matches!(
            plan(&DeviceInfo::T4, &shape, &ops),
            Err(ShapeError::ShortBuffer { buffer: "sin", .. })
        ));
    }
}
