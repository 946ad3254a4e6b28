//! The layout: from the matrices of a file, and back.

use std::ops::Range;

use crate::pages::{Line, Lines};
use half::f16;
use models::quant::int4::{CELL_BYTES, CELL_WEIGHTS};
use models::quant::{F16Matrix, Int4Matrix, Int8Matrix, TernaryMatrix, Weight, ternary};

use super::ternary::Form;
use super::{CHUNK_COLS, FIVES_COLS, LINE_BYTES, STEP_COLS, STEPS, TILE_ROWS};

/// Bits of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bits {
    Two,
    /// Two, a column of a step after the other: what tables are looked up by.
    Pairs,
    /// Five weights a byte.
    Fives,
    Four,
    Eight,
    /// Floats; no scales.
    F16,
}

impl Bits {
    /// Lines of a chunk: as many as a weight has bits. Fives know no chunks.
    pub(super) fn lines(self) -> usize {
        match self {
            Bits::Two | Bits::Pairs => 2,
            Bits::Fives => unreachable!("fives are not cut into chunks"),
            Bits::Four => 4,
            Bits::Eight => 8,
            Bits::F16 => 16,
        }
    }

    /// Lines of a tile of `cols` columns.
    pub(super) fn tile_lines(self, cols: usize) -> usize {
        match self {
            Bits::Fives => cols.div_ceil(FIVES_COLS),
            _ => cols / CHUNK_COLS * self.lines(),
        }
    }
}

/// `(tiles, groups, 16)` scales.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scales {
    None,
    F16(Vec<f16>),
    F32(Vec<f32>),
}

/// What level stands for 0.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Zero {
    /// The same one everywhere.
    Level(i32),
    /// `w = scale * u + min`, `(tiles, groups, 16)`.
    Mins(Vec<f16>),
    /// `w = scale * (u - zero)`, `(tiles, groups, 16)`.
    Levels(Vec<f16>),
}

/// A matrix as the integer kernels read it.
#[derive(Debug, Clone, PartialEq)]
pub struct Packed {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Columns that share a scale.
    pub(super) group: usize,
    pub(super) bits: Bits,
    /// `(tiles, cols/32, lines)`.
    pub(super) quants: Lines,
    pub(super) scales: Scales,
    pub(super) zero: Zero,
}

impl Packed {
    /// N.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that hold one row of a full tile, scales included.
    pub fn row_bytes(&self) -> usize {
        let groups = self.cols.div_ceil(self.group);
        let scale = match self.scales {
            Scales::None => 0,
            Scales::F16(_) => 2,
            Scales::F32(_) => 4,
        };
        let zero = match self.zero {
            Zero::Level(_) => 0,
            Zero::Mins(_) | Zero::Levels(_) => 2,
        };
        self.bits.tile_lines(self.cols) * LINE_BYTES / TILE_ROWS + groups * (scale + zero)
    }

    /// Whether the weights meet levels; else they meet floats.
    pub fn takes_levels(&self) -> bool {
        self.bits != Bits::F16
    }

    /// The form of ternary weights.
    pub fn form(&self) -> Option<Form> {
        match self.bits {
            Bits::Two => Some(Form::Multiply),
            Bits::Pairs => Some(Form::LookUp),
            Bits::Fives => Some(Form::Fives),
            Bits::Four | Bits::Eight | Bits::F16 => None,
        }
    }

