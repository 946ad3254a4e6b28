//! The plan without a GPU: its list of calls, and the same list run by the emulator against the
//! CPU backend.

mod containers;
mod rounded;

use std::sync::Arc;

use cuda_std::emulator::{self, Buffer as Emulated};
use models::arch::recipe;
use models::file::gguf::{DType, Gguf};
use models::quant::{Int4Form, Int4Matrix, Weight};
use models::recipe::{RowOrder, WeightKind, WeightRef};
use models::synthetic::{self, Options};

use super::*;
use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::sampler;
use crate::weights::ModelFile;

fn model(shape: &str, linear: DType) -> LoadedModel {
    let shape = synthetic::shape(shape).expect("a named shape");
    let options = Options {
        linear,
        ..Options::default()
    };
    let bytes = synthetic::to_vec(shape, &options).expect("a synthetic model");
    let gguf = Gguf::parse(&bytes).expect("a valid file");
    let recipe = recipe(&gguf).expect("a known architecture");
    let weights = recipe
        .weights
        .iter()
        .map(|weight| models::weights::decode(&gguf, weight).expect("a known type"))
        .collect();
    LoadedModel::new(recipe, weights)
}

/// Device memory of the emulator, which reports every access outside of it and every read of what
/// nothing wrote.
#[derive(Default)]
struct Emulator {
    buffers: Vec<Emulated<u8>>,
}

impl Emulator {
    fn add(&mut self, buffer: Emulated<u8>, bytes: usize) -> DeviceSlice {
        let address = buffer.address();
        self.buffers.push(buffer);
        DeviceSlice {
            address,
            bytes: bytes as u64,
        }
    }

    fn buffer(&self, slice: DeviceSlice) -> &Emulated<u8> {
        self.buffers
            .iter()
            .find(|buffer| buffer.address() == slice.address)
            .expect("an allocated buffer")
    }

    fn read(&self, slice: DeviceSlice) -> Vec<u8> {
        self.buffer(slice)
            .to_vec()
            .unwrap_or_else(|fault| panic!("{fault}"))
    }

    /// Runs calls that were planned for a T4.
    fn run(&self, calls: &[Call]) {
        emulator::set_compute_capability(DeviceInfo::T4.compute_capability);
        for call in calls {
            let entry = gpu_kernels::ENTRIES
                .iter()
                .find(|entry| entry.name == call.kernel)
                .unwrap_or_else(|| panic!("no kernel {}", call.kernel));
            assert_eq!(
                call.args.len(),
                entry.arity,
                "{}: wrong number of arguments",
                call.kernel
            );
            let launch = emulator::Launch::new(call.launch.grid, call.launch.block)
                .with_shared_bytes(call.launch.shared_bytes);
            if let Err(fault) = emulator::launch_entry(entry, &launch, &call.args) {
                panic!("{fault}");
            }
        }
    }
}

impl Memory for Emulator {
    fn upload(&mut self, bytes: &[u8]) -> Result<DeviceSlice, Error> {
        Ok(self.add(Emulated::from_slice(bytes), bytes.len()))
    }

    fn reserve(&mut self, bytes: u64) -> Result<DeviceSlice, Error> {
        Ok(self.add(Emulated::uninit(bytes as usize), bytes as usize))
    }
}

fn typed<T: bytemuck::AnyBitPattern>(bytes: &[u8]) -> Vec<T> {
    bytes
        .chunks_exact(size_of::<T>())
        .map(bytemuck::pod_read_unaligned)
        .collect()
}

fn plan_of(model: &LoadedModel) -> Plan {
    let tuned = Tuned::default();
    compile(
        model,
        12.into(),
        &DeviceInfo::T4,
        &tuned,
        &mut Counter::default(),
    )
    .expect("a plan")
}

fn relative_l2(got: &[f32], want: &[f32]) -> f64 {
    let sum = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = sum(&mut got
        .iter()
        .zip(want)
        .map(|(g, w)| f64::from(*g) - f64::from(*w)));
    difference / sum(&mut want.iter().map(|w| f64::from(*w)))
}

/// Runs prompt and decode steps of `model` on the emulator, from the plan's own calls, and compares
/// the logits of every full step with the CPU backend's. Returns the names of the calls.
fn emulated_logits_equal_the_cpu(model: LoadedModel) -> Vec<String> {
    emulated_logits_are_close(model, 2e-3)
}

