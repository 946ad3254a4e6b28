//! A folder as Hugging Face has it: `config.json`, safetensors files, tokenizer, chat template.

use std::io::Read;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use models::file::hugging_face::{CONFIG_FILE, HuggingFace, INDEX_FILE, Index, SINGLE_FILE};
use serde_json::Value;

use super::map;
use crate::Error;
use crate::error::shown;
use crate::tokenizer::{Specials, Tokenizer};

/// File of the tokenizer.
const TOKENIZER_FILE: &str = "tokenizer.json";
/// File of its special tokens and, in most folders, of the chat template.
const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
/// File of the ids that end an answer.
const GENERATION_FILE: &str = "generation_config.json";
/// File of the chat template, which comes before that of [`TOKENIZER_CONFIG_FILE`].
const TEMPLATE_FILE: &str = "chat_template.jinja";
/// Largest text file that is read.
const TEXT_LIMIT_BYTES: u64 = 256 << 20;

/// The files of a folder; the safetensors files mapped, the others read.
#[derive(Debug)]
pub(super) struct Folder {
    config: String,
    index: Option<Index>,
    /// File names and what they hold.
    shards: Vec<(String, Mmap)>,
    tokenizer: Option<String>,
    tokenizer_config: Value,
    generation: Value,
    template: Option<String>,
}

impl Folder {
    /// Reads and maps what is in the folder. Errors are reasons, without the folder's name.
    pub fn open(path: &Path) -> Result<Folder, String> {
        let config = text(path, CONFIG_FILE)?.ok_or_else(|| {
            format!(
                "it is a directory without {CONFIG_FILE}: name a GGUF file or a Hugging Face folder"
            )
        })?;
        let index = text(path, INDEX_FILE)?
            .map(|text| Index::parse(&text).map_err(|e| e.to_string()))
            .transpose()?;
        let names: Vec<String> = match &index {
            Some(index) => index.shards().into_iter().map(str::to_owned).collect(),
            None => vec![single_file(path)?],
        };
        let missing: Vec<&String> = names.iter().filter(|n| !path.join(n).exists()).collect();
        if let Some(first) = missing.first() {
            return Err(format!(
                "{} of its {} files are missing, the first is {}: fetch the folder again",
                missing.len(),
                names.len(),
                shown(first)
            ));
        }
        let shards = names
            .into_iter()
            .map(|name| match map(&path.join(&name)) {
                Ok(map) => Ok((name, map)),
                Err(why) => Err(format!("{}: {why}", shown(&name))),
            })
            .collect::<Result<_, _>>()?;
        let mut tokenizer_config = json(path, TOKENIZER_CONFIG_FILE)?;
        let template = match text(path, TEMPLATE_FILE)? {
            Some(template) => Some(template),
            None => template_of(tokenizer_config["chat_template"].take()),
        };
        Ok(Folder {
            config,
            index,
            shards,
            tokenizer: text(path, TOKENIZER_FILE)?,
            tokenizer_config,
            generation: json(path, GENERATION_FILE)?,
            template,
        })
    }

    pub fn parse(&self) -> Result<HuggingFace<'_>, models::Error> {
        let shards: Vec<(&str, &[u8])> = self
            .shards
            .iter()
            .map(|(name, map)| (name.as_str(), &map[..]))
            .collect();
        HuggingFace::parse(&self.config, self.index.as_ref(), &shards)
    }

    pub fn tokenizer(&self, vocab: usize) -> Result<Tokenizer, Error> {
        let json = self.tokenizer.as_deref().ok_or_else(|| {
            Error::Input(format!(
                "{TOKENIZER_FILE} is missing: the tokenizer is read from it"
            ))
        })?;
        let specials = Specials {
            bos: special(&self.tokenizer_config["bos_token"]),
            eos: special(&self.tokenizer_config["eos_token"]),
            stops: ids(&self.generation["eos_token_id"]),
        };
        Tokenizer::from_json(json, &specials, vocab)
    }

    /// The maps of the safetensors files.
    pub fn maps(&self) -> impl Iterator<Item = &Mmap> {
        self.shards.iter().map(|(_, map)| map)
    }

    pub fn chat_template(&self) -> Option<&str> {
        self.template.as_deref()
    }
}

/// The only safetensors file of a folder without an index.
fn single_file(folder: &Path) -> Result<String, String> {
    let entries = std::fs::read_dir(folder).map_err(|e| e.to_string())?;
    let mut found: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| {
            PathBuf::from(name)
                .extension()
                .is_some_and(|e| e == "safetensors")
        })
        .collect();
    found.sort_unstable();
    if found.iter().any(|name| name == SINGLE_FILE) {
        return Ok(SINGLE_FILE.to_owned());
    }
    match &found[..] {
        [only] => Ok(only.clone()),
        [] => Err(format!("it holds neither {INDEX_FILE} nor {SINGLE_FILE}")),
        [first, ..] => Err(format!(
            "it holds {} safetensors files, {} and others, but no {INDEX_FILE} to say which are its shards",
            found.len(),
            shown(first)
        )),
    }
}

/// The text of a file, `None` if there is none.
fn text(folder: &Path, name: &str) -> Result<Option<String>, String> {
    let path = folder.join(name);
    let fail = |why: &dyn std::fmt::Display| format!("{name}: {why}");
    match std::fs::metadata(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(fail(&e)),
        Ok(metadata) if !metadata.is_file() => return Err(fail(&"it is not a regular file")),
        Ok(_) => {}
    }
    let file = std::fs::File::open(&path).map_err(|e| fail(&e))?;
    let mut bytes = Vec::new();
    file.take(TEXT_LIMIT_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| fail(&e))?;
    if bytes.len() as u64 > TEXT_LIMIT_BYTES {
        return Err(fail(&format!("it is longer than {TEXT_LIMIT_BYTES} bytes")));
    }
    String::from_utf8(bytes)
        .map(Some)
        .map_err(|_| fail(&"it is not UTF-8"))
}

/// The JSON value of a file, null if there is none.
fn json(folder: &Path, name: &str) -> Result<Value, String> {
    match text(folder, name)? {
        None => Ok(Value::Null),
        Some(text) => serde_json::from_str(&text).map_err(|e| format!("{name}: {e}")),
    }
}

/// The text of a special token: written plainly, or as an object with more settings.
fn special(value: &Value) -> Option<String> {
    value
        .as_str()
        .or_else(|| value["content"].as_str())
        .map(str::to_owned)
}

/// One id or several.
fn ids(value: &Value) -> Vec<u64> {
    match value {
        Value::Array(ids) => ids.iter().filter_map(Value::as_u64).collect(),
        id => id.as_u64().into_iter().collect(),
    }
}

/// The template: a text, or of several named ones that called `default`.
fn template_of(value: Value) -> Option<String> {
    match value {
        Value::String(template) => Some(template),
        Value::Array(named) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(str::to_owned),
        _ => None,
    }
}
