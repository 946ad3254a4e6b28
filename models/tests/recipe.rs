//! Recipes of whole files: what they contain, and the files that have none.

mod common;

use common::{Tensor, edited, set, synthetic_bytes};
use models::arch;
use models::file::gguf::{DType, Gguf, Value};
use models::recipe::{Buffer, Recipe, RowOrder, Step, WeightKind};
use models::synthetic;
use models::weights::decode;

fn recipe(bytes: &[u8]) -> Result<Recipe, models::Error> {
    arch::recipe(&Gguf::parse(bytes).unwrap())
}

fn error(bytes: &[u8]) -> String {
    let message = recipe(bytes)
        .expect_err("the file has no recipe")
        .to_string();
    assert!(!message.contains('\n'), "{message:?}");
    message
}

/// The error of a `tiny` file with one metadata value changed.
fn error_with(key: &str, value: Value<'static>) -> String {
    error(&edited(
        &synthetic_bytes("tiny"),
        |entries| set(entries, key, value),
        |_| {},
    ))
}

fn error_with_tensors(edit: impl FnOnce(&mut Vec<Tensor>)) -> String {
    error(&edited(&synthetic_bytes("tiny"), |_| {}, edit))
}

#[test]
fn configurations_come_from_the_file() {
    for shape in synthetic::SHAPES
        .iter()
        .filter(|s| s.name.starts_with("tiny"))
    {
        let bytes = synthetic_bytes(shape.name);
        let config = recipe(&bytes).unwrap().config;
        assert_eq!(config.architecture, shape.architecture);
        assert_eq!(config.name, format!("{} (random weights)", shape.name));
        assert_eq!(
            (
                config.layers,
                config.width,
                config.heads,
                config.kv_heads,
                config.head_dim
            ),
            (
                shape.layers,
                shape.width,
                shape.heads,
                shape.kv_heads,
                shape.head_dim
            )
        );
        assert_eq!(
            (config.ffn, config.vocab, config.context, config.tied),
            (shape.ffn, shape.vocab, shape.context, shape.tied)
        );
        assert_eq!(
            (config.rope_theta, config.norm_eps),
            (shape.rope_theta, shape.norm_eps)
        );
    }
}

#[test]
fn llama_steps_and_row_orders() {
    let recipe = recipe(&synthetic_bytes("tiny")).unwrap();
    // Embedding, 16 steps a layer, final norm, logits; 9 tensors a layer, table and final norm.
    assert_eq!(
        (recipe.steps.len(), recipe.weights.len()),
        (1 + 2 * 16 + 2, 2 * 9 + 2)
    );
    assert_eq!(
        recipe.steps[0],
        Step::Embed {
            table: 0,
            dst: Buffer::Residual
        }
    );
    let last = recipe.steps.last().unwrap();
    assert_eq!(
        *last,
        Step::Logits {
            table: 0,
            src: Buffer::Normed,
            dst: Buffer::Logits
        }
    );
    for weight in &recipe.weights {
        let rotary = weight.name.contains("attn_q") || weight.name.contains("attn_k");
        let expected = if rotary {
            RowOrder::Interleaved { head_dim: 16 }
        } else {
            RowOrder::AsStored
        };
        assert_eq!(weight.row_order, expected, "{}", weight.name);
    }
    let scales: Vec<f32> = recipe
        .steps
        .iter()
        .filter_map(|s| {
            if let Step::Attention { scale, .. } = s {
                Some(*scale)
            } else {
                None
            }
        })
        .collect();
    assert_eq!(scales, [0.25, 0.25]);
    assert_eq!(recipe.config.rope_divisors, None);
}

#[test]
fn qwen2_has_biases_and_its_own_output_table() {
    let recipe = recipe(&synthetic_bytes("tiny-qwen2")).unwrap();
    assert!(
        recipe
            .weights
            .iter()
            .all(|w| w.row_order == RowOrder::AsStored)
    );
    let biased: Vec<&str> = recipe
        .steps
        .iter()
        .filter_map(|step| match step {
            Step::Linear {
                weight,
                bias: Some(bias),
                ..
            } => {
                assert_eq!(recipe.weights[*bias].kind, WeightKind::Vector);
                assert_eq!(recipe.weights[*bias].cols, recipe.weights[*weight].rows);
                Some(recipe.weights[*weight].name.as_str())
            }
            _ => None,
        })
        .collect();
    assert_eq!(biased.len(), 6);
    assert!(
        biased
            .iter()
            .all(|n| ["_q.", "_k.", "_v."].iter().any(|p| n.contains(p))),
        "{biased:?}"
    );
    let Some(Step::Logits { table, .. }) = recipe.steps.last() else {
        panic!()
    };
    assert_eq!(recipe.weights[*table].name, "output.weight");
    assert_eq!(recipe.weights[*table].kind, WeightKind::Embedding);
}