    /// What the weights are called: `int4`, `int8`, `ternary` or `f16`.
    pub fn format(&self) -> &'static str {
        match self.bits {
            Bits::F16 => "f16",
            Bits::Two | Bits::Pairs | Bits::Fives => "ternary",
            Bits::Four => "int4",
            Bits::Eight => "int8",
        }
    }

    /// Lays out a matrix, whose memory is given back meanwhile; `None` for a vector.
    pub fn new(weight: Weight) -> Option<Packed> {
        Some(match weight {
            Weight::Int4(w) => Packed::int4(w),
            Weight::Int4Tiled(part) => Packed::int4(part.in_rows()),
            Weight::Int8(w) => Packed::int8(w),
            Weight::Ternary(w) => Packed::ternary(w),
            Weight::F16(w) => Packed::f16(w),
            Weight::Vector(_) => return None,
        })
    }

    /// Lays out F16 weights.
    pub fn f16(mut w: F16Matrix) -> Packed {
        let chunks = w.cols / CHUNK_COLS * Bits::F16.lines();
        let mut quants = zeros(w.rows, w.cols, Bits::F16);
        for rows in pieces(w.rows, w.cols) {
            for row in rows.clone() {
                let values = &w.values[row * w.cols..][..w.cols];
                let lines = &mut quants[row / TILE_ROWS * chunks..][..chunks];
                for (pair, line) in values.as_chunks::<2>().0.iter().zip(lines) {
                    for (value, half) in pair.iter().zip(line.0.chunks_exact_mut(2 * TILE_ROWS)) {
                        half[row % TILE_ROWS * 2..][..2].copy_from_slice(&value.to_le_bytes());
                    }
                }
            }
            w.values.truncate(rows.start * w.cols);
        }
        Packed {
            rows: w.rows,
            cols: w.cols,
            group: w.cols,
            bits: Bits::F16,
            quants,
            scales: Scales::None,
            zero: Zero::Level(0),
        }
    }

    /// Lays out INT4 weights.
    pub fn int4(mut w: Int4Matrix) -> Packed {
        let groups = w.cols.div_ceil(w.group);
        let zero = match &w.mins {
            Some(zeros) if w.zeros => Zero::Levels(by_tile(zeros, w.rows, groups)),
            Some(mins) => Zero::Mins(by_tile(mins, w.rows, groups)),
            None => Zero::Level(8),
        };
        let scales = Scales::F16(by_tile(&w.scales, w.rows, groups));
        let mut quants = zeros(w.rows, w.cols, Bits::Four);
        for rows in pieces(w.rows, w.cols) {
            fill(&mut quants, Bits::Four, rows.clone(), w.cols, |row, col| {
                let (cell, j) = (col / CELL_WEIGHTS, col % CELL_WEIGHTS);
                let byte = w.quants[row * w.cols / 2 + cell * CELL_BYTES + j % CELL_BYTES];
                if j < CELL_BYTES { byte & 15 } else { byte >> 4 }
            });
            w.quants.truncate(rows.start * w.cols / 2);
        }
        Packed {
            rows: w.rows,
            cols: w.cols,
            group: w.group,
            bits: Bits::Four,
            quants,
            scales,
            zero,
        }
    }

    /// Lays out INT8 weights; level 128 is 0.
    pub fn int8(mut w: Int8Matrix) -> Packed {
        let groups = w.cols.div_ceil(w.group);
        let scales = Scales::F16(by_tile(&w.scales, w.rows, groups));
        let mut quants = zeros(w.rows, w.cols, Bits::Eight);
        for rows in pieces(w.rows, w.cols) {
            fill(
                &mut quants,
                Bits::Eight,
                rows.clone(),
                w.cols,
                |row, col| (w.quants[row * w.cols + col] as u8) ^ 0x80,
            );
            w.quants.truncate(rows.start * w.cols);
        }
        Packed {
            rows: w.rows,
            cols: w.cols,
            group: w.group,
            bits: Bits::Eight,
            quants,
            scales,
            zero: Zero::Level(128),
        }
    }

    /// Lays out ternary weights for products by multiplication.
    pub fn ternary(w: TernaryMatrix) -> Packed {
        Packed::ternary_as(w, Form::Multiply)
    }

    /// Lays out ternary weights in a form. Only [`Form::Multiply`] has a code for the weight 2, which files may
    /// hold, and five weights a byte know no groups within a row: what a form cannot hold is laid out for
    /// multiplication.
    pub fn ternary_as(mut w: TernaryMatrix, form: Form) -> Packed {
        let groups = w.groups_per_row();
        // Blocks of a file may all say what holds for the whole row.
        let is_by_row = (0..w.rows).all(|row| {
            let scales = w.row_scales(row);
            scales.iter().all(|scale| scale == &scales[0])
        });
        let (group, scales) = match is_by_row {
            true => {
                let firsts: Vec<f32> = w.scales.iter().copied().step_by(groups).collect();
                (w.cols, by_tile(&firsts, w.rows, 1))
            }
            false => (w.group, by_tile(&w.scales, w.rows, groups)),
        };
        let has_twos = w.quants.iter().any(|byte| byte & byte >> 1 & 0x55 != 0);
        let bits = match form {
            _ if has_twos => Bits::Two,
            Form::LookUp => Bits::Pairs,
            Form::Fives if is_by_row => Bits::Fives,
            Form::Multiply | Form::Fives => Bits::Two,
        };
        let mut quants = zeros(w.rows, w.cols, bits);
        for rows in pieces(w.rows, w.cols) {
            let level = |row: usize, col: usize| {
                let cell = row * w.cols / 4 + col / ternary::CELL_WEIGHTS * ternary::CELL_BYTES;
                let j = col % ternary::CELL_WEIGHTS;
                w.quants[cell + j % ternary::CELL_BYTES] >> (2 * (j / ternary::CELL_BYTES)) & 3
            };
            match bits {
                Bits::Fives => fill_fives(&mut quants, rows.clone(), w.cols, level),
                _ => fill(&mut quants, Bits::Two, rows.clone(), w.cols, level),
            }
            w.quants.truncate(rows.start * w.cols / 4);
        }
        if bits == Bits::Pairs {
            for line in quants.iter_mut() {
                *line = by_column(line);
            }
        }
        Packed {
            rows: w.rows,
            cols: w.cols,
            group,
            bits,
            quants,
            scales: Scales::F32(scales),
            zero: Zero::Level(1),
        }
    }

    /// Writes row `i` as floats to `out` `(k,)`.
    ///
    /// # Panics
    /// If there is no row `i` or `out` is not `(k,)`.
    pub fn dequantize_row(&self, i: usize, out: &mut [f32]) {
        assert!(
            i < self.rows && out.len() == self.cols,
            "linear: row {i} or its length"
        );
        let (tile, row) = (i / TILE_ROWS, i % TILE_ROWS);
        if self.bits == Bits::F16 {
            let chunks = self.cols / CHUNK_COLS * Bits::F16.lines();
            let lines = &self.quants[tile * chunks..][..chunks];
            for (out, line) in out.as_chunks_mut::<2>().0.iter_mut().zip(lines) {
                for (out, half) in out.iter_mut().zip(line.0.chunks_exact(2 * TILE_ROWS)) {
                    *out = f16::from_le_bytes([half[2 * row], half[2 * row + 1]]).to_f32();
                }
            }
            return;
        }
        let groups = self.cols.div_ceil(self.group);
        let first = tile * self.bits.tile_lines(self.cols);
        for (col, out) in out.iter_mut().enumerate() {
            let (step, col_of_step) = (col / STEP_COLS, col % STEP_COLS);
            let level = match self.bits {
                Bits::Fives => {
                    let line = &self.quants[first + step / FIVES].0;
                    let byte = line[row * STEP_COLS + col_of_step];
                    byte / POWERS[step % FIVES] % 3
                }
                bits => {
                    let bits_each = bits.lines();
                    let per_line = 8 / bits_each;
                    let line = &self.quants[first + step / per_line].0;
                    let byte = match bits {
                        Bits::Pairs => line[col_of_step * TILE_ROWS + row],
                        _ => line[row * STEP_COLS + col_of_step],
                    };
                    let mask = ((1u32 << bits_each) - 1) as u8;
                    (byte >> (step % per_line * bits_each)) & mask
                }
            };
            let at = (tile * groups + col / self.group) * TILE_ROWS + row;
            let scale = match &self.scales {
                Scales::None => 1.0,
                Scales::F16(scales) => scales[at].to_f32(),
                Scales::F32(scales) => scales[at],
            };
            *out = match &self.zero {
                Zero::Level(zero) => scale * (level as i32 - zero) as f32,
                Zero::Levels(zeros) => scale * (level as f32 - zeros[at].to_f32()),
                Zero::Mins(mins) => scale * level as f32 + mins[at].to_f32(),
            };
        }
    }
}

