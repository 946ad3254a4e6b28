//! What a model on the CPU takes of memory: its file, its cache and little more, while it loads too.

#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use engine::backend::Backend;
use engine::backend::cpu::CpuBackend;
use engine::sampler::Sampling;
use engine::weights::ModelFile;

/// Tokens of context.
const CONTEXT: usize = 512;
/// What may come on top of the file and the cache: activations, tables, the program itself.
const ROOM_BYTES: usize = 60_000_000;

/// A line of this process's status, in bytes.
fn status(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kilobytes = line.and_then(|line| line.trim_start_matches(':').trim().split(' ').next());
    1024 * kilobytes.unwrap().parse::<usize>().unwrap()
}

/// Runs the model at `path` and holds what it takes, and took at most, against the bound.
fn check(path: &Path) {
    // The most that was ever resident counts from here on.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let file_bytes = std::fs::metadata(path)
        .unwrap_or_else(|_| panic!("{}: run `cargo xtask model fetch`", path.display()))
        .len() as usize;
    let mapped = ModelFile::open(path).unwrap();
    let file = mapped.parse().unwrap();
    let model = mapped.load(&file, mapped.recipe(&file).unwrap()).unwrap();
    let config = model.recipe.config.clone();
    let mut backend = CpuBackend::new(Arc::new(model), CONTEXT).unwrap();
    mapped.release();
    backend.prefill(&[7; 100]).unwrap();
    for _ in 0..20 {
        let token = backend.choose(&Sampling::GREEDY).unwrap();
        backend.decode(token).unwrap();
    }
    let cache_bytes = CONTEXT * 4 * config.layers * config.kv_heads * config.head_dim;
    let bound = file_bytes + cache_bytes + ROOM_BYTES;
    let (now, most) = (status("VmRSS"), status("VmHWM"));
    let mb = |bytes: usize| bytes as f64 / 1e6;
    println!(
        "{}: file {:.1} MB, cache {:.1} MB, resident {:.1} MB, at most {:.1} MB",
        path.display(),
        mb(file_bytes),
        mb(cache_bytes),
        mb(now),
        mb(most)
    );
    assert!(
        now <= bound && most <= bound,
        "the bound is {:.1} MB",
        mb(bound)
    );
}

// The only test of this file: another one's memory would count.
#[test]
fn a_model_takes_its_file_its_cache_and_sixty_megabytes() {
    if let Some(path) = std::env::var_os("EDGELLM_MODEL") {
        return check(Path::new(&path));
    }
    let catalog = models::catalog::Catalog::builtin().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/files");
    let path = folder.join(&catalog.default_model().file);
    check(&path);
    // A file of the quantiser is used in place until its matrices are laid out.
    let folder = tempfile::tempdir().unwrap();
    let container = folder.path().join("model.edgellm");
    let quantized = Command::new(env!("CARGO_BIN_EXE_edgellm"))
        .arg("quantize")
        .args([&path, &container])
        .status();
    assert!(quantized.unwrap().success());
    check(&container);
}
