//! INT4 weights, grouped along K.
//!
//! ```text
//! quants  (n, k/2)  bytes, row-major; every 32 weights are one 16-byte cell:
//!
//!   byte j of a cell:   | hi nibble: weight 16+j | lo nibble: weight j |   j in 0..16
//!
//! scales  (n, ceil(k/group)) f16
//! mins    (n, ceil(k/group)) f16, optional
//!
//! with mins:     w = scale * q + min          q in 0..=15   (GGUF Q4_1, bit for bit)
//! without mins:  w = scale * (q - 8)                        (GGUF Q4_0, bit for bit)
//! with zeros:    w = scale * (q - zero)       mins hold the zeros, 0 to 16  (AWQ, GPTQ, bit for bit)
//! ```
//!
//! Zeros are a form of their own because minima cannot stand in for them: `scale * zero` takes up to 15
//! bits, f16 has 11, and a rounded minimum moves a whole group by up to 2^-12 of it, 0.4% of a step
//! between two levels. In f32 the product is exact, and so is every weight (11 and 4 bits), so kernels
//! make the minimum `-scale * zero` of a group in f32 and go on as with minima.
//!
//! The cell is GGUF's own nibble order, so an import only separates the scales from the cells,
//! and both a byte shuffle on a CPU and `lop3` on a GPU split it without crossing lanes.
//! `k` is a multiple of 32; the last group of a row may be short.

use half::f16;
use serde::{Deserialize, Serialize};

use super::{Int4Fit, Shared, check_finite, check_len, check_shape};
use crate::Error;

/// Weights a 16-byte cell.
pub const CELL_WEIGHTS: usize = 32;
/// Bytes a cell.
pub const CELL_BYTES: usize = 16;
const _: () = assert!(CELL_WEIGHTS == 2 * CELL_BYTES);

const FORMAT: &str = "INT4";

/// An `(rows, cols)` matrix in INT4.
#[derive(Debug, Clone, PartialEq)]
pub struct Int4Matrix {
    /// N.
    pub rows: usize,
    /// K, a multiple of 32.
    pub cols: usize,
    /// Weights that share a scale: 32, 64 or 128.
    pub group: usize,
    /// `(rows, cols/2)` cells.
    pub quants: Shared<u8>,
    /// `(rows, ceil(cols/group))`.
    pub scales: Shared<f16>,
    /// `(rows, ceil(cols/group))`, absent for the symmetric form.
    pub mins: Option<Shared<f16>>,
    /// The minima are zeros: levels that stand for 0.
    pub zeros: bool,
}

/// Which values the 16 levels of a group stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Int4Form {
    /// `w = scale * (q - 8)`.
    Symmetric,
    /// `w = scale * q + min`.
    Asymmetric,
}

/// Greatest zero: GPTQ stores one less in four bits.
pub const MAX_ZERO: f32 = 16.0;

impl Int4Matrix {
    /// Puts a matrix together from its parts.
    ///
    /// # Errors
    /// A group that is not 32, 64 or 128, `cols` that is zero or no multiple of 32, parts of the
    /// wrong length, or a scale or minimum that is not finite.
    pub fn new(
        rows: usize,
        cols: usize,
        group: usize,
        quants: Vec<u8>,
        scales: Vec<f16>,
        mins: Option<Vec<f16>>,
    ) -> Result<Self, Error> {
        let mins = mins.map(Into::into);
        Self::from_shared(rows, cols, group, quants.into(), scales.into(), mins)
    }

    /// [`Int4Matrix::new`] from parts that may lie in a file.
    ///
    /// # Errors
    /// As [`Int4Matrix::new`].
    pub fn from_shared(
        rows: usize,
        cols: usize,
        group: usize,
        quants: Shared<u8>,
        scales: Shared<f16>,
        mins: Option<Shared<f16>>,
    ) -> Result<Self, Error> {
        let groups = check_group(rows, cols, group)?;
        check_len(FORMAT, "quants", quants.len(), rows * cols / 2)?;
        check_len(FORMAT, "scales", scales.len(), groups)?;
        check_finite(FORMAT, "scale", &scales)?;
        if let Some(mins) = &mins {
            check_len(FORMAT, "mins", mins.len(), groups)?;
            check_finite(FORMAT, "minimum", mins)?;
        }
        Ok(Int4Matrix {
            rows,
            cols,
            group,
            quants,
            scales,
            mins,
            zeros: false,
        })
    }

