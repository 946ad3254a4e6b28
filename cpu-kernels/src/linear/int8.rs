//! Linear layer with INT8 weights and float activations.

use std::ops::Range;

use models::quant::Int8Matrix;

use super::{Matrix, kernels};
use crate::isa::Isa;

/// `y = w x + bias` for `x` `(t, k)` into `y` `(t, n)`; `bias` is `(n,)`.
///
/// # Panics
/// If a length does not fit the shape of `w`.
pub fn reference(w: &Int8Matrix, bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    super::tokens(w.rows, w.cols, bias, x.len(), y.len());
    let groups = w.cols.div_ceil(w.group);
    for (x, y) in x.chunks_exact(w.cols).zip(y.chunks_exact_mut(w.rows)) {
        for (row, y) in y.iter_mut().enumerate() {
            let mut sum = bias.map_or(0.0, |b| b[row] as f64);
            for (k, &x) in x.iter().enumerate() {
                let scale = w.scales[row * groups + k / w.group].to_f64();
                sum += scale * w.quants[row * w.cols + k] as f64 * x as f64;
            }
            *y = sum as f32;
        }
    }
}

/// As [`reference`], by the fastest kernels of this CPU over rayon's current pool.
///
/// # Panics
/// If a length does not fit the shape of `w`.
pub fn forward(w: &Int8Matrix, bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    super::forward(w, bias, x, y);
}

impl Matrix for Int8Matrix {
    const ONE_TOKEN_KERNELS: bool = true;

    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn row_bytes(&self) -> usize {
        self.cols + self.cols.div_ceil(self.group) * 2
    }

    fn dequantize(&self, isa: Isa, row: usize, out: &mut [f32]) {
        check(self);
        assert!(
            row < self.rows && out.len() == self.cols,
            "linear: row {row} or its length"
        );
        // SAFETY: an `Isa` only exists for a CPU that has its features.
        unsafe { (kernels(isa).int8_dequantize)(self, row, out) };
    }

    fn multiply(&self, isa: Isa, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
        check(self);
        assert!(rows.end <= self.rows && x.len() == self.cols && y.len() == rows.len());
        // SAFETY: an `Isa` only exists for a CPU that has its features.
        unsafe { (kernels(isa).int8_rows)(self, rows, x, y) };
    }
}

/// Columns that a kernel takes at once.
pub(super) const CELL_WEIGHTS: usize = 32;

/// The lengths that the kernels rely on when they read through pointers.
fn check(w: &Int8Matrix) {
    assert!(
        w.cols.is_multiple_of(CELL_WEIGHTS)
            && w.group > 0
            && w.group.is_multiple_of(CELL_WEIGHTS)
            && w.quants.len() == w.rows * w.cols
            && w.scales.len() == w.rows * w.cols.div_ceil(w.group),
        "linear: INT8 matrix ({}, {}) of another length",
        w.rows,
        w.cols
    );
}