#[test]
fn buffers_fit_the_linear_layers() {
    for shape in ["tiny", "tiny-qwen2", "tiny-llama3"] {
        let bytes = synthetic_bytes(shape);
        let gguf = Gguf::parse(&bytes).unwrap();
        let recipe = arch::recipe(&gguf).unwrap();
        for step in &recipe.steps {
            match step {
                Step::Linear {
                    weight, src, dst, ..
                } => {
                    let weight = &recipe.weights[*weight];
                    let have = (recipe.elems(*dst), recipe.elems(*src));
                    assert_eq!(have, (weight.rows, weight.cols), "{}", weight.name);
                }
                Step::Rope { buffer, heads } => {
                    assert_eq!(recipe.elems(*buffer), heads * recipe.config.head_dim);
                }
                _ => {}
            }
        }
        for weight in &recipe.weights {
            decode(&gguf, weight).unwrap();
        }
    }
}

#[test]
fn stretched_frequencies_divide() {
    let plain = recipe(&synthetic_bytes("tiny")).unwrap();
    assert_eq!(plain.rope_inverse_frequencies()[0], 1.0);
    let expected = 10_000f64.powf(-2.0 / 16.0);
    assert!((plain.rope_inverse_frequencies()[1] - expected).abs() < 1e-12);

    let stretched = recipe(&synthetic_bytes("tiny-llama3")).unwrap();
    let divisors = stretched.config.rope_divisors.clone().unwrap();
    assert_eq!((divisors.len(), divisors[0], divisors[15]), (16, 1.0, 8.0));
    assert!(
        divisors.iter().any(|d| *d > 1.0 && *d < 8.0),
        "{divisors:?}"
    );
    let slowest = 5e5f64.powf(-30.0 / 32.0) / 8.0;
    assert!((stretched.rope_inverse_frequencies()[15] / slowest - 1.0).abs() < 1e-6);

    let linear = edited(
        &synthetic_bytes("tiny"),
        |entries| {
            set(entries, "llama.rope.scaling.type", Value::String("linear"));
            set(entries, "llama.rope.scaling.factor", Value::F32(4.0));
        },
        |_| {},
    );
    let linear = recipe(&linear).unwrap();
    for (a, b) in linear
        .rope_inverse_frequencies()
        .iter()
        .zip(plain.rope_inverse_frequencies())
    {
        assert_eq!(a * 4.0, b);
    }
}

#[test]
fn defaults_of_absent_keys() {
    let bytes = edited(
        &synthetic_bytes("tiny"),
        |entries| {
            entries.retain(|(key, _)| {
                !key.contains("rope.") && !key.contains("_length") && !key.starts_with("general.n")
                    || key.contains("context")
                    || key.contains("embedding")
                    || key.contains("feed")
            });
        },
        |_| {},
    );
    let config = recipe(&bytes).unwrap().config;
    assert_eq!((config.rope_theta, config.head_dim), (10_000.0, 16));
    assert_eq!(config.name, "llama");
}

#[test]
fn unknown_architectures_list_the_known() {
    let message = error_with("general.architecture", Value::String("gpt-17"));
    assert_eq!(
        message,
        "unknown architecture `gpt-17`: known are llama, qwen2, qwen3, bitnet-b1.58, bitnet-25"
    );
    let message = error_with("general.architecture", Value::U32(1));
    assert_eq!(
        message,
        "metadata key `general.architecture` is a u32, expected a string"
    );
}

#[test]
fn vocabularies_have_to_agree() {
    let message = error_with("llama.vocab_size", Value::U32(321));
    assert!(
        message.contains("`llama.vocab_size`: vocabulary of 321 tokens"),
        "{message}"
    );
    let bytes = synthetic_bytes("tiny");
    let other = synthetic::to_vec(
        &synthetic::Shape {
            vocab: 352,
            ..*synthetic::shape("tiny").unwrap()
        },
        &synthetic::Options::default(),
    )
    .unwrap();
    let tokens = Gguf::parse(&other)
        .unwrap()
        .metadata
        .get("tokenizer.ggml.tokens")
        .unwrap()
        .clone();
    let message = error(&edited(
        &bytes,
        |e| set(e, "tokenizer.ggml.tokens", tokens),
        |_| {},
    ));
    assert_eq!(
        message,
        "metadata key `tokenizer.ggml.tokens`: vocabulary of 352 tokens, but token_embd.weight has \
         320 rows"
    );
}