    /// The same matrix with its minima taken as zeros.
    ///
    /// # Errors
    /// A matrix without minima, or one that is no whole number between 0 and [`MAX_ZERO`].
    pub fn with_zeros(mut self) -> Result<Self, Error> {
        check_zeros(FORMAT, self.mins.as_deref(), self.scales.len())?;
        self.zeros = true;
        Ok(self)
    }

    /// Rounds `(rows, cols)` float weights to the nearest of the 16 levels that span the range of
    /// their group: [`Int4Fit::range`].
    ///
    /// # Errors
    /// As [`Int4Matrix::new`]; also weights of the wrong count, not finite, or beyond f16.
    pub fn encode(
        rows: usize,
        cols: usize,
        group: usize,
        form: Int4Form,
        weights: &[f32],
    ) -> Result<Self, Error> {
        Self::encode_with(rows, cols, group, weights, |_, weights| {
            Int4Fit::range(weights, form)
        })
    }

    /// Rounds `(rows, cols)` float weights to the nearest of the 16 levels that `fit` gives for the
    /// column where a group begins and its weights.
    ///
    /// # Errors
    /// As [`Int4Matrix::encode`].
    pub fn encode_with(
        rows: usize,
        cols: usize,
        group: usize,
        weights: &[f32],
        mut fit: impl FnMut(usize, &[f32]) -> Int4Fit,
    ) -> Result<Self, Error> {
        check_group(rows, cols, group)?;
        check_len(FORMAT, "weights", weights.len(), rows * cols)?;
        let mut levels = vec![0u8; rows * cols];
        let mut fits = Vec::with_capacity(rows * cols.div_ceil(group));
        for (row, levels) in weights
            .chunks_exact(cols)
            .zip(levels.chunks_exact_mut(cols))
        {
            let groups = row.chunks(group).zip(levels.chunks_mut(group));
            for (i, (weights, levels)) in groups.enumerate() {
                let fit = fit(i * group, weights);
                for (level, weight) in levels.iter_mut().zip(weights) {
                    *level = fit.level(*weight);
                }
                fits.push(fit);
            }
        }
        Self::from_levels(rows, cols, group, &levels, &fits)
    }

    /// Puts a matrix together from `(rows, cols)` levels and `(rows, ceil(cols/group))` fits of one
    /// form.
    ///
    /// # Errors
    /// As [`Int4Matrix::new`]. A weight that was not finite, or too large for f16, shows in its fit.
    pub fn from_levels(
        rows: usize,
        cols: usize,
        group: usize,
        levels: &[u8],
        fits: &[Int4Fit],
    ) -> Result<Self, Error> {
        check_len(FORMAT, "levels", levels.len(), rows * cols)?;
        let mut quants = vec![0u8; rows * cols / 2];
        pack(levels, &mut quants);
        let scales = fits.iter().map(|fit| fit.scale).collect();
        let mins: Vec<f16> = fits.iter().filter_map(|fit| fit.min).collect();
        let mins = (!mins.is_empty()).then_some(mins);
        Self::new(rows, cols, group, quants, scales, mins)
    }

    /// Groups a row.
    pub fn groups_per_row(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    /// `(cols/2,)` cells of row `i`.
    pub fn row_quants(&self, i: usize) -> &[u8] {
        &self.quants[i * self.cols / 2..(i + 1) * self.cols / 2]
    }

    /// `(ceil(cols/group),)` scales of row `i`.
    pub fn row_scales(&self, i: usize) -> &[f16] {
        let groups = self.groups_per_row();
        &self.scales[i * groups..(i + 1) * groups]
    }

    /// `(ceil(cols/group),)` minima of row `i`; `None` in the symmetric form.
    pub fn row_mins(&self, i: usize) -> Option<&[f16]> {
        let groups = self.groups_per_row();
        self.mins
            .as_ref()
            .map(|mins| &mins[i * groups..(i + 1) * groups])
    }

    /// Writes row `i` as floats to `out`, which holds `cols` of them.
    pub fn dequantize_row(&self, i: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "a row has `cols` weights");
        let cells_per_group = self.group / CELL_WEIGHTS;
        let (scales, mins) = (self.row_scales(i), self.row_mins(i));
        let cells = self.row_quants(i).chunks_exact(CELL_BYTES);
        for (c, (cell, out)) in cells.zip(out.chunks_exact_mut(CELL_WEIGHTS)).enumerate() {
            let g = c / cells_per_group;
            let scale = scales[g].to_f32();
            let (offset, min) = match mins {
                Some(zeros) if self.zeros => (zeros[g].to_f32(), 0.0),
                Some(mins) => (0.0, mins[g].to_f32()),
                None => (8.0, 0.0),
            };
            let (low, high) = out.split_at_mut(CELL_BYTES);
            for ((byte, low), high) in cell.iter().zip(low).zip(high) {
                *low = scale * (f32::from(byte & 15) - offset) + min;
                *high = scale * (f32::from(byte >> 4) - offset) + min;
            }
        }
    }

