//! INT4 matrix by one token's activations: `y[n] = sum_k w[n, k] x[k] + bias[n]`.
//!
//! Shapes: quants `(N, K/2)` bytes in 16-byte cells of 32 weights, scales and mins
//! `(N, ceil(K/group))` f16, x `(K,)`, y `(N,)`, with `w = scale q + min`, or `scale (q - 8)`
//! without mins.
//!
//! ```text
//! multirow: warp w of the grid -> rows 2w, 2w + 1
//!           lane l             -> cells l, l + 32, l + 64, ... of both rows
//!           a cell             -> one 16-byte load a row, 8 chunks of x from shared memory
//! baseline: block b            -> row b
//!           thread t           -> words t, t + BLOCK, ... : 8 weights, two 16-byte loads of x
//! ```
//!
//! A nibble becomes a float by landing in the mantissa of 16.0, whose step is 2^-19 of the word:
//! `16 + q` for a shift and an and-or, no conversion instruction. The 16, the minimum and the
//! symmetric 8 all multiply the same sum of x, so they are settled once a cell:
//!
//! ```text
//! sum w x = scale * sum (16 + q) x  +  (min - 16 scale) * sum x
//! ```
//!
//! Bytes moved: `N K / 2` quants, `2 N ceil(K/group)` scales (twice with mins), and `4 K` of x a
//! block, from L2. Shared memory: `multirow` stages x rotated, so reads and writes are free of
//! bank conflicts (see [`super`]); `baseline` keeps one float a warp.
//!
//! `multirow` wins wherever there are rows to fill the device. It asks for the next cell before it
//! works on this one, and for the first before x is staged. `baseline` is the plain form that the
//! others are measured against.

use cuda_std::shared::Shared;
use cuda_std::{kernel, shared, thread, warp};

use super::{CHUNK_ELEMS, TILE_COLS, chunk_offset_bytes, groups_per_row, stage_columns};
#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
#[cfg(not(target_arch = "nvptx64"))]
use crate::variant::{self, Choice};
use crate::{ptx, reduce};

/// Weights a cell.
const CELL_WEIGHTS: u32 = 32;
/// Words a cell.
const CELL_WORDS: usize = 4;
/// Rows a warp of `multirow`: two share each read of x, and two loads are in flight a lane.
const ROWS_PER_WARP: usize = 2;
/// Threads a block of `baseline`.
#[cfg(not(target_arch = "nvptx64"))]
const BASELINE_BLOCK: u32 = 128;

/// Dimensions of the product.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// N.
    pub rows: usize,
    /// K, a multiple of 32.
    pub cols: usize,
    /// Weights that share a scale: 32, 64 or 128; the last group of a row may be short.
    pub group: usize,
}

/// Buffers of the product.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(N, K/2)` cells.
    pub quants: DeviceSlice,
    /// `(N, ceil(K/group))` f16.
    pub scales: DeviceSlice,
    /// `(N, ceil(K/group))` f16, or none: symmetric.
    pub mins: DeviceSlice,
    /// `(N,)` f32, or none.
    pub bias: DeviceSlice,
    /// `(K,)` f32.
    pub x: DeviceSlice,
    /// `(N,)` f32.
    pub y: DeviceSlice,
}

