//! Activations as integers, for products with weights that are integers: `x = scale * level`.
//!
//! Two precisions. [`Precision::Word`]: levels of 16 bits and a scale for every 32 columns, in two planes of
//! bytes, `level = 256 high + low`; what rounding to them loses is 2^-16 of the greatest of 32 values, below
//! what f16 caches lose. [`Precision::Byte`]: levels of 8 bits and a scale a token, for layers that were
//! trained to read them (see [`round_int8`](crate::round_int8)).
//!
//! ```text
//! Word, (k/32, t) records:   high (32,) i8 | low (32,) i8 | scale f32 | centre i32 | total f32
//! Byte, a token:             high (k,) i8 | (k,) unused | scales (k/32,) f32 | sums (k/32,) i32 | unused
//! ```
//!
//! Products take several tokens by a chunk of columns: its records lie side by side, so that one address reaches
//! all of them and they are read as one stream. A chunk's sum of levels is what a zero of the weights that is not
//! level 0 is multiplied by: as it is for 8-bit levels, so that products of them are exact; for 16-bit levels
//! times -8, the zero of most 4-bit weights, and as a float times the scale.

use std::marker::PhantomData;
use std::ops::Range;

use crate::isa::{Isa, per_isa};
use crate::lanes;
use crate::linear::lookup;
use crate::round_int8::{LEAST_EXTREME, MAX_LEVEL};
use crate::team::SharedSlice;

/// Columns that share a scale, and a sum.
pub const CHUNK_COLS: usize = 32;
/// 16-bit levels of 32 columns of a token, `256 high + low`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Record {
    pub(crate) high: [i8; CHUNK_COLS],
    pub(crate) low: [i8; CHUNK_COLS],
    pub(crate) scale: f32,
    /// -8 times the sum of the levels.
    pub(crate) centre: i32,
    /// The sum of the levels times their scale.
    pub(crate) total: f32,
}

/// Words of f32 that hold a chunk of a token.
const CHUNK_WORDS: usize = size_of::<Record>() / size_of::<f32>();

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
    /// Tokens at the start that are passed over.
    skipped: usize,
    /// What products look up: see [`lookup`].
    tables: Option<&'a [f32]>,
}

/// 8-bit levels of one token.
pub(crate) struct Token<'a> {
    pub(crate) high: &'a [i8],
    pub(crate) scales: &'a [f32],
    pub(crate) sums: &'a [i32],
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
            skipped: 0,
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
        self.words.len() / token_words(self.cols) - self.skipped
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
        let skipped = self.tokens().checked_sub(tokens);
        Levels {
            skipped: self.skipped + skipped.expect("levels: more tokens than there are"),
            tables: None,
            ..*self
        }
    }

    /// Records of the first chunk from `token` on, and how many records further those of the next chunk are.
    ///
    /// # Panics
    /// If there is no such token, or the levels have 8 bits.
    pub(crate) fn records(&self, token: usize) -> (&'a [Record], usize) {
        assert!(
            self.precision == Precision::Word && token < self.tokens(),
            "levels: no 16-bit levels of token {token}"
        );
        let all = self.words.as_ptr().cast::<Record>();
        let len = self.words.len() / CHUNK_WORDS;
        // SAFETY: the words are records, of integers and floats: any bits are good.
        let all = unsafe { std::slice::from_raw_parts(all, len) };
        (&all[self.skipped + token..], self.skipped + self.tokens())
    }

    /// Bytes from a token with 8-bit levels to the next.
    pub(crate) fn token_bytes(&self) -> usize {
        token_words(self.cols) * size_of::<f32>()
    }

    /// The 8-bit levels of a token and what comes behind them, the next tokens among it.
    ///
    /// # Panics
    /// If there is no such token, or the levels have 16 bits.
    pub(crate) fn bytes(&self, token: usize) -> &'a [i8] {
        assert!(
            self.precision == Precision::Byte,
            "levels: 16 bits where 8 are read"
        );
        let words = &self.words[(self.skipped + token) * token_words(self.cols)..];
        // SAFETY: any bits of an f32 are four i8.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<i8>(), size_of_val(words)) }
    }

    /// The 8-bit levels of a token.
    ///
    /// # Panics
    /// As [`Levels::bytes`].
    pub(crate) fn token(&self, token: usize) -> Token<'a> {
        let high = &self.bytes(token)[..self.cols];
        let chunks = self.cols / CHUNK_COLS;
        let start = (self.skipped + token) * token_words(self.cols) + self.cols / 2;
        let (scales, rest) = self.words[start..].split_at(chunks);
        // SAFETY: any bits of an f32 are one i32.
        let sums = unsafe { std::slice::from_raw_parts(rest[..chunks].as_ptr().cast(), chunks) };
        Token { high, scales, sums }
    }

    /// A level and its scale.
    #[cfg(test)]
    pub(crate) fn level(&self, token: usize, col: usize) -> (i32, f32) {
        let (chunk, i) = (col / CHUNK_COLS, col % CHUNK_COLS);
        match self.precision {
            Precision::Byte => {
                let token = self.token(token);
                (i32::from(token.high[col]), token.scales[chunk])
            }
            Precision::Word => {
                let (records, stride) = self.records(token);
                let record = &records[chunk * stride];
                let level = 256 * i32::from(record.high[i]) + i32::from(record.low[i]);
                (level, record.scale)
            }
        }
    }
}

