//! EdgeLLM's own file: a safetensors file
//! (<https://huggingface.co/docs/safetensors>) whose tensors lie as kernels read them.
//!
//! ```text
//! header bytes u64 | header, JSON, filled up with spaces to a multiple of 4,096 | tensors
//!
//! __metadata__  "format": "edgellm", "edgellm.version", "edgellm.weights": what each weight is,
//!               and what the source says of the model: configuration, tokenizer, chat template, …
//! tensors       NAME          (n,) F32                    a vector
//!               NAME.quants   (n, k/2) U8 or (n, k) I8    cells of INT4, levels of INT8
//!               NAME.scales   (n, ceil(k/group)) F16
//!               NAME.mins     (n, ceil(k/group)) F16      INT4 with minima
//!               NAME.quants   (n, k/4) U8, NAME.scales (n, ceil(k/group)) F32       ternary
//!               NAME          (n, k) F16                  a float matrix
//!               padding.I     (n,) U8 zeros               fills up to the next 4,096 bytes
//! ```
//!
//! Every weight starts at a multiple of 4,096 bytes, so a mapped file is used in place by a CPU and
//! sent to a device without a copy in between. Safetensors allows no holes, hence the padding
//! tensors. INT4 is stored row by row ([`int4`](crate::quant::int4)): the CPU reads that as it is,
//! and which matrices share tiles on a GPU ([`int4_tiled`](crate::quant::int4_tiled)) is a choice of
//! its backend, made at upload.

mod writer;

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use bytemuck::Pod;
use bytes::Bytes;
use half::f16;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

pub use writer::{DataWriter, Writer};

use crate::Error;
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
    dtype: Dtype,
    shape: Vec<usize>,
}

impl StoredWeight {
    /// How `weight` is stored under `name`.
    pub fn of(name: String, weight: &Weight) -> StoredWeight {
        let (rows, cols, layout) = match weight {
            Weight::Int4(m) => {
                let form = match m.mins {
                    Some(_) => Int4Form::Asymmetric,
                    None => Int4Form::Symmetric,
                };
                (
                    m.rows,
                    m.cols,
                    Layout::Int4 {
                        group: m.group,
                        form,
                    },
                )
            }
            Weight::Int8(m) => (m.rows, m.cols, Layout::Int8 { group: m.group }),
            Weight::Ternary(m) => (m.rows, m.cols, Layout::Ternary { group: m.group }),
            Weight::F16(m) => (m.rows, m.cols, Layout::F16),
            Weight::Vector(values) => (1, values.len(), Layout::F32),
        };
        StoredWeight {
            name,
            rows,
            cols,
            layout,
        }
    }

