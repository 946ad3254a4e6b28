//! How well a model predicts a text, and how close it is to another model: perplexity,
//! Kullback-Leibler divergence and agreement of the likeliest token, with the definitions of
//! llama.cpp's perplexity program, so that figures can be put side by side.

pub mod log_probs;
pub mod questions;
mod summary;
mod windows;

pub use summary::{Estimate, Summary};
pub use windows::Windows;

use crate::Error;
use log_probs::StoredPrediction;

/// What a model says comes next: logits with what turns them into log-probabilities.
#[derive(Debug, Clone, Copy)]
pub struct Prediction<'a> {
    /// `(V,)`.
    logits: &'a [f32],
    /// Logarithm of the sum of the exponentials of all logits.
    log_sum: f64,
    top: u32,
}

impl<'a> Prediction<'a> {
    /// Reads the logits of one position.
    ///
    /// # Errors
    /// [`Error::Input`] if there are none or one is not finite: such a model predicts nothing.
    pub fn new(logits: &'a [f32]) -> Result<Self, Error> {
        let mut top = 0;
        for (id, logit) in logits.iter().enumerate() {
            if !logit.is_finite() {
                return Err(Error::Input(format!(
                    "the model's logit of token {id} is {logit}: its weights are damaged"
                )));
            }
            // The lowest id wins a tie, as in `Backend::argmax`.
            if *logit > logits[top] {
                top = id;
            }
        }
        let max = f64::from(
            *logits
                .get(top)
                .ok_or_else(|| Error::input("no logits to read"))?,
        );
        let sum: f64 = logits.iter().map(|l| (f64::from(*l) - max).exp()).sum();
        Ok(Self {
            logits,
            log_sum: max + sum.ln(),
            top: top as u32,
        })
    }

    /// V.
    pub fn vocab(&self) -> usize {
        self.logits.len()
    }

    /// Natural logarithm of the probability of token `id`.
    ///
    /// # Panics
    /// If `id` is outside the vocabulary.
    pub fn log_prob(&self, id: u32) -> f64 {
        f64::from(self.logits[id as usize]) - self.log_sum
    }

    /// The likeliest token.
    pub fn top(&self) -> u32 {
        self.top
    }

    /// Divergence of `other` from this one, in nats: `Σ p (ln p - ln q)`.
    ///
    /// # Panics
    /// If the vocabularies differ in size.
    pub fn kl(&self, other: &Prediction<'_>) -> f64 {
        assert_eq!(self.vocab(), other.vocab(), "two vocabularies");
        let pairs = self.logits.iter().zip(other.logits);
        pairs
            .map(|(p, q)| {
                let log_p = f64::from(*p) - self.log_sum;
                log_p.exp() * (log_p - (f64::from(*q) - other.log_sum))
            })
            .sum()
    }
}

/// What a model is compared with at one position.
#[derive(Debug, Clone, Copy)]
pub enum Reference<'a> {
    /// Another model's logits.
    Model(Prediction<'a>),
    /// A prediction that was saved.
    Stored(&'a StoredPrediction),
}

/// One scored position of a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Log-probability that the model gives the token that follows.
    pub log_prob: f64,
    /// Against the reference, if there is one.
    pub compared: Option<Compared>,
}

/// A model's prediction beside a reference's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Compared {
    /// Log-probability that the reference gives the token that follows.
    pub log_prob: f64,
    /// Divergence of the model from the reference, in nats.
    pub kl: f64,
    /// Both have the same likeliest token.
    pub same_top: bool,
}

/// Scores a prediction: `next` is the token that follows.
pub fn score(model: &Prediction<'_>, next: u32, reference: Option<Reference<'_>>) -> Score {
    Score {
        log_prob: model.log_prob(next),
        compared: reference.map(|reference| match reference {
            Reference::Model(reference) => Compared {
                log_prob: reference.log_prob(next),
                kl: reference.kl(model),
                same_top: reference.top() == model.top(),
            },
            Reference::Stored(reference) => Compared {
                log_prob: f64::from(reference.next_log_prob),
                kl: reference.kl(model),
                same_top: reference.top == model.top(),
            },
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probs_are_a_distribution_and_the_lowest_of_equals_is_on_top() {
        let logits = [0.5, 2.0, 2.0, -40.0];
        let prediction = Prediction::new(&logits).expect("finite");
        let sum: f64 = (0..4).map(|id| prediction.log_prob(id).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-12, "{sum}");
        assert_eq!(prediction.top(), 1);
        // Adding the same to all changes nothing.
        let shifted = logits.map(|l| l + 100.0);
        let shifted = Prediction::new(&shifted).expect("finite");
        assert!((shifted.log_prob(0) - prediction.log_prob(0)).abs() < 1e-6);
    }

    #[test]
    fn divergence_is_that_of_the_definition() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2).
        let (p, q) = ([2f32, 1.0, 1.0], [1f32, 1.0, 2.0]);
        let (p, q) = (p.map(f32::ln), q.map(f32::ln));
        let (p, q) = (
            Prediction::new(&p).expect("finite"),
            Prediction::new(&q).expect("finite"),
        );
        let expected = 0.5 * 2f64.ln() - 0.25 * 2f64.ln();
        assert!((p.kl(&q) - expected).abs() < 1e-7, "{}", p.kl(&q));
        assert!(p.kl(&p).abs() < 1e-15);
        let score = score(&q, 2, Some(Reference::Model(p)));
        let compared = score.compared.expect("there is a reference");
        assert!((score.log_prob - 0.5f64.ln()).abs() < 1e-7);
        assert!((compared.log_prob - 0.25f64.ln()).abs() < 1e-7);
        assert!(!compared.same_top);
    }

    #[test]
    fn predictions_that_are_no_numbers_are_refused() {
        for logits in [&[0.0, f32::NAN][..], &[f32::INFINITY], &[]] {
            assert_eq!(Prediction::new(logits).unwrap_err().exit_code(), 2);
        }
    }
}
