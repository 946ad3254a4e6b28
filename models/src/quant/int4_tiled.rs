//! INT4 rearranged for the matrix units of a GPU: tiles of 16 rows by 128 columns, 1 KiB each, whose
//! words are operand A of `mma.m16n8k16` but for one shift and four masks.
//!
//! ```text
//! quants  (ceil(n/16), ceil(k/128), 2, 32, 4) u32       a tile: 2 halves, 32 lanes, 4 words
//!
//!   half h, lane 4g + q, word w: step s = 4h + w of the tile's 8, the 4 columns from
//!   c = 32 (s / 2) + 8q + 4 (s % 2) on, of rows g and g + 8:
//!
//!   bit   28       24       20       16       12       8        4        0
//!        | g+8,c+3 | g+8,c+1 | g,c+3 | g,c+1 | g+8,c+2 | g+8,c | g,c+2 | g,c |
//!
//! scales  (ceil(n/16), ceil(k/128), 8, 128/group, 2) f16    of rows g and g + 8 side by side
//! mins    as the scales, or none; zero points where `zeros` is set: `w = scale * (q - zero)`, and
//!         `-scale * zero`, exact in f32, stands where a minimum would
//! ```
//!
//! Weights are those of [`Int4Matrix`], nibble for nibble: the rearrangement loses nothing. Rows and
//! columns that fill up the last tiles are zero, scales too.
//!
//! Several matrices that read the same input become one by putting their rows one after the other
//! ([`Int4Tiled::pack`]). A gate and an up projection are interleaved by eights, so that both
//! halves of a pair meet in one tile ([`Int4Tiled::pack_gate_up`]); so are the halves of heads whose
//! pairs are turned together ([`Int4Tiled::pack_heads`]).

use half::f16;

use super::int4::{CELL_BYTES, CELL_WEIGHTS, Int4Matrix};
use super::{check_finite, check_len};
use crate::Error;

/// Rows a tile.
pub const TILE_ROWS: usize = 16;
/// Columns a tile.
pub const TILE_COLS: usize = 128;
/// Words of a tile.
const TILE_WORDS: usize = TILE_ROWS * TILE_COLS / 8;
/// Rows whose scales a tile keeps side by side.
const HALF: usize = TILE_ROWS / 2;
/// Cells in a row of a tile.
const TILE_CELLS: usize = TILE_COLS / CELL_WEIGHTS;

const FORMAT: &str = "tiled INT4";

/// An `(rows, cols)` matrix in tiles.
#[derive(Debug, Clone, PartialEq)]
pub struct Int4Tiled {
    /// N.
    pub rows: usize,
    /// K, a multiple of 32.
    pub cols: usize,
    /// Weights that share a scale: 32, 64 or 128.
    pub group: usize,
    /// `(ceil(N/16), ceil(K/128), 256)` words.
    pub quants: Vec<u32>,
    /// `(ceil(N/16), ceil(K/128), 8, 128/group, 2)`.
    pub scales: Vec<f16>,
    /// As the scales, absent for the symmetric form.
    pub mins: Option<Vec<f16>>,
    /// The minima are zeros, levels that stand for 0: [`Int4Matrix::zeros`].
    pub zeros: bool,
}

/// Row of a matrix, or none where a tile is filled up.
type Source<'a> = Option<(&'a Int4Matrix, usize)>;

impl Int4Tiled {
    /// The matrices' rows one after the other.
    ///
    /// # Errors
    /// No matrix, or matrices that differ in columns, group or form.
    pub fn pack(matrices: &[&Int4Matrix]) -> Result<Self, Error> {
        let rows: Vec<Source<'_>> = matrices
            .iter()
            .flat_map(|m| (0..m.rows).map(|row| Some((*m, row))))
            .collect();
        Self::from_rows(matrices, &rows)
    }