/// Every `stride`-th of some records, to write.
pub(crate) struct Records<'a> {
    start: *mut Record,
    stride: usize,
    len: usize,
    words: PhantomData<&'a mut [f32]>,
}

impl Records<'_> {
    /// Those of a chunk and the ones behind it.
    fn each(&mut self) -> impl Iterator<Item = &mut Record> {
        (0..self.len).map(|i| {
            // SAFETY: what it was made with.
            unsafe { &mut *self.start.add(i * self.stride) }
        })
    }
}

/// Rounds `x`, the columns `cols` of token `token`, into its levels among those of all tokens, `words`
/// `(t, token_words(k))`. Columns are cut at multiples of 32; with [`Precision::Byte`] they are the whole token.
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
    k: usize,
    token: usize,
    cols: Range<usize>,
) {
    let tokens = words.len() / token_words(k);
    assert!(
        words.len() == tokens * token_words(k)
            && token < tokens
            && x.len() == cols.len()
            && cols.end <= k
            && cols.start.is_multiple_of(CHUNK_COLS)
            && cols.end.is_multiple_of(CHUNK_COLS)
            && (precision == Precision::Word || cols == (0..k)),
        "levels: token {token} of {tokens} of {k} columns"
    );
    if x.is_empty() {
        return;
    }
    if precision == Precision::Word {
        let first = (cols.start / CHUNK_COLS * tokens + token) * CHUNK_WORDS;
        let len = cols.len() / CHUNK_COLS;
        let end = first + ((len - 1) * tokens + 1) * CHUNK_WORDS;
        let records = Records {
            start: words.part(first..end).as_mut_ptr().cast(),
            stride: tokens,
            len,
            words: PhantomData,
        };
        return to_words(isa, x, records);
    }
    let start = token * token_words(k);
    let first_scale = start + k / 2;
    let first_sum = first_scale + k / CHUNK_COLS;
    // SAFETY: the caller keeps others away from this token, and the three ranges are apart; any bits of an f32
    // are four i8, and one i32.
    unsafe {
        let high = words.slice_mut(start..start + k / 4);
        let high = std::slice::from_raw_parts_mut(high.as_mut_ptr().cast::<i8>(), k);
        let scales = words.slice_mut(first_scale..first_sum);
        let sums = words.slice_mut(first_sum..first_sum + k / CHUNK_COLS);
        let sums = std::slice::from_raw_parts_mut(sums.as_mut_ptr().cast::<i32>(), sums.len());
        to_bytes(isa, x, high, scales, sums);
    }
}

