//! AVX2: `vpmaddubsw` adds pairs to 16 bits, in which a chunk of 4-bit levels fits.

use std::arch::x86_64::*;

use half::f16;

use super::kernel::{Call, Vector, ahead};
use super::lookup::TABLES_OF_LINE;
use super::{LINE_BYTES, STEP_COLS, STEPS, TILE_ROWS};
use crate::pages::Line;

struct Avx2;

/// # Safety
/// As [`Call::run`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run(call: &Call<'_>) {
    // SAFETY: the caller's contract.
    unsafe { call.run::<Avx2>() }
}

/// Registers for 16 rows.
const HALVES: usize = 2;

/// `line` shifted down by `bits` and masked.
#[inline(always)]
unsafe fn field(line: __m256i, bits: usize, mask: i8) -> __m256i {
    // SAFETY: the caller has AVX2.
    unsafe {
        let shifted = match bits {
            0 => line,
            2 => _mm256_srli_epi16::<2>(line),
            4 => _mm256_srli_epi16::<4>(line),
            _ => _mm256_srli_epi16::<6>(line),
        };
        _mm256_and_si256(shifted, _mm256_set1_epi8(mask))
    }
}

impl Vector for Avx2 {
    type Ints = [__m256i; HALVES];
    type Floats = [__m256; HALVES];
    const TOKENS: usize = 2;

    #[inline(always)]
    unsafe fn dots<const BITS: usize, const T: usize, const P: usize>(
        lines: *const u8,
        levels: [[*const i8; T]; P],
        mut sums: [[Self::Ints; T]; P],
    ) -> [[Self::Ints; T]; P] {
        let per_line = STEPS / BITS;
        // SAFETY: `BITS` lines, 32 levels. 16 products of at most 15 * 128 fit 16 bits: 8-bit levels go as
        // two nibbles.
        unsafe {
            for (half, start) in [0, LINE_BYTES / HALVES].into_iter().enumerate() {
                let mut pairs = [[_mm256_setzero_si256(); T]; P];
                let mut pairs_of_16 = [[_mm256_setzero_si256(); T]; P];
                for line in 0..BITS {
                    let bytes = lines.add(line * LINE_BYTES + start);
                    let bytes = _mm256_load_si256(bytes.cast());
                    for p in 0..per_line {
                        let mask = if BITS == 2 { 3 } else { 15 };
                        let shift = if BITS == 8 { 0 } else { p * BITS };
                        let weights = field(bytes, shift, mask);
                        for (plane, t) in (0..P * T).map(|i| (i / T, i % T)) {
                            let x = levels[plane][t]
                                .add((line * per_line + p) * STEP_COLS)
                                .cast::<i32>();
                            let x = _mm256_set1_epi32(x.read_unaligned());
                            let ones = &mut pairs[plane][t];
                            *ones = _mm256_add_epi16(*ones, _mm256_maddubs_epi16(weights, x));
                            if BITS == 8 {
                                let sixteens = &mut pairs_of_16[plane][t];
                                let products = _mm256_maddubs_epi16(field(bytes, 4, 15), x);
                                *sixteens = _mm256_add_epi16(*sixteens, products);
                            }
                        }
                    }
                }
                for (plane, t) in (0..P * T).map(|i| (i / T, i % T)) {
                    let sum = &mut sums[plane][t][half];
                    let ones = _mm256_madd_epi16(pairs[plane][t], _mm256_set1_epi16(1));
                    *sum = _mm256_add_epi32(*sum, ones);
                    if BITS == 8 {
                        let sixteens = pairs_of_16[plane][t];
                        let sixteens = _mm256_madd_epi16(sixteens, _mm256_set1_epi16(16));
                        *sum = _mm256_add_epi32(*sum, sixteens);
                    }
                }
            }
        }
        sums
    }

    #[inline(always)]
    unsafe fn by_row(lines: *const u8) -> [Line; 2] {
        let mut rows = [Line([0; LINE_BYTES]); 2];
        for (line, rows) in rows.iter_mut().enumerate() {
            // SAFETY: four columns of 16 rows, and as many bytes to write.
            unsafe {
                let col = |col: usize| {
                    let at = lines.add(line * LINE_BYTES + col * TILE_ROWS);
                    _mm_load_si128(at.cast())
                };
                let (a, b, c, d) = (col(0), col(1), col(2), col(3));
                let (ab, cd) = (_mm_unpacklo_epi8(a, b), _mm_unpacklo_epi8(c, d));
                let (ab2, cd2) = (_mm_unpackhi_epi8(a, b), _mm_unpackhi_epi8(c, d));
                let to: *mut __m128i = rows.0.as_mut_ptr().cast();
                _mm_store_si128(to, _mm_unpacklo_epi16(ab, cd));
                _mm_store_si128(to.add(1), _mm_unpackhi_epi16(ab, cd));
                _mm_store_si128(to.add(2), _mm_unpacklo_epi16(ab2, cd2));
                _mm_store_si128(to.add(3), _mm_unpackhi_epi16(ab2, cd2));
            }
        }
        rows
    }