    /// The tensors that make up the weight, in file order; their bytes do not overflow.
    fn parts(&self) -> Result<Vec<Part>, Error> {
        let (rows, cols) = (self.rows, self.cols);
        // Sizes of all parts are at most four bytes a weight.
        if rows
            .checked_mul(cols)
            .and_then(|n| n.checked_mul(4))
            .is_none()
        {
            return Err(self.fail(format!("{rows} x {cols} overflows")));
        }
        let part = |suffix: &str, dtype, shape: Vec<usize>| Part {
            name: format!("{}{suffix}", self.name),
            dtype,
            shape,
        };
        let groups = |group: usize| match group {
            0 => Err(self.fail("group is 0")),
            _ => Ok(cols.div_ceil(group)),
        };
        Ok(match self.layout {
            Layout::Int4 { group, form } => {
                let groups = groups(group)?;
                let mut parts = vec![
                    part(".quants", Dtype::U8, vec![rows, cols / 2]),
                    part(".scales", Dtype::F16, vec![rows, groups]),
                ];
                if form == Int4Form::Asymmetric {
                    parts.push(part(".mins", Dtype::F16, vec![rows, groups]));
                }
                parts
            }
            Layout::Int8 { group } => vec![
                part(".quants", Dtype::I8, vec![rows, cols]),
                part(".scales", Dtype::F16, vec![rows, groups(group)?]),
            ],
            Layout::Ternary { group } => vec![
                part(".quants", Dtype::U8, vec![rows, cols / 4]),
                part(".scales", Dtype::F32, vec![rows, groups(group)?]),
            ],
            Layout::F16 => vec![part("", Dtype::F16, vec![rows, cols])],
            Layout::F32 => vec![part("", Dtype::F32, vec![cols])],
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
pub struct Container {
    bytes: Bytes,
    metadata: HashMap<String, String>,
    weights: Vec<StoredWeight>,
    index: HashMap<String, usize>,
    /// Where the parts of each weight lie, in the order of [`StoredWeight::parts`].
    places: Vec<Vec<Range<usize>>>,
}

impl Container {
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
    /// named twice, and tensors that are missing, are not what the list of weights says or lie
    /// askew, in one line that names the field or tensor.
    pub fn parse(bytes: Bytes) -> Result<Container, Error> {
        let (header_bytes, header) =
            SafeTensors::read_metadata(&bytes).map_err(|e| malformed("safetensors header", &e))?;
        let metadata = header.metadata().clone().unwrap_or_default();
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
        let weights: Vec<StoredWeight> = json(&metadata, WEIGHTS_KEY)?;
        let mut index = HashMap::new();
        let mut places = Vec::new();
        let mut used = HashSet::new();
        for (i, weight) in weights.iter().enumerate() {
            if index.insert(weight.name.clone(), i).is_some() {
                return Err(weight.fail("named twice in the list of weights"));
            }
            let mut ranges = Vec::new();
            for part in weight.parts()? {
                let range = locate(&header, &part, LENGTH_BYTES + header_bytes)
                    .map_err(|reason| weight.fail(reason))?;
                ranges.push(range);
                used.insert(part.name);
            }
            places.push(ranges);
        }
        let unknown = |name: &String| !name.starts_with(PADDING) && !used.contains(name);
        if let Some(name) = header.offset_keys().iter().find(|name| unknown(name)) {
            return Err(Error::Tensor {
                name: shown(name),
                reason: format!("is in no weight of {WEIGHTS_KEY}"),
            });
        }
        Ok(Container {
            bytes,
            metadata,
            weights,
            index,
            places,
        })
    }

    /// The weights in file order.
    pub fn weights(&self) -> &[StoredWeight] {
        &self.weights
    }

    /// The entry of the weight with this name.
    pub fn stored(&self, name: &str) -> Option<&StoredWeight> {
        self.index.get(name).map(|&i| &self.weights[i])
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
    /// A weight that is missing, a group or a width that its format does not have, a scale or value
    /// that is not finite.
    pub fn weight(&self, name: &str) -> Result<Weight, Error> {
        let Some(&i) = self.index.get(name) else {
            return Err(Error::MissingTensor { name: shown(name) });
        };
        let (stored, places) = (&self.weights[i], &self.places[i]);
        let (rows, cols) = (stored.rows, stored.cols);
        let weight = match stored.layout {
            Layout::Int4 { group, form } => Int4Matrix::from_shared(
                rows,
                cols,
                group,
                self.values(stored, &places[0])?,
                self.values(stored, &places[1])?,
                match form {
                    Int4Form::Symmetric => None,
                    Int4Form::Asymmetric => Some(self.values(stored, &places[2])?),
                },
            )
            .map(Weight::Int4),
            Layout::Int8 { group } => Int8Matrix::from_shared(
                rows,
                cols,
                group,
                self.values(stored, &places[0])?,
                self.values(stored, &places[1])?,
            )
            .map(Weight::Int8),
            Layout::Ternary { group } => TernaryMatrix::new(
                rows,
                cols,
                group,
                self.values::<u8>(stored, &places[0])?,
                self.values::<f32>(stored, &places[1])?,
            )
            .map(Weight::Ternary),
            Layout::F16 => {
                F16Matrix::new(rows, cols, self.values::<f16>(stored, &places[0])?).map(Weight::F16)
            }
            Layout::F32 => {
                let values: Shared<f32> = self.values(stored, &places[0])?;
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

    fn values<T: Pod>(
        &self,
        weight: &StoredWeight,
        place: &Range<usize>,
    ) -> Result<Shared<T>, Error> {
        Shared::from_bytes(self.bytes.slice(place.clone())).ok_or_else(|| {
            weight.fail(format!(
                "lies at byte {}, not at a multiple of {} in memory",
                place.start,
                align_of::<T>()
            ))
        })
    }
}

/// Bytes of the file that hold a part, whose size the header's check has compared with its shape.
fn locate(
    header: &safetensors::tensor::Metadata,
    part: &Part,
    data_start: usize,
) -> Result<Range<usize>, String> {
    let info = header
        .info(&part.name)
        .ok_or_else(|| format!("its tensor {} is missing", shown(&part.name)))?;
    if info.dtype != part.dtype || info.shape != part.shape {
        return Err(format!(
            "its tensor {} is {:?} {:?}, expected {:?} {:?}",
            shown(&part.name),
            info.dtype,
            info.shape,
            part.dtype,
            part.shape
        ));
    }
    let (start, end) = info.data_offsets;
    Ok(data_start + start..data_start + end)
}

fn json<T: for<'de> Deserialize<'de>>(
    metadata: &HashMap<String, String>,
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

/// What a library says of a file, as one short line.
fn malformed(what: &str, error: &dyn std::fmt::Display) -> Error {
    Error::Malformed {
        what: what.to_owned(),
        reason: shown(&error.to_string()),
    }
}