    /// Bytes that reading the whole matrix moves.
    pub fn bytes(&self) -> u64 {
        let floats = self.scales.len() + self.mins.as_ref().map_or(0, |mins| mins.len());
        (self.quants.len() + floats * size_of::<f16>()) as u64
    }
}

/// Checks that minima are zeros: as many as scales, each a level.
pub(super) fn check_zeros(
    format: &'static str,
    mins: Option<&[f16]>,
    scales: usize,
) -> Result<(), Error> {
    let mins = mins.unwrap_or_default();
    let fits = |zero: f32| zero.fract() == 0.0 && (0.0..=MAX_ZERO).contains(&zero);
    if let Some(i) = mins.iter().position(|zero| !fits(zero.to_f32())) {
        return Err(Error::Matrix {
            format,
            reason: format!("zero {i} is {}, not a level of 0 to {MAX_ZERO}", mins[i]),
        });
    }
    check_len(format, "zeros", mins.len(), scales)
}

/// Checks the shape and gives the number of groups of the whole matrix.
pub(super) fn check_group(rows: usize, cols: usize, group: usize) -> Result<usize, Error> {
    if !matches!(group, 32 | 64 | 128) {
        return Err(Error::Matrix {
            format: FORMAT,
            reason: format!("group is {group}, it is 32, 64 or 128"),
        });
    }
    check_shape(FORMAT, rows, cols, group)
}

