//! INT4 weights, grouped along K.
//!
//! ```text
//! quants  (n, k/2)  bytes, row-major; every 32 weights are one 16-byte cell:
//!
//!   byte j of a cell:   | hi nibble: weight 16+j | lo nibble: weight j |   j in 0..16
//!
//! scales  (n, ceil(k/group)) f16
//! mins    (n, ceil(k/group)) f16, optional
//!
//! with mins:     w = scale * q + min          q in 0..=15   (GGUF Q4_1, bit for bit)
//! without mins:  w = scale * (q - 8)                        (GGUF Q4_0, bit for bit)
//! ```
//!
//! The cell is GGUF's own nibble order, so an import only separates the scales from the cells,
//! and both a byte shuffle on a CPU and `lop3` on a GPU split it without crossing lanes.
//! `k` is a multiple of 32; the last group of a row may be short.

use half::f16;

/// Weights a 16-byte cell.
pub const CELL_WEIGHTS: usize = 32;
/// Bytes a cell.
pub const CELL_BYTES: usize = 16;
const _: () = assert!(CELL_WEIGHTS == 2 * CELL_BYTES);

/// An `(rows, cols)` matrix in INT4.
#[derive(Debug, Clone, PartialEq)]
pub struct Int4Matrix {
    /// N.
    pub rows: usize,
    /// K, a multiple of 32.
    pub cols: usize,
    /// Weights that share a scale: 32, 64 or 128.
    pub group: usize,
    /// `(rows, cols/2)` cells.
    pub quants: Vec<u8>,
    /// `(rows, ceil(cols/group))`.
    pub scales: Vec<f16>,
    /// `(rows, ceil(cols/group))`, absent for the symmetric form.
    pub mins: Option<Vec<f16>>,
}
