//! Safetensors files (<https://github.com/huggingface/safetensors>).
//!
//! ```text
//! header bytes u64 | JSON { name: { dtype, shape, data_offsets: [from, to] }, "__metadata__": { text } } | data
//! ```
//!
//! Offsets count from the end of the header. The header is read here and not by the `safetensors`
//! crate because a tensor named twice silently replaces the first one there, and a wrong shape or
//! offset is reported without the tensor's name.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::{DType, Tensor};
use crate::Error;
use crate::error::shown;
use crate::file::gguf::MAX_DIMS;

/// Largest header, as the format states.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Key of the header that is no tensor.
const METADATA_KEY: &str = "__metadata__";

/// A parsed file; borrows from its bytes.
#[derive(Debug, Clone)]
pub struct SafeTensors<'a> {
    /// Text that the writer added.
    pub metadata: BTreeMap<String, String>,
    /// Tensors in the order of the header.
    pub tensors: Vec<Tensor<'a>>,
}

impl<'a> SafeTensors<'a> {
    /// Parses a whole file held in memory or mapped.
    ///
    /// # Errors
    /// A header that is truncated, too long or no such JSON; a tensor that is named twice, has an
    /// unknown type, a dimension of zero, more bytes than the file holds or another number than its
    /// shape needs. One line that names the tensor.
    pub fn parse(bytes: &'a [u8]) -> Result<SafeTensors<'a>, Error> {
        let malformed = |reason: String| Error::Malformed {
            what: "safetensors header".to_owned(),
            reason,
        };
        let truncated = |at: u64, need: u64| Error::Truncated {
            what: "safetensors header".to_owned(),
            at,
            need,
            left: (bytes.len() as u64).saturating_sub(at),
        };
        let (length, rest) = bytes
            .split_first_chunk::<8>()
            .ok_or_else(|| truncated(0, 8))?;
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER_BYTES {
            return Err(malformed(format!(
                "{length} bytes are more than {MAX_HEADER_BYTES}: this is no safetensors file"
            )));
        }
        // No truncation: at most MAX_HEADER_BYTES.
        let header = rest
            .get(..length as usize)
            .ok_or_else(|| truncated(8, length))?;
        let data = &rest[length as usize..];
        let header: Header<'a> =
            serde_json::from_slice(header).map_err(|e| malformed(e.to_string()))?;
        let mut names: Vec<&str> = header.entries.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::Tensor {
                name: shown(pair[0]),
                reason: "named twice in the file".to_owned(),
            });
        }
        let tensors = header
            .entries
            .into_iter()
            .map(|(name, entry)| entry.locate(name, data))
            .collect::<Result<_, _>>()?;
        Ok(SafeTensors {
            metadata: header.metadata,
            tensors,
        })
    }
}

/// The header as it is written.
struct Header<'a> {
    metadata: BTreeMap<String, String>,
    entries: Vec<(&'a str, Entry)>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl Entry {
    fn locate<'a>(self, name: &'a str, data: &'a [u8]) -> Result<Tensor<'a>, Error> {
        let fail = |reason: String| Error::Tensor {
            name: shown(name),
            reason,
        };
        let dtype = DType::from_safetensors(&self.dtype)
            .ok_or_else(|| fail(format!("has unknown type {}", shown(&self.dtype))))?;
        if self.shape.len() > MAX_DIMS as usize {
            return Err(fail(format!(
                "has {} dimensions, up to {MAX_DIMS} are allowed",
                self.shape.len()
            )));
        }
        if self.shape.contains(&0) {
            return Err(fail(format!("has a dimension of zero in {:?}", self.shape)));
        }
        // A scalar is a vector of one.
        let dims: Vec<u64> = match self.shape.is_empty() {
            true => vec![1],
            false => self.shape.iter().rev().copied().collect(),
        };
        let need = dtype.tensor_bytes(&dims).ok_or_else(|| {
            fail(format!(
                "size of {:?} {} overflows",
                self.shape,
                dtype.name()
            ))
        })?;
        let [from, to] = self.data_offsets;
        let have = to
            .checked_sub(from)
            .ok_or_else(|| fail(format!("ends at byte {to}, before its start {from}")))?;
        if have != need {
            return Err(fail(format!(
                "holds {have} bytes, {:?} {} needs {need}",
                self.shape,
                dtype.name()
            )));
        }
        let range = usize::try_from(from).ok().zip(usize::try_from(to).ok());
        let data = range.and_then(|(from, to)| data.get(from..to));
        Ok(Tensor {
            name,
            dims,
            dtype,
            data: data.ok_or_else(|| {
                fail(format!(
                    "bytes {from} to {to} reach past the end of the file: it is truncated"
                ))
            })?,
        })
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Header<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Keeps every entry, so that one that comes twice is seen.
struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header<'de>, A::Error> {
        let mut header = Header {
            metadata: BTreeMap::new(),
            entries: Vec::new(),
        };
        while let Some(Name(name)) = map.next_key()? {
            match name {
                METADATA_KEY => header.metadata = map.next_value()?,
                name => header.entries.push((name, map.next_value()?)),
            }
        }
        Ok(header)
    }
}

/// A name that is written as it is read, so that it can be borrowed.
struct Name<'a>(&'a str);

impl<'de: 'a, 'a> Deserialize<'de> for Name<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NameVisitor;
        impl<'de> Visitor<'de> for NameVisitor {
            type Value = Name<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a tensor name without escapes")
            }

            fn visit_borrowed_str<E>(self, name: &'de str) -> Result<Name<'de>, E> {
                Ok(Name(name))
            }
        }
        deserializer.deserialize_str(NameVisitor)
    }
}
