//! Linear kernels for AVX-512 (F, BW, DQ, VL).
//!
//! INT4: the sixteen possible weights of a group, `scale * q + min`, are one register; a cell's bytes,
//! widened to 32 bits, index it directly (`vpermps` looks at the low four bits), then again after a
//! shift by four. Seven instructions make 32 multiplications with floats, and no weight is rounded
//! more than once.
//!
//! INT8: 16 bytes are widened, converted and scaled, then meet `x`.

use std::arch::x86_64::*;
use std::ops::Range;

use models::quant::int4::{CELL_BYTES, CELL_WEIGHTS};
use models::quant::{Int4Matrix, Int8Matrix};

use super::{Kernels, TILE_ROWS, tile_rows};
use crate::lanes::LANES;

pub(super) static KERNELS: Kernels = Kernels {
    int4_rows,
    int4_dequantize,
    int8_rows,
    int8_dequantize,
    tile_tokens: 6,
    tile,
};

/// Groups whose scales are converted at once.
const GROUPS: usize = 16;

/// Sums of four registers, in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn reduce(sums: [__m512; TILE_ROWS]) -> __m128 {
    let [a, b, c, d] =
        sums.map(|v| _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)));
    let quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_add_ps(
        _mm256_castps256_ps128(quads),
        _mm256_extractf128_ps::<1>(quads),
    )
}

/// Stores the sums of a tile's rows; `y` may be shorter than a tile.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn store(sums: [__m512; TILE_ROWS], y: &mut [f32]) {
    let valid = y.len().min(TILE_ROWS);
    // SAFETY: the mask keeps the store inside `y`.
    unsafe { _mm_mask_storeu_ps(y.as_mut_ptr(), (1 << valid) - 1, reduce(sums)) };
}

/// Up to [`GROUPS`] f16 numbers as floats; zeros after `count`.
///
/// # Safety
/// `count` numbers can be read at `values`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn load_f16(values: *const half::f16, count: usize) -> __m512 {
    let mask = ((1u32 << count) - 1) as __mmask16;
    // SAFETY: masked lanes are not read.
    _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask, values.cast()) })
}

/// Scales and minimums of [`GROUPS`] groups of one row from `group` on.
///
/// # Safety
/// `groups` are those of `w`'s row, `group + count <= groups`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn int4_groups(
    w: &Int4Matrix,
    start: usize,
    count: usize,
) -> ([f32; GROUPS], [f32; GROUPS]) {
    let (mut scales, mut mins) = ([0.0; GROUPS], [0.0; GROUPS]);
    // SAFETY: the caller says that the groups exist; both arrays hold 16 floats.
    unsafe {
        let scale = load_f16(w.scales.as_ptr().add(start), count);
        let min = match &w.mins {
            Some(m) => load_f16(m.as_ptr().add(start), count),
            None => _mm512_mul_ps(scale, _mm512_set1_ps(-8.0)),
        };
        _mm512_storeu_ps(scales.as_mut_ptr(), scale);
        _mm512_storeu_ps(mins.as_mut_ptr(), min);
    }
    (scales, mins)
}

/// The sixteen weights of a group.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn int4_table(scale: f32, min: f32) -> __m512 {
    let ramp = _mm512_setr_ps(
        0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.,
    );
    _mm512_fmadd_ps(_mm512_set1_ps(scale), ramp, _mm512_set1_ps(min))
}

