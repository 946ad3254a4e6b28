//! Linear layers: `y = w x + bias`, one file a weight format and one an instruction set.
//!
//! Two forms, chosen by the number of tokens:
//!
//! * one token (decode): four rows at a time, weights become floats in registers and meet `x` there;
//!   bound by how fast weights arrive from memory.
//! * several tokens (a prompt): four rows become floats in a small buffer once, then meet every token
//!   of the call in register tiles of four rows by a few tokens.
//!
//! In both a weight is rounded to the same float and a row is summed in the same order, lane `i`
//! taking columns `i, i + lanes, …`: a prompt gives the same bits in one call as token by token.
//!
//! One thread of an AMD EPYC (Zen 4), 2026-11-23, billions of multiplications with addition a second:
//!
//! | | AVX-512 | AVX2 | scalar |
//! |---|---|---|---|
//! | INT4, group 32, K 576, one token | 17.4 | 12.7 | 2.9 |
//! | INT4, group 128, K 1536, one token | 23.7 | 14.5 | 3.0 |
//! | INT8, a scale a row, K 576, one token | 22.8 | 18.9 | 3.6 |
//! | INT4, group 32, K 576, 32 tokens | 46.2 | 46.4 | 10.5 |

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod float16;
pub mod int4;
pub mod int8;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
pub mod ternary;

use std::ops::Range;

use models::quant::{Int4Matrix, Int8Matrix};
use rayon::prelude::*;

use crate::buffer::AlignedBuffer;
use crate::isa::{Isa, Kind};
use crate::team::SharedSlice;

/// Rows that a kernel takes at once. Work is cut at multiples of it.
pub const TILE_ROWS: usize = 4;

/// Weight bytes below which a second thread costs more than it brings: waking one takes about as
/// long as reading this much.
const BYTES_PER_TASK: usize = 128 * 1024;

/// Floats of scratch memory that [`part`] needs for matrices of up to `cols` columns.
pub fn scratch_elems(cols: usize) -> usize {
    TILE_ROWS * cols
}

/// The kernels of one instruction set. `row` is the first of [`TILE_ROWS`] rows; rows beyond the
/// matrix are computed as its last row and left out by the caller.
///
/// All of them are unsafe for one reason: the CPU must have the instruction set.
struct Kernels {
    /// `y[i] = row i of the range · x`, one token.
    int4_rows: unsafe fn(w: &Int4Matrix, rows: Range<usize>, x: &[f32], y: &mut [f32]),
    /// De-quantised row, `(k,)`.
    int4_dequantize: unsafe fn(w: &Int4Matrix, row: usize, out: &mut [f32]),
    /// As `int4_rows`.
    int8_rows: unsafe fn(w: &Int8Matrix, rows: Range<usize>, x: &[f32], y: &mut [f32]),
    /// As `int4_dequantize`.
    int8_dequantize: unsafe fn(w: &Int8Matrix, row: usize, out: &mut [f32]),
    /// Tokens of a full tile.
    tile_tokens: usize,
    /// `out[t][i] = w[i] · x[t]` for `w` `(TILE_ROWS, k)` and `x` `(t, k)`, `t <= tile_tokens`.
    tile: unsafe fn(w: &[f32], x: &[f32], k: usize, out: &mut [TileRow]),
}

/// Sums of the rows of a tile for one token.
type TileRow = [f32; TILE_ROWS];

/// Greatest `tile_tokens` of any instruction set.
const MAX_TILE_TOKENS: usize = 8;

fn kernels(isa: Isa) -> &'static Kernels {
    match isa.0 {
        Kind::Scalar => &scalar::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => &avx2::KERNELS,
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => &avx512::KERNELS,
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => &neon::KERNELS,
    }
}

/// A matrix that has kernels.
pub trait Matrix: Sync {
    /// Whether there are kernels for one token; else it goes the way of several.
    const ONE_TOKEN_KERNELS: bool;
    /// N.
    fn rows(&self) -> usize;
    /// K.
    fn cols(&self) -> usize;
    /// Bytes that hold one row, scales included.
    fn row_bytes(&self) -> usize;
    /// De-quantised `row` into `out` `(k,)`.
    ///
    /// # Panics
    /// If `row` is not a row or `out` is not `(k,)`.
    fn dequantize(&self, isa: Isa, row: usize, out: &mut [f32]);
    /// `y[i] = row i of the range · x` for one token, `x` `(k,)`.
    ///
    /// # Panics
    /// If the range is outside the matrix, a length does not fit, or there are no kernels for one token.
    fn multiply(&self, isa: Isa, rows: Range<usize>, x: &[f32], y: &mut [f32]);
}

