//! GPTQ (<https://arxiv.org/abs/2210.17323>): weights are rounded column by column, and what a
//! rounding does to the layer's output is made up for, as well as it can be, by the columns that are
//! not rounded yet.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use models::quant::{Int4Fit, Int4Form, Int4Matrix};
use rayon::prelude::*;

use super::gram::Gram;
use crate::Error;

/// Rows that one task rounds; they share what they read of the feedback.
const BAND_ROWS: usize = 32;
/// Columns that are rounded before their errors reach the columns behind them.
const BLOCK_COLS: usize = 64;

/// The order in which columns are rounded and how errors spread.
#[derive(Debug)]
pub struct Feedback {
    /// Mean square of each input.
    importance: Vec<f32>,
    /// Column that comes `i`-th: those with the largest inputs first, while there is most to make up
    /// with. Groups stay where they are, and their levels are those of the weights as they came.
    order: Vec<usize>,
    /// [`Gram::feedback`].
    upper: Vec<f32>,
}

impl Feedback {
    /// For the inputs that `gram` saw.
    ///
    /// # Errors
    /// As [`Gram::feedback`].
    pub fn new(gram: Gram) -> Result<Self, Error> {
        let importance = gram.mean_squares();
        let mut order: Vec<usize> = (0..gram.cols()).collect();
        order.sort_by(|a, b| importance[*b].total_cmp(&importance[*a]));
        let upper = gram.feedback(&order)?;
        Ok(Feedback {
            importance,
            order,
            upper,
        })
    }
}

/// Rounds `weights` `(n, k)`.
///
/// # Errors
/// Weights that are not finite, a shape that INT4 does not have.
pub fn encode(
    weights: &[f32],
    feedback: &Feedback,
    group: usize,
    form: Int4Form,
) -> Result<Int4Matrix, Error> {
    let k = feedback.order.len();
    let bands: Vec<(Vec<u8>, Vec<Int4Fit>)> = weights
        .par_chunks(BAND_ROWS * k)
        .map(|band| encode_band(band, feedback, group, form))
        .collect();
    let (levels, fits): (Vec<_>, Vec<_>) = bands.into_iter().unzip();
    let matrix = Int4Matrix::from_levels(
        weights.len() / k,
        k,
        group,
        &levels.concat(),
        &fits.concat(),
    )?;
    Ok(matrix)
}

/// Levels `(rows, k)` and fits of a band of rows.
fn encode_band(
    weights: &[f32],
    feedback: &Feedback,
    group: usize,
    form: Int4Form,
) -> (Vec<u8>, Vec<Int4Fit>) {
    let importance = &feedback.importance;
    let k = importance.len();
    let (rows, groups) = (weights.len() / k, k.div_ceil(group));
    let fits: Vec<Int4Fit> = weights
        .chunks_exact(k)
        .flat_map(|row| row.chunks(group).zip(importance.chunks(group)))
        .map(|(weights, importance)| Int4Fit::search(weights, Some(importance), form))
        .collect();
    // The weights in rounding order, changed as errors reach them.
    let mut left: Vec<f32> = weights
        .chunks_exact(k)
        .flat_map(|row| feedback.order.iter().map(|&column| row[column]))
        .collect();
    let mut levels = vec![0u8; rows * k];
    let mut errors = vec![0f32; rows * BLOCK_COLS];
    for start in (0..k).step_by(BLOCK_COLS) {
        let end = (start + BLOCK_COLS).min(k);
        for i in start..end {
            let spread = &feedback.upper[i * k..(i + 1) * k];
            let column = feedback.order[i];
            for (row, left) in left.chunks_exact_mut(k).enumerate() {
                let fit = &fits[row * groups + column / group];
                let level = fit.level(left[i]);
                levels[row * k + column] = level;
                let error = (left[i] - fit.value(level)) / spread[i];
                errors[row * BLOCK_COLS + i - start] = error;
                for (left, spread) in left[i + 1..end].iter_mut().zip(&spread[i + 1..end]) {
                    *left -= error * spread;
                }
            }
        }
        if end < k {
            let errors = MatRef::from_row_major_slice(&errors, rows, BLOCK_COLS);
            let upper = MatRef::from_row_major_slice(&feedback.upper, k, k);
            matmul(
                MatMut::from_row_major_slice_mut(&mut left, rows, k).subcols_mut(end, k - end),
                Accum::Add,
                errors.subcols(0, end - start),
                upper.submatrix(start, end, end - start, k - end),
                -1.0,
                Par::Seq,
            );
        }
    }
    (levels, fits)
}

