//! AVX-512, with and without VNNI.

use std::arch::x86_64::*;

use half::f16;

use super::forms;
use super::kernel::{Call, Vector, ahead};
use super::lookup::TABLES_OF_LINE;
use super::{FIVES_COLS, LINE_BYTES, STEP_COLS, STEPS, TILE_ROWS};
use crate::levels::Record;
use crate::pages::Line;

/// `vpdpbusd`: four products and their sum in one instruction. With VBMI (`vpermi2b`, a table of 128 bytes)
/// five weights a byte are taken apart, with VBMI2 (`vpshldd`) sums of two planes shifted and filled up.
struct Vnni<const VBMI: bool>;
/// Without it: `vpmaddubsw` adds pairs to 16 bits, in which a chunk of 4-bit levels fits.
struct Plain;

/// # Safety
/// As [`Call::run`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn run_vnni(call: &Call<'_>) {
    // SAFETY: the caller's contract.
    unsafe { call.run::<Vnni<false>>() }
}

/// # Safety
/// As [`Call::run`].
#[target_feature(
    enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,fma,f16c"
)]
pub(super) unsafe fn run_vbmi(call: &Call<'_>) {
    // SAFETY: the caller's contract.
    unsafe { call.run::<Vnni<true>>() }
}

/// # Safety
/// As [`Call::run`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn run(call: &Call<'_>) {
    // SAFETY: the caller's contract.
    unsafe { call.run::<Plain>() }
}

/// The four levels of a step in every row.
#[inline(always)]
unsafe fn step(levels: *const i8, step: usize) -> __m512i {
    // SAFETY: a step of the 32 levels.
    unsafe { _mm512_set1_epi32(levels.add(step * STEP_COLS).cast::<i32>().read_unaligned()) }
}

/// `line` shifted down by `bits` and masked.
#[inline(always)]
unsafe fn field(line: __m512i, bits: usize, mask: i8) -> __m512i {
    // SAFETY: the caller has AVX-512.
    unsafe {
        let shifted = match bits {
            0 => line,
            2 => _mm512_srli_epi16::<2>(line),
            4 => _mm512_srli_epi16::<4>(line),
            _ => _mm512_srli_epi16::<6>(line),
        };
        _mm512_and_si512(shifted, _mm512_set1_epi8(mask))
    }
}

/// What both share.
macro_rules! floats_of_a_register {
    () => {
        type Ints = __m512i;
        type Floats = __m512;
        const TOKENS: usize = 8;

        #[inline(always)]
        unsafe fn by_row(lines: *const u8) -> [Line; 2] {
            let mut rows = [Line([0; LINE_BYTES]); 2];
            for (line, rows) in rows.iter_mut().enumerate() {
                // SAFETY: a line, and as many bytes to write; the caller has AVX-512, so for all below.
                unsafe {
                    let bytes = _mm512_load_si512(lines.add(line * LINE_BYTES).cast());
                    // Four rows of each column to a lane, then the columns of a row together.
                    let lanes =
                        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                    let cols = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
                    let bytes = _mm512_permutexvar_epi32(lanes, bytes);
                    let bytes = _mm512_shuffle_epi8(bytes, _mm512_broadcast_i32x4(cols));
                    _mm512_store_si512(rows.0.as_mut_ptr().cast(), bytes);
                }
            }
            rows
        }

        #[inline(always)]
        unsafe fn look_up(lines: *const u8, tables: *const u8, chunks: usize) -> __m512i {
            // A chunk adds four sums of at most 16 to a byte, at most 17 * 64 to a word: 30 chunks fit one.
            const CHUNKS: usize = 30;
            // SAFETY: two lines a chunk, and their tables.
            unsafe {
                let nibble = _mm512_set1_epi8(15);
                // Bytes 16 and 1.
                let places = _mm512_set1_epi16(0x0110);
                let mut sums = [_mm256_setzero_si256(); 2];
                let mut chunk = 0;
                while chunk < chunks {
                    // Rows 0 to 7 and 8 to 15, of four columns.
                    let mut words = [_mm512_setzero_si512(); 2];
                    for chunk in chunk..(chunk + CHUNKS).min(chunks) {
                        ahead::<2>(lines.add(chunk * 2 * LINE_BYTES));
                        let (mut high, mut low) = (_mm512_setzero_si512(), _mm512_setzero_si512());
                        for line in [2 * chunk, 2 * chunk + 1] {
                            let bytes = _mm512_load_si512(lines.add(line * LINE_BYTES).cast());
                            let tables = tables.add(line * TABLES_OF_LINE);
                            let table = |which: usize| {
                                _mm512_loadu_si512(tables.add(which * LINE_BYTES).cast())
                            };
                            let first = _mm512_and_si512(bytes, nibble);
                            let second = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), nibble);
                            high = _mm512_add_epi8(high, _mm512_shuffle_epi8(table(0), first));
                            low = _mm512_add_epi8(low, _mm512_shuffle_epi8(table(1), first));
                            high = _mm512_add_epi8(high, _mm512_shuffle_epi8(table(2), second));
                            low = _mm512_add_epi8(low, _mm512_shuffle_epi8(table(3), second));
                        }
                        let both = [
                            _mm512_unpacklo_epi8(high, low),
                            _mm512_unpackhi_epi8(high, low),
                        ];
                        for (words, both) in words.iter_mut().zip(both) {
                            *words = _mm512_add_epi16(*words, _mm512_maddubs_epi16(places, both));
                        }
                    }
                    for (sum, words) in sums.iter_mut().zip(words) {
                        for col in [
                            _mm512_castsi512_si128(words),
                            _mm512_extracti32x4_epi32::<1>(words),
                            _mm512_extracti32x4_epi32::<2>(words),
                            _mm512_extracti32x4_epi32::<3>(words),
                        ] {
                            *sum = _mm256_add_epi32(*sum, _mm256_cvtepi16_epi32(col));
                        }
                    }
                    chunk += CHUNKS;
                }
                _mm512_inserti64x4::<1>(_mm512_castsi256_si512(sums[0]), sums[1])
            }
        }

        #[inline(always)]
        unsafe fn load_ints(numbers: &[i32; TILE_ROWS]) -> __m512i {
            // SAFETY: 16 numbers.
            unsafe { _mm512_loadu_si512(numbers.as_ptr().cast()) }
        }

        #[inline(always)]
        unsafe fn ints(value: i32) -> __m512i {
            // SAFETY: the caller has AVX-512; so for all below.
            unsafe { _mm512_set1_epi32(value) }
        }

        #[inline(always)]
        unsafe fn add(a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_add_epi32(a, b) }
        }

        #[inline(always)]
        unsafe fn join(a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_add_epi32(_mm512_slli_epi32::<8>(a), b) }
        }

        #[inline(always)]
        unsafe fn to_floats(ints: __m512i) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_cvtepi32_ps(ints) }
        }

        #[inline(always)]
        unsafe fn floats(value: f32) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_mul_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        unsafe fn load_f16(numbers: *const f16) -> __m512 {
            // SAFETY: as above, and 16 numbers.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(numbers.cast())) }
        }

        #[inline(always)]
        unsafe fn load_f32(numbers: *const f32) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_loadu_ps(numbers) }
        }

        #[inline(always)]
        unsafe fn store(floats: __m512, to: *mut f32) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_ps(to, floats) };
        }
    };
}