fn emulated_logits_are_close(model: LoadedModel, bound: f64) -> Vec<String> {
    emulated_with(model, KvForm::K16V16, bound)
}

fn emulated_with(model: LoadedModel, form: KvForm, bound: f64) -> Vec<String> {
    const CONTEXT: usize = 12;
    let cache = KvCache {
        tokens: CONTEXT,
        form,
    };
    let mut memory = Emulator::default();
    let plan = compile(
        &model,
        cache,
        &DeviceInfo::T4,
        &Tuned::default(),
        &mut memory,
    )
    .expect("a plan");
    let vocab = model.recipe.config.vocab;
    let mut cpu = CpuBackend::new(Arc::new(model), cache).expect("a CPU backend");

    let prompt = [5u32, 299, 17, 64].map(|token| token % vocab as u32);
    let mut tokens = vec![0u32; CONTEXT + 1];
    tokens[..prompt.len()].copy_from_slice(&prompt);
    memory
        .buffer(plan.tokens)
        .write(0, bytemuck::cast_slice(&tokens));
    for _ in 1..prompt.len() {
        memory.run(&plan.prompt);
    }
    cpu.prefill(&prompt).expect("prefill");

    let mut wanted = Vec::new();
    for position in prompt.len()..prompt.len() + 3 {
        memory.run(&plan.full);
        let logits: Vec<f32> = typed(&memory.read(plan.logits));
        assert_eq!(logits.len(), vocab);
        let expected = cpu.logits().expect("logits");
        let error = relative_l2(&logits, &expected);
        assert!(
            error < bound,
            "position {position}: relative error {error:.2e}"
        );

        let state: Vec<u32> = typed(&memory.read(plan.state));
        assert_eq!(state, [position as u32]);
        let tokens: Vec<u32> = typed(&memory.read(plan.tokens));
        let chosen = tokens[position];
        assert_eq!(
            chosen,
            cpu_kernels::sample::argmax(&logits),
            "the device's own greedy choice"
        );
        cpu.decode(chosen).expect("decode");
        wanted.push(expected);
    }
    if let Some(many) = &plan.many {
        // The prompt again, many tokens at a time, and the step after it.
        let logits = || typed::<f32>(&memory.read(plan.logits));
        let set_position = |position: u32| {
            memory.buffer(plan.state).write(0, &position.to_le_bytes());
        };
        for (first, tokens) in [
            (0, prompt.len() - 1),
            (prompt.len() - 1, 1),
            (0, prompt.len()),
        ] {
            set_position(first as u32);
            memory.run(&many.calls(tokens, plan.state).expect("a run"));
            memory.run(&[
                many.output(tokens - 1).expect("a row"),
                plan.plain_logits.clone(),
            ]);
            if first + tokens == prompt.len() {
                let error = relative_l2(&logits(), &wanted[0]);
                assert!(
                    error < bound,
                    "{tokens} at once: relative error {error:.2e}"
                );
            }
        }
        set_position(prompt.len() as u32);
        memory.run(&plan.full);
        let error = relative_l2(&logits(), &wanted[1]);
        assert!(error < bound, "after a run: relative error {error:.2e}");
    }
    plan.notes.into_iter().map(|note| note.step).collect()
}

#[test]
fn a_llama_on_the_emulator() {
    let model = model("tiny", DType::Q4_1);
    assert!(plan_of(&model).many.is_some(), "many tokens at once");
    emulated_logits_equal_the_cpu(model);
}

#[test]
fn a_qwen2_on_the_emulator() {
    emulated_logits_equal_the_cpu(model("tiny-qwen2", DType::Q4_0));
}

/// What the products' rounding moves across an edge between two levels is a whole level off: the bound is
/// that of 8 bits.
#[test]
fn values_of_8_bits_on_the_emulator() {
    for (shape, linear) in [
        ("tiny", DType::Q4_1),
        ("tiny-qwen2", DType::Q4_0),
        ("tiny-llama3", DType::Q8_0),
    ] {
        let model = model(shape, linear);
        let names = emulated_with(model, KvForm::K16V8, 1e-2);
        let append = |name: &String| name == "rope q k, append";
        assert!(names.iter().any(append), "{shape}: {names:?}");
    }
}