/// The launch of `linear_gemv_int4_multirow` or `linear_gemv_int4_baseline`.
///
/// # Errors
/// A K that is no multiple of 32, an unsupported group, a short or misaligned buffer, a forced
/// variant that cannot run here.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(
    device: &DeviceInfo,
    shape: &Shape,
    ops: &Operands,
    choice: Choice,
) -> Result<Call, ShapeError> {
    let &Shape { rows, cols, group } = shape;
    let table = variant::INT4_GEMV;
    let variant = variant::choose(table, "linear_gemv_int4", choice, device, rows, cols)?;
    let mut call = CallBuilder::new(variant.kernel);
    call.require(
        cols.is_multiple_of(32),
        "cols",
        cols,
        "it must be a multiple of 32",
    )?;
    call.require(
        matches!(group, 32 | 64 | 128),
        "group",
        group,
        "it must be 32, 64 or 128",
    )?;
    let scale_bytes = tensor_bytes(&[rows, cols.div_ceil(group)], 2);
    call.tensor("quants", ops.quants, tensor_bytes(&[rows, cols / 2], 1), 16)?;
    call.tensor("scales", ops.scales, scale_bytes, 2)?;
    call.optional("mins", ops.mins, scale_bytes, 2)?;
    call.optional("bias", ops.bias, tensor_bytes(&[rows], 4), 4)?;
    call.tensor("x", ops.x, tensor_bytes(&[cols], 4), 16)?;
    call.tensor("y", ops.y, tensor_bytes(&[rows], 4), 4)?;
    let rows = call.dim("rows", rows)?;
    let cols = call.dim("cols", cols)?;
    call.u32(group.trailing_zeros());
    let launch = if variant.id == variant::INT4_GEMV_BASELINE {
        Launch::linear(rows, BASELINE_BLOCK, reduce::SCRATCH_BYTES)
    } else {
        super::multirow_launch(device, rows, cols, ROWS_PER_WARP as u32)
    };
    call.build(device, launch)
}

/// `16 + q` for the nibble `q` at bit `bit` of `word`.
#[inline(always)]
fn biased_nibble(word: u32, bit: u32) -> f32 {
    const MANTISSA_OF_16: u32 = 19;
    let moved = if bit <= MANTISSA_OF_16 {
        word << (MANTISSA_OF_16 - bit)
    } else {
        word >> (bit - MANTISSA_OF_16)
    };
    f32::from_bits(0x4180_0000 | (moved & (0xf << MANTISSA_OF_16)))
}

/// `sum_j (16 + q_j) x_j + start` for the four nibbles at bits `bit`, `bit + 8`, ... of `word`:
/// its low (`bit` 0) or high (`bit` 4) nibbles.
#[inline(always)]
fn dot4(word: u32, bit: u32, x: [f32; 4], start: f32) -> f32 {
    let sum = ptx::fma(biased_nibble(word, bit), x[0], start);
    let sum = ptx::fma(biased_nibble(word, bit + 8), x[1], sum);
    let sum = ptx::fma(biased_nibble(word, bit + 16), x[2], sum);
    ptx::fma(biased_nibble(word, bit + 24), x[3], sum)
}

/// The sum of four, in pairs.
#[inline(always)]
fn sum4(x: [f32; 4]) -> f32 {
    (x[0] + x[1]) + (x[2] + x[3])
}

/// Where one row's weights start.
#[derive(Clone, Copy)]
struct Row {
    quants: *const u32,
    scales: *const u16,
    /// Anything where the format has none.
    mins: *const u16,
    group_shift: u32,
}

impl Row {
    /// Row `row` of the matrix that the pointers describe.
    #[inline(always)]
    fn new(
        quants: *const u8,
        scales: *const u16,
        mins: *const u16,
        row: u32,
        [cols, group_shift]: [u32; 2],
    ) -> Row {
        let group = row as usize * groups_per_row(cols, group_shift) as usize;
        let quants = quants.wrapping_add(row as usize * (cols / 2) as usize);
        Row {
            quants: quants.cast(),
            scales: scales.wrapping_add(group),
            mins: mins.wrapping_add(group),
            group_shift,
        }
    }

    /// Scale and, if the format has it, minimum of the group of column `column`.
    ///
    /// # Safety
    /// The column is in the row, and there are minima if `MINS` says so.
    #[inline(always)]
    unsafe fn group<const MINS: bool>(&self, column: u32) -> Group {
        let group = (column >> self.group_shift) as usize;
        // SAFETY: by the caller's promise.
        unsafe {
            let scale = ptx::ld_global_nc_u16(self.scales.wrapping_add(group));
            let mut min = 0;
            if MINS {
                min = ptx::ld_global_nc_u16(self.mins.wrapping_add(group));
            }
            Group { scale, min }
        }
    }

    /// # Safety
    /// `cell` is a cell of the row, and there are minima if `MINS` says so.
    #[inline(always)]
    unsafe fn cell<const MINS: bool>(&self, cell: u32) -> Cell {
        // SAFETY: by the caller's promise; a cell is 16 bytes and the row starts at a cell.
        unsafe {
            let words = self.quants.wrapping_add(cell as usize * CELL_WORDS);
            Cell {
                words: ptx::ld_global_nc_v4_u32(words),
                group: self.group::<MINS>(cell * CELL_WEIGHTS),
            }
        }
    }
}

