//! Picks the next token from logits: temperature, top-k, top-p, and a seeded generator, so that the
//! same seed on the same logits gives the same tokens on every machine.

use crate::Error;

/// How to sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Only the `top_k` most likely tokens are candidates; 0 keeps all.
    pub top_k: usize,
    /// Only the most likely tokens whose probabilities first add up to `top_p` are candidates.
    pub top_p: f32,
    /// Seed of the generator.
    pub seed: u64,
}

impl Sampling {
    /// Always the most likely token.
    pub const GREEDY: Sampling = Sampling {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        seed: 0,
    };

    /// Whether the most likely token is always taken.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || self.top_k == 1
    }
}

/// SplitMix64 (<https://prng.di.unimi.it/splitmix64.c>): small, and the same everywhere.
#[derive(Debug, Clone)]
struct SplitMix64(u64);

impl SplitMix64 {
    /// The next 64 bits.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `[0, 1)` with 53 bits.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Draws tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    generator: SplitMix64,
    /// Candidates of the current step, kept to avoid an allocation a token.
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// A sampler at the start of its seed's sequence.
    ///
    /// # Errors
    /// [`Error::Input`] if the temperature is negative or not finite, or top-p is outside (0, 1].
    pub fn new(sampling: Sampling) -> Result<Self, Error> {
        if !sampling.temperature.is_finite() || sampling.temperature < 0.0 {
            return Err(Error::Input(format!(
                "temperature must be 0 or more, not {}",
                sampling.temperature
            )));
        }
        if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
            return Err(Error::Input(format!(
                "top-p must be above 0 and at most 1, not {}",
                sampling.top_p
            )));
        }
        Ok(Self {
            sampling,
            generator: SplitMix64(sampling.seed),
            candidates: Vec::new(),
        })
    }

    /// How this sampler samples.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Draws a token from `(V,)` logits. NaN is never drawn; the lowest id wins a greedy tie.
    ///
    /// # Errors
    /// [`Error::Machine`] if no logit is a number above minus infinity.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, Error> {
        self.candidates.clear();
        self.candidates.extend(
            logits
                .iter()
                .zip(0u32..)
                .filter(|(logit, _)| !logit.is_nan() && **logit != f32::NEG_INFINITY)
                .map(|(logit, id)| (*logit, id)),
        );
        // Most likely first; equal logits by id, so that the order never depends on the sort.
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if self.sampling.is_greedy() {
            return self
                .candidates
                .iter()
                .copied()
                .reduce(|best, c| if c.0 > best.0 { c } else { best })
                .map(|(_, id)| id)
                .ok_or_else(no_candidate);
        }
        let keep = match self.sampling.top_k {
            0 => self.candidates.len(),
            k => k.min(self.candidates.len()),
        };
        if keep < self.candidates.len() {
            self.candidates.select_nth_unstable_by(keep, order);
            self.candidates.truncate(keep);
        }
        self.candidates.sort_unstable_by(order);
        let top = self.candidates.first().ok_or_else(no_candidate)?.0;
        if top == f32::INFINITY {
            return Ok(self.candidates[0].1);
        }

        // Weights relative to the most likely token, in place of the logits.
        let inverse_temperature = 1.0 / self.sampling.temperature as f64;
        let weight = |logit: f32| ((logit as f64 - top as f64) * inverse_temperature).exp();
        let total: f64 = self.candidates.iter().map(|c| weight(c.0)).sum();
        let nucleus = total * self.sampling.top_p as f64;
        let mut kept = 0.0;
        let mut count = 0;
        for candidate in &self.candidates {
            kept += weight(candidate.0);
            count += 1;
            if kept >= nucleus {
                break;
            }
        }
        let mut left = self.generator.unit() * kept;
        for candidate in &self.candidates[..count] {
            left -= weight(candidate.0);
            if left < 0.0 {
                return Ok(candidate.1);
            }
        }
        // Rounding can leave a sliver after the last one.
        Ok(self.candidates[count - 1].1)
    }
}

