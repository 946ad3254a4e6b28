//! What the `edgellm` binary prints and writes.

mod support;

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use support::{BINARY, assert_error, assert_success, fixture, model, run, text};

#[test]
fn no_tokens_asked_is_no_tokens_printed() {
    let file = fixture(&model("tiny"));
    let output = run(&file.path, &["-n", "0", "-i", "hi"]);
    assert_success(&output);
    assert!(output.stdout.is_empty());
    assert!(
        text(&output.stderr).contains("prompt "),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_full_context_ends_the_text_and_says_so() {
    let file = fixture(&model("tiny"));
    let output = run(
        &file.path,
        &[
            "-i",
            "abcd",
            "--raw",
            "--greedy",
            "--context",
            "8",
            "--json",
        ],
    );
    assert_success(&output);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["prompt_tokens"], 4);
    // The last token of a full context is chosen, not appended.
    let ids = report["ids"].as_array().expect("a list").len();
    assert!(
        ids == 5 || text(&output.stderr).contains("first token"),
        "{ids} ids"
    );
    if ids == 5 {
        assert!(text(&output.stderr).contains("context of 8 tokens is full"));
    }
}

#[test]
fn json_holds_what_is_documented_and_text_matches_it() {
    let file = fixture(&model("tiny-qwen2"));
    let flags = ["-i", "hello there", "-n", "12", "--seed", "5"];
    let streamed = run(&file.path, &flags);
    assert_success(&streamed);
    let output = run(&file.path, &[&flags[..], &["--json"]].concat());
    assert_success(&output);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let keys: Vec<&str> = report
        .as_object()
        .expect("an object")
        .keys()
        .map(String::as_str)
        .collect();
    let mut expected = vec![
        "text",
        "ids",
        "prompt_tokens",
        "prompt_tokens_per_second",
        "decode_tokens_per_second",
        "ttft_ms",
        "backend",
        "tier",
        "model",
    ];
    expected.sort_unstable();
    let mut sorted = keys.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, expected);
    assert_eq!(report["backend"], "cpu");
    assert!(report["ttft_ms"].as_f64().expect("a number") > 0.0);
    assert!(
        report["prompt_tokens_per_second"]
            .as_f64()
            .expect("a number")
            > 0.0
    );
    let said = report["text"].as_str().expect("text");
    assert_eq!(
        text(&streamed.stdout).trim_end_matches('\n'),
        said.trim_end_matches('\n')
    );

    let ids = run(&file.path, &[&flags[..], &["--ids"]].concat());
    let printed: Vec<u64> = text(&ids.stdout)
        .split_whitespace()
        .map(|w| w.parse().expect("an id"))
        .collect();
    let reported: Vec<u64> = report["ids"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|v| v.as_u64().expect("an id"))
        .collect();
    assert_eq!(printed, reported);
    assert!(
        text(&ids.stderr).starts_with("prompt ids: 257 "),
        "{}",
        text(&ids.stderr)
    );
}

#[test]
fn the_seed_repeats_a_run_and_greedy_needs_none() {
    let file = fixture(&model("tiny-qwen2"));
    let ids = |flags: &[&str]| {
        let output = run(
            &file.path,
            &[&["-i", "hello", "-n", "24", "--ids"], flags].concat(),
        );
        assert_success(&output);
        text(&output.stdout)
    };
    let hot = ["--temperature", "2", "--seed"];
    let seeded = |seed| ids(&[&hot[..], &[seed]].concat());
    assert_eq!(seeded("1"), seeded("1"));
    assert_ne!(seeded("1"), seeded("2"));
    assert_eq!(ids(&["--greedy"]), ids(&["--greedy"]));
    assert_eq!(ids(&["--greedy"]), ids(&["--temperature", "0"]));
}

