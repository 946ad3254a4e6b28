//! Ternary weights: `w = scale * (code - 1)`, two bits a weight, grouped along K.
//!
//! ```text
//! quants  (n, k/4)  bytes, row-major; every 32 weights are one 8-byte cell:
//!
//!   byte j of a cell:   | weight 24+j | weight 16+j | weight 8+j | weight j |   j in 0..8, high bits first
//!
//! scales  (n, ceil(k/group))  f32: BitNet's one scale a tensor is no f16 in general
//! ```
//!
//! Codes are 0, 1, 2; code 3 (weight 2) is kept as it is where a file has it. One shift and one mask
//! give eight weights of a cell in order, on a 64-bit word as on a vector of cells.

use half::f16;

use super::{Int4Matrix, Int4Shape, Shared, check_len, check_shape, int4};
use crate::Error;

/// Weights a cell.
pub const CELL_WEIGHTS: usize = 32;
/// Bytes a cell.
pub const CELL_BYTES: usize = 8;
const _: () = assert!(CELL_WEIGHTS == 4 * CELL_BYTES);

const FORMAT: &str = "ternary";

/// An `(rows, cols)` matrix in ternary form.
#[derive(Debug, Clone, PartialEq)]
pub struct TernaryMatrix {
    /// N.
    pub rows: usize,
    /// K, a multiple of 32.
    pub cols: usize,
    /// Weights that share a scale: a multiple of 32, at most `cols`.
    pub group: usize,
    /// `(rows, cols/4)` cells.
    pub quants: Shared<u8>,
    /// `(rows, ceil(cols/group))`.
    pub scales: Shared<f32>,
}

impl TernaryMatrix {
    /// Puts a matrix together from its parts.
    ///
    /// # Errors
    /// A group that is zero, no multiple of 32 or more than `cols`, `cols` that is zero or no multiple
    /// of 32, parts of the wrong length, or a scale that is not finite.
    pub fn new(
        rows: usize,
        cols: usize,
        group: usize,
        quants: impl Into<Shared<u8>>,
        scales: impl Into<Shared<f32>>,
    ) -> Result<Self, Error> {
        let (quants, scales) = (quants.into(), scales.into());
        let fail = |reason| {
            Err(Error::Matrix {
                format: FORMAT,
                reason,
            })
        };
        if group == 0 || !group.is_multiple_of(CELL_WEIGHTS) || group > cols {
            return fail(format!(
                "group is {group}, it is a multiple of 32 up to the {cols} columns"
            ));
        }
        let groups = check_shape(FORMAT, rows, cols, group)?;
        check_len(FORMAT, "quants", quants.len(), rows * cols / 4)?;
        check_len(FORMAT, "scales", scales.len(), groups)?;
        if let Some(i) = scales.iter().position(|v| !v.is_finite()) {
            return fail(format!("scale {i} is {}", scales[i]));
        }
        Ok(TernaryMatrix {
            rows,
            cols,
            group,
            quants,
            scales,
        })
    }

    /// Rounds `(rows, cols)` float weights to -1, 0 and 1 times a scale of their group: the mean
    /// magnitude, as BitNet's training does (<https://arxiv.org/abs/2402.17764>). Weights that are
    /// ternary already are kept.
    ///
    /// # Errors
    /// As [`TernaryMatrix::new`]; also weights of the wrong count or not finite.
    pub fn encode(rows: usize, cols: usize, group: usize, weights: &[f32]) -> Result<Self, Error> {
        check_len(FORMAT, "weights", weights.len(), rows * cols)?;
        let mut codes = vec![0u8; rows * cols];
        let mut scales = Vec::with_capacity(rows * cols.div_ceil(group.max(1)));
        for (row, codes) in weights.chunks_exact(cols).zip(codes.chunks_exact_mut(cols)) {
            let groups = row.chunks(group.max(1)).zip(codes.chunks_mut(group.max(1)));
            for (weights, codes) in groups {
                let scale = scale_of(weights);
                let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                for (code, weight) in codes.iter_mut().zip(weights) {
                    *code = ((weight * inverse).round().clamp(-1.0, 1.0) + 1.0) as u8;
                }
                scales.push(scale);
            }
        }
        let mut quants = vec![0u8; rows * cols / 4];
        pack(&codes, &mut quants);
        // A weight that is not finite shows in its scale.
        Self::new(rows, cols, group, quants, scales)
    }