#[test]
fn a_stretched_llama_with_8_bit_weights_on_the_emulator() {
    let names = emulated_logits_equal_the_cpu(model("tiny-llama3", DType::Q8_0));
    assert!(
        names.contains(&"attn_q".to_owned()),
        "step by step: {names:?}"
    );
}

/// A recipe whose steps are in no known arrangement, or whose intermediate results are read again,
/// computes the same, in more calls.
#[test]
fn what_cannot_be_fused_runs_step_by_step() {
    let plain = emulated_logits_equal_the_cpu(model("tiny-qwen2", DType::Q4_0)).len();
    let longer_by = |change: &dyn Fn(&mut Vec<Step>)| {
        let mut model = model("tiny-qwen2", DType::Q4_0);
        change(&mut model.recipe.steps);
        emulated_logits_equal_the_cpu(model).len() - plain
    };
    let find =
        |steps: &[Step], wanted: fn(&Step) -> bool| steps.iter().position(wanted).expect("a step");
    // What was added is added again: the product has to leave it behind.
    let again = longer_by(&|steps| {
        let add = find(steps, |step| matches!(step, Step::Add { .. }));
        steps.insert(add, steps[add].clone());
    });
    assert_eq!(again, 2);
    // Keys are turned before queries.
    let swapped = longer_by(&|steps| {
        let rope = find(steps, |step| matches!(step, Step::Rope { .. }));
        steps.swap(rope, rope + 1);
    });
    assert_eq!(swapped, 3);
    // The norm's result is wanted once more, by the residual.
    let normed = longer_by(&|steps| {
        let rope = find(steps, |step| matches!(step, Step::Rope { .. }));
        let add = Step::Add {
            src: Buffer::Normed,
            dst: Buffer::Residual,
        };
        steps.insert(rope, add);
    });
    assert_eq!(normed, 3);
    // Gate and up of a layer are computed in the other order: still one product.
    let crossed = longer_by(&|steps| {
        let gated = find(steps, |step| matches!(step, Step::SwiGlu { .. }));
        steps.swap(gated - 1, gated - 2);
    });
    assert_eq!(crossed, 1);
}

/// At each position the token that the calls draw is the one that the host's sampler takes from the
/// same logits.
#[test]
fn tokens_drawn_on_the_emulator() {
    const CONTEXT: usize = 12;
    let model = model("tiny-qwen2", DType::Q4_0);
    let mut memory = Emulator::default();
    let tuned = Tuned::default();
    let plan =
        compile(&model, CONTEXT.into(), &DeviceInfo::T4, &tuned, &mut memory).expect("a plan");
    let write = |slice, words: &[u32]| memory.buffer(slice).write(0, bytemuck::cast_slice(words));
    let sampling = Sampling {
        temperature: 1.5,
        top_k: 50,
        top_p: 0.98,
        min_p: 0.001,
        repetition_penalty: 1.5,
        seed: 11,
    };
    write(plan.settings, &draw_settings(&sampling));
    // The device marks what it draws, the first token it has to be told.
    write(plan.seen, &sampler::seen(&[5], model.recipe.config.vocab));
    let mut tokens = vec![5u32];
    for position in 0..CONTEXT {
        let mut all = vec![0u32; CONTEXT + 1];
        all[..tokens.len()].copy_from_slice(&tokens);
        write(plan.tokens, &all);
        memory.run(&plan.full);
        let mut logits: Vec<f32> = typed(&memory.read(plan.logits));
        write(plan.state, &[position as u32]);
        memory.run(&plan.draw);
        let state: Vec<u32> = typed(&memory.read(plan.state));
        assert_eq!(state, [position as u32 + 1]);
        let want = sampler::choose(&mut logits, &tokens, &sampling).expect("a token");
        let drawn: Vec<u32> = typed(&memory.read(plan.tokens));
        assert_eq!(drawn[position + 1], want, "position {position}");
        tokens.push(want);
    }
    let greedy = tokens.iter().filter(|token| **token == tokens[1]).count();
    assert!(
        greedy < CONTEXT,
        "not the same token over and over: {tokens:?}"
    );
}