/// `(rows, groups)` values as `(tiles, groups, 16)`.
fn by_tile<T: Copy + Default>(values: &[T], rows: usize, groups: usize) -> Vec<T> {
    assert_eq!(
        values.len(),
        rows * groups,
        "linear: scales of another length"
    );
    let mut tiled = vec![T::default(); rows.div_ceil(TILE_ROWS) * groups * TILE_ROWS];
    for (tile, out) in tiled.chunks_exact_mut(groups * TILE_ROWS).enumerate() {
        for (i, out) in out.iter_mut().enumerate() {
            let (row, group) = (tile * TILE_ROWS + i % TILE_ROWS, i / TILE_ROWS);
            if row < rows {
                *out = values[row * groups + group];
            }
        }
    }
    tiled
}

/// Steps of a line of fives.
const FIVES: usize = FIVES_COLS / STEP_COLS;
/// What the level of each step counts in the byte of a five.
pub(super) const POWERS: [u8; FIVES] = [1, 3, 9, 27, 81];

/// A line with its bytes by column instead of by row: byte `16c + r` is row r, column c of the steps.
fn by_column(line: &Line) -> Line {
    Line(std::array::from_fn(|i| {
        line.0[i % TILE_ROWS * STEP_COLS + i / TILE_ROWS]
    }))
}

