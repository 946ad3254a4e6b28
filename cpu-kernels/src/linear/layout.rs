//! The layout: from the matrices of a file, and back.

use half::f16;
use models::quant::int4::{CELL_BYTES, CELL_WEIGHTS};
use models::quant::{F16Matrix, Int4Matrix, Int8Matrix, TernaryMatrix, Weight, ternary};

use super::{CHUNK_COLS, LINE_BYTES, STEP_COLS, STEPS, TILE_ROWS};

/// A line of quants, where vector loads want it.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; LINE_BYTES]);

/// Bits of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bits {
    Two,
    Four,
    Eight,
    /// Floats; no scales.
    F16,
}

impl Bits {
    /// Lines of a chunk: as many as a weight has bits.
    pub(super) fn lines(self) -> usize {
        match self {
            Bits::Two => 2,
            Bits::Four => 4,
            Bits::Eight => 8,
            Bits::F16 => 16,
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
    pub(super) quants: Vec<Line>,
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
        self.cols * self.bits.lines() / 8 + groups * (scale + zero)
    }

    /// Whether the weights meet levels; else they meet floats.
    pub fn takes_levels(&self) -> bool {
        self.bits != Bits::F16
    }

    /// What the weights are called: `int4`, `int8`, `ternary` or `f16`.
    pub fn format(&self) -> &'static str {
        match self.bits {
            Bits::F16 => "f16",
            Bits::Two => "ternary",
            Bits::Four => "int4",
            Bits::Eight => "int8",
        }
    }

    /// Lays out a matrix; `None` for a vector.
    pub fn new(weight: &Weight) -> Option<Packed> {
        Some(match weight {
            Weight::Int4(w) => Packed::int4(w),
            Weight::Int4Tiled(part) => Packed::int4(&part.in_rows()),
            Weight::Int8(w) => Packed::int8(w),
            Weight::Ternary(w) => Packed::ternary(w),
            Weight::F16(w) => Packed::f16(w),
            Weight::Vector(_) => return None,
        })
    }

    /// Lays out F16 weights.
    pub fn f16(w: &F16Matrix) -> Packed {
        let chunks = w.cols / CHUNK_COLS * Bits::F16.lines();
        let mut quants = zeros(w.rows, w.cols, Bits::F16);
        for (row, values) in w.values.chunks_exact(w.cols).enumerate() {
            let lines = &mut quants[row / TILE_ROWS * chunks..][..chunks];
            for (pair, line) in values.as_chunks::<2>().0.iter().zip(lines) {
                for (value, half) in pair.iter().zip(line.0.chunks_exact_mut(2 * TILE_ROWS)) {
                    half[row % TILE_ROWS * 2..][..2].copy_from_slice(&value.to_le_bytes());
                }
            }
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
    pub fn int4(w: &Int4Matrix) -> Packed {
        let groups = w.cols.div_ceil(w.group);
        let zero = match &w.mins {
            Some(zeros) if w.zeros => Zero::Levels(by_tile(zeros, w.rows, groups)),
            Some(mins) => Zero::Mins(by_tile(mins, w.rows, groups)),
            None => Zero::Level(8),
        };
        let level = |row: usize, col: usize| {
            let (cell, j) = (col / CELL_WEIGHTS, col % CELL_WEIGHTS);
            let byte = w.quants[row * w.cols / 2 + cell * CELL_BYTES + j % CELL_BYTES];
            if j < CELL_BYTES { byte & 15 } else { byte >> 4 }
        };
        Packed {
            rows: w.rows,
            cols: w.cols,
            group: w.group,
            bits: Bits::Four,
            quants: lines(Bits::Four, w.rows, w.cols, level),
            scales: Scales::F16(by_tile(&w.scales, w.rows, groups)),
            zero,
        }
    }

    /// Lays out INT8 weights; level 128 is 0.
    pub fn int8(w: &Int8Matrix) -> Packed {
        let groups = w.cols.div_ceil(w.group);
        let level = |row: usize, col: usize| (w.quants[row * w.cols + col] as u8) ^ 0x80;
        Packed {
            rows: w.rows,
            cols: w.cols,
            group: w.group,
            bits: Bits::Eight,
            quants: lines(Bits::Eight, w.rows, w.cols, level),
            scales: Scales::F16(by_tile(&w.scales, w.rows, groups)),
            zero: Zero::Level(128),
        }
    }

    /// Lays out ternary weights.
    pub fn ternary(w: &TernaryMatrix) -> Packed {
        let level = |row: usize, col: usize| {
            let cell = row * w.cols / 4 + col / ternary::CELL_WEIGHTS * ternary::CELL_BYTES;
            let j = col % ternary::CELL_WEIGHTS;
            w.quants[cell + j % ternary::CELL_BYTES] >> (2 * (j / ternary::CELL_BYTES)) & 3
        };
        Packed {
            rows: w.rows,
            cols: w.cols,
            group: w.group,
            bits: Bits::Two,
            quants: lines(Bits::Two, w.rows, w.cols, level),
            scales: Scales::F32(by_tile(&w.scales, w.rows, w.groups_per_row())),
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
        let per_line = 8 / self.bits.lines();
        let mask = ((1u32 << self.bits.lines()) - 1) as u8;
        let first = tile * self.cols / CHUNK_COLS * self.bits.lines();
        for (col, out) in out.iter_mut().enumerate() {
            let step = col / STEP_COLS;
            let line = &self.quants[first + step / per_line].0;
            let byte = line[row * STEP_COLS + col % STEP_COLS];
            let level = (byte >> (step % per_line * self.bits.lines())) & mask;
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

/// Lines of a matrix, empty.
fn zeros(rows: usize, cols: usize, bits: Bits) -> Vec<Line> {
    assert!(
        cols > 0 && cols.is_multiple_of(CHUNK_COLS),
        "linear: {cols} columns"
    );
    vec![Line([0; LINE_BYTES]); rows.div_ceil(TILE_ROWS) * (cols / CHUNK_COLS) * bits.lines()]
}

/// Levels as lines.
fn lines(bits: Bits, rows: usize, cols: usize, level: impl Fn(usize, usize) -> u8) -> Vec<Line> {
    let (chunks, lines) = (cols / CHUNK_COLS, bits.lines());
    let mut quants = zeros(rows, cols, bits);
    let per_line = STEPS / lines;
    for (tile, quants) in quants.chunks_exact_mut(chunks * lines).enumerate() {
        for row in 0..TILE_ROWS.min(rows - tile * TILE_ROWS) {
            for col in 0..cols {
                let step = col / STEP_COLS;
                let byte = &mut quants[step / per_line].0[row * STEP_COLS + col % STEP_COLS];
                *byte |= level(tile * TILE_ROWS + row, col) << (step % per_line * lines);
            }
        }
    }
    quants
}
