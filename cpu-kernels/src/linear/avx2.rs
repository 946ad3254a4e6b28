//! Linear kernels for AVX2 with FMA and F16C.
//!
//! Eight bytes of a cell are widened to 32 bits; the low and the high nibbles become floats and then
//! weights by one `scale * q + min`, so that no weight is rounded more than once.

use std::arch::x86_64::*;
use std::ops::Range;

use models::quant::int4::{CELL_BYTES, CELL_WEIGHTS};
use models::quant::{Int4Matrix, Int8Matrix};

use super::{Kernels, LINE_BYTES, TILE_ROWS, prefetch, tile_rows};

pub(super) static KERNELS: Kernels = Kernels {
    int4_rows,
    int4_dequantize,
    int8_rows,
    int8_dequantize,
    tile_tokens: 3,
    tile,
};

/// Floats a register.
const LANES: usize = 8;

/// Sums of four registers, in order.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn reduce([a, b, c, d]: [__m256; TILE_ROWS]) -> __m128 {
    let quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_add_ps(
        _mm256_castps256_ps128(quads),
        _mm256_extractf128_ps::<1>(quads),
    )
}

/// Stores the sums of a tile's rows; `y` may be shorter than a tile.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(sums: [__m256; TILE_ROWS], y: &mut [f32]) {
    let mut values = [0.0; TILE_ROWS];
    // SAFETY: four floats.
    unsafe { _mm_storeu_ps(values.as_mut_ptr(), reduce(sums)) };
    for (y, value) in y.iter_mut().zip(values) {
        *y = value;
    }
}

/// One f16 number in every lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn splat_f16(value: half::f16) -> __m256 {
    _mm256_cvtph_ps(_mm_set1_epi16(value.to_bits() as i16))
}

/// Scale and minimum of group `i`, counted over all rows.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn int4_group(w: &Int4Matrix, i: usize) -> (__m256, __m256) {
    let scale = splat_f16(w.scales[i]);
    let min = match &w.mins {
        Some(zeros) if w.zeros => _mm256_mul_ps(
            scale,
            _mm256_sub_ps(_mm256_setzero_ps(), splat_f16(zeros[i])),
        ),
        Some(mins) => splat_f16(mins[i]),
        None => _mm256_mul_ps(scale, _mm256_set1_ps(-8.0)),
    };
    (scale, min)
}

/// The 32 weights of the cell at `cell`, in order.
///
/// # Safety
/// 16 bytes can be read at `cell`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn int4_weights(cell: *const u8, scale: __m256, min: __m256) -> [__m256; 4] {
    let nibble = _mm256_set1_epi32(15);
    // SAFETY: the caller says that the cell exists.
    let (first, second) = unsafe {
        (
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(cell.cast())),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(cell.add(LANES).cast())),
        )
    };
    [
        _mm256_and_si256(first, nibble),
        _mm256_and_si256(second, nibble),
        _mm256_srli_epi32::<4>(first),
        _mm256_srli_epi32::<4>(second),
    ]
    .map(|q| _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(q), min))
}

#[target_feature(enable = "avx2,fma,f16c")]
fn int4_rows(w: &Int4Matrix, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
    let groups = w.cols.div_ceil(w.group);
    let cells = w.cols / CELL_WEIGHTS;
    let cells_per_group = w.group / CELL_WEIGHTS;
    for (row, y) in rows.clone().step_by(TILE_ROWS).zip(y.chunks_mut(TILE_ROWS)) {
        let tile = tile_rows(row, rows.end - 1);
        let quants = tile.map(|r| w.quants[r * w.cols / 2..].as_ptr());
        let next = quants[0].wrapping_add(TILE_ROWS * w.cols / 2);
        let mut sums = [_mm256_setzero_ps(); TILE_ROWS];
        let mut cell = 0;
        for group in 0..groups {
            for _ in 0..cells_per_group.min(cells - cell) {
                prefetch(next.wrapping_add(cell * LINE_BYTES));
                for i in 0..TILE_ROWS {
                    let (scale, min) = int4_group(w, tile[i] * groups + group);
                    // SAFETY: `cell < cells`: 32 floats of `x` and 16 bytes of each row.
                    unsafe {
                        let weights = int4_weights(quants[i].add(cell * CELL_BYTES), scale, min);
                        for (j, weights) in weights.into_iter().enumerate() {
                            let x =
                                _mm256_loadu_ps(x.as_ptr().add(cell * CELL_WEIGHTS + j * LANES));
                            sums[i] = _mm256_fmadd_ps(weights, x, sums[i]);
                        }
                    }
                }
                cell += 1;
            }
        }
        store(sums, y);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn int4_dequantize(w: &Int4Matrix, row: usize, out: &mut [f32]) {
    let groups = w.cols.div_ceil(w.group);
    let quants = &w.quants[row * w.cols / 2..][..w.cols / 2];
    for (cell, out) in out.chunks_exact_mut(CELL_WEIGHTS).enumerate() {
        let (scale, min) = int4_group(w, row * groups + cell * CELL_WEIGHTS / w.group);
        let bytes = &quants[cell * CELL_BYTES..][..CELL_BYTES];
        // SAFETY: `bytes` is a cell; `out` holds 32 floats.
        unsafe {
            for (j, weights) in int4_weights(bytes.as_ptr(), scale, min)
                .into_iter()
                .enumerate()
            {
                _mm256_storeu_ps(out.as_mut_ptr().add(j * LANES), weights);
            }
        }
    }
}

/// Eight weights at `quants` as floats, not scaled.
///
/// # Safety
/// 8 bytes can be read at `quants`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn int8_weights(quants: *const i8) -> __m256 {
    // SAFETY: the caller says that the bytes exist.
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(unsafe {
        _mm_loadl_epi64(quants.cast())
    }))
}

