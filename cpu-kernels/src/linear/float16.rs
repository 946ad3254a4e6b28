//! Linear layer with F16 weights and float activations: plain loops over whole rows, which become
//! floats once and then meet every token.

use std::ops::Range;

use half::f16;
use models::quant::F16Matrix;

use super::Matrix;
use crate::isa::{Isa, per_isa};

/// `y = w x + bias` for `x` `(t, k)` into `y` `(t, n)`; `bias` is `(n,)`.
///
/// # Panics
/// If a length does not fit the shape of `w`.
pub fn reference(w: &F16Matrix, bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    super::tokens(w.rows, w.cols, bias, x.len(), y.len());
    for (x, y) in x.chunks_exact(w.cols).zip(y.chunks_exact_mut(w.rows)) {
        for (row, y) in y.iter_mut().enumerate() {
            let mut sum = bias.map_or(0.0, |b| b[row] as f64);
            for (k, &x) in x.iter().enumerate() {
                sum += w.values[row * w.cols + k].to_f64() * x as f64;
            }
            *y = sum as f32;
        }
    }
}

/// As [`reference`], over rayon's current pool.
///
/// # Panics
/// If a length does not fit the shape of `w`.
pub fn forward(w: &F16Matrix, bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    super::forward(w, bias, x, y);
}

impl Matrix for F16Matrix {
    const ONE_TOKEN_KERNELS: bool = false;

    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn row_bytes(&self) -> usize {
        2 * self.cols
    }

    fn dequantize(&self, isa: Isa, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.cols,
            "linear: row {row} or its length"
        );
        widen(isa, self.row(row), out);
    }

    fn multiply(&self, _: Isa, _: Range<usize>, _: &[f32], _: &mut [f32]) {
        unreachable!("one token goes the way of several");
    }
}

per_isa!(fn widen(row: &[f16], out: &mut [f32]) = widen_body);

/// By the bits: a subnormal is what remains of `1.m` with its one taken away again. No NaN and no infinity
/// is in a matrix.
#[inline(always)]
fn widen_body<const FMA: bool>(row: &[f16], out: &mut [f32]) {
    // 2^-14, where f16's subnormals begin.
    const LEAST: u32 = (127 - 14) << 23;
    for (out, half) in out.iter_mut().zip(row) {
        let bits = u32::from(half.to_bits());
        let (sign, magnitude) = ((bits & 0x8000) << 16, (bits & 0x7fff) << 13);
        let normal = magnitude + (112 << 23);
        let small = f32::from_bits(LEAST | magnitude) - f32::from_bits(LEAST);
        let value = if magnitude < 1 << 23 {
            small.to_bits()
        } else {
            normal
        };
        *out = f32::from_bits(sign | value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_half_becomes_its_float() {
        let halves: Vec<f16> = (0..=u16::MAX)
            .map(f16::from_bits)
            .filter(|half| half.is_finite())
            .collect();
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; halves.len()];
            widen(isa, &halves, &mut out);
            for (half, out) in halves.iter().zip(out) {
                assert_eq!(out.to_bits(), half.to_f32().to_bits(), "{isa} {half:?}");
            }
        }
    }
}
