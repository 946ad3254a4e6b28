//! The default model's own file, where it has been fetched.

use std::path::Path;

use models::arch::recipe;
use models::catalog::Catalog;
use models::file::Source;
use models::file::gguf::{DType, Gguf};
use models::quant::Weight;
use models::recipe::{Recipe, WeightKind};
use models::weights::decode;

/// The file's bytes; `None`, and a line that says so, where it has not been fetched.
fn model_file() -> Option<Vec<u8>> {
    let catalog = Catalog::builtin().unwrap();
    let file = &catalog.find("smollm2-135m-instruct").unwrap().file;
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("files")
        .join(file);
    if !path.is_file() {
        println!("skipped: no model file {}", path.display());
        return None;
    }
    Some(std::fs::read(path).unwrap())
}

/// Row `i` of a decoded matrix.
fn row(gguf: &Gguf<'_>, recipe: &Recipe, name: &str, i: usize) -> Vec<f64> {
    let weight = recipe.weights.iter().find(|w| w.name == name).unwrap();
    let mut out = vec![0f32; weight.cols];
    match decode(gguf, weight).unwrap() {
        Weight::Int4(matrix) => matrix.dequantize_row(i, &mut out),
        Weight::Int8(matrix) => matrix.dequantize_row(i, &mut out),
        Weight::Vector(values) => out = values,
        other => panic!("the file has no {other:?}"),
    }
    out.into_iter().map(f64::from).collect()
}

#[test]
fn configuration_tensors_and_sizes() {
    let Some(bytes) = model_file() else { return };
    let gguf = Gguf::parse(&bytes).unwrap();
    let recipe = recipe(&gguf).unwrap();
    let config = &recipe.config;
    assert_eq!(
        (
            config.layers,
            config.width,
            config.ffn,
            config.heads,
            config.kv_heads,
            config.head_dim
        ),
        (30, 576, 1536, 9, 3, 64)
    );
    assert_eq!(
        (config.vocab, config.context, config.tied),
        (49_152, 8192, true)
    );
    assert_eq!((config.rope_theta, config.norm_eps), (1e5, 1e-5));
    let of = |dtype| gguf.tensors.iter().filter(|t| t.dtype == dtype).count();
    assert_eq!(
        (of(DType::Q4_1), of(DType::Q8_0), of(DType::F32)),
        (210, 1, 61)
    );
    assert_eq!(
        gguf.metadata
            .strings("tokenizer.ggml.merges")
            .unwrap()
            .len(),
        48_900
    );

    // Without loss means without a byte more or less than the file has for each tensor.
    for weight in &recipe.weights {
        let decoded = decode(&gguf, weight).unwrap();
        let stored = gguf.tensor(&weight.name).unwrap().data.len() as u64;
        assert_eq!(decoded.bytes(), stored, "{}", weight.name);
        let form = match weight.kind {
            WeightKind::Embedding => matches!(&decoded, Weight::Int8(m) if m.group == 32),
            WeightKind::FloatTable => false,
            WeightKind::Linear => matches!(&decoded, Weight::Int4(m) if m.mins.is_some()),
            WeightKind::Vector => matches!(&decoded, Weight::Vector(_)),
        };
        assert!(form, "{}", weight.name);
    }
}

/// Values as the reference reader of the format (PyPI `gguf` 0.19.0) decodes them.
#[test]
fn values_match_the_reference_reader() {
    let Some(bytes) = model_file() else { return };
    let gguf = Gguf::parse(&bytes).unwrap();
    let recipe = recipe(&gguf).unwrap();
    let table = row(&gguf, &recipe, "token_embd.weight", 1);
    assert_eq!(
        table[..4],
        [
            -0.0238037109375,
            -0.015869140625,
            -0.0396728515625,
            0.015869140625
        ]
    );
    let table = row(&gguf, &recipe, "token_embd.weight", 49_151);
    assert_eq!(table[574..], [-0.11989402770996094, -0.0417022705078125]);
    // Stored rows 0, 2 and 1 of the first head are rows 0, 1 and 32 in half-split order; stored
    // row 3 of the second head is row 64 + 33.
    for (i, expected) in [
        (0, [-0.0963134765625, 0.1573486328125, -0.0963134765625]),
        (32, [-0.1173095703125, -0.1173095703125, -0.19281005859375]),
        (1, [-0.1591796875, 0.39794921875, -0.0198974609375]),
        (97, [-0.0048828125, 0.0477294921875, -0.0574951171875]),
    ] {
        assert_eq!(
            row(&gguf, &recipe, "blk.0.attn_q.weight", i)[..3],
            expected,
            "row {i}"
        );
    }
    let down = row(&gguf, &recipe, "blk.29.ffn_down.weight", 575);
    assert_eq!(down[1533..], [0.203125, -0.08984375, 0.056640625]);
    let norm = row(&gguf, &recipe, "output_norm.weight", 0);
    assert_eq!(norm[..3], [1.7578125, 1.8203125, 1.78125]);
}

#[test]
fn a_cut_file_is_an_error() {
    let Some(bytes) = model_file() else { return };
    // Evenly through the header, and through the data.
    let header = 1_800_000;
    let cuts = (1..25).map(|i| i * header / 25);
    for cut in cuts.chain((1..=25).map(|i| bytes.len() * i / 25 - 1)) {
        let error = Gguf::parse(&bytes[..cut]).unwrap_err().to_string();
        assert!(
            error.contains("truncated") || error.contains("past the end"),
            "{error}"
        );
    }
}
