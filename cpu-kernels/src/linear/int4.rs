//! Linear layer with INT4 weights and float activations.

use models::quant::Int4Matrix;
use models::quant::int4::{CELL_BYTES, CELL_WEIGHTS};

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