/// Fours of ternary levels, `u0 + 3 u1 + 9 u2 + 27 u3`, as two bits each.
static FOURS: [u8; 128] = {
    let mut fours = [0; 128];
    let mut i = 0;
    while i < 81 {
        fours[i] = (i % 3 + (i / 3 % 3) * 4 + (i / 9 % 3) * 16 + i / 27 * 64) as u8;
        i += 1;
    }
    fours
};

impl<const VBMI: bool> Vector for Vnni<VBMI> {
    floats_of_a_register!();

    #[inline(always)]
    unsafe fn fives<const T: usize>(
        line: *const u8,
        levels: [*const i8; T],
        mut sums: [__m512i; T],
    ) -> [__m512i; T] {
        if !VBMI {
            let mut ints = [[0; TILE_ROWS]; T];
            // SAFETY: the caller's contract.
            unsafe {
                forms::fives(line, levels, &mut ints);
                return std::array::from_fn(|t| Self::add(sums[t], Self::load_ints(&ints[t])));
            }
        }
        // SAFETY: a line, 20 levels.
        unsafe {
            let bytes = _mm512_load_si512(line.cast());
            let power = _mm512_set1_epi8(81);
            // What is less wraps around to more.
            let below = |bytes| _mm512_min_epu8(bytes, _mm512_sub_epi8(bytes, power));
            let rest = below(below(bytes));
            // 0, 81 or 162: the last two bits are its level.
            let last = _mm512_and_si512(_mm512_sub_epi8(bytes, rest), _mm512_set1_epi8(3));
            let table = |half: usize| _mm512_loadu_si512(FOURS.as_ptr().add(64 * half).cast());
            let fours = _mm512_permutex2var_epi8(table(0), rest, table(1));
            for p in 0..FIVES_COLS / STEP_COLS {
                let weights = match p {
                    4 => last,
                    _ => field(fours, 2 * p, 3),
                };
                for t in 0..T {
                    sums[t] = _mm512_dpbusd_epi32(sums[t], weights, step(levels[t], p));
                }
            }
        }
        sums
    }

