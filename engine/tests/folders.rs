//! Hugging Face folders through the `edgellm` binary: whole ones run, damaged ones are one-line errors that
//! name the file, the key or the tensor.

mod support;

use std::path::{Path, PathBuf};

use support::{assert_error, assert_success, run, text};
use tempfile::TempDir;

/// A copy of a folder of the golden data.
fn copy(name: &str) -> TempDir {
    let from = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/hf")
        .join(name);
    let to = tempfile::tempdir().expect("a folder");
    for entry in std::fs::read_dir(from).expect("golden data") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name");
        std::fs::copy(&path, to.path().join(name)).expect("copied");
    }
    to
}

fn edit(folder: &TempDir, file: &str, change: impl FnOnce(String) -> String) {
    let path = folder.path().join(file);
    let before = std::fs::read_to_string(&path).expect("read");
    let after = change(before.clone());
    assert_ne!(after, before, "{file}: nothing changed");
    std::fs::write(path, after).expect("written");
}

/// Sets a key of `config.json`; a value of null takes it away.
fn set(folder: &TempDir, key: &str, value: serde_json::Value) {
    edit(folder, "config.json", |text| {
        let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        match key.split_once('.') {
            Some((outer, inner)) => config[outer][inner] = value,
            None => config[key] = value,
        }
        config.to_string()
    });
}

/// Rewrites a safetensors file: its header as text, and its data.
fn rewrite(path: &Path, change: impl FnOnce(&mut String, &mut Vec<u8>)) {
    let bytes = std::fs::read(path).expect("read");
    let (length, rest) = bytes.split_first_chunk::<8>().expect("a length");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let mut header = String::from_utf8(header.to_vec()).expect("UTF-8");
    let mut data = data.to_vec();
    change(&mut header, &mut data);
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&length, header.as_bytes(), &data].concat()).expect("written");
}

/// Where a tensor begins in the data of a file.
fn offset(header: &str, tensor: &str) -> usize {
    let header: serde_json::Value = serde_json::from_str(header).expect("JSON");
    let from = header[tensor]["data_offsets"][0].as_u64();
    from.expect("the tensor is there") as usize
}

#[track_caller]
fn refused(folder: &TempDir, expected: &str) {
    assert_error(&run(folder.path(), &["-i", "hi"]), 2, expected);
}

fn single(folder: &TempDir) -> PathBuf {
    folder.path().join("model.safetensors")
}

#[test]
fn whole_folders_run() {
    for name in ["qwen2-f32-shards", "llama-awq-32", "bitnet-bitlinear"] {
        let folder = copy(name);
        let output = run(folder.path(), &["-i", "hi", "-n", "3", "--greedy", "--ids"]);
        assert_success(&output);
        let ids = text(&output.stdout);
        assert_eq!(ids.split_whitespace().count(), 3, "{name}: {ids}");
        // A template, and the folder's name where the model has none.
        assert!(text(&output.stderr).contains("prompt ids: "), "{name}");
    }
}

#[test]
fn missing_files_are_named() {
    let folder = copy("qwen2-f32-shards");
    let shard = "model-00002-of-00004.safetensors";
    std::fs::remove_file(folder.path().join(shard)).expect("removed");
    refused(&folder, shard);

    let folder = copy("llama-bf16");
    std::fs::remove_file(single(&folder)).expect("removed");
    refused(&folder, "model.safetensors");
    let folder = copy("llama-bf16");
    std::fs::remove_file(folder.path().join("config.json")).expect("removed");
    refused(&folder, "config.json");
    let folder = copy("llama-bf16");
    std::fs::remove_file(folder.path().join("tokenizer.json")).expect("removed");
    refused(&folder, "tokenizer.json is missing");
}

