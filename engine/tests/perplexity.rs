//! `edgellm perplexity` against its definition, computed here from the logits of every position.

mod support;

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use support::{BINARY, Fixture, assert_error, assert_success, edited, fixture, model, run, text};

/// Tokens of a window in these tests.
const WINDOW: usize = 16;
/// Vocabulary of the tiny model: 256 bytes and special tokens.
const VOCAB: usize = 320;

fn edgellm(command: &str, model: &Path, flags: &[&str]) -> Output {
    Command::new(BINARY)
        .args([command, "--backend", "cpu", "--threads", "2", "-m"])
        .arg(model)
        .args(flags)
        .output()
        .expect("started")
}

fn perplexity(model: &Path, flags: &[&str]) -> Output {
    let window = WINDOW.to_string();
    edgellm(
        "perplexity",
        model,
        &[flags, &["--context", &window]].concat(),
    )
}

fn report(output: &Output) -> Value {
    assert_success(output);
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// A tiny model with a text of some windows beside it.
fn setting(shape: &str) -> (Fixture, String) {
    let file = fixture(&model(shape));
    let path = file.folder.path().join("text.txt");
    let words = "The quick brown fox jumps over 13 lazy dogs; then it sleeps. ";
    std::fs::write(&path, words.repeat(3)).expect("written");
    let path = path.to_str().expect("UTF-8").to_owned();
    (file, path)
}

/// Log-probabilities `(window positions, V)` of one window, from `edgellm logits`.
fn log_probs(file: &Fixture, model: &Path, ids: &[u32]) -> Vec<Vec<f64>> {
    let list: Vec<String> = ids.iter().map(u32::to_string).collect();
    let (ids, out) = (
        file.folder.path().join("ids"),
        file.folder.path().join("out"),
    );
    std::fs::write(&ids, list.join(" ")).expect("written");
    let flags = ["--ids-file", ids.to_str().expect("UTF-8"), "--out"];
    let flags = [&flags[..], &[out.to_str().expect("UTF-8")]].concat();
    assert_success(&edgellm("logits", model, &flags));
    let bytes = std::fs::read(&out).expect("read");
    let (words, _) = bytes.as_chunks::<4>();
    let logits: Vec<f64> = words
        .iter()
        .map(|b| f32::from_le_bytes(*b).into())
        .collect();
    logits
        .chunks(VOCAB)
        .map(|row| {
            let sum: f64 = row.iter().map(|logit| logit.exp()).sum();
            row.iter().map(|logit| logit - sum.ln()).collect()
        })
        .collect()
}

/// The first `count` windows of a text. A model that wants a BOS gets it in front of the text and as
/// the first token of each window.
fn windows(model: &Path, text: &str, count: usize) -> Vec<Vec<u32>> {
    let text = std::fs::read_to_string(text).expect("read");
    let ids = |input: &str| -> Vec<u32> {
        let output = run(model, &["--raw", "--ids", "-n", "0", "-i", input]);
        assert_success(&output);
        let stderr = support::text(&output.stderr);
        let ids = stderr
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("prompt ids: "));
        let ids = ids.expect("ids").split(' ');
        ids.map(|id| id.parse().expect("an id")).collect()
    };
    let (ids, letter) = (ids(&text), ids("q"));
    let bos = (letter.len() > 1).then_some(letter[0]);
    let windows = ids.chunks_exact(WINDOW).take(count);
    windows
        .map(|window| {
            let mut window = window.to_vec();
            window[0] = bos.unwrap_or(window[0]);
            window
        })
        .collect()
}

fn near(have: &Value, want: f64) {
    let have = have.as_f64().expect("a number");
    assert!(
        (have - want).abs() <= 1e-4 * want.abs().max(1e-3),
        "{have} is not {want}"
    );
}

#[test]
fn figures_are_those_of_the_definitions() {
    for (shape, adds_bos) in [("tiny", false), ("tiny-llama3", true)] {
        let (file, text) = setting(shape);
        let bytes = std::fs::read(&file.path).expect("read");
        let bytes = edited(&bytes, |key, writer| {
            let edits = key == "tokenizer.ggml.add_bos_token";
            if edits {
                writer.bool(key, adds_bos);
            }
            edits
        });
        std::fs::write(&file.path, bytes).expect("written");
        let other = fixture(&edgellm_synthesized(&file, shape, "9"));
        let have = report(&perplexity(
            &file.path,
            &[
                "--text",
                &text,
                "--json",
                "--chunks",
                "3",
                "--kl-reference",
                other.path.to_str().expect("UTF-8"),
            ],
        ));
        let (mut loss, mut other_loss, mut kls, mut same) = (0.0, 0.0, Vec::new(), 0);
        for ids in windows(&file.path, &text, 3) {
            let q = log_probs(&file, &file.path, &ids);
            let p = log_probs(&file, &other.path, &ids);
            for at in WINDOW / 2..WINDOW - 1 {
                let next = ids[at + 1] as usize;
                loss -= q[at][next];
                other_loss -= p[at][next];
                let pairs = p[at].iter().zip(&q[at]);
                kls.push(pairs.map(|(p, q)| p.exp() * (p - q)).sum::<f64>());
                let top = |row: &[f64]| {
                    (0..VOCAB).max_by(|a, b| row[*a].total_cmp(&row[*b]).then(b.cmp(a)))
                };
                same += usize::from(top(&p[at]) == top(&q[at]));
            }
        }
        let count = kls.len() as f64;
        assert_eq!(have["tokens"], kls.len());
        assert_eq!(have["windows"], 3);
        near(&have["perplexity"]["mean"], (loss / count).exp());
        let reference = &have["reference"];
        near(&reference["perplexity"]["mean"], (other_loss / count).exp());
        near(&reference["kl"]["mean"], kls.iter().sum::<f64>() / count);
        near(
            &reference["kl_max"],
            kls.iter().copied().fold(0.0, f64::max),
        );
        near(&reference["top1"]["mean"], same as f64 / count);
    }
}

