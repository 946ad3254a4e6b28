//! Greedy generation against `transformers` in float32, token by token up to the first position
//! where its two best logits are so close that rounding decides.

use engine::backend::Backend;
use engine::chat::Message;
use engine::sampler::Sampling;
use serde::Deserialize;

use crate::support::{self, Device, Loaded, on_every_device};

/// Below this distance of the two best logits, the reference's own choice is rounding.
const CLOSE_CALL: f32 = 0.05;

#[derive(Deserialize)]
struct Greedy {
    stop_ids: Vec<u32>,
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    kind: Kind,
    prompt: String,
    /// What the tokenizer sees: the prompt, or the rendered chat.
    text: String,
    prompt_ids: Vec<u32>,
    /// Up to and including the token that ends the answer, at most 64.
    generated_ids: Vec<u32>,
    /// Best logit minus second best, where each of `generated_ids` was chosen.
    top_two_gap: Vec<f32>,
}

#[derive(Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Raw,
    Chat,
}

impl Prompt {
    /// Generated ids that do not depend on rounding.
    fn certain_ids(&self) -> &[u32] {
        assert_eq!(self.generated_ids.len(), self.top_two_gap.len());
        let certain = self
            .top_two_gap
            .iter()
            .take_while(|gap| **gap >= CLOSE_CALL);
        &self.generated_ids[..certain.count()]
    }
}

on_every_device!(matches_transformers);

fn matches_transformers(device: Device) {
    let loaded = support::default_model();
    let golden: Greedy = support::json("smollm2_greedy.json");
    assert!(golden.prompts.len() >= 10);
    let certain: usize = golden.prompts.iter().map(|p| p.certain_ids().len()).sum();
    assert!(certain >= 300, "the reference compares only {certain} ids");
    let mut backend = support::backend(device, &loaded.model, 256);
    for prompt in &golden.prompts {
        check(&mut *backend, loaded, prompt, &golden.stop_ids);
    }
}

fn check(backend: &mut dyn Backend, loaded: &Loaded, prompt: &Prompt, stop_ids: &[u32]) {
    backend.rewind(0);
    backend.prefill(&prompt.prompt_ids).expect("prefill");
    let mut ids = Vec::new();
    while ids.len() < prompt.generated_ids.len() {
        let id = backend.choose(&Sampling::GREEDY).expect("a token");
        ids.push(id);
        if stop_ids.contains(&id) {
            break;
        }
        backend.decode(id).expect("decode");
    }
    let certain = prompt.certain_ids();
    assert!(
        ids.starts_with(certain),
        "{:?}: first different at {:?} of {} certain ids\nhave {ids:?}\nwant {certain:?}",
        prompt.prompt,
        ids.iter().zip(certain).position(|(a, b)| a != b),
        certain.len(),
    );
    if prompt.prompt == "What is the capital of France?" {
        let answer = loaded.tokenizer.decode(&ids);
        assert!(answer.contains("Paris"), "{answer:?}");
    }
}

#[test]
fn prompts_become_the_reference_text_and_ids() {
    let loaded = support::default_model();
    let chat = loaded
        .chat
        .as_ref()
        .expect("the default model has a chat template");
    let golden: Greedy = support::json("smollm2_greedy.json");
    for prompt in &golden.prompts {
        let raw = prompt.kind == Kind::Raw;
        let text = match raw {
            true => prompt.prompt.clone(),
            false => chat
                .render(&[Message::new("user", &prompt.prompt)])
                .expect("renders"),
        };
        assert_eq!(text, prompt.text);
        let ids = loaded.tokenizer.encode(&text, raw).expect("encodes");
        assert_eq!(ids, prompt.prompt_ids, "{:?}", prompt.prompt);
    }
    for id in &golden.stop_ids {
        assert!(loaded.tokenizer.is_stop(*id), "{id} ends an answer");
    }
}

#[test]
fn the_france_prompt_is_among_the_references() {
    let golden: Greedy = support::json("smollm2_greedy.json");
    assert!(golden.prompts.iter().any(|p| p.kind == Kind::Chat
        && p.prompt == "What is the capital of France?"
        && p.certain_ids().len() == p.generated_ids.len()));
}
