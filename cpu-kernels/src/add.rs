//! Residual addition: `y += x`.

use crate::isa::{Isa, per_isa};

/// Adds `x` to `y`, element by element.
///
/// # Panics
/// If the lengths differ.
pub fn reference(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "add: lengths of x and y");
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// As [`reference`], by the fastest instructions of this CPU.
///
/// # Panics
/// If the lengths differ.
pub fn forward(x: &[f32], y: &mut [f32]) {
    part(Isa::selected(), x, y);
}

/// [`forward`] with the instruction set given.
///
/// # Panics
/// If the lengths differ.
pub fn part(isa: Isa, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "add: lengths of x and y");
    add(isa, x, y);
}

per_isa!(fn add(x: &[f32], y: &mut [f32]) = add_body);

#[inline(always)]
fn add_body<const FMA: bool>(x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_equals_the_reference() {
        for len in [0, 1, 193, 577] {
            let x: Vec<f32> = (0..len).map(|i| i as f32 * 0.3).collect();
            let mut expected = vec![1.25; len];
            reference(&x, &mut expected);
            for isa in Isa::available() {
                let mut y = vec![1.25; len];
                part(isa, &x, &mut y);
                assert_eq!(y, expected, "{isa}");
            }
        }
    }
}