#[test]
fn shards_that_contradict_each_other_are_refused() {
    // One shard takes the place of another: what the index puts there is not in it.
    let folder = copy("qwen2-f32-shards");
    let [first, second] = [1, 2].map(|i| {
        folder
            .path()
            .join(format!("model-0000{i}-of-00004.safetensors"))
    });
    std::fs::copy(&first, &second).expect("copied");
    refused(
        &folder,
        "is in `model-00001-of-00004.safetensors` and in `model-00002-of-00004.safetensors`",
    );

    let folder = copy("qwen2-f32-shards");
    edit(&folder, "model.safetensors.index.json", |text| {
        text.replacen("\"model.norm.weight\"", "\"model.norn.weight\"", 1)
    });
    refused(&folder, "tensor `model.norn.weight`: is not in");
    let folder = copy("qwen2-f32-shards");
    edit(&folder, "model.safetensors.index.json", |text| {
        text.replace("model-00001-of", "../model-00001-of")
    });
    refused(&folder, "is not a file name");
    let folder = copy("qwen2-f32-shards");
    std::fs::remove_file(folder.path().join("model.safetensors.index.json")).expect("removed");
    refused(&folder, "4 safetensors files");
}

#[test]
fn tensors_that_cannot_be_are_named() {
    let norm = "model.layers.0.input_layernorm.weight";
    let folder = copy("qwen3-f32");
    rewrite(&single(&folder), |header, data| {
        let at = offset(header, "model.layers.1.mlp.up_proj.weight");
        data[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    refused(
        &folder,
        "tensor `model.layers.1.mlp.up_proj.weight`: value 0 of row 0 is NaN",
    );
    let folder = copy("qwen3-f32");
    rewrite(&single(&folder), |header, data| {
        let at = offset(header, norm) + 8;
        data[at..at + 4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    });
    refused(
        &folder,
        "tensor `model.layers.0.input_layernorm.weight`: value 2 is inf",
    );

    // Scales of packed matrices: f16, f16, bf16.
    for (name, scales, bits, expected) in [
        (
            "llama-awq-32",
            "q_proj.scales",
            0x7e00u16,
            "q_proj.scales`: scale 0 is NaN",
        ),
        (
            "llama-gptq-v2",
            "q_proj.scales",
            0x7c00,
            "q_proj.weight`: scale 0 is inf",
        ),
        (
            "bitnet-bitlinear",
            "q_proj.weight_scale",
            0x7fc0,
            "q_proj.weight_scale`: NaN",
        ),
    ] {
        let folder = copy(name);
        rewrite(&single(&folder), |header, data| {
            let at = offset(header, &format!("model.layers.0.self_attn.{scales}"));
            data[at..at + 2].copy_from_slice(&bits.to_le_bytes());
        });
        refused(&folder, expected);
    }

    let folder = copy("qwen3-f32");
    rewrite(&single(&folder), |header, _| {
        *header = header.replace("model.layers.1.input_layernorm.weight", norm);
    });
    refused(
        &folder,
        "tensor `model.layers.0.input_layernorm.weight`: named twice in the file",
    );
    let folder = copy("qwen3-f32");
    rewrite(&single(&folder), |header, _| {
        *header = header.replace("\"F32\"", "\"F33\"")
    });
    refused(&folder, "has unknown type `F33`");
    let folder = copy("qwen3-f32");
    rewrite(&single(&folder), |header, _| {
        *header = header.replace("\"F32\"", "\"I32\"")
    });
    refused(&folder, "type I32 cannot be used");
    let folder = copy("qwen3-f32");
    rewrite(&single(&folder), |_, data| data.truncate(data.len() / 2));
    refused(&folder, "reach past the end of the file");
    let folder = copy("qwen3-f32");
    rewrite(&single(&folder), |header, _| {
        *header = header.replace("q_norm", "q_nrom")
    });
    refused(
        &folder,
        "tensor `model.layers.0.self_attn.q_norm.weight` is missing",
    );
    let folder = copy("qwen3-f32");
    rewrite(&single(&folder), |header, _| header.truncate(100));
    refused(&folder, "safetensors header");
}

#[test]
fn configurations_that_do_not_fit_name_the_key() {
    for (key, value, expected) in [
        ("hidden_size", 96.into(), "shape"),
        ("num_hidden_layers", 3.into(), "model.layers.2."),
        (
            "num_hidden_layers",
            1.into(),
            "is no part of this architecture",
        ),
        ("vocab_size", 300.into(), "vocab_size"),
        (
            "intermediate_size",
            161.into(),
            "`intermediate_size`: 161 is not a multiple of 32",
        ),
        ("num_key_value_heads", 3.into(), "num_key_value_heads"),
        ("rms_norm_eps", 0.into(), "rms_norm_eps"),
        (
            "rms_norm_eps",
            serde_json::Value::Null,
            "`rms_norm_eps` is missing",
        ),
        ("hidden_size", "wide".into(), "`hidden_size` is a string"),
        (
            "model_type",
            "gpt-17".into(),
            "unknown architecture `gpt-17`",
        ),
        (
            "hidden_act",
            "gelu".into(),
            "`hidden_act`: `gelu` is not supported: silu is",
        ),
        ("sliding_window", 16.into(), "sliding_window"),
        (
            "rope_parameters.rope_type",
            "yarn".into(),
            "`yarn` is not supported",
        ),
        (
            "rope_parameters.factor",
            0.into(),
            "`rope_parameters.factor`",
        ),
        (
            "rope_parameters.high_freq_factor",
            1.into(),
            "high_freq_factor",
        ),
    ] {
        let folder = copy("llama3-f16");
        set(&folder, key, value);
        refused(&folder, expected);
    }
}

#[test]
fn packings_that_are_not_read_are_refused() {
    for (key, value, expected) in [
        (
            "quant_method",
            "fp8".into(),
            "quant_method`: `fp8` is not supported",
        ),
        ("bits", 3.into(), "bits`: 3 is not supported"),
        ("group_size", 0.into(), "group_size`: 0 is not supported"),
        ("group_size", 48.into(), "group_size`: 48"),
        ("group_size", 64.into(), "shape"),
        ("checkpoint_format", "marlin".into(), "checkpoint_format"),
    ] {
        let folder = copy("llama-gptq-v2");
        set(&folder, &format!("quantization_config.{key}"), value);
        refused(&folder, expected);
    }
    // Columns in order of activation.
    let folder = copy("llama-gptq-v2");
    rewrite(&single(&folder), |header, data| {
        let at = offset(header, "model.layers.0.self_attn.k_proj.g_idx");
        data[at..at + 4].copy_from_slice(&1u32.to_le_bytes());
    });
    refused(&folder, "desc_act");
    let folder = copy("llama-gptq-v2");
    rewrite(&single(&folder), |header, _| {
        *header = header.replace(
            "layers.1.mlp.up_proj.qzeros",
            "layers.1.mlp.up_proj.qzeroes",
        );
    });
    refused(
        &folder,
        "tensor `model.layers.1.mlp.up_proj.qzeros` is missing",
    );
    let folder = copy("bitnet-autobitlinear");
    set(&folder, "quantization_config.use_rms_norm", true.into());
    refused(&folder, "use_rms_norm");
}

#[test]
fn layers_left_out_of_the_packing_are_honoured_or_refused() {
    let key = "quantization_config.modules_to_not_convert";
    for (name, packed) in [
        ("llama-awq-32", "model.layers.1.mlp.down_proj"),
        ("bitnet-bitlinear", "mlp.up_proj"),
        ("bitnet-online", "q_proj"),
    ] {
        let folder = copy(name);
        set(&folder, key, serde_json::json!(["lm_head", "embed_tokens"]));
        assert_success(&run(folder.path(), &["-i", "hi", "-n", "1"]));
        set(&folder, key, serde_json::json!(["lm_head", packed]));
        refused(&folder, &format!("{key}`: `{packed}` names `model."));
        set(&folder, key, serde_json::json!("lm_head"));
        refused(&folder, key);
    }
}

#[test]
fn columns_sorted_by_activation_are_told_by_their_index() {
    let folder = copy("llama-gptq-128");
    set(&folder, "quantization_config.desc_act", true.into());
    // Sorted or not: the index says that the groups are in order.
    assert_success(&run(folder.path(), &["-i", "hi", "-n", "1"]));
    rewrite(&single(&folder), |header, _| {
        *header = header.replacen("q_proj.g_idx", "q_proj.h_idx", 1);
    });
    refused(&folder, "desc_act");
}