    #[inline(always)]
    unsafe fn look_up(lines: *const u8, tables: *const u8, chunks: usize) -> Self::Ints {
        // A line adds four sums of at most 16 to a byte, at most 17 * 64 to a word: 30 lines fit one.
        const LINES: usize = 30;
        // SAFETY: two lines a chunk, and their tables.
        unsafe {
            let nibble = _mm256_set1_epi8(15);
            // Bytes 16 and 1.
            let places = _mm256_set1_epi16(0x0110);
            let mut sums = [_mm256_setzero_si256(); HALVES];
            let end = 2 * chunks;
            let mut line = 0;
            while line < end {
                // Rows 0 to 7 and 8 to 15, of two columns.
                let mut words = [_mm256_setzero_si256(); 2];
                for line in line..(line + LINES).min(end) {
                    let codes = lines.add(line * LINE_BYTES);
                    ahead::<1>(codes);
                    let tables = tables.add(line * TABLES_OF_LINE);
                    let (mut high, mut low) = (_mm256_setzero_si256(), _mm256_setzero_si256());
                    for half in 0..2 {
                        let at = half * (LINE_BYTES / 2);
                        let bytes = _mm256_load_si256(codes.add(at).cast());
                        let table = |which: usize| {
                            _mm256_loadu_si256(tables.add(which * LINE_BYTES + at).cast())
                        };
                        let first = _mm256_and_si256(bytes, nibble);
                        let second = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble);
                        high = _mm256_add_epi8(high, _mm256_shuffle_epi8(table(0), first));
                        low = _mm256_add_epi8(low, _mm256_shuffle_epi8(table(1), first));
                        high = _mm256_add_epi8(high, _mm256_shuffle_epi8(table(2), second));
                        low = _mm256_add_epi8(low, _mm256_shuffle_epi8(table(3), second));
                    }
                    let both = [
                        _mm256_unpacklo_epi8(high, low),
                        _mm256_unpackhi_epi8(high, low),
                    ];
                    for (words, both) in words.iter_mut().zip(both) {
                        *words = _mm256_add_epi16(*words, _mm256_maddubs_epi16(places, both));
                    }
                }
                for (sum, words) in sums.iter_mut().zip(words) {
                    for col in [
                        _mm256_castsi256_si128(words),
                        _mm256_extracti128_si256::<1>(words),
                    ] {
                        *sum = _mm256_add_epi32(*sum, _mm256_cvtepi16_epi32(col));
                    }
                }
                line += LINES;
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn load_ints(numbers: &[i32; TILE_ROWS]) -> Self::Ints {
        let at: *const __m256i = numbers.as_ptr().cast();
        // SAFETY: 16 numbers.
        unsafe { [_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))] }
    }

    #[inline(always)]
    unsafe fn ints(value: i32) -> Self::Ints {
        // SAFETY: the caller has AVX2; so for all below.
        unsafe { [_mm256_set1_epi32(value); HALVES] }
    }

    #[inline(always)]
    unsafe fn add(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        // SAFETY: as above.
        unsafe { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn join(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        // SAFETY: as above.
        unsafe {
            [
                _mm256_add_epi32(_mm256_slli_epi32::<8>(a[0]), b[0]),
                _mm256_add_epi32(_mm256_slli_epi32::<8>(a[1]), b[1]),
            ]
        }
    }

    #[inline(always)]
    unsafe fn to_floats(ints: Self::Ints) -> Self::Floats {
        // SAFETY: as above.
        unsafe { [_mm256_cvtepi32_ps(ints[0]), _mm256_cvtepi32_ps(ints[1])] }
    }

    #[inline(always)]
    unsafe fn floats(value: f32) -> Self::Floats {
        // SAFETY: as above.
        unsafe { [_mm256_set1_ps(value); HALVES] }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: as above.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        // SAFETY: as above.
        unsafe {
            [
                _mm256_fmadd_ps(a[0], b[0], c[0]),
                _mm256_fmadd_ps(a[1], b[1], c[1]),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_f16(numbers: *const f16) -> Self::Floats {
        // SAFETY: as above, and 16 numbers.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(numbers.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(numbers.add(8).cast())),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_f32(numbers: *const f32) -> Self::Floats {
        // SAFETY: as above.
        unsafe { [_mm256_loadu_ps(numbers), _mm256_loadu_ps(numbers.add(8))] }
    }

    #[inline(always)]
    unsafe fn store(floats: Self::Floats, to: *mut f32) {
        // SAFETY: as above.
        unsafe {
            _mm256_storeu_ps(to, floats[0]);
            _mm256_storeu_ps(to.add(8), floats[1]);
        }
    }
}
