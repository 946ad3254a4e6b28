//! GGUF container, versions 2 and 3, little-endian
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>).
//!
//! ```text
//! "GGUF" | version u32 | tensors u64 | entries u64
//! entries x  { key: string | type u32 | value }
//! tensors x  { name: string | n u32 | dims n x u64, fastest first | type u32 | offset u64 }
//! padding to the alignment, then tensor data; offsets count from here and are aligned
//! ```
//!
//! Nothing is allocated from a count that the file merely claims: tables grow as entries are
//! read, and each entry takes bytes of the file. Strings, arrays and tensor data borrow from it.

mod config;
mod cursor;
mod metadata;
mod writer;

use std::collections::HashMap;

pub use super::dtype::DType;
pub(crate) use config::ROPE_DIVISORS;
pub use metadata::{Array, Elements, MAX_ARRAY_DEPTH, MAX_KEY_BYTES, Metadata, Value, ValueType};
pub use writer::{DataWriter, Writer};

use super::{Naming, Source, Tensor};
use crate::Error;
use crate::arch::Config;
use crate::error::shown;
use cursor::Cursor;

/// First bytes of a GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Most dimensions of a tensor.
pub const MAX_DIMS: u32 = 4;
/// Alignment where the file names none, bytes.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// Metadata key of the alignment.
pub const ALIGNMENT_KEY: &str = "general.alignment";

/// A parsed file; borrows from its bytes.
#[derive(Debug, Clone)]
pub struct Gguf<'a> {
    /// Version of the container: 2 or 3.
    pub version: u32,
    /// Key/value metadata.
    pub metadata: Metadata<'a>,
    /// Tensors in file order.
    pub tensors: Vec<Tensor<'a>>,
    index: HashMap<&'a str, usize>,
}

impl<'a> Gguf<'a> {
    /// Parses a whole file held in memory or mapped.
    ///
    /// # Errors
    /// Anything that is not a well-formed little-endian GGUF v2 or v3 file, in one line that names
    /// the field or tensor: truncation, wrong magic or version, duplicate names, dimensions that
    /// are zero or overflow, unknown types, offsets that are unaligned or past the end.
    pub fn parse(bytes: &'a [u8]) -> Result<Gguf<'a>, Error> {
        let mut cursor = Cursor::new(bytes);
        let version = read_magic_and_version(&mut cursor)?;
        let tensor_count = cursor.u64("tensor count")?;
        let entry_count = cursor.u64("metadata entry count")?;
        let metadata = Metadata::read(&mut cursor, entry_count)?;
        let alignment = alignment(&metadata)?;

        let mut pending = Vec::new();
        let mut index = HashMap::new();
        for i in 0..tensor_count {
            let entry = TensorEntry::read(&mut cursor, i, tensor_count)?;
            if index.insert(entry.name, pending.len()).is_some() {
                return Err(Error::Tensor {
                    name: shown(entry.name),
                    reason: "named twice in the file".to_owned(),
                });
            }
            pending.push(entry);
        }

        let data_start = (cursor.at() as u64).next_multiple_of(alignment);
        let tensors = pending
            .into_iter()
            .map(|entry| entry.locate(bytes, data_start, alignment))
            .collect::<Result<_, _>>()?;
        Ok(Gguf {
            version,
            metadata,
            tensors,
            index,
        })
    }
}

impl Source for Gguf<'_> {
    fn naming(&self) -> Naming {
        Naming::Gguf
    }

    fn config(&self) -> Result<Config, Error> {
        config::config(self)
    }

    fn tensors(&self) -> &[Tensor<'_>] {
        &self.tensors
    }

    fn tensor(&self, name: &str) -> Option<&Tensor<'_>> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }
}

fn read_magic_and_version(cursor: &mut Cursor<'_>) -> Result<u32, Error> {
    let magic: [u8; 4] = cursor.array("magic")?;
    if magic != MAGIC {
        return Err(Error::NotGguf {
            found: magic.escape_ascii().to_string(),
        });
    }
    let version = cursor.u32("version")?;
    match version {
        2 | 3 => Ok(version),
        // Versions are small, so a number that is small only once swapped is of the other order.
        _ if version > 0xffff && version.swap_bytes() <= 0xffff => Err(Error::BigEndian {
            version: version.swap_bytes(),
        }),
        _ => Err(Error::Version { version }),
    }
}

fn alignment(metadata: &Metadata<'_>) -> Result<u64, Error> {
    let alignment = metadata
        .u64_opt(ALIGNMENT_KEY)?
        .unwrap_or(DEFAULT_ALIGNMENT);
    if alignment == 0 || !alignment.is_multiple_of(8) || alignment > u64::from(u32::MAX) {
        return Err(Error::KeyValue {
            key: shown(ALIGNMENT_KEY),
            reason: format!("{alignment} is not a multiple of 8 between 8 and 2^32"),
        });
    }
    Ok(alignment)
}

/// A row of the tensor table before its data is located.
struct TensorEntry<'a> {
    name: &'a str,
    dims: Vec<u64>,
    dtype: DType,
    bytes: u64,
    offset: u64,
}

impl<'a> TensorEntry<'a> {
    fn read(cursor: &mut Cursor<'a>, i: u64, count: u64) -> Result<Self, Error> {
        let name = cursor.string(&format!("name of tensor {i} of {count}"))?;
        let fail = |reason: String| Error::Tensor {
            name: shown(name),
            reason,
        };
        let what = format!("tensor {}", shown(name));

        let dim_count = cursor.u32(&what)?;
        if dim_count == 0 || dim_count > MAX_DIMS {
            return Err(fail(format!(
                "has {dim_count} dimensions, 1 to {MAX_DIMS} are allowed"
            )));
        }
        let mut dims = Vec::new();
        for _ in 0..dim_count {
            dims.push(cursor.u64(&what)?);
        }
        let id = cursor.u32(&what)?;
        let dtype = DType::from_id(id).ok_or_else(|| fail(format!("has unknown type {id}")))?;
        let offset = cursor.u64(&what)?;

        if dims.contains(&0) {
            return Err(fail(format!("has a dimension of zero in {dims:?}")));
        }
        if !dims[0].is_multiple_of(dtype.block_elems()) {
            return Err(fail(format!(
                "rows of {} are not whole {} blocks of {}",
                dims[0],
                dtype.name(),
                dtype.block_elems()
            )));
        }
        let bytes = dtype
            .tensor_bytes(&dims)
            .ok_or_else(|| fail(format!("size of {dims:?} {} overflows", dtype.name())))?;
        Ok(TensorEntry {
            name,
            dims,
            dtype,
            bytes,
            offset,
        })
    }

    fn locate(self, file: &'a [u8], start: u64, alignment: u64) -> Result<Tensor<'a>, Error> {
        let fail = |reason: String| Error::Tensor {
            name: shown(self.name),
            reason,
        };
        if !self.offset.is_multiple_of(alignment) {
            return Err(fail(format!(
                "offset {} is not aligned to {alignment} bytes",
                self.offset
            )));
        }
        let range = start.checked_add(self.offset).and_then(|from| {
            let to = from.checked_add(self.bytes)?;
            file.get(usize::try_from(from).ok()?..usize::try_from(to).ok()?)
        });
        let data = range.ok_or_else(|| {
            fail(format!(
                "{} bytes at offset {} reach past the end of the file ({} bytes of tensor data)",
                self.bytes,
                self.offset,
                (file.len() as u64).saturating_sub(start)
            ))
        })?;
        Ok(Tensor {
            name: self.name,
            dims: self.dims,
            dtype: self.dtype,
            data,
        })
    }
}
