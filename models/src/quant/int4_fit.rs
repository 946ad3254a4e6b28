//! Scale and minimum of one INT4 group: from the range of its weights, or searched for.

use half::f16;

use super::Int4Form;

/// Largest level.
const MAX_LEVEL: f32 = 15.0;
/// Level that stands for zero in the symmetric form.
const ZERO_LEVEL: f32 = 8.0;
/// 1.5 * 2^23: what is added to it is rounded to a whole number, without a call on any CPU.
const SHIFT: f32 = 12_582_912.0;
/// Candidates on each side of a search.
const SYMMETRIC_STEPS: usize = 24;
const ASYMMETRIC_STEPS: usize = 6;
/// Share of the range that an asymmetric search cuts off a side at most.
const MAX_CUT: f32 = 0.15;

/// What the 16 levels of a group stand for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Int4Fit {
    /// Distance of two levels; may be negative in the symmetric form. NaN or infinite where the
    /// weights are not finite or beyond f16.
    pub scale: f16,
    /// Value of level 0; `None` in the symmetric form, where level 8 is zero.
    pub min: Option<f16>,
}

impl Int4Fit {
    /// Spans the range of the group. In the symmetric form the weight of largest magnitude becomes
    /// level 0 exactly, up to the rounding of the scale to f16.
    pub fn range(weights: &[f32], form: Int4Form) -> Int4Fit {
        // A NaN never wins a comparison; it survives in the sum.
        let finite = weights.iter().sum::<f32>().is_finite();
        let or_nan = |value: f32| f16::from_f32(if finite { value } else { f32::NAN });
        match form {
            Int4Form::Symmetric => Int4Fit {
                scale: or_nan(extreme(weights) / -ZERO_LEVEL),
                min: None,
            },
            Int4Form::Asymmetric => {
                let (low, high) = bounds(weights);
                let min = or_nan(low);
                Int4Fit {
                    scale: f16::from_f32((high - min.to_f32()).max(0.0) / MAX_LEVEL),
                    min: Some(min),
                }
            }
        }
    }

    /// Searches for the levels with the least sum of squared errors, each weighed by its
    /// `importance` (none: all alike): narrower ranges, then the least-squares line through the
    /// levels that they give. Never worse than [`Int4Fit::range`].
    pub fn search(weights: &[f32], importance: Option<&[f32]>, form: Int4Form) -> Int4Fit {
        let range = Int4Fit::range(weights, form);
        if !range.is_finite() {
            return range;
        }
        let mut best = (f32::INFINITY, range);
        let mut consider = |fit: Int4Fit| {
            let (line, error) = fit.line(weights, importance);
            if error < best.0 {
                best = (error, line);
            }
        };
        match form {
            Int4Form::Symmetric => {
                let extreme = extreme(weights);
                for step in 0..SYMMETRIC_STEPS {
                    // Level of the extreme, in either direction: from beyond the last one to half.
                    let level = 9.0 - 4.5 * step as f32 / SYMMETRIC_STEPS as f32;
                    for level in [-level, level] {
                        consider(Int4Fit {
                            scale: f16::from_f32(extreme / level),
                            min: None,
                        });
                    }
                }
            }
            Int4Form::Asymmetric => {
                let (low, high) = bounds(weights);
                let cut = |step: usize| {
                    (high - low) * MAX_CUT * step as f32 / (ASYMMETRIC_STEPS - 1) as f32
                };
                for step in 0..ASYMMETRIC_STEPS * ASYMMETRIC_STEPS {
                    let low = low + cut(step / ASYMMETRIC_STEPS);
                    let high = high - cut(step % ASYMMETRIC_STEPS);
                    consider(Int4Fit {
                        scale: f16::from_f32((high - low) / MAX_LEVEL),
                        min: Some(f16::from_f32(low)),
                    });
                }
            }
        }
        let found = best.1;
        let better = found.error(weights, importance) < range.error(weights, importance);
        if found.is_finite() && better {
            found
        } else {
            range
        }
    }

    /// Level of a weight.
    #[inline]
    pub fn level(&self, weight: f32) -> u8 {
        let (inverse, offset) = self.to_levels();
        let level = (weight * inverse + offset).clamp(0.0, MAX_LEVEL);
        // The lowest bits of the shifted number are the level.
        (level + SHIFT).to_bits() as u8 & 15
    }

    /// Weight that a level stands for.
    #[inline]
    pub fn value(&self, level: u8) -> f32 {
        self.scale.to_f32() * (f32::from(level) - self.zero()) + self.min()
    }

    fn min(&self) -> f32 {
        self.min.map_or(0.0, f16::to_f32)
    }

    fn zero(&self) -> f32 {
        if self.min.is_some() { 0.0 } else { ZERO_LEVEL }
    }

    fn is_finite(&self) -> bool {
        self.scale.is_finite() && self.min.is_none_or(f16::is_finite)
    }

    /// `level = weight * inverse + offset`, rounded.
    fn to_levels(self) -> (f32, f32) {
        // A group without extent has all its weights at its minimum.
        let inverse = if self.scale == f16::ZERO {
            0.0
        } else {
            1.0 / self.scale.to_f32()
        };
        (inverse, self.zero() - self.min() * inverse)
    }

    /// Weighed sum of squared errors.
    fn error(&self, weights: &[f32], importance: Option<&[f32]>) -> f32 {
        let (inverse, offset) = self.to_levels();
        let (scale, base) = (
            self.scale.to_f32(),
            self.min() - self.scale.to_f32() * self.zero(),
        );
        sum(weights, importance, |w, importance| {
            let error = scale * nearest(w * inverse + offset) + base - w;
            [importance * error * error]
        })[0]
    }

