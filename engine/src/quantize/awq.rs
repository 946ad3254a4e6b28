//! AWQ (<https://arxiv.org/abs/2306.00978>): columns of a linear layer that meet large inputs are
//! multiplied before rounding, so that they are rounded more finely, and their inputs are divided by
//! the same numbers, which whatever makes the inputs takes upon itself.

use models::quant::{Int4Fit, Int4Form, Int4Matrix};
use rayon::prelude::*;

use super::gram::{Gram, loss};
use crate::Error;

/// Exponents tried: 0 (leave the columns alone), 0.1, … 1.
const EXPONENT_STEPS: usize = 10;
/// Rows that one task rounds.
const BAND_ROWS: usize = 64;

/// `(k,)` numbers that columns are to be multiplied by, for all of `matrices` `(n, k)`, which share
/// their inputs. Columns of equal `ties` get the same number, for they are made by one.
pub fn column_scales(
    matrices: &[&[f32]],
    gram: &mut Gram,
    ties: &[usize],
    group: usize,
    form: Int4Form,
) -> Vec<f32> {
    let sizes = tied_sizes(&gram.mean_squares(), ties);
    let mut best = vec![1.0; sizes.len()];
    let mut least = f64::INFINITY;
    let full = gram.full();
    for step in 0..=EXPONENT_STEPS {
        let scales = scales_of(&sizes, step as f32 / EXPONENT_STEPS as f32);
        let error: f64 = matrices
            .iter()
            .map(|weights| loss(full, &errors(weights, &scales, group, form)))
            .sum();
        if error < least {
            (best, least) = (scales, error);
        }
    }
    best
}

/// Root mean square of the inputs, the same for tied columns.
fn tied_sizes(mean_squares: &[f32], ties: &[usize]) -> Vec<f32> {
    let makers = ties.iter().max().map_or(0, |last| last + 1);
    let mut sums = vec![(0.0f32, 0.0f32); makers];
    for (square, &maker) in mean_squares.iter().zip(ties) {
        sums[maker].0 += square;
        sums[maker].1 += 1.0;
    }
    ties.iter()
        .map(|&maker| (sums[maker].0 / sums[maker].1).sqrt())
        .collect()
}

/// `sizes^exponent`, centred on 1. Inputs that are hardly there count as a thousandth of the largest.
fn scales_of(sizes: &[f32], exponent: f32) -> Vec<f32> {
    let largest = sizes.iter().fold(0.0f32, |m, &size| m.max(size));
    if largest == 0.0 || exponent == 0.0 {
        return vec![1.0; sizes.len()];
    }
    let mut scales: Vec<f32> = sizes
        .iter()
        .map(|&size| (size / largest).max(1e-3).powf(exponent))
        .collect();
    let smallest = scales.iter().fold(1.0f32, |m, &scale| m.min(scale));
    let centre = smallest.sqrt();
    for scale in &mut scales {
        *scale /= centre;
    }
    scales
}

/// What rounding the scaled weights changes, in the scale of the weights.
fn errors(weights: &[f32], scales: &[f32], group: usize, form: Int4Form) -> Vec<f32> {
    let k = scales.len();
    let mut errors = weights.to_vec();
    errors.par_chunks_mut(k).for_each(|row| {
        for (values, scales) in row.chunks_mut(group).zip(scales.chunks(group)) {
            for (value, scale) in values.iter_mut().zip(scales) {
                *value *= scale;
            }
            let fit = Int4Fit::range(values, form);
            for (value, scale) in values.iter_mut().zip(scales) {
                *value = (fit.value(fit.level(*value)) - *value) / scale;
            }
        }
    });
    errors
}

/// Rounds `weights` `(n, k)`, already multiplied, for inputs that are already divided: each group's
/// levels are searched for, errors weighed by the inputs' mean squares `(k,)`.
///
/// # Errors
/// Weights that are not finite, a shape that INT4 does not have.
pub fn encode(
    weights: &[f32],
    importance: &[f32],
    group: usize,
    form: Int4Form,
) -> Result<Int4Matrix, Error> {
    let k = importance.len();
    let fits: Vec<Int4Fit> = weights
        .par_chunks(BAND_ROWS * k)
        .flat_map_iter(|band| {
            band.chunks_exact(k)
                .flat_map(|row| row.chunks(group).zip(importance.chunks(group)))
                .map(|(weights, importance)| Int4Fit::search(weights, Some(importance), form))
        })
        .collect();
    let mut fits = fits.into_iter();
    let matrix = Int4Matrix::encode_with(weights.len() / k, k, group, weights, |_, weights| {
        fits.next().unwrap_or_else(|| Int4Fit::range(weights, form))
    })?;
    Ok(matrix)
}

#[cfg(test)]
mod tests {
    use super::super::gram::tests::{correlated, weights};
    use super::*;

    #[test]
    fn output_errors_are_below_those_of_rounding() {
        let (k, n) = (160, 40);
        let mut gram = Gram::new(k);
        gram.add(&correlated(700, k, 11));
        let (a, b) = (weights(n, k, 12), weights(n, k, 13));
        let ties: Vec<usize> = (0..k).collect();
        for group in [32, 64, 128] {
            for form in [Int4Form::Symmetric, Int4Form::Asymmetric] {
                let scales = column_scales(&[&a, &b], &mut gram, &ties, group, form);
                let mut divided = gram.clone();
                divided.divide(&scales);
                let scaled: Vec<f32> = a
                    .iter()
                    .enumerate()
                    .map(|(i, w)| w * scales[i % k])
                    .collect();
                let matrix = encode(&scaled, &divided.mean_squares(), group, form).unwrap();
                let mut change = vec![0.0; n * k];
                for (i, row) in change.chunks_exact_mut(k).enumerate() {
                    matrix.dequantize_row(i, row);
                }
                for (change, weight) in change.iter_mut().zip(&scaled) {
                    *change -= weight;
                }
                let awq = loss(divided.full(), &change);
                let rtn = loss(gram.full(), &errors(&a, &vec![1.0; k], group, form));
                assert!(awq < 0.8 * rtn, "{group} {form:?}: {awq} {rtn}");
            }
        }
    }

    #[test]
    fn tied_columns_share_a_scale() {
        let k = 64;
        let mut gram = Gram::new(k);
        gram.add(&correlated(300, k, 14));
        let ties: Vec<usize> = (0..k).map(|i| i % 16).collect();
        let w = weights(20, k, 15);
        let scales = column_scales(&[&w], &mut gram, &ties, 32, Int4Form::Symmetric);
        assert!(scales.iter().any(|&scale| scale != 1.0));
        for i in 16..k {
            assert_eq!(scales[i], scales[i - 16]);
        }
    }
}