/// Scale and minimum as loaded, f16: converting them waits for the load, so it is left to the use.
#[derive(Clone, Copy)]
struct Group {
    scale: u16,
    min: u16,
}

impl Group {
    /// Adds a dot product over biased nibbles, and the sum of its columns, to the row's sum.
    #[inline(always)]
    fn settle<const MINS: bool>(self, biased_dot: f32, sum_x: f32, sum: f32) -> f32 {
        let scale = ptx::f16_to_f32(self.scale);
        let offset = if MINS {
            ptx::fma(-16.0, scale, ptx::f16_to_f32(self.min))
        } else {
            -24.0 * scale
        };
        ptx::fma(scale, biased_dot, ptx::fma(offset, sum_x, sum))
    }
}

/// 32 weights of one row in registers.
#[derive(Clone, Copy)]
struct Cell {
    words: [u32; CELL_WORDS],
    group: Group,
}

/// A row's running dot products with one cell: low nibbles, high nibbles.
type Dots<const R: usize> = [[f32; 2]; R];

/// Adds word `I` of each row's cell to the dot products, and its columns to their sum. The word is a
/// constant so that nothing is indexed at run time: an array that is lands in local memory.
///
/// # Safety
/// The eight chunks from `first_chunk` on are staged.
#[inline(always)]
unsafe fn word<const I: usize, const R: usize>(
    dots: &mut Dots<R>,
    sum_x: f32,
    cells: &[Cell; R],
    tile: Shared,
    first_chunk: u32,
) -> f32 {
    // SAFETY: both chunks are among the eight.
    let (low, high) = unsafe {
        (
            ptx::ld_shared_v4_f32(tile, chunk_offset_bytes(first_chunk + I as u32)),
            ptx::ld_shared_v4_f32(tile, chunk_offset_bytes(first_chunk + 4 + I as u32)),
        )
    };
    for r in 0..R {
        dots[r][0] = dot4(cells[r].words[I], 0, low, dots[r][0]);
        dots[r][1] = dot4(cells[r].words[I], 4, high, dots[r][1]);
    }
    sum_x + (sum4(low) + sum4(high))
}

/// Adds the cells' products with their 32 columns to the rows' sums.
///
/// # Safety
/// The eight chunks from `first_chunk` on are staged.
#[inline(always)]
unsafe fn accumulate<const MINS: bool, const R: usize>(
    sums: &mut [f32; R],
    cells: &[Cell; R],
    tile: Shared,
    first_chunk: u32,
) {
    let mut dots: Dots<R> = [[0.0; 2]; R];
    // SAFETY: by the caller's promise.
    let sum_x = unsafe {
        let sum_x = word::<0, R>(&mut dots, 0.0, cells, tile, first_chunk);
        let sum_x = word::<1, R>(&mut dots, sum_x, cells, tile, first_chunk);
        let sum_x = word::<2, R>(&mut dots, sum_x, cells, tile, first_chunk);
        word::<3, R>(&mut dots, sum_x, cells, tile, first_chunk)
    };
    for r in 0..R {
        sums[r] = cells[r]
            .group
            .settle::<MINS>(dots[r][0] + dots[r][1], sum_x, sums[r]);
    }
}

