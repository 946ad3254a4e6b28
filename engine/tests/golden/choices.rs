//! Tokens chosen by the device, which computes ahead of the host: the same whether it may, is
//! interrupted for logits, or has what it computed taken back; and those that the CPU's sampler
//! draws from the device's own logits.

use std::sync::Arc;

use cpu_kernels::sample::{self, Settings};
use engine::backend::{Backend, LoadedModel};
use engine::sampler::Sampling;
use models::file::gguf::Gguf;
use models::synthetic::{self, Options};

use crate::support::{self, Device, on_every_device};

const PROMPT: [u32; 5] = [5, 299, 17, 64, 65];
const TOKENS: usize = 60;

const HOT: Sampling = Sampling {
    temperature: 0.9,
    top_k: 40,
    top_p: 0.95,
    min_p: 0.01,
    repetition_penalty: 1.0,
    seed: 0x1234_5678_9abc,
};

const SAMPLINGS: [Sampling; 4] = [
    Sampling::GREEDY,
    HOT,
    Sampling {
        repetition_penalty: 1.3,
        ..HOT
    },
    Sampling {
        repetition_penalty: 1.3,
        ..Sampling::GREEDY
    },
];

fn model() -> Arc<LoadedModel> {
    let shape = synthetic::shape("tiny-qwen2").expect("a named shape");
    let bytes = synthetic::to_vec(shape, &Options::default()).expect("a model");
    let file = Gguf::parse(&bytes).expect("a valid file");
    let recipe = models::arch::recipe(&file).expect("a known architecture");
    let weights = recipe.weights.iter();
    let weights = weights
        .map(|weight| models::weights::decode(&file, weight).expect("a known type"))
        .collect();
    Arc::new(LoadedModel::new(recipe, weights))
}

/// Generates after the prompt; `between` has the backend once each token is chosen, before it is
/// appended, with what is in the context.
fn generate(
    backend: &mut dyn Backend,
    sampling: &Sampling,
    mut between: impl FnMut(&mut dyn Backend, &[u32], u32),
) -> Vec<u32> {
    backend.rewind(0);
    backend.prefill(&PROMPT).expect("prefill");
    let mut context = PROMPT.to_vec();
    for _ in 0..TOKENS {
        let token = backend.choose(sampling).expect("a token");
        between(backend, &context, token);
        backend.decode(token).expect("decode");
        context.push(token);
        assert_eq!(backend.position(), context.len());
    }
    context.split_off(PROMPT.len())
}

/// What the CPU's sampler takes from logits `(V,)` after `context`.
fn by_the_cpu(mut logits: Vec<f32>, context: &[u32], sampling: &Sampling) -> u32 {
    let mut seen = vec![0u32; logits.len().div_ceil(32)];
    for token in context {
        seen[*token as usize / 32] |= 1 << (token % 32);
    }
    sample::penalise(&mut logits, &seen, sampling.repetition_penalty);
    let settings = Settings {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        seed: sampling.seed,
    };
    let candidates = sample::top_k(&logits, sampling.top_k as usize);
    sample::choose(&candidates, &settings, context.len() as u32 - 1)
}

fn check(device: Device) {
    let model = model();
    // The last token has the last place.
    let mut backend = support::backend(device, &model, PROMPT.len() + TOKENS);
    let backend = &mut *backend;
    for sampling in &SAMPLINGS {
        let ahead = generate(backend, sampling, |_, _, _| ());
        assert_eq!(
            generate(backend, sampling, |_, _, _| ()),
            ahead,
            "{sampling:?}"
        );

        let interrupted = generate(backend, sampling, |backend, context, token| {
            if context.len() % 7 < 3 {
                let logits = backend.logits().expect("logits");
                assert_eq!(by_the_cpu(logits, context, sampling), token, "{sampling:?}");
            }
        });
        assert_eq!(interrupted, ahead, "{sampling:?}, interrupted");

        let taken_back = generate(backend, sampling, |backend, context, token| {
            if context.len() % 9 == 4 {
                // Another way for two tokens, and back.
                backend.decode((token + 1) % 300).expect("decode");
                let other = backend.choose(&HOT).expect("a token");
                backend.decode(other).expect("decode");
                backend.rewind(context.len() - 1);
                backend.decode(context[context.len() - 1]).expect("decode");
                assert_eq!(backend.choose(sampling).expect("a token"), token);
            }
        });
        assert_eq!(taken_back, ahead, "{sampling:?}, taken back");

        // Another sampling in between chooses from the same logits.
        let switched = generate(backend, sampling, |backend, _, token| {
            backend.choose(&Sampling::GREEDY).expect("a token");
            assert_eq!(backend.choose(sampling).expect("a token"), token);
        });
        assert_eq!(switched, ahead, "{sampling:?}, switched");
    }
}

mod the_same_tokens_however_they_are_asked_for {
    use super::*;
    on_every_device!(super::check);
}