#[test]
fn norms_of_heads_on_the_emulator() {
    let mut model = model("tiny-qwen2", DType::Q4_0);
    let config = model.recipe.config.clone();
    let gain = (0..config.head_dim)
        .map(|i| 0.5 + i as f32 / 16.0)
        .collect();
    let weight = model.weights.len();
    model.weights.push(Weight::Vector(gain));
    model.recipe.weights.push(WeightRef {
        name: "blk.0.attn_q_norm.weight".to_owned(),
        rows: 1,
        cols: config.head_dim,
        kind: WeightKind::Vector,
        row_order: RowOrder::AsStored,
    });
    let steps = &mut model.recipe.steps;
    let rope = steps
        .iter()
        .position(|step| matches!(step, Step::Rope { .. }));
    let rope = rope.expect("a rope");
    for (buffer, heads) in [
        (Buffer::Query, config.heads),
        (Buffer::Key, config.kv_heads),
    ] {
        let norm = Step::HeadNorm {
            weight,
            eps: 1e-6,
            buffer,
            heads,
        };
        steps.insert(rope, norm);
    }
    assert!(plan_of(&model).many.is_some(), "many tokens at once");
    let steps = emulated_logits_equal_the_cpu(model);
    assert_eq!(
        &steps[1..5],
        [
            "norm attn_q attn_k attn_v",
            "norm attn_q_norm",
            "norm attn_q_norm",
            "rope q k, append"
        ]
    );
}

/// Floats, INT4 with zeros, ternary weights, rounded activations: what only checkpoints of other programs
/// bring, in the steps and kernels that there are for it.
#[test]
fn checkpoints_of_other_programs_on_the_emulator() {
    for (name, steps) in [
        (
            "qwen3-f32",
            &["q_proj", "norm q_norm", "choice", "advance"][..],
        ),
        (
            "llama-awq-32",
            &["norm gate_proj up_proj swiglu", "logits, choice"],
        ),
        ("llama-gptq-128", &["norm q_proj k_proj v_proj rope append"]),
        (
            "bitnet-autobitlinear",
            &["round", "relu2", "down_proj add", "rescale"],
        ),
    ] {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/hf");
        let file = ModelFile::open(&folder.join(name)).expect("a folder");
        let parsed = file.parse().expect("parsed");
        let recipe = file.recipe(&parsed).expect("a recipe");
        let model = file.load(&parsed, recipe).expect("loaded");
        let names = emulated_logits_are_close(model, 2e-3);
        for step in steps {
            assert!(
                names.iter().any(|n| n == step),
                "{name}: no {step} in {names:?}"
            );
        }
    }
}

#[test]
fn an_output_table_of_4_bits_on_the_emulator() {
    let mut model = model("tiny-qwen2", DType::Q4_1);
    let Some(Step::Logits { table, .. }) = model.recipe.steps.last().cloned() else {
        panic!("no logits");
    };
    let (rows, cols) = model.weights[table].shape();
    let mut floats = vec![0.0; rows * cols];
    for (i, row) in floats.chunks_exact_mut(cols).enumerate() {
        model.weights[table].dequantize_row(i, row);
    }
    let int4 = Int4Matrix::encode(rows, cols, 64, Int4Form::Symmetric, &floats);
    model.weights[table] = Weight::Int4(int4.expect("encoded"));
    let steps = emulated_logits_are_close(model, 2e-3);
    assert!(
        steps.ends_with(&["logits", "choice", "advance"].map(str::to_owned)),
        "{steps:?}"
    );
}

