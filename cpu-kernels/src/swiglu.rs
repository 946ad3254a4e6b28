//! SwiGLU: `out = gate / (1 + exp(-gate)) * up`
//! (Shazeer 2020, <https://arxiv.org/abs/2002.05202>).

use crate::isa::{Isa, per_isa};
use crate::lanes::exp;

/// Gates `up` by `silu(gate)` into `out`, element by element.
///
/// # Panics
/// If the lengths differ.
pub fn reference(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(
        gate.len() == up.len() && up.len() == out.len(),
        "swiglu: lengths"
    );
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        let gate = gate as f64;
        *out = (gate / (1.0 + (-gate).exp()) * up as f64) as f32;
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
        "swiglu: lengths"
    );
    swiglu(isa, gate, up, out);
}

per_isa!(fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) = swiglu_body);

#[inline(always)]
fn swiglu_body<const FMA: bool>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp::<FMA>(-gate)) * up;
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
    fn far_gates_saturate_and_nan_stays() {
        let gate = [-1e4, -200.0, 200.0, 1e4, f32::NAN];
        for isa in Isa::available() {
            let mut out = [0.0; 5];
            part(isa, &gate, &[1.0; 5], &mut out);
            assert!(
                out[0].abs() < 1e-30 && out[1].abs() < 1e-30,
                "{isa}: {out:?}"
            );
            assert_eq!(out[2..4], [200.0, 1e4], "{isa}");
            assert!(out[4].is_nan(), "{isa}");
        }
    }
}
