//! INT8 matrix by one token's activations: `y[n] = sum_k scale q[n, k] x[k] + bias[n]`.
//!
//! Shapes: quants `(N, K)` i8, scales `(N, ceil(K/group))` f16, x `(K,)`, y `(N,)`.
//!
//! ```text
//! warp w of the grid -> rows 2w, 2w + 1
//! lane l             -> units l, l + 32, l + 64, ... of both rows
//! a unit             -> 16 weights: one 16-byte load a row, 4 chunks of x from shared memory
//! ```
//!
//! A byte becomes a float by landing in the mantissa of 2^23, where it counts in ones; taking
//! `2^23 + 128` off is exact. Two integer instructions and a subtraction a weight, against a
//! conversion at a quarter or less of their rate.
//!
//! Bytes moved: `N K` quants, `2 N ceil(K/group)` scales, `4 K` of x a block from L2. Shared memory
//! holds x rotated: reads and writes are free of bank conflicts (see [`super`]). The same body is
//! the logits kernel, which is where nearly all INT8 weights of a model are.

use cuda_std::shared::Shared;
use cuda_std::{kernel, shared, thread, warp};

use super::{CHUNK_ELEMS, TILE_COLS, chunk_offset_bytes, groups_per_row, stage_columns};
#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, ShapeError, tensor_bytes};
use crate::ptx;

/// Weights of one 16-byte load.
const UNIT_WEIGHTS: u32 = 16;
/// Words of one.
const UNIT_WORDS: usize = 4;
/// Rows a warp: two share each read of x, and two loads are in flight a lane.
pub(crate) const ROWS_PER_WARP: usize = 2;

/// Dimensions of the product.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// N.
    pub rows: usize,
    /// K, a multiple of 32.
    pub cols: usize,
    /// Weights that share a scale: a power of two from 32 on, or K.
    pub group: usize,
}

/// Buffers of the product.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(N, K)` i8.
    pub quants: DeviceSlice,
    /// `(N, ceil(K/group))` f16.
    pub scales: DeviceSlice,
    /// `(N,)` f32, or none.
    pub bias: DeviceSlice,
    /// `(K,)` f32.
    pub x: DeviceSlice,
    /// `(N,)` f32.
    pub y: DeviceSlice,
}

/// The launch of `linear_gemv_int8_multirow`.
///
/// # Errors
/// A K that is no multiple of 32, an unsupported group, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    let &Shape { rows, cols, group } = shape;
    let mut call = CallBuilder::new("linear_gemv_int8_multirow");
    call.require(
        cols.is_multiple_of(32),
        "cols",
        cols,
        "it must be a multiple of 32",
    )?;
    let shift = super::int8_group_shift(&call, group, cols)?;
    call.tensor("quants", ops.quants, tensor_bytes(&[rows, cols], 1), 16)?;
    call.tensor(
        "scales",
        ops.scales,
        tensor_bytes(&[rows, cols.div_ceil(group)], 2),
        2,
    )?;
    call.optional("bias", ops.bias, tensor_bytes(&[rows], 4), 4)?;
    call.tensor("x", ops.x, tensor_bytes(&[cols], 4), 16)?;
    call.tensor("y", ops.y, tensor_bytes(&[rows], 4), 4)?;
    let rows = call.dim("rows", rows)?;
    let cols = call.dim("cols", cols)?;
    call.u32(shift);
    call.build(
        device,
        super::multirow_launch(device, rows, cols, ROWS_PER_WARP as u32),
    )
}

/// The signed byte at bit `bit` of the word whose bytes have had 128 added, as a float.
#[inline(always)]
fn offset_byte(word: u32, bit: u32) -> f32 {
    f32::from_bits(0x4b00_0000 | ((word >> bit) & 0xff)) - (8_388_608.0 + 128.0)
}