#[test]
fn the_prompt_can_come_from_standard_input() {
    let file = fixture(&model("tiny"));
    let with_stdin = |bytes: &[u8]| {
        let mut child = Command::new(BINARY)
            .args([
                "run",
                "--backend",
                "cpu",
                "--raw",
                "--ids",
                "-n",
                "0",
                "-i",
                "-",
                "-m",
            ])
            .arg(&file.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        child
            .stdin
            .take()
            .expect("piped")
            .write_all(bytes)
            .expect("written");
        child.wait_with_output().expect("ended")
    };
    let output = with_stdin(b"ab\n");
    assert_success(&output);
    assert!(
        text(&output.stderr).starts_with("prompt ids: 97 98\n"),
        "{}",
        text(&output.stderr)
    );
    assert_error(&with_stdin(b"\n"), 2, "empty");
    assert_error(&with_stdin(b"a\xFFb"), 2, "UTF-8");
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let file = fixture(&model("tiny"));
    let mut child = Command::new(BINARY)
        .args([
            "run",
            "--backend",
            "cpu",
            "--raw",
            "-i",
            "abc",
            "-n",
            "200",
            "--seed",
            "1",
            "-m",
        ])
        .arg(&file.path)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    drop(child.stdout.take());
    let status = child.wait().expect("ended");
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .expect("piped")
        .read_to_string(&mut stderr)
        .expect("read");
    assert!(status.success(), "{status}: {stderr}");
    assert!(
        !stderr.contains("panicked") && !stderr.contains("error"),
        "{stderr}"
    );
}

#[test]
fn synthesized_files_are_reproducible_and_appear_whole() {
    let folder = tempfile::tempdir().expect("a folder");
    let make = |name: &str, file: &str, seed: &str| {
        let path = folder.path().join(file);
        let output = Command::new(BINARY)
            .args(["synthesize", name])
            .arg(&path)
            .args(["--seed", seed])
            .output()
            .expect("started");
        (output, path)
    };
    let (output, first) = make("tiny", "a.gguf", "7");
    assert_success(&output);
    let (_, second) = make("tiny", "b.gguf", "7");
    let (_, third) = make("tiny", "c.gguf", "8");
    let read = |path: &Path| std::fs::read(path).expect("read");
    assert_eq!(read(&first), read(&second));
    assert_ne!(read(&first), read(&third));
    assert_success(&run(&first, &["-i", "hi", "-n", "2"]));

    assert_error(&make("no-such", "d.gguf", "1").0, 2, "unknown shape");
    assert_error(
        &make("tiny", "no/such/folder.gguf", "1").0,
        2,
        "cannot write",
    );
    let left: Vec<_> = std::fs::read_dir(folder.path())
        .expect("listed")
        .flatten()
        .collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[test]
fn logits_have_a_row_for_each_token_and_agree_with_greedy() {
    let file = fixture(&model("tiny"));
    let text_file = file.folder.path().join("text.txt");
    std::fs::write(&text_file, "hello there").expect("written");
    let out = file.folder.path().join("logits.f32");
    let logits = |flags: &[&str]| {
        Command::new(BINARY)
            .args(["logits", "--backend", "cpu", "-m"])
            .arg(&file.path)
            .args(flags)
            .arg("--out")
            .arg(&out)
            .output()
            .expect("started")
    };
    let text_path = text_file.to_str().expect("UTF-8");
    assert_success(&logits(&["--text-file", text_path]));
    let bytes = std::fs::read(&out).expect("read");
    let values: Vec<f32> = bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect();
    let rows: Vec<&[f32]> = values.chunks_exact(320).collect();

    let greedy = run(
        &file.path,
        &["--raw", "--ids", "--greedy", "-n", "1", "-i", "hello there"],
    );
    assert_success(&greedy);
    let prompt = text(&greedy.stderr);
    let prompt = prompt
        .lines()
        .next()
        .expect("ids")
        .trim_start_matches("prompt ids: ");
    assert_eq!(rows.len(), prompt.split(' ').count());
    let last = rows.last().expect("a row");
    let best = (0..last.len())
        .max_by(|a, b| last[*a].total_cmp(&last[*b]))
        .expect("a token");
    assert_eq!(text(&greedy.stdout).trim(), best.to_string());

    let ids_file = file.folder.path().join("ids.txt");
    std::fs::write(&ids_file, prompt).expect("written");
    let ids_path = ids_file.to_str().expect("UTF-8");
    assert_success(&logits(&["--ids-file", ids_path]));
    assert_eq!(std::fs::read(&out).expect("read"), bytes);

    std::fs::write(&ids_file, "1 2 320").expect("written");
    assert_error(&logits(&["--ids-file", ids_path]), 2, "320");
    std::fs::write(&ids_file, "").expect("written");
    assert_error(&logits(&["--ids-file", ids_path]), 2, "empty");
    assert_error(&logits(&["--text-file", "/no/such/file"]), 2, "cannot read");
}

#[test]
fn help_teaches_with_examples() {
    for command in [
        &["--help"][..],
        &["run", "--help"],
        &["synthesize", "--help"],
        &["logits", "--help"],
        &["quantize", "--help"],
        &["info", "--help"],
        &["perplexity", "--help"],
        &["eval", "--help"],
        &["pull", "--help"],
    ] {
        let output = Command::new(BINARY)
            .args(command)
            .output()
            .expect("started");
        assert_success(&output);
        assert!(text(&output.stdout).contains("Examples:\n  edgellm "));
    }
}

#[test]
fn a_trace_is_of_kernels() {
    let file = fixture(&model("tiny"));
    let output = run(&file.path, &["-i", "hi", "--trace"]);
    assert_error(&output, 2, "--trace shows the kernels of the CUDA backend");
}

#[test]
fn sampling_flags_are_checked_and_obeyed() {
    let file = fixture(&model("tiny"));
    for (flags, what) in [
        (["--top-k", "0"], "top-k"),
        (["--top-k", "65"], "top-k"),
        (["--min-p", "1.5"], "min-p"),
        (["--repetition-penalty", "0"], "repetition penalty"),
        (["--temperature", "nan"], "temperature"),
    ] {
        let output = run(&file.path, &[&["-i", "hi"], &flags[..]].concat());
        assert_error(&output, 2, what);
    }
    let ids = |flags: &[&str]| {
        let flags = [&["-i", "hello", "-n", "40", "--ids", "--seed", "3"], flags].concat();
        let output = run(&file.path, &flags);
        assert_success(&output);
        text(&output.stdout)
    };
    let plain = ids(&["--temperature", "1.5"]);
    assert_eq!(ids(&["--temperature", "1.5"]), plain);
    assert_ne!(
        ids(&["--temperature", "1.5", "--repetition-penalty", "3"]),
        plain
    );
    // Only the most likely token is left by either.
    let best = ids(&["--temperature", "1.5", "--top-k", "1"]);
    assert_eq!(ids(&["--temperature", "1.5", "--min-p", "1"]), best);
    assert_ne!(best, plain);
}
