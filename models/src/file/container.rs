//! EdgeLLM's own file: a safetensors file
//! (<https://huggingface.co/docs/safetensors>).
//!
//! ```text
//! header bytes u64 | header, JSON, filled up with spaces to a multiple of 4,096 | tensors
//!
//! __metadata__  "format": "edgellm", "edgellm.version", "edgellm.weights": what each weight is,
//!               "edgellm.packs": which INT4 matrices share tiles, and in which order,
//!               and what the source says of the model: configuration, tokenizer, chat template, …
//! tensors       NAME          (n,) F32                    a vector
//!               NAME          (n, k) F16                  a matrix of floats
//!               NAME.quants   (n, k) I8, (n, k/4) U8      of INT8 and ternary
//!               NAME.scales   (n, ceil(k/group)) F16      F32 for ternary
//!               PACK.quants   (ceil(n/16), ceil(k/128), 256) U32             INT4 in tiles
//!               PACK.scales   (ceil(n/16), ceil(k/128), 16 * 128/group) F16
//!               PACK.mins     as the scales                                  minima or zeros
//!               padding.I     (n,) U8 zeros               fills up to the next 4,096 bytes
//! ```
//!
//! Every tensor starts at a multiple of 4,096 bytes, so that it is read from the mapped file without a
//! copy before it. Safetensors allows no holes, hence the padding tensors. INT4 is stored as a GPU's
//! kernels read it ([`int4_tiled`](crate::quant::int4_tiled)), matrices that one kernel takes together in
//! one tensor, so that nothing lies between the file and the device; a CPU takes the tiles apart at load.

mod config;
mod stored;
mod writer;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use bytemuck::Pod;
use bytes::Bytes;
use half::f16;
use serde::Deserialize;

pub use stored::{Layout, Pack, StoredWeight};
pub use writer::{DataWriter, Writer};

use super::safetensors::SafeTensors;
use super::{Naming, Source, Tensor};
use crate::Error;
use crate::arch::Config;
use crate::error::shown;
use crate::quant::{F16Matrix, Int4Part, Int4Tiled, Int8Matrix, Shared, TernaryMatrix, Weight};
use stored::Part;

/// Version of the metadata that is written, and the only one that is read: version 1 stored INT4 by rows.
pub const VERSION: u32 = 2;
/// Every tensor starts at a multiple of this many bytes: a page of memory.
pub const ALIGNMENT: usize = 4096;

/// Key and value that tell this file from other safetensors files.
const FORMAT_KEY: &str = "format";
const FORMAT: &str = "edgellm";
/// Key of [`VERSION`].
const VERSION_KEY: &str = "edgellm.version";
/// Key of the list of [`StoredWeight`]s, JSON.
const WEIGHTS_KEY: &str = "edgellm.weights";
/// Key of the list of [`Pack`]s, JSON.
const PACKS_KEY: &str = "edgellm.packs";
/// Key of the model's [`Config`], JSON.
const CONFIG_KEY: &str = "edgellm.config";
/// Prefix of the names of tensors that hold nothing.
const PADDING: &str = "padding.";
const _: () = assert!(
    cfg!(target_endian = "little"),
    "values are used as the file has them"
);
/// Bytes of the header's length.
const LENGTH_BYTES: usize = size_of::<u64>();

/// A parsed file; shares its bytes with whoever holds them.
#[derive(Debug, Clone)]
pub struct Container<'a> {
    bytes: &'a Bytes,
    metadata: BTreeMap<String, String>,
    tensors: Vec<Tensor<'a>>,
    /// Place of a tensor by name.
    tensor_index: HashMap<&'a str, usize>,
    weights: Vec<StoredWeight>,
    /// Place of a weight by name.
    weight_index: HashMap<String, usize>,
    packs: Vec<Pack>,
    /// INT4 matrices, by their place among the weights.
    int4: HashMap<usize, Int4Part>,
    /// The pack of each, likewise.
    pack_index: HashMap<usize, usize>,
}

impl<'a> Container<'a> {
    /// Whether `bytes` begin like a safetensors file that calls itself EdgeLLM's. The writer puts
    /// the format first, so this looks no further than the first kilobyte.
    pub fn is_container(bytes: &[u8]) -> bool {
        let head = &bytes[..bytes.len().min(1024)];
        let mark = format!("\"{FORMAT_KEY}\":\"{FORMAT}\"");
        head.get(LENGTH_BYTES) == Some(&b'{')
            && head
                .windows(mark.len())
                .any(|window| window == mark.as_bytes())
    }