    /// Groups a row.
    pub fn groups_per_row(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    /// `(cols/4,)` cells of row `i`.
    pub fn row_quants(&self, i: usize) -> &[u8] {
        &self.quants[i * self.cols / 4..(i + 1) * self.cols / 4]
    }

    /// `(ceil(cols/group),)` scales of row `i`.
    pub fn row_scales(&self, i: usize) -> &[f32] {
        let groups = self.groups_per_row();
        &self.scales[i * groups..(i + 1) * groups]
    }

    /// Writes row `i` as floats to `out`, which holds `cols` of them.
    pub fn dequantize_row(&self, i: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "a row has `cols` weights");
        let (scales, cells_per_group) = (self.row_scales(i), self.group / CELL_WEIGHTS);
        let cells = self.row_quants(i).as_chunks::<CELL_BYTES>().0;
        let outs = out.as_chunks_mut::<CELL_WEIGHTS>().0;
        for (c, (cell, out)) in cells.iter().zip(outs).enumerate() {
            decode_cell(cell, scales[c / cells_per_group], out);
        }
    }

    /// The same matrix in symmetric INT4, level 8 being 0, for kernels that have no two bits. Exact where
    /// f16 holds the scales; else they are rounded to it, all weights of a group by the same 2^-12.
    ///
    /// # Errors
    /// A scale beyond f16.
    pub fn to_int4(&self) -> Result<Int4Matrix, Error> {
        self.widened(|scale| scale)
    }

    /// [`TernaryMatrix::to_int4`] of the levels themselves, all scales being 1, where there is one scale a row:
    /// exact, and a product with it is multiplied by that.
    ///
    /// # Errors
    /// More scales than rows.
    pub fn levels_to_int4(&self) -> Result<Int4Matrix, Error> {
        check_len(FORMAT, "scales", self.scales.len(), self.rows)?;
        self.widened(|_| 1.0)
    }

    /// Shape and form of [`TernaryMatrix::to_int4`].
    pub fn int4(&self) -> Int4Shape {
        let group = match self.groups_per_row() {
            1 => 128,
            _ => [128, 64]
                .into_iter()
                .find(|unit| self.group.is_multiple_of(*unit))
                .unwrap_or(CELL_WEIGHTS),
        };
        Int4Shape {
            rows: self.rows,
            cols: self.cols,
            group,
            has_mins: false,
            zeros: false,
        }
    }

    fn widened(&self, scale_of: impl Fn(f32) -> f32 + Copy) -> Result<Int4Matrix, Error> {
        let group = self.int4().group;
        let mut quants = vec![0u8; self.rows * self.cols / 2];
        let cells = self.quants.as_chunks::<CELL_BYTES>().0;
        let wide = quants.as_chunks_mut::<{ int4::CELL_BYTES }>().0;
        for (cell, wide) in cells.iter().zip(wide) {
            let level = |k: usize| 7 + (cell[k % CELL_BYTES] >> (2 * (k / CELL_BYTES)) & 3);
            for (j, byte) in wide.iter_mut().enumerate() {
                *byte = level(j) | level(j + int4::CELL_BYTES) << 4;
            }
        }
        let scales = (0..self.rows)
            .flat_map(|i| {
                let scales = self.row_scales(i);
                (0..self.cols.div_ceil(group))
                    .map(move |g| f16::from_f32(scale_of(scales[g * group / self.group])))
            })
            .collect();
        Int4Matrix::new(self.rows, self.cols, group, quants, scales, None)
    }

    /// Bytes that reading the whole matrix moves.
    pub fn bytes(&self) -> u64 {
        (self.quants.len() + size_of_val(&*self.scales)) as u64
    }
}

/// The weights of one cell.
#[inline(always)]
pub fn decode_cell(cell: &[u8; CELL_BYTES], scale: f32, out: &mut [f32; CELL_WEIGHTS]) {
    for (p, out) in out.as_chunks_mut::<CELL_BYTES>().0.iter_mut().enumerate() {
        for (byte, out) in cell.iter().zip(out) {
            *out = scale * (f32::from(byte >> (2 * p) & 3) - 1.0);
        }
    }
}

/// Packs codes 0 to 3 into cells; four codes a byte.
pub(crate) fn pack(codes: &[u8], cells: &mut [u8]) {
    let codes = codes.as_chunks::<CELL_WEIGHTS>().0;
    for (codes, cell) in codes.iter().zip(cells.as_chunks_mut::<CELL_BYTES>().0) {
        for (j, byte) in cell.iter_mut().enumerate() {
            *byte = (0..4).fold(0, |byte, p| {
                byte | (codes[p * CELL_BYTES + j] & 3) << (2 * p)
            });
        }
    }
}