    /// Eight rows of `gate`, the same eight of `up`, the next eight of `gate`, and so on: row `r`
    /// of tile `t` is gate row `8t + r` for `r < 8` and up row `8t + r - 8` from there on. Both are
    /// filled up to a multiple of eight rows.
    ///
    /// # Errors
    /// Matrices that differ in anything but their weights.
    pub fn pack_gate_up(gate: &Int4Matrix, up: &Int4Matrix) -> Result<Self, Error> {
        check_len(FORMAT, "rows of `up`", up.rows, gate.rows)?;
        let rows: Vec<Source<'_>> = (0..gate.rows.div_ceil(HALF) * TILE_ROWS)
            .map(|i| {
                let row = i / TILE_ROWS * HALF + i % HALF;
                let matrix = if i % TILE_ROWS < HALF { gate } else { up };
                (row < matrix.rows).then_some((matrix, row))
            })
            .collect();
        Self::from_rows(&[gate, up], &rows)
    }

    /// The matrices one after the other, head by head: eight rows of the head's first half, the same
    /// eight of its second, and so on. Row `r` of tile `t` of a head is row `8t + r` of the head for
    /// `r < 8` and row `head_dim / 2 + 8t + r - 8` from there on.
    ///
    /// # Errors
    /// No matrix, matrices that differ in columns, group or form, a `head_dim` that is no multiple of
    /// 16 or does not divide their rows.
    pub fn pack_heads(matrices: &[&Int4Matrix], head_dim: usize) -> Result<Self, Error> {
        let whole = |m: &&Int4Matrix| head_dim > 0 && m.rows.is_multiple_of(head_dim);
        if !head_dim.is_multiple_of(TILE_ROWS) || !matrices.iter().all(whole) {
            return Err(Error::Matrix {
                format: FORMAT,
                reason: format!("heads of {head_dim} rows do not fill tiles of {TILE_ROWS}"),
            });
        }
        let rows: Vec<Source<'_>> = matrices
            .iter()
            .flat_map(|m| {
                (0..m.rows).map(move |i| {
                    let (head, of_head) = (i / head_dim, i % head_dim);
                    let (tile, r) = (of_head / TILE_ROWS, of_head % TILE_ROWS);
                    let second = if r < HALF { 0 } else { head_dim / 2 };
                    Some((*m, head * head_dim + second + tile * HALF + r % HALF))
                })
            })
            .collect();
        Self::from_rows(matrices, &rows)
    }

