//! Activations rounded to 8 bits and back, a scale a token: `x = round(x * s) / s`, ties to even,
//! `s = 127 / max(|x|, 1e-5)` (BitNet b1.58, <https://arxiv.org/abs/2402.17764>). What ternary layers were
//! trained to read.

use crate::isa::{Isa, per_isa};
use crate::lanes::max;

/// Largest level.
pub const MAX_LEVEL: f32 = 127.0;
/// Least magnitude that a token's scale is made of.
pub const LEAST_EXTREME: f32 = 1e-5;

/// Rounds each token of `x` `(t, d)` in place. The scale and the products that are rounded are f32: in a
/// wider type other values would meet a tie.
///
/// # Panics
/// If `x` is not a whole number of tokens.
pub fn reference(x: &mut [f32], d: usize) {
    assert!(
        d > 0 && x.len().is_multiple_of(d),
        "round_int8: x is (t, d)"
    );
    for x in x.chunks_exact_mut(d) {
        let extreme = x.iter().fold(LEAST_EXTREME, |m, v| m.max(v.abs()));
        let scale = MAX_LEVEL / extreme;
        for x in x {
            *x = (*x * scale).round_ties_even().clamp(-128.0, MAX_LEVEL) / scale;
        }
    }
}

/// Makes each token of `x` `(t, d)` levels, -127 to 127, in place; gives the `(t,)` factors that make them the
/// numbers of [`reference`] again, up to a rounding of those.
///
/// # Panics
/// If `x` is not a whole number of tokens.
pub fn reference_levels(x: &mut [f32], d: usize) -> Vec<f32> {
    assert!(
        d > 0 && x.len().is_multiple_of(d),
        "round_int8: x is (t, d)"
    );
    let factor = |x: &mut [f32]| {
        let extreme = x.iter().fold(LEAST_EXTREME, |m, v| m.max(v.abs()));
        let scale = MAX_LEVEL / extreme;
        for x in x {
            *x = (*x * scale).round_ties_even().clamp(-128.0, MAX_LEVEL);
        }
        1.0 / scale
    };
    x.chunks_exact_mut(d).map(factor).collect()
}

/// As [`reference`], by the fastest instructions of this CPU.
///
/// # Panics
/// If `x` is not a whole number of tokens.
pub fn forward(x: &mut [f32], d: usize) {
    part(Isa::selected(), x, d);
}

/// [`forward`] with the instruction set given.
///
/// # Panics
/// If `x` is not a whole number of tokens.
pub fn part(isa: Isa, x: &mut [f32], d: usize) {
    assert!(
        d > 0 && x.len().is_multiple_of(d),
        "round_int8: x is (t, d)"
    );
    for x in x.chunks_exact_mut(d) {
        round(isa, x);
    }
}

per_isa!(fn round(x: &mut [f32]) = round_body);

#[inline(always)]
fn round_body<const FMA: bool>(x: &mut [f32]) {
    // Adding 1.5 * 2^23 rounds to an integer, ties to even; levels are far below it.
    const ROUND: f32 = 12_582_912.0;
    let (above, below) = (max(x), max_negated(x));
    let extreme = if below > above { below } else { above };
    let extreme = if extreme > LEAST_EXTREME {
        extreme
    } else {
        LEAST_EXTREME
    };
    let scale = MAX_LEVEL / extreme;
    for x in x {
        *x = ((*x * scale + ROUND) - ROUND) / scale;
    }
}

/// Greatest `-x`.
#[inline(always)]
fn max_negated(x: &[f32]) -> f32 {
    -x.iter()
        .fold(f32::INFINITY, |m, &v| if v < m { v } else { m })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn every_variant_equals_the_reference() {
        let mut random = Random::new(4);
        for (tokens, d) in [(1, 7), (3, 160), (2, 576), (5, 193)] {
            let x = random.floats(tokens * d, 30.0);
            let mut expected = x.clone();
            reference(&mut expected, d);
            for isa in Isa::available() {
                let mut out = x.clone();
                part(isa, &mut out, d);
                assert_eq!(out, expected, "{isa}");
            }
        }
    }

    #[test]
    fn ties_go_to_even_levels_and_small_tokens_keep_their_scale() {
        // The extreme makes the scale 1.
        let mut x = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.6];
        reference(&mut x, 7);
        assert_eq!(x, [127.0, 0.0, 2.0, 2.0, 0.0, -2.0, 127.0]);
        let mut zeros = [0.0, 1e-9, -1e-9];
        reference(&mut zeros, 3);
        assert_eq!(zeros, [0.0; 3]);
    }
}
