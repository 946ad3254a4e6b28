//! Tiny random-weight Hugging Face folders of each architecture and packing against the logits that
//! `transformers` computes from the same numbers, and packed matrices against their numbers bit by bit.
//! `golden/hf.py` made them, and shows that the tolerances catch what could be wrong.

use std::collections::BTreeMap;

use engine::backend::Backend;
use engine::weights::ModelFile;
use models::quant::Weight;
use serde::Deserialize;

use crate::support::{self, Device, on_every_device};
use crate::tiny::{check, feed};

#[derive(Deserialize)]
struct Case {
    ids: Vec<u32>,
    /// Whether there are numbers to compare bit by bit.
    weights: bool,
    /// How far the logits are, in mean 1 - cosine, from those of the same model without activations
    /// rounded to 8 bits.
    rounding: Option<f64>,
}

/// Where activations are rounded, a last bit decides now and then on which side of an edge one falls, and the
/// tokens after it see that: up to half of what leaving the rounding out would do. Norms have the same bits
/// everywhere, which decides the exact ties; in these models nothing else comes that near to an edge.
const MAX_OF_ROUNDING: f64 = 0.01;

/// The packed matrix whose numbers are in the golden data.
const PACKED: &str = "model.layers.1.mlp.down_proj.weight";

fn cases() -> BTreeMap<String, Case> {
    let cases: BTreeMap<String, Case> = support::json("hf/index.json");
    assert!(cases.len() >= MIN_CASES);
    cases
}

/// What `golden/hf.py` lists.
const MIN_CASES: usize = 15;

on_every_device!(logits_are_those_of_transformers);

fn logits_are_those_of_transformers(device: Device) {
    for (name, case) in &cases() {
        let want = support::floats(&format!("hf/{name}.logits"));
        let want: Vec<&[f32]> = want.chunks_exact(want.len() / case.ids.len()).collect();
        let loaded = support::load(&support::data_path(&format!("hf/{name}")));
        let mut backend = support::backend(device, &loaded.model, case.ids.len());
        match case.rounding {
            None => check(&mut *backend, name, &case.ids, &want),
            Some(rounding) => check_rounded(&mut *backend, name, case, &want, rounding),
        }
    }
}

fn check_rounded(
    backend: &mut dyn Backend,
    name: &str,
    case: &Case,
    want: &[&[f32]],
    rounding: f64,
) {
    let (mut sum, mut count) = (0.0, 0);
    feed(backend, &case.ids, want, |_, _, cosine, _| {
        sum += 1.0 - cosine;
        count += 1;
    });
    let mean = sum / f64::from(count);
    println!("{name}: mean error {mean:.8}, rounding {rounding:.8}");
    assert!(
        mean <= MAX_OF_ROUNDING * rounding,
        "{name}: mean error {mean}, rounding itself moves {rounding}"
    );
}

#[test]
fn packed_matrices_hold_the_numbers_of_the_checkpoint_bit_for_bit() {
    let mut compared = 0;
    for (name, case) in &cases() {
        if !case.weights {
            continue;
        }
        let want = support::floats(&format!("hf/{name}.weights"));
        let file = ModelFile::open(&support::data_path(&format!("hf/{name}"))).expect("a folder");
        let parsed = file.parse().expect("a model");
        let recipe = file.recipe(&parsed).expect("a recipe");
        let weight = recipe.weights.iter().find(|w| w.name == PACKED);
        let weight = models::weights::decode(parsed.source(), weight.expect("in the recipe"));
        let weight = weight.expect("decoded");
        let (rows, cols) = weight.shape();
        assert_eq!(rows * cols, want.len(), "{name}");
        let mut row = vec![0.0; cols];
        for (i, want) in want.chunks_exact(cols).enumerate() {
            match &weight {
                Weight::Int4(m) => m.dequantize_row(i, &mut row),
                Weight::Ternary(m) => m.dequantize_row(i, &mut row),
                other => panic!("{name}: {other:?} is not packed"),
            }
            assert_eq!(row, want, "{name} row {i}");
        }
        compared += 1;
    }
    assert!(compared >= 7);
}

#[test]
fn a_folder_has_tokenizer_and_template() {
    let loaded = support::load(&support::data_path("hf/qwen3-f32"));
    let text = "Grüße,\n 1 + 1 = 2";
    let ids = loaded.tokenizer.encode(text, true).expect("encoded");
    assert_eq!(ids.len(), text.len(), "a token a byte");
    assert_eq!(loaded.tokenizer.decode(&ids), text);
    let messages = [engine::chat::Message::new("user", "hi")];
    let prompt = loaded.chat.expect("a template").render(&messages);
    assert_eq!(prompt.expect("rendered"), "user: hi\n");
}