per_isa!(fn to_words(x: &[f32], records: Records<'_>) = to_words_body);
per_isa!(fn to_bytes(x: &[f32], high: &mut [i8], scales: &mut [f32], sums: &mut [i32]) = to_bytes_body);

/// Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
const ROUND: f32 = 12_582_912.0;

/// The integer nearest to `value`, which is far below 2^22.
#[inline(always)]
fn nearest(value: f32) -> i32 {
    (value + ROUND).to_bits() as i32 - ROUND.to_bits() as i32
}

/// Of the levels of a chunk.
#[inline(always)]
fn sum(levels: &[i32; CHUNK_COLS]) -> i32 {
    let halves = levels.as_chunks::<16>().0;
    let lanes = std::array::from_fn(|i| halves[0][i] + halves[1][i]);
    lanes::fold(lanes, |a, b| a + b)
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
    let greater = |m: f32, x: f32| if x.abs() > m { x.abs() } else { m };
    rest.iter()
        .copied()
        .fold(lanes::fold(lanes, greater), greater)
}

#[inline(always)]
fn to_words_body<const FMA: bool>(x: &[f32], mut records: Records<'_>) {
    for (x, record) in x.as_chunks::<CHUNK_COLS>().0.iter().zip(records.each()) {
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
        let planes = record.high.iter_mut().zip(&mut record.low);
        for ((high, low), level) in planes.zip(levels) {
            *high = ((level + 128) >> 8) as i8;
            *low = level as i8;
        }
        let sum = sum(&levels);
        record.scale = extreme / MAX_WORD;
        record.centre = -8 * sum;
        record.total = record.scale * sum as f32;
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
        *sum = self::sum(&levels);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    /// Levels of `x` `(t, k)`.
    fn levels(isa: Isa, precision: Precision, x: &[f32], k: usize, cuts: &[usize]) -> Vec<f32> {
        let tokens = x.len() / k;
        let mut words = vec![f32::NAN; tokens * token_words(k)];
        let shared = SharedSlice::new(&mut words);
        for (token, pair) in (0..tokens).flat_map(|t| cuts.windows(2).map(move |pair| (t, pair))) {
            let x = &x[token * k..][pair[0]..pair[1]];
            // SAFETY: one thread.
            unsafe { part(isa, precision, x, shared, k, token, pair[0]..pair[1]) };
        }
        words
    }

    #[test]
    fn words_are_close_and_bytes_are_the_rounding_of_ternary_layers() {
        let mut random = Random::new(21);
        let (tokens, k) = (3, 160);
        let mut x = random.floats(tokens * k, 3.0);
        x[40] = 900.0;
        x[64..96].fill(0.0);
        let mut rounded = x.clone();
        crate::round_int8::reference(&mut rounded, k);
        for isa in Isa::available() {
            let words = levels(isa, Precision::Word, &x, k, &[0, 64, 96, k]);
            let all = Levels::new(&words, k, Precision::Word);
            for (i, x) in x.iter().enumerate() {
                let (level, scale) = all.level(i / k, i % k);
                let error = (scale * level as f32 - x).abs();
                assert!(error <= 0.501 * scale, "{isa} {i}");
                assert_eq!(
                    all.last(1).level(0, i % k),
                    all.level(2, i % k),
                    "{isa} {i}"
                );
            }
            for (token, chunk) in (0..tokens).flat_map(|t| (0..k / 32).map(move |c| (t, c))) {
                let (records, stride) = all.records(token);
                let record = records[chunk * stride];
                let sum: i32 = (0..32).map(|i| all.level(token, 32 * chunk + i).0).sum();
                assert_eq!(record.centre, -8 * sum, "{isa} {token} {chunk}");
                assert_eq!(
                    record.total,
                    record.scale * sum as f32,
                    "{isa} {token} {chunk}"
                );
            }

            let words = levels(isa, Precision::Byte, &x, k, &[0, k]);
            let all = Levels::new(&words, k, Precision::Byte);
            for (i, rounded) in rounded.iter().enumerate() {
                let (level, scale) = all.level(i / k, i % k);
                let error = (scale * level as f32 - rounded).abs();
                assert!(error <= 1e-6 * rounded.abs(), "{isa} {i}");
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
            let words = levels(isa, Precision::Byte, &x, 320, &[0, 320]);
            let again = levels(isa, Precision::Byte, &rounded, 320, &[0, 320]);
            let high = |words| Levels::new(words, 320, Precision::Byte).token(0).high;
            assert_eq!(high(&words), high(&again), "{isa}");
        }
    }
}
