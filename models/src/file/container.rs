//! EdgeLLM's own file: a safetensors file
//! (<https://huggingface.co/docs/safetensors>).
//!
//! ```text
//! header bytes u64 | header, JSON, filled up with spaces to a multiple of 4,096 | tensors
//!
//! __metadata__  "format": "edgellm", "edgellm.version", "edgellm.weights": what each weight is,
//!               and what the source says of the model: configuration, tokenizer, chat template, …
//! tensors       NAME          (n,) F32                    a vector
//!               NAME          (n, k) F16                  a matrix of floats
//!               NAME.quants   (n, k/2) U8, (n, k) I8, (n, k/4) U8   of INT4, INT8 and ternary
//!               NAME.scales   (n, ceil(k/group)) F16      F32 for ternary
//!               NAME.mins     (n, ceil(k/group)) F16      INT4 with minima or zeros
//!               padding.I     (n,) U8 zeros               fills up to the next 4,096 bytes
//! ```
//!
//! Every weight starts at a multiple of 4,096 bytes, so that it is read from the mapped file without a
//! copy before it. Safetensors allows no holes, hence the padding tensors. INT4 is stored row by row
//! ([`int4`](crate::quant::int4)): which matrices share tiles on a GPU
//! ([`int4_tiled`](crate::quant::int4_tiled)), and how a CPU's tiles are laid out, is a choice of the
//! backend, made at load.

mod config;
mod writer;

use std::collections::{BTreeMap, HashMap, HashSet};

use bytemuck::Pod;
use bytes::Bytes;
use half::f16;
use serde::{Deserialize, Serialize};

pub use writer::{DataWriter, Writer};

use super::safetensors::SafeTensors;
use super::{DType, Naming, Source, Tensor};
use crate::Error;
use crate::arch::Config;
use crate::error::shown;
use crate::quant::{F16Matrix, Int4Form, Int4Matrix, Int8Matrix, Shared, TernaryMatrix, Weight};

/// Version of the metadata that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// Every weight starts at a multiple of this many bytes: a page of memory.
pub const ALIGNMENT: usize = 4096;

/// Key and value that tell this file from other safetensors files.
const FORMAT_KEY: &str = "format";
const FORMAT: &str = "edgellm";
/// Key of [`VERSION`].
const VERSION_KEY: &str = "edgellm.version";
/// Key of the list of [`StoredWeight`]s, JSON.
const WEIGHTS_KEY: &str = "edgellm.weights";
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

/// How a weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "format", rename_all = "snake_case", deny_unknown_fields)]
pub enum Layout {
    /// [`Int4Matrix`].
    Int4 {
        /// Weights that share a scale.
        group: usize,
        /// What the levels stand for.
        form: Int4Form,
    },
    /// [`Int4Matrix`] with zeros.
    Int4Zeros {
        /// Weights that share a scale.
        group: usize,
    },
    /// [`Int8Matrix`].
    Int8 {
        /// Weights that share a scale.
        group: usize,
    },
    /// [`TernaryMatrix`].
    Ternary {
        /// Weights that share a scale.
        group: usize,
    },
    /// [`F16Matrix`].
    F16,
    /// A vector of 32-bit floats; `rows` is 1.
    F32,
}

/// One weight of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredWeight {
    /// Name.
    pub name: String,
    /// N.
    pub rows: usize,
    /// K.
    pub cols: usize,
    /// How it is stored.
    #[serde(flatten)]
    pub layout: Layout,
}

/// A tensor of the file that is a part of a weight.
struct Part {
    name: String,
    dtype: DType,
    /// Outermost first.
    shape: Vec<u64>,
    bytes: u64,
}