    /// The least-squares line through the levels that this fit gives, and the error that it leaves.
    fn line(&self, weights: &[f32], importance: Option<&[f32]>) -> (Int4Fit, f32) {
        let (inverse, offset) = self.to_levels();
        let zero = self.zero();
        let [n, q, qq, w, qw, ww] = sum(weights, importance, |w, importance| {
            let q = nearest(w * inverse + offset) - zero;
            let (iq, iw) = (importance * q, importance * w);
            [importance, iq, iq * q, iw, iq * w, iw * w]
        });
        let (scale, min) = match self.min {
            None => (qw / qq, None),
            Some(_) => {
                let scale = (n * qw - q * w) / (n * qq - q * q);
                (scale, Some((w - scale * q) / n))
            }
        };
        let fit = Int4Fit {
            scale: f16::from_f32(scale),
            min: min.map(f16::from_f32),
        };
        (fit, ww - scale * qw - min.unwrap_or(0.0) * w)
    }
}

/// Nearest level; ties to even, which costs the same error as away.
#[inline]
fn nearest(level: f32) -> f32 {
    (level.clamp(0.0, MAX_LEVEL) + SHIFT) - SHIFT
}

/// Sums of what `terms` gives for each weight and its importance, in eight lanes, so that any vector
/// unit can take part; the order is fixed.
#[inline]
fn sum<const N: usize>(
    weights: &[f32],
    importance: Option<&[f32]>,
    terms: impl Fn(f32, f32) -> [f32; N],
) -> [f32; N] {
    const LANES: usize = 8;
    let ones = [1.0; LANES];
    let mut lanes = [[0.0f32; LANES]; N];
    for (i, weights) in weights.chunks(LANES).enumerate() {
        let importance = importance.map_or(&ones[..], |all| &all[i * LANES..]);
        for (lane, (w, importance)) in weights.iter().zip(importance).enumerate() {
            for (sums, term) in lanes.iter_mut().zip(terms(*w, *importance)) {
                sums[lane] += term;
            }
        }
    }
    lanes.map(|sums| sums.iter().sum())
}

/// The weight of largest magnitude, the first of several.
fn extreme(weights: &[f32]) -> f32 {
    weights
        .iter()
        .fold(0.0f32, |m, &w| if w.abs() > m.abs() { w } else { m })
}

fn bounds(weights: &[f32]) -> (f32, f32) {
    weights
        .iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), &w| {
            (low.min(w), high.max(w))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bell-shaped weights with one outlier, and importances between 0.1 and 10.
    fn group(len: usize, seed: u32) -> (Vec<f32>, Vec<f32>) {
        let mut state = seed * 2 + 1;
        let mut unit = || {
            state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            ((state >> 9) as f32 + 0.5) / (1 << 23) as f32
        };
        let mut weights: Vec<f32> = (0..len)
            .map(|_| (0..6).map(|_| unit() - 0.5).sum::<f32>() * 0.03)
            .collect();
        weights[len / 3] *= 2.0;
        (
            weights,
            (0..len).map(|_| 10f32.powf(2.0 * unit() - 1.0)).collect(),
        )
    }

    fn exact_error(fit: &Int4Fit, weights: &[f32], importance: Option<&[f32]>) -> f64 {
        weights
            .iter()
            .enumerate()
            .map(|(i, &w)| {
                let error = f64::from(fit.value(fit.level(w)) - w);
                importance.map_or(1.0, |v| f64::from(v[i])) * error * error
            })
            .sum()
    }

    #[test]
    fn a_search_is_closer_than_the_range_and_minds_importance() {
        for (form, gain) in [(Int4Form::Symmetric, 0.92), (Int4Form::Asymmetric, 0.95)] {
            for len in [32, 64, 128, 96] {
                let (mut range, mut plain, mut weighed, mut unweighed) = (0.0, 0.0, 0.0, 0.0);
                for seed in 0..50 {
                    let (weights, importance) = group(len, seed);
                    let first = Int4Fit::range(&weights, form);
                    let found = Int4Fit::search(&weights, None, form);
                    let minded = Int4Fit::search(&weights, Some(&importance), form);
                    range += exact_error(&first, &weights, None);
                    plain += exact_error(&found, &weights, None);
                    unweighed += exact_error(&found, &weights, Some(&importance));
                    weighed += exact_error(&minded, &weights, Some(&importance));
                }
                assert!(plain < gain * range, "{form:?} {len}: {plain} {range}");
                assert!(
                    weighed < 0.97 * unweighed,
                    "{form:?} {len}: {weighed} {unweighed}"
                );
            }
        }
    }

    #[test]
    fn groups_without_extent_stay_exact() {
        for value in [0.0f32, 0.25, -0.5] {
            for form in [Int4Form::Symmetric, Int4Form::Asymmetric] {
                let fit = Int4Fit::search(&[value; 32], None, form);
                assert_eq!(fit.value(fit.level(value)), value, "{form:?}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_shows_in_the_fit() {
        for bad in [f32::NAN, f32::INFINITY, 1e9] {
            for form in [Int4Form::Symmetric, Int4Form::Asymmetric] {
                let mut weights = [0.5; 32];
                weights[7] = bad;
                assert!(
                    !Int4Fit::search(&weights, None, form).is_finite(),
                    "{bad} {form:?}"
                );
            }
        }
    }
}
