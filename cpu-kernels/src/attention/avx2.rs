//! Dot products and weighted sums over f16 rows for AVX2 with F16C: 8 values are one 16-byte load
//! and one conversion; what is left of a row is taken one by one.

use std::arch::x86_64::*;

use half::f16;

const LANES: usize = 8;
/// Keys taken at once, so that their sums are reduced together.
const KEYS: usize = 4;
/// Registers that hold a piece of the output.
const REGISTERS: usize = 8;

/// Eight f16 numbers as floats.
///
/// # Safety
/// Eight numbers can be read at `values`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load(values: *const f16) -> __m256 {
    // SAFETY: the caller says that the numbers exist.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(values.cast()) })
}

/// `out[p] = q · keys[p]`.
///
/// # Safety
/// `keys` is `(out, q)`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn dot(q: &[f32], keys: &[f16], out: &mut [f32]) {
    let dh = q.len();
    let whole = dh - dh % LANES;
    let count = out.len();
    for (first, out) in (0..count).step_by(KEYS).zip(out.chunks_mut(KEYS)) {
        // The last rows are taken again where there are none left.
        let rows: [usize; KEYS] = std::array::from_fn(|i| (first + i).min(count - 1) * dh);
        let mut sums = [_mm256_setzero_ps(); KEYS];
        for column in (0..whole).step_by(LANES) {
            // SAFETY: 8 columns of `q` and of rows of `keys`.
            unsafe {
                let q = _mm256_loadu_ps(q.as_ptr().add(column));
                for i in 0..KEYS {
                    let keys = load(keys.as_ptr().add(rows[i] + column));
                    sums[i] = _mm256_fmadd_ps(q, keys, sums[i]);
                }
            }
        }
        let [a, b, c, d] = sums;
        let quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
        let mut dots = [0.0; KEYS];
        // SAFETY: four floats.
        unsafe {
            _mm_storeu_ps(
                dots.as_mut_ptr(),
                _mm_add_ps(
                    _mm256_castps256_ps128(quads),
                    _mm256_extractf128_ps::<1>(quads),
                ),
            );
        }
        for ((out, dot), row) in out.iter_mut().zip(dots).zip(rows) {
            let rest = q[whole..].iter().zip(&keys[row + whole..row + dh]);
            *out = dot + rest.map(|(q, k)| q * k.to_f32()).sum::<f32>();
        }
    }
}

/// `out = Σ weights[p] * values[p]`.
///
/// # Safety
/// `values` is `(weights, out)`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn blend(weights: &[f32], values: &[f16], out: &mut [f32]) {
    // SAFETY: passed on; what is loaded is there.
    unsafe { blend_by(weights, values, out, |values| load(values)) };
}

/// [`blend`] of bytes.
///
/// # Safety
/// As [`blend`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn blend_int8(weights: &[f32], values: &[i8], out: &mut [f32]) {
    let load = |values: *const i8| {
        // SAFETY: eight bytes are there.
        let bytes = unsafe { _mm_loadl_epi64(values.cast()) };
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))
    };
    // SAFETY: passed on.
    unsafe { blend_by(weights, values, out, load) };
}

/// [`blend`] of what `load` makes floats of, eight at a time.
///
/// # Safety
/// As [`blend`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn blend_by<V: Copy + Into<f32>>(
    weights: &[f32],
    values: &[V],
    out: &mut [f32],
    load: impl Fn(*const V) -> __m256,
) {
    let dh = out.len();
    let mut column = 0;
    while column < dh {
        let len = match dh - column {
            left if left >= REGISTERS * LANES => {
                // SAFETY: that many columns of `out` and of each row of `values`.
                unsafe { blend_columns::<REGISTERS, V>(weights, values, out, column, &load) };
                REGISTERS * LANES
            }
            left if left >= LANES => {
                // SAFETY: as above.
                unsafe { blend_columns::<1, V>(weights, values, out, column, &load) };
                LANES
            }
            _ => {
                let column_values = values[column..].iter().step_by(dh);
                out[column] = weights
                    .iter()
                    .zip(column_values)
                    .map(|(w, v)| w * (*v).into())
                    .sum::<f32>();
                1
            }
        };
        column += len;
    }
}

/// The `R * LANES` columns of `blend` from `column` on.
///
/// # Safety
/// `out` and the rows of `values` have these columns.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn blend_columns<const R: usize, V>(
    weights: &[f32],
    values: &[V],
    out: &mut [f32],
    column: usize,
    load: &impl Fn(*const V) -> __m256,
) {
    let mut sums = [_mm256_setzero_ps(); R];
    for (p, &weight) in weights.iter().enumerate() {
        let weight = _mm256_set1_ps(weight);
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: 8 columns of row `p`.
            let row = unsafe { values.as_ptr().add(p * out.len() + column + i * LANES) };
            *sum = _mm256_fmadd_ps(weight, load(row), *sum);
        }
    }
    for (i, sum) in sums.into_iter().enumerate() {
        // SAFETY: 8 columns of `out`.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(column + i * LANES), sum) };
    }
}
