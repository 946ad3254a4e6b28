//! The CUDA backend beside the CPU's, on the same files: no reference of another program, so
//! the bound is tight.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine::backend::LoadedModel;
use engine::quality::{Prediction, Reference, Summary, score};
use serde::Deserialize;

use crate::support::{self, Device, on_every_tier};

const MAX_MEAN_KL: f64 = 1e-4;
const MIN_TOP1: f64 = 0.99;

#[derive(Deserialize)]
struct Text {
    ids: Vec<u32>,
}

on_every_tier!(agrees_with_the_cpu);

fn agrees_with_the_cpu(device: Device) {
    let text: Text = support::json("smollm2_logits.json");
    let summary = beside_the_cpu(device, &support::default_model().model, &text.ids);
    let top1 = summary.reference.expect("a reference").top1.mean;
    assert!(top1 >= MIN_TOP1, "top-1 {top1}");
}

/// What checkpoints of other programs bring: floats, zeros, ternary weights, activations of 8 bits.
mod checkpoints {
    super::on_every_tier!(super::checkpoints_agree_with_the_cpu);
}

fn checkpoints_agree_with_the_cpu(device: Device) {
    let cases: BTreeMap<String, Text> = support::json("hf/index.json");
    assert!(cases.contains_key("bitnet-autobitlinear"));
    for (name, case) in &cases {
        println!("{name}:");
        let loaded = support::load(&support::data_path(&format!("hf/{name}")));
        beside_the_cpu(device, &loaded.model, &case.ids);
    }
}

/// Predictions of the tokens that follow each of `ids`, those of `device` beside those of the CPU.
fn beside_the_cpu(device: Device, model: &Arc<LoadedModel>, ids: &[u32]) -> Summary {
    let (read, vocab) = (ids.len() - 1, model.recipe.config.vocab);
    let logits = |device| {
        let mut backend = support::backend(device, model, ids.len());
        backend.prefill_logits(&ids[..read]).expect("logits")
    };
    let (gpu, cpu) = (logits(device), logits(Device::Cpu));
    let rows = gpu.chunks(vocab).zip(cpu.chunks(vocab)).zip(&ids[1..]);
    let scores: Vec<_> = rows
        .map(|((gpu, cpu), next)| {
            let [gpu, cpu] = [gpu, cpu].map(|row| Prediction::new(row).expect("finite"));
            score(&gpu, *next, Some(Reference::Model(cpu)))
        })
        .collect();
    assert_eq!(scores.len(), read);
    let summary = Summary::of(&scores).expect("scores");
    let beside = summary.reference.as_ref().expect("a reference");
    println!(
        "{device:?} beside the CPU: mean KL {:.9}, max {:.9}, top-1 {:.2}%, perplexity {:.4} and {:.4}",
        beside.kl.mean,
        beside.kl_max,
        100.0 * beside.top1.mean,
        summary.perplexity.mean,
        beside.perplexity.mean
    );
    assert!(beside.kl.mean < MAX_MEAN_KL, "mean KL {}", beside.kl.mean);
    summary
}
