//! Small model files for tests, whole and damaged, and the program that reads them.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use models::file::gguf::{Gguf, Writer};
use models::synthetic::{self, Options};
use tempfile::TempDir;

/// The program.
pub const BINARY: &str = env!("CARGO_BIN_EXE_edgellm");

/// A folder with a file in it.
pub struct Fixture {
    /// Removed with the fixture.
    pub folder: TempDir,
    /// The file.
    pub path: PathBuf,
}

/// A fresh folder that holds `bytes` as `model.gguf`.
pub fn fixture(bytes: &[u8]) -> Fixture {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).expect("written");
    Fixture { folder, path }
}

/// `edgellm run` on the CPU with two threads.
pub fn run(model: &Path, flags: &[&str]) -> Output {
    Command::new(BINARY)
        .args(["run", "--backend", "cpu", "--threads", "2", "-m"])
        .arg(model)
        .args(flags)
        .stdin(Stdio::null())
        .output()
        .expect("started")
}

/// Output as text.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// The command failed with `code` and one line that contains `expected`.
#[track_caller]
pub fn assert_error(output: &Output, code: i32, expected: &str) {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "stderr: {stderr}");
    assert!(stderr.starts_with("error: "), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
    assert!(
        stderr.contains(expected),
        "`{expected}` is not in: {stderr}"
    );
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert!(output.stdout.is_empty());
}

/// The command succeeded.
#[track_caller]
pub fn assert_success(output: &Output) {
    assert!(output.status.success(), "{}", text(&output.stderr));
}

/// A random-weight model file of a named shape.
pub fn model(shape: &str) -> Vec<u8> {
    let shape = synthetic::shape(shape).expect("a known shape");
    synthetic::to_vec(shape, &Options::default()).expect("written")
}

/// The same file with its metadata changed: `edit` writes an entry of its own and returns true, or
/// returns false to keep the entry of the file.
pub fn edited(bytes: &[u8], mut edit: impl FnMut(&str, &mut Writer) -> bool) -> Vec<u8> {
    let file = Gguf::parse(bytes).expect("a whole file");
    let mut writer = Writer::new();
    for (key, value) in file.metadata.iter() {
        if !edit(key, &mut writer) {
            writer.value(key, value);
        }
    }
    for tensor in &file.tensors {
        writer
            .tensor(tensor.name, &tensor.dims, tensor.dtype)
            .expect("declared");
    }
    let mut data = writer.begin(Vec::new()).expect("begun");
    for tensor in &file.tensors {
        data.write(tensor.data).expect("written");
    }
    data.finish().expect("finished")
}

/// The same file with bytes of the table entry of tensor `name` overwritten: `at` counts from the
/// first dimension.
pub fn patched_tensor(bytes: &[u8], name: &str, at: usize, value: u64) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut key = (name.len() as u64).to_le_bytes().to_vec();
    key.extend_from_slice(name.as_bytes());
    let start = bytes
        .windows(key.len())
        .position(|window| window == key)
        .expect("the tensor is in the table");
    let at = start + key.len() + 4 + at;
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    bytes
}

/// Numbers that look random and are the same every time.
pub struct Lcg(pub u64);

impl Lcg {
    /// The next number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}
