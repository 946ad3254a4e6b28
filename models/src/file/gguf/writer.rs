//! Writes GGUF v3 files: metadata and tensor table first, then tensor data as it is produced.

use std::collections::HashSet;
use std::io::Write;

use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, DType, MAGIC, MAX_DIMS, Value, ValueType};
use crate::Error;
use crate::error::shown;

/// Collects metadata and tensor declarations; [`Writer::begin`] writes them and hands over to a
/// [`DataWriter`] that streams the tensors' bytes, so that a file larger than memory can be made.
///
/// Keys are unique: a second value for a key is an error at [`Writer::begin`].
#[derive(Debug, Clone)]
pub struct Writer {
    alignment: u64,
    entries: u64,
    metadata: Vec<u8>,
    keys: HashSet<String>,
    tensors: Vec<Declared>,
    repeated: Option<String>,
}

#[derive(Debug, Clone)]
struct Declared {
    name: String,
    dims: Vec<u64>,
    dtype: DType,
    bytes: u64,
}

impl Default for Writer {
    fn default() -> Self {
        Self::new()
    }
}

impl Writer {
    /// An empty file with the default alignment.
    pub fn new() -> Self {
        Writer {
            alignment: DEFAULT_ALIGNMENT,
            entries: 0,
            metadata: Vec::new(),
            keys: HashSet::new(),
            tensors: Vec::new(),
            repeated: None,
        }
    }

    /// Aligns tensor data to `alignment` bytes (a power of two, at least 8) and says so in the
    /// metadata.
    pub fn alignment(&mut self, alignment: u32) -> &mut Self {
        assert!(
            alignment >= 8 && alignment.is_power_of_two(),
            "alignment {alignment}"
        );
        self.alignment = alignment.into();
        self.u32(ALIGNMENT_KEY, alignment)
    }

    fn entry(&mut self, key: &str, value_type: ValueType, value: &[u8]) -> &mut Self {
        if !self.keys.insert(key.to_owned()) {
            self.repeated.get_or_insert_with(|| key.to_owned());
        }
        self.entries += 1;
        put_string(&mut self.metadata, key);
        self.metadata
            .extend_from_slice(&(value_type as u32).to_le_bytes());
        self.metadata.extend_from_slice(value);
        self
    }

