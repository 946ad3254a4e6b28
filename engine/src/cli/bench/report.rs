//! What a bench prints.

use std::io::Write;

use engine::Error;
use engine::backend::KernelTime;
use serde::Serialize;

use crate::cli::{Failure, stdout_failure, trace};

/// Mean of the runs and how far they lie from it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    pub mean: f64,
    /// Standard deviation; 0 of a single run.
    pub deviation: f64,
}

impl Rate {
    /// `None` without a run.
    pub fn of(rates: &[f64]) -> Option<Rate> {
        if rates.is_empty() {
            return None;
        }
        let mean = rates.iter().sum::<f64>() / rates.len() as f64;
        let squares: f64 = rates.iter().map(|rate| (rate - mean).powi(2)).sum();
        Some(Rate {
            mean,
            deviation: (squares / (rates.len().max(2) - 1) as f64).sqrt(),
        })
    }
}

/// Milliseconds from token to token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Latency {
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
    pub max: f64,
}

impl Latency {
    /// Of all runs together, given in seconds; `None` without a token.
    pub fn of(runs: &[Vec<f64>]) -> Option<Latency> {
        let mut all: Vec<f64> = runs.iter().flatten().map(|seconds| 1e3 * seconds).collect();
        all.sort_by(f64::total_cmp);
        let last = all.len().checked_sub(1)?;
        let percentile = |percent: usize| all[last * percent / 100];
        Some(Latency {
            p50: percentile(50),
            p95: percentile(95),
            p99: percentile(99),
            max: all[last],
        })
    }
}

/// One bench. What was not measured is null.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    pub model: &'a str,
    pub backend: &'a str,
    pub tier: &'a str,
    pub device: &'a str,
    pub prompt_tokens: usize,
    pub decode_tokens: usize,
    pub depth: usize,
    pub repeat: usize,
    /// Until the model was ready.
    pub load_seconds: f64,
    pub prompt_tokens_per_second: Option<f64>,
    pub prompt_tokens_per_second_deviation: Option<f64>,
    pub decode_tokens_per_second: Option<f64>,
    pub decode_tokens_per_second_deviation: Option<f64>,
    pub latency_ms: Option<Latency>,
    pub first_tenth_tokens_per_second: Option<f64>,
    pub last_tenth_tokens_per_second: Option<f64>,
    /// Of the generated ids, which are the same in all runs.
    pub ids_hash: Option<String>,
    /// Weights, and the cache that the average token reads.
    pub bytes_per_token: f64,
    /// What plain reading of the device's memory reaches.
    pub read_gb_per_second: f64,
    /// Tokens a second if nothing but that reading took time.
    pub floor_tokens_per_second: f64,
    pub share_of_floor: Option<f64>,
    pub joules_per_token: Option<f64>,
    /// Of the device, that the model takes at the end.
    pub memory_bytes: Option<u64>,
    /// With `--trace`.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "kernels")]
    pub kernels: Vec<KernelTime>,
}

fn kernels<S: serde::Serializer>(kernels: &[KernelTime], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(kernels.iter().map(|kernel| {
        serde_json::json!({
            "step": kernel.step,
            "kernel": kernel.kernel,
            "launch": kernel.launch,
            "launches": kernel.launches,
            "us": kernel.us,
        })
    }))
}

impl Report<'_> {
    /// Writes it to standard output, as JSON or as lines; `reason`: why this backend.
    ///
    /// # Errors
    /// A failed write.
    pub fn print(&self, reason: &str, json: bool) -> Result<(), Failure> {
        let text = match json {
            true => serde_json::to_string(self).map_err(Error::machine)? + "\n",
            false => self.lines(reason),
        };
        let mut stdout = std::io::stdout().lock();
        stdout
            .write_all(text.as_bytes())
            .and_then(|()| stdout.flush())
            .map_err(stdout_failure)
    }

    fn lines(&self, reason: &str) -> String {
        let mut lines = vec![format!(
            "{} | {} {} ({reason}) | loaded in {:.1} s",
            self.model, self.backend, self.tier, self.load_seconds
        )];
        let depth = match self.depth {
            0 => String::new(),
            depth => format!(" at depth {depth}"),
        };
        let rates = [
            (
                "prompt",
                self.prompt_tokens,
                self.prompt_tokens_per_second,
                self.prompt_tokens_per_second_deviation,
            ),
            (
                "decode",
                self.decode_tokens,
                self.decode_tokens_per_second,
                self.decode_tokens_per_second_deviation,
            ),
        ];
        for (what, tokens, rate, deviation) in rates {
            if let (Some(rate), Some(deviation)) = (rate, deviation) {
                lines.push(format!(
                    "{what}   {tokens} tokens{depth}: {rate:.1} ± {deviation:.1} tokens/s"
                ));
            }
        }
        if let (Some(share), Some(first), Some(last)) = (
            self.share_of_floor,
            self.first_tenth_tokens_per_second,
            self.last_tenth_tokens_per_second,
        ) {
            lines.push(format!(
                "floor    {:.1} tokens/s: {:.1} MB a token at {:.1} GB/s; decode is at {:.1}% of it",
                self.floor_tokens_per_second,
                self.bytes_per_token / 1e6,
                self.read_gb_per_second,
                100.0 * share
            ));
            lines.push(format!(
                "steady   first tenth {first:.1}, last tenth {last:.1} tokens/s; the same tokens in all runs"
            ));
        }
        if let Some(latency) = self.latency_ms {
            lines.push(format!(
                "latency  p50 {:.3}, p95 {:.3}, p99 {:.3}, max {:.3} ms a token",
                latency.p50, latency.p95, latency.p99, latency.max
            ));
        }
        if let Some(joules) = self.joules_per_token {
            lines.push(format!("energy   {joules:.3} J a token"));
        }
        if let Some(bytes) = self.memory_bytes {
            lines.push(format!(
                "memory   {:.1} MB of the device",
                bytes as f64 / 1e6
            ));
        }
        if !self.kernels.is_empty() {
            lines.push(trace::table(&self.kernels));
        }
        let lines: Vec<String> = lines
            .iter()
            .map(|line| {
                line.chars()
                    .filter(|c| *c == '\n' || !c.is_control())
                    .collect()
            })
            .collect();
        lines.join("\n") + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_all_runs() {
        let runs = [vec![0.001; 98], vec![0.002, 0.009]];
        let latency = Latency::of(&runs).unwrap();
        assert_eq!((latency.p50, latency.p95), (1.0, 1.0));
        assert_eq!((latency.p99, latency.max), (2.0, 9.0));
        assert_eq!(Latency::of(&[]), None);
    }

    #[test]
    fn deviation_is_that_of_a_sample() {
        let rate = Rate::of(&[1.0, 2.0, 3.0]).unwrap();
        assert_eq!((rate.mean, rate.deviation), (2.0, 1.0));
        assert_eq!(Rate::of(&[5.0]).unwrap().deviation, 0.0);
        assert_eq!(Rate::of(&[]), None);
    }
}
