//! Gated squared ReLU: `out = max(gate, 0)² * up` (So et al. 2021, <https://arxiv.org/abs/2109.08668>,
//! as BitNet b1.58 2B-4T uses it).

use crate::isa::{Isa, per_isa};

/// Gates `up` by `relu(gate)²` into `out`, element by element.
///
/// # Panics
/// If the lengths differ.
pub fn reference(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(
        gate.len() == up.len() && up.len() == out.len(),
        "relu2_glu: lengths"
    );
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        let gate = if gate < 0.0 { 0.0 } else { gate as f64 };
        *out = (gate * gate * up as f64) as f32;
    }
}

/// As [`reference`], by the fastest instructions of this CPU.
///
/// # Panics
/// If the lengths differ.
pub fn forward(gate: &[f32], up: &[f32], out: &mut [f32]) {
    part(Isa::selected(), gate, up, out);
}

/// [`forward`] with the instruction set given.
///
/// # Panics
/// If the lengths differ.
pub fn part(isa: Isa, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(
        gate.len() == up.len() && up.len() == out.len(),
        "relu2_glu: lengths"
    );
    relu2_glu(isa, gate, up, out);
}

per_isa!(fn relu2_glu(gate: &[f32], up: &[f32], out: &mut [f32]) = relu2_glu_body);

#[inline(always)]
fn relu2_glu_body<const FMA: bool>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        // Not `max`, which would make a NaN a zero.
        let gate = if gate < 0.0 { 0.0 } else { gate };
        *out = gate * gate * up;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close};

    #[test]
    fn every_variant_is_close_to_the_reference() {
        let mut random = Random::new(1);
        for len in [1, 31, 193, 1536] {
            let gate = random.floats(len, 12.0);
            let up = random.floats(len, 3.0);
            let mut expected = vec![0.0; len];
            reference(&gate, &up, &mut expected);
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; len];
                part(isa, &gate, &up, &mut out);
                assert_close(&out, &expected, 1e-6, isa.name());
            }
        }
    }

    #[test]
    fn closed_gates_are_zero_and_nan_stays() {
        for isa in Isa::available() {
            let mut out = [1.0; 3];
            part(isa, &[-3.0, 2.0, f32::NAN], &[5.0, -1.5, 1.0], &mut out);
            assert_eq!(out[..2], [0.0, -6.0], "{isa}");
            assert!(out[2].is_nan(), "{isa}");
        }
    }
}
