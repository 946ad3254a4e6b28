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
//! Several matrices that read the same input become one, in an [`Order`] that suits what becomes of the
//! product.

mod order;
mod part;

use half::f16;

pub use order::Order;
pub use part::Int4Part;

use super::int4::{CELL_BYTES, CELL_WEIGHTS, Int4Matrix, check_group, check_zeros};
use super::{Shared, check_finite, check_len};
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

/// Matrices in tiles.
#[derive(Debug, Clone, PartialEq)]
pub struct Int4Tiled {
    /// Where the rows of each matrix are.
    pub order: Order,
    /// Rows of each matrix.
    pub members: Vec<usize>,
    /// N: rows in tiles, [`Order::packed_rows`] of the members.
    pub rows: usize,
    /// K, a multiple of 32.
    pub cols: usize,
    /// Weights that share a scale: 32, 64 or 128.
    pub group: usize,
    /// `(ceil(N/16), ceil(K/128), 256)` words.
    pub quants: Shared<u32>,
    /// `(ceil(N/16), ceil(K/128), 8, 128/group, 2)`.
    pub scales: Shared<f16>,
    /// As the scales, absent for the symmetric form.
    pub mins: Option<Shared<f16>>,
    /// The minima are zeros, levels that stand for 0: [`Int4Matrix::zeros`].
    pub zeros: bool,
}

/// Row of a matrix, or none where a tile is filled up.
type Source<'a> = Option<(&'a Int4Matrix, usize)>;

impl Int4Tiled {
    /// The matrices' rows one after the other.
    ///
    /// # Errors
    /// As [`Int4Tiled::pack_as`].
    pub fn pack(matrices: &[&Int4Matrix]) -> Result<Self, Error> {
        Self::pack_as(Order::Rows, matrices)
    }

    /// [`Order::GateUp`].
    ///
    /// # Errors
    /// As [`Int4Tiled::pack_as`].
    pub fn pack_gate_up(gate: &Int4Matrix, up: &Int4Matrix) -> Result<Self, Error> {
        Self::pack_as(Order::GateUp, &[gate, up])
    }

    /// [`Order::Heads`].
    ///
    /// # Errors
    /// As [`Int4Tiled::pack_as`].
    pub fn pack_heads(matrices: &[&Int4Matrix], head_dim: usize) -> Result<Self, Error> {
        Self::pack_as(Order::Heads { head_dim }, matrices)
    }

    /// The matrices in tiles that they share.
    ///
    /// # Errors
    /// Rows that the order does not take ([`Order::packed_rows`]), matrices that differ in columns, group
    /// or form.
    pub fn pack_as(order: Order, matrices: &[&Int4Matrix]) -> Result<Self, Error> {
        let members: Vec<usize> = matrices.iter().map(|m| m.rows).collect();
        let packed_rows = order.packed_rows(&members)?;
        let first = matrices[0];
        for other in matrices {
            check_len(FORMAT, "columns", other.cols, first.cols)?;
            check_len(FORMAT, "groups", other.group, first.group)?;
            let (mins, need) = (other.mins.is_some(), first.mins.is_some());
            check_len(FORMAT, "forms with minima", mins.into(), need.into())?;
            let (zeros, need) = (other.zeros, first.zeros);
            check_len(FORMAT, "forms with zeros", zeros.into(), need.into())?;
        }
        let mut rows: Vec<Source<'_>> = vec![None; packed_rows];
        for (member, matrix) in matrices.iter().enumerate() {
            for row in 0..matrix.rows {
                rows[order.place(&members, member, row)] = Some((*matrix, row));
            }
        }
        let column_tiles = first.cols.div_ceil(TILE_COLS);
        let tiles = rows.len().div_ceil(TILE_ROWS) * column_tiles;
        let mut quants = Vec::with_capacity(tiles * TILE_WORDS);
        for row_tile in rows.chunks(TILE_ROWS) {
            for column_tile in 0..column_tiles {
                push_words(&mut quants, row_tile, column_tile);
            }
        }
        let scales = group_values(&rows, column_tiles, |m, row| m.row_scales(row));
        let mins = first.mins.is_some().then(|| {
            let no_mins: &[f16] = &[];
            group_values(&rows, column_tiles, |m, row| {
                m.row_mins(row).unwrap_or(no_mins)
            })
        });
        Ok(Int4Tiled {
            order,
            members,
            rows: packed_rows,
            cols: first.cols,
            group: first.group,
            quants: quants.into(),
            scales: scales.into(),
            mins: mins.map(Into::into),
            zeros: first.zeros,
        })
    }