/// `sum_j q_j x_j + start` over the four signed bytes of `word`.
#[inline(always)]
fn dot4(word: u32, x: [f32; 4], start: f32) -> f32 {
    let word = word ^ 0x8080_8080;
    let sum = ptx::fma(offset_byte(word, 0), x[0], start);
    let sum = ptx::fma(offset_byte(word, 8), x[1], sum);
    let sum = ptx::fma(offset_byte(word, 16), x[2], sum);
    ptx::fma(offset_byte(word, 24), x[3], sum)
}

/// Where one row's weights start.
#[derive(Clone, Copy)]
struct Row {
    quants: *const u32,
    scales: *const u16,
}

/// 16 weights of one row in registers. The scale stays as loaded, f16: converting it waits for the
/// load, so it is left to the use.
#[derive(Clone, Copy)]
struct Unit {
    words: [u32; UNIT_WORDS],
    scale: u16,
}

impl Row {
    /// Row `row` of the matrix that the pointers describe.
    #[inline(always)]
    fn new(quants: *const i8, scales: *const u16, row: u32, cols: u32, group_shift: u32) -> Row {
        let group = row as usize * groups_per_row(cols, group_shift) as usize;
        Row {
            quants: quants.wrapping_add(row as usize * cols as usize).cast(),
            scales: scales.wrapping_add(group),
        }
    }

    /// # Safety
    /// `unit` is a unit of the row.
    #[inline(always)]
    unsafe fn unit(&self, unit: u32, group_shift: u32) -> Unit {
        let words = self.quants.wrapping_add(unit as usize * UNIT_WORDS);
        let group = ((unit * UNIT_WEIGHTS) >> group_shift) as usize;
        // SAFETY: by the caller's promise; a unit is 16 bytes and the row starts at one.
        unsafe {
            Unit {
                words: ptx::ld_global_nc_v4_u32(words),
                scale: ptx::ld_global_nc_u16(self.scales.wrapping_add(group)),
            }
        }
    }
}

/// Adds word `I` of each row's unit to the dot products. The word is a constant so that nothing is
/// indexed at run time: an array that is lands in local memory.
///
/// # Safety
/// The four chunks from `first_chunk` on are staged.
#[inline(always)]
unsafe fn word<const I: usize, const R: usize>(
    dots: &mut [f32; R],
    units: &[Unit; R],
    tile: Shared,
    first_chunk: u32,
) {
    // SAFETY: the chunk is among the four.
    let x = unsafe { ptx::ld_shared_v4_f32(tile, chunk_offset_bytes(first_chunk + I as u32)) };
    for r in 0..R {
        dots[r] = dot4(units[r].words[I], x, dots[r]);
    }
}

/// Adds the units' products with their 16 columns to the rows' sums.
///
/// # Safety
/// The four chunks from `first_chunk` on are staged.
#[inline(always)]
unsafe fn accumulate<const R: usize>(
    sums: &mut [f32; R],
    units: &[Unit; R],
    tile: Shared,
    first_chunk: u32,
) {
    let mut dots = [[0.0f32; R]; 2];
    // SAFETY: by the caller's promise.
    unsafe {
        word::<0, R>(&mut dots[0], units, tile, first_chunk);
        word::<1, R>(&mut dots[1], units, tile, first_chunk);
        word::<2, R>(&mut dots[0], units, tile, first_chunk);
        word::<3, R>(&mut dots[1], units, tile, first_chunk);
    }
    for r in 0..R {
        let scale = ptx::f16_to_f32(units[r].scale);
        sums[r] = ptx::fma(scale, dots[0][r] + dots[1][r], sums[r]);
    }
}

