//! Linear kernels for AArch64, where NEON is always there.
//!
//! Sixteen bytes of a cell are split into nibbles, widened to 32 bits and become weights by one
//! `scale * q + min`, so that no weight is rounded more than once.

use std::arch::aarch64::*;
use std::ops::Range;

use models::quant::int4::{CELL_BYTES, CELL_WEIGHTS};
use models::quant::{Int4Matrix, Int8Matrix};

use super::{Kernels, TILE_ROWS, tile_rows};

pub(super) static KERNELS: Kernels = Kernels {
    int4_rows,
    int4_dequantize,
    int8_rows,
    int8_dequantize,
    tile_tokens: 4,
    tile,
};

/// Floats a register.
const LANES: usize = 4;

/// Stores the sums of a tile's rows; `y` may be shorter than a tile.
#[inline]
#[target_feature(enable = "neon")]
fn store(sums: [float32x4_t; TILE_ROWS], y: &mut [f32]) {
    for (y, sum) in y.iter_mut().zip(sums) {
        *y = vaddvq_f32(sum);
    }
}

/// Scale and minimum of group `i`, counted over all rows.
#[inline]
#[target_feature(enable = "neon")]
fn int4_group(w: &Int4Matrix, i: usize) -> (float32x4_t, float32x4_t) {
    let scale = w.scales[i].to_f32();
    let min = match &w.mins {
        Some(zeros) if w.zeros => -scale * zeros[i].to_f32(),
        Some(mins) => mins[i].to_f32(),
        None => -8.0 * scale,
    };
    (vdupq_n_f32(scale), vdupq_n_f32(min))
}

/// Sixteen bytes as four registers of floats, in order.
#[inline]
#[target_feature(enable = "neon")]
fn widen(bytes: uint8x16_t) -> [float32x4_t; 4] {
    let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
    [
        vmovl_u16(vget_low_u16(low)),
        vmovl_high_u16(low),
        vmovl_u16(vget_low_u16(high)),
        vmovl_high_u16(high),
    ]
    .map(|q| vcvtq_f32_u32(q))
}

/// The 32 weights of the cell at `cell`, in order.
///
/// # Safety
/// 16 bytes can be read at `cell`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn int4_weights(
    cell: *const u8,
    scale: float32x4_t,
    min: float32x4_t,
) -> [[float32x4_t; 4]; 2] {
    // SAFETY: the caller says that the cell exists.
    let bytes = unsafe { vld1q_u8(cell) };
    [vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8::<4>(bytes)]
        .map(|nibbles| widen(nibbles).map(|q| vfmaq_f32(min, scale, q)))
}

#[target_feature(enable = "neon")]
fn int4_rows(w: &Int4Matrix, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
    let groups = w.cols.div_ceil(w.group);
    let cells = w.cols / CELL_WEIGHTS;
    let cells_per_group = w.group / CELL_WEIGHTS;
    for (row, y) in rows.clone().step_by(TILE_ROWS).zip(y.chunks_mut(TILE_ROWS)) {
        let tile = tile_rows(row, rows.end - 1);
        let quants = tile.map(|r| w.quants[r * w.cols / 2..][..w.cols / 2].as_ptr());
        let mut sums = [vdupq_n_f32(0.0); TILE_ROWS];
        let mut cell = 0;
        for group in 0..groups {
            let params = tile.map(|r| int4_group(w, r * groups + group));
            for _ in 0..cells_per_group.min(cells - cell) {
                for i in 0..TILE_ROWS {
                    // SAFETY: `cell < cells`: 32 floats of `x` and 16 bytes of each row.
                    unsafe {
                        let weights = int4_weights(
                            quants[i].add(cell * CELL_BYTES),
                            params[i].0,
                            params[i].1,
                        );
                        for (j, &weights) in weights.as_flattened().iter().enumerate() {
                            let x = vld1q_f32(x.as_ptr().add(cell * CELL_WEIGHTS + j * LANES));
                            sums[i] = vfmaq_f32(sums[i], weights, x);
                        }
                    }
                }
                cell += 1;
            }
        }
        store(sums, y);
    }
}

#[target_feature(enable = "neon")]
fn int4_dequantize(w: &Int4Matrix, row: usize, out: &mut [f32]) {
    let groups = w.cols.div_ceil(w.group);
    let quants = &w.quants[row * w.cols / 2..][..w.cols / 2];
    for (cell, out) in out.chunks_exact_mut(CELL_WEIGHTS).enumerate() {
        let (scale, min) = int4_group(w, row * groups + cell * CELL_WEIGHTS / w.group);
        let bytes = &quants[cell * CELL_BYTES..][..CELL_BYTES];
        // SAFETY: `bytes` is a cell; `out` holds 32 floats.
        unsafe {
            let weights = int4_weights(bytes.as_ptr(), scale, min);
            for (j, &weights) in weights.as_flattened().iter().enumerate() {
                vst1q_f32(out.as_mut_ptr().add(j * LANES), weights);
            }
        }
    }
}