    /// Puts tiles together from parts that may lie in a file. `zeros` says that the minima are zeros.
    ///
    /// # Errors
    /// Rows that the order does not take, a group or columns that INT4 does not have, parts of the wrong
    /// length, a scale or minimum that is not finite, a zero that is no level.
    pub fn from_shared(
        order: Order,
        members: Vec<usize>,
        [cols, group]: [usize; 2],
        quants: Shared<u32>,
        scales: Shared<f16>,
        mins: Option<Shared<f16>>,
        zeros: bool,
    ) -> Result<Self, Error> {
        let rows = order.packed_rows(&members)?;
        check_group(rows, cols, group)?;
        let words = rows
            .div_ceil(TILE_ROWS)
            .checked_mul(cols.div_ceil(TILE_COLS))
            .and_then(|tiles| tiles.checked_mul(TILE_WORDS))
            .ok_or_else(|| Error::Matrix {
                format: FORMAT,
                reason: format!("{rows} x {cols} overflows"),
            })?;
        check_len(FORMAT, "quants", quants.len(), words)?;
        // Fewer than words: no overflow.
        let scale_count = words / TILE_WORDS * TILE_ROWS * (TILE_COLS / group);
        check_len(FORMAT, "scales", scales.len(), scale_count)?;
        check_finite(FORMAT, "scale", &scales)?;
        if let Some(mins) = &mins {
            check_len(FORMAT, "mins", mins.len(), scale_count)?;
            check_finite(FORMAT, "minimum", mins)?;
        }
        if zeros {
            check_zeros(FORMAT, mins.as_deref(), scale_count)?;
        }
        Ok(Int4Tiled {
            order,
            members,
            rows,
            cols,
            group,
            quants,
            scales,
            mins,
            zeros,
        })
    }

    /// One of the matrices as it was before it was packed.
    pub fn member(&self, member: usize) -> Int4Matrix {
        self.copy_rows((0..self.members[member]).map(|row| self.place(member, row)))
    }

    /// The row in tiles of row `row` of matrix `member`.
    fn place(&self, member: usize, row: usize) -> usize {
        self.order.place(&self.members, member, row)
    }

    /// Rows in tiles, row by row.
    fn copy_rows(&self, rows: impl ExactSizeIterator<Item = usize>) -> Int4Matrix {
        let groups = self.cols.div_ceil(self.group);
        let row_bytes = self.cols / 2;
        let count = rows.len();
        let mut quants = vec![0u8; count * row_bytes];
        let mut scales = Vec::with_capacity(count * groups);
        let mut mins = Vec::with_capacity(self.mins.as_ref().map_or(0, |_| count * groups));
        for (row, out) in rows.zip(quants.chunks_exact_mut(row_bytes)) {
            self.copy_quants(row, out);
            let place = |group| self.group_place(row, group);
            scales.extend((0..groups).map(|group| self.scales[place(group)]));
            if let Some(all) = &self.mins {
                mins.extend((0..groups).map(|group| all[place(group)]));
            }
        }
        Int4Matrix {
            rows: count,
            cols: self.cols,
            group: self.group,
            quants: quants.into(),
            scales: scales.into(),
            mins: self.mins.as_ref().map(|_| mins.into()),
            zeros: self.zeros,
        }
    }

    /// Where the scale of a group of a row is.
    fn group_place(&self, row: usize, group: usize) -> usize {
        let groups_per_tile = TILE_COLS / self.group;
        let tile = row / TILE_ROWS * self.cols.div_ceil(TILE_COLS) + group / groups_per_tile;
        let pair = (tile * HALF + row % HALF) * groups_per_tile + group % groups_per_tile;
        pair * 2 + row % TILE_ROWS / HALF
    }

    /// The cells of a row: what [`push_words`] does, backwards.
    fn copy_quants(&self, row: usize, out: &mut [u8]) {
        let column_tiles = self.cols.div_ceil(TILE_COLS);
        let first = row / TILE_ROWS * column_tiles * TILE_WORDS;
        let tiles = self.quants[first..][..column_tiles * TILE_WORDS].chunks_exact(TILE_WORDS);
        let (lanes, shift) = (row % HALF * 4, row % TILE_ROWS / HALF * 8);
        for (cells, tile) in out.chunks_mut(TILE_CELLS * CELL_BYTES).zip(tiles) {
            for (c, cell) in cells.chunks_exact_mut(CELL_BYTES).enumerate() {
                // Of the eight words of a cell, those whose columns are the same bytes' low and high nibbles.
                for (i, bytes) in cell.chunks_exact_mut(4).enumerate() {
                    let (q, p) = (i / 2, i % 2);
                    let step = 2 * c + p;
                    let word = |q: usize| {
                        tile[step / 4 * 128 + (lanes + q) * 4 + step % 4] >> shift & 0x00ff_00ff
                    };
                    let (low, high) = (word(q), word(q + 2));
                    // Nibbles 0, 4, 1 and 5 of a word are columns in order.
                    for (byte, at) in bytes.iter_mut().zip([0, 16, 4, 20]) {
                        *byte = (low >> at & 15 | (high >> at & 15) << 4) as u8;
                    }
                }
            }
        }
    }