/// The body of `linear_gemv_int8_multirow` and `logits_int8`.
///
/// # Safety
/// Launched as their plans say.
#[inline(always)]
pub(crate) unsafe fn multirow(
    quants: *const i8,  // (N, K) int8
    scales: *const u16, // (N, ceil(K/group)) f16
    bias: *const f32,   // (N), or null
    x: *const f32,      // (K)
    y: *mut f32,        // (N)
    [rows, cols, group_shift]: [u32; 3],
) {
    let lane = warp::lane_id();
    let first_row = thread::index_1d() / warp::SIZE * ROWS_PER_WARP as u32;
    let tile = shared::dynamic_shared_mem();

    // Rows past the end are computed as the last row and not stored: every thread keeps reaching
    // the barriers, and the loop has no row test. Likewise a lane without a next unit loads the
    // last again: a test would be a branch, behind which the loads come too late.
    let last_row = rows - 1;
    let last_unit = cols / UNIT_WEIGHTS - 1;
    let row = |r: u32| {
        Row::new(
            quants,
            scales,
            (first_row + r).min(last_row),
            cols,
            group_shift,
        )
    };
    let row = [row(0), row(1)];
    // SAFETY: rows and units are clamped to the matrix, the plan checked the buffers and gave a
    // tile of shared memory, and barriers stand before and after staging.
    unsafe {
        let load = |unit: u32| {
            let unit = unit.min(last_unit);
            [
                row[0].unit(unit, group_shift),
                row[1].unit(unit, group_shift),
            ]
        };
        let mut sums = [0.0f32; ROWS_PER_WARP];
        let mut next = load(lane);
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
                let current = next;
                next = load(unit + warp::SIZE);
                let chunk = (unit - first_unit) * (UNIT_WEIGHTS / CHUNK_ELEMS);
                accumulate(&mut sums, &current, tile, chunk);
                unit += warp::SIZE;
            }
            first += count;
        }
        super::store_rows(sums, first_row, rows, bias, y);
    }
}

/// `y = W x + b`, two rows a warp.
///
/// # Safety
/// Launched as [`plan`] says.
#[kernel]
pub unsafe fn linear_gemv_int8_multirow(
    quants: *const i8,  // (N, K) int8
    scales: *const u16, // (N, ceil(K/group)) f16
    bias: *const f32,   // (N), or null
    x: *const f32,      // (K)
    y: *mut f32,        // (N)
    rows: u32,
    cols: u32,
    group_shift: u32,
) {
    // SAFETY: launched as `plan` says.
    unsafe { multirow(quants, scales, bias, x, y, [rows, cols, group_shift]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_becomes_its_float() {
        for q in i8::MIN..=i8::MAX {
            for j in 0..4 {
                let mut bytes = [0x5au8; 4];
                bytes[j] = q as u8;
                let word = u32::from_le_bytes(bytes) ^ 0x8080_8080;
                assert_eq!(offset_byte(word, 8 * j as u32), f32::from(q));
            }
        }
    }

    #[test]
    fn bytes_meet_their_columns() {
        let word = u32::from_le_bytes([1, -2i8 as u8, 3, -128i8 as u8]);
        assert_eq!(dot4(word, [1.0, 10.0, 100.0, 1000.0], 0.5), -127_718.5);
    }

    #[test]
    fn plan_takes_a_scale_a_row_and_refuses_odd_groups() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 1 << 20,
        };
        let scales = DeviceSlice {
            address: 0x1000,
            bytes: 193 * 2,
        };
        let none = DeviceSlice::NONE;
        let ops = Operands {
            quants: slice,
            scales,
            bias: none,
            x: slice,
            y: slice,
        };
        let shape = Shape {
            rows: 193,
            cols: 1120,
            group: 1120,
        };
        let call = plan(&DeviceInfo::T4, &shape, &ops).unwrap();
        assert_eq!(call.args[5..], [193, 1120, 31]);
        assert!(plan(&DeviceInfo::T4, &Shape { group: 32, ..shape }, &ops).is_err());
        assert!(
            plan(
                &DeviceInfo::T4,
                &Shape {
                    group: 160,
                    ..shape
                },
                &ops
            )
            .is_err()
        );
        assert!(
            plan(
                &DeviceInfo::T4,
                &Shape {
                    cols: 1112,
                    group: 1112,
                    ..shape
                },
                &ops
            )
            .is_err()
        );
    }
}
