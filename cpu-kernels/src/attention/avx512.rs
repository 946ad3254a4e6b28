//! Dot products and weighted sums over f16 rows for AVX-512: 16 values are one 32-byte load and one
//! conversion; a mask takes the rest of a row.

use std::arch::x86_64::*;

use half::f16;

use crate::lanes::LANES;

/// Keys taken at once, so that their sums are reduced together.
const KEYS: usize = 4;
/// Registers that hold a piece of the output.
const REGISTERS: usize = 4;

/// Mask of the lanes that `len` elements fill.
fn mask(len: usize) -> __mmask16 {
    ((1u32 << len.min(LANES)) - 1) as __mmask16
}

/// The f16 numbers at `values` that `mask` selects, as floats.
///
/// # Safety
/// The selected numbers can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn load(values: *const f16, mask: __mmask16) -> __m512 {
    // SAFETY: masked lanes are not read.
    _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask, values.cast()) })
}

/// `out[p] = q · keys[p]`.
///
/// # Safety
/// `keys` is `(out, q)`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn dot(q: &[f32], keys: &[f16], out: &mut [f32]) {
    let dh = q.len();
    let count = out.len();
    for (first, out) in (0..count).step_by(KEYS).zip(out.chunks_mut(KEYS)) {
        // The last rows are taken again where there are none left.
        let rows: [usize; KEYS] = std::array::from_fn(|i| (first + i).min(count - 1) * dh);
        let mut sums = [_mm512_setzero_ps(); KEYS];
        for column in (0..dh).step_by(LANES) {
            let mask = mask(dh - column);
            // SAFETY: masked columns of `q` and of rows of `keys`.
            unsafe {
                let q = _mm512_maskz_loadu_ps(mask, q.as_ptr().add(column));
                for i in 0..KEYS {
                    let keys = load(keys.as_ptr().add(rows[i] + column), mask);
                    sums[i] = _mm512_fmadd_ps(q, keys, sums[i]);
                }
            }
        }
        let [a, b, c, d] =
            sums.map(|v| _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)));
        let quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        let dots = _mm_add_ps(
            _mm256_castps256_ps128(quads),
            _mm256_extractf128_ps::<1>(quads),
        );
        // SAFETY: the mask keeps the store inside `out`.
        unsafe { _mm_mask_storeu_ps(out.as_mut_ptr(), (1 << out.len()) - 1, dots) };
    }
}

/// `out = Σ weights[p] * values[p]`.
///
/// # Safety
/// `values` is `(weights, out)`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn blend(weights: &[f32], values: &[f16], out: &mut [f32]) {
    // SAFETY: passed on; what is loaded is there.
    unsafe { blend_by(weights, values, out, |values, mask| load(values, mask)) };
}

/// [`blend`] of bytes.
///
/// # Safety
/// As [`blend`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn blend_int8(weights: &[f32], values: &[i8], out: &mut [f32]) {
    let load = |values: *const i8, mask| {
        // SAFETY: masked lanes are not read, the others are there.
        let bytes = unsafe { _mm_maskz_loadu_epi8(mask, values) };
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
    };
    // SAFETY: passed on.
    unsafe { blend_by(weights, values, out, load) };
}

/// [`blend`] of what `load` makes floats of, the lanes that a mask selects.
///
/// # Safety
/// As [`blend`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn blend_by<V>(
    weights: &[f32],
    values: &[V],
    out: &mut [f32],
    load: impl Fn(*const V, __mmask16) -> __m512,
) {
    let dh = out.len();
    for (piece, out) in out.chunks_mut(REGISTERS * LANES).enumerate() {
        let column = piece * REGISTERS * LANES;
        let masks: [__mmask16; REGISTERS] =
            std::array::from_fn(|i| mask(out.len().saturating_sub(i * LANES)));
        let mut sums = [_mm512_setzero_ps(); REGISTERS];
        for (p, &weight) in weights.iter().enumerate() {
            let weight = _mm512_set1_ps(weight);
            let row = values.as_ptr().wrapping_add(p * dh + column);
            for i in 0..REGISTERS {
                // Masked columns of a row of `values`.
                let values = load(row.wrapping_add(i * LANES), masks[i]);
                sums[i] = _mm512_fmadd_ps(weight, values, sums[i]);
            }
        }
        for i in 0..REGISTERS {
            // SAFETY: the mask keeps the store inside `out`.
            unsafe {
                let out = out.as_mut_ptr().wrapping_add(i * LANES);
                _mm512_mask_storeu_ps(out, masks[i], sums[i]);
            }
        }
    }
}
