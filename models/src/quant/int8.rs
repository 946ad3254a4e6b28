//! INT8 weights: `w = scale * q`, one f16 scale a group along K.
//!
//! ```text
//! quants  (n, k)               i8, row-major
//! scales  (n, ceil(k/group))   f16;  group == k: one scale a row;  group == 32: GGUF Q8_0 as it is
//! ```

use half::f16;

/// An `(rows, cols)` matrix in INT8.
#[derive(Debug, Clone, PartialEq)]
pub struct Int8Matrix {
    /// N.
    pub rows: usize,
    /// K, a multiple of 32.
    pub cols: usize,
    /// Weights that share a scale: a multiple of 32, at most `cols`.
    pub group: usize,
    /// `(rows, cols)`.
    pub quants: Vec<i8>,
    /// `(rows, ceil(cols/group))`.
    pub scales: Vec<f16>,
}
