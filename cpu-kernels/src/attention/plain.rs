//! Dot products and weighted sums without vector instructions of their own.

use half::f16;
use half::slice::HalfFloatSliceExt;

/// Values converted at once.
const CHUNK: usize = 64;

/// `out[p] = q · keys[p]` for `keys` `(p, dh)`.
pub(super) fn dot(q: &[f32], keys: &[f16], out: &mut [f32]) {
    for (keys, out) in keys.chunks_exact(q.len()).zip(out) {
        let mut lanes = [0.0f32; 8];
        for (keys, q) in keys.chunks(CHUNK).zip(q.chunks(CHUNK)) {
            let mut floats = [0.0; CHUNK];
            let floats = &mut floats[..keys.len()];
            keys.convert_to_f32_slice(floats);
            for (k, q) in floats.chunks(lanes.len()).zip(q.chunks(lanes.len())) {
                for ((lane, k), q) in lanes.iter_mut().zip(k).zip(q) {
                    *lane += k * q;
                }
            }
        }
        *out = lanes.iter().sum();
    }
}

/// `out = Σ weights[p] * values[p]` for `values` `(p, dh)`.
pub(super) fn blend(weights: &[f32], values: &[f16], out: &mut [f32]) {
    blend_by(weights, values, out, |values, floats| {
        values.convert_to_f32_slice(floats);
    });
}

/// [`blend`] of bytes.
pub(super) fn blend_int8(weights: &[f32], values: &[i8], out: &mut [f32]) {
    blend_by(weights, values, out, |values, floats| {
        for (float, value) in floats.iter_mut().zip(values) {
            *float = f32::from(*value);
        }
    });
}

#[inline(always)]
fn blend_by<V>(weights: &[f32], values: &[V], out: &mut [f32], convert: impl Fn(&[V], &mut [f32])) {
    out.fill(0.0);
    for (&weight, values) in weights.iter().zip(values.chunks_exact(out.len())) {
        for (values, out) in values.chunks(CHUNK).zip(out.chunks_mut(CHUNK)) {
            let mut floats = [0.0; CHUNK];
            let floats = &mut floats[..values.len()];
            convert(values, floats);
            for (out, v) in out.iter_mut().zip(floats) {
                *out += weight * *v;
            }
        }
    }
}
