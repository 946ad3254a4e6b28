//! `cargo xtask test`: everything that must hold, in one command.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use clap::Args as ClapArgs;
use cuda_builder::setup::{aarch64 as arm, install_ptxas};

use crate::progress::Shown;
use crate::{Error, check, model, ptx, setup, workspace};

/// Sets everything up, fetches the default model, then runs formatting, invariants, kernel resources,
/// every test of the workspace, and clippy. Works with or without a GPU.
///
/// The last line reads `N passed, N failed, N skipped`. A skipped test is one that printed
/// `skipped: REASON`, because the machine lacks what it needs, or one marked `#[ignore]`.
#[derive(Debug, ClapArgs)]
pub struct Args {}

const CLIPPY: [&[&str]; 3] = [
    &[
        "clippy",
        "--workspace",
        "--all-targets",
        "--all-features",
        "--",
        "-D",
        "warnings",
    ],
    // The build for machines without a GPU.
    &[
        "clippy",
        "--package",
        "engine",
        "--all-targets",
        "--no-default-features",
        "--",
        "-D",
        "warnings",
    ],
    // That of `cargo xtask bench`, which hands the program its kernels.
    &[
        "clippy",
        "--package",
        "benches",
        "--no-default-features",
        "--",
        "-D",
        "warnings",
    ],
];

/// Runs the task.
pub fn run(_: &Args) -> Result<(), Error> {
    let core = setup::kernels()?;
    eprintln!("core for GPU code: {core}");
    let model = model::path_of(None)?;
    eprintln!("default model in {}", model.display());

    let mut steps = Steps::default();
    steps.run("format", || {
        workspace::run_cargo(&["fmt", "--all", "--check"])
    });
    steps.run("invariants", || check::run(&check::Args::default()));
    steps.run("kernel resources", kernel_resources);
    let mut report = Report::default();
    steps.run("tests", || {
        tests(workspace::cargo(&ALL_TESTS), &mut report)?;
        report.verdict(0)
    });
    let failed_before = report.failed;
    report.cargo_failed = false;
    steps.run("kernels on AArch64", || {
        aarch64(&mut report)?;
        report.verdict(failed_before)
    });
    steps.run("clippy", || {
        CLIPPY.into_iter().try_for_each(workspace::run_cargo)
    });

    print!(
        "\n{}{}{}",
        report.reasons(),
        steps.summary(),
        report.totals()
    );
    match steps.failed() {
        0 => Ok(()),
        1 => Err(Error::failed("one step failed")),
        count => Err(Error::failed(format!("{count} steps failed"))),
    }
}

fn kernel_resources() -> Result<(), Error> {
    let progress = Shown::new();
    let ptxas = install_ptxas(&progress)?;
    ptx::judge(&ptx::figures(&ptxas, &progress)?)
}

/// CPUs that the kernels' tests run on: one with `dotprod` and one without.
const AARCH64_CPUS: [&str; 2] = ["max", "cortex-a57"];

/// Runs the tests of the CPU kernels for AArch64 under an emulator. Where it cannot be fetched they count as
/// skipped.
fn aarch64(report: &mut Report) -> Result<(), Error> {
    let qemu = match arm::install(&Shown::new()) {
        Ok(qemu) => qemu,
        Err(why) => {
            report.skip(format!("no AArch64 ({why})"));
            return Ok(());
        }
    };
    for cpu in AARCH64_CPUS {
        eprintln!("AArch64, {cpu}");
        let mut cargo = workspace::cargo(&[
            "test",
            "--package",
            "cpu-kernels",
            "--lib",
            "--target",
            arm::TARGET,
            "--",
            "--show-output",
        ]);
        cargo
            .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER", "rust-lld")
            .env(
                "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_RUNNER",
                format!("{} -cpu {cpu}", qemu.display()),
            );
        tests(cargo, report)?;
    }
    Ok(())
}

const ALL_TESTS: [&str; 6] = [
    "test",
    "--workspace",
    "--all-features",
    "--no-fail-fast",
    "--",
    "--show-output",
];

