//! AVX-512, with and without VNNI.

use std::arch::x86_64::*;

use half::f16;

use super::kernel::{Call, Vector};
use super::{LINE_BYTES, STEP_COLS, STEPS};

/// `vpdpbusd`: four products and their sum in one instruction.
struct Vnni;
/// Without it: `vpmaddubsw` adds pairs to 16 bits, in which a chunk of 4-bit levels fits.
struct Plain;

/// # Safety
/// As [`Call::run`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn run_vnni(call: &Call<'_>) {
    // SAFETY: the caller's contract.
    unsafe { call.run::<Vnni>() }
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
        const TOKENS: usize = 6;

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

impl Vector for Vnni {
    floats_of_a_register!();

    #[inline(always)]
    unsafe fn dots<const BITS: usize, const T: usize>(
        lines: *const u8,
        levels: [*const i8; T],
        mut sums: [__m512i; T],
    ) -> [__m512i; T] {
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
                    for t in 0..T {
                        let x = step(levels[t], line * per_line + p);
                        sums[t] = _mm512_dpbusd_epi32(sums[t], weights, x);
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
    unsafe fn dots<const BITS: usize, const T: usize>(
        lines: *const u8,
        levels: [*const i8; T],
        mut sums: [__m512i; T],
    ) -> [__m512i; T] {
        let per_line = STEPS / BITS;
        // SAFETY: `BITS` lines, 32 levels. 16 products of at most 15 * 128 fit 16 bits: 8-bit levels go as
        // two nibbles.
        unsafe {
            let mut pairs = [_mm512_setzero_si512(); T];
            let mut pairs_of_16 = [_mm512_setzero_si512(); T];
            for line in 0..BITS {
                let bytes = _mm512_load_si512(lines.add(line * LINE_BYTES).cast());
                for p in 0..per_line {
                    let mask = if BITS == 2 { 3 } else { 15 };
                    let shift = if BITS == 8 { 0 } else { p * BITS };
                    let weights = field(bytes, shift, mask);
                    for t in 0..T {
                        let x = step(levels[t], line * per_line + p);
                        pairs[t] = _mm512_add_epi16(pairs[t], _mm512_maddubs_epi16(weights, x));
                        if BITS == 8 {
                            let products = _mm512_maddubs_epi16(field(bytes, 4, 15), x);
                            pairs_of_16[t] = _mm512_add_epi16(pairs_of_16[t], products);
                        }
                    }
                }
            }
            for t in 0..T {
                let ones = _mm512_madd_epi16(pairs[t], _mm512_set1_epi16(1));
                sums[t] = _mm512_add_epi32(sums[t], ones);
                if BITS == 8 {
                    let sixteens = _mm512_madd_epi16(pairs_of_16[t], _mm512_set1_epi16(16));
                    sums[t] = _mm512_add_epi32(sums[t], sixteens);
                }
            }
        }
        sums
    }
}
