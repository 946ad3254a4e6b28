//! Rotary position embedding, half-split: the pair `(i, i + dh/2)` of a head turns by the angle of
//! its position (RoFormer, <https://arxiv.org/abs/2104.09864>).

/// Turns `x` `(t, heads, dh)` in place. Token `i` stands at `position + i`; `cos` and `sin` are
/// `(positions, dh/2)`.
///
/// # Panics
/// If `head_dim` is odd, `x` is not `(t, heads, dh)`, or the tables end before the last position.
pub fn reference(
    x: &mut [f32],
    heads: usize,
    head_dim: usize,
    cos: &[f32],
    sin: &[f32],
    position: usize,
) {
    check(x.len(), heads, head_dim, cos.len(), sin.len(), position);
    let half = head_dim / 2;
    for (i, token) in x.chunks_exact_mut(heads * head_dim).enumerate() {
        let angles = (position + i) * half;
        for head in token.chunks_exact_mut(head_dim) {
            for j in 0..half {
                let (c, s) = (cos[angles + j] as f64, sin[angles + j] as f64);
                let (a, b) = (head[j] as f64, head[half + j] as f64);
                head[j] = (a * c - b * s) as f32;
                head[half + j] = (b * c + a * s) as f32;
            }
        }
    }
}

fn check(x: usize, heads: usize, head_dim: usize, cos: usize, sin: usize, position: usize) {
    assert!(
        head_dim > 0 && head_dim.is_multiple_of(2),
        "rope: head_dim {head_dim} is even"
    );
    assert!(
        heads > 0 && x.is_multiple_of(heads * head_dim),
        "rope: x is (t, heads, dh)"
    );
    let positions = position + x / (heads * head_dim);
    assert!(
        cos.min(sin) >= positions * (head_dim / 2),
        "rope: tables end before position {positions}"
    );
}