    /// A chunk's weights stay in registers for both planes, so that a token has one sum: of the high plane,
    /// shifted, then of the low one too.
    #[inline(always)]
    unsafe fn words<const BITS: usize, const T: usize, const CENTRED: bool>(
        lines: *const u8,
        records: *const Record,
    ) -> [__m512i; T] {
        let per_line = STEPS / BITS;
        // SAFETY: `BITS` lines, `T` records.
        unsafe {
            let zero = _mm512_setzero_si512();
            let (mut weights, mut sums) = ([zero; STEPS], [zero; T]);
            for line in 0..BITS {
                let bytes = _mm512_load_si512(lines.add(line * LINE_BYTES).cast());
                for p in 0..per_line {
                    weights[line * per_line + p] = match BITS {
                        8 => bytes,
                        _ => field(bytes, p * BITS, ((1u32 << BITS) - 1) as i8),
                    };
                }
            }
            let centre = |t: usize| (&raw const (*records.wrapping_add(t)).centre).cast::<i8>();
            if CENTRED && VBMI {
                for (t, sum) in sums.iter_mut().enumerate() {
                    // Its upper three bytes and one of what follows, which the shift below drops.
                    *sum = step(centre(t).wrapping_add(1), 0);
                }
            }
            for (i, weights) in weights.iter().enumerate() {
                for (t, sum) in sums.iter_mut().enumerate() {
                    let high = (&raw const (*records.wrapping_add(t)).high).cast();
                    *sum = _mm512_dpbusd_epi32(*sum, *weights, step(high, i));
                }
            }
            for (t, sum) in sums.iter_mut().enumerate() {
                *sum = match (CENTRED, VBMI) {
                    // Its lowest byte comes in from above, behind three of what precedes it.
                    (true, true) => {
                        _mm512_shldi_epi32::<8>(*sum, step(centre(t).wrapping_sub(3), 0))
                    }
                    (true, false) => Self::join(*sum, step(centre(t), 0)),
                    (false, _) => _mm512_slli_epi32::<8>(*sum),
                };
            }
            for (i, weights) in weights.iter().enumerate() {
                for (t, sum) in sums.iter_mut().enumerate() {
                    let low = (&raw const (*records.wrapping_add(t)).low).cast();
                    *sum = _mm512_dpbusd_epi32(*sum, *weights, step(low, i));
                }
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn dots<const BITS: usize, const T: usize, const P: usize>(
        lines: *const u8,
        levels: [[*const i8; T]; P],
        mut sums: [[__m512i; T]; P],
    ) -> [[__m512i; T]; P] {
        let per_line = STEPS / BITS;
        // SAFETY: `BITS` lines, 32 levels.
        unsafe {
            for line in 0..BITS {
                let bytes = _mm512_load_si512(lines.add(line * LINE_BYTES).cast());
                for p in 0..per_line {
                    let weights = match BITS {
                        8 => bytes,
                        _ => field(bytes, p * BITS, ((1u32 << BITS) - 1) as i8),
                    };
                    for (sums, levels) in sums.iter_mut().zip(levels) {
                        for (sum, levels) in sums.iter_mut().zip(levels) {
                            let x = step(levels, line * per_line + p);
                            *sum = _mm512_dpbusd_epi32(*sum, weights, x);
                        }
                    }
                }
            }
        }
        sums
    }
}

impl Vector for Plain {
    floats_of_a_register!();

    #[inline(always)]
    unsafe fn dots<const BITS: usize, const T: usize, const P: usize>(
        lines: *const u8,
        levels: [[*const i8; T]; P],
        mut sums: [[__m512i; T]; P],
    ) -> [[__m512i; T]; P] {
        let per_line = STEPS / BITS;
        // SAFETY: `BITS` lines, 32 levels. 16 products of at most 15 * 128 fit 16 bits: 8-bit levels go as
        // two nibbles.
        unsafe {
            let mut pairs = [[_mm512_setzero_si512(); T]; P];
            let mut pairs_of_16 = [[_mm512_setzero_si512(); T]; P];
            for line in 0..BITS {
                let bytes = _mm512_load_si512(lines.add(line * LINE_BYTES).cast());
                for p in 0..per_line {
                    let mask = if BITS == 2 { 3 } else { 15 };
                    let shift = if BITS == 8 { 0 } else { p * BITS };
                    let weights = field(bytes, shift, mask);
                    for (plane, t) in (0..P * T).map(|i| (i / T, i % T)) {
                        let x = step(levels[plane][t], line * per_line + p);
                        let ones = &mut pairs[plane][t];
                        *ones = _mm512_add_epi16(*ones, _mm512_maddubs_epi16(weights, x));
                        if BITS == 8 {
                            let sixteens = &mut pairs_of_16[plane][t];
                            let products = _mm512_maddubs_epi16(field(bytes, 4, 15), x);
                            *sixteens = _mm512_add_epi16(*sixteens, products);
                        }
                    }
                }
            }
            for (plane, t) in (0..P * T).map(|i| (i / T, i % T)) {
                let sum = &mut sums[plane][t];
                let ones = _mm512_madd_epi16(pairs[plane][t], _mm512_set1_epi16(1));
                *sum = _mm512_add_epi32(*sum, ones);
                if BITS == 8 {
                    let sixteens = pairs_of_16[plane][t];
                    let sixteens = _mm512_madd_epi16(sixteens, _mm512_set1_epi16(16));
                    *sum = _mm512_add_epi32(*sum, sixteens);
                }
            }
        }
        sums
    }
}