    /// Parses a whole file held in memory or mapped.
    ///
    /// # Errors
    /// A file that is no safetensors file or not one of EdgeLLM's, another version, weights that are
    /// named twice, tensors that are missing or not what the lists of weights and packs say, INT4 whose
    /// parts do not fit each other, in one line that names the field or tensor.
    pub fn parse(bytes: &'a Bytes) -> Result<Container<'a>, Error> {
        let SafeTensors {
            metadata,
            mut tensors,
        } = SafeTensors::parse(bytes)?;
        tensors.retain(|tensor| !tensor.name.starts_with(PADDING));
        if metadata.get(FORMAT_KEY).map(String::as_str) != Some(FORMAT) {
            return Err(Error::Malformed {
                what: "safetensors header".to_owned(),
                reason: format!("{FORMAT_KEY} is not {FORMAT}: no file of the quantiser"),
            });
        }
        let version: u32 = json(&metadata, VERSION_KEY)?;
        if version != VERSION {
            let way_out = match version < VERSION {
                true => "quantise the source again",
                false => "a newer edgellm wrote it",
            };
            return Err(Error::KeyValue {
                key: shown(VERSION_KEY),
                reason: format!("version {version} is not supported, {VERSION} is: {way_out}"),
            });
        }
        let tensor_index: HashMap<&str, usize> = tensors
            .iter()
            .enumerate()
            .map(|(i, tensor)| (tensor.name, i))
            .collect();
        let weights: Vec<StoredWeight> = json(&metadata, WEIGHTS_KEY)?;
        let packs: Vec<Pack> = json(&metadata, PACKS_KEY)?;
        let mut weight_index = HashMap::new();
        let mut used = HashSet::new();
        let mut take = |part: Part| {
            let tensor = tensor_index.get(part.name.as_str()).map(|&i| &tensors[i]);
            let checked = part.check(tensor);
            used.insert(part.name);
            checked
        };
        for (i, weight) in weights.iter().enumerate() {
            if weight_index.insert(weight.name.clone(), i).is_some() {
                return Err(weight.fail("named twice in the list of weights"));
            }
            for part in weight.parts()? {
                take(part).map_err(|reason| weight.fail(reason))?;
            }
        }
        let mut members = Vec::with_capacity(packs.len());
        let mut pack_index = HashMap::new();
        for (p, pack) in packs.iter().enumerate() {
            let of_pack = pack
                .members
                .iter()
                .map(|name| match weight_index.get(name) {
                    Some(&i) => match pack_index.insert(i, p) {
                        None => Ok(i),
                        Some(_) => Err(weights[i].fail("is in two packs")),
                    },
                    None => Err(fail(
                        name,
                        format!("is in {PACKS_KEY} and not in {WEIGHTS_KEY}"),
                    )),
                })
                .collect::<Result<Vec<usize>, Error>>()?;
            let stored: Vec<&StoredWeight> = of_pack.iter().map(|&i| &weights[i]).collect();
            for part in pack.parts(&stored)?.0 {
                take(part).map_err(|reason| fail(&pack.name, reason))?;
            }
            members.push(of_pack);
        }
        let is_apart = |(i, weight): &(usize, &StoredWeight)| {
            weight.int4().is_some() && !pack_index.contains_key(i)
        };
        if let Some((_, weight)) = weights.iter().enumerate().find(is_apart) {
            return Err(weight.fail(format!("is INT4 and in none of {PACKS_KEY}")));
        }
        if let Some(tensor) = tensors.iter().find(|tensor| !used.contains(tensor.name)) {
            return Err(tensor.fail(format!("is in no weight of {WEIGHTS_KEY}")));
        }
        let mut container = Container {
            bytes,
            metadata,
            tensors,
            tensor_index,
            weights,
            weight_index,
            packs,
            int4: HashMap::new(),
            pack_index,
        };
        for (pack, members) in container.packs.iter().zip(members) {
            let tiles = Arc::new(container.tiles(pack, &members)?);
            for (member, weight) in members.into_iter().enumerate() {
                let part = Int4Part::new(Arc::clone(&tiles), member);
                container.int4.extend(part.map(|part| (weight, part)));
            }
        }
        Ok(container)
    }

    /// The tiles of checked tensors.
    fn tiles(&self, pack: &Pack, members: &[usize]) -> Result<Int4Tiled, Error> {
        let stored: Vec<&StoredWeight> = members.iter().map(|&i| &self.weights[i]).collect();
        let (_, shape) = pack.parts(&stored)?;
        let mins = match shape.has_mins {
            true => Some(self.values(&pack.name, ".mins")?),
            false => None,
        };
        Int4Tiled::from_shared(
            pack.order,
            stored.iter().map(|weight| weight.rows).collect(),
            [shape.cols, shape.group],
            self.values(&pack.name, ".quants")?,
            self.values(&pack.name, ".scales")?,
            mins,
            shape.zeros,
        )
        .map_err(|error| pack.fail(error))
    }

    /// The weights in file order.
    pub fn weights(&self) -> &[StoredWeight] {
        &self.weights
    }

    /// The entry of the weight with this name.
    pub fn stored(&self, name: &str) -> Option<&StoredWeight> {
        self.weight_index.get(name).map(|&i| &self.weights[i])
    }

    /// Names of the tensors that make up the weight with this name, alone or with others.
    ///
    /// # Errors
    /// A weight that is missing.
    pub fn part_names(&self, name: &str) -> Result<Vec<String>, Error> {
        let place = self.require(name)?;
        let parts = match self.pack_index.get(&place) {
            None => self.weights[place].parts()?,
            Some(&pack) => {
                let pack = &self.packs[pack];
                let members = pack.members.iter().filter_map(|name| self.stored(name));
                pack.parts(&members.collect::<Vec<_>>())?.0
            }
        };
        Ok(parts.into_iter().map(|part| part.name).collect())
    }

    /// Bytes of the file that are this weight's: of tiles that it shares, its part by rows.
    ///
    /// # Errors
    /// A weight that is missing.
    pub fn stored_bytes(&self, name: &str) -> Result<u64, Error> {
        let place = self.require(name)?;
        let parts = self.part_names(name)?;
        let tensors = parts.iter().filter_map(|name| self.tensor(name));
        let bytes = tensors.map(|tensor| tensor.data.len() as u64).sum();
        Ok(match self.int4.get(&place) {
            None => bytes,
            Some(part) => part.share(bytes),
        })
    }

    /// Text that the file holds under `key`.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// The value that the file holds under `key` as JSON.
    ///
    /// # Errors
    /// A key that is missing, or text that is no such value.
    pub fn json<T: for<'de> Deserialize<'de>>(&self, key: &str) -> Result<T, Error> {
        json(&self.metadata, key)
    }

    /// A weight, its matrices in place in the file.
    ///
    /// # Errors
    /// A weight that is missing or lies askew, a group or a width that its format does not have, a
    /// scale or value that is not finite.
    pub fn weight(&self, name: &str) -> Result<Weight, Error> {
        let place = self.require(name)?;
        let stored = &self.weights[place];
        let (rows, cols) = (stored.rows, stored.cols);
        let weight = match stored.layout {
            Layout::Int4 { .. } | Layout::Int4Zeros { .. } => self
                .int4
                .get(&place)
                .cloned()
                .map(Weight::Int4Tiled)
                .ok_or_else(|| stored.fail("is in no pack")),
            Layout::Int8 { group } => Int8Matrix::from_shared(
                rows,
                cols,
                group,
                self.values(name, ".quants")?,
                self.values(name, ".scales")?,
            )
            .map(Weight::Int8),
            Layout::Ternary { group } => TernaryMatrix::new(
                rows,
                cols,
                group,
                self.values::<u8>(name, ".quants")?,
                self.values::<f32>(name, ".scales")?,
            )
            .map(Weight::Ternary),
            Layout::F16 => {
                F16Matrix::new(rows, cols, self.values::<f16>(name, "")?).map(Weight::F16)
            }
            Layout::F32 => {
                let values: Shared<f32> = self.values(name, "")?;
                if rows != 1 {
                    return Err(stored.fail(format!("a vector has one row, not {rows}")));
                }
                if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                    return Err(stored.fail(format!("value {i} is {}", values[i])));
                }
                Ok(Weight::Vector(values.to_vec()))
            }
        };
        weight.map_err(|error| match error {
            Error::Matrix { reason, .. } => stored.fail(reason),
            other => other,
        })
    }

