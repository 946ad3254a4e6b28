//! RMSNorm: `out = x / sqrt(mean(x²) + eps) * weight`, a token at a time
//! (Zhang & Sennrich 2019, <https://arxiv.org/abs/1910.07467>).

/// Normalises each token of `x` `(t, d)` with `weight` `(d,)` into `out` `(t, d)`.
///
/// # Panics
/// If `x` is not a whole number of tokens or `out` is of another length.
pub fn reference(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let d = weight.len();
    assert_eq!(x.len(), out.len(), "rmsnorm: lengths of x and out");
    assert!(d > 0 && x.len().is_multiple_of(d), "rmsnorm: x is (t, d)");
    for (x, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
        let mean_square = x.iter().map(|&v| v as f64 * v as f64).sum::<f64>() / d as f64;
        let factor = 1.0 / (mean_square + eps as f64).sqrt();
        for ((out, &x), &w) in out.iter_mut().zip(x).zip(weight) {
            *out = (x as f64 * factor * w as f64) as f32;
        }
    }
}
