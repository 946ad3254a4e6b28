//! Token choice by sampling: the best logits, and one of them drawn at random. The arithmetic is
//! what the GPU's `sample_topk` does, operation by operation, so both draw the same token.

/// Candidates at most.
pub const MAX_CANDIDATES: usize = 64;

/// How a token is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Divides the logits; 0 takes the best.
    pub temperature: f32,
    /// Candidates: 1 to [`MAX_CANDIDATES`].
    pub top_k: u32,
    /// Only the best whose probabilities among those first add up to `top_p` stay.
    pub top_p: f32,
    /// Only those at least `min_p` as probable as the best stay.
    pub min_p: f32,
    /// Divides positive logits of tokens that were seen and multiplies others; 1 for none.
    pub repetition_penalty: f32,
    /// Together with the position it gives the random number.
    pub seed: u64,
}

/// The `k` greatest logits with their ids, greatest first, ties to the lower id; NaN is left out.
pub fn top_k(logits: &[f32], k: usize) -> Vec<(f32, u32)> {
    let mut all: Vec<(f32, u32)> = logits
        .iter()
        .zip(0u32..)
        .filter(|(logit, _)| !logit.is_nan())
        .map(|(logit, id)| (*logit, id))
        .collect();
    // Zeros of either sign are equal.
    let order =
        |a: &(f32, u32), b: &(f32, u32)| (b.0 + 0.0).total_cmp(&(a.0 + 0.0)).then(a.1.cmp(&b.1));
    if k < all.len() {
        all.select_nth_unstable_by(k, order);
        all.truncate(k);
    }
    all.sort_unstable_by(order);
    all
}

/// Makes tokens that were seen less likely: bit `v % 32` of word `v / 32` of `seen` tells.
pub fn penalise(logits: &mut [f32], seen: &[u32], penalty: f32) {
    let inverse = 1.0 / penalty;
    for (v, logit) in logits.iter_mut().enumerate() {
        if seen
            .get(v / 32)
            .is_some_and(|word| word >> (v % 32) & 1 != 0)
        {
            *logit *= if *logit > 0.0 { inverse } else { penalty };
        }
    }
}

/// One of `candidates`, which are ordered as by [`top_k`]; token 0 where there is none.
pub fn choose(candidates: &[(f32, u32)], settings: &Settings, position: u32) -> u32 {
    let kept = candidates
        .len()
        .min(settings.top_k as usize)
        .min(MAX_CANDIDATES);
    let candidates = &candidates[..kept];
    let Some(&(greatest, first)) = candidates.first() else {
        return 0;
    };
    if settings.temperature == 0.0 || kept == 1 || greatest == f32::INFINITY {
        return first;
    }
    let inverse_temperature = 1.0 / settings.temperature;
    let mut sums = [0.0f32; MAX_CANDIDATES];
    let mut count = 0;
    let mut total = 0.0f32;
    for (i, (logit, _)) in candidates.iter().enumerate() {
        let weight = exp((logit - greatest) * inverse_temperature);
        total += weight;
        sums[i] = total;
        if weight >= settings.min_p {
            count = i + 1;
        }
    }
    let sums = &sums[..kept];
    let nucleus = total * settings.top_p;
    let in_nucleus = sums.iter().position(|&sum| sum >= nucleus);
    let count = count.min(in_nucleus.map_or(kept, |i| i + 1)).max(1);
    let drawn = uniform(settings.seed, position) * sums[count - 1];
    let chosen = sums[..count].iter().position(|&sum| sum > drawn);
    candidates[chosen.unwrap_or(count - 1)].1
}

/// e^x for x of at most 0, within 2 units in the last place; 0 below about -87.
fn exp(x: f32) -> f32 {
    let exponent = x * std::f32::consts::LOG2_E;
    // NaN, which only infinities make, counts as nothing.
    if exponent.is_nan() || exponent < -126.0 {
        return 0.0;
    }
    // Adding and taking away 1.5 2^23 rounds to the nearest whole number.
    let rounded = (exponent + ROUND) - ROUND;
    let rest = exponent - rounded;
    let mut power = EXP2[0];
    for coefficient in &EXP2[1..] {
        power = power.mul_add(rest, *coefficient);
    }
    power * f32::from_bits(((rounded as i32 + 127) as u32) << 23)
}

const ROUND: f32 = 12_582_912.0;

/// Taylor coefficients of 2^x, highest first: ln(2)^n / n!.
const EXP2: [f32; 8] = [
    1.525_273_4e-5,
    1.540_353e-4,
    1.333_355_8e-3,
    9.618_129e-3,
    5.550_411e-2,
    2.402_265e-1,
    std::f32::consts::LN_2,
    1.0,
];

