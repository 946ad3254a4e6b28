//! Embedding lookup: `out[t, d] = scale * q[token, d]` of an INT8 table, `out[t, d] = w[token, d]` of an
//! F16 one, the tokens read from device memory.
//!
//! Shapes: table `(V, D)` INT8 with f16 scales `(V, ceil(D/group))`, or f16; out `(T, D)`.
//!
//! ```text
//! block (b, t), thread i -> elements of token t, from 4 (128 b + i) on: one 4-byte load (two of F16), one
//!                         16-byte store
//! ```
//!
//! Bytes moved, a token: `D` of quants and `2 ceil(D/group)` of scales, or `2 D` of F16; `4 D` written. No shared memory, so no
//! bank conflicts. One form only: a row is a few hundred to a few thousand bytes, the launch
//! itself costs more than the copy.

use cuda_std::{kernel, thread};

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
#[cfg(not(target_arch = "nvptx64"))]
use crate::linear;
use crate::ptx;

/// Threads a block; each writes [`ELEMS_PER_THREAD`] elements.
#[cfg(not(target_arch = "nvptx64"))]
const BLOCK: u32 = 128;
/// Elements a thread: the four bytes of one load.
const ELEMS_PER_THREAD: u32 = 4;

/// Dimensions of the lookup.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// V: rows of the table.
    pub vocab: usize,
    /// D: columns, a multiple of 32.
    pub width: usize,
    /// Weights that share a scale: a power of two from 32 on, or `width`.
    pub group: usize,
    /// S: tokens that the cache holds.
    pub context: usize,
    /// T: tokens looked up, from the position on; at most S.
    pub tokens: usize,
}

/// Buffers of the lookup.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(V, D)` i8.
    pub quants: DeviceSlice,
    /// `(V, ceil(D/group))` f16.
    pub scales: DeviceSlice,
    /// `(S + 1,)` u32; the kernel reads `tokens[position ..]`, T of them, which have to be below V.
    pub tokens: DeviceSlice,
    /// `(1,)` u32: the position of the first token.
    pub state: DeviceSlice,
    /// `(T, D)` f32.
    pub out: DeviceSlice,
}

/// The launch of `embed_int8`.
///
/// # Errors
/// A width that is no multiple of 32, an unsupported group, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    let &Shape {
        vocab,
        width,
        group,
        context,
        tokens,
    } = shape;
    let mut call = CallBuilder::new("embed_int8");
    call.require(
        width.is_multiple_of(32),
        "width",
        width,
        "it must be a multiple of 32",
    )?;
    let shift = linear::int8_group_shift(&call, group, width)?;
    call.tensor("quants", ops.quants, tensor_bytes(&[vocab, width], 1), 4)?;
    call.tensor(
        "scales",
        ops.scales,
        tensor_bytes(&[vocab, width.div_ceil(group)], 2),
        2,
    )?;
    call.tensor(
        "tokens",
        ops.tokens,
        tensor_bytes(&[context.saturating_add(1)], 4),
        4,
    )?;
    call.tensor("state", ops.state, 4, 4)?;
    require_tokens(&call, tokens, context)?;
    call.tensor("out", ops.out, tensor_bytes(&[tokens, width], 4), 16)?;
    let width = call.dim("width", width)?;
    call.u32(shift);
    call.build(device, launch(width, tokens))
}

/// At most as many tokens as the cache holds, and as a grid has rows.
#[cfg(not(target_arch = "nvptx64"))]
fn require_tokens(call: &CallBuilder, tokens: usize, context: usize) -> Result<(), ShapeError> {
    call.require(
        (1..=context.min(65_535)).contains(&tokens),
        "tokens",
        tokens,
        "it must be in 1..=context, at most 65535",
    )
}

#[cfg(not(target_arch = "nvptx64"))]
fn launch(width: u32, tokens: usize) -> Launch {
    Launch {
        grid: [width.div_ceil(BLOCK * ELEMS_PER_THREAD), tokens as u32, 1],
        block: [BLOCK, 1, 1],
        shared_bytes: 0,
    }
}

/// Dimensions of the lookup in an F16 table.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct F16Shape {
    /// V: rows of the table.
    pub vocab: usize,
    /// D: columns, a multiple of 32.
    pub width: usize,
    /// S: tokens that the cache holds.
    pub context: usize,
    /// T: tokens looked up, from the position on; at most S.
    pub tokens: usize,
}

/// Buffers of the lookup in an F16 table.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct F16Operands {
    /// `(V, D)` f16.
    pub table: DeviceSlice,
    /// As [`Operands::tokens`].
    pub tokens: DeviceSlice,
    /// `(1,)` u32: the position of the first token.
    pub state: DeviceSlice,
    /// `(T, D)` f32.
    pub out: DeviceSlice,
}

/// The launch of `embed_f16`.
///
/// # Errors
/// A width that is no multiple of 32, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan_f16(
    device: &DeviceInfo,
    shape: &F16Shape,
    ops: &F16Operands,
) -> Result<Call, ShapeError> {
    let &F16Shape {
        vocab,
        width,
        context,
        tokens,
    } = shape;
    let mut call = CallBuilder::new("embed_f16");
    call.require(
        width.is_multiple_of(32),
        "width",
        width,
        "it must be a multiple of 32",
    )?;
    call.tensor("table", ops.table, tensor_bytes(&[vocab, width], 2), 8)?;
    call.tensor(
        "tokens",
        ops.tokens,
        tensor_bytes(&[context.saturating_add(1)], 4),
        4,
    )?;
    call.tensor("state", ops.state, 4, 4)?;
    require_tokens(&call, tokens, context)?;
    call.tensor("out", ops.out, tensor_bytes(&[tokens, width], 4), 16)?;
    let width = call.dim("width", width)?;
    call.build(device, launch(width, tokens))
}

