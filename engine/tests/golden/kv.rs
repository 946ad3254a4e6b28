//! A cache whose values have 8 bits: tiny checkpoints against the logits of `transformers`, and what it
//! costs the default model, as the divergence from its own distribution with a cache of halves.

use std::collections::BTreeMap;

use engine::backend::{Backend, KvCache, KvForm};
use engine::quality::{Prediction, Reference, Summary, score};
use serde::Deserialize;

use crate::support::{self, Device, on_every_device};
use crate::tiny;

/// Of tiny checkpoints, whose heads have few elements: a level is 1/127 of the greatest.
const MIN_COSINE: f64 = 0.999;
const MAX_RELATIVE: f64 = 0.05;
const MAX_MEAN_KL: f64 = 0.0005;
const MIN_TOP1: f64 = 0.98;

fn bytes(tokens: usize) -> KvCache {
    KvCache {
        tokens,
        form: KvForm::K16V8,
    }
}

mod tiny_checkpoints {
    use super::*;

    on_every_device!(super::tiny_logits);
}

fn tiny_logits(device: Device) {
    let cases: Vec<tiny::Case> = support::json("tiny/index.json");
    assert!(cases.len() >= 6);
    for case in &cases {
        let want = support::floats(&format!("tiny/{}.logits", case.name));
        check(
            device,
            &format!("tiny/{}.gguf", case.name),
            &case.ids,
            &want,
        );
    }
}

mod windows {
    use super::*;

    on_every_device!(super::logits_with_a_window);
}

/// A layer sees a few positions, the other all.
fn logits_with_a_window(device: Device) {
    let cases: BTreeMap<String, Folder> = support::json("hf/index.json");
    let want = support::floats(&format!("hf/{WINDOWED}.logits"));
    check(
        device,
        &format!("hf/{WINDOWED}"),
        &cases[WINDOWED].ids,
        &want,
    );
}

/// The folder whose model has a window.
const WINDOWED: &str = "qwen2-window";

#[derive(Deserialize)]
struct Folder {
    ids: Vec<u32>,
}

/// One by one, and as prompts that single tokens follow: `want` is a row of logits a token.
fn check(device: Device, file: &str, ids: &[u32], want: &[f32]) {
    let want: Vec<&[f32]> = want.chunks_exact(want.len() / ids.len()).collect();
    let loaded = support::load(&support::data_path(file));
    let mut backend = support::backend(device, &loaded.model, bytes(ids.len()));
    let (mut worst_cosine, mut worst_relative) = (1.0f64, 0.0f64);
    tiny::feed(&mut *backend, ids, &want, |_, _, cosine, relative| {
        worst_cosine = worst_cosine.min(cosine);
        worst_relative = worst_relative.max(relative);
    });
    println!("{file}: worst cosine {worst_cosine:.8}, worst relative error {worst_relative:.6}");
    assert!(
        worst_cosine >= MIN_COSINE && worst_relative <= MAX_RELATIVE,
        "{file}"
    );
}

#[derive(Deserialize)]
struct Text {
    ids: Vec<u32>,
}

mod default_model {
    use super::*;

    on_every_device!(super::divergence_from_halves);
}

/// As a prompt, and one by one after half of it.
fn divergence_from_halves(device: Device) {
    let model = &support::default_model().model;
    let text: Text = support::json("smollm2_logits.json");
    let (read, vocab) = (text.ids.len() - 1, model.recipe.config.vocab);
    let mut halves = support::backend(device, model, text.ids.len());
    let want = halves.prefill_logits(&text.ids[..read]).expect("logits");
    drop(halves);
    let mut backend = support::backend(device, model, bytes(text.ids.len()));
    let prompt = backend.prefill_logits(&text.ids[..read]).expect("logits");
    let after = read / 2;
    let decoded = decode_from(&mut *backend, &text.ids[..read], after);
    for (how, got, first) in [("as a prompt", prompt, 0), ("one by one", decoded, after)] {
        let rows = got.chunks(vocab).zip(want.chunks(vocab).skip(first));
        let scores: Vec<_> = rows
            .zip(&text.ids[first + 1..])
            .map(|((got, want), next)| {
                let [got, want] = [got, want].map(|row| Prediction::new(row).expect("finite"));
                score(&got, *next, Some(Reference::Model(want)))
            })
            .collect();
        assert_eq!(scores.len(), read - first);
        let summary = Summary::of(&scores).expect("scores");
        let beside = summary.reference.expect("a reference");
        println!(
            "{device:?}, {how}: mean KL {:.6}, max {:.6}, top-1 {:.2}%, perplexity {:.4} and {:.4}",
            beside.kl.mean,
            beside.kl_max,
            100.0 * beside.top1.mean,
            summary.perplexity.mean,
            beside.perplexity.mean
        );
        // Not nothing: then it was halves on both sides.
        assert!(beside.kl.mean > 1e-7, "mean KL {}", beside.kl.mean);
        assert!(beside.kl.mean < MAX_MEAN_KL, "mean KL {}", beside.kl.mean);
        assert!(beside.top1.mean >= MIN_TOP1, "top-1 {}", beside.top1.mean);
    }
}

/// Logits of the tokens from `after` on, each appended by itself to those before.
fn decode_from(backend: &mut dyn Backend, ids: &[u32], after: usize) -> Vec<f32> {
    backend.rewind(after);
    let mut logits = Vec::new();
    for id in &ids[after..] {
        backend.decode(*id).expect("decode");
        logits.extend(backend.logits().expect("logits"));
    }
    logits
}