#[test]
fn metadata_out_of_range_is_refused_by_key() {
    for (key, value, expect) in [
        ("llama.block_count", Value::U32(0), "0 is not between 1"),
        ("llama.block_count", Value::I32(-1), "-1 is negative"),
        ("llama.block_count", Value::U64(1 << 60), "is not between 1"),
        (
            "llama.embedding_length",
            Value::U32(65),
            "65 is not a multiple of 32",
        ),
        (
            "llama.feed_forward_length",
            Value::String("160"),
            "is a string, expected an integer",
        ),
        (
            "llama.attention.head_count_kv",
            Value::U32(3),
            "do not divide 4 heads",
        ),
        (
            "llama.attention.head_count",
            Value::U32(1 << 30),
            "too wide",
        ),
        ("llama.attention.key_length", Value::U32(15), "odd"),
        (
            "llama.attention.key_length",
            Value::U32(32),
            "differs from the head width 32",
        ),
        (
            "llama.rope.dimension_count",
            Value::U32(8),
            "8 differs from the head width 16",
        ),
        (
            "llama.rope.freq_base",
            Value::F32(f32::NAN),
            "not a positive number",
        ),
        (
            "llama.rope.freq_base",
            Value::F64(1e300),
            "not a positive number",
        ),
        (
            "llama.attention.layer_norm_rms_epsilon",
            Value::F32(-1.0),
            "not a positive number",
        ),
        (
            "llama.rope.scaling.type",
            Value::String("yarn"),
            "`yarn` is not supported",
        ),
        ("llama.expert_count", Value::U32(8), "mixtures of experts"),
        (
            "llama.attention.sliding_window",
            Value::U32(0),
            "a window of 0 tokens",
        ),
        ("llama.logit_scale", Value::F32(8.0), "8 is not supported"),
        ("llama.attention.causal", Value::Bool(false), "later tokens"),
    ] {
        let message = error_with(key, value);
        assert!(
            message.starts_with("metadata key `llama.") && message.contains(expect),
            "{message}"
        );
    }
    for key in [
        "llama.block_count",
        "llama.context_length",
        "general.architecture",
    ] {
        let bytes = edited(
            &synthetic_bytes("tiny"),
            |e| e.retain(|(k, _)| k != key),
            |_| {},
        );
        assert_eq!(error(&bytes), format!("metadata key `{key}` is missing"));
    }
}

#[test]
fn tensors_have_to_be_those_of_the_architecture() {
    let message = error_with_tensors(|t| t.retain(|t| t.name != "blk.1.ffn_up.weight"));
    assert_eq!(message, "tensor `blk.1.ffn_up.weight` is missing");
    let message = error_with_tensors(|t| t.retain(|t| t.name != "token_embd.weight"));
    assert_eq!(message, "tensor `token_embd.weight` is missing");
    let message = error_with("llama.block_count", Value::U32(1 << 30));
    assert_eq!(message, "tensor `blk.2.attn_norm.weight` is missing");
    // One layer fewer than there is, or a part that the recipe would leave out.
    let message = error_with("llama.block_count", Value::U32(1));
    assert_eq!(
        message,
        "tensor `blk.1.attn_norm.weight`: is no part of this architecture"
    );
    let extra = |name: &str| Tensor {
        name: name.to_owned(),
        dims: vec![16],
        dtype: DType::F32,
        data: vec![0; 64],
    };
    let message = error_with_tensors(|t| t.push(extra("blk.0.attn_q_norm.weight")));
    assert_eq!(
        message,
        "tensor `blk.0.attn_q_norm.weight`: is no part of this architecture"
    );
    let message = error_with_tensors(|t| t.push(extra("rope_freqs.weight")));
    assert_eq!(
        message,
        "tensor `rope_freqs.weight`: has shape [16], expected [8]"
    );
    let message = error_with_tensors(|t| {
        t.push(Tensor {
            dims: vec![8],
            data: vec![0; 32],
            ..extra("rope_freqs.weight")
        });
    });
    assert_eq!(
        message,
        "tensor `rope_freqs.weight`: 0 cannot divide a frequency"
    );
    let message = error_with_tensors(|t| {
        let norm = t
            .iter_mut()
            .find(|t| t.name == "output_norm.weight")
            .unwrap();
        norm.dims = vec![32, 2];
    });
    assert_eq!(
        message,
        "tensor `output_norm.weight`: has shape [32, 2], expected [64]"
    );
}