#[test]
fn five_calls_a_layer_and_no_work_that_a_prompt_token_does_not_need() {
    let model = model("tiny-qwen2", DType::Q4_0);
    let plan = compile(
        &model,
        7.into(),
        &DeviceInfo::T4,
        &Tuned::default(),
        &mut Counter::default(),
    )
    .expect("a plan");
    let layer = [
        "norm attn_q attn_k attn_v rope append",
        "attention",
        "attn_output add",
        "norm ffn_gate ffn_up swiglu",
        "ffn_down add",
    ];
    let layers = model.recipe.config.layers;
    let mut names = vec!["embed"];
    names.extend(layer.repeat(layers));
    names.extend(["norm output_norm", "logits, choice"]);
    let steps: Vec<&str> = plan.notes.iter().map(|note| note.step.as_str()).collect();
    assert_eq!(steps, names);
    assert!(plan.notes[1].launch.contains("rule"), "{:?}", plan.notes[1]);
    assert_eq!(plan.full.len(), names.len());
    assert_eq!(plan.body_calls, names.len() - 1);
    // As the full step up to the last write into the cache, of the last layer.
    let (last, same) = plan.prompt.split_last().expect("calls");
    assert_eq!(last.kernel, "advance_position");
    assert_eq!(same, &plan.full[..same.len()]);
    assert_eq!(same.len(), 1 + 5 * (layers - 1) + 1);
}

#[test]
fn dependent_launch_where_the_device_has_it() {
    let model = model("tiny", DType::Q4_0);
    let dependent = |compute_capability| {
        let device = DeviceInfo {
            compute_capability,
            ..DeviceInfo::T4
        };
        let plan = compile(
            &model,
            7.into(),
            &device,
            &Tuned::default(),
            &mut Counter::default(),
        )
        .expect("a plan");
        plan.full.iter().filter(|call| call.dependent).count()
    };
    assert_eq!(dependent(80), 0);
    assert!(dependent(90) > model.recipe.config.layers);
}

#[test]
fn the_counter_counts_weights_cache_and_buffers() {
    let model = model("tiny", DType::Q4_0);
    let bytes = |context: usize| {
        let mut counter = Counter::default();
        compile(
            &model,
            context.into(),
            &DeviceInfo::T4,
            &Tuned::default(),
            &mut counter,
        )
        .expect("a plan");
        counter.bytes
    };
    let weights: u64 = model.weights.iter().map(Weight::bytes).sum();
    assert!(bytes(64) > weights);
    // A cache is (KV, S, Dh) f16, keys and values, each layer; two rotary tables (S, Dh/2) f32.
    let config = &model.recipe.config;
    let cache = |s: usize| (4 * config.layers * config.kv_heads * s * config.head_dim) as u64;
    let tables = |s: usize| (4 * s * config.head_dim) as u64;
    let tokens = |s: usize| (4 * s as u64 + 4).next_multiple_of(Counter::ALIGN);
    let partials = |s: usize| {
        let shape = attention_shape(&model, s, 1.0, None);
        let tuning = attention::split::Tuning::of(&DeviceInfo::T4, &shape);
        let bytes = attention::scratch_bytes(&shape, tuning);
        bytes.next_multiple_of(Counter::ALIGN)
    };
    let all = |s: usize| cache(s) + tables(s) + tokens(s) + partials(s);
    // Both take as many tokens of a prompt at once.
    assert_eq!(bytes(4096) - bytes(2048), all(4096) - all(2048));
}

#[test]
fn recipes_that_do_not_fit_are_errors() {
    let refused = |change: &dyn Fn(&mut LoadedModel), context: usize| {
        let mut model = model("tiny", DType::Q4_0);
        change(&mut model);
        let error = compile(
            &model,
            context.into(),
            &DeviceInfo::T4,
            &Tuned::default(),
            &mut Counter::default(),
        )
        .expect_err("a recipe that cannot run");
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    };
    assert!(refused(&|_| (), 0).contains("context of 0"));
    let swapped = refused(
        &|model| {
            let vector = model
                .weights
                .iter()
                .position(|w| matches!(w, Weight::Vector(_)))
                .expect("a norm");
            for step in &mut model.recipe.steps {
                if let Step::Linear { weight, .. } = step {
                    *weight = vector;
                }
            }
        },
        8,
    );
    assert!(swapped.contains("should be a matrix"), "{swapped}");
    let endless = refused(&|model| model.recipe.steps.truncate(3), 8);
    assert!(
        endless.contains("does not end with its logits"),
        "{endless}"
    );
    let short = refused(
        &|model| {
            for weight in &mut model.weights {
                if let Weight::Vector(values) = weight {
                    values.truncate(16);
                }
            }
        },
        8,
    );
    assert!(short.contains("gain"), "names the buffer: {short}");
    assert!(refused(&|_| (), usize::MAX / 2).contains("2^64"));
}
