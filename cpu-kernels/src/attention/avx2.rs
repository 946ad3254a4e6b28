//! AVX2 with F16C: 8 values are one 16-byte load and one conversion; the rest of a row goes through memory.

use std::arch::x86_64::*;

use half::f16;

use super::rows::{KEYS, Vector, of_features};

struct Avx2;
of_features!(Avx2, "avx2,fma,f16c");

impl Vector for Avx2 {
    type Floats = __m256;
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        // SAFETY: the caller has AVX2; so for all below.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(at: *const f32, len: usize) -> __m256 {
        // SAFETY: `len` numbers.
        unsafe {
            if len == Self::LANES {
                return _mm256_loadu_ps(at);
            }
            let mut rest = [0.0; Self::LANES];
            std::ptr::copy_nonoverlapping(at, rest.as_mut_ptr(), len);
            _mm256_loadu_ps(rest.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn load_f16(at: *const f16, len: usize) -> __m256 {
        // SAFETY: as above.
        unsafe {
            if len == Self::LANES {
                return _mm256_cvtph_ps(_mm_loadu_si128(at.cast()));
            }
            let mut rest = [f16::ZERO; Self::LANES];
            std::ptr::copy_nonoverlapping(at, rest.as_mut_ptr(), len);
            _mm256_cvtph_ps(_mm_loadu_si128(rest.as_ptr().cast()))
        }
    }

    #[inline(always)]
    unsafe fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: as above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn store(floats: __m256, at: *mut f32, len: usize) {
        // SAFETY: room for `len` numbers.
        unsafe {
            if len == Self::LANES {
                return _mm256_storeu_ps(at, floats);
            }
            let mut rest = [0.0; Self::LANES];
            _mm256_storeu_ps(rest.as_mut_ptr(), floats);
            std::ptr::copy_nonoverlapping(rest.as_ptr(), at, len);
        }
    }

    #[inline(always)]
    unsafe fn sums(of: [__m256; KEYS]) -> [f32; KEYS] {
        let mut sums = [0.0; KEYS];
        // SAFETY: as above; four floats.
        unsafe {
            let [a, b, c, d] = of;
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
