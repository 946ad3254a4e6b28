//! The backend against the references of `cpu-kernels`, on small models with random weights.

use cpu_kernels::attention;
use cpu_kernels::linear::ternary::Form;
use cpu_kernels::{add, embed, kv_append, linear, relu2_glu, rmsnorm, rope, round_int8, swiglu};
use half::f16;
use models::file::gguf::{DType, Gguf};
use models::quant::Weight;
use models::recipe::{Step, WeightId};
use models::synthetic::{self, Options, Shape};

use super::super::KvForm;
use super::*;

fn model(shape: &str, linear: DType, embedding: DType) -> Arc<LoadedModel> {
    model_of(synthetic::shape(shape).unwrap(), linear, embedding)
}

fn model_of(shape: &Shape, linear: DType, embedding: DType) -> Arc<LoadedModel> {
    let options = Options {
        seed: 7,
        linear,
        embedding,
    };
    let bytes = synthetic::to_vec(shape, &options).unwrap();
    let file = Gguf::parse(&bytes).unwrap();
    let recipe = models::arch::recipe(&file).unwrap();
    let weights = recipe
        .weights
        .iter()
        .map(|w| models::weights::decode(&file, w).unwrap());
    {
        let weights = weights.collect();
        Arc::new(LoadedModel::new(recipe, weights))
    }
}

fn backend(model: &Arc<LoadedModel>, context: usize, isa: Isa, threads: usize) -> CpuBackend {
    with_form(model, context, isa, threads, Form::Multiply)
}

fn with_form(
    model: &Arc<LoadedModel>,
    context: usize,
    isa: Isa,
    threads: usize,
    form: Form,
) -> CpuBackend {
    let tuned = Tuned::forced(form);
    let why = "test".into();
    CpuBackend::with(model.clone(), context.into(), isa, threads, &tuned, why).unwrap()
}

fn tokens(model: &LoadedModel, count: usize) -> Vec<u32> {
    let vocab = model.recipe.config.vocab;
    (0..count)
        .map(|i| ((i * i * 31 + i * 7 + 3) % vocab) as u32)
        .collect()
}

/// Logits of the last token by the references alone, all tokens at once.
fn reference_logits(model: &LoadedModel, tokens: &[u32], form: KvForm) -> Vec<f32> {
    let (recipe, c) = (&model.recipe, &model.recipe.config);
    let t = tokens.len();
    let (cos, sin) = recipe.rope_tables(t);
    let mut buffers: Vec<Vec<f32>> = Buffer::ALL
        .iter()
        .map(|&b| vec![f32::NAN; t * recipe.elems(b)])
        .collect();
    let cache = vec![f16::NAN; c.kv_heads * t * c.head_dim];
    let bytes = (vec![0; cache.len()], vec![f16::NAN; c.kv_heads * t]);
    let mut caches = vec![(cache.clone(), cache, bytes); c.layers];
    let vector = |id: WeightId| match &model.weights[id] {
        Weight::Vector(v) => v.as_slice(),
        _ => panic!("not a vector"),
    };
    for step in &recipe.steps {
        match *step {
            Step::Embed { table, dst } => {
                let out = &mut buffers[dst as usize];
                match &model.weights[table] {
                    Weight::Int8(table) => embed::reference(table, tokens, out),
                    Weight::F16(table) => embed::reference_f16(table, tokens, out),
                    other => panic!("{other:?} is no table"),
                }
            }
            Step::RmsNorm {
                weight,
                eps,
                src,
                dst,
            } => {
                let src = buffers[src as usize].clone();
                rmsnorm::reference(&src, vector(weight), eps, &mut buffers[dst as usize]);
            }
            Step::Linear {
                weight,
                bias,
                src,
                dst,
            } => {
                let (bias, x) = (bias.map(vector), buffers[src as usize].clone());
                reference_linear(&model.weights[weight], bias, &x, &mut buffers[dst as usize]);
            }
            Step::Logits { table, src, dst } => {
                let x = buffers[src as usize].clone();
                reference_linear(&model.weights[table], None, &x, &mut buffers[dst as usize]);
            }
            Step::HeadNorm {
                weight,
                eps,
                buffer,
                ..
            } => {
                let x = buffers[buffer as usize].clone();
                rmsnorm::reference(&x, vector(weight), eps, &mut buffers[buffer as usize]);
            }
            Step::RoundToInt8 { buffer } => {
                round_int8::reference(&mut buffers[buffer as usize], recipe.elems(buffer));
            }
            Step::Rope { buffer, heads } => {
                let x = &mut buffers[buffer as usize];
                rope::reference(x, heads, c.head_dim, &cos, &sin, 0);
            }
            Step::KvAppend { layer, key, value } => {
                let (k, v, (levels, scales)) = &mut caches[layer];
                for (cache, buffer) in [(k, key), (v, value)] {
                    let x = &buffers[buffer as usize];
                    kv_append::reference(x, cache, c.kv_heads, t, c.head_dim, 0);
                }
                let v = &buffers[value as usize];
                kv_append::reference_int8(v, levels, scales, c.kv_heads, t, c.head_dim, 0);
            }
            Step::Attention {
                layer,
                query,
                dst,
                scale,
                window,
            } => {
                let shape = AttentionShape {
                    heads: c.heads,
                    kv_heads: c.kv_heads,
                    head_dim: c.head_dim,
                    capacity: t,
                    position: 0,
                    scale,
                    window,
                };
                let (q, (k, v, (levels, scales))) =
                    (buffers[query as usize].clone(), &caches[layer]);
                let out = &mut buffers[dst as usize];
                match form {
                    KvForm::K16V16 => attention::reference(&q, k, v, out, &shape),
                    KvForm::K16V8 => attention::reference_int8(&q, k, levels, scales, out, &shape),
                }
            }
            Step::SwiGlu { gate, up, dst } => {
                let (gate, up) = (buffers[gate as usize].clone(), buffers[up as usize].clone());
                swiglu::reference(&gate, &up, &mut buffers[dst as usize]);
            }
            Step::ReluSquaredGlu { gate, up, dst } => {
                let (gate, up) = (buffers[gate as usize].clone(), buffers[up as usize].clone());
                relu2_glu::reference(&gate, &up, &mut buffers[dst as usize]);
            }
            Step::Add { src, dst } => {
                let src = buffers[src as usize].clone();
                add::reference(&src, &mut buffers[dst as usize]);
            }
        }
    }
    buffers[Buffer::Logits as usize][(t - 1) * c.vocab..].to_vec()
}

