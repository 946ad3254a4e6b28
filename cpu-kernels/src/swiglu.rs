//! SwiGLU: `out = gate / (1 + exp(-gate)) * up`
//! (Shazeer 2020, <https://arxiv.org/abs/2002.05202>).

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
