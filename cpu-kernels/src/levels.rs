//! Activations as integers, for products with weights that are integers: `x = scale * level`.
//!
//! Two precisions. [`Precision::Word`]: levels of 16 bits and a scale for every 32 columns, in two planes of
//! bytes, `level = 256 high + low`; what rounding to them loses is 2^-16 of the greatest of 32 values, below
//! what f16 caches lose. [`Precision::Byte`]: levels of 8 bits and a scale a token, for layers that were
//! trained to read them (see [`round_int8`](crate::round_int8)).
//!
//! ```text
//! a token of k columns, 9/4 k bytes:   high (k,) i8 | low (k,) i8 | scales (k/32,) f32 | sums (k/32,)
//! ```
//!
//! Sums are those of 32 levels: what a zero of the weights that is not level 0 is multiplied by. Those of 8-bit
//! levels are i32, so that products of them are exact; those of 16-bit levels are f32, times their scale.

use std::ops::Range;

use crate::isa::{Isa, per_isa};
use crate::linear::lookup;
use crate::round_int8::{LEAST_EXTREME, MAX_LEVEL};
use crate::team::SharedSlice;

/// Columns that share a scale, and a sum.
pub const CHUNK_COLS: usize = 32;
/// Words of f32 that hold a chunk of a token.
const CHUNK_WORDS: usize = CHUNK_COLS / 2 + 2;

/// Greatest level of 16 bits whose high byte, rounded, is no more than 127.
const MAX_WORD: f32 = 127.0 * 256.0 + 127.0;

/// How finely activations are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// 8 bits, a scale a token. The low plane is not used.
    Byte,
    /// 16 bits, a scale for every 32 columns.
    Word,
}

/// Words of f32 that the levels of a token of `cols` columns take.
///
/// # Panics
/// If `cols` is no multiple of 32.
pub fn token_words(cols: usize) -> usize {
    assert!(cols.is_multiple_of(CHUNK_COLS), "levels: {cols} columns");
    cols / CHUNK_COLS * CHUNK_WORDS
}

/// Levels of the tokens of a call.
#[derive(Debug, Clone, Copy)]
pub struct Levels<'a> {
    words: &'a [f32],
    cols: usize,
    precision: Precision,
    /// What products look up: see [`lookup`].
    tables: Option<&'a [f32]>,
}

/// Levels of one token.
pub(crate) struct Token<'a> {
    pub(crate) high: &'a [i8],
    #[cfg(test)]
    pub(crate) low: &'a [i8],
    pub(crate) scales: &'a [f32],
    /// Of 8-bit levels.
    pub(crate) sums: &'a [i32],
    /// Of 16-bit levels, times their scale: in the same place.
    pub(crate) totals: &'a [f32],
}

impl<'a> Levels<'a> {
    /// Takes `words` `(t, token_words(cols))` as what [`part`] has written.
    ///
    /// # Panics
    /// If it is no whole number of tokens.
    pub fn new(words: &'a [f32], cols: usize, precision: Precision) -> Levels<'a> {
        assert!(
            cols > 0 && words.len().is_multiple_of(token_words(cols)),
            "levels: words of another length"
        );
        Levels {
            words,
            cols,
            precision,
            tables: None,
        }
    }

    /// With the tables of the only token, for products that look sums up.
    ///
    /// # Panics
    /// If there are more tokens, or the tables are not `(table_words(k),)`.
    pub fn with_tables(self, tables: &'a [f32]) -> Levels<'a> {
        assert!(
            self.tokens() == 1 && tables.len() == lookup::table_words(self.cols),
            "levels: tables of one token"
        );
        Levels {
            tables: Some(tables),
            ..self
        }
    }

    pub(crate) fn tables(&self) -> Option<&'a [f32]> {
        self.tables
    }

    /// T.
    pub fn tokens(&self) -> usize {
        self.words.len() / token_words(self.cols)
    }

    /// K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How finely they are rounded.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The levels of the last `tokens` tokens.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn last(&self, tokens: usize) -> Levels<'a> {
        let skipped = (self.tokens() - tokens) * token_words(self.cols);
        Levels::new(&self.words[skipped..], self.cols, self.precision)
    }

    /// Bytes from a token to the next.
    pub(crate) fn token_bytes(&self) -> usize {
        token_words(self.cols) * size_of::<f32>()
    }

