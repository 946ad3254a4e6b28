//! The `edgellm` binary on input that it cannot use: one-line errors, exit codes, never a panic,
//! never more memory than the file is worth.

mod support;

use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use engine::chat::{ChatTemplate, Message};
use engine::tokenizer::Tokenizer;
use models::file::gguf::Gguf;
use support::{
    BINARY, Fixture, Lcg, assert_error, assert_success, edited, fixture, model, patched_tensor,
    run, text,
};

#[test]
fn truncated_files_are_input_errors() {
    let whole = model("tiny");
    let mut random = Lcg(1);
    let mut lengths: Vec<usize> = (0..50).map(|_| random.below(whole.len() - 64)).collect();
    lengths.extend([0, 1, 3, 4, 8, 23, 24]);
    let file = fixture(&whole);
    for length in lengths {
        std::fs::write(&file.path, &whole[..length]).expect("written");
        assert_error(&run(&file.path, &["-i", "hi"]), 2, "model.gguf");
    }
}

#[test]
fn damaged_files_are_input_errors() {
    let whole = model("tiny");
    let mut wrong_magic = whole.clone();
    wrong_magic[..4].copy_from_slice(b"GGML");
    let mut wrong_version = whole.clone();
    wrong_version[4..8].copy_from_slice(&99u32.to_le_bytes());
    let mut many_tensors = whole.clone();
    many_tensors[8..16].copy_from_slice(&(1u64 << 60).to_le_bytes());
    let mut many_entries = whole.clone();
    many_entries[16..24].copy_from_slice(&(1u64 << 60).to_le_bytes());
    let cases: [(&str, Vec<u8>); 9] = [
        ("not a GGUF file", wrong_magic),
        ("version 99", wrong_version),
        ("model.gguf", many_tensors),
        ("model.gguf", many_entries),
        // Dimensions are 8 bytes each, then 4 of type, then the offset.
        (
            "token_embd.weight",
            patched_tensor(&whole, "token_embd.weight", 8, 1 << 60),
        ),
        (
            "token_embd.weight",
            patched_tensor(&whole, "token_embd.weight", 0, 1 << 60),
        ),
        (
            "past the end",
            patched_tensor(&whole, "token_embd.weight", 20, 1 << 40),
        ),
        (
            "token_embd.weight",
            patched_tensor(&whole, "token_embd.weight", 20, u64::MAX - 31),
        ),
        (
            "not a GGUF file",
            b"#!/bin/sh\necho this is no model\n".repeat(10),
        ),
    ];
    for (expected, bytes) in cases {
        let file = fixture(&bytes);
        assert_error(&run(&file.path, &["-i", "hi"]), 2, expected);
    }
}

#[test]
fn files_that_do_not_fit_the_engine_are_input_errors() {
    let whole = model("tiny");
    let replaced = |key: &'static str, value: &'static str| {
        edited(&whole, move |k, writer| {
            let hit = k == key;
            if hit {
                writer.string(key, value);
            }
            hit
        })
    };
    let tokens = |keep: usize| {
        edited(&whole, move |k, writer| {
            let hit = k == "tokenizer.ggml.tokens";
            if hit {
                let tokens: Vec<String> = (0..keep).map(|i| format!("t{i}")).collect();
                writer.strings(k, &tokens);
            }
            hit
        })
    };
    let merges = |merge: &'static str| {
        edited(&whole, move |k, writer| {
            let hit = k == "tokenizer.ggml.merges";
            if hit {
                writer.strings(k, &[merge]);
            }
            hit
        })
    };
    let eos = edited(&whole, |k, writer| {
        let hit = k == "tokenizer.ggml.eos_token_id";
        if hit {
            writer.u32(k, 4_000_000);
        }
        hit
    });
    let cases: [(&str, Vec<u8>); 10] = [
        (
            "unknown architecture",
            replaced("general.architecture", "mamba\n\u{1b}[31m"),
        ),
        (
            "is not supported",
            replaced("tokenizer.ggml.pre", "no-such-pre"),
        ),
        (
            "is not supported",
            replaced("tokenizer.ggml.model", "llama"),
        ),
        (
            "chat template",
            replaced("tokenizer.chat_template", "{% for %}"),
        ),
        ("tokenizer.ggml.tokens", tokens(10)),
        ("tokenizer.ggml.tokens", tokens(400)),
        ("vocabulary mismatch", eos),
        ("tokenizer.ggml.merges", merges("Ġt qqqq")),
        ("tokenizer.ggml.merges", merges("nospace")),
        ("tokenizer.ggml.merges", merges("<filler300> <filler300>")),
    ];
    for (expected, bytes) in cases {
        let file = fixture(&bytes);
        assert_error(&run(&file.path, &["-i", "hi"]), 2, expected);
    }
}

#[test]
fn paths_that_are_no_model_are_input_errors() {
    let file = fixture(b"");
    assert_error(&run(&file.path, &["-i", "hi"]), 2, "empty");
    assert_error(&run(file.folder.path(), &["-i", "hi"]), 2, "directory");
    let missing = file.folder.path().join("missing\n.gguf");
    assert_error(&run(&missing, &["-i", "hi"]), 2, "missing");
}

#[test]
fn without_a_model_the_error_says_how_to_get_one() {
    let home = tempfile::tempdir().expect("a folder");
    // Copied, so that the folders above the binary are no checkout either.
    let binary = home.path().join("edgellm");
    std::fs::copy(BINARY, &binary).expect("copied");
    let mut command = Command::new(&binary);
    command
        .args(["run", "-i", "hi"])
        .current_dir(home.path())
        .env("HOME", home.path())
        .env_remove("XDG_CACHE_HOME");
    let output = loop {
        match command.output() {
            // A process that another test is just starting still holds the copy open.
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => {
                std::thread::sleep(Duration::from_millis(10));
            }
            output => break output.expect("started"),
        }
    };
    assert_error(&output, 2, "edgellm pull");
}