/// The 32 weights of the cell at `cell`.
///
/// # Safety
/// 16 bytes can be read at `cell`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn int4_weights(cell: *const u8, table: __m512) -> [__m512; 2] {
    // SAFETY: the caller says that the cell exists.
    let bytes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(cell.cast()) });
    [
        _mm512_permutexvar_ps(bytes, table),
        _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), table),
    ]
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn int4_rows(w: &Int4Matrix, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
    let groups = w.cols.div_ceil(w.group);
    let cells = w.cols / CELL_WEIGHTS;
    let cells_per_group = w.group / CELL_WEIGHTS;
    for (row, y) in rows.clone().step_by(TILE_ROWS).zip(y.chunks_mut(TILE_ROWS)) {
        let tile = tile_rows(row, rows.end - 1);
        let quants = tile.map(|r| w.quants[r * w.cols / 2..][..w.cols / 2].as_ptr());
        let mut sums = [_mm512_setzero_ps(); TILE_ROWS];
        let mut cell = 0;
        for first in (0..groups).step_by(GROUPS) {
            let count = GROUPS.min(groups - first);
            // SAFETY: groups of rows of the matrix.
            let params = tile.map(|r| unsafe { int4_groups(w, r * groups + first, count) });
            for group in 0..count {
                let tables: [__m512; TILE_ROWS] =
                    std::array::from_fn(|i| int4_table(params[i].0[group], params[i].1[group]));
                for _ in 0..cells_per_group.min(cells - cell) {
                    // SAFETY: `cell < cells`: 32 floats of `x` and 16 bytes of each row.
                    unsafe {
                        let x = x.as_ptr().add(cell * CELL_WEIGHTS);
                        let (x_low, x_high) = (_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(LANES)));
                        for i in 0..TILE_ROWS {
                            let [low, high] =
                                int4_weights(quants[i].add(cell * CELL_BYTES), tables[i]);
                            sums[i] = _mm512_fmadd_ps(low, x_low, sums[i]);
                            sums[i] = _mm512_fmadd_ps(high, x_high, sums[i]);
                        }
                    }
                    cell += 1;
                }
            }
        }
        store(sums, y);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn int4_dequantize(w: &Int4Matrix, row: usize, out: &mut [f32]) {
    let groups = w.cols.div_ceil(w.group);
    let quants = w.quants[row * w.cols / 2..][..w.cols / 2].as_ptr();
    for (group, out) in out.chunks_mut(w.group).enumerate() {
        let i = row * groups + group;
        let scale = w.scales[i].to_f32();
        let min = w
            .mins
            .as_ref()
            .map_or(-8.0 * scale, |mins| mins[i].to_f32());
        let table = int4_table(scale, min);
        for (j, out) in out.chunks_exact_mut(CELL_WEIGHTS).enumerate() {
            // SAFETY: a cell of the row, and 32 floats of `out`.
            unsafe {
                let cell = group * (w.group / CELL_WEIGHTS) + j;
                let [low, high] = int4_weights(quants.add(cell * CELL_BYTES), table);
                _mm512_storeu_ps(out.as_mut_ptr(), low);
                _mm512_storeu_ps(out.as_mut_ptr().add(LANES), high);
            }
        }
    }
}

/// 16 weights at `quants` as floats, not scaled.
///
/// # Safety
/// 16 bytes can be read at `quants`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn int8_weights(quants: *const i8) -> __m512 {
    // SAFETY: the caller says that the bytes exist.
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(unsafe {
        _mm_loadu_si128(quants.cast())
    }))
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn int8_rows(w: &Int8Matrix, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
    let groups = w.cols.div_ceil(w.group);
    for (row, y) in rows.clone().step_by(TILE_ROWS).zip(y.chunks_mut(TILE_ROWS)) {
        let tile = tile_rows(row, rows.end - 1);
        let quants = tile.map(|r| w.quants[r * w.cols..][..w.cols].as_ptr());
        let mut sums = [_mm512_setzero_ps(); TILE_ROWS];
        for first in (0..groups).step_by(GROUPS) {
            let count = GROUPS.min(groups - first);
            let mut scales = [[0.0; GROUPS]; TILE_ROWS];
            for (scales, r) in scales.iter_mut().zip(tile) {
                // SAFETY: groups of rows of the matrix; 16 floats of `scales`.
                unsafe {
                    let values = load_f16(w.scales.as_ptr().add(r * groups + first), count);
                    _mm512_storeu_ps(scales.as_mut_ptr(), values);
                }
            }
            let starts = (first * w.group..w.cols).step_by(w.group).take(count);
            for (group, start) in starts.enumerate() {
                let end = (start + w.group).min(w.cols);
                let scales: [__m512; TILE_ROWS] =
                    std::array::from_fn(|i| _mm512_set1_ps(scales[i][group]));
                for k in (start..end).step_by(LANES) {
                    // SAFETY: 16 columns of `x` and of each row.
                    unsafe {
                        let x = _mm512_loadu_ps(x.as_ptr().add(k));
                        for i in 0..TILE_ROWS {
                            let weights = _mm512_mul_ps(int8_weights(quants[i].add(k)), scales[i]);
                            sums[i] = _mm512_fmadd_ps(weights, x, sums[i]);
                        }
                    }
                }
            }
        }
        store(sums, y);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn int8_dequantize(w: &Int8Matrix, row: usize, out: &mut [f32]) {
    let groups = w.cols.div_ceil(w.group);
    let quants = &w.quants[row * w.cols..][..w.cols];
    for (group, (out, quants)) in out
        .chunks_mut(w.group)
        .zip(quants.chunks(w.group))
        .enumerate()
    {
        let scale = _mm512_set1_ps(w.scales[row * groups + group].to_f32());
        for (out, q) in out.chunks_exact_mut(LANES).zip(quants.chunks_exact(LANES)) {
            // SAFETY: 16 bytes of the row, and 16 floats of `out`.
            unsafe {
                let weights = _mm512_mul_ps(int8_weights(q.as_ptr()), scale);
                _mm512_storeu_ps(out.as_mut_ptr(), weights);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn tile(w: &[f32], x: &[f32], k: usize, out: &mut [[f32; TILE_ROWS]]) {
    match out.len() {
        1 => tile_of::<1>(w, x, k, out),
        2 => tile_of::<2>(w, x, k, out),
        3 => tile_of::<3>(w, x, k, out),
        4 => tile_of::<4>(w, x, k, out),
        5 => tile_of::<5>(w, x, k, out),
        _ => tile_of::<6>(w, x, k, out),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn tile_of<const T: usize>(w: &[f32], x: &[f32], k: usize, out: &mut [[f32; TILE_ROWS]]) {
    assert!(w.len() == TILE_ROWS * k && x.len() == T * k && out.len() == T);
    let mut sums = [[_mm512_setzero_ps(); T]; TILE_ROWS];
    for column in (0..k).step_by(LANES) {
        // SAFETY: 16 columns of each row of `w` and of each token of `x`.
        unsafe {
            let x: [__m512; T] =
                std::array::from_fn(|t| _mm512_loadu_ps(x.as_ptr().add(t * k + column)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let w = _mm512_loadu_ps(w.as_ptr().add(i * k + column));
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = _mm512_fmadd_ps(w, x, *sum);
                }
            }
        }
    }
    for (t, out) in out.iter_mut().enumerate() {
        store(sums.map(|row| row[t]), out);
    }
}