    /// The high plane of a token and what comes behind it, the next tokens among it.
    pub(crate) fn bytes(&self, token: usize) -> &'a [i8] {
        let words = &self.words[token * token_words(self.cols)..];
        // SAFETY: any bits of an f32 are four i8.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<i8>(), size_of_val(words)) }
    }

    pub(crate) fn token(&self, token: usize) -> Token<'a> {
        let stride = token_words(self.cols);
        let words = &self.words[token * stride..(token + 1) * stride];
        let (planes, rest) = words.split_at(self.cols / 2);
        let (scales, totals) = rest.split_at(self.cols / CHUNK_COLS);
        // SAFETY: any bits of an f32 are four i8, and one i32.
        let (planes, sums) = unsafe {
            (
                std::slice::from_raw_parts(planes.as_ptr().cast::<i8>(), 2 * self.cols),
                std::slice::from_raw_parts(totals.as_ptr().cast::<i32>(), totals.len()),
            )
        };
        Token {
            high: &planes[..self.cols],
            #[cfg(test)]
            low: &planes[self.cols..],
            scales,
            sums,
            totals,
        }
    }
}

/// Rounds `x`, the columns `cols` of a token, into its levels, `words` `(token_words(k),)`. Columns are cut at
/// multiples of 32; with [`Precision::Byte`] they are the whole token.
///
/// # Panics
/// If a length does not fit, or the columns are cut otherwise.
///
/// # Safety
/// Until this returns nothing else reads or writes the levels of these columns.
pub unsafe fn part(
    isa: Isa,
    precision: Precision,
    x: &[f32],
    words: SharedSlice<'_, f32>,
    cols: Range<usize>,
) {
    let k = words.len() / CHUNK_WORDS * CHUNK_COLS;
    assert!(
        words.len() == token_words(k)
            && x.len() == cols.len()
            && cols.end <= k
            && cols.start.is_multiple_of(CHUNK_COLS)
            && cols.end.is_multiple_of(CHUNK_COLS)
            && (precision == Precision::Word || cols == (0..k)),
        "levels: a token of {k} columns"
    );
    let chunks = cols.start / CHUNK_COLS..cols.end / CHUNK_COLS;
    let byte_words = |start: usize| (start + cols.start) / 4..(start + cols.end) / 4;
    let first_scale = k / 2;
    let first_sum = first_scale + k / CHUNK_COLS;
    // SAFETY: the caller keeps others away from these columns, and the four ranges are apart; any bits of
    // an f32 are four i8, and one i32.
    unsafe {
        let bytes = |words: &mut [f32]| {
            std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<i8>(), 4 * words.len())
        };
        let high = bytes(words.slice_mut(byte_words(0)));
        let low = bytes(words.slice_mut(byte_words(k)));
        let scales = words.slice_mut(first_scale + chunks.start..first_scale + chunks.end);
        let sums = words.slice_mut(first_sum + chunks.start..first_sum + chunks.end);
        match precision {
            Precision::Byte => {
                let sums =
                    std::slice::from_raw_parts_mut(sums.as_mut_ptr().cast::<i32>(), sums.len());
                to_bytes(isa, x, high, scales, sums);
            }
            Precision::Word => to_words(isa, x, high, low, scales, sums),
        }
    }
}

per_isa!(fn to_words(x: &[f32], high: &mut [i8], low: &mut [i8], scales: &mut [f32], sums: &mut [f32]) = to_words_body);
per_isa!(fn to_bytes(x: &[f32], high: &mut [i8], scales: &mut [f32], sums: &mut [i32]) = to_bytes_body);

/// Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
const ROUND: f32 = 12_582_912.0;

/// The integer nearest to `value`, which is far below 2^22.
#[inline(always)]
fn nearest(value: f32) -> i32 {
    (value + ROUND).to_bits() as i32 - ROUND.to_bits() as i32
}

#[inline(always)]
fn extreme(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if x.abs() > *lane { x.abs() } else { *lane };
        }
    }
    let greater = |m: f32, x: &f32| if x.abs() > m { x.abs() } else { m };
    rest.iter().fold(lanes.iter().fold(0.0, greater), greater)
}