/// The same shape with other random weights.
fn edgellm_synthesized(file: &Fixture, shape: &str, seed: &str) -> Vec<u8> {
    let path = file.folder.path().join("other.gguf");
    let output = Command::new(BINARY)
        .args(["synthesize", shape])
        .arg(&path)
        .args(["--seed", seed])
        .output()
        .expect("started");
    assert_success(&output);
    std::fs::read(path).expect("read")
}

#[test]
fn saved_logits_stand_in_for_the_model_and_its_text() {
    let (file, text) = setting("tiny");
    let other = fixture(&edgellm_synthesized(&file, "tiny", "9"));
    let saved = file.folder.path().join("saved.logits");
    let saved = saved.to_str().expect("UTF-8");
    let made = perplexity(
        &other.path,
        &["--text", &text, "--save-logits", saved, "--json"],
    );
    let made = report(&made);

    let itself = report(&perplexity(
        &other.path,
        &["--kl-reference", saved, "--json"],
    ));
    assert_eq!(itself["perplexity"], made["perplexity"]);
    assert!(itself["reference"]["kl_max"].as_f64().expect("a number") < 1e-5);
    assert_eq!(itself["reference"]["top1"]["mean"], 1.0);

    let beside = other.path.to_str().expect("UTF-8");
    let flags = ["--text", &text, "--json", "--chunks", "2", "--kl-reference"];
    let direct = report(&perplexity(&file.path, &[&flags[..], &[beside]].concat()));
    let by_file = report(&perplexity(&file.path, &[&flags[..], &[saved]].concat()));
    assert_eq!(by_file["windows"], 2);
    let kl = |report: &Value| {
        report["reference"]["kl"]["mean"]
            .as_f64()
            .expect("a number")
    };
    let (direct, by_file) = (kl(&direct), kl(&by_file));
    assert!(
        by_file <= direct && by_file > 0.99 * direct,
        "{by_file} {direct}"
    );

    std::fs::write(&text, "quite another text, and long enough for a window").expect("written");
    assert_error(
        &perplexity(&file.path, &["--text", &text, "--kl-reference", saved]),
        2,
        "not of",
    );
    let mut bytes = std::fs::read(saved).expect("read");
    bytes[100] ^= 1;
    std::fs::write(saved, bytes).expect("written");
    assert_error(
        &perplexity(&file.path, &["--kl-reference", saved]),
        2,
        "checksum",
    );
}

#[test]
fn what_cannot_be_measured_is_an_input_error() {
    let (file, text) = setting("tiny");
    let refused = |flags: &[&str], expected: &str| {
        assert_error(&perplexity(&file.path, flags), 2, expected);
    };
    refused(&["--text", "/no/such/file"], "cannot read");
    refused(
        &["--text", &text, "--kl-reference", "/no/such/model"],
        "/no/such/model",
    );
    std::fs::write(&text, "short").expect("written");
    refused(&["--text", &text], "one window takes 16");
    let flags = ["--text", &text, "--context", "1000000"];
    assert_error(&edgellm("perplexity", &file.path, &flags), 2, "trained for");
    assert!(text_of_failed_save(&file, &text).is_empty());
}

/// What a command that fails leaves of its `--save-logits`.
fn text_of_failed_save(file: &Fixture, text: &str) -> Vec<String> {
    let out = file.folder.path().join("left.logits");
    let flags = [
        "--text",
        text,
        "--save-logits",
        out.to_str().expect("UTF-8"),
    ];
    assert!(!perplexity(&file.path, &flags).status.success());
    let files = std::fs::read_dir(file.folder.path())
        .expect("listed")
        .flatten();
    files
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("left"))
        .collect()
}

#[test]
fn the_table_says_what_was_measured() {
    let (file, path) = setting("tiny");
    let output = perplexity(&file.path, &["--text", &path, "--chunks", "3"]);
    assert_success(&output);
    let table = text(&output.stdout);
    assert!(
        table.contains("scored tokens") && table.contains("perplexity"),
        "{table}"
    );
    assert!(text(&output.stderr).contains("3 windows of 16 tokens"));
}
