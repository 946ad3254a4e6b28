//! Files of the quantiser, in every form that its matrices and output tables take: near to the logits that
//! `transformers` computes for the source, and the same on every device.

use engine::quantize::{self, Bits, Head, Hooks, Method, Options};
use engine::sampler::Sampling;
use engine::weights::ModelFile;
use models::quant::Int4Form::{self, Asymmetric, Symmetric};

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
fn quantised(form: &Form) -> Loaded {
    let &(source, bits, group, int4, head, _) = form;
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
        let &(source, .., least) = form;
        let name = format!("{form:?}");
        let loaded = quantised(form);
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