/// Tokens of a call; checks every length against the shape of the matrix.
fn tokens(rows: usize, cols: usize, bias: Option<&[f32]>, x: usize, y: usize) -> usize {
    assert!(
        cols > 0 && x.is_multiple_of(cols),
        "linear: x is (t, k) with k = {cols}"
    );
    let tokens = x / cols;
    assert_eq!(y, tokens * rows, "linear: y is (t, n) with n = {rows}");
    assert!(
        bias.is_none_or(|b| b.len() == rows),
        "linear: bias is (n,) with n = {rows}"
    );
    tokens
}

/// Computes the rows `rows` of `y = w x + bias` for all tokens of `x` `(t, k)`; `y` is `(t, n)`.
/// `scratch` holds [`scratch_elems`]; one token of a format with kernels for it needs none.
///
/// # Panics
/// If a length does not fit the shape of `w`.
///
/// # Safety
/// Until this returns nothing else reads or writes the columns `rows` of `y`.
pub unsafe fn part<M: Matrix>(
    isa: Isa,
    w: &M,
    bias: Option<&[f32]>,
    x: &[f32],
    y: SharedSlice<'_, f32>,
    rows: Range<usize>,
    scratch: &mut [f32],
) {
    let (n, k) = (w.rows(), w.cols());
    let tokens = tokens(n, k, bias, x.len(), y.len());
    assert!(rows.end <= n, "linear: rows outside the matrix");
    if rows.is_empty() {
        return;
    }
    if tokens == 1 && M::ONE_TOKEN_KERNELS {
        // SAFETY: with one token columns are elements; the caller leaves these to this call.
        let y = unsafe { y.slice_mut(rows.clone()) };
        w.multiply(isa, rows.clone(), x, y);
        if let Some(bias) = bias {
            for (y, bias) in y.iter_mut().zip(&bias[rows]) {
                *y += bias;
            }
        }
        return;
    }
    let kernels = kernels(isa);
    let tile = &mut scratch[..TILE_ROWS * k];
    let mut sums = [[0.0; TILE_ROWS]; MAX_TILE_TOKENS];
    for row in rows.clone().step_by(TILE_ROWS) {
        let valid = TILE_ROWS.min(rows.end - row);
        for (i, out) in tile.chunks_exact_mut(k).take(valid).enumerate() {
            w.dequantize(isa, row + i, out);
        }
        for (i, x) in x.chunks(kernels.tile_tokens * k).enumerate() {
            let sums = &mut sums[..x.len() / k];
            // SAFETY: an `Isa` only exists for a CPU that has its features.
            unsafe { (kernels.tile)(tile, x, k, sums) };
            for (j, sums) in sums.iter().enumerate() {
                let start = (i * kernels.tile_tokens + j) * n + row;
                // SAFETY: columns of `rows`, which the caller leaves to this call.
                let y = unsafe { y.slice_mut(start..start + valid) };
                match bias {
                    Some(bias) => {
                        for ((y, sum), bias) in y.iter_mut().zip(sums).zip(&bias[row..]) {
                            *y = sum + bias;
                        }
                    }
                    None => y.copy_from_slice(&sums[..valid]),
                }
            }
        }
    }
}

/// `y = w x + bias`, rows shared out over the threads of rayon's current pool.
fn forward<M: Matrix>(w: &M, bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    let isa = Isa::selected();
    let y = SharedSlice::new(y);
    let bytes = w.rows() * w.row_bytes();
    let tasks = rayon::current_num_threads()
        .min(bytes.div_ceil(BYTES_PER_TASK))
        .max(1);
    let scratch_elems = if x.len() > w.cols() || !M::ONE_TOKEN_KERNELS {
        scratch_elems(w.cols())
    } else {
        0
    };
    (0..tasks).into_par_iter().for_each(|task| {
        let rows = crate::team::split(w.rows(), TILE_ROWS, task, tasks);
        let mut scratch = AlignedBuffer::zeroed(scratch_elems);
        // SAFETY: the row ranges of tasks are disjoint and `y` is borrowed by this call.
        unsafe { part(isa, w, bias, x, y, rows, &mut scratch) };
    });
}

/// Bytes of a cache line: what a step of [`TILE_ROWS`] rows reads, a cell or 16 weights of each. Each
/// step also asks for one line of the next rows, which lie behind these in memory: four streams taken
/// in turn are not seen by the hardware as the one that they are (up to three times the speed).
#[cfg(target_arch = "x86_64")]
const LINE_BYTES: usize = 64;

/// Asks for the line at `address`, which need not exist.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch<T>(address: *const T) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch reads nothing and never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
}

/// Rows `row..row + TILE_ROWS`, those beyond `last` replaced by it.
fn tile_rows(row: usize, last: usize) -> [usize; TILE_ROWS] {
    std::array::from_fn(|i| (row + i).min(last))
}

#[cfg(test)]
mod tests;