fn reference_linear(weight: &Weight, bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    match weight {
        Weight::Int4(w) => linear::int4::reference(w, bias, x, y),
        Weight::Int4Tiled(w) => linear::int4::reference(&w.in_rows(), bias, x, y),
        Weight::Int8(w) => linear::int8::reference(w, bias, x, y),
        Weight::Ternary(w) => linear::ternary::reference(w, bias, x, y),
        Weight::F16(w) => linear::float16::reference(w, bias, x, y),
        Weight::Vector(_) => panic!("not a matrix"),
    }
}

#[track_caller]
fn assert_close(got: &[f32], expected: &[f32], bound: f64, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let pairs = got
        .iter()
        .zip(expected)
        .map(|(&a, &b)| (a as f64, b as f64));
    let error = pairs
        .clone()
        .map(|(a, b)| (a - b) * (a - b))
        .sum::<f64>()
        .sqrt();
    let norm = pairs.map(|(_, b)| b * b).sum::<f64>().sqrt();
    assert!(
        error <= bound * norm,
        "{what}: relative L2 error {}",
        error / norm
    );
}

const MODELS: [(&str, DType, DType); 4] = [
    ("tiny", DType::Q4_0, DType::Q8_0),
    ("tiny", DType::Q4_1, DType::F16),
    ("tiny-qwen2", DType::Q4_1, DType::Q8_0),
    ("tiny-qwen2", DType::Q8_0, DType::Q4_0),
];