#[target_feature(enable = "avx2,fma,f16c")]
fn int8_rows(w: &Int8Matrix, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
    let groups = w.cols.div_ceil(w.group);
    for (row, y) in rows.clone().step_by(TILE_ROWS).zip(y.chunks_mut(TILE_ROWS)) {
        let tile = tile_rows(row, rows.end - 1);
        let quants = tile.map(|r| w.quants[r * w.cols..].as_ptr());
        let next = quants[0].wrapping_add(TILE_ROWS * w.cols);
        let mut sums = [_mm256_setzero_ps(); TILE_ROWS];
        for group in 0..groups {
            let start = group * w.group;
            let end = (start + w.group).min(w.cols);
            let scales = tile.map(|r| splat_f16(w.scales[r * groups + group]));
            for k in (start..end).step_by(LANES) {
                prefetch(next.wrapping_add(TILE_ROWS * k));
                // SAFETY: 8 columns of `x` and of each row.
                unsafe {
                    let x = _mm256_loadu_ps(x.as_ptr().add(k));
                    for i in 0..TILE_ROWS {
                        let weights = _mm256_mul_ps(int8_weights(quants[i].add(k)), scales[i]);
                        sums[i] = _mm256_fmadd_ps(weights, x, sums[i]);
                    }
                }
            }
        }
        store(sums, y);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn int8_dequantize(w: &Int8Matrix, row: usize, out: &mut [f32]) {
    let groups = w.cols.div_ceil(w.group);
    let quants = &w.quants[row * w.cols..][..w.cols];
    for (group, (out, quants)) in out
        .chunks_mut(w.group)
        .zip(quants.chunks(w.group))
        .enumerate()
    {
        let scale = splat_f16(w.scales[row * groups + group]);
        for (out, q) in out.chunks_exact_mut(LANES).zip(quants.chunks_exact(LANES)) {
            // SAFETY: 8 bytes of the row, and 8 floats of `out`.
            unsafe {
                let weights = _mm256_mul_ps(int8_weights(q.as_ptr()), scale);
                _mm256_storeu_ps(out.as_mut_ptr(), weights);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn tile(w: &[f32], x: &[f32], k: usize, out: &mut [[f32; TILE_ROWS]]) {
    match out.len() {
        1 => tile_of::<1>(w, x, k, out),
        2 => tile_of::<2>(w, x, k, out),
        _ => tile_of::<3>(w, x, k, out),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn tile_of<const T: usize>(w: &[f32], x: &[f32], k: usize, out: &mut [[f32; TILE_ROWS]]) {
    assert!(w.len() == TILE_ROWS * k && x.len() == T * k && out.len() == T);
    let mut sums = [[_mm256_setzero_ps(); T]; TILE_ROWS];
    for column in (0..k).step_by(LANES) {
        // SAFETY: 8 columns of each row of `w` and of each token of `x`.
        unsafe {
            let x: [__m256; T] =
                std::array::from_fn(|t| _mm256_loadu_ps(x.as_ptr().add(t * k + column)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let w = _mm256_loadu_ps(w.as_ptr().add(i * k + column));
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = _mm256_fmadd_ps(w, x, *sum);
                }
            }
        }
    }
    for (t, out) in out.iter_mut().enumerate() {
        store(sums.map(|row| row[t]), out);
    }
}
