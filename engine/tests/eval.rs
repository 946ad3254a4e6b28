//! `edgellm eval` on a dictionary made up here.

mod support;

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use support::{BINARY, assert_error, assert_success, fixture, model, text};

fn eval(model: &Path, flags: &[&str]) -> Output {
    Command::new(BINARY)
        .args(["eval", "--backend", "cpu", "--threads", "2", "-m"])
        .arg(model)
        .args(flags)
        .output()
        .expect("started")
}

/// Entries that refer to each other.
fn dictionary() -> String {
    let names = [
        "alpha", "bravo", "carol", "delta", "echoes", "foxes", "golfer", "hotels", "indian",
        "juliet",
    ];
    let mut text = String::new();
    for (i, name) in names.iter().enumerate() {
        let other = names[(i + 3) % names.len()];
        text += &format!(
            "   :{name}: n.\n\n   What number {i} of a long list of made up words is good for, which is nothing \
             at all.\n\n   Whoever meets one in the long evenings of winter soon wants to have another, and so \
             calls for a {{{other}}} as well.\n\n"
        );
    }
    text
}

#[test]
fn answers_are_counted_and_compared() {
    let file = fixture(&model("tiny"));
    let dictionary_path = file.folder.path().join("dictionary.txt");
    std::fs::write(&dictionary_path, dictionary()).expect("written");
    let dictionary_path = dictionary_path.to_str().expect("UTF-8");
    let flags = ["--text", dictionary_path, "--questions", "8"];
    let itself = file.path.to_str().expect("UTF-8");
    let output = eval(
        &file.path,
        &[&flags[..], &["--json", "--reference", itself]].concat(),
    );
    assert_success(&output);
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["questions"], 8);
    assert_eq!(report["answers"].as_array().expect("a list").len(), 8);
    // A model agrees with itself, whatever it knows.
    assert_eq!(report["reference"]["agreement"]["mean"], 1.0);
    assert_eq!(report["reference"]["answers"], report["answers"]);
    assert_eq!(report["reference"]["accuracy"], report["accuracy"]);
    let mean = |key: &str| report[key]["mean"].as_f64().expect("a number");
    let parts = (mean("definitions") + mean("references")) / 2.0;
    assert!((mean("accuracy") - parts).abs() < 1e-12);

    let output = eval(&file.path, &flags);
    assert_success(&output);
    assert!(
        text(&output.stdout).contains("right"),
        "{}",
        text(&output.stdout)
    );
}

#[test]
fn what_cannot_be_asked_is_an_input_error() {
    let file = fixture(&model("tiny"));
    let path = file.folder.path().join("text.txt");
    std::fs::write(&path, "no dictionary").expect("written");
    let flags = ["--text", path.to_str().expect("UTF-8")];
    assert_error(&eval(&file.path, &flags), 2, "dictionary");
    std::fs::write(&path, dictionary()).expect("written");
    let flags = [&flags[..], &["--questions", "8", "--context", "10"]].concat();
    assert_error(&eval(&file.path, &flags), 2, "longest question");
    assert_error(
        &eval(&file.path, &["--text", "/no/such/file"]),
        2,
        "cannot read",
    );
}
