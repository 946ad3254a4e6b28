//! `cargo xtask bench --cpu`: the CPU kernels on this machine.

use std::process::Command;

use crate::{Error, workspace};

/// Checks and times the linear kernels, those whose name or shape contains `filter`, and appends the figures to
/// benches/results/<cpu>.jsonl.
pub(super) fn run(filter: Option<&str>) -> Result<(), Error> {
    let results = workspace::root().join("benches/results");
    let date = output("date", &["-u", "+%F"]).unwrap_or_default();
    let (results, revision) = (results.to_string_lossy(), revision());
    let mut arguments = vec![
        "bench",
        "--package",
        "cpu-kernels",
        "--bench",
        "linear",
        "--",
        "--results",
        &results,
        "--date",
        &date,
        "--revision",
        &revision,
    ];
    arguments.extend(filter);
    workspace::run_cargo(&arguments)
}

/// What git calls the sources, `+` behind it where they are changed; empty without git.
fn revision() -> String {
    let changed = output(
        "git",
        &["status", "--porcelain", "--", "cpu-kernels", "models"],
    );
    match output("git", &["rev-parse", "--short", "HEAD"]) {
        Some(name) if changed.is_some_and(|files| files.is_empty()) => name,
        Some(name) => name + "+",
        None => String::new(),
    }
}

/// What a program prints in the workspace; `None` if it fails.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(workspace::root())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    output.status.success().then_some(text)
}
