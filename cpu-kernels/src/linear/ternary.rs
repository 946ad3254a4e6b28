//! Linear layer with ternary weights and float activations: plain loops over whole rows, which become
//! floats once and then meet every token.

use std::ops::Range;

use models::quant::TernaryMatrix;
use models::quant::ternary::{CELL_BYTES, CELL_WEIGHTS, decode_cell};

use super::Matrix;
use crate::isa::{Isa, per_isa};

/// `y = w x + bias` for `x` `(t, k)` into `y` `(t, n)`; `bias` is `(n,)`.
///
/// # Panics
/// If a length does not fit the shape of `w`.
pub fn reference(w: &TernaryMatrix, bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    super::tokens(w.rows, w.cols, bias, x.len(), y.len());
    for (x, y) in x.chunks_exact(w.cols).zip(y.chunks_exact_mut(w.rows)) {
        for (row, y) in y.iter_mut().enumerate() {
            let mut sum = bias.map_or(0.0, |b| b[row] as f64);
            for (k, &x) in x.iter().enumerate() {
                let cell = row * w.cols / 4 + k / CELL_WEIGHTS * CELL_BYTES;
                let (byte, pair) = (k % CELL_BYTES, k % CELL_WEIGHTS / CELL_BYTES);
                let code = w.quants[cell + byte] >> (2 * pair) & 3;
                let scale = w.row_scales(row)[k / w.group] as f64;
                sum += scale * (code as f64 - 1.0) * x as f64;
            }
            *y = sum as f32;
        }
    }
}

/// As [`reference`], over rayon's current pool.
///
/// # Panics
/// If a length does not fit the shape of `w`.
pub fn forward(w: &TernaryMatrix, bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    super::forward(w, bias, x, y);
}

impl Matrix for TernaryMatrix {
    const ONE_TOKEN_KERNELS: bool = false;

    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn row_bytes(&self) -> usize {
        self.cols / 4 + self.groups_per_row() * size_of::<f32>()
    }

    fn dequantize(&self, isa: Isa, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.cols,
            "linear: row {row} or its length"
        );
        widen(
            isa,
            self.row_quants(row),
            self.row_scales(row),
            self.group,
            out,
        );
    }

    fn multiply(&self, _: Isa, _: Range<usize>, _: &[f32], _: &mut [f32]) {
        unreachable!("one token goes the way of several");
    }
}

per_isa!(fn widen(quants: &[u8], scales: &[f32], group: usize, out: &mut [f32]) = widen_body);

#[inline(always)]
fn widen_body<const FMA: bool>(quants: &[u8], scales: &[f32], group: usize, out: &mut [f32]) {
    let groups = quants.chunks(group / 4).zip(out.chunks_mut(group));
    for ((cells, out), &scale) in groups.zip(scales) {
        let cells = cells.as_chunks::<CELL_BYTES>().0;
        let outs = out.as_chunks_mut::<CELL_WEIGHTS>().0;
        for (cell, out) in cells.iter().zip(outs) {
            decode_cell(cell, scale, out);
        }
    }
}
