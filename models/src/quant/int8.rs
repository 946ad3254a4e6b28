//! INT8 weights: `w = scale * q`, one f16 scale a group along K.
//!
//! ```text
//! quants  (n, k)               i8, row-major
//! scales  (n, ceil(k/group))   f16;  group == k: one scale a row;  group == 32: GGUF Q8_0 as it is
//! ```

use half::f16;

use super::{Shared, check_finite, check_len, check_shape};
use crate::Error;

const FORMAT: &str = "INT8";

/// Largest level that encoding uses, so that the range is symmetric.
const MAX_LEVEL: f32 = 127.0;

/// An `(rows, cols)` matrix in INT8.
#[derive(Debug, Clone, PartialEq)]
pub struct Int8Matrix {
    /// N.
    pub rows: usize,
    /// K, a multiple of 32.
    pub cols: usize,
    /// Weights that share a scale: a multiple of 32, at most `cols`.
    pub group: usize,
    /// `(rows, cols)`.
    pub quants: Shared<i8>,
    /// `(rows, ceil(cols/group))`.
    pub scales: Shared<f16>,
}

impl Int8Matrix {
    /// Puts a matrix together from its parts.
    ///
    /// # Errors
    /// A group that is zero, no multiple of 32 or more than `cols`, `cols` that is zero or no
    /// multiple of 32, parts of the wrong length, or a scale that is not finite.
    pub fn new(
        rows: usize,
        cols: usize,
        group: usize,
        quants: Vec<i8>,
        scales: Vec<f16>,
    ) -> Result<Self, Error> {
        Self::from_shared(rows, cols, group, quants.into(), scales.into())
    }

    /// [`Int8Matrix::new`] from parts that may lie in a file.
    ///
    /// # Errors
    /// As [`Int8Matrix::new`].
    pub fn from_shared(
        rows: usize,
        cols: usize,
        group: usize,
        quants: Shared<i8>,
        scales: Shared<f16>,
    ) -> Result<Self, Error> {
        let groups = check_group(rows, cols, group)?;
        check_len(FORMAT, "quants", quants.len(), rows * cols)?;
        check_len(FORMAT, "scales", scales.len(), groups)?;
        check_finite(FORMAT, "scale", &scales)?;
        Ok(Int8Matrix {
            rows,
            cols,
            group,
            quants,
            scales,
        })
    }

    /// Rounds `(rows, cols)` float weights to the nearest of 255 levels, -127 to 127, spanning the
    /// largest magnitude of their group.
    ///
    /// # Errors
    /// As [`Int8Matrix::new`]; also weights of the wrong count, not finite, or beyond f16.
    pub fn encode(rows: usize, cols: usize, group: usize, weights: &[f32]) -> Result<Self, Error> {
        let groups = check_group(rows, cols, group)?;
        check_len(FORMAT, "weights", weights.len(), rows * cols)?;
        let mut quants = vec![0i8; rows * cols];
        let mut scales = Vec::with_capacity(groups);
        for (row, levels) in weights
            .chunks_exact(cols)
            .zip(quants.chunks_exact_mut(cols))
        {
            for (chunk, levels) in row.chunks(group).zip(levels.chunks_mut(group)) {
                scales.push(encode_group(chunk, levels));
            }
        }
        // A weight that is not finite, or too large for f16, shows in its scale.
        Self::new(rows, cols, group, quants, scales)
    }

    /// Groups a row.
    pub fn groups_per_row(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    /// `(cols,)` levels of row `i`.
    pub fn row_quants(&self, i: usize) -> &[i8] {
        &self.quants[i * self.cols..(i + 1) * self.cols]
    }

    /// `(ceil(cols/group),)` scales of row `i`.
    pub fn row_scales(&self, i: usize) -> &[f16] {
        let groups = self.groups_per_row();
        &self.scales[i * groups..(i + 1) * groups]
    }

    /// Writes row `i` as floats to `out`, which holds `cols` of them.
    pub fn dequantize_row(&self, i: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "a row has `cols` weights");
        let groups = self
            .row_quants(i)
            .chunks(self.group)
            .zip(out.chunks_mut(self.group));
        for ((levels, out), scale) in groups.zip(self.row_scales(i)) {
            let scale = scale.to_f32();
            for (out, level) in out.iter_mut().zip(levels) {
                *out = scale * f32::from(*level);
            }
        }
    }

    /// Bytes that reading the whole matrix moves.
    pub fn bytes(&self) -> u64 {
        (self.quants.len() + self.scales.len() * size_of::<f16>()) as u64
    }
}

