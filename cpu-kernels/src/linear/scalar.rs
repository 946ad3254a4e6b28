//! Linear kernels without vector instructions of their own: they run on any CPU.

use std::ops::Range;

use models::quant::int4::{CELL_BYTES, CELL_WEIGHTS};
use models::quant::{Int4Matrix, Int8Matrix};

use super::{Kernels, TILE_ROWS};
use crate::lanes::LANES;

pub(super) static KERNELS: Kernels = Kernels {
    int4_rows,
    int4_dequantize,
    int8_rows,
    int8_dequantize,
    tile_tokens: 4,
    tile,
};

/// Cell `cell` of a row as floats.
fn int4_cell(w: &Int4Matrix, row: usize, cell: usize, out: &mut [f32]) {
    let group = row * w.cols.div_ceil(w.group) + cell * CELL_WEIGHTS / w.group;
    let scale = w.scales[group].to_f32();
    let min = match &w.mins {
        Some(zeros) if w.zeros => -scale * zeros[group].to_f32(),
        Some(mins) => mins[group].to_f32(),
        None => -8.0 * scale,
    };
    let start = row * w.cols / 2 + cell * CELL_BYTES;
    let (low, high) = out.split_at_mut(CELL_BYTES);
    for ((byte, low), high) in w.quants[start..start + CELL_BYTES]
        .iter()
        .zip(low)
        .zip(high)
    {
        *low = scale * (byte & 15) as f32 + min;
        *high = scale * (byte >> 4) as f32 + min;
    }
}

/// Cell `cell` of a row as floats.
fn int8_cell(w: &Int8Matrix, row: usize, cell: usize, out: &mut [f32]) {
    let scale = w.scales[row * w.cols.div_ceil(w.group) + cell * CELL_WEIGHTS / w.group].to_f32();
    let start = row * w.cols + cell * CELL_WEIGHTS;
    for (out, &q) in out.iter_mut().zip(&w.quants[start..start + CELL_WEIGHTS]) {
        *out = scale * q as f32;
    }
}

fn accumulate(lanes: &mut [f32; LANES], w: &[f32], x: &[f32]) {
    for (w, x) in w.chunks_exact(LANES).zip(x.chunks_exact(LANES)) {
        for ((lane, w), x) in lanes.iter_mut().zip(w).zip(x) {
            *lane += w * x;
        }
    }
}

fn row<M>(w: &M, row: usize, x: &[f32], decode: impl Fn(&M, usize, usize, &mut [f32])) -> f32 {
    let mut lanes = [0.0; LANES];
    let mut weights = [0.0; CELL_WEIGHTS];
    for (cell, x) in x.chunks_exact(CELL_WEIGHTS).enumerate() {
        decode(w, row, cell, &mut weights);
        accumulate(&mut lanes, &weights, x);
    }
    lanes.iter().sum()
}

fn int4_rows(w: &Int4Matrix, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
    for (y, i) in y.iter_mut().zip(rows) {
        *y = row(w, i, x, int4_cell);
    }
}

fn int8_rows(w: &Int8Matrix, rows: Range<usize>, x: &[f32], y: &mut [f32]) {
    for (y, i) in y.iter_mut().zip(rows) {
        *y = row(w, i, x, int8_cell);
    }
}

fn int4_dequantize(w: &Int4Matrix, row: usize, out: &mut [f32]) {
    for (cell, out) in out.chunks_exact_mut(CELL_WEIGHTS).enumerate() {
        int4_cell(w, row, cell, out);
    }
}

fn int8_dequantize(w: &Int8Matrix, row: usize, out: &mut [f32]) {
    for (cell, out) in out.chunks_exact_mut(CELL_WEIGHTS).enumerate() {
        int8_cell(w, row, cell, out);
    }
}

fn tile(w: &[f32], x: &[f32], k: usize, out: &mut [[f32; TILE_ROWS]]) {
    for (x, out) in x.chunks_exact(k).zip(out) {
        for (w, out) in w.chunks_exact(k).zip(out) {
            let mut lanes = [0.0; LANES];
            accumulate(&mut lanes, w, x);
            *out = lanes.iter().sum();
        }
    }
}