#[inline(always)]
fn to_words_body<const FMA: bool>(
    x: &[f32],
    high: &mut [i8],
    low: &mut [i8],
    scales: &mut [f32],
    sums: &mut [f32],
) {
    let x = x.as_chunks::<CHUNK_COLS>().0;
    let high = high.as_chunks_mut::<CHUNK_COLS>().0;
    let low = low.as_chunks_mut::<CHUNK_COLS>().0;
    for ((((x, high), low), scale), sum) in x.iter().zip(high).zip(low).zip(scales).zip(sums) {
        let extreme = extreme(x);
        // Below, the factor would overflow; what is lost is below 1e-30.
        let factor = if extreme > 1e-30 {
            MAX_WORD / extreme
        } else {
            0.0
        };
        let mut levels = [0i32; CHUNK_COLS];
        for (level, x) in levels.iter_mut().zip(x) {
            *level = nearest(x * factor);
        }
        for ((high, low), level) in high.iter_mut().zip(low).zip(levels) {
            *high = ((level + 128) >> 8) as i8;
            *low = level as i8;
        }
        *scale = extreme / MAX_WORD;
        *sum = *scale * levels.iter().sum::<i32>() as f32;
    }
}

#[inline(always)]
fn to_bytes_body<const FMA: bool>(
    x: &[f32],
    high: &mut [i8],
    scales: &mut [f32],
    sums: &mut [i32],
) {
    let extreme = extreme(x);
    let extreme = if extreme > LEAST_EXTREME {
        extreme
    } else {
        LEAST_EXTREME
    };
    let factor = MAX_LEVEL / extreme;
    scales.fill(1.0 / factor);
    let x = x.as_chunks::<CHUNK_COLS>().0;
    let high = high.as_chunks_mut::<CHUNK_COLS>().0;
    for ((x, high), sum) in x.iter().zip(high).zip(sums) {
        let mut levels = [0i32; CHUNK_COLS];
        for (level, x) in levels.iter_mut().zip(x) {
            *level = nearest(x * factor);
        }
        for (high, level) in high.iter_mut().zip(levels) {
            *high = level as i8;
        }
        *sum = levels.iter().sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    fn levels(isa: Isa, precision: Precision, x: &[f32], cuts: &[usize]) -> Vec<f32> {
        let mut words = vec![f32::NAN; token_words(x.len())];
        let shared = SharedSlice::new(&mut words);
        for pair in cuts.windows(2) {
            // SAFETY: one thread.
            unsafe {
                part(
                    isa,
                    precision,
                    &x[pair[0]..pair[1]],
                    shared,
                    pair[0]..pair[1],
                )
            };
        }
        words
    }

    #[test]
    fn words_are_close_and_bytes_are_the_rounding_of_ternary_layers() {
        let mut random = Random::new(21);
        let k = 160;
        let mut x = random.floats(k, 3.0);
        x[40] = 900.0;
        x[64..96].fill(0.0);
        let mut rounded = x.clone();
        crate::round_int8::reference(&mut rounded, k);
        for isa in Isa::available() {
            let words = levels(isa, Precision::Word, &x, &[0, 64, 96, k]);
            let token = Levels::new(&words, k, Precision::Word).token(0);
            for (i, x) in x.iter().enumerate() {
                let level = 256 * i32::from(token.high[i]) + i32::from(token.low[i]);
                let scale = token.scales[i / 32];
                assert!(
                    (scale * level as f32 - x).abs() <= 0.501 * scale,
                    "{isa} {i}"
                );
            }
            for (chunk, sum) in token.totals.iter().enumerate() {
                let of = |plane: &[i8]| -> i32 {
                    plane[32 * chunk..][..32]
                        .iter()
                        .map(|&v| i32::from(v))
                        .sum()
                };
                let want = 256 * of(token.high) + of(token.low);
                assert_eq!(*sum, token.scales[chunk] * want as f32, "{isa} {chunk}");
            }

            let words = levels(isa, Precision::Byte, &x, &[0, k]);
            let token = Levels::new(&words, k, Precision::Byte).token(0);
            for (i, rounded) in rounded.iter().enumerate() {
                let value = token.scales[0] * f32::from(token.high[i]);
                assert!((value - rounded).abs() <= 1e-6 * rounded.abs(), "{isa} {i}");
            }
        }
    }

    #[test]
    fn rounding_again_gives_the_same_levels() {
        let mut random = Random::new(22);
        let x = random.floats(320, 11.0);
        for isa in Isa::available() {
            let mut rounded = x.clone();
            crate::round_int8::part(isa, &mut rounded, 320);
            let words = levels(isa, Precision::Byte, &x, &[0, 320]);
            let again = levels(isa, Precision::Byte, &rounded, &[0, 320]);
            let high = |words| Levels::new(words, 320, Precision::Byte).token(0).high;
            assert_eq!(high(&words), high(&again), "{isa}");
        }
    }
}