/// Runs tests, counts them and passes on what cargo prints.
fn tests(mut cargo: Command, report: &mut Report) -> Result<(), Error> {
    let mut cargo = cargo
        .stdout(Stdio::piped())
        .spawn()
        .map_err(Error::io("cannot run", "cargo"))?;
    let stdout = cargo.stdout.take().expect("stdout is piped");
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.map_err(Error::io("cannot read the output of", "cargo test"))?;
        let line = String::from_utf8_lossy(&line);
        if report.take(&line) {
            println!("{line}");
        }
    }
    report.finish();
    let status = cargo
        .wait()
        .map_err(Error::io("cannot wait for", "cargo test"))?;
    report.cargo_failed |= !status.success();
    Ok(())
}

/// The tests of all binaries, read from what libtest prints.
#[derive(Debug, Default)]
struct Report {
    passed: u64,
    failed: u64,
    ignored: u64,
    /// Reasons of the tests that said they were skipped, with their number.
    skipped: BTreeMap<String, u64>,
    /// Of these, what libtest did not count.
    not_tried: u64,
    /// Whether `cargo test` failed: a test that does not compile is counted nowhere else.
    cargo_failed: bool,
    section: Section,
    /// A binary has said `running` and not yet `test result`.
    binary_runs: bool,
}

/// Where in a binary's output the reader is.
#[derive(Debug, Default, PartialEq, Eq)]
enum Section {
    #[default]
    Results,
    /// The output of passed tests; within the output of a test, whether it was counted as skipped.
    Successes { counted: bool },
}

impl Report {
    /// Reads a line; returns whether it is worth showing.
    fn take(&mut self, line: &str) -> bool {
        if line.starts_with("running ") && (line.ends_with(" tests") || line.ends_with(" test")) {
            self.finish();
            self.binary_runs = true;
        } else if line == "successes:" {
            self.section = Section::Successes { counted: false };
        } else if line == "failures:" {
            self.section = Section::Results;
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.section = Section::Results;
            self.binary_runs = false;
            self.passed += count(result, " passed");
            self.failed += count(result, " failed");
            self.ignored += count(result, " ignored");
        } else if let Section::Successes { counted } = &mut self.section {
            if line.starts_with("---- ") && line.ends_with(" ----") {
                *counted = false;
            } else if let Some(reason) = line.strip_prefix("skipped:")
                && !*counted
            {
                *counted = true;
                *self.skipped.entry(reason.trim().to_owned()).or_default() += 1;
            }
        }
        self.section == Section::Results
    }

    /// Counts a binary that died before its result as one failure.
    fn finish(&mut self) {
        self.failed += u64::from(self.binary_runs);
        self.binary_runs = false;
        self.section = Section::Results;
    }

    /// Counts what could not be tried at all.
    fn skip(&mut self, reason: String) {
        self.not_tried += 1;
        *self.skipped.entry(reason).or_default() += 1;
    }

    fn said_skipped(&self) -> u64 {
        self.skipped.values().sum()
    }

    /// What to say of the tests since `failed_before` had failed.
    fn verdict(&self, failed_before: u64) -> Result<(), Error> {
        match (self.failed - failed_before, self.cargo_failed) {
            (0, false) if self.passed == 0 => Err(Error::failed("no test ran")),
            (0, false) => Ok(()),
            (0, true) => Err(Error::failed("`cargo test` failed: see above")),
            (count, _) => Err(Error::failed(format!("{count} failed"))),
        }
    }

    /// Why tests were skipped, a line a reason.
    fn reasons(&self) -> String {
        let mut text = String::new();
        for (reason, count) in &self.skipped {
            writeln!(text, "skipped: {reason} ({count})").expect("a String takes all");
        }
        if self.ignored > 0 {
            writeln!(text, "skipped: marked #[ignore] ({})", self.ignored)
                .expect("a String takes all");
        }
        text
    }

