//! Weight formats: block layout, encode, decode. One file a format.

pub mod float16;
pub mod floats;
pub mod int4;
mod int4_fit;
pub mod int4_tiled;
pub mod int8;
mod shared;
pub mod ternary;

pub use float16::F16Matrix;
pub use int4::{Int4Form, Int4Matrix};
pub use int4_fit::Int4Fit;
pub use int4_tiled::{Int4Part, Int4Tiled};
pub use int8::Int8Matrix;
pub use shared::Shared;
pub use ternary::TernaryMatrix;

use half::f16;

use crate::Error;

/// A decoded tensor in the form that kernels read.
#[derive(Debug, Clone, PartialEq)]
pub enum Weight {
    /// 4-bit matrix.
    Int4(Int4Matrix),
    /// 4-bit matrix in the tiles of a GPU, as the quantiser's file holds it.
    Int4Tiled(Int4Part),
    /// 8-bit matrix.
    Int8(Int8Matrix),
    /// 2-bit matrix of -1, 0 and 1.
    Ternary(TernaryMatrix),
    /// Float matrix.
    F16(F16Matrix),
    /// Float vector.
    Vector(Vec<f32>),
}

/// Shape and form of a 4-bit matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Int4Shape {
    /// N.
    pub rows: usize,
    /// K.
    pub cols: usize,
    /// Weights that share a scale.
    pub group: usize,
    /// Whether it has minima, or zeros.
    pub has_mins: bool,
    /// Whether the minima are zeros.
    pub zeros: bool,
}

impl Int4Shape {
    /// Whether a matrix can share tiles with `other`.
    pub fn fits(self, other: Int4Shape) -> bool {
        self == Int4Shape {
            rows: self.rows,
            ..other
        }
    }
}

impl Weight {
    /// Bytes that reading the whole tensor moves.
    pub fn bytes(&self) -> u64 {
        match self {
            Weight::Int4(matrix) => matrix.bytes(),
            Weight::Int4Tiled(part) => part.bytes(),
            Weight::Int8(matrix) => matrix.bytes(),
            Weight::Ternary(matrix) => matrix.bytes(),
            Weight::F16(matrix) => matrix.bytes(),
            Weight::Vector(values) => size_of_val(values.as_slice()) as u64,
        }
    }

    /// Writes row `i` as floats to `out`, which holds as many as a row has.
    pub fn dequantize_row(&self, i: usize, out: &mut [f32]) {
        match self {
            Weight::Int4(matrix) => matrix.dequantize_row(i, out),
            Weight::Int4Tiled(part) => part.dequantize_row(i, out),
            Weight::Int8(matrix) => matrix.dequantize_row(i, out),
            Weight::Ternary(matrix) => matrix.dequantize_row(i, out),
            Weight::F16(matrix) => matrix.dequantize_row(i, out),
            Weight::Vector(values) => out.copy_from_slice(values),
        }
    }

    /// What 4-bit matrices have to agree in to share tiles; `None` for other weights.
    pub fn int4(&self) -> Option<Int4Shape> {
        let (rows, cols) = self.shape();
        let (group, has_mins, zeros) = match self {
            Weight::Int4(m) => (m.group, m.mins.is_some(), m.zeros),
            Weight::Int4Tiled(part) => {
                let tiles = part.tiles();
                (tiles.group, tiles.mins.is_some(), tiles.zeros)
            }
            _ => return None,
        };
        Some(Int4Shape {
            rows,
            cols,
            group,
            has_mins,
            zeros,
        })
    }

    /// `(rows, columns)`; a vector is one row.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Weight::Int4(m) => (m.rows, m.cols),
            Weight::Int4Tiled(part) => (part.rows(), part.tiles().cols),
            Weight::Int8(m) => (m.rows, m.cols),
            Weight::Ternary(m) => (m.rows, m.cols),
            Weight::F16(m) => (m.rows, m.cols),
            Weight::Vector(values) => (1, values.len()),
        }
    }
}

/// Checks dimensions and gives the number of groups of the whole matrix.
fn check_shape(
    format: &'static str,
    rows: usize,
    cols: usize,
    group: usize,
) -> Result<usize, Error> {
    if rows == 0 || cols == 0 || !cols.is_multiple_of(32) {
        return Err(Error::Matrix {
            format,
            reason: format!(
                "{rows} rows of {cols} columns: rows are 1 or more, columns a multiple of 32"
            ),
        });
    }
    if rows.checked_mul(cols).is_none() {
        return Err(Error::Matrix {
            format,
            reason: format!("{rows} x {cols} overflows"),
        });
    }
    Ok(rows * cols.div_ceil(group))
}

fn check_len(
    format: &'static str,
    part: &'static str,
    have: usize,
    need: usize,
) -> Result<(), Error> {
    if have == need {
        return Ok(());
    }
    Err(Error::Matrix {
        format,
        reason: format!("{part} hold {have} values, the shape needs {need}"),
    })
}

fn check_finite(format: &'static str, part: &'static str, values: &[f16]) -> Result<(), Error> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(i) => Err(Error::Matrix {
            format,
            reason: format!("{part} {i} is {}", values[i]),
        }),
    }
}
