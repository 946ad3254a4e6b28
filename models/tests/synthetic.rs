//! Synthetic models: repeatable, complete, and of the sizes that the real ones have.

mod common;

use std::io::Write;

use common::synthetic_bytes;
use models::arch::recipe;
use models::file::gguf::{DType, Gguf};
use models::synthetic::{MIN_VOCAB, Options, SHAPES, Shape, shape, to_vec, write};
use models::weights::decode;

#[test]
fn options_decide_the_bytes() {
    let tiny = shape("tiny").unwrap();
    let base = Options::default();
    let bytes = to_vec(tiny, &base).unwrap();
    assert_eq!(bytes, to_vec(tiny, &base).unwrap());
    for other in [
        Options { seed: 2, ..base },
        Options {
            linear: DType::Q4_1,
            ..base
        },
        Options {
            embedding: DType::F16,
            ..base
        },
    ] {
        assert_ne!(bytes, to_vec(tiny, &other).unwrap(), "{other:?}");
    }
}

#[test]
fn every_linear_type_decodes() {
    for linear in [DType::Q4_0, DType::Q4_1, DType::Q8_0] {
        let options = Options {
            linear,
            ..Options::default()
        };
        let bytes = to_vec(shape("tiny-qwen2").unwrap(), &options).unwrap();
        let gguf = Gguf::parse(&bytes).unwrap();
        for weight in &recipe(&gguf).unwrap().weights {
            assert!(decode(&gguf, weight).unwrap().bytes() > 0);
        }
    }
}

#[test]
fn tokenizer_covers_the_vocabulary() {
    let bytes = synthetic_bytes("tiny");
    let gguf = Gguf::parse(&bytes).unwrap();
    let m = &gguf.metadata;
    let tokens: Vec<&str> = m.strings("tokenizer.ggml.tokens").unwrap().collect();
    let types: Vec<i64> = m
        .integers_opt("tokenizer.ggml.token_type")
        .unwrap()
        .unwrap()
        .collect();
    assert_eq!((tokens.len(), types.len()), (320, 320));
    assert_eq!(
        tokens
            .iter()
            .collect::<std::collections::HashSet<_>>()
            .len(),
        320
    );
    assert_eq!((tokens[b'a' as usize], tokens[32]), ("a", "Ġ"));
    let end = m.u64("tokenizer.ggml.eos_token_id").unwrap() as usize;
    assert_eq!((tokens[end], types[end]), ("<|im_end|>", 3));
    for merge in m.strings("tokenizer.ggml.merges").unwrap() {
        assert!(tokens.contains(&merge.replace(' ', "").as_str()), "{merge}");
    }
    assert!(
        m.string("tokenizer.chat_template")
            .unwrap()
            .contains("<|im_start|>")
    );
}

/// Counts bytes and keeps none.
struct Count(u64);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn real_shapes_have_their_parameters() {
    // Parameters as published with the models, embeddings included.
    for (name, millions) in [
        ("smollm2-135m", 134.5),
        ("qwen2.5-0.5b", 494.0),
        ("qwen2.5-1.5b", 1543.7),
        ("qwen2.5-3b", 3085.9),
        ("llama-3.2-1b", 1235.8),
        ("llama-3.2-3b", 3212.7),
        ("bitnet-2b-4t", 2412.8),
    ] {
        let s = shape(name).unwrap();
        let (attended, keys) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let biases = if s.qkv_bias { attended + 2 * keys } else { 0 };
        let linears = s.width * (2 * attended + 2 * keys + 3 * s.ffn);
        let norms = if s.sub_norms { attended + s.ffn } else { 0 };
        let layer = linears + biases + norms + 2 * s.width;
        let parameters = s.layers * layer + s.width + s.vocab * s.width;
        assert!(
            (parameters as f64 / 1e6 - millions).abs() < 0.06,
            "{name}: {parameters}"
        );
    }
    // One is written in full; 4.5 bits a linear weight and 8.5 bits an embedding.
    let size = write(
        shape("smollm2-135m").unwrap(),
        &Options::default(),
        Count(0),
    )
    .unwrap()
    .0;
    assert!((90_000_000..92_500_000).contains(&size), "{size}");
}

#[test]
fn impossible_shapes_and_types_are_refused() {
    let tiny = *SHAPES.iter().find(|s| s.name == "tiny").as_ref().unwrap();
    let small = Shape {
        vocab: MIN_VOCAB - 1,
        ..tiny.clone()
    };
    let message = to_vec(&small, &Options::default()).unwrap_err().to_string();
    assert!(
        message.contains("vocabulary of 258 is below 259"),
        "{message}"
    );
    assert!(
        to_vec(
            &Shape {
                vocab: MIN_VOCAB,
                ..tiny.clone()
            },
            &Options::default()
        )
        .is_ok()
    );
    assert!(
        to_vec(
            &Shape {
                width: 72,
                ..tiny.clone()
            },
            &Options::default()
        )
        .is_err()
    );
    let options = Options {
        linear: DType::Q4_K,
        ..Options::default()
    };
    assert!(
        to_vec(
            &Shape {
                width: 256,
                ffn: 256,
                heads: 16,
                ..tiny.clone()
            },
            &options
        )
        .is_err()
    );
    let message = shape("tiny-gpt").unwrap_err().to_string();
    assert!(
        message.starts_with("unknown shape `tiny-gpt`: known are qwen2.5-0.5b"),
        "{message}"
    );
}
