//! F16 weights, one after another, row-major: what float checkpoints are run with.
//!
//! F16 sources are kept bit for bit, BF16 ones wherever f16 has the range (6e-5 to 65,504 in full
//! precision, down to 6e-8 with fewer bits), F32 ones are rounded to 11 bits.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::{Shared, check_finite, check_len, check_shape};
use crate::Error;

const FORMAT: &str = "F16";

/// An `(rows, cols)` matrix in F16.
#[derive(Debug, Clone, PartialEq)]
pub struct F16Matrix {
    /// N.
    pub rows: usize,
    /// K, a multiple of 32.
    pub cols: usize,
    /// `(rows, cols)`.
    pub values: Shared<f16>,
}

impl F16Matrix {
    /// Puts a matrix together.
    ///
    /// # Errors
    /// `cols` that is zero or no multiple of 32, values of the wrong count or not finite.
    pub fn new(rows: usize, cols: usize, values: impl Into<Shared<f16>>) -> Result<Self, Error> {
        let values = values.into();
        let elems = check_shape(FORMAT, rows, cols, 1)?;
        check_len(FORMAT, "values", values.len(), elems)?;
        check_finite(FORMAT, "value", &values)?;
        Ok(F16Matrix { rows, cols, values })
    }

    /// `(cols,)` values of row `i`.
    pub fn row(&self, i: usize) -> &[f16] {
        &self.values[i * self.cols..(i + 1) * self.cols]
    }

    /// Writes row `i` as floats to `out`, which holds `cols` of them.
    pub fn dequantize_row(&self, i: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "a row has `cols` weights");
        self.row(i).convert_to_f32_slice(out);
    }

    /// Bytes that reading the whole matrix moves.
    pub fn bytes(&self) -> u64 {
        size_of_val(&*self.values) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_kept_and_parts_that_do_not_fit_are_refused() {
        let values: Vec<f16> = (0..64).map(|i| f16::from_f32(i as f32 - 7.5)).collect();
        let matrix = F16Matrix::new(2, 32, values.clone()).unwrap();
        let mut row = [0f32; 32];
        matrix.dequantize_row(1, &mut row);
        assert_eq!([row[0], row[31]], [24.5, 55.5]);
        assert_eq!(matrix.bytes(), 128);
        for (rows, cols, reason) in [(2, 16, "multiple"), (0, 32, "0 rows"), (1, 32, "values")] {
            let error = F16Matrix::new(rows, cols, values.clone()).unwrap_err();
            assert!(error.to_string().contains(reason), "{error}");
        }
        let error = F16Matrix::new(1, 32, vec![f16::INFINITY; 32]).unwrap_err();
        assert!(error.to_string().contains("inf"), "{error}");
    }
}
