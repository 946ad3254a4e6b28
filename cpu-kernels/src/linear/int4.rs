//! Linear layer with INT4 weights and float activations.

use std::ops::Range;

use models::quant::Int4Matrix;
use models::quant::int4::{CELL_BYTES, CELL_WEIGHTS};

use super::{Matrix, kernels};
use crate::isa::Isa;

/// `y = w x + bias` for `x` `(t, k)` into `y` `(t, n)`; `bias` is `(n,)`.
///
/// # Panics
/// If a length does not fit the shape of `w`.
pub fn reference(w: &Int4Matrix, bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    super::tokens(w.rows, w.cols, bias, x.len(), y.len());
    let groups = w.cols.div_ceil(w.group);
    for (x, y) in x.chunks_exact(w.cols).zip(y.chunks_exact_mut(w.rows)) {
        for (row, y) in y.iter_mut().enumerate() {
            let mut sum = bias.map_or(0.0, |b| b[row] as f64);
            for (k, &x) in x.iter().enumerate() {
                let (cell, j) = (k / CELL_WEIGHTS, k % CELL_WEIGHTS);
                let byte = w.quants[row * w.cols / 2 + cell * CELL_BYTES + j % CELL_BYTES];
                let q = if j < CELL_BYTES { byte & 15 } else { byte >> 4 };
                let group = row * groups + k / w.group;
                let scale = w.scales[group].to_f64();
                let weight = match &w.mins {
                    Some(zeros) if w.zeros => scale * (q as f64 - zeros[group].to_f64()),
                    Some(mins) => scale * q as f64 + mins[group].to_f64(),
                    None => scale * (q as f64 - 8.0),
                };
                sum += weight * x as f64;
            }
            *y = sum as f32;
        }
    }
}

/// As [`reference`], by the fastest kernels of this CPU over rayon's current pool.
///
/// # Panics
/// If a length does not fit the shape of `w`.
pub fn forward(w: &Int4Matrix, bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    super::forward(w, bias, x, y);
}

impl Matrix for Int4Matrix {
    const ONE_TOKEN_KERNELS: bool = true;

    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn row_bytes(&self) -> usize {
        let per_group = if self.mins.is_some() { 4 } else { 2 };
        self.cols / 2 + self.cols.div_ceil(self.group) * per_group
    }

    fn dequantize(&self, isa: Isa, row: usize, out: &mut [f32]) {
        check(self);
        assert!(
            row < self.rows && out.len() == self.cols,
            "linear: row {row} or its length"
        );
        // SAFETY: an `Isa` only exists for a CPU that has its features.
        unsafe { (kernels(isa).int4_dequantize)(self, row, out) };
    }

    fn multiply(&self, isa: Isa, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
        check(self);
        assert!(rows.end <= self.rows && x.len() == self.cols && y.len() == rows.len());
        // SAFETY: an `Isa` only exists for a CPU that has its features.
        unsafe { (kernels(isa).int4_rows)(self, rows, x, y) };
    }
}

/// The lengths that the kernels rely on when they read through pointers.
fn check(w: &Int4Matrix) {
    let groups = w.rows * w.cols.div_ceil(w.group);
    assert!(
        w.cols.is_multiple_of(CELL_WEIGHTS)
            && w.group > 0
            && w.group.is_multiple_of(CELL_WEIGHTS)
            && w.quants.len() == w.rows * w.cols / 2
            && w.scales.len() == groups
            && w.mins.as_ref().is_none_or(|mins| mins.len() == groups),
        "linear: INT4 matrix ({}, {}) of another length",
        w.rows,
        w.cols
    );
}
