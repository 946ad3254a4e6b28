//! What the scores of a text add up to.

use serde::Serialize;

use super::Score;

/// A mean and its standard error.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// Mean.
    pub mean: f64,
    /// Standard error of the mean, the values taken as independent.
    pub error: f64,
}

impl Estimate {
    /// Of `values`; `None` without any.
    pub fn of(values: &[f64]) -> Option<Self> {
        (!values.is_empty()).then(|| Self::from_values(values.iter().copied()))
    }

    fn from_values(values: impl Iterator<Item = f64> + Clone) -> Self {
        let count = values.clone().count() as f64;
        let mean = values.clone().sum::<f64>() / count;
        let squares: f64 = values.map(|value| (value - mean).powi(2)).sum();
        // A single value tells nothing about its spread.
        let error = match count > 1.0 {
            true => (squares / (count - 1.0) / count).sqrt(),
            false => 0.0,
        };
        Self { mean, error }
    }
}

/// The figures of a scored text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Scored tokens.
    pub tokens: usize,
    /// Exponential of the mean negative log-probability of the token that follows.
    pub perplexity: Estimate,
    /// Against a reference, if there was one.
    pub reference: Option<Comparison>,
}

/// The figures of a model beside its reference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Perplexity of the reference.
    pub perplexity: Estimate,
    /// `ln(perplexity / perplexity of the reference)`; its error knows that both read one text.
    pub log_perplexity_ratio: Estimate,
    /// Kullback-Leibler divergence of the model from the reference, in nats.
    pub kl: Estimate,
    /// The divergence that half of the positions stay below.
    pub kl_median: f64,
    /// The divergence that 99% of the positions stay below.
    pub kl_99: f64,
    /// The largest divergence.
    pub kl_max: f64,
    /// Share of positions at which both have the same likeliest token.
    pub top1: Estimate,
    /// Root of the mean squared change of the probability of the token that follows.
    pub rms_probability_change: f64,
}

impl Summary {
    /// Adds up `scores`; the comparison is there if all of them have a reference. `None` without
    /// scores.
    pub fn of(scores: &[Score]) -> Option<Self> {
        if scores.is_empty() {
            return None;
        }
        let compared: Option<Vec<_>> = scores.iter().map(|score| score.compared).collect();
        let reference = compared.map(|compared| {
            let mut kls: Vec<f64> = compared.iter().map(|c| c.kl).collect();
            kls.sort_unstable_by(f64::total_cmp);
            let both = scores.iter().zip(&compared);
            let squares = both.clone().map(|(score, reference)| {
                (score.log_prob.exp() - reference.log_prob.exp()).powi(2)
            });
            Comparison {
                perplexity: perplexity(compared.iter().map(|c| c.log_prob)),
                log_perplexity_ratio: Estimate::from_values(
                    both.map(|(score, reference)| reference.log_prob - score.log_prob),
                ),
                kl: Estimate::from_values(compared.iter().map(|c| c.kl)),
                kl_median: quantile(&kls, 0.5),
                kl_99: quantile(&kls, 0.99),
                kl_max: quantile(&kls, 1.0),
                top1: Estimate::from_values(
                    compared.iter().map(|c| f64::from(u8::from(c.same_top))),
                ),
                rms_probability_change: (squares.sum::<f64>() / scores.len() as f64).sqrt(),
            }
        });
        Some(Self {
            tokens: scores.len(),
            perplexity: perplexity(scores.iter().map(|score| score.log_prob)),
            reference,
        })
    }
}

fn perplexity(log_probs: impl Iterator<Item = f64> + Clone) -> Estimate {
    let loss = Estimate::from_values(log_probs.map(|log_prob| -log_prob));
    let mean = loss.mean.exp();
    Estimate {
        mean,
        error: mean * loss.error,
    }
}

/// The value at `share` of a sorted, non-empty list, between two entries in proportion.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::super::Compared;
    use super::*;

    #[test]
    fn figures_are_those_of_the_definitions() {
        let scores: Vec<Score> = [(0.5, 0.25, 0.1, true), (0.125, 0.25, 0.3, false)]
            .map(|(own, other, kl, same_top): (f64, f64, f64, bool)| Score {
                log_prob: own.ln(),
                compared: Some(Compared {
                    log_prob: other.ln(),
                    kl,
                    same_top,
                }),
            })
            .into();
        let summary = Summary::of(&scores).expect("there are scores");
        let near = |have: f64, want: f64| assert!((have - want).abs() < 1e-12, "{have} {want}");
        assert_eq!(summary.tokens, 2);
        // Mean loss (ln 2 + ln 8) / 2 = 2 ln 2; half the difference of two values is their mean's error.
        near(summary.perplexity.mean, 4.0);
        near(summary.perplexity.error, 4.0 * 2f64.ln());
        let reference = summary.reference.expect("both are compared");
        near(reference.perplexity.mean, 4.0);
        near(reference.perplexity.error, 0.0);
        near(reference.log_perplexity_ratio.mean, 0.0);
        near(reference.kl.mean, 0.2);
        near(reference.kl.error, 0.1);
        near(reference.kl_median, 0.2);
        near(reference.kl_99, 0.298);
        near(reference.kl_max, 0.3);
        near(reference.top1.mean, 0.5);
        near(
            reference.rms_probability_change,
            (0.5f64 * (0.0625 + 0.015625)).sqrt(),
        );
    }

    #[test]
    fn without_scores_or_references_nothing_is_claimed() {
        assert_eq!(Summary::of(&[]), None);
        let score = Score {
            log_prob: -1.0,
            compared: None,
        };
        let summary = Summary::of(&[score]).expect("a score");
        assert_eq!(summary.reference, None);
        assert_eq!(summary.perplexity.error, 0.0);
    }
}
