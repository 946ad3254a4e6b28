//! Models as Hugging Face folders hold them: `config.json` and one or many safetensors files, of which
//! an index says which tensor lies where.

mod config;
mod packing;

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;
use serde_json::{Map, Value};

pub use packing::Packing;

use super::safetensors::SafeTensors;
use super::{Naming, Source, Tensor};
use crate::Error;
use crate::arch::Config;
use crate::error::shown;

/// File of the configuration.
pub const CONFIG_FILE: &str = "config.json";
/// File of the index where there are several shards.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// File of the tensors where there is one.
pub const SINGLE_FILE: &str = "model.safetensors";

/// Which shard holds which tensor.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Index {
    /// Tensor name -> file name.
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Parses the text of an index file.
    ///
    /// # Errors
    /// Text that is no such JSON, an index of nothing, a shard that is no plain file name.
    pub fn parse(text: &str) -> Result<Index, Error> {
        let fail = |reason: String| Error::Malformed {
            what: INDEX_FILE.to_owned(),
            reason,
        };
        let index: Index = serde_json::from_str(text).map_err(|e| fail(e.to_string()))?;
        if index.weight_map.is_empty() {
            return Err(fail("weight_map is empty".to_owned()));
        }
        for file in index.weight_map.values() {
            // The name is joined to the folder: it may not lead out of it.
            if file.is_empty() || file.starts_with('.') || file.contains(['/', '\\', '\0', ':']) {
                return Err(fail(format!("{} is not a file name", shown(file))));
            }
        }
        Ok(index)
    }

    /// Names of the shards, each once, in order.
    pub fn shards(&self) -> Vec<&str> {
        let mut shards: Vec<&str> = self.weight_map.values().map(String::as_str).collect();
        shards.sort_unstable();
        shards.dedup();
        shards
    }
}

/// A parsed folder; borrows from the bytes of its shards.
#[derive(Debug, Clone)]
pub struct HuggingFace<'a> {
    config: Map<String, Value>,
    packing: Option<Packing>,
    tensors: Vec<Tensor<'a>>,
    index: HashMap<&'a str, usize>,
}

impl<'a> HuggingFace<'a> {
    /// Parses a folder: the text of `config.json`, the index if there is one, and each shard's file name
    /// and bytes.
    ///
    /// # Errors
    /// A shard that is malformed or lacks a tensor that the index puts there, a tensor that two shards
    /// hold, a configuration that is no JSON object or names a quantisation that is not read.
    pub fn parse(
        config: &str,
        index: Option<&Index>,
        shards: &[(&str, &'a [u8])],
    ) -> Result<HuggingFace<'a>, Error> {
        let config: Map<String, Value> =
            serde_json::from_str(config).map_err(|e| Error::Malformed {
                what: CONFIG_FILE.to_owned(),
                reason: e.to_string(),
            })?;
        let packing = Packing::from_config(&config)?;
        let mut tensors: Vec<Tensor<'a>> = Vec::new();
        let mut places: HashMap<&'a str, usize> = HashMap::new();
        let mut files: Vec<&str> = Vec::new();
        for (file, bytes) in shards {
            let shard = SafeTensors::parse(bytes).map_err(|e| Error::Shard {
                file: shown(file),
                reason: e.to_string(),
            })?;
            for tensor in shard.tensors {
                if let Some(&other) = places.get(tensor.name) {
                    let reason = format!("is in {} and in {}", shown(files[other]), shown(file));
                    return Err(tensor.fail(reason));
                }
                places.insert(tensor.name, tensors.len());
                files.push(file);
                tensors.push(tensor);
            }
        }
        for (name, file) in index.iter().flat_map(|index| &index.weight_map) {
            let place = places.get(name.as_str()).map(|&i| files[i]);
            if place != Some(file) {
                return Err(Error::Tensor {
                    name: shown(name),
                    reason: format!(
                        "is not in {}, where {INDEX_FILE} puts it: fetch that file again",
                        shown(file)
                    ),
                });
            }
        }
        if let Some(packing) = &packing {
            packing.check_exceptions(&config, &tensors)?;
        }
        Ok(HuggingFace {
            config,
            packing,
            tensors,
            index: places,
        })
    }
}

impl Source for HuggingFace<'_> {
    fn naming(&self) -> Naming {
        Naming::HuggingFace
    }

    fn config(&self) -> Result<Config, Error> {
        config::config(self)
    }

    fn packing(&self) -> Option<&Packing> {
        self.packing.as_ref()
    }

    fn tensors(&self) -> &[Tensor<'_>] {
        &self.tensors
    }

    fn tensor(&self, name: &str) -> Option<&Tensor<'_>> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }
}