/// Eight weights at `quants` as floats, not scaled.
///
/// # Safety
/// 8 bytes can be read at `quants`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn int8_weights(quants: *const i8) -> [float32x4_t; 2] {
    // SAFETY: the caller says that the bytes exist.
    let words = vmovl_s8(unsafe { vld1_s8(quants) });
    [
        vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))),
        vcvtq_f32_s32(vmovl_high_s16(words)),
    ]
}

#[target_feature(enable = "neon")]
fn int8_rows(w: &Int8Matrix, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
    let groups = w.cols.div_ceil(w.group);
    for (row, y) in rows.clone().step_by(TILE_ROWS).zip(y.chunks_mut(TILE_ROWS)) {
        let tile = tile_rows(row, rows.end - 1);
        let quants = tile.map(|r| w.quants[r * w.cols..][..w.cols].as_ptr());
        let mut sums = [vdupq_n_f32(0.0); TILE_ROWS];
        for group in 0..groups {
            let start = group * w.group;
            let end = (start + w.group).min(w.cols);
            let scales = tile.map(|r| vdupq_n_f32(w.scales[r * groups + group].to_f32()));
            for k in (start..end).step_by(2 * LANES) {
                // SAFETY: 8 columns of `x` and of each row.
                unsafe {
                    let x = x.as_ptr().add(k);
                    let x = [vld1q_f32(x), vld1q_f32(x.add(LANES))];
                    for i in 0..TILE_ROWS {
                        for (q, x) in int8_weights(quants[i].add(k)).into_iter().zip(x) {
                            sums[i] = vfmaq_f32(sums[i], vmulq_f32(q, scales[i]), x);
                        }
                    }
                }
            }
        }
        store(sums, y);
    }
}

#[target_feature(enable = "neon")]
fn int8_dequantize(w: &Int8Matrix, row: usize, out: &mut [f32]) {
    let groups = w.cols.div_ceil(w.group);
    let quants = &w.quants[row * w.cols..][..w.cols];
    for (group, (out, quants)) in out
        .chunks_mut(w.group)
        .zip(quants.chunks(w.group))
        .enumerate()
    {
        let scale = vdupq_n_f32(w.scales[row * groups + group].to_f32());
        for (out, q) in out
            .chunks_exact_mut(2 * LANES)
            .zip(quants.chunks_exact(2 * LANES))
        {
            // SAFETY: 8 bytes of the row, and 8 floats of `out`.
            unsafe {
                let [low, high] = int8_weights(q.as_ptr());
                vst1q_f32(out.as_mut_ptr(), vmulq_f32(low, scale));
                vst1q_f32(out.as_mut_ptr().add(LANES), vmulq_f32(high, scale));
            }
        }
    }
}

#[target_feature(enable = "neon")]
fn tile(w: &[f32], x: &[f32], k: usize, out: &mut [[f32; TILE_ROWS]]) {
    match out.len() {
        1 => tile_of::<1>(w, x, k, out),
        2 => tile_of::<2>(w, x, k, out),
        3 => tile_of::<3>(w, x, k, out),
        _ => tile_of::<4>(w, x, k, out),
    }
}

#[target_feature(enable = "neon")]
fn tile_of<const T: usize>(w: &[f32], x: &[f32], k: usize, out: &mut [[f32; TILE_ROWS]]) {
    assert!(w.len() == TILE_ROWS * k && x.len() == T * k && out.len() == T);
    let mut sums = [[vdupq_n_f32(0.0); T]; TILE_ROWS];
    for column in (0..k).step_by(LANES) {
        // SAFETY: 4 columns of each row of `w` and of each token of `x`.
        unsafe {
            let x: [float32x4_t; T] =
                std::array::from_fn(|t| vld1q_f32(x.as_ptr().add(t * k + column)));
            for (i, sums) in sums.iter_mut().enumerate() {
                let w = vld1q_f32(w.as_ptr().add(i * k + column));
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = vfmaq_f32(*sum, w, x);
                }
            }
        }
    }
    for (t, out) in out.iter_mut().enumerate() {
        store(sums.map(|row| row[t]), out);
    }
}