#[test]
fn logits_are_those_of_the_references() {
    for (shape, linear, embedding) in MODELS {
        let model = model(shape, linear, embedding);
        let tokens = tokens(&model, CHUNK_TOKENS + 5);
        let expected = reference_logits(&model, &tokens, KvForm::K16V16);
        for isa in Isa::available() {
            for threads in [1, 2, 3] {
                let mut backend = backend(&model, tokens.len(), isa, threads);
                backend.prefill(&tokens).unwrap();
                let what = format!("{shape} {linear:?} {isa} {threads} threads");
                let got = backend.logits().unwrap();
                // A key or value that rounds to the other neighbour in f16 shows here.
                assert_close(&got, &expected, 2e-4, &what);
                assert_eq!(
                    backend.choose(&Sampling::GREEDY).unwrap(),
                    sample::reference(&got),
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn values_of_8_bits_give_the_logits_of_the_references() {
    for (shape, linear, embedding) in MODELS {
        let model = model(shape, linear, embedding);
        let tokens = tokens(&model, CHUNK_TOKENS + 5);
        let expected = reference_logits(&model, &tokens, KvForm::K16V8);
        for isa in Isa::available() {
            let cache = KvCache {
                tokens: tokens.len(),
                form: KvForm::K16V8,
            };
            let (tuned, why) = (Tuned::forced(Form::Multiply), "test".to_owned());
            let mut backend = CpuBackend::with(model.clone(), cache, isa, 2, &tuned, why).unwrap();
            backend.prefill(&tokens).unwrap();
            let what = format!("{shape} {linear:?} {isa}");
            // A value that rounds to the level beside shows here.
            assert_close(&backend.logits().unwrap(), &expected, 1e-3, &what);
        }
    }
}

#[test]
fn chunks_equal_token_by_token() {
    for (shape, linear, embedding) in MODELS {
        let model = model(shape, linear, embedding);
        let tokens = tokens(&model, 2 * CHUNK_TOKENS + 3);
        for isa in Isa::available() {
            let mut single = backend(&model, tokens.len(), isa, 1);
            for &token in &tokens {
                single.decode(token).unwrap();
            }
            let expected = single.logits().unwrap();
            let whole = vec![tokens.len()];
            let parts = vec![1, CHUNK_TOKENS + 1, 2, CHUNK_TOKENS - 1];
            for (threads, pieces) in [(1, whole.clone()), (2, whole), (2, parts)] {
                let mut chunked = backend(&model, tokens.len(), isa, threads);
                let mut rest = &tokens[..];
                for piece in &pieces {
                    let (now, later) = rest.split_at(*piece);
                    chunked.prefill(now).unwrap();
                    rest = later;
                }
                assert!(rest.is_empty() && chunked.position() == tokens.len());
                let what = format!("{shape} {linear:?} {isa} {threads} threads, {pieces:?}");
                assert_eq!(chunked.logits().unwrap(), expected, "{what}: the same bits");
            }
        }
    }
}

#[test]
fn a_run_after_reset_repeats_to_the_bit() {
    let model = model("tiny", DType::Q4_1, DType::Q8_0);
    let tokens = tokens(&model, 9);
    let mut backend = backend(&model, 16, Isa::selected(), 2);
    let mut run = || {
        backend.rewind(0);
        backend.prefill(&tokens).unwrap();
        let mut ids = Vec::new();
        for _ in 0..5 {
            ids.push(backend.choose(&Sampling::GREEDY).unwrap());
            backend.decode(ids[ids.len() - 1]).unwrap();
        }
        (ids, backend.logits().unwrap(), backend.position())
    };
    let first = run();
    assert_eq!(first.2, 14);
    assert_eq!(run(), first);
}

#[test]
fn what_cannot_be_appended_is_an_input_error_and_changes_nothing() {
    let model = model("tiny", DType::Q4_0, DType::Q8_0);
    let vocab = model.recipe.config.vocab as u32;
    let mut backend = backend(&model, 4, Isa::selected(), 2);
    assert!(matches!(
        backend.choose(&Sampling::GREEDY),
        Err(Error::Machine(_))
    ));
    assert!(matches!(backend.logits(), Err(Error::Machine(_))));
    for tokens in [&[][..], &[vocab], &[0, vocab, 1], &[0; 5], &[u32::MAX]] {
        assert!(
            matches!(backend.prefill(tokens), Err(Error::Input(_))),
            "{tokens:?}"
        );
    }
    backend.prefill(&[1, 2, 3, 0]).unwrap();
    let logits = backend.logits().unwrap();
    assert!(matches!(backend.decode(1), Err(Error::Input(_))));
    assert_eq!((backend.position(), backend.logits().unwrap()), (4, logits));
}

#[test]
fn a_context_that_fits_no_memory_is_an_error() {
    let model = model("tiny", DType::Q4_0, DType::Q8_0);
    let new = |context: usize| {
        CpuBackend::with(
            model.clone(),
            context.into(),
            Isa::selected(),
            1,
            &Tuned::forced(Form::Multiply),
            "test".to_owned(),
        )
    };
    assert!(matches!(new(0), Err(Error::Input(_))));
    assert!(matches!(new(usize::MAX / 4), Err(Error::Machine(_))));
    assert!(matches!(new(1 << 45), Err(Error::Machine(_))));
}

#[test]
fn weights_that_do_not_fit_the_recipe_are_refused() {
    let model = model("tiny", DType::Q4_0, DType::Q8_0);
    for id in 0..model.weights.len() {
        let mut weights = model.weights.clone();
        weights[id] = Weight::Vector(vec![0.0; 3]);
        let broken = Arc::new(LoadedModel::new(model.recipe.clone(), weights));
        let tuned = Tuned::forced(Form::Multiply);
        let error =
            CpuBackend::with(broken, 8.into(), Isa::selected(), 1, &tuned, "test".into()).err();
        let Some(Error::Input(message)) = error else {
            panic!("{error:?}")
        };
        assert!(
            message.contains(&model.recipe.weights[id].name),
            "{message}"
        );
    }
}

/// Speed with random weights of a real shape; run with `--ignored --nocapture`, in release.
/// `SHAPE` names the shape, `smollm2-135m` by default.
#[test]
#[ignore = "a measurement"]
fn speed() {
    let shape = std::env::var("SHAPE").unwrap_or_else(|_| "smollm2-135m".to_owned());
    let model = model(&shape, DType::Q4_1, DType::Q8_0);
    let mut backend = CpuBackend::new(model.clone(), 512).unwrap();
    println!("{shape}: {:?}", backend.info());
    let (prompt, count) = (tokens(&model, 64), 64);
    // The least of many short times: what the machine does when nothing else runs on it.
    let (mut prefill, mut decode) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..7 {
        backend.rewind(0);
        let start = std::time::Instant::now();
        backend.prefill(&prompt).unwrap();
        prefill = prefill.min(start.elapsed().as_secs_f64() / prompt.len() as f64);
        for _ in 0..count {
            let start = std::time::Instant::now();
            let token = backend.choose(&Sampling::GREEDY).unwrap();
            backend.decode(token).unwrap();
            decode = decode.min(start.elapsed().as_secs_f64());
        }
    }
    let bytes = backend.info().bytes_per_token as f64;
    println!(
        "prompt {:.0} tokens/s, decode {:.1} tokens/s, {:.1} GB/s",
        1.0 / prefill,
        1.0 / decode,
        bytes / decode / 1e9
    );
}

#[test]
fn logits_of_every_prompt_token_are_those_of_single_steps() {
    let model = model("tiny", DType::Q4_1, DType::Q8_0);
    // More than one chunk, and a last one that is not full.
    let tokens = tokens(&model, CHUNK_TOKENS + 5);
    let mut steps = backend(&model, tokens.len(), Isa::selected(), 2);
    let mut expected = Vec::new();
    for token in &tokens {
        steps.decode(*token).unwrap();
        expected.extend(steps.logits().unwrap());
    }
    let mut prompt = backend(&model, tokens.len(), Isa::selected(), 2);
    prompt.prefill(&tokens[..3]).unwrap();
    let have = prompt.prefill_logits(&tokens[3..]).unwrap();
    let vocab = model.recipe.config.vocab;
    assert_eq!(have, expected[3 * vocab..]);
    assert_eq!(prompt.position(), tokens.len());
    assert_eq!(prompt.logits().unwrap(), expected[expected.len() - vocab..]);
    assert!(prompt.prefill_logits(&[]).is_err());
}

/// BitNet in small: blocks of ternary weights are 256 columns wide.
fn tiny_bitnet() -> Arc<LoadedModel> {
    let shape = Shape {
        name: "tiny-bitnet",
        architecture: "bitnet-b1.58",
        width: 256,
        head_dim: 64,
        ffn: 512,
        sub_norms: true,
        ..synthetic::shape("tiny").unwrap().clone()
    };
    model_of(&shape, DType::TQ2_0, DType::Q8_0)
}

#[test]
fn forms_of_ternary_weights_give_the_same_bits() {
    let model = tiny_bitnet();
    assert!(model.recipe.config.int8_activations);
    let tokens = tokens(&model, CHUNK_TOKENS + 9);
    let expected = reference_logits(&model, &tokens, KvForm::K16V16);
    for isa in Isa::available() {
        let mut of_isa: Option<Vec<f32>> = None;
        for form in Form::ALL {
            for threads in [1, 3] {
                let mut backend = with_form(&model, tokens.len(), isa, threads, form);
                let (prompt, single) = tokens.split_at(CHUNK_TOKENS + 2);
                backend.prefill(prompt).unwrap();
                for &token in single {
                    backend.decode(token).unwrap();
                }
                let got = backend.logits().unwrap();
                let what = format!("{isa} {form} {threads} threads");
                // A level that rounds to its other neighbour shows here.
                assert_close(&got, &expected, 2e-2, &what);
                match &of_isa {
                    None => of_isa = Some(got),
                    Some(first) => assert_eq!(&got, first, "{what}"),
                }
            }
        }
    }
}