impl StoredWeight {
    /// How `weight` is stored under `name`.
    pub fn of(name: String, weight: &Weight) -> StoredWeight {
        let (rows, cols) = weight.shape();
        let layout = match weight {
            Weight::Int4(m) if m.zeros => Layout::Int4Zeros { group: m.group },
            Weight::Int4(m) => Layout::Int4 {
                group: m.group,
                form: match m.mins {
                    Some(_) => Int4Form::Asymmetric,
                    None => Int4Form::Symmetric,
                },
            },
            Weight::Int8(m) => Layout::Int8 { group: m.group },
            Weight::Ternary(m) => Layout::Ternary { group: m.group },
            Weight::F16(_) => Layout::F16,
            Weight::Vector(_) => Layout::F32,
        };
        StoredWeight {
            name,
            rows,
            cols,
            layout,
        }
    }

    /// Bytes of the weight, without padding.
    ///
    /// # Errors
    /// A size that overflows, a group of zero.
    pub fn bytes(&self) -> Result<u64, Error> {
        Ok(self.parts()?.iter().map(|part| part.bytes).sum())
    }

    /// The tensors that make up the weight, in file order.
    fn parts(&self) -> Result<Vec<Part>, Error> {
        let (rows, cols) = (self.rows as u64, self.cols as u64);
        let part = |suffix: &str, dtype: DType, cols: u64| -> Result<Part, Error> {
            let shape = match self.layout {
                Layout::F32 => vec![cols],
                _ => vec![rows, cols],
            };
            let bytes = dtype
                .tensor_bytes(&shape)
                .ok_or_else(|| self.fail(format!("its size of {shape:?} overflows")))?;
            Ok(Part {
                name: format!("{}{suffix}", self.name),
                dtype,
                shape,
                bytes,
            })
        };
        let groups = |group: usize| match group {
            0 => Err(self.fail("group is 0")),
            _ => Ok(cols.div_ceil(group as u64)),
        };
        Ok(match self.layout {
            Layout::Int4 { group, form } => {
                let groups = groups(group)?;
                let mut parts = vec![
                    part(".quants", DType::U8, cols / 2)?,
                    part(".scales", DType::F16, groups)?,
                ];
                if form == Int4Form::Asymmetric {
                    parts.push(part(".mins", DType::F16, groups)?);
                }
                parts
            }
            Layout::Int4Zeros { group } => {
                let groups = groups(group)?;
                vec![
                    part(".quants", DType::U8, cols / 2)?,
                    part(".scales", DType::F16, groups)?,
                    part(".mins", DType::F16, groups)?,
                ]
            }
            Layout::Int8 { group } => vec![
                part(".quants", DType::I8, cols)?,
                part(".scales", DType::F16, groups(group)?)?,
            ],
            Layout::Ternary { group } => vec![
                part(".quants", DType::U8, cols / 4)?,
                part(".scales", DType::F32, groups(group)?)?,
            ],
            Layout::F16 => vec![part("", DType::F16, cols)?],
            Layout::F32 => vec![part("", DType::F32, cols)?],
        })
    }