    /// Place of a weight in the list.
    fn require(&self, name: &str) -> Result<usize, Error> {
        let place = self.weight_index.get(name).copied();
        place.ok_or_else(|| Error::MissingTensor { name: shown(name) })
    }

    /// A tensor, in place.
    fn values<T: Pod>(&self, name: &str, suffix: &str) -> Result<Shared<T>, Error> {
        let tensor = self.require_tensor(&format!("{name}{suffix}"))?;
        Shared::from_bytes(self.bytes.slice_ref(tensor.data)).ok_or_else(|| {
            tensor.fail(format!(
                "its values do not lie at a multiple of {} bytes",
                align_of::<T>()
            ))
        })
    }
}

impl Source for Container<'_> {
    /// Whatever the source was: rows are in kernel order.
    fn naming(&self) -> Naming {
        Naming::HuggingFace
    }

    fn config(&self) -> Result<Config, Error> {
        config::checked(self.json(CONFIG_KEY)?)
    }

    fn container(&self) -> Option<&Container<'_>> {
        Some(self)
    }

    fn tensors(&self) -> &[Tensor<'_>] {
        &self.tensors
    }

    fn tensor(&self, name: &str) -> Option<&Tensor<'_>> {
        self.tensor_index.get(name).map(|&i| &self.tensors[i])
    }
}

/// An error of the weight or tensor with this name.
fn fail(name: &str, reason: impl Into<String>) -> Error {
    Error::Tensor {
        name: shown(name),
        reason: reason.into(),
    }
}

fn json<T: for<'de> Deserialize<'de>>(
    metadata: &BTreeMap<String, String>,
    key: &str,
) -> Result<T, Error> {
    let text = metadata
        .get(key)
        .ok_or_else(|| Error::MissingKey { key: shown(key) })?;
    serde_json::from_str(text).map_err(|error| Error::KeyValue {
        key: shown(key),
        reason: shown(&error.to_string()),
    })
}
