//! Rotary position embedding, half-split: the pair `(i, i + dh/2)` of a head turns by the angle of
//! its position (RoFormer, <https://arxiv.org/abs/2104.09864>).

use crate::isa::{Isa, per_isa};

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

/// As [`reference`], by the fastest instructions of this CPU.
///
/// # Panics
/// As [`reference`].
pub fn forward(
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
        let angles = (position + i) * half..(position + i + 1) * half;
        for head in token.chunks_exact_mut(head_dim) {
            part(
                Isa::selected(),
                head,
                &cos[angles.clone()],
                &sin[angles.clone()],
            );
        }
    }
}

/// Turns one head `(dh,)` by the angles `(dh/2,)` of its position.
///
/// # Panics
/// If the lengths do not fit.
pub fn part(isa: Isa, head: &mut [f32], cos: &[f32], sin: &[f32]) {
    assert!(
        cos.len() == sin.len() && head.len() == 2 * cos.len(),
        "rope: lengths"
    );
    turn(isa, head, cos, sin);
}

per_isa!(fn turn(head: &mut [f32], cos: &[f32], sin: &[f32]) = turn_body);

#[inline(always)]
fn turn_body<const FMA: bool>(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), &c), &s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, assert_close};

    #[test]
    fn close_to_the_reference_at_several_positions() {
        let mut random = Random::new(3);
        for (tokens, heads, dh, position) in [(1, 9, 64, 0), (3, 2, 20, 5), (17, 3, 80, 111)] {
            let positions = position + tokens;
            let angles = random.floats(positions * dh / 2, 3.0);
            let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
            let x = random.floats(tokens * heads * dh, 2.0);
            let (mut expected, mut got) = (x.clone(), x.clone());
            reference(&mut expected, heads, dh, &cos, &sin, position);
            forward(&mut got, heads, dh, &cos, &sin, position);
            assert_close(&got, &expected, 1e-6, "forward");
            for isa in Isa::available() {
                let (mut expected, mut got) = (x[..dh].to_vec(), x[..dh].to_vec());
                reference(&mut expected, 1, dh, &cos, &sin, 0);
                part(isa, &mut got, &cos[..dh / 2], &sin[..dh / 2]);
                assert_close(&got, &expected, 1e-6, isa.name());
            }
        }
    }

    #[test]
    fn a_quarter_turn_moves_the_first_half_to_the_second() {
        let mut x = [1.0, 2.0, 3.0, 4.0];
        reference(&mut x, 1, 4, &[0.0, 0.0], &[1.0, 1.0], 0);
        assert_eq!(x, [-3.0, -4.0, 1.0, 2.0]);
    }
}