    fn from_rows(matrices: &[&Int4Matrix], rows: &[Source<'_>]) -> Result<Self, Error> {
        let Some(first) = matrices.first() else {
            return Err(Error::Matrix {
                format: FORMAT,
                reason: "no matrix".to_owned(),
            });
        };
        for other in matrices {
            check_len(FORMAT, "columns", other.cols, first.cols)?;
            check_len(FORMAT, "groups", other.group, first.group)?;
            let (mins, need) = (other.mins.is_some(), first.mins.is_some());
            check_len(FORMAT, "forms with minima", mins.into(), need.into())?;
            let (zeros, need) = (other.zeros, first.zeros);
            check_len(FORMAT, "forms with zeros", zeros.into(), need.into())?;
        }
        let column_tiles = first.cols.div_ceil(TILE_COLS);
        let tiles = rows.len().div_ceil(TILE_ROWS) * column_tiles;
        let mut quants = Vec::with_capacity(tiles * TILE_WORDS);
        for row_tile in rows.chunks(TILE_ROWS) {
            for column_tile in 0..column_tiles {
                push_words(&mut quants, row_tile, column_tile);
            }
        }
        let scales = group_values(rows, column_tiles, |m, row| m.row_scales(row));
        let mins = first.mins.is_some().then(|| {
            let no_mins: &[f16] = &[];
            group_values(rows, column_tiles, |m, row| {
                m.row_mins(row).unwrap_or(no_mins)
            })
        });
        Ok(Int4Tiled {
            rows: rows.len(),
            cols: first.cols,
            group: first.group,
            quants,
            scales,
            mins,
            zeros: first.zeros,
        })
    }

    /// The rows in the order in which they were packed; of [`Int4Tiled::pack_gate_up`] with what
    /// fills them up.
    ///
    /// # Errors
    /// Parts of the wrong length, a scale or minimum that is not finite, a zero that is no level.
    pub fn unpack(&self) -> Result<Int4Matrix, Error> {
        let column_tiles = self.cols.div_ceil(TILE_COLS);
        let row_tiles = self.rows.div_ceil(TILE_ROWS);
        let tiles = row_tiles * column_tiles;
        let groups_per_tile = TILE_COLS / self.group;
        check_len(FORMAT, "quants", self.quants.len(), tiles * TILE_WORDS)?;
        let scale_count = tiles * TILE_ROWS * groups_per_tile;
        for values in [Some(&self.scales), self.mins.as_ref()]
            .into_iter()
            .flatten()
        {
            check_len(FORMAT, "scales or minima", values.len(), scale_count)?;
            check_finite(FORMAT, "scale or minimum", values)?;
        }
        let mut quants = vec![0u8; self.rows * self.cols / 2];
        for (row, out) in quants.chunks_exact_mut(self.cols / 2).enumerate() {
            for (j, byte) in out.iter_mut().enumerate() {
                let column = j / CELL_BYTES * CELL_WEIGHTS + j % CELL_BYTES;
                let high = self.quant(row, column + CELL_BYTES);
                *byte = self.quant(row, column) | high << 4;
            }
        }
        let by_row = |values: &[f16]| -> Vec<f16> {
            let groups = self.cols.div_ceil(self.group);
            (0..self.rows * groups)
                .map(|i| {
                    let (row, group) = (i / groups, i % groups);
                    let tile = row / TILE_ROWS * column_tiles + group / groups_per_tile;
                    let pair =
                        (tile * HALF + row % HALF) * groups_per_tile + group % groups_per_tile;
                    values[pair * 2 + row % TILE_ROWS / HALF]
                })
                .collect()
        };
        let matrix = Int4Matrix::new(
            self.rows,
            self.cols,
            self.group,
            quants,
            by_row(&self.scales),
            self.mins.as_deref().map(by_row),
        )?;
        match self.zeros {
            true => matrix.with_zeros(),
            false => Ok(matrix),
        }
    }

    /// The 4 bits of one weight.
    fn quant(&self, row: usize, column: usize) -> u8 {
        let column_tiles = self.cols.div_ceil(TILE_COLS);
        let tile = row / TILE_ROWS * column_tiles + column / TILE_COLS;
        let step = column % TILE_COLS / 32 * 2 + column % 8 / 4;
        let lane = row % HALF * 4 + column % 32 / 8;
        let word = self.quants[tile * TILE_WORDS + step / 4 * 128 + lane * 4 + step % 4];
        let nibble = column % 2 * 4 + row % TILE_ROWS / HALF * 2 + column % 4 / 2;
        (word >> (4 * nibble)) as u8 & 15
    }

    /// Bytes that reading the whole matrix moves, padding included.
    pub fn bytes(&self) -> u64 {
        let floats = self.scales.len() + self.mins.as_ref().map_or(0, Vec::len);
        (size_of_val(self.quants.as_slice()) + floats * size_of::<f16>()) as u64
    }
}

/// Appends the 256 words of a tile.
fn push_words(quants: &mut Vec<u32>, rows: &[Source<'_>], column_tile: usize) {
    let cells: [&[u8]; TILE_ROWS] = std::array::from_fn(|i| match rows.get(i) {
        Some(Some((matrix, row))) => {
            let row = matrix.row_quants(*row);
            let start = column_tile * TILE_CELLS * CELL_BYTES;
            &row[start..row.len().min(start + TILE_CELLS * CELL_BYTES)]
        }
        _ => &[],
    });
    for half in 0..2 {
        for lane in 0..32 {
            for word in 0..4 {
                let step = half * 4 + word;
                let place = [step / 2, lane % 4, step % 2];
                let low = four_columns(cells[lane / 4], place);
                let high = four_columns(cells[lane / 4 + HALF], place);
                quants.push(low | high << 8);
            }
        }
    }
}

/// Columns `32 cell + 8q + 4p` to `+ 4` of a tile's row, in the nibbles 0, 4, 1 and 5 of a word.
fn four_columns(cells: &[u8], [cell, q, p]: [usize; 3]) -> u32 {
    let start = cell * CELL_BYTES + q % 2 * 8 + p * 4;
    let Some(&[a, b, c, d]) = cells.get(start..).and_then(<[u8]>::first_chunk) else {
        return 0;
    };
    // A cell's first 16 weights are its low nibbles, the others its high nibbles.
    let [a, b, c, d] = [a, b, c, d].map(|byte| u32::from(byte >> (q / 2 * 4) & 15));
    a | b << 16 | c << 4 | d << 20
}

/// Scales or minima in the order of the tiles; zero where there is no group.
fn group_values<'a>(
    rows: &[Source<'a>],
    column_tiles: usize,
    of_row: impl Fn(&'a Int4Matrix, usize) -> &'a [f16],
) -> Vec<f16> {
    let group = rows
        .iter()
        .flatten()
        .next()
        .map_or(TILE_COLS, |(m, _)| m.group);
    let groups_per_tile = TILE_COLS / group;
    let tiles = rows.len().div_ceil(TILE_ROWS) * column_tiles;
    let mut values = Vec::with_capacity(tiles * TILE_ROWS * groups_per_tile);
    for rows in rows.chunks(TILE_ROWS) {
        let of_rows: [&[f16]; TILE_ROWS] = std::array::from_fn(|i| match rows.get(i) {
            Some(Some((matrix, row))) => of_row(matrix, *row),
            _ => &[],
        });
        for column_tile in 0..column_tiles {
            for row in 0..HALF {
                for group in 0..groups_per_tile {
                    let group = column_tile * groups_per_tile + group;
                    let of = |row: usize| of_rows[row].get(group).copied().unwrap_or(f16::ZERO);
                    values.extend([of(row), of(row + HALF)]);
                }
            }
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every nibble and every scale its own, as far as four and sixteen bits go.
    fn matrix(rows: usize, cols: usize, group: usize, mins: bool) -> Int4Matrix {
        let groups = rows * cols.div_ceil(group);
        let halves = |start: usize| -> Vec<f16> {
            (0..groups)
                .map(|i| f16::from_bits((start + i) as u16 % 0x7bff))
                .collect()
        };
        let quants = (0..rows * cols / 2)
            .map(|i| (i * 167 + i / 251) as u8)
            .collect();
        let mins = mins.then(|| halves(5000));
        Int4Matrix::new(rows, cols, group, quants, halves(1), mins).unwrap()
    }

    #[test]
    fn unpacking_gives_back_what_was_packed() {
        for (rows, cols) in [(1, 32), (16, 128), (17, 160), (40, 576), (33, 1120)] {
            for (group, mins) in [(32, false), (64, true), (128, false), (128, true)] {
                let matrix = matrix(rows, cols, group, mins);
                let tiled = Int4Tiled::pack(&[&matrix]).unwrap();
                let tiles = rows.div_ceil(16) * cols.div_ceil(128);
                assert_eq!(tiled.quants.len(), tiles * 256);
                assert_eq!(tiled.scales.len(), tiles * 16 * (128 / group));
                assert_eq!(tiled.unpack().unwrap(), matrix, "{rows} x {cols} / {group}");
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        let mut matrix = matrix(17, 160, 32, true);
        let zeros = (0..matrix.scales.len()).map(|i| f16::from_f32((i % 17) as f32));
        matrix.mins = Some(zeros.collect());
        let plain = Int4Tiled::pack(&[&matrix]).unwrap();
        let matrix = matrix.with_zeros().unwrap();
        let tiled = Int4Tiled::pack(&[&matrix]).unwrap();
        assert_eq!(tiled.unpack().unwrap(), matrix);
        assert_eq!(tiled.bytes(), plain.bytes());
        assert!(Int4Tiled::pack(&[&matrix, &plain.unpack().unwrap()]).is_err());
    }

    #[test]
    fn a_word_holds_four_columns_of_two_rows() {
        let matrix = matrix(16, 128, 128, false);
        let tiled = Int4Tiled::pack(&[&matrix]).unwrap();
        // Half 1, lane 4 * 3 + 2, word 1: step 5, columns 84 to 87 of rows 3 and 11.
        let word = tiled.quants[128 + 14 * 4 + 1];
        let mut floats = [[0.0; 128]; 2];
        matrix.dequantize_row(3, &mut floats[0]);
        matrix.dequantize_row(11, &mut floats[1]);
        let places = [
            (0, 84),
            (0, 86),
            (1, 84),
            (1, 86),
            (0, 85),
            (0, 87),
            (1, 85),
            (1, 87),
        ];
        for (nibble, (row, column)) in places.into_iter().enumerate() {
            let q = (word >> (4 * nibble) & 15) as f32;
            let scale = matrix.row_scales(3 + 8 * row)[0].to_f32();
            assert_eq!(scale * (q - 8.0), floats[row][column], "nibble {nibble}");
        }
    }

    #[test]
    fn matrices_follow_each_other() {
        let (a, b) = (matrix(5, 96, 32, true), matrix(14, 96, 32, true));
        let both = Int4Tiled::pack(&[&a, &b]).unwrap().unpack().unwrap();
        assert_eq!(both.rows, 19);
        for row in 0..19 {
            let (of, i) = if row < 5 { (&a, row) } else { (&b, row - 5) };
            assert_eq!(both.row_quants(row), of.row_quants(i));
            assert_eq!(both.row_scales(row), of.row_scales(i));
            assert_eq!(both.row_mins(row), of.row_mins(i));
        }
    }

    #[test]
    fn gate_and_up_meet_in_a_tile() {
        let gate = matrix(11, 160, 64, false);
        let mut up = gate.clone();
        up.quants.reverse();
        up.scales.reverse();
        let both = Int4Tiled::pack_gate_up(&gate, &up)
            .unwrap()
            .unpack()
            .unwrap();
        assert_eq!(both.rows, 32);
        for row in 0..32 {
            let of = if row % 16 < 8 { &gate } else { &up };
            let i = row / 16 * 8 + row % 8;
            if i < 11 {
                assert_eq!(both.row_quants(row), of.row_quants(i));
                assert_eq!(both.row_scales(row), of.row_scales(i));
            } else {
                assert!(both.row_quants(row).iter().all(|&byte| byte == 0));
            }
        }
    }

    #[test]
    fn halves_of_a_head_meet_in_a_tile() {
        let (q, k) = (matrix(96, 160, 64, true), matrix(48, 160, 64, true));
        let both = Int4Tiled::pack_heads(&[&q, &k], 48).unwrap();
        let both = both.unpack().unwrap();
        assert_eq!(both.rows, 144);
        let mut seen = [false; 144];
        for row in 0..144 {
            let (head, tile, r) = (row / 48, row % 48 / 16, row % 16);
            let natural = 48 * head + 24 * (r / 8) + 8 * tile + r % 8;
            let (of, i) = if natural < 96 {
                (&q, natural)
            } else {
                (&k, natural - 96)
            };
            assert_eq!(both.row_quants(row), of.row_quants(i));
            assert_eq!(both.row_scales(row), of.row_scales(i));
            assert_eq!(both.row_mins(row), of.row_mins(i));
            seen[natural] = true;
        }
        assert!(seen.iter().all(|&seen| seen));
        assert!(Int4Tiled::pack_heads(&[&q], 40).is_err());
        assert!(Int4Tiled::pack_heads(&[&q, &k], 32).is_err());
        assert!(Int4Tiled::pack_heads(&[&q], 0).is_err());
    }

    #[test]
    fn matrices_that_differ_are_refused() {
        let a = matrix(16, 128, 64, false);
        assert!(Int4Tiled::pack(&[]).is_err());
        assert!(Int4Tiled::pack(&[&a, &matrix(16, 160, 64, false)]).is_err());
        assert!(Int4Tiled::pack(&[&a, &matrix(16, 128, 32, false)]).is_err());
        assert!(Int4Tiled::pack(&[&a, &matrix(16, 128, 64, true)]).is_err());
        assert!(Int4Tiled::pack_gate_up(&a, &matrix(17, 128, 64, false)).is_err());
        let mut tiled = Int4Tiled::pack(&[&a]).unwrap();
        tiled.quants.pop();
        assert!(tiled.unpack().is_err());
    }
}
