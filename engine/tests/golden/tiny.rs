//! Tiny random-weight checkpoints of each architecture and weight format against the logits that
//! `transformers` computes from the same numbers. `golden/tiny.py` shows that the tolerances here
//! catch a rotary embedding with the wrong pairs, a wrong base or epsilon, and a missing bias.

use engine::backend::Backend;
use serde::Deserialize;

use crate::support::{self, Device, on_every_device};

const MIN_COSINE: f64 = 0.9999;
/// Largest difference of a logit, of the position's largest logit.
const MAX_RELATIVE: f64 = 0.01;

#[derive(Deserialize)]
struct Case {
    name: String,
    ids: Vec<u32>,
    vocab: usize,
}

on_every_device!(logits_are_those_of_transformers);

fn logits_are_those_of_transformers(device: Device) {
    let cases: Vec<Case> = support::json("tiny/index.json");
    assert!(cases.len() >= 6);
    for case in &cases {
        let bytes = support::data(&format!("tiny/{}.logits", case.name));
        let values = bytes.chunks_exact(4);
        let want: Vec<f32> = values
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        assert_eq!(want.len(), case.ids.len() * case.vocab, "{}", case.name);
        let want: Vec<&[f32]> = want.chunks_exact(case.vocab).collect();
        let loaded = support::load(&support::data_path(&format!("tiny/{}.gguf", case.name)));
        let mut backend = support::backend(device, &loaded.model, case.ids.len());
        check(&mut *backend, case, &want);
    }
}

/// Feeds the ids one by one, then as prompts of several lengths followed by single tokens.
fn check(backend: &mut dyn Backend, case: &Case, want: &[&[f32]]) {
    let (mut worst_cosine, mut worst_relative) = (1.0f64, 0.0f64);
    for prompt in [1, 2, 7, 32, 33, case.ids.len()] {
        backend.rewind(0);
        backend.prefill(&case.ids[..prompt]).expect("prefill");
        for (at, want) in want.iter().enumerate().skip(prompt - 1) {
            if at >= prompt {
                backend.decode(case.ids[at]).expect("decode");
            }
            let logits = backend.logits().expect("logits");
            let (cosine, relative) = support::agreement(&logits, want);
            assert!(
                cosine >= MIN_COSINE && relative <= MAX_RELATIVE,
                "{}: prompt of {prompt}, position {at}: cosine {cosine:.6}, relative error {relative:.5}",
                case.name
            );
            worst_cosine = worst_cosine.min(cosine);
            worst_relative = worst_relative.max(relative);
        }
    }
    println!(
        "{}: worst cosine {worst_cosine:.8}, worst relative error {worst_relative:.6}",
        case.name
    );
}
