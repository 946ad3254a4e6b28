//! The distribution after each of 256 tokens of text against `transformers` in float32: mean
//! Kullback-Leibler divergence, agreement of the likeliest token, and perplexity.
//!
//! The reference holds, for each position, the likeliest tokens up to 99% of the probability (at
//! most 3584) and the rest as one bucket. The divergence of the bucketed distributions is never
//! above the true one (log-sum inequality); with independent noise on the logits it is 1.7% to 1.8%
//! below, which `make_golden.py` prints. `EDGELLM_FULL_LOGITS` names the float32 `(256, V)` logits
//! that its `--full-logits` writes: then the true one is printed too.

use engine::backend::Backend;
use engine::sampler::Sampling;
use serde::Deserialize;

use crate::support::{self, Device, on_every_device};

const MAX_MEAN_KL: f64 = 0.0005;
const MIN_TOP1: f64 = 0.99;
/// Over the tokens of the text that the reference stores: nearly all.
const MAX_PERPLEXITY_CHANGE: f64 = 0.005;
const POSITIONS: usize = 256;

#[derive(Deserialize)]
struct Text {
    text: String,
    ids: Vec<u32>,
    /// Fixed-point steps of the stored logits in one unit.
    steps_per_unit: f64,
}

/// The reference distribution at one position.
struct Position {
    /// Stored tokens, likeliest first.
    ids: Vec<u32>,
    /// Their probabilities, then that of all others together.
    probabilities: Vec<f64>,
}

/// Reads `(count u32, rest f32, ids [u16], fall [u16])` records: `rest` is the log of the others'
/// probability, `fall` the logit, both below the likeliest.
fn positions(bytes: &[u8], steps_per_unit: f64) -> Vec<Position> {
    let (words, mut at, mut out) = (bytes.chunks_exact(2), 0, Vec::new());
    let words: Vec<u16> = words.map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    while at < words.len() {
        let pair = |i: usize| u32::from(words[i]) | u32::from(words[i + 1]) << 16;
        let (count, rest) = (pair(at) as usize, f32::from_bits(pair(at + 2)));
        let ids = &words[at + 4..at + 4 + count];
        let fall = &words[at + 4 + count..at + 4 + 2 * count];
        at += 4 + 2 * count;
        let mut probabilities: Vec<f64> = fall
            .iter()
            .map(|f| (-f64::from(*f) / steps_per_unit).exp())
            .chain([f64::from(rest).exp()])
            .collect();
        let total: f64 = probabilities.iter().sum();
        probabilities.iter_mut().for_each(|p| *p /= total);
        let ids = ids.iter().map(|id| u32::from(*id)).collect();
        out.push(Position { ids, probabilities });
    }
    out
}

/// Log-probabilities of `logits`.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let max = f64::from(max);
    let sum: f64 = logits.iter().map(|l| (f64::from(*l) - max).exp()).sum();
    let log_sum = max + sum.ln();
    logits.iter().map(|l| f64::from(*l) - log_sum).collect()
}

impl Position {
    /// Divergence of `logits` from this reference, in nats.
    fn kl(&self, logits: &[f32]) -> f64 {
        let log_q = log_softmax(logits);
        let (rest, stored) = self.probabilities.split_last().expect("at least the rest");
        let mut left = 1.0;
        let mut kl = 0.0;
        for (p, id) in stored.iter().zip(&self.ids) {
            let log_q = log_q[*id as usize];
            left -= log_q.exp();
            kl += p * (p.ln() - log_q);
        }
        kl + rest * (rest.ln() - left.max(1e-12).ln())
    }

    /// Log-probabilities of `token` in this reference and by `logits`; `None` where it is not stored.
    fn log_probabilities(&self, token: u32, logits: &[f32]) -> Option<(f64, f64)> {
        let at = self.ids.iter().position(|id| *id == token)?;
        Some((
            self.probabilities[at].ln(),
            log_softmax(logits)[token as usize],
        ))
    }
}

/// Divergence from full logits.
fn true_kl(reference: &[f32], logits: &[f32]) -> f64 {
    let (p, q) = (log_softmax(reference), log_softmax(logits));
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
}

fn argmax(logits: &[f32]) -> u32 {
    (0u32..)
        .zip(logits)
        .reduce(|best, next| if next.1 > best.1 { next } else { best })
        .expect("not empty")
        .0
}

on_every_device!(close_to_transformers);

/// The same with every instruction set of this CPU but the fastest, which the test above takes, and `scalar`, which
/// takes minutes: each in a process of its own, whose environment names it.
#[test]
fn every_instruction_set_is_close_to_transformers() {
    let isas = engine::backend::cpu::System::detect()
        .expect("a CPU")
        .available;
    let (_, others) = isas.split_last().expect("scalar");
    for isa in others.iter().skip(1) {
        let run = std::process::Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "logits::cpu", "--nocapture"])
            .env("EDGELLM_CPU", isa)
            .output()
            .expect("starts");
        let output = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success(), "{isa}: {output}");
        // Without what libtest says of the run, which would count as one more.
        let figures = output.lines().filter(|line| line.contains("mean KL"));
        figures.for_each(|line| println!("{line}"));
        assert!(
            output.contains(&format!("cpu {isa}: mean KL")),
            "{isa} ran: {output}"
        );
    }
}