/// The body of `linear_gemv_int4_multirow`, with or without minima.
///
/// # Safety
/// As the kernel, and `mins` are there if `MINS` says so.
#[inline(always)]
unsafe fn multirow<const MINS: bool>(
    quants: *const u8,
    scales: *const u16,
    mins: *const u16,
    bias: *const f32,
    x: *const f32,
    y: *mut f32,
    [rows, cols, group_shift]: [u32; 3],
) {
    let lane = warp::lane_id();
    let first_row = thread::index_1d() / warp::SIZE * ROWS_PER_WARP as u32;
    let tile = shared::dynamic_shared_mem();

    // Rows past the end are computed as the last row and not stored: every thread keeps reaching
    // the barriers, and the loop has no row test. Likewise a lane without a next cell loads the
    // last again: a test would be a branch, behind which the loads come too late.
    let last_row = rows - 1;
    let last_cell = cols / CELL_WEIGHTS - 1;
    let row = |r: u32| {
        let row = (first_row + r).min(last_row);
        Row::new(quants, scales, mins, row, [cols, group_shift])
    };
    let row = [row(0), row(1)];
    // SAFETY: rows and cells are clamped to the matrix, the plan checked the buffers and gave a
    // tile of shared memory, and barriers stand before and after staging.
    unsafe {
        let load = |cell: u32| {
            let cell = cell.min(last_cell);
            [row[0].cell::<MINS>(cell), row[1].cell::<MINS>(cell)]
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

            let first_cell = first / CELL_WEIGHTS;
            let end = first_cell + count / CELL_WEIGHTS;
            let mut cell = first_cell + lane;
            while cell < end {
                let current = next;
                next = load(cell + warp::SIZE);
                let chunk = (cell - first_cell) * (CELL_WEIGHTS / CHUNK_ELEMS);
                accumulate::<MINS, ROWS_PER_WARP>(&mut sums, &current, tile, chunk);
                cell += warp::SIZE;
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
pub unsafe fn linear_gemv_int4_multirow(
    quants: *const u8,  // (N, K/2) int4
    scales: *const u16, // (N, ceil(K/group)) f16
    mins: *const u16,   // (N, ceil(K/group)) f16, or null
    bias: *const f32,   // (N), or null
    x: *const f32,      // (K)
    y: *mut f32,        // (N)
    rows: u32,
    cols: u32,
    group_shift: u32,
) {
    let shape = [rows, cols, group_shift];
    // SAFETY: launched as `plan` says.
    unsafe {
        if mins.is_null() {
            multirow::<false>(quants, scales, mins, bias, x, y, shape);
        } else {
            multirow::<true>(quants, scales, mins, bias, x, y, shape);
        }
    }
}

/// `y = W x + b`, a block a row.
///
/// # Safety
/// Launched as [`plan`] says.
#[kernel]
pub unsafe fn linear_gemv_int4_baseline(
    quants: *const u8,  // (N, K/2) int4
    scales: *const u16, // (N, ceil(K/group)) f16
    mins: *const u16,   // (N, ceil(K/group)) f16, or null
    bias: *const f32,   // (N), or null
    x: *const f32,      // (K)
    y: *mut f32,        // (N)
    _rows: u32,
    cols: u32,
    group_shift: u32,
) {
    let shape = [cols, group_shift];
    // SAFETY: launched as `plan` says.
    unsafe {
        if mins.is_null() {
            baseline::<false>(quants, scales, mins, bias, x, y, shape);
        } else {
            baseline::<true>(quants, scales, mins, bias, x, y, shape);
        }
    }
}

/// The body of `linear_gemv_int4_baseline`, with or without minima.
///
/// # Safety
/// As the kernel, and `mins` are there if `MINS` says so.
#[inline(always)]
unsafe fn baseline<const MINS: bool>(
    quants: *const u8,
    scales: *const u16,
    mins: *const u16,
    bias: *const f32,
    x: *const f32,
    y: *mut f32,
    [cols, group_shift]: [u32; 2],
) {
    let n = thread::block_idx_x();
    let words = cols / 8;
    let row = Row::new(quants, scales, mins, n, [cols, group_shift]);
    let mut sum = 0.0;
    let mut word = thread::thread_idx_x();
    // SAFETY: a block a row; a word is below K/8 and the columns of its nibbles below K, which is
    // a multiple of 32; the plan checked the buffers and gave the scratch.
    unsafe {
        while word < words {
            // Word i of a cell holds its weights 4i .. 4i+4 and 16+4i .. 16+4i+4.
            let column = word / CELL_WORDS as u32 * CELL_WEIGHTS + word % CELL_WORDS as u32 * 4;
            let bits = ptx::ld_global_nc_u32(row.quants.wrapping_add(word as usize));
            let low = ptx::ld_global_v4_f32(x.wrapping_add(column as usize));
            let high = ptx::ld_global_v4_f32(x.wrapping_add(column as usize + 16));
            let group = row.group::<MINS>(column);
            let dot = dot4(bits, 4, high, dot4(bits, 0, low, 0.0));
            sum = group.settle::<MINS>(dot, sum4(low) + sum4(high), sum);
            word += thread::block_dim_x();
        }
        let sum = reduce::block_sum_f32(sum, shared::dynamic_shared_mem());
        if thread::thread_idx_x() == 0 {
            super::store_row(sum, n, bias, y);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_become_floats_at_every_bit() {
        for q in 0..16u32 {
            for bit in (0..32).step_by(4) {
                let word = q << bit | !(0xfu32 << bit);
                assert_eq!(
                    biased_nibble(word, bit),
                    16.0 + q as f32,
                    "nibble {q} at bit {bit}"
                );
            }
        }
    }

    #[test]
    fn low_and_high_nibbles_meet_their_columns() {
        let word = 0x8642_7531;
        assert_eq!(dot4(word, 0, [1.0, 0.0, 0.0, 0.0], 0.0), 17.0);
        assert_eq!(dot4(word, 4, [1.0, 0.0, 0.0, 0.0], 0.0), 19.0);
        assert_eq!(dot4(word, 0, [0.0, 0.0, 0.0, 1.0], 0.0), 22.0);
        assert_eq!(dot4(word, 4, [0.0, 0.0, 0.0, 1.0], 0.0), 24.0);
    }

    #[test]
    fn settling_takes_the_bias_out() {
        // One weight: scale 2, q 5, x 7, on top of 1; with a minimum of -3, and symmetric.
        let (two, minus_three) = (0x4000, 0xc200);
        let group = Group {
            scale: two,
            min: minus_three,
        };
        let dot = (16.0 + 5.0) * 7.0;
        assert_eq!(
            group.settle::<true>(dot, 7.0, 1.0),
            (2.0 * 5.0 - 3.0) * 7.0 + 1.0
        );
        assert_eq!(
            group.settle::<false>(dot, 7.0, 1.0),
            2.0 * (5.0 - 8.0) * 7.0 + 1.0
        );
    }

    fn operands() -> Operands {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 1 << 30,
        };
        let none = DeviceSlice::NONE;
        Operands {
            quants: slice,
            scales: slice,
            mins: none,
            bias: none,
            x: slice,
            y: slice,
        }
    }

    #[test]
    fn plan_covers_every_row_and_keeps_the_default() {
        let shape = Shape {
            rows: 193,
            cols: 576,
            group: 128,
        };
        let call = plan(&DeviceInfo::T4, &shape, &operands(), Choice::Auto).unwrap();
        assert_eq!(call.kernel, "linear_gemv_int4_multirow");
        let rows = call.launch.grid[0] * call.launch.block[0] / 32 * ROWS_PER_WARP as u32;
        assert!((193..193 + 16).contains(&rows));
        assert_eq!(call.launch.shared_bytes, 576 * 4);
        let choice = Choice::Force(variant::INT4_GEMV_BASELINE);
        let call = plan(&DeviceInfo::T4, &shape, &operands(), choice).unwrap();
        assert_eq!(
            (call.kernel, call.launch.grid[0]),
            ("linear_gemv_int4_baseline", 193)
        );
    }

    #[test]
    fn plan_refuses_what_the_kernel_cannot_take() {
        let shape = Shape {
            rows: 7,
            cols: 576,
            group: 128,
        };
        let refused = |shape: Shape, ops: Operands| {
            plan(&DeviceInfo::T4, &shape, &ops, Choice::Auto).is_err()
        };
        assert!(refused(Shape { cols: 580, ..shape }, operands()));
        assert!(refused(Shape { group: 96, ..shape }, operands()));
        assert!(refused(Shape { rows: 0, ..shape }, operands()));
        assert!(refused(
            shape,
            Operands {
                x: DeviceSlice::NONE,
                ..operands()
            }
        ));
        let short = DeviceSlice {
            address: 0x1000,
            bytes: 7 * 5 * 2 - 1,
        };
        assert!(refused(
            shape,
            Operands {
                mins: short,
                ..operands()
            }
        ));
    }
}