#[test]
fn prompts_that_cannot_be_run_are_input_errors() {
    let file = fixture(&model("tiny"));
    let long = "word ".repeat(400);
    assert_error(&run(&file.path, &["-i", ""]), 2, "empty");
    assert_error(&run(&file.path, &["-i", "", "--raw"]), 2, "empty");
    assert_error(&run(&file.path, &["-i", &long]), 2, "the context holds 256");
    assert_error(
        &run(
            &file.path,
            &["-i", "hello there", "--raw", "--context", "4"],
        ),
        2,
        "the context holds 4",
    );
    assert_error(
        &run(&file.path, &["-i", "hi", "--context", "10000"]),
        2,
        "trained for",
    );
    assert_error(
        &run(&file.path, &["-i", "hi", "--temperature=-1"]),
        2,
        "temperature",
    );
    assert_error(
        &run(&file.path, &["-i", "hi", "--temperature", "nan"]),
        2,
        "temperature",
    );
    assert_error(&run(&file.path, &["-i", "hi", "--top-p", "0"]), 2, "top-p");
    assert_error(
        &run(&file.path, &["-i", "hi", "--tier", "sm_75"]),
        2,
        "--tier",
    );
    // Flags that do not parse: clap's own message, several lines.
    for flags in [
        &["-i", "hi", "-n", "-5"][..],
        &["-i", "hi", "--tier", "x"],
        &[],
    ] {
        assert_eq!(run(&file.path, flags).status.code(), Some(2));
    }
}

#[test]
fn cuda_without_a_driver_is_an_error_of_the_machine() {
    if Path::new("/dev/nvidiactl").exists() {
        println!("skipped: this machine has a GPU");
        return;
    }
    let file = fixture(&model("tiny"));
    for flags in [&["--backend", "cuda"][..], &["--tier", "sm_75"]] {
        let output = Command::new(BINARY)
            .args(["run", "-i", "hi", "-m"])
            .arg(&file.path)
            .args(flags)
            .output()
            .expect("started");
        assert_error(&output, 1, "CUDA");
    }
    let output = Command::new(BINARY)
        .args(["run", "-i", "hi", "-n", "1", "-m"])
        .arg(&file.path)
        .output()
        .expect("started");
    assert_success(&output);
    let stderr = text(&output.stderr);
    assert!(
        stderr.contains("cpu") && stderr.contains("CUDA"),
        "{stderr}"
    );
}

#[test]
#[cfg(unix)]
fn memory_follows_the_file_not_its_claims() {
    let whole = model("tiny");
    let huge = fixture(&patched_tensor(&whole, "token_embd.weight", 8, 1 << 60));
    let good = fixture(&whole);
    let limited = |file: &Fixture, flags: &str| {
        // 1 GiB of address space: the binary, its threads and a small model, nothing claimed.
        let script = format!(
            "ulimit -v 1048576; exec '{BINARY}' run --backend cpu --threads 2 -i hi -n 4 {flags} -m '{}'",
            file.path.display()
        );
        Command::new("sh")
            .args(["-c", &script])
            .output()
            .expect("started")
    };
    assert_error(&limited(&huge, ""), 2, "token_embd.weight");
    assert_success(&limited(&good, ""));
    // A context that the metadata allows and the memory does not.
    let endless = fixture(&edited(&whole, |key, writer| {
        let hit = key == "llama.context_length";
        if hit {
            writer.u64(key, (1 << 31) - 1);
        }
        hit
    }));
    assert_success(&limited(&endless, ""));
    assert_error(
        &limited(&endless, "--context 2000000000"),
        1,
        "lower --context",
    );
}

/// Everything between a file's bytes and a runnable model, in this process.
fn load(bytes: &[u8]) -> Result<(), engine::Error> {
    let file = Gguf::parse(bytes)?;
    let recipe = models::arch::recipe(&file)?;
    let tokenizer = Tokenizer::from_gguf(&file, recipe.config.vocab)?;
    let prompt = match file.metadata.string_opt("tokenizer.chat_template")? {
        Some(source) => ChatTemplate::new(source, &tokenizer.bos_text(), &tokenizer.eos_text())?
            .render(&[Message::new("user", "the answer is 42\n🦀")])?,
        None => String::new(),
    };
    tokenizer.decode(&tokenizer.encode(&prompt, true)?);
    for weight in &recipe.weights {
        models::weights::decode(&file, weight)?;
    }
    Ok(())
}

#[test]
fn changed_bytes_never_panic() {
    let whole = model("tiny");
    load(&whole).expect("a whole file loads");
    let head = whole.len()
        - Gguf::parse(&whole)
            .expect("parsed")
            .tensors
            .iter()
            .map(|t| t.data.len())
            .sum::<usize>();
    let mut random = Lcg(2);
    let mut refused = 0;
    for _ in 0..3000 {
        let mut bytes = whole.clone();
        for _ in 0..1 + random.below(3) {
            let at = random.below(head);
            bytes[at] = match random.below(3) {
                0 => random.below(256) as u8,
                1 => bytes[at].wrapping_add(1),
                _ => bytes[at] ^ (1 << random.below(8)),
            };
        }
        if let Err(error) = load(&bytes) {
            refused += 1;
            assert_eq!(error.exit_code(), 2, "{error}");
        }
    }
    // Some changes go into names and texts that nobody checks, most do not.
    assert!(refused > 500, "{refused} of 3000 were refused");
}