fn close_to_transformers(device: Device) {
    let loaded = support::default_model();
    let text: Text = support::json("smollm2_logits.json");
    let reference = positions(&support::data("smollm2_logits.bin"), text.steps_per_unit);
    assert_eq!((text.ids.len(), reference.len()), (POSITIONS, POSITIONS));
    assert_eq!(
        loaded.tokenizer.encode(&text.text, false).expect("encodes"),
        text.ids
    );
    let full = std::env::var_os("EDGELLM_FULL_LOGITS").map(|path| {
        let bytes = std::fs::read(path).expect("full logits");
        let words = bytes.chunks_exact(4);
        let all: Vec<f32> = words
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        assert_eq!(all.len() % POSITIONS, 0);
        all
    });
    let mut backend = support::backend(device, &loaded.model, POSITIONS);
    let (mut kl, mut truth, mut agreed) = (Vec::new(), Vec::new(), 0);
    let mut next = Vec::new();
    for (at, (id, want)) in text.ids.iter().zip(&reference).enumerate() {
        backend.decode(*id).expect("decode");
        let logits = backend.logits().expect("logits");
        assert_eq!(
            backend.choose(&Sampling::GREEDY).expect("a token"),
            argmax(&logits)
        );
        agreed += usize::from(argmax(&logits) == want.ids[0]);
        kl.push(want.kl(&logits));
        let following = text.ids.get(at + 1);
        next.extend(following.and_then(|token| want.log_probabilities(*token, &logits)));
        if let Some(full) = &full {
            let vocab = full.len() / POSITIONS;
            truth.push(true_kl(&full[at * vocab..(at + 1) * vocab], &logits));
        }
    }
    let mean = |kl: &[f64]| kl.iter().sum::<f64>() / kl.len() as f64;
    let max = kl.iter().copied().fold(0.0, f64::max);
    let top1 = agreed as f64 / POSITIONS as f64;
    assert!(next.len() > POSITIONS * 9 / 10, "{} stored", next.len());
    let loss = next.iter().map(|(want, have)| want - have).sum::<f64>() / next.len() as f64;
    let change = (loss.exp() - 1.0).abs();
    let info = backend.info();
    println!(
        "{} {}: mean KL {:.7}, max {max:.6}, top-1 {:.2}%, perplexity changed by {:.4}%",
        info.name,
        info.tier,
        mean(&kl),
        100.0 * top1,
        100.0 * change
    );
    if !truth.is_empty() {
        println!("true mean KL {:.7}", mean(&truth));
    }
    assert!(mean(&kl) <= MAX_MEAN_KL, "mean KL {}", mean(&kl));
    assert!(top1 >= MIN_TOP1, "top-1 {top1}");
    assert!(change <= MAX_PERPLEXITY_CHANGE, "perplexity {change}");
    check_prompts(&mut *backend, &text.ids, &reference);
}

/// The same text as prompts of several lengths: what prefill computes has to hold up as well.
fn check_prompts(backend: &mut dyn Backend, ids: &[u32], reference: &[Position]) {
    let mut kl = Vec::new();
    for lengths in [
        &[2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31][..],
        &[64, 64, 64, 64],
        &[256],
    ] {
        backend.rewind(0);
        for length in lengths {
            let start = backend.position();
            backend
                .prefill(&ids[start..start + length])
                .expect("prefill");
            let logits = backend.logits().expect("logits");
            kl.push(reference[start + length - 1].kl(&logits));
        }
    }
    let mean = kl.iter().sum::<f64>() / kl.len() as f64;
    println!("after prompts: mean KL {mean:.7}");
    assert!(mean <= MAX_MEAN_KL, "mean KL after prompts {mean}");
}

#[test]
fn a_small_error_of_the_logits_shows() {
    let text: Text = support::json("smollm2_logits.json");
    let reference = positions(&support::data("smollm2_logits.bin"), text.steps_per_unit);
    let mut mean = 0.0;
    for position in &reference {
        // The reference's own logits: stored ones as they are, the others share the rest.
        let (rest, stored) = position.probabilities.split_last().expect("rest");
        let vocab = 49_152;
        let each = rest / (vocab - stored.len()) as f64;
        let mut logits = vec![each.ln() as f32; vocab];
        for (p, id) in stored.iter().zip(&position.ids) {
            logits[*id as usize] = p.ln() as f32;
        }
        let same = position.kl(&logits);
        assert!(same.abs() < 1e-5, "divergence from itself {same}");
        // Every other logit off by a tenth.
        logits.iter_mut().step_by(2).for_each(|l| *l += 0.1);
        mean += position.kl(&logits) / reference.len() as f64;
    }
    assert!(mean > MAX_MEAN_KL, "{mean}");
}