/// `out[t] = table[tokens[position + t]]` of an F16 table.
///
/// # Safety
/// Launched as [`plan_f16`] says, with T tokens below V from the position on.
#[kernel]
pub unsafe fn embed_f16(
    table: *const u16,  // (V, D) f16
    tokens: *const u32, // (S + 1)
    state: *const u32,  // (1) position
    out: *mut f32,      // (T, D)
    width: u32,
) {
    let first =
        (thread::block_idx_x() * thread::block_dim_x() + thread::thread_idx_x()) * ELEMS_PER_THREAD;
    if first >= width {
        return;
    }
    // SAFETY: the plan checked each buffer against its shape; `first + 4 <= width` because the
    // width is a multiple of 32; the caller promises a token below V and a position below S.
    unsafe {
        let row = thread::block_idx_y();
        let position = ptx::ld_global_u32(state) + row;
        let token = ptx::ld_global_u32(tokens.wrapping_add(position as usize)) as usize;
        let at = token * width as usize + first as usize;
        let words: *const u32 = table.wrapping_add(at).cast();
        let (a, b) = (
            ptx::ld_global_nc_u32(words),
            ptx::ld_global_nc_u32(words.wrapping_add(1)),
        );
        let values = [
            ptx::f16_to_f32(a as u16),
            ptx::f16_to_f32((a >> 16) as u16),
            ptx::f16_to_f32(b as u16),
            ptx::f16_to_f32((b >> 16) as u16),
        ];
        let to = row as usize * width as usize + first as usize;
        ptx::st_global_v4_f32(out.wrapping_add(to), values);
    }
}

/// The signed byte `i` of a little-endian word.
#[inline(always)]
fn signed_byte(word: u32, i: u32) -> i32 {
    ((word >> (8 * i)) as u8 as i8) as i32
}

/// `out[t] = table[tokens[position + t]]`.
///
/// # Safety
/// Launched as [`plan`] says, with T tokens below V from the position on.
#[kernel]
pub unsafe fn embed_int8(
    quants: *const i8,  // (V, D) int8
    scales: *const u16, // (V, ceil(D/group)) f16
    tokens: *const u32, // (S + 1)
    state: *const u32,  // (1) position
    out: *mut f32,      // (T, D)
    width: u32,
    group_shift: u32,
) {
    let first =
        (thread::block_idx_x() * thread::block_dim_x() + thread::thread_idx_x()) * ELEMS_PER_THREAD;
    if first >= width {
        return;
    }
    let groups = ((width - 1) >> group_shift) + 1;
    // SAFETY: the plan checked each buffer against its shape; `first + 4 <= width` because the
    // width is a multiple of 32; the caller promises a token below V and a position below S.
    unsafe {
        let row = thread::block_idx_y();
        let position = ptx::ld_global_u32(state) + row;
        let token = ptx::ld_global_u32(tokens.wrapping_add(position as usize)) as usize;
        let quants = quants.wrapping_add(token * width as usize);
        let word = ptx::ld_global_nc_u32(quants.wrapping_add(first as usize).cast());
        let group = token * groups as usize + (first >> group_shift) as usize;
        let scale = ptx::f16_to_f32(ptx::ld_global_nc_u16(scales.wrapping_add(group)));
        let values = [
            scale * signed_byte(word, 0) as f32,
            scale * signed_byte(word, 1) as f32,
            scale * signed_byte(word, 2) as f32,
            scale * signed_byte(word, 3) as f32,
        ];
        let to = row as usize * width as usize + first as usize;
        ptx::st_global_v4_f32(out.wrapping_add(to), values);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_keep_their_sign() {
        let word = u32::from_le_bytes([1, 0xff, 0x80, 0x7f]);
        let bytes: Vec<i32> = (0..4).map(|i| signed_byte(word, i)).collect();
        assert_eq!(bytes, [1, -1, -128, 127]);
    }

    #[test]
    fn plan_covers_the_row_and_checks_it() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 1 << 20,
        };
        let ops = Operands {
            quants: slice,
            scales: slice,
            tokens: slice,
            state: slice,
            out: slice,
        };
        let shape = Shape {
            vocab: 10,
            width: 576,
            group: 576,
            context: 4,
            tokens: 1,
        };
        let call = plan(&DeviceInfo::T4, &shape, &ops).unwrap();
        assert_eq!(call.launch.grid[0], 2);
        assert_eq!(call.args.len(), 7);
        let ops = Operands {
            out: DeviceSlice {
                address: 0x1000,
                bytes: 576 * 4 - 1,
            },
            ..ops
        };
        assert!(matches!(
            plan(&DeviceInfo::T4, &shape, &ops),
            Err(ShapeError::ShortBuffer {
                buffer: "out",
                need: 2304,
                ..
            })
        ));
        assert!(plan(&DeviceInfo::T4, &Shape { width: 40, ..shape }, &ops).is_err());
        let many = Shape { tokens: 5, ..shape };
        assert!(plan(&DeviceInfo::T4, &many, &ops).is_err());
    }
}