    /// Adds an unsigned integer.
    pub fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.entry(key, ValueType::U32, &value.to_le_bytes())
    }

    /// Adds a 64-bit unsigned integer.
    pub fn u64(&mut self, key: &str, value: u64) -> &mut Self {
        self.entry(key, ValueType::U64, &value.to_le_bytes())
    }

    /// Adds a float.
    pub fn f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.entry(key, ValueType::F32, &value.to_le_bytes())
    }

    /// Adds a truth value.
    pub fn bool(&mut self, key: &str, value: bool) -> &mut Self {
        self.entry(key, ValueType::Bool, &[value.into()])
    }

    /// Adds text.
    pub fn string(&mut self, key: &str, value: &str) -> &mut Self {
        let mut bytes = Vec::new();
        put_string(&mut bytes, value);
        self.entry(key, ValueType::String, &bytes)
    }

    /// Adds an array of strings.
    pub fn strings<S: AsRef<str>>(&mut self, key: &str, values: &[S]) -> &mut Self {
        let mut bytes = array_header(ValueType::String, values.len());
        for value in values {
            put_string(&mut bytes, value.as_ref());
        }
        self.entry(key, ValueType::Array, &bytes)
    }

    /// Adds an array of signed integers.
    pub fn i32s(&mut self, key: &str, values: &[i32]) -> &mut Self {
        let mut bytes = array_header(ValueType::I32, values.len());
        bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        self.entry(key, ValueType::Array, &bytes)
    }

    /// Adds an array of floats.
    pub fn f32s(&mut self, key: &str, values: &[f32]) -> &mut Self {
        let mut bytes = array_header(ValueType::F32, values.len());
        bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        self.entry(key, ValueType::Array, &bytes)
    }

    /// Adds a value of any type, for copying entries from one file to another.
    pub fn value(&mut self, key: &str, value: &Value<'_>) -> &mut Self {
        let bytes = match value {
            Value::U8(v) => v.to_le_bytes().to_vec(),
            Value::I8(v) => v.to_le_bytes().to_vec(),
            Value::U16(v) => v.to_le_bytes().to_vec(),
            Value::I16(v) => v.to_le_bytes().to_vec(),
            Value::U32(v) => v.to_le_bytes().to_vec(),
            Value::I32(v) => v.to_le_bytes().to_vec(),
            Value::F32(v) => v.to_le_bytes().to_vec(),
            Value::Bool(v) => vec![u8::from(*v)],
            Value::String(v) => {
                let mut bytes = Vec::new();
                put_string(&mut bytes, v);
                bytes
            }
            Value::Array(v) => {
                let mut bytes = array_header(v.element(), v.len());
                bytes.extend_from_slice(v.bytes());
                bytes
            }
            Value::U64(v) => v.to_le_bytes().to_vec(),
            Value::I64(v) => v.to_le_bytes().to_vec(),
            Value::F64(v) => v.to_le_bytes().to_vec(),
        };
        self.entry(key, value.value_type(), &bytes)
    }

    /// Declares a tensor with dimensions fastest first; its bytes follow in declaration order.
    ///
    /// # Errors
    /// A repeated name, a dimension of zero, more than four dimensions, or rows that are not whole
    /// blocks of the type.
    pub fn tensor(&mut self, name: &str, dims: &[u64], dtype: DType) -> Result<&mut Self, Error> {
        let fail = |reason: String| Error::Tensor {
            name: shown(name),
            reason,
        };
        if self.tensors.iter().any(|t| t.name == name) {
            return Err(fail("declared twice".to_owned()));
        }
        if dims.is_empty() || dims.len() > MAX_DIMS as usize || dims.contains(&0) {
            return Err(fail(format!(
                "dimensions {dims:?} are not 1 to {MAX_DIMS} sizes above 0"
            )));
        }
        let bytes = dtype
            .tensor_bytes(dims)
            .ok_or_else(|| fail(format!("{dims:?} is no shape of {} blocks", dtype.name())))?;
        let dims = dims.to_vec();
        self.tensors.push(Declared {
            name: name.to_owned(),
            dims,
            dtype,
            bytes,
        });
        Ok(self)
    }

    /// Writes everything but the tensor data.
    ///
    /// # Errors
    /// A metadata key given twice, or a failure of `out`.
    pub fn begin<W: Write>(self, mut out: W) -> Result<DataWriter<W>, Error> {
        if let Some(key) = &self.repeated {
            return Err(Error::KeyValue {
                key: shown(key),
                reason: "given twice".to_owned(),
            });
        }
        let mut head = Vec::new();
        head.extend_from_slice(&MAGIC);
        head.extend_from_slice(&3u32.to_le_bytes());
        head.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        head.extend_from_slice(&self.entries.to_le_bytes());
        head.extend_from_slice(&self.metadata);
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_string(&mut head, &tensor.name);
            head.extend_from_slice(&(tensor.dims.len() as u32).to_le_bytes());
            head.extend(tensor.dims.iter().flat_map(|d| d.to_le_bytes()));
            head.extend_from_slice(&tensor.dtype.id().to_le_bytes());
            head.extend_from_slice(&offset.to_le_bytes());
            offset = offset
                .checked_add(tensor.bytes)
                .and_then(|end| end.checked_next_multiple_of(self.alignment))
                .ok_or_else(|| Error::Write {
                    reason: "tensor data exceeds 2^64".to_owned(),
                })?;
        }
        let aligned = (head.len() as u64).next_multiple_of(self.alignment);
        head.resize(aligned as usize, 0);
        out.write_all(&head).map_err(write_failed)?;
        Ok(DataWriter {
            out,
            alignment: self.alignment,
            tensors: self.tensors,
            next: 0,
            written: 0,
        })
    }
}

/// Streams tensor data; see [`Writer::begin`].
#[derive(Debug)]
pub struct DataWriter<W: Write> {
    out: W,
    alignment: u64,
    tensors: Vec<Declared>,
    /// Tensor being written.
    next: usize,
    /// Bytes of it written so far.
    written: u64,
}

impl<W: Write> DataWriter<W> {
    /// Appends bytes of the current tensor; once it is complete, the next one is current.
    ///
    /// # Errors
    /// More bytes than the tensor has, no tensor left, or a failure of the output.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let Some(tensor) = self.tensors.get(self.next) else {
            return Err(Error::Write {
                reason: "data after the last tensor".to_owned(),
            });
        };
        let written = self.written + bytes.len() as u64;
        if written > tensor.bytes {
            return Err(Error::Tensor {
                name: shown(&tensor.name),
                reason: format!("{written} bytes given, it has {}", tensor.bytes),
            });
        }
        self.out.write_all(bytes).map_err(write_failed)?;
        self.written = written;
        if written == tensor.bytes {
            let padding = written.next_multiple_of(self.alignment) - written;
            std::io::copy(
                &mut std::io::Read::take(std::io::repeat(0), padding),
                &mut self.out,
            )
            .map_err(write_failed)?;
            self.next += 1;
            self.written = 0;
        }
        Ok(())
    }

    /// Flushes and gives the output back.
    ///
    /// # Errors
    /// A tensor whose bytes are missing, or a failure of the output.
    pub fn finish(mut self) -> Result<W, Error> {
        if let Some(tensor) = self.tensors.get(self.next) {
            return Err(Error::Tensor {
                name: shown(&tensor.name),
                reason: format!("{} of {} bytes given", self.written, tensor.bytes),
            });
        }
        self.out.flush().map_err(write_failed)?;
        Ok(self.out)
    }
}

fn write_failed(error: std::io::Error) -> Error {
    Error::Write {
        reason: error.to_string(),
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn array_header(element: ValueType, len: usize) -> Vec<u8> {
    let mut bytes = (element as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&(len as u64).to_le_bytes());
    bytes
}
