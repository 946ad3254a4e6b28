//! How the next token is chosen from logits: greedy, or drawn at the temperature among the best. The
//! draw depends on seed and position alone, so that the same seed gives the same tokens.

use cpu_kernels::sample::{self, MAX_CANDIDATES, Settings};

use crate::Error;

/// How to sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Only the `top_k` most likely tokens are candidates, 1 to 64.
    pub top_k: u32,
    /// Only the most likely tokens whose probabilities first add up to `top_p` are candidates.
    pub top_p: f32,
    /// Only tokens at least `min_p` as probable as the most likely one are candidates.
    pub min_p: f32,
    /// Divides the positive logits of tokens that the context holds, multiplies the negative ones;
    /// 1 leaves them.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Sampling {
    /// Always the most likely token.
    pub const GREEDY: Sampling = Sampling {
        temperature: 0.0,
        top_k: 1,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seed: 0,
    };

    /// Whether the logits' greatest is always taken.
    pub fn is_greedy(&self) -> bool {
        (self.temperature == 0.0 || self.top_k == 1) && self.repetition_penalty == 1.0
    }

    /// Checks the settings, as a user may give them.
    ///
    /// # Errors
    /// [`Error::Input`] naming the setting that is out of range.
    pub fn check(&self) -> Result<(), Error> {
        let fail = |what: &str, rule: &str, value: &dyn std::fmt::Display| {
            Err(Error::Input(format!("{what} must be {rule}, not {value}")))
        };
        if !self.temperature.is_finite() || self.temperature < 0.0 {
            return fail("temperature", "0 or more", &self.temperature);
        }
        if !(1..=MAX_CANDIDATES as u32).contains(&self.top_k) {
            let rule = format!("1 to {MAX_CANDIDATES}");
            return fail("top-k", &rule, &self.top_k);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return fail("top-p", "above 0 and at most 1", &self.top_p);
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return fail("min-p", "from 0 to 1", &self.min_p);
        }
        if !self.repetition_penalty.is_finite() || self.repetition_penalty <= 0.0 {
            return fail("repetition penalty", "above 0", &self.repetition_penalty);
        }
        Ok(())
    }

    /// The settings as kernels take them.
    pub(crate) fn settings(&self) -> Settings {
        Settings {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        }
    }
}

/// A bit a token: whether the context holds it. Bit `v % 32` of word `v / 32`.
pub(crate) fn seen(tokens: &[u32], vocab: usize) -> Vec<u32> {
    let mut words = vec![0; vocab.div_ceil(32)];
    for token in tokens {
        words[*token as usize / 32] |= 1 << (token % 32);
    }
    words
}

/// The token to follow `context`, whose logits `(V,)` are given; they are penalised in place.
///
/// # Errors
/// [`Error::Machine`] if no logit is a number.
pub(crate) fn choose(
    logits: &mut [f32],
    context: &[u32],
    sampling: &Sampling,
) -> Result<u32, Error> {
    if sampling.repetition_penalty != 1.0 {
        let seen = seen(context, logits.len());
        sample::penalise(logits, &seen, sampling.repetition_penalty);
    }
    let candidates = sample::top_k(logits, sampling.top_k as usize);
    if candidates.is_empty() {
        return Err(no_number());
    }
    let position = context.len().saturating_sub(1) as u32;
    Ok(sample::choose(&candidates, &sampling.settings(), position))
}

