//! `edgellm bench`: what it measures and how it is told.

mod support;

use std::process::{Command, Output};

use support::{BINARY, assert_error, assert_success, fixture, model, text};

/// The bench of a shape on the CPU.
fn bench_of(shape: &str, flags: &[&str]) -> Output {
    Command::new(BINARY)
        .args(["bench", "--backend", "cpu", "--threads", "2"])
        .args(["--synthetic", shape])
        .args(flags)
        .output()
        .expect("started")
}

fn bench(flags: &[&str]) -> Output {
    bench_of("tiny", flags)
}

fn json(flags: &[&str]) -> serde_json::Value {
    let output = bench(&[flags, &["--json"]].concat());
    assert_success(&output);
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

#[test]
fn the_object_has_speeds_latencies_and_the_floor() {
    let report = json(&["-p", "16", "-n", "24", "-d", "8", "--repeat", "3"]);
    for (field, value) in [
        ("prompt_tokens", 16),
        ("decode_tokens", 24),
        ("depth", 8),
        ("repeat", 3),
    ] {
        assert_eq!(report[field], value, "{field}");
    }
    assert_eq!(report["backend"], "cpu");
    let number = |field: &str| report[field].as_f64().expect(field);
    for field in [
        "prompt_tokens_per_second",
        "decode_tokens_per_second",
        "first_tenth_tokens_per_second",
        "last_tenth_tokens_per_second",
        "read_gb_per_second",
        "load_seconds",
    ] {
        assert!(number(field) > 0.0, "{field}");
    }
    let latency = |name: &str| report["latency_ms"][name].as_f64().expect(name);
    assert!(latency("p50") > 0.0 && latency("p50") <= latency("p95"));
    assert!(latency("p95") <= latency("p99") && latency("p99") <= latency("max"));
    // The mean rate lies among those of the slowest and the fastest token.
    assert!(number("decode_tokens_per_second") >= 1e3 / latency("max"));
    let floor = number("read_gb_per_second") * 1e9 / number("bytes_per_token");
    assert!((number("floor_tokens_per_second") / floor - 1.0).abs() < 1e-9);
    let share = number("decode_tokens_per_second") / floor;
    assert!((number("share_of_floor") / share - 1.0).abs() < 1e-9);
    // A CPU has no counter that is asked, and no kernels to tell apart.
    assert!(report["joules_per_token"].is_null());
    assert!(report.get("kernels").is_none());
}

#[test]
fn what_is_not_measured_is_null() {
    let report = json(&["-p", "0", "-n", "4", "--repeat", "1"]);
    assert!(report["prompt_tokens_per_second"].is_null());
    assert!(report["decode_tokens_per_second"].is_number());
    let report = json(&["-p", "4", "-n", "0", "--repeat", "1"]);
    assert!(report["prompt_tokens_per_second"].is_number());
    for field in [
        "decode_tokens_per_second",
        "latency_ms",
        "ids_hash",
        "share_of_floor",
    ] {
        assert!(report[field].is_null(), "{field}");
    }
}

#[test]
fn the_same_tokens_are_generated_each_time() {
    let hash =
        |flags: &[&str]| json(&[flags, &["-p", "0", "--repeat", "2"]].concat())["ids_hash"].clone();
    let first = hash(&["-n", "20"]);
    assert!(first.is_string());
    assert_eq!(hash(&["-n", "20"]), first);
    assert_ne!(hash(&["-n", "21"]), first);
}

#[test]
fn lines_name_model_backend_and_speeds() {
    let output = bench(&["-p", "8", "-n", "8", "--repeat", "1", "--linear", "q8_0"]);
    assert_success(&output);
    let lines = text(&output.stdout);
    for part in [
        "tiny (random weights) | cpu",
        "prompt   8 tokens: ",
        "decode   8 tokens: ",
        "floor ",
        "latency ",
    ] {
        assert!(lines.contains(part), "`{part}` is not in: {lines}");
    }
}

/// The shape says 256.
#[test]
fn random_weights_are_trained_for_any_context() {
    let report = json(&["-p", "4", "-n", "2", "-d", "300", "--repeat", "1"]);
    assert_eq!(report["depth"], 300);
    assert!(report["decode_tokens_per_second"].as_f64().expect("a rate") > 0.0);
}

#[test]
fn what_does_not_fit_the_model_is_refused() {
    let file = fixture(&model("tiny"));
    let of_file = Command::new(BINARY)
        .args(["bench", "--backend", "cpu", "-d", "300", "-m"])
        .arg(&file.path)
        .output()
        .expect("started");
    assert_error(&of_file, 2, "the model was trained for 256");
    assert_error(
        &bench(&["-p", "0", "-n", "64", "--context", "32"]),
        2,
        "--context has 32",
    );
    assert_error(&bench_of("huge", &[]), 2, "huge");
}
