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
pub struct Case {
    pub name: String,
    pub ids: Vec<u32>,
    pub vocab: usize,
}

on_every_device!(logits_are_those_of_transformers);

fn logits_are_those_of_transformers(device: Device) {
    let cases: Vec<Case> = support::json("tiny/index.json");
    assert!(cases.len() >= 6);
    for case in &cases {
        let want = support::floats(&format!("tiny/{}.logits", case.name));
        assert_eq!(want.len(), case.ids.len() * case.vocab, "{}", case.name);
        let want: Vec<&[f32]> = want.chunks_exact(case.vocab).collect();
        let loaded = support::load(&support::data_path(&format!("tiny/{}.gguf", case.name)));
        let mut backend = support::backend(device, &loaded.model, case.ids.len());
        check(&mut *backend, &case.name, &case.ids, &want);
    }
}

/// Every position by itself has to agree.
pub fn check(backend: &mut dyn Backend, name: &str, ids: &[u32], want: &[&[f32]]) {
    let (mut worst_cosine, mut worst_relative) = (1.0f64, 0.0f64);
    feed(backend, ids, want, |prompt, at, cosine, relative| {
        assert!(
            cosine >= MIN_COSINE && relative <= MAX_RELATIVE,
            "{name}: prompt of {prompt}, position {at}: cosine {cosine:.6}, relative error {relative:.5}"
        );
        worst_cosine = worst_cosine.min(cosine);
        worst_relative = worst_relative.max(relative);
    });
    println!("{name}: worst cosine {worst_cosine:.8}, worst relative error {worst_relative:.6}");
}

/// Feeds the ids one by one, then as prompts of several lengths followed by single tokens; `agree` gets
/// the length of the prompt, the position, cosine and relative error.
pub fn feed(
    backend: &mut dyn Backend,
    ids: &[u32],
    want: &[&[f32]],
    mut agree: impl FnMut(usize, usize, f64, f64),
) {
    for prompt in [1, 2, 7, 32, 33, ids.len()] {
        backend.rewind(0);
        backend.prefill(&ids[..prompt]).expect("prefill");
        for (at, want) in want.iter().enumerate().skip(prompt - 1) {
            if at >= prompt {
                backend.decode(ids[at]).expect("decode");
            }
            let logits = backend.logits().expect("logits");
            let (cosine, relative) = support::agreement(&logits, want);
            agree(prompt, at, cosine, relative);
        }
    }
}