/// Scale of a group: the only magnitude beside 0 if there is but one, else the mean magnitude.
fn scale_of(weights: &[f32]) -> f32 {
    let largest = weights.iter().fold(0.0f32, |m, w| m.max(w.abs()));
    let ternary = weights.iter().all(|w| *w == 0.0 || w.abs() == largest);
    let sum: f32 = weights.iter().map(|w| w.abs()).sum();
    // A NaN never wins a comparison; it survives in the sum.
    match ternary && sum.is_finite() {
        true => largest,
        false => sum / weights.len() as f32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ternary_weights_are_kept_and_others_rounded_to_their_mean_magnitude() {
        let kept: Vec<f32> = (0..96).map(|i| [-0.3, 0.0, 0.3][i * 7 % 3]).collect();
        let matrix = TernaryMatrix::encode(1, 96, 64, &kept).unwrap();
        let mut row = [0f32; 96];
        matrix.dequantize_row(0, &mut row);
        assert_eq!(row[..], kept[..]);

        let mut weights = [0.5f32; 32];
        weights[1] = -2.5;
        weights[2] = 0.1;
        let matrix = TernaryMatrix::encode(1, 32, 32, &weights).unwrap();
        let mean = (30.0 * 0.5 + 2.5 + 0.1) / 32.0;
        matrix.dequantize_row(0, &mut row[..32]);
        for (got, want) in row.iter().zip([mean, -mean, 0.0, mean]) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
        weights[4] = f32::NAN;
        assert!(TernaryMatrix::encode(1, 32, 32, &weights).is_err());
        assert!(TernaryMatrix::encode(1, 32, 0, &[0.5; 32]).is_err());
    }

    #[test]
    fn what_was_packed_comes_out_in_order() {
        let codes: Vec<u8> = (0..2 * 96).map(|i| (i * 7 / 3 % 4) as u8).collect();
        let mut quants = vec![0; codes.len() / 4];
        pack(&codes, &mut quants);
        let scales = vec![0.5, 3.0, -1.0, 2.0];
        let matrix = TernaryMatrix::new(2, 96, 64, quants, scales.clone()).unwrap();
        let mut row = [0f32; 96];
        for i in 0..2 {
            matrix.dequantize_row(i, &mut row);
            for (k, w) in row.iter().enumerate() {
                let want = scales[2 * i + k / 64] * (f32::from(codes[96 * i + k]) - 1.0);
                assert_eq!(*w, want, "{i} {k}");
            }
        }
        assert_eq!(matrix.bytes(), 48 + 16);
    }

    #[test]
    fn in_four_bits_the_weights_are_the_same() {
        for (cols, group) in [(96, 32), (96, 96), (256, 256), (320, 64)] {
            let codes: Vec<u8> = (0..2 * cols).map(|i| (i * 5 / 3 % 4) as u8).collect();
            let mut quants = vec![0; codes.len() / 4];
            pack(&codes, &mut quants);
            let groups = 2 * cols / group;
            let scales: Vec<f32> = (1..=groups).map(|g| g as f32 * 0.25).collect();
            let matrix = TernaryMatrix::new(2, cols, group, quants, scales).unwrap();
            let wide = matrix.to_int4().unwrap();
            let (mut want, mut got) = (vec![0f32; cols], vec![9f32; cols]);
            for i in 0..2 {
                matrix.dequantize_row(i, &mut want);
                wide.dequantize_row(i, &mut got);
                assert_eq!(got, want, "{cols} {group}");
            }
            assert_eq!(wide.group, matrix.int4().group);
            let Ok(levels) = matrix.levels_to_int4() else {
                assert!(group < cols);
                continue;
            };
            for i in 0..2 {
                matrix.dequantize_row(i, &mut want);
                levels.dequantize_row(i, &mut got);
                got.iter_mut().for_each(|w| *w *= matrix.scales[i]);
                assert_eq!(got, want, "{cols} {group}");
            }
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let error = |group, quants: usize, scale| {
            TernaryMatrix::new(1, 32, group, vec![0; quants], vec![scale])
                .unwrap_err()
                .to_string()
        };
        assert!(error(0, 8, 1.0).contains("group"));
        assert!(error(64, 8, 1.0).contains("group"));
        assert!(error(32, 7, 1.0).contains("quants"));
        assert!(error(32, 8, f32::NAN).contains("NaN"));
    }
}