    /// Bytes that reading the whole matrix moves, padding included.
    pub fn bytes(&self) -> u64 {
        let floats = self.scales.len() + self.mins.as_ref().map_or(0, |mins| mins.len());
        (size_of_val(&*self.quants) + floats * size_of::<f16>()) as u64
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
    use std::sync::Arc;

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

    /// The rows in the order in which they were packed.
    fn all_rows(tiled: &Int4Tiled) -> Int4Matrix {
        tiled.copy_rows(0..tiled.rows)
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
                assert_eq!(tiled.member(0), matrix, "{rows} x {cols} / {group}");
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
        assert_eq!(tiled.member(0), matrix);
        assert_eq!(tiled.bytes(), plain.bytes());
        assert!(Int4Tiled::pack(&[&matrix, &plain.member(0)]).is_err());
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
        let tiled = Int4Tiled::pack(&[&a, &b]).unwrap();
        assert_eq!([tiled.member(0), tiled.member(1)], [a.clone(), b.clone()]);
        let both = all_rows(&tiled);
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
        let tiled = Int4Tiled::pack_gate_up(&gate, &up).unwrap();
        assert_eq!(
            [tiled.member(0), tiled.member(1)],
            [gate.clone(), up.clone()]
        );
        let both = all_rows(&tiled);
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
        let tiled = Int4Tiled::pack_heads(&[&q, &k], 48).unwrap();
        assert_eq!([tiled.member(0), tiled.member(1)], [q.clone(), k.clone()]);
        let both = all_rows(&tiled);
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
    }

    #[test]
    fn parts_that_do_not_fit_are_refused() {
        let mut matrix = matrix(19, 160, 64, true);
        matrix.mins = Some(vec![f16::ONE; matrix.scales.len()].into());
        let good = Int4Tiled::pack(&[&matrix.with_zeros().unwrap()]).unwrap();
        let again = |change: &dyn Fn(&mut Int4Tiled)| {
            let mut t = good.clone();
            change(&mut t);
            let shape = [t.cols, t.group];
            Int4Tiled::from_shared(
                t.order, t.members, shape, t.quants, t.scales, t.mins, t.zeros,
            )
        };
        assert_eq!(again(&|_| ()).unwrap(), good);
        let refused = |change: &dyn Fn(&mut Int4Tiled), expected: &str| {
            let message = again(change).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        refused(&|t| _ = t.quants.to_mut().pop(), "quants");
        refused(&|t| _ = t.scales.to_mut().pop(), "scales");
        refused(&|t| t.mins = None, "zeros");
        refused(
            &|t| t.mins.as_mut().unwrap()[3] = f16::from_f32(0.5),
            "zero 3",
        );
        refused(&|t| t.scales[5] = f16::NAN, "NaN");
        refused(&|t| t.group = 48, "group is 48");
        refused(&|t| t.cols = 170, "170 columns");
        refused(&|t| t.members = vec![40], "quants");
        refused(&|t| t.members = Vec::new(), "no matrix");
        refused(&|t| t.members = vec![19, 0], "without rows");
        refused(&|t| t.members = vec![usize::MAX, 19], "overflow");
        refused(&|t| t.members = vec![usize::MAX / 128], "overflow");
        refused(&|t| t.order = Order::GateUp, "gate and up");
        refused(&|t| t.order = Order::Heads { head_dim: 16 }, "heads of 16");
        refused(&|t| t.order = Order::Heads { head_dim: 0 }, "heads of 0");
    }

    #[test]
    fn a_part_is_one_of_the_matrices() {
        let (q, k) = (matrix(96, 160, 64, true), matrix(48, 160, 64, true));
        let tiles = Arc::new(Int4Tiled::pack_heads(&[&q, &k], 48).unwrap());
        let parts = [0, 1].map(|member| Int4Part::new(Arc::clone(&tiles), member).unwrap());
        assert!(Int4Part::new(Arc::clone(&tiles), 2).is_none());
        for (part, matrix) in parts.iter().zip([&q, &k]) {
            assert_eq!((part.rows(), part.in_rows()), (matrix.rows, matrix.clone()));
            let (mut got, mut want) = ([0.0; 160], [0.0; 160]);
            for row in 0..matrix.rows {
                part.dequantize_row(row, &mut got);
                matrix.dequantize_row(row, &mut want);
                assert_eq!(got, want);
            }
        }
        assert_eq!(parts[0].bytes() + parts[1].bytes(), tiles.bytes());
        assert_eq!(parts[0].share(10), 6);
    }
}