    fn fail(&self, reason: impl Into<String>) -> Error {
        Error::Tensor {
            name: shown(&self.name),
            reason: reason.into(),
        }
    }
}

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
    /// named twice, and tensors that are missing or not what the list of weights says, in one line
    /// that names the field or tensor.
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
            return Err(Error::KeyValue {
                key: shown(VERSION_KEY),
                reason: format!("version {version} is not supported: {VERSION} is"),
            });
        }
        let tensor_index: HashMap<&str, usize> = tensors
            .iter()
            .enumerate()
            .map(|(i, tensor)| (tensor.name, i))
            .collect();
        let weights: Vec<StoredWeight> = json(&metadata, WEIGHTS_KEY)?;
        let mut weight_index = HashMap::new();
        let mut used = HashSet::new();
        for (i, weight) in weights.iter().enumerate() {
            if weight_index.insert(weight.name.clone(), i).is_some() {
                return Err(weight.fail("named twice in the list of weights"));
            }
            for part in weight.parts()? {
                let tensor = tensor_index.get(part.name.as_str()).map(|&i| &tensors[i]);
                part.check(tensor).map_err(|reason| weight.fail(reason))?;
                used.insert(part.name);
            }
        }
        if let Some(tensor) = tensors.iter().find(|tensor| !used.contains(tensor.name)) {
            return Err(tensor.fail(format!("is in no weight of {WEIGHTS_KEY}")));
        }
        Ok(Container {
            bytes,
            metadata,
            tensors,
            tensor_index,
            weights,
            weight_index,
        })
    }

    /// The weights in file order.
    pub fn weights(&self) -> &[StoredWeight] {
        &self.weights
    }

    /// The entry of the weight with this name.
    pub fn stored(&self, name: &str) -> Option<&StoredWeight> {
        self.weight_index.get(name).map(|&i| &self.weights[i])
    }

    /// Names of the tensors that make up the weight with this name.
    pub fn part_names(&self, name: &str) -> Result<Vec<String>, Error> {
        let parts = self.require(name)?.parts()?;
        Ok(parts.into_iter().map(|part| part.name).collect())
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
        let stored = self.require(name)?;
        let (rows, cols) = (stored.rows, stored.cols);
        let weight = match stored.layout {
            Layout::Int4 { group, form } => Int4Matrix::from_shared(
                rows,
                cols,
                group,
                self.values(stored, ".quants")?,
                self.values(stored, ".scales")?,
                match form {
                    Int4Form::Symmetric => None,
                    Int4Form::Asymmetric => Some(self.values(stored, ".mins")?),
                },
            )
            .map(Weight::Int4),
            Layout::Int4Zeros { group } => Int4Matrix::from_shared(
                rows,
                cols,
                group,
                self.values(stored, ".quants")?,
                self.values(stored, ".scales")?,
                Some(self.values(stored, ".mins")?),
            )
            .and_then(Int4Matrix::with_zeros)
            .map(Weight::Int4),
            Layout::Int8 { group } => Int8Matrix::from_shared(
                rows,
                cols,
                group,
                self.values(stored, ".quants")?,
                self.values(stored, ".scales")?,
            )
            .map(Weight::Int8),
            Layout::Ternary { group } => TernaryMatrix::new(
                rows,
                cols,
                group,
                self.values::<u8>(stored, ".quants")?,
                self.values::<f32>(stored, ".scales")?,
            )
            .map(Weight::Ternary),
            Layout::F16 => {
                F16Matrix::new(rows, cols, self.values::<f16>(stored, "")?).map(Weight::F16)
            }
            Layout::F32 => {
                let values: Shared<f32> = self.values(stored, "")?;
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

    fn require(&self, name: &str) -> Result<&StoredWeight, Error> {
        self.stored(name)
            .ok_or_else(|| Error::MissingTensor { name: shown(name) })
    }

    /// A part of a weight, in place.
    fn values<T: Pod>(&self, weight: &StoredWeight, suffix: &str) -> Result<Shared<T>, Error> {
        let tensor = self.require_tensor(&format!("{}{suffix}", weight.name))?;
        Shared::from_bytes(self.bytes.slice_ref(tensor.data)).ok_or_else(|| {
            weight.fail(format!(
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

impl Part {
    /// Whether the file has this part.
    fn check(&self, tensor: Option<&Tensor<'_>>) -> Result<(), String> {
        let name = shown(&self.name);
        let tensor = tensor.ok_or_else(|| format!("its tensor {name} is missing"))?;
        let same = tensor.dtype == self.dtype && tensor.dims.iter().rev().eq(&self.shape);
        match same {
            true => Ok(()),
            false => Err(format!(
                "its tensor {name} is {} {:?}, expected {} {:?}",
                tensor.dtype.name(),
                tensor.dims.iter().rev().collect::<Vec<_>>(),
                self.dtype.name(),
                self.shape
            )),
        }
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
