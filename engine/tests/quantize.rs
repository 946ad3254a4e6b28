//! `edgellm quantize` and `edgellm info`: what they write, what they take, what they refuse.

mod support;

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use models::file::Source;
use models::file::gguf::{DType, Gguf};
use models::synthetic::{self, Options};
use support::{BINARY, Fixture, assert_error, assert_success, fixture, model, run, text};

/// `edgellm quantize SRC DST FLAGS`.
fn quantize(source: &Path, target: &Path, flags: &[&str]) -> Output {
    Command::new(BINARY)
        .arg("quantize")
        .args([source, target])
        .args(flags)
        .stdin(Stdio::null())
        .output()
        .expect("started")
}

/// `edgellm info FILE FLAGS --json`.
fn info(file: &Path, flags: &[&str]) -> serde_json::Value {
    let output = Command::new(BINARY)
        .arg("info")
        .arg(file)
        .args(flags)
        .arg("--json")
        .output()
        .expect("started");
    assert_success(&output);
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// A tiny model and a text to calibrate with.
fn tiny(shape: &str) -> Fixture {
    let fixture = fixture(&model(shape));
    let words: String = (0..4000)
        .map(|i| ["the ", "model ", "reads ", "what ", "it is given. "][i * i % 7 % 5])
        .collect();
    std::fs::write(fixture.folder.path().join("text.txt"), words).expect("written");
    fixture
}

/// Logits of a fixed text, all positions.
fn logits(folder: &Path, model: &Path) -> Vec<f32> {
    let (ids, out) = (folder.join("ids.txt"), folder.join("logits.f32"));
    std::fs::write(&ids, "84 104 101 32 109 111 100 101 108").expect("written");
    let output = Command::new(BINARY)
        .args(["logits", "--backend", "cpu", "-m"])
        .arg(model)
        .arg("--ids-file")
        .arg(&ids)
        .arg("--out")
        .arg(&out)
        .output()
        .expect("started");
    assert_success(&output);
    let bytes = std::fs::read(&out).expect("read");
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn every_form_runs_and_stays_near_its_source() {
    for shape in ["tiny", "tiny-qwen2", "tiny-llama3"] {
        let source = tiny(shape);
        let folder = source.folder.path();
        let calibration = folder.join("text.txt");
        let calibration = calibration.to_str().expect("UTF-8");
        let exact = logits(folder, &source.path);
        for (flags, least) in [
            (&["--method", "rtn", "--group", "32"][..], 0.985),
            (&["--group", "64", "--asymmetric"], 0.98),
            (
                &["--bits", "8", "--method", "rtn", "--lm-head", "f16"],
                0.9995,
            ),
            (&["--bits", "ternary", "--method", "rtn"], 0.5),
            (&["--method", "awq", "--calibration", calibration], 0.97),
            (
                &[
                    "--method",
                    "gptq",
                    "--asymmetric",
                    "--calibration",
                    calibration,
                ],
                0.97,
            ),
        ] {
            let target = folder.join("out.edgellm");
            assert_success(&quantize(&source.path, &target, flags));
            let near = cosine(&logits(folder, &target), &exact);
            assert!(near > least, "{shape} {flags:?}: {near}");
            // The tokenizer and the chat template came along.
            let flags = ["-i", "hello there", "-n", "3", "--greedy", "--ids"];
            let (before, after) = (run(&source.path, &flags), run(&target, &flags));
            assert_success(&after);
            let prompt = |output: &Output| text(&output.stderr).lines().next().map(str::to_owned);
            assert_eq!(prompt(&before), prompt(&after));
        }
    }
}

#[test]
fn every_kind_of_source_is_read_and_an_output_table_may_be_int4() {
    let folder = tempfile::tempdir().expect("a folder");
    let target = folder.path().join("out.edgellm");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/hf");
    let int8 = &[
        "--bits",
        "8",
        "--group",
        "32",
        "--method",
        "rtn",
        "--lm-head",
        "f16",
    ][..];
    let ternary = &["--bits", "ternary", "--method", "rtn", "--lm-head", "f16"][..];
    for (source, flags, least) in [
        ("llama-bf16", int8, 0.999),
        ("llama3-f16", int8, 0.999),
        ("qwen2-f32-shards", int8, 0.999),
        ("qwen3-f32", int8, 0.999),
        ("qwen2-awq-128", int8, 0.999),
        ("llama-gptq-v2", int8, 0.999),
        ("bitnet-online", ternary, 0.999),
        ("bitnet-bitlinear", ternary, 0.999),
    ] {
        let source = golden.join(source);
        assert_success(&quantize(&source, &target, flags));
        let near = cosine(
            &logits(folder.path(), &target),
            &logits(folder.path(), &source),
        );
        assert!(near > least, "{}: {near}", source.display());
        // A file of the quantiser is a source, too.
        let again = folder.path().join("again.edgellm");
        assert_success(&quantize(&target, &again, flags));
        let (first, second) = (info(&target, &[]), info(&again, &[]));
        assert_eq!(first["kinds"], second["kinds"]);
        let before = info(&source, &[]);
        assert_eq!(before["weights"], first["weights"]);
        assert!(before["weight_bytes"].as_u64() > Some(0), "{before}");
    }

    let untied = tiny("tiny-qwen2");
    let flags = ["--group", "32", "--method", "rtn", "--lm-head", "int4"];
    assert_success(&quantize(&untied.path, &target, &flags));
    let near = cosine(
        &logits(folder.path(), &target),
        &logits(folder.path(), &untied.path),
    );
    assert!(near > 0.98, "{near}");
}

#[test]
fn the_same_flags_give_the_same_bytes_whatever_the_threads() {
    let source = tiny("tiny-qwen2");
    let folder = source.folder.path();
    let calibration = folder.join("text.txt");
    let calibration = calibration.to_str().expect("UTF-8");
    for method in ["rtn", "mse", "awq", "gptq"] {
        let made = |name: &str, threads: &str| {
            let target = folder.join(name);
            let flags = [
                "--method",
                method,
                "--calibration",
                calibration,
                "--threads",
                threads,
            ];
            assert_success(&quantize(&source.path, &target, &flags));
            std::fs::read(&target).expect("read")
        };
        assert!(made("a", "1") == made("b", "3"), "{method} differs");
    }
}

#[test]
fn info_agrees_about_source_and_result() {
    let source = tiny("tiny-qwen2");
    let target = source.folder.path().join("out.edgellm");
    assert_success(&quantize(
        &source.path,
        &target,
        &["--group", "32", "--method", "rtn"],
    ));
    let (before, after) = (
        info(&source.path, &[]),
        info(&target, &["--context", "100"]),
    );
    assert_eq!(before["weights"], after["weights"]);
    let mut config = before["config"].clone();
    config["name"] = after["config"]["name"].clone();
    assert_eq!(config, after["config"]);
    // 2 layers, 2 heads of 16, keys and values, 2 bytes, 100 tokens.
    assert_eq!(after["cache_bytes"], 2 * 2 * 16 * 2 * 2 * 100);
    let linear = |report: &serde_json::Value| {
        let kinds = report["kinds"].as_array().expect("a list").clone();
        kinds
            .into_iter()
            .find(|kind| kind["name"] == "linear layers")
            .expect("there")
    };
    // Tiles of 16 x 128 weights in a layer: 8 of q, k and v, 4 of the output, 20 of gate and up, 4 x 2 of
    // down; each 1,024 bytes of levels and a scale for 32 weights. They are loaded as they are stored.
    let tiles = 2 * (8 + 4 + 20 + 4 * 2);
    assert_eq!(linear(&after)["file_bytes"], tiles * (1024 + 2 * 16 * 4));
    assert_eq!(linear(&after)["loaded_bytes"], linear(&after)["file_bytes"]);
    // Q4_0's 18 bytes a block, and nothing that fills up 64 or 160 columns.
    assert!(linear(&before)["file_bytes"].as_u64() < linear(&after)["file_bytes"].as_u64());

    let shown = Command::new(BINARY)
        .arg("info")
        .arg(&target)
        .output()
        .expect("started");
    assert_success(&shown);
    let shown = text(&shown.stdout);
    for expected in [
        "qwen2, 2 layers of width 64",
        "linear layers",
        "8.57",
        "context of 256",
    ] {
        assert!(shown.contains(expected), "`{expected}` is not in {shown}");
    }
    assert_error(
        &Command::new(BINARY)
            .args(["info", "--context", "257"])
            .arg(&target)
            .output()
            .expect("started"),
        2,
        "257",
    );
}

#[test]
fn input_that_cannot_be_used_is_one_line_and_leaves_no_file() {
    let source = tiny("tiny");
    let folder = source.folder.path();
    let target = folder.join("out.edgellm");
    let refuse = |source: &Path, flags: &[&str], expected: &str| {
        assert_error(&quantize(source, &target, flags), 2, expected);
        assert!(!target.exists());
    };
    refuse(&source.path, &["--lm-head", "int4"], "same table");
    refuse(&source.path, &["--method", "gptq", "--bits", "8"], "4 bits");
    refuse(
        &source.path,
        &["--method", "awq", "--calibration", "/no/such/text"],
        "cannot read",
    );
    let short = folder.join("short.txt");
    std::fs::write(&short, "too short").expect("written");
    let short = short.to_str().expect("UTF-8");
    refuse(
        &source.path,
        &["--method", "gptq", "--calibration", short],
        "calibration text",
    );
    refuse(Path::new("/no/such/model"), &[], "no/such/model");

    // A scale that is NaN: the tensor, row and column are named.
    let mut bad = model("tiny");
    let data = Gguf::parse(&bad).expect("parsed");
    let tensor = data.tensor("blk.1.ffn_up.weight").expect("there");
    let at = tensor.data.as_ptr() as usize - bad.as_ptr() as usize;
    bad[at..at + 2].copy_from_slice(&0x7e00u16.to_le_bytes());
    let bad = fixture(&bad);
    let calibration = folder.join("text.txt");
    let calibration = calibration.to_str().expect("UTF-8");
    for flags in [
        &["--method", "rtn"][..],
        &["--method", "gptq", "--calibration", calibration],
    ] {
        refuse(&bad.path, flags, "up_proj.weight`: row 0, column 0 is NaN");
    }

    // Quantised files that were cut short, or whose metadata lies.
    assert_success(&quantize(&source.path, &target, &[]));
    let whole = std::fs::read(&target).expect("read");
    for length in [100, 5000, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&target, &whole[..length]).expect("written");
        assert_error(&run(&target, &["-i", "hi"]), 2, "out.edgellm");
    }
    for (from, to, expected) in [
        (r#"\"layers\":2"#, r#"\"layers\":9"#, "layers.2"),
        (r#"\"heads\":4"#, r#"\"heads\":0"#, "heads"),
        (r#"\"width\":64"#, r#"\"width\":96"#, "embed_tokens"),
        (
            r#"\"architecture\":\"llama\""#,
            r#"\"architecture\":\"lIama\""#,
            "lIama",
        ),
    ] {
        let mut bytes = whole.clone();
        let at = bytes
            .windows(from.len())
            .position(|w| w == from.as_bytes())
            .expect("there");
        bytes.splice(at..at + from.len(), to.bytes());
        std::fs::write(&target, bytes).expect("written");
        assert_error(&run(&target, &["-i", "hi"]), 2, expected);
    }
}

/// A process that is looked at while it runs.
#[cfg(target_os = "linux")]
fn started(source: &Path, target: &Path, flags: &[&str]) -> std::process::Child {
    Command::new(BINARY)
        .arg("quantize")
        .args([source, target])
        .args(flags)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started")
}

/// A model large enough to take some time: 134 million weights.
#[cfg(target_os = "linux")]
fn large() -> Fixture {
    let shape = synthetic::shape("smollm2-135m").expect("known");
    let options = Options {
        linear: DType::Q8_0,
        ..Options::default()
    };
    fixture(&synthetic::to_vec(shape, &options).expect("made"))
}

#[test]
#[cfg(target_os = "linux")]
fn memory_does_not_grow_with_the_model_and_ctrl_c_leaves_nothing() {
    let source = large();
    let folder = source.folder.path();
    let target = folder.join("out.edgellm");
    let file = std::fs::metadata(&source.path).expect("there").len();
    // Q8_0: 34 bytes for 32 weights.
    let largest = 49_152 * 576 * 34 / 32;

    let mut child = started(
        &source.path,
        &target,
        &["--method", "rtn", "--threads", "2"],
    );
    let status = format!("/proc/{}/status", child.id());
    let mut peak_kilobytes = 0u64;
    while child.try_wait().expect("a child").is_none() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let value = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok());
        peak_kilobytes = peak_kilobytes.max(value.unwrap_or(0));
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(child.wait().expect("a child").success());
    assert!(target.exists());
    let peak = 1024 * peak_kilobytes;
    // Far below the bound of half a gigabyte beside the largest tensor, and below the model itself.
    let bound = largest * 3 / 2 + 50_000_000;
    assert!(
        peak > 10_000_000 && peak < bound,
        "{peak} bytes at most, {bound} allowed"
    );
    assert!(bound < file, "{file} bytes are too few to tell");
    std::fs::remove_file(&target).expect("removed");

    let mut child = started(
        &source.path,
        &target,
        &["--method", "mse", "--threads", "1"],
    );
    let begun = Instant::now();
    let parts = || {
        let names = std::fs::read_dir(folder)
            .expect("listed")
            .flatten()
            .map(|e| e.file_name());
        names
            .filter(|name| name.to_string_lossy().contains(".part"))
            .count()
    };
    while parts() == 0 && begun.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(parts(), 1);
    let killed = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .expect("started");
    assert!(killed.success());
    assert_eq!(child.wait().expect("a child").code(), Some(130));
    assert_eq!(parts(), 0);
    assert!(!target.exists());
}
