//! A fact in a long text, at several depths: what the default model answers about it, greedily. The CPU's
//! answers are written down here, a GPU's have to be the same.

use std::sync::OnceLock;

use engine::backend::Backend;
use engine::sampler::Sampling;

use crate::support::{self, Device, on_every_device};

/// Sentences around the fact; with it some 2,000 tokens, of the 8,192 that the model was trained for.
const SENTENCES: usize = 96;
const FACT: &str = "The code of the harbour safe is 7314.";
/// What the text ends with, to be continued.
const QUESTION: &str = "The code of the harbour safe is";
/// Tokens of an answer that are looked at.
const TOKENS: usize = 6;
/// Closer logits are decided by rounding.
const MIN_MARGIN: f32 = 0.05;

/// Percent of the text in front of the fact, and how the answer begins.
const ANSWERS: [(usize, &str); 4] = [
    (0, " 7314."),
    (35, " 7314."),
    (70, " 7314."),
    (100, " 7314."),
];

fn prompt(depth: usize) -> Vec<u32> {
    let before = SENTENCES * depth / 100;
    let mut sentences: Vec<String> = (1..=SENTENCES)
        .map(|day| {
            let [boats, barrels] = [day * 7 % 23 + 2, day * 5 % 31 + 3];
            format!(
                "On day {day} the wind was light, {boats} boats came in with {barrels} barrels."
            )
        })
        .collect();
    sentences.insert(before, FACT.to_owned());
    let text = format!("{} {QUESTION}", sentences.join(" "));
    let tokenizer = &support::default_model().tokenizer;
    tokenizer.encode(&text, false).expect("encoded")
}

/// Greedy ids, and how far the best logit was above the next at each.
fn answer(backend: &mut dyn Backend, prompt: &[u32]) -> Vec<(u32, f32)> {
    backend.rewind(0);
    backend.prefill(prompt).expect("prefill");
    let mut ids = Vec::new();
    for _ in 0..TOKENS {
        let logits = backend.logits().expect("logits");
        let id = backend.choose(&Sampling::GREEDY).expect("a token");
        let best = logits[id as usize];
        let others = logits.iter().enumerate().filter(|(i, _)| *i != id as usize);
        let next = others
            .map(|(_, logit)| *logit)
            .fold(f32::NEG_INFINITY, f32::max);
        ids.push((id, best - next));
        backend.decode(id).expect("decode");
    }
    ids
}

/// The CPU's answers, which are as they were.
fn expected() -> &'static [Vec<(u32, f32)>] {
    static EXPECTED: OnceLock<Vec<Vec<(u32, f32)>>> = OnceLock::new();
    EXPECTED.get_or_init(|| {
        let answers = ANSWERS.map(|(depth, expected)| {
            let (prompt, loaded) = (prompt(depth), support::default_model());
            let context = prompt.len() + TOKENS;
            assert!((1800..=loaded.model.recipe.config.context).contains(&context));
            let mut backend = support::backend(Device::Cpu, &loaded.model, context);
            let answer = answer(&mut *backend, &prompt);
            let ids: Vec<u32> = answer.iter().map(|(id, _)| *id).collect();
            let text = loaded.tokenizer.decode(&ids);
            println!("depth {depth}%, {} tokens: {text:?}", prompt.len());
            assert!(text.starts_with(expected), "depth {depth}%: {text:?}");
            answer
        });
        answers.into()
    })
}

on_every_device!(a_fact_is_found_at_every_depth);

fn a_fact_is_found_at_every_depth(device: Device) {
    let expected = expected();
    if let Device::Cpu = device {
        return;
    }
    for ((depth, _), want) in ANSWERS.iter().zip(expected) {
        let prompt = prompt(*depth);
        let model = &support::default_model().model;
        let mut backend = support::backend(device, model, prompt.len() + TOKENS);
        let got = answer(&mut *backend, &prompt);
        let differs = got.iter().zip(want).position(|(got, want)| got.0 != want.0);
        if let Some(at) = differs {
            assert!(
                want[at].1 < MIN_MARGIN,
                "{device:?}, depth {depth}%: token {} for {} at {at}",
                got[at].0,
                want[at].0
            );
        }
    }
}