#[cfg(test)]
mod tests {
    use super::super::gram::loss;
    use super::super::gram::tests::{correlated, weights};
    use super::*;

    /// Error in the layer's output.
    fn output_error(matrix: &Int4Matrix, weights: &[f32], gram: &mut Gram) -> f64 {
        let mut errors = vec![0.0; weights.len()];
        for (i, row) in errors.chunks_exact_mut(matrix.cols).enumerate() {
            matrix.dequantize_row(i, row);
        }
        for (error, weight) in errors.iter_mut().zip(weights) {
            *error -= weight;
        }
        loss(gram.full(), &errors)
    }

    #[test]
    fn output_errors_are_far_below_those_of_rounding_and_of_a_search() {
        // 160 and 352 columns are no whole number of groups or blocks, 70 rows no whole bands.
        for (k, n) in [(160, 70), (352, 33)] {
            let w = weights(n, k, 5);
            let mut gram = Gram::new(k);
            gram.add(&correlated(4 * k, k, 6));
            // Another sample of the same inputs: what was learned must hold there.
            let mut fresh = Gram::new(k);
            let all = correlated(8 * k, k, 6);
            fresh.add(&all[4 * k * k..]);
            for group in [32, 64, 128] {
                for form in [Int4Form::Symmetric, Int4Form::Asymmetric] {
                    let rtn = Int4Matrix::encode(n, k, group, form, &w).unwrap();
                    let mse = Int4Matrix::encode_with(n, k, group, &w, |_, w| {
                        Int4Fit::search(w, None, form)
                    })
                    .unwrap();
                    let gptq =
                        encode(&w, &Feedback::new(gram.clone()).unwrap(), group, form).unwrap();
                    let [rtn, mse, gptq] =
                        [rtn, mse, gptq].map(|m| output_error(&m, &w, &mut fresh));
                    assert!(gptq < 0.6 * mse, "{k} {group} {form:?}: {gptq} {mse} {rtn}");
                    assert!(gptq < 0.5 * rtn, "{k} {group} {form:?}: {gptq} {mse} {rtn}");
                }
            }
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let (k, n) = (192, 100);
        let w = weights(n, k, 7);
        let x = correlated(500, k, 8);
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let mut gram = Gram::new(k);
                gram.add(&x);
                encode(&w, &Feedback::new(gram).unwrap(), 64, Int4Form::Symmetric).unwrap()
            })
        };
        assert_eq!(on(1), on(3));
    }

    #[test]
    fn inputs_that_are_always_zero_are_no_trouble() {
        let (k, n) = (64, 8);
        let w = weights(n, k, 9);
        let mut x = correlated(200, k, 10);
        for x in x.chunks_exact_mut(k) {
            x[5] = 0.0;
        }
        let mut gram = Gram::new(k);
        gram.add(&x);
        let matrix = encode(&w, &Feedback::new(gram).unwrap(), 32, Int4Form::Asymmetric).unwrap();
        let mut row = vec![0.0; k];
        matrix.dequantize_row(0, &mut row);
        assert!((row[5] - w[5]).abs() <= matrix.row_scales(0)[0].to_f32());
        let untouched = Gram::new(k);
        assert!(
            encode(
                &w,
                &Feedback::new(untouched).unwrap(),
                32,
                Int4Form::Symmetric
            )
            .is_ok()
        );
    }
}
