//! NEON: four values at a time; the rest of a row goes through memory.

use std::arch::aarch64::*;

use half::f16;

use super::rows::{KEYS, Vector, of_features};
use crate::sdot::fcvtl;

struct Neon;
of_features!(Neon, "neon");

impl Vector for Neon {
    type Floats = float32x4_t;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn splat(value: f32) -> float32x4_t {
        // SAFETY: every AArch64 CPU has NEON; so for all below.
        unsafe { vdupq_n_f32(value) }
    }

    #[inline(always)]
    unsafe fn load(at: *const f32, len: usize) -> float32x4_t {
        // SAFETY: `len` numbers.
        unsafe {
            if len == Self::LANES {
                return vld1q_f32(at);
            }
            let mut rest = [0.0; Self::LANES];
            std::ptr::copy_nonoverlapping(at, rest.as_mut_ptr(), len);
            vld1q_f32(rest.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn load_f16(at: *const f16, len: usize) -> float32x4_t {
        // SAFETY: as above.
        unsafe {
            if len == Self::LANES {
                return fcvtl(vld1_u16(at.cast()));
            }
            let mut rest = [f16::ZERO; Self::LANES];
            std::ptr::copy_nonoverlapping(at, rest.as_mut_ptr(), len);
            fcvtl(vld1_u16(rest.as_ptr().cast()))
        }
    }

    #[inline(always)]
    unsafe fn mul_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: as above.
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    unsafe fn store(floats: float32x4_t, at: *mut f32, len: usize) {
        // SAFETY: room for `len` numbers.
        unsafe {
            if len == Self::LANES {
                return vst1q_f32(at, floats);
            }
            let mut rest = [0.0; Self::LANES];
            vst1q_f32(rest.as_mut_ptr(), floats);
            std::ptr::copy_nonoverlapping(rest.as_ptr(), at, len);
        }
    }

    #[inline(always)]
    unsafe fn sums(of: [float32x4_t; KEYS]) -> [f32; KEYS] {
        let mut sums = [0.0; KEYS];
        // SAFETY: as above; four floats.
        unsafe {
            let [a, b, c, d] = of;
            let quads = vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
            vst1q_f32(sums.as_mut_ptr(), quads);
        }
        sums
    }
}
