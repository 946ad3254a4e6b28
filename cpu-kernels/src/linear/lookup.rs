//! Ternary products by table look-up (the idea of T-MAC, <https://arxiv.org/abs/2407.00088>): instead of
//! multiplying, a byte shuffle picks the sum of two weighted activations by the two weights' code.
//!
//! A token's levels `x`, of 8 bits, are taken apart into `x = 16 high + low`, both within -8..=8, so that the sum
//! of two of them, each by -1, 0 or 1, is within -16..=16 and seven of these fit a byte with a sign: the kernels
//! add up four before they widen, and no bit is lost. A pair of columns has a table of 16 bytes for each of the
//! two, entry `u + 4v` of columns a and b:
//!
//! ```text
//! (u - 1) x[a] + (v - 1) x[b]                            codes u, v of the two weights; 3 is none
//!
//! chunk of 32 columns, 512 bytes:    line j   nibble n   high, low   lane l   entry
//!                                      (2        2          2          4       16)
//! a = 16j + 8n + l, b = a + 4
//! ```
//!
//! 16 bytes a column are built once a token and serve all rows.

use super::{CHUNK_COLS, LINE_BYTES};
use crate::isa::{Isa, per_isa};
use crate::levels::Levels;

/// Bytes of the tables of a line.
pub(super) const TABLES_OF_LINE: usize = 4 * LINE_BYTES;
/// Bytes of the tables of a chunk.
const TABLES_OF_CHUNK: usize = 2 * TABLES_OF_LINE;

/// Words of f32 that the tables of a token of `cols` columns take.
///
/// # Panics
/// If `cols` is no multiple of 32.
pub fn table_words(cols: usize) -> usize {
    assert!(cols.is_multiple_of(CHUNK_COLS), "lookup: {cols} columns");
    cols / CHUNK_COLS * (TABLES_OF_CHUNK / size_of::<f32>())
}

/// Writes the tables of the only token of `levels`, which has 8 bits, into `words` `(table_words(k),)`.
///
/// # Panics
/// If there are more tokens, the levels have 16 bits, or `words` has another length.
pub fn tables(isa: Isa, levels: Levels<'_>, words: &mut [f32]) {
    assert!(
        levels.tokens() == 1
            && levels.precision() == crate::levels::Precision::Byte
            && words.len() == table_words(levels.cols()),
        "lookup: one token of 8-bit levels and room for its tables"
    );
    // SAFETY: any bits of an f32 are four i8.
    let bytes = unsafe {
        std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<i8>(), size_of_val(words))
    };
    build(isa, levels.token(0).high, bytes);
}

per_isa!(fn build(levels: &[i8], tables: &mut [i8]) = build_body);

#[inline(always)]
fn build_body<const FMA: bool>(levels: &[i8], tables: &mut [i8]) {
    const ENTRIES: usize = 16;
    const FIRST: [i8; ENTRIES] = [-1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 2];
    const SECOND: [i8; ENTRIES] = [-1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2];
    // Eight columns are the first and the second of four pairs: a nibble of a line.
    let levels = levels.as_chunks::<8>().0;
    let tables = tables.as_chunks_mut::<{ 2 * LINE_BYTES }>().0;
    for (x, tables) in levels.iter().zip(tables) {
        let (planes, _) = tables.as_chunks_mut::<LINE_BYTES>();
        let high = x.map(|x| ((i16::from(x) + 8) >> 4) as i8);
        let low: [i8; 8] =
            std::array::from_fn(|i| (i16::from(x[i]) - 16 * i16::from(high[i])) as i8);
        for (x, plane) in [high, low].iter().zip(planes) {
            let (lanes, _) = plane.as_chunks_mut::<ENTRIES>();
            for (lane, entries) in lanes.iter_mut().enumerate() {
                for (i, entry) in entries.iter_mut().enumerate() {
                    *entry = FIRST[i] * x[lane] + SECOND[i] * x[lane + 4];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::levels::{self, Precision, token_words};
    use crate::team::SharedSlice;
    use crate::testing::Random;

    #[test]
    fn entries_are_the_sums_of_two_weighted_levels() {
        let k = 160;
        let mut x = Random::new(31).floats(k, 5.0);
        (x[3], x[4]) = (5.0, -5.0);
        for isa in Isa::available() {
            let mut words = vec![0.0; token_words(k)];
            // SAFETY: one thread.
            unsafe {
                levels::part(
                    isa,
                    Precision::Byte,
                    &x,
                    SharedSlice::new(&mut words),
                    k,
                    0,
                    0..k,
                );
            }
            let levels = Levels::new(&words, k, Precision::Byte);
            let mut tables = vec![f32::NAN; table_words(k)];
            super::tables(isa, levels, &mut tables);
            let bytes: Vec<i8> = tables
                .iter()
                .flat_map(|word| word.to_ne_bytes().map(|byte| byte as i8))
                .collect();
            let x = levels.token(0).high;
            assert_eq!((x[3], x[4]), (127, -127));
            for (i, line) in bytes.chunks_exact(TABLES_OF_LINE).enumerate() {
                for (n, nibble) in line.chunks_exact(2 * LINE_BYTES).enumerate() {
                    for lane in 0..4 {
                        let a = 16 * i + 8 * n + lane;
                        for entry in 0..16 {
                            let (u, v) = (entry as i32 % 4, entry as i32 / 4);
                            if u == 3 || v == 3 {
                                continue;
                            }
                            let at = 16 * lane + entry;
                            let (high, low) = (nibble[at], nibble[LINE_BYTES + at]);
                            let want = (u - 1) * i32::from(x[a]) + (v - 1) * i32::from(x[a + 4]);
                            assert_eq!(16 * i32::from(high) + i32::from(low), want, "{isa} {a}");
                            assert!(high.abs() <= 16 && low.abs() <= 16, "{isa} {a}");
                        }
                    }
                }
            }
        }
    }
}