/// The error of logits that hold nothing to choose from.
pub(crate) fn no_number() -> Error {
    Error::Machine("no logit is a number: the model's weights are broken".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOT: Sampling = Sampling {
        temperature: 1.0,
        top_k: 64,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seed: 7,
    };

    /// Tokens drawn after contexts of 1, 2, … tokens with the same logits.
    fn draws(logits: &[f32], sampling: &Sampling, count: usize) -> Vec<u32> {
        let context = vec![0; count];
        (1..=count)
            .map(|len| choose(&mut logits.to_vec(), &context[..len], sampling).expect("a token"))
            .collect()
    }

    #[test]
    fn greedy_takes_the_first_maximum_and_never_nan() {
        let logits = [f32::NAN, 1.0, 3.0, 3.0, f32::NEG_INFINITY];
        assert_eq!(draws(&logits, &Sampling::GREEDY, 1), [2]);
        assert_eq!(draws(&logits, &Sampling { top_k: 1, ..HOT }, 1), [2]);
        assert!(Sampling::GREEDY.is_greedy() && !HOT.is_greedy());
    }

    #[test]
    fn frequencies_follow_the_softmax_at_the_temperature() {
        let logits = [0.0f32, 1.0, 2.0];
        for temperature in [0.5f32, 1.0, 2.0] {
            let drawn = draws(&logits, &Sampling { temperature, ..HOT }, 40_000);
            let weights = logits.map(|l| (l as f64 / temperature as f64).exp());
            let total: f64 = weights.iter().sum();
            for (token, weight) in weights.iter().enumerate() {
                let count = drawn.iter().filter(|t| **t as usize == token).count();
                let got = count as f64 / drawn.len() as f64;
                assert!((got - weight / total).abs() < 0.01, "{temperature}: {got}");
            }
        }
    }

    #[test]
    fn each_limit_cuts_the_tail() {
        let logits = [0.0f32, 5.0, 4.9, 1.0];
        let kept = |sampling: Sampling| {
            let drawn = draws(&logits, &sampling, 2000);
            [0, 1, 2, 3].map(|token| drawn.contains(&token))
        };
        assert_eq!(
            kept(Sampling { top_k: 2, ..HOT }),
            [false, true, true, false]
        );
        // Token 1 alone holds more than half of the mass; a nucleus includes what crosses it.
        assert_eq!(
            kept(Sampling { top_p: 0.5, ..HOT }),
            [false, true, false, false]
        );
        assert_eq!(
            kept(Sampling { top_p: 0.6, ..HOT }),
            [false, true, true, false]
        );
        assert_eq!(
            kept(Sampling { min_p: 0.5, ..HOT }),
            [false, true, true, false]
        );
    }

    #[test]
    fn what_the_context_holds_is_penalised() {
        let sampling = Sampling {
            repetition_penalty: 2.0,
            ..Sampling::GREEDY
        };
        assert!(!sampling.is_greedy());
        assert_eq!(choose(&mut [3.0, 2.0, 0.0], &[0], &sampling).ok(), Some(1));
        assert_eq!(choose(&mut [3.0, 2.0, 0.0], &[2], &sampling).ok(), Some(0));
        assert_eq!(seen(&[0, 33, 33, 63], 65), [1, 1 << 31 | 2, 0]);
    }

    #[test]
    fn the_seed_decides_everything() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32 / 20.0).collect();
        let of = |seed| draws(&logits, &Sampling { seed, ..HOT }, 64);
        assert_eq!(of(5), of(5));
        assert_ne!(of(5), of(6));
    }

    #[test]
    fn bad_settings_and_logits_are_errors() {
        for bad in [
            Sampling {
                temperature: -1.0,
                ..HOT
            },
            Sampling {
                temperature: f32::NAN,
                ..HOT
            },
            Sampling { top_k: 0, ..HOT },
            Sampling { top_k: 65, ..HOT },
            Sampling { top_p: 0.0, ..HOT },
            Sampling {
                top_p: f32::NAN,
                ..HOT
            },
            Sampling { min_p: 1.1, ..HOT },
            Sampling {
                repetition_penalty: 0.0,
                ..HOT
            },
        ] {
            assert_eq!(bad.check().expect_err("refused").exit_code(), 2);
        }
        assert!(HOT.check().is_ok() && Sampling::GREEDY.check().is_ok());
        let none = choose(&mut [f32::NAN; 3], &[0], &HOT).expect_err("no number");
        assert_eq!(none.exit_code(), 1);
    }
}