/// Weights of a piece.
const PIECE_WEIGHTS: usize = 4 << 20;

/// Whole tiles of a matrix, the last ones first: what was laid out can be cut off.
fn pieces(rows: usize, cols: usize) -> impl Iterator<Item = Range<usize>> {
    let piece = (PIECE_WEIGHTS / cols).max(1).next_multiple_of(TILE_ROWS);
    (0..rows.div_ceil(piece))
        .rev()
        .map(move |i| i * piece..rows.min((i + 1) * piece))
}

/// Lays out rows of ternary levels, five a byte. Columns beyond the matrix have level 0, so that whatever they
/// meet adds nothing.
fn fill_fives(
    quants: &mut Lines,
    rows: Range<usize>,
    cols: usize,
    level: impl Fn(usize, usize) -> u8,
) {
    let per_tile = Bits::Fives.tile_lines(cols);
    for row in rows {
        let quants = &mut quants[row / TILE_ROWS * per_tile..][..per_tile];
        for col in 0..cols {
            let step = col / STEP_COLS;
            let at = row % TILE_ROWS * STEP_COLS + col % STEP_COLS;
            quants[step / FIVES].0[at] += level(row, col) * POWERS[step % FIVES];
        }
    }
}

/// Lines of a matrix, empty.
fn zeros(rows: usize, cols: usize, bits: Bits) -> Lines {
    assert!(
        cols > 0 && cols.is_multiple_of(CHUNK_COLS),
        "linear: {cols} columns"
    );
    Lines::zeroed(rows.div_ceil(TILE_ROWS) * bits.tile_lines(cols))
}

/// Lays out rows of levels.
fn fill(
    quants: &mut Lines,
    bits: Bits,
    rows: Range<usize>,
    cols: usize,
    level: impl Fn(usize, usize) -> u8,
) {
    let (per_tile, lines) = (bits.tile_lines(cols), bits.lines());
    let per_line = STEPS / lines;
    for row in rows {
        let quants = &mut quants[row / TILE_ROWS * per_tile..][..per_tile];
        for col in 0..cols {
            let step = col / STEP_COLS;
            let at = row % TILE_ROWS * STEP_COLS + col % STEP_COLS;
            quants[step / per_line].0[at] |= level(row, col) << (step % per_line * lines);
        }
    }
}
