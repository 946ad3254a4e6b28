//! Linear layer with ternary weights and float activations.

use models::quant::TernaryMatrix;
use models::quant::ternary::{CELL_BYTES, CELL_WEIGHTS};

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