/// Checks the shape and gives the number of groups of the whole matrix.
fn check_group(rows: usize, cols: usize, group: usize) -> Result<usize, Error> {
    if group == 0 || !group.is_multiple_of(32) || group > cols {
        return Err(Error::Matrix {
            format: FORMAT,
            reason: format!("group is {group}, it is a multiple of 32 up to the {cols} columns"),
        });
    }
    check_shape(FORMAT, rows, cols, group)
}

/// Scale of a group; fills in the levels. NaN or infinity where a weight is.
pub(crate) fn encode_group(weights: &[f32], levels: &mut [i8]) -> f16 {
    let extreme = weights.iter().fold(0.0f32, |m, w| m.max(w.abs()));
    let sum: f32 = weights.iter().sum();
    // A NaN never wins a comparison; it survives in the sum.
    if !sum.is_finite() {
        return f16::NAN;
    }
    let mut scale = f16::from_f32(extreme / MAX_LEVEL);
    // Among the subnormals f16 is so coarse that rounding down would cut off the extreme.
    if extreme > scale.to_f32() * (MAX_LEVEL + 0.5) {
        scale = f16::from_bits(scale.to_bits() + 1);
    }
    let inverse = if scale == f16::ZERO {
        0.0
    } else {
        1.0 / scale.to_f32()
    };
    for (level, w) in levels.iter_mut().zip(weights) {
        *level = (w * inverse).round().clamp(-MAX_LEVEL, MAX_LEVEL) as i8;
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_apply_to_their_columns() {
        let quants: Vec<i8> = (0..96).map(|i| i as i8 - 40).collect();
        let scales = [0.5, 2.0].map(f16::from_f32).to_vec();
        let matrix = Int8Matrix::new(1, 96, 64, quants, scales).unwrap();
        let mut row = [0f32; 96];
        matrix.dequantize_row(0, &mut row);
        assert_eq!(
            [row[0], row[63], row[64], row[95]],
            [-20.0, 11.5, 48.0, 110.0]
        );
        assert_eq!(matrix.bytes(), 96 + 4);
    }

    #[test]
    fn encode_rounds_to_the_nearest_level() {
        let weights: Vec<f32> = (0..2 * 160)
            .map(|i| (i as f32 * 0.73).sin() * 0.02)
            .collect();
        for group in [32, 64, 128, 160] {
            let matrix = Int8Matrix::encode(2, 160, group, &weights).unwrap();
            let mut row = [0f32; 160];
            for i in 0..2 {
                matrix.dequantize_row(i, &mut row);
                for (c, (got, want)) in row.iter().zip(&weights[i * 160..]).enumerate() {
                    let scale = matrix.row_scales(i)[c / group].to_f32();
                    // Half a level, and the rounding of the scale at the extreme.
                    assert!(
                        (got - want).abs() <= 0.57 * scale,
                        "{group} {c}: {got} {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn weights_too_small_for_a_normal_scale_keep_their_size() {
        for extreme in [1e-5f32, 4e-6, 1e-6] {
            let mut weights = [0f32; 32];
            weights[5] = extreme;
            weights[6] = -extreme;
            let matrix = Int8Matrix::encode(1, 32, 32, &weights).unwrap();
            let mut row = [0f32; 32];
            matrix.dequantize_row(0, &mut row);
            let error = (row[5] - extreme).abs();
            assert!(
                error <= matrix.scales[0].to_f32() / 2.0,
                "{extreme}: {}",
                row[5]
            );
            assert_eq!(row[5], -row[6]);
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let error = |matrix: Result<Int8Matrix, Error>| matrix.unwrap_err().to_string();
        let part = |n: usize| vec![0i8; n];
        let one = vec![f16::ONE];
        assert!(error(Int8Matrix::new(1, 32, 0, part(32), one.clone())).contains("group"));
        assert!(error(Int8Matrix::new(1, 32, 64, part(32), one.clone())).contains("group"));
        assert!(error(Int8Matrix::new(1, 33, 32, part(33), one.clone())).contains("33"));
        assert!(error(Int8Matrix::new(1, 32, 32, part(31), one)).contains("quants"));
        assert!(error(Int8Matrix::new(1, 64, 32, part(64), vec![f16::ONE])).contains("scales"));
        let infinite = vec![f16::INFINITY];
        assert!(error(Int8Matrix::new(1, 32, 32, part(32), infinite)).contains("inf"));
        for bad in [f32::NAN, f32::NEG_INFINITY, 1e8] {
            let mut weights = [0.5f32; 32];
            weights[30] = bad;
            assert!(Int8Matrix::encode(1, 32, 32, &weights).is_err(), "{bad}");
        }
    }
}