fn no_candidate() -> Error {
    Error::Machine("no logit is a number: the model's weights are broken".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_k: usize, top_p: f32, seed: u64) -> Sampler {
        Sampler::new(Sampling {
            temperature,
            top_k,
            top_p,
            seed,
        })
        .expect("valid settings")
    }

    /// How often each of `n` tokens is drawn in `draws` draws.
    fn histogram(sampler: &mut Sampler, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(logits).expect("a token") as usize] += 1;
        }
        counts
    }

    #[test]
    fn splitmix64_gives_its_published_sequence() {
        let mut generator = SplitMix64(1234567);
        let got: Vec<u64> = (0..3).map(|_| generator.next()).collect();
        assert_eq!(
            got,
            [
                6457827717110365317,
                3203168211198807973,
                9817491932198370423
            ]
        );
    }

    #[test]
    fn greedy_takes_the_first_maximum_and_never_nan() {
        let logits = [f32::NAN, 1.0, 3.0, 3.0, f32::NEG_INFINITY];
        assert_eq!(
            Sampler::new(Sampling::GREEDY)
                .unwrap()
                .sample(&logits)
                .unwrap(),
            2
        );
        assert_eq!(sampler(1.0, 1, 1.0, 7).sample(&logits).unwrap(), 2);
    }

    #[test]
    fn frequencies_follow_the_softmax_at_the_temperature() {
        let logits = [0.0f32, 1.0, 2.0];
        for temperature in [0.5f32, 1.0, 2.0] {
            let draws = 40_000;
            let counts = histogram(&mut sampler(temperature, 0, 1.0, 1), &logits, draws);
            let weights: Vec<f64> = logits
                .iter()
                .map(|l| (*l as f64 / temperature as f64).exp())
                .collect();
            let total: f64 = weights.iter().sum();
            for (count, weight) in counts.iter().zip(&weights) {
                let got = *count as f64 / draws as f64;
                assert!((got - weight / total).abs() < 0.01, "{temperature}: {got}");
            }
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [0.0f32, 5.0, 4.9, 1.0];
        let counts = histogram(&mut sampler(1.0, 2, 1.0, 3), &logits, 2000);
        assert_eq!((counts[0], counts[3]), (0, 0));
        assert!(counts[1] > 0 && counts[2] > 0);
        // Token 1 alone holds more than 0.5 of the mass.
        let counts = histogram(&mut sampler(1.0, 0, 0.5, 3), &logits, 2000);
        assert_eq!(counts, [0, 2000, 0, 0]);
        // The nucleus includes the token that crosses the bound.
        let counts = histogram(&mut sampler(1.0, 0, 0.6, 3), &logits, 2000);
        assert!(counts[2] > 0 && counts[0] == 0 && counts[3] == 0);
    }

    #[test]
    fn the_seed_decides_everything() {
        let logits: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32 / 20.0).collect();
        let draw = |seed| {
            let mut s = sampler(0.8, 50, 0.95, seed);
            (0..64)
                .map(|_| s.sample(&logits).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(5), draw(5));
        assert_ne!(draw(5), draw(6));
    }

    #[test]
    fn bad_settings_and_logits_are_errors() {
        for (temperature, top_p) in [
            (-1.0, 1.0),
            (f32::NAN, 1.0),
            (1.0, 0.0),
            (1.0, 1.1),
            (1.0, f32::NAN),
        ] {
            let error = Sampler::new(Sampling {
                temperature,
                top_p,
                top_k: 0,
                seed: 0,
            })
            .expect_err("refused");
            assert_eq!(error.exit_code(), 2);
        }
        for logits in [&[f32::NAN, f32::NEG_INFINITY][..], &[]] {
            assert!(sampler(1.0, 0, 1.0, 0).sample(logits).is_err());
            assert!(sampler(0.0, 0, 1.0, 0).sample(logits).is_err());
        }
    }
}
