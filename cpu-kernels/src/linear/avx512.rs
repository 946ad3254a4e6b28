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

use half::f16;
use models::quant::int4::{CELL_BYTES, CELL_WEIGHTS};
use models::quant::{Int4Matrix, Int8Matrix};

use super::{Kernels, LINE_BYTES, TILE_ROWS, prefetch, tile_rows};
use crate::lanes::LANES;

const _: () = assert!(LINE_BYTES == TILE_ROWS * CELL_BYTES && LINE_BYTES == TILE_ROWS * LANES);

pub(super) static KERNELS: Kernels = Kernels {
    int4_rows,
    int4_dequantize,
    int8_rows,
    int8_dequantize,
    tile_tokens: 6,
    tile,
};

/// Groups whose scales are converted at once, for a tile.
const GROUPS: usize = 64;
const _: () = assert!(GROUPS.is_multiple_of(LANES));

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

/// `values[i][j]` is the number of group `first + j` of row `tile[i]` as a float, times `factor`, for
/// `j < count`.
///
/// # Safety
/// `numbers` has `groups` numbers for each row of the tile; `first + count <= groups`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn load_groups(
    values: &mut [[f32; GROUPS]; TILE_ROWS],
    numbers: &[f16],
    tile: [usize; TILE_ROWS],
    groups: usize,
    first: usize,
    count: usize,
    factor: f32,
) {
    for (values, row) in values.iter_mut().zip(tile) {
        let mut j = 0;
        while j < count {
            let mask = ((1u32 << (count - j).min(LANES)) - 1) as __mmask16;
            // SAFETY: masked lanes are not read; a register fits at `j < GROUPS`, a multiple of 16.
            unsafe {
                let numbers = numbers.as_ptr().add(row * groups + first + j);
                let halves = _mm256_maskz_loadu_epi16(mask, numbers.cast());
                let floats = _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(factor));
                _mm512_storeu_ps(values.as_mut_ptr().add(j), floats);
            }
            j += LANES;
        }
    }
}

/// One f16 number in every lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn splat_f16(value: f16) -> __m512 {
    _mm512_cvtph_ps(_mm256_set1_epi16(value.to_bits() as i16))
}

/// The sixteen weights of a group, from its scale and minimum in every lane.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn int4_table(scale: __m512, min: __m512) -> __m512 {
    let ramp = _mm512_setr_ps(
        0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.,
    );
    _mm512_fmadd_ps(scale, ramp, min)
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
    // The number of cells a group as a constant: the loop over them disappears for the smallest.
    match w.group / CELL_WEIGHTS {
        1 => int4_rows_of::<1>(w, rows, x, y),
        2 => int4_rows_of::<2>(w, rows, x, y),
        _ => int4_rows_of::<0>(w, rows, x, y),
    }
}

/// `CELLS` is the number of cells a group, or 0 for any.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn int4_rows_of<const CELLS: usize>(w: &Int4Matrix, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
    let groups = w.cols.div_ceil(w.group);
    let cells = w.cols / CELL_WEIGHTS;
    let cells_per_group = if CELLS == 0 {
        w.group / CELL_WEIGHTS
    } else {
        CELLS
    };
    let (mins, factor) = match &w.mins {
        Some(zeros) if w.zeros => (zeros, -1.0),
        Some(mins) => (mins, 1.0),
        None => (&w.scales, -8.0),
    };
    let mut scale_values = [[0.0; GROUPS]; TILE_ROWS];
    let mut min_values = [[0.0; GROUPS]; TILE_ROWS];
    for (row, y) in rows.clone().step_by(TILE_ROWS).zip(y.chunks_mut(TILE_ROWS)) {
        let tile = tile_rows(row, rows.end - 1);
        let mut quants = [w.quants.as_ptr(); TILE_ROWS];
        for (quants, row) in quants.iter_mut().zip(tile) {
            *quants = quants.wrapping_add(row * w.cols / 2);
        }
        let next = quants[0].wrapping_add(TILE_ROWS * w.cols / 2);
        let mut sums = [_mm512_setzero_ps(); TILE_ROWS];
        let mut cell = 0;
        for first in (0..groups).step_by(GROUPS) {
            let count = GROUPS.min(groups - first);
            // SAFETY: groups of rows of the matrix.
            unsafe {
                load_groups(
                    &mut scale_values,
                    &w.scales,
                    tile,
                    groups,
                    first,
                    count,
                    1.0,
                );
                load_groups(&mut min_values, mins, tile, groups, first, count, factor);
            }
            if w.zeros {
                for (mins, scales) in min_values.iter_mut().zip(&scale_values) {
                    for (min, scale) in mins[..count].iter_mut().zip(scales) {
                        *min *= scale;
                    }
                }
            }
            for group in 0..count {
                let mut tables = [_mm512_setzero_ps(); TILE_ROWS];
                for i in 0..TILE_ROWS {
                    tables[i] = int4_table(
                        _mm512_set1_ps(scale_values[i][group]),
                        _mm512_set1_ps(min_values[i][group]),
                    );
                }
                let end = match CELLS {
                    1 => cell + 1,
                    _ => (cell + cells_per_group).min(cells),
                };
                while cell < end {
                    // SAFETY: `cell < cells`: 32 floats of `x` and 16 bytes of each row.
                    unsafe {
                        prefetch(next.wrapping_add(cell * LINE_BYTES));
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
        let scale = splat_f16(w.scales[i]);
        let min = match &w.mins {
            Some(zeros) if w.zeros => _mm512_mul_ps(
                scale,
                _mm512_sub_ps(_mm512_setzero_ps(), splat_f16(zeros[i])),
            ),
            Some(mins) => splat_f16(mins[i]),
            None => _mm512_mul_ps(scale, _mm512_set1_ps(-8.0)),
        };
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
    let mut scale_values = [[0.0; GROUPS]; TILE_ROWS];
    for (row, y) in rows.clone().step_by(TILE_ROWS).zip(y.chunks_mut(TILE_ROWS)) {
        let tile = tile_rows(row, rows.end - 1);
        let mut quants = [w.quants.as_ptr(); TILE_ROWS];
        for (quants, row) in quants.iter_mut().zip(tile) {
            *quants = quants.wrapping_add(row * w.cols);
        }
        let next = quants[0].wrapping_add(TILE_ROWS * w.cols);
        let mut sums = [_mm512_setzero_ps(); TILE_ROWS];
        for first in (0..groups).step_by(GROUPS) {
            let count = GROUPS.min(groups - first);
            // SAFETY: groups of rows of the matrix.
            unsafe {
                load_groups(
                    &mut scale_values,
                    &w.scales,
                    tile,
                    groups,
                    first,
                    count,
                    1.0,
                );
            }
            let starts = (first * w.group..w.cols).step_by(w.group).take(count);
            for (group, start) in starts.enumerate() {
                let end = (start + w.group).min(w.cols);
                let mut scales = [_mm512_setzero_ps(); TILE_ROWS];
                for (scale, values) in scales.iter_mut().zip(&scale_values) {
                    *scale = _mm512_set1_ps(values[group]);
                }
                for k in (start..end).step_by(LANES) {
                    // SAFETY: 16 columns of `x` and of each row.
                    unsafe {
                        let x = _mm512_loadu_ps(x.as_ptr().add(k));
                        prefetch(next.wrapping_add(k * TILE_ROWS));
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
        let scale = splat_f16(w.scales[row * groups + group]);
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
