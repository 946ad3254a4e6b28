//! RMSNorm: `out = x / sqrt(mean(x²) + eps) * weight`, a token at a time
//! (Zhang & Sennrich 2019, <https://arxiv.org/abs/1910.07467>). Squares are summed in f64, rounded once, and the
//! rest is correctly rounded: every instruction set and the GPU's kernel give the same bits.

use rayon::prelude::*;

use crate::isa::{Isa, per_isa};
use crate::lanes::sum_of_squares;

/// Normalises each token of `x` `(t, d)` with `weight` `(d,)` into `out` `(t, d)`.
///
/// # Panics
/// If `x` is not a whole number of tokens or `out` is of another length.
pub fn reference(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let d = weight.len();
    assert_eq!(x.len(), out.len(), "rmsnorm: lengths of x and out");
    assert!(d > 0 && x.len().is_multiple_of(d), "rmsnorm: x is (t, d)");
    for (x, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
        let squares = x.iter().map(|&v| v as f64 * v as f64).sum::<f64>();
        let mean_square = squares as f32 * (1.0 / d as f32);
        let factor = 1.0 / (mean_square + eps).sqrt();
        for ((out, &x), &w) in out.iter_mut().zip(x).zip(weight) {
            *out = x * factor * w;
        }
    }
}

/// As [`reference`], by the fastest instructions of this CPU, tokens over rayon's current pool.
///
/// # Panics
/// If `x` is not a whole number of tokens or `out` is of another length.
pub fn forward(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let (isa, d) = (Isa::selected(), weight.len());
    assert_eq!(x.len(), out.len(), "rmsnorm: lengths of x and out");
    assert!(d > 0 && x.len().is_multiple_of(d), "rmsnorm: x is (t, d)");
    let tokens = x.par_chunks_exact(d).zip(out.par_chunks_exact_mut(d));
    tokens
        .with_min_len(TOKENS_PER_TASK)
        .for_each(|(x, out)| part(isa, x, weight, eps, out));
}

/// Tokens that are worth a task of their own.
const TOKENS_PER_TASK: usize = 16;

/// [`reference`] with the instruction set given, on this thread.
///
/// # Panics
/// If `x` is not a whole number of tokens or `out` is of another length.
pub fn part(isa: Isa, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let d = weight.len();
    assert_eq!(x.len(), out.len(), "rmsnorm: lengths of x and out");
    assert!(d > 0 && x.len().is_multiple_of(d), "rmsnorm: x is (t, d)");
    for (x, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
        normalise(isa, x, weight, eps, out);
    }
}

/// [`part`] of one token onto itself.
///
/// # Panics
/// If `x` and `weight` differ in length.
pub fn part_in_place(isa: Isa, x: &mut [f32], weight: &[f32], eps: f32) {
    assert!(
        !x.is_empty() && x.len() == weight.len(),
        "rmsnorm: x is (d,)"
    );
    normalise_in_place(isa, x, weight, eps);
}

/// What a token is multiplied by.
#[inline(always)]
fn factor(x: &[f32], eps: f32) -> f32 {
    let mean_square = sum_of_squares(x) * (1.0 / x.len() as f32);
    1.0 / (mean_square + eps).sqrt()
}

per_isa!(fn normalise_in_place(x: &mut [f32], weight: &[f32], eps: f32) = normalise_in_place_body);

#[inline(always)]
fn normalise_in_place_body<const FMA: bool>(x: &mut [f32], weight: &[f32], eps: f32) {
    let factor = factor(x, eps);
    for (x, &w) in x.iter_mut().zip(weight) {
        *x = *x * factor * w;
    }
}

per_isa!(fn normalise(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = normalise_body);

#[inline(always)]
fn normalise_body<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let factor = factor(x, eps);
    for ((out, &x), &w) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * w;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn every_variant_equals_the_reference() {
        let mut random = Random::new(2);
        for (tokens, d) in [(1, 7), (3, 160), (17, 576), (33, 193)] {
            let x = random.floats(tokens * d, 2.0);
            let weight = random.floats(d, 1.0);
            let mut expected = vec![0.0; x.len()];
            reference(&x, &weight, 1e-5, &mut expected);
            let mut out = vec![f32::NAN; x.len()];
            forward(&x, &weight, 1e-5, &mut out);
            assert_eq!(out, expected, "forward");
            for isa in Isa::available() {
                out.fill(f32::NAN);
                part(isa, &x, &weight, 1e-5, &mut out);
                assert_eq!(out, expected, "{isa}");
                let mut here = x.clone();
                for token in here.chunks_exact_mut(d) {
                    part_in_place(isa, token, &weight, 1e-5);
                }
                assert_eq!(here, out, "{isa}");
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        let mut out = [1.0; 8];
        forward(&[0.0; 8], &[1.0; 8], 1e-5, &mut out);
        assert_eq!(out, [0.0; 8]);
    }
}
