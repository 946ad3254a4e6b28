//! AVX-512: 16 values are one 32-byte load and one conversion; a mask takes the rest of a row.

use std::arch::x86_64::*;

use half::f16;

use super::rows::{KEYS, Vector, of_features};

struct Avx512;
of_features!(Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");

/// Mask of the first `len` lanes.
#[inline(always)]
fn mask(len: usize) -> __mmask16 {
    ((1u32 << len) - 1) as __mmask16
}

impl Vector for Avx512 {
    type Floats = __m512;
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: the caller has AVX-512; so for all below.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(at: *const f32, len: usize) -> __m512 {
        // SAFETY: masked lanes are not read; so for all below.
        unsafe { _mm512_maskz_loadu_ps(mask(len), at) }
    }

    #[inline(always)]
    unsafe fn load_f16(at: *const f16, len: usize) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(len), at.cast())) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn store(floats: __m512, at: *mut f32, len: usize) {
        // SAFETY: masked lanes are not written.
        unsafe { _mm512_mask_storeu_ps(at, mask(len), floats) };
    }

    #[inline(always)]
    unsafe fn sums(of: [__m512; KEYS]) -> [f32; KEYS] {
        let mut sums = [0.0; KEYS];
        // SAFETY: as above; four floats.
        unsafe {
            // No closure: it would be compiled without these instructions, and called.
            let mut halves = [_mm256_setzero_ps(); KEYS];
            for (half, v) in halves.iter_mut().zip(of) {
                *half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            }
            let [a, b, c, d] = halves;
            let quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let (low, high) = (
                _mm256_castps256_ps128(quads),
                _mm256_extractf128_ps::<1>(quads),
            );
            _mm_storeu_ps(sums.as_mut_ptr(), _mm_add_ps(low, high));
        }
        sums
    }
}