/// Packs levels into cells.
fn pack(levels: &[u8], cells: &mut [u8]) {
    for (levels, cell) in levels
        .chunks_exact(CELL_WEIGHTS)
        .zip(cells.chunks_exact_mut(CELL_BYTES))
    {
        let (low, high) = levels.split_at(CELL_BYTES);
        for ((byte, low), high) in cell.iter_mut().zip(low).zip(high) {
            *byte = low | high << 4;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row of `cols` weights that no scale divides evenly.
    fn wave(cols: usize) -> Vec<f32> {
        (0..cols)
            .map(|i| (i as f32 * 0.37).sin() * (1.0 + i as f32 * 0.01))
            .collect()
    }

    #[test]
    fn cell_order_and_both_forms() {
        // Cell bytes 0x10, 0x32, ...: low nibbles are weights 0.., high nibbles weights 16...
        let mut quants = vec![0u8; 16];
        quants[0] = 0x1f;
        quants[15] = 0xa2;
        let half = f16::from_f32(0.5);
        let mut row = [0f32; 32];

        let symmetric = Int4Matrix::new(1, 32, 32, quants.clone(), vec![half], None).unwrap();
        symmetric.dequantize_row(0, &mut row);
        assert_eq!(
            [row[0], row[16], row[15], row[31], row[1]],
            [3.5, -3.5, -3.0, 1.0, -4.0]
        );
        assert_eq!(symmetric.bytes(), 18);

        let mins = Some(vec![f16::from_f32(-2.0)]);
        let asymmetric = Int4Matrix::new(1, 32, 32, quants, vec![half], mins).unwrap();
        asymmetric.dequantize_row(0, &mut row);
        assert_eq!(
            [row[0], row[16], row[15], row[31], row[1]],
            [5.5, -1.5, -1.0, 3.0, -2.0]
        );
        assert_eq!(asymmetric.bytes(), 20);
    }

    #[test]
    fn zeros_are_exact_where_minima_would_round() {
        let scale = f16::from_bits(0x2fff);
        let quants = vec![0xf0; 16];
        let make = |zero: f32| {
            let mins = Some(vec![f16::from_f32(zero)]);
            Int4Matrix::new(1, 32, 32, quants.clone(), vec![scale], mins)
                .unwrap()
                .with_zeros()
        };
        let matrix = make(11.0).unwrap();
        let mut row = [0f32; 32];
        matrix.dequantize_row(0, &mut row);
        let scale = scale.to_f32();
        assert_eq!([row[0], row[31]], [-11.0 * scale, 4.0 * scale]);
        assert_ne!(f16::from_f32(-11.0 * scale).to_f32(), -11.0 * scale);
        for bad in [-1.0, 0.5, 17.0] {
            assert!(make(bad).unwrap_err().to_string().contains("zero 0"));
        }
    }

    #[test]
    fn encode_rounds_to_the_nearest_level() {
        // 160 columns: at group 64 and 128 the last group is short.
        for (group, form) in [32, 64, 128]
            .into_iter()
            .flat_map(|g| [(g, Int4Form::Symmetric), (g, Int4Form::Asymmetric)])
        {
            let weights: Vec<f32> =
                [wave(160), wave(160).iter().map(|w| -w * 3.0).collect()].concat();
            let matrix = Int4Matrix::encode(2, 160, group, form, &weights).unwrap();
            assert_eq!(matrix.groups_per_row(), 160usize.div_ceil(group));
            let mut row = vec![0f32; 160];
            for i in 0..2 {
                matrix.dequantize_row(i, &mut row);
                for (c, (got, want)) in row.iter().zip(&weights[i * 160..]).enumerate() {
                    let scale = matrix.row_scales(i)[c / group].to_f32().abs();
                    // The symmetric form has no level for the side opposite to its extreme.
                    let bound = if form == Int4Form::Symmetric {
                        1.0
                    } else {
                        0.51
                    };
                    assert!(
                        (got - want).abs() <= bound * scale,
                        "{group} {form:?} {c}: {got} {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn encoding_what_was_decoded_changes_nothing() {
        // Levels that reach both ends of the range make the scale recoverable.
        let quants: Vec<u8> = (0..32)
            .map(|j| if j % 16 == 0 { 0xf0 } else { j * 7 })
            .collect();
        let scales = vec![f16::from_f32(0.25), f16::from_f32(-0.125)];
        let matrix = Int4Matrix::new(1, 64, 32, quants, scales, None).unwrap();
        let mut row = vec![0f32; 64];
        matrix.dequantize_row(0, &mut row);
        assert_eq!(
            Int4Matrix::encode(1, 64, 32, Int4Form::Symmetric, &row).unwrap(),
            matrix
        );
    }

    #[test]
    fn flat_and_zero_groups_are_exact() {
        for value in [0.0f32, 1.5, -0.75] {
            let weights = [value; 32];
            let matrix = Int4Matrix::encode(1, 32, 32, Int4Form::Asymmetric, &weights).unwrap();
            let mut row = [9f32; 32];
            matrix.dequantize_row(0, &mut row);
            assert_eq!(row, weights);
        }
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let one = vec![f16::ONE];
        let error = |matrix: Result<Int4Matrix, Error>| matrix.unwrap_err().to_string();
        let part = |n: usize| vec![0u8; n];
        assert!(error(Int4Matrix::new(1, 32, 48, part(16), one.clone(), None)).contains("group"));
        assert!(error(Int4Matrix::new(1, 40, 32, part(20), one.clone(), None)).contains("40"));
        assert!(error(Int4Matrix::new(0, 32, 32, part(0), vec![], None)).contains("0 rows"));
        assert!(error(Int4Matrix::new(1, 32, 32, part(15), one.clone(), None)).contains("quants"));
        assert!(error(Int4Matrix::new(1, 32, 32, part(16), vec![], None)).contains("scales"));
        let none = Some(Vec::new());
        assert!(error(Int4Matrix::new(1, 32, 32, part(16), one.clone(), none)).contains("mins"));
        let nan = vec![f16::NAN];
        assert!(error(Int4Matrix::new(1, 32, 32, part(16), nan, None)).contains("NaN"));
        assert!(Int4Matrix::new(usize::MAX / 32, 64, 32, part(16), one, None).is_err());
        for bad in [f32::NAN, f32::INFINITY, 1e9] {
            let mut weights = [0.5f32; 32];
            weights[3] = bad;
            for form in [Int4Form::Symmetric, Int4Form::Asymmetric] {
                assert!(
                    Int4Matrix::encode(1, 32, 32, form, &weights).is_err(),
                    "{bad} {form:?}"
                );
            }
        }
    }
}
