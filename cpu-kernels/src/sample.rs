//! Token choice on the backend's side: argmax, and draws among the best.

pub use self::choice::{MAX_CANDIDATES, Settings, choose, penalise, top_k};
use crate::isa::{Isa, per_isa};
use crate::lanes::max;

mod choice;

/// Index of the greatest logit. The lowest index wins a tie; NaN is never chosen, unless there is
/// nothing else, when the answer is 0.
pub fn reference(logits: &[f32]) -> u32 {
    let mut best: Option<(usize, f32)> = None;
    for (i, &value) in logits.iter().enumerate() {
        if !value.is_nan() && best.is_none_or(|(_, greatest)| value > greatest) {
            best = Some((i, value));
        }
    }
    best.map_or(0, |(i, _)| i as u32)
}

/// As [`reference`], by the fastest instructions of this CPU.
pub fn argmax(logits: &[f32]) -> u32 {
    part(Isa::selected(), logits).map_or(0, |(i, _)| i)
}

/// Index and value of the greatest logit, with the instruction set given; `None` if all are NaN.
/// Over parts of the logits in order, the first greatest of the answers is the answer.
pub fn part(isa: Isa, logits: &[f32]) -> Option<(u32, f32)> {
    let greatest = greatest(isa, logits);
    let index = logits.iter().position(|&v| v == greatest)?;
    Some((index as u32, greatest))
}

per_isa!(fn greatest(logits: &[f32]) -> f32 = greatest_body);

#[inline(always)]
fn greatest_body<const FMA: bool>(logits: &[f32]) -> f32 {
    max(logits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    fn check(logits: &[f32], expected: u32) {
        assert_eq!(reference(logits), expected);
        assert_eq!(argmax(logits), expected);
        for isa in Isa::available() {
            assert_eq!(part(isa, logits).map_or(0, |(i, _)| i), expected, "{isa}");
        }
    }

    #[test]
    fn ties_go_to_the_lowest_index_and_nan_is_never_chosen() {
        const NAN: f32 = f32::NAN;
        const LOW: f32 = f32::NEG_INFINITY;
        check(&[1.0, 3.0, 3.0, 2.0], 1);
        check(&[NAN, -5.0, NAN, -4.0, NAN], 3);
        check(&[NAN, LOW, LOW], 1);
        check(&[0.0, -0.0], 0);
        check(&[-0.0, 0.0], 0);
        check(&[NAN, NAN], 0);
        check(&[], 0);
        let mut many = vec![0.5; 1000];
        many[37] = 0.75;
        many[900] = 0.75;
        many[0] = NAN;
        check(&many, 37);
    }

    #[test]
    fn equals_the_reference_on_random_logits() {
        let mut random = Random::new(7);
        for len in [1, 193, 4099] {
            let logits = random.floats(len, 20.0);
            check(&logits, reference(&logits));
        }
    }
}