    fn totals(&self) -> String {
        // libtest counts a test that returned early as passed.
        let skipped = self.said_skipped();
        let passed = self.passed.saturating_sub(skipped - self.not_tried);
        format!(
            "{passed} passed, {} failed, {} skipped\n",
            self.failed,
            skipped + self.ignored
        )
    }
}

/// The number in front of `unit` in `ok. 29 passed; 0 failed; 1 ignored; …`.
fn count(result: &str, unit: &str) -> u64 {
    result
        .split_once(unit)
        .and_then(|(before, _)| before.rsplit([' ', ';']).next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

/// The steps of a run, their times and their faults.
#[derive(Debug, Default)]
struct Steps(Vec<(&'static str, f32, Result<(), Error>)>);

impl Steps {
    fn run(&mut self, name: &'static str, step: impl FnOnce() -> Result<(), Error>) {
        eprintln!("== {name}");
        let start = Instant::now();
        let result = step();
        if let Err(error) = &result {
            eprintln!("{error}");
        }
        self.0.push((name, start.elapsed().as_secs_f32(), result));
    }

    fn failed(&self) -> usize {
        self.0
            .iter()
            .filter(|(_, _, result)| result.is_err())
            .count()
    }

    fn summary(&self) -> String {
        let mut text = String::new();
        for (name, seconds, result) in &self.0 {
            let verdict = match result {
                Ok(()) => "ok".to_owned(),
                Err(error) => {
                    format!(
                        "FAILED: {}",
                        error.to_string().lines().next().unwrap_or_default()
                    )
                }
            };
            writeln!(text, "{name:<17} {seconds:>6.1} s  {verdict}").expect("a String takes all");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
running 3 tests
test a ... ok
test gpu_a ... ok
test c ... ignored

successes:

---- a stdout ----
running on a machine
skippedness: none

---- gpu_a stdout ----
skipped: no GPU
skipped: no GPU

successes:
    a
    gpu_a

test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s


running 2 tests
test d ... FAILED
test e ... ok

successes:

successes:
    e

failures:

---- d stdout ----
thread 'd' panicked at src/lib.rs:1:1

failures:
    d

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    fn report(output: &str) -> (Report, String) {
        let mut report = Report {
            cargo_failed: false,
            ..Report::default()
        };
        let shown: Vec<&str> = output.lines().filter(|line| report.take(line)).collect();
        report.finish();
        (report, shown.join("\n"))
    }

    #[test]
    fn results_are_summed_and_skips_counted_once_a_test() {
        let (report, shown) = report(OUTPUT);
        assert_eq!(report.totals(), "2 passed, 1 failed, 2 skipped\n");
        assert_eq!(
            report.reasons(),
            "skipped: no GPU (1)\nskipped: marked #[ignore] (1)\n"
        );
        assert!(report.verdict(0).is_err());
        assert!(
            shown.contains("panicked at") && shown.contains("test a ... ok"),
            "{shown}"
        );
        assert!(
            !shown.contains("running on a machine"),
            "output of passed tests is left out: {shown}"
        );
    }

    #[test]
    fn a_binary_that_dies_is_a_failure() {
        let (report, _) = report("running 5 tests\ntest a ... ok\nrunning 1 test\n");
        assert_eq!(report.totals(), "0 passed, 2 failed, 0 skipped\n");
    }

    #[test]
    fn a_run_that_does_not_compile_or_tests_nothing_fails() {
        let (mut report, _) = report("");
        assert!(report.verdict(0).is_err(), "no test ran");
        report.passed = 1;
        assert!(report.verdict(0).is_ok());
        report.cargo_failed = true;
        assert!(report.verdict(0).is_err());
    }

    #[test]
    fn steps_keep_their_verdicts() {
        let mut steps = Steps::default();
        steps.run("good", || Ok(()));
        steps.run("bad", || Err(Error::failed("first\nsecond")));
        assert_eq!(steps.failed(), 1);
        let summary = steps.summary();
        assert!(
            summary.contains("FAILED: first\n") && !summary.contains("second"),
            "{summary}"
        );
    }
}
