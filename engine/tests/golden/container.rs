//! Files of the quantiser, in every form that its matrices and output tables take: near to the logits that
//! `transformers` computes for the source, the same on every device, and holding bit for bit what
//! `golden/container.py` reads in them by their description.

use std::collections::BTreeMap;

use engine::quantize::{self, Bits, Head, Hooks, Method, Options};
use engine::sampler::Sampling;
use engine::weights::ModelFile;
use models::arch::hugging_face_name;
use models::quant::Int4Form::{self, Asymmetric, Symmetric};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::support::{self, Device, Loaded, on_every_device};
use crate::tiny::check;

const IDS: usize = 64;
/// Tokens chosen one after the other.
const CHOSEN: usize = 8;

/// Source, bits, group, form, output table, least cosine to the source's logits.
type Form = (&'static str, Bits, usize, Int4Form, Head, f64);

const FORMS: [Form; 7] = [
    ("llama3-f16", Bits::Four, 32, Symmetric, Head::Int8, 0.85),
    ("llama3-f16", Bits::Four, 64, Asymmetric, Head::Int4, 0.85),
    (
        "qwen2-f32-shards",
        Bits::Four,
        128,
        Symmetric,
        Head::F16,
        0.9,
    ),
    (
        "qwen2-f32-shards",
        Bits::Four,
        32,
        Asymmetric,
        Head::Int4,
        0.9,
    ),
    ("qwen3-f32", Bits::Eight, 32, Symmetric, Head::Int8, 0.999),
    ("qwen3-f32", Bits::Eight, 64, Symmetric, Head::F16, 0.999),
    // Weights that are not ternary, so that only what all devices do the same is left of them.
    (
        "bitnet-dense",
        Bits::Ternary,
        32,
        Symmetric,
        Head::F16,
        0.25,
    ),
];

/// The model as the quantiser writes it and the loader reads it back.
fn quantised(source: &str, bits: Bits, group: usize, int4: Int4Form, head: Head) -> Loaded {
    let mapped = ModelFile::open(&support::data_path(&format!("hf/{source}"))).expect("a folder");
    let file = mapped.parse().expect("a model");
    let recipe = mapped.recipe(&file).expect("a recipe");
    let tokenizer = mapped.tokenizer(&file, &recipe).expect("a tokenizer");
    let texts = mapped.container_texts(&file, &tokenizer).expect("texts");
    let options = Options {
        bits,
        group,
        form: int4,
        method: Method::Rtn,
        head,
    };
    let hooks = Hooks {
        begin: &|_, _| (),
        interrupted: &|| false,
        release: &|| (),
    };
    let made = quantize::quantize(
        file.source(),
        &recipe,
        &options,
        &texts,
        Vec::new(),
        &hooks,
        Vec::new(),
    );
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("made.edgellm");
    std::fs::write(&path, made.expect("quantised").1).expect("written");
    support::load(&path)
}

on_every_device!(every_form_is_the_same_on_every_device);

fn every_form_is_the_same_on_every_device(device: Device) {
    for form in &FORMS {
        let &(source, bits, group, int4, head, least) = form;
        let name = format!("{form:?}");
        let loaded = quantised(source, bits, group, int4, head);
        let vocab = loaded.model.recipe.config.vocab;
        let ids: Vec<u32> = (0..IDS).map(|i| (i * i * 7 % vocab) as u32).collect();
        let all = |loaded: &Loaded| {
            let mut backend = support::backend(Device::Cpu, &loaded.model, IDS);
            backend.prefill_logits(&ids).expect("logits")
        };
        let want = all(&loaded);
        let exact = all(&support::load(&support::data_path(&format!("hf/{source}"))));
        let (cosine, _) = support::agreement(&want, &exact);
        println!("{name}: cosine {cosine:.6} to its source");
        assert!(cosine >= least, "{name}: cosine {cosine} to its source");

        let want: Vec<&[f32]> = want.chunks_exact(vocab).collect();
        let mut backend = support::backend(device, &loaded.model, IDS + CHOSEN);
        check(&mut *backend, &name, &ids, &want);
        for _ in 0..CHOSEN {
            let token = backend.choose(&Sampling::GREEDY).expect("a token");
            let logits = backend.logits().expect("logits");
            let best = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l));
            assert_eq!(logits[token as usize], best, "{name}");
            backend.decode(token).expect("decode");
        }
    }
}

#[derive(Deserialize)]
struct Case {
    source: String,
    bits: String,
    group: usize,
    form: Int4Form,
    head: String,
    /// Of the numbers of each weight, row by row, f32.
    weights: BTreeMap<String, String>,
}

#[test]
fn weights_are_what_the_script_reads_in_the_file() {
    let cases: BTreeMap<String, Case> = support::json("container.json");
    assert!(cases.len() >= 7);
    for (name, case) in cases {
        let bits = match &*case.bits {
            "4" => Bits::Four,
            "8" => Bits::Eight,
            _ => Bits::Ternary,
        };
        let head = match &*case.head {
            "int4" => Head::Int4,
            "int8" => Head::Int8,
            _ => Head::F16,
        };
        let loaded = quantised(&case.source, bits, case.group, case.form, head);
        let model = &loaded.model;
        assert_eq!(model.weights.len(), case.weights.len(), "{name}");
        for (reference, weight) in model.recipe.weights.iter().zip(&model.weights) {
            let (rows, cols) = weight.shape();
            let mut row = vec![0f32; cols];
            let mut hash = Sha256::new();
            for i in 0..rows {
                weight.dequantize_row(i, &mut row);
                row.iter()
                    .for_each(|value| hash.update(value.to_le_bytes()));
            }
            let found: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
            let stored = hugging_face_name(&reference.name).expect("a name in the file");
            assert_eq!(case.weights.get(&stored), Some(&found), "{name}: {stored}");
        }
    }
}