/// A number in `[0, 1)`, a multiple of 2^-24.
fn uniform(seed: u64, position: u32) -> f32 {
    let word = philox([position, 0, 0, 0], [seed as u32, (seed >> 32) as u32])[0];
    (word >> 8) as f32 / (1 << 24) as f32
}

/// Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, Parallel random numbers: as easy as 1, 2, 3).
fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut a, mut b, mut c, mut d] = counter;
    let [mut low, mut high] = key;
    for _ in 0..10 {
        let product_a = u64::from(a) * 0xD251_1F53;
        let product_c = u64::from(c) * 0xCD9E_8D57;
        [a, b, c, d] = [
            (product_c >> 32) as u32 ^ b ^ low,
            product_c as u32,
            (product_a >> 32) as u32 ^ d ^ high,
            product_a as u32,
        ];
        low = low.wrapping_add(0x9E37_79B9);
        high = high.wrapping_add(0xBB67_AE85);
    }
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Settings = Settings {
        temperature: 1.0,
        top_k: 64,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        seed: 7,
    };

    /// Known answers of the authors' Random123 library.
    #[test]
    fn philox_gives_its_published_numbers() {
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn exponentials_are_exact_to_two_units() {
        for i in 0..87_000 {
            let x = -(i as f32) / 1000.0;
            let want = f64::from(x).exp();
            let error = (f64::from(exp(x)) - want).abs() / want;
            // Rounding of x log2 e moves the result by up to 126 ln 2 / 2 units.
            assert!(error < 6e-6, "{x}: {error}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::NAN), 0.0);
    }

    #[test]
    fn the_best_come_first_and_ties_by_id() {
        let logits = [1.0, f32::NAN, 3.0, 0.0, 3.0, -0.0, f32::NEG_INFINITY];
        let ids = |k| -> Vec<u32> { top_k(&logits, k).iter().map(|c| c.1).collect() };
        assert_eq!(ids(3), [2, 4, 0]);
        assert_eq!(ids(9), [2, 4, 0, 3, 5, 6]);
        assert!(ids(0).is_empty());
    }

    #[test]
    fn seen_tokens_lose() {
        let mut logits = [2.0, -2.0, 2.0, -2.0];
        penalise(&mut logits, &[0b0011], 2.0);
        assert_eq!(logits, [1.0, -4.0, 2.0, -2.0]);
    }

    fn shares(candidates: &[(f32, u32)], settings: &Settings) -> Vec<f64> {
        let draws = 20_000;
        let mut counts = vec![0; candidates.len()];
        for position in 0..draws {
            counts[choose(candidates, settings, position) as usize] += 1;
        }
        counts
            .iter()
            .map(|&n| f64::from(n) / f64::from(draws))
            .collect()
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let candidates = [(2.0, 0), (1.0, 1), (0.0, 2)];
        let near = |settings: Settings, want: [f64; 3]| {
            for (got, want) in shares(&candidates, &settings).iter().zip(want) {
                assert!((got - want).abs() < 0.015, "{got} {want} {settings:?}");
            }
        };
        near(PLAIN, [0.665, 0.245, 0.090]);
        let cold = Settings {
            temperature: 0.5,
            ..PLAIN
        };
        near(cold, [0.867, 0.117, 0.016]);
        near(Settings { top_k: 2, ..PLAIN }, [0.731, 0.269, 0.0]);
        near(
            Settings {
                top_p: 0.7,
                ..PLAIN
            },
            [0.731, 0.269, 0.0],
        );
        near(
            Settings {
                min_p: 0.2,
                ..PLAIN
            },
            [0.731, 0.269, 0.0],
        );
        near(
            Settings {
                top_p: 0.6,
                ..PLAIN
            },
            [1.0, 0.0, 0.0],
        );
        near(
            Settings {
                temperature: 0.0,
                ..PLAIN
            },
            [1.0, 0.0, 0.0],
        );
    }

    #[test]
    fn odd_candidates_give_a_token() {
        assert_eq!(choose(&[], &PLAIN, 3), 0);
        assert_eq!(choose(&[(f32::INFINITY, 9), (1.0, 2)], &PLAIN, 3), 9);
        let low = [(f32::NEG_INFINITY, 4), (f32::NEG_INFINITY, 5)];
        assert_eq!(choose(&low, &PLAIN, 3), 4);
        let same = [(1.0, 8); 2];
        assert_eq!(choose(&same, &PLAIN, 0), 8);
    }

    #[test]
    fn a_seed_and_a_position_give_one_number() {
        let candidates: Vec<(f32, u32)> = (0..64).map(|i| (0.0, i)).collect();
        let draw = |seed, position| choose(&candidates, &Settings { seed, ..PLAIN }, position);
        assert_eq!(draw(1, 2), draw(1, 2));
        let differ = (0..50).filter(|&i| draw(1, i) != draw(2, i)).count();
        assert!(differ > 40);
    }
}
