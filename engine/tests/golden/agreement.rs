//! The CUDA backend beside the CPU's, on the same file and text: no reference of another program, so
//! the bound is tight.

use engine::quality::{Prediction, Reference, Summary, score};
use serde::Deserialize;

use crate::support::{self, Device};
use engine::backend::Tier;

const MAX_MEAN_KL: f64 = 1e-4;
const MIN_TOP1: f64 = 0.99;

#[derive(Deserialize)]
struct Text {
    ids: Vec<u32>,
}

#[test]
fn cuda_sm_75() {
    support::on(Device::Cuda(Tier::SM_75), agrees_with_the_cpu);
}

#[test]
fn cuda_sm_80() {
    support::on(Device::Cuda(Tier::SM_80), agrees_with_the_cpu);
}

#[test]
fn cuda_sm_90() {
    support::on(Device::Cuda(Tier::SM_90), agrees_with_the_cpu);
}

#[test]
fn cuda_sm_90a() {
    support::on(Device::Cuda(Tier::SM_90A), agrees_with_the_cpu);
}

fn agrees_with_the_cpu(device: Device) {
    let loaded = support::default_model();
    let text: Text = support::json("smollm2_logits.json");
    let (read, vocab) = (text.ids.len() - 1, loaded.model.recipe.config.vocab);
    let logits = |device| {
        let mut backend = support::backend(device, &loaded.model, text.ids.len());
        backend.prefill_logits(&text.ids[..read]).expect("logits")
    };
    let (gpu, cpu) = (logits(device), logits(Device::Cpu));
    let rows = gpu.chunks(vocab).zip(cpu.chunks(vocab)).zip(&text.ids[1..]);
    let scores: Vec<_> = rows
        .map(|((gpu, cpu), next)| {
            let [gpu, cpu] = [gpu, cpu].map(|row| Prediction::new(row).expect("finite"));
            score(&gpu, *next, Some(Reference::Model(cpu)))
        })
        .collect();
    assert_eq!(scores.len(), read);
    let summary = Summary::of(&scores).expect("scores");
    let beside = summary.reference.expect("a reference");
    println!(
        "{device:?} beside the CPU: mean KL {:.9}, max {:.9}, top-1 {:.2}%, perplexity {:.4} and {:.4}",
        beside.kl.mean,
        beside.kl_max,
        100.0 * beside.top1.mean,
        summary.perplexity.mean,
        beside.perplexity.mean
    );
    assert!(beside.kl.mean < MAX_MEAN_KL, "mean KL {}", beside.kl.mean);
    assert!(beside.top1.mean >= MIN_TOP1, "top-1 {}", beside.top1.mean);
}
