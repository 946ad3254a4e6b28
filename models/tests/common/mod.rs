//! Files for tests: synthetic ones, edited copies of them, and raw bytes.
#![allow(dead_code, reason = "every test binary uses its part")]

use models::file::gguf::{DType, Gguf, Value, Writer};
use models::synthetic;

/// A tensor that owns its bytes.
pub struct Tensor {
    pub name: String,
    pub dims: Vec<u64>,
    pub dtype: DType,
    pub data: Vec<u8>,
}

/// Bytes of a synthetic model with the default options.
pub fn synthetic_bytes(shape: &str) -> Vec<u8> {
    synthetic::to_vec(
        synthetic::shape(shape).unwrap(),
        &synthetic::Options::default(),
    )
    .unwrap()
}

/// A copy of a file with its metadata and tensors edited.
pub fn edited<'a>(
    bytes: &'a [u8],
    metadata: impl FnOnce(&mut Vec<(String, Value<'a>)>),
    tensors: impl FnOnce(&mut Vec<Tensor>),
) -> Vec<u8> {
    let gguf = Gguf::parse(bytes).unwrap();
    let mut entries: Vec<_> = gguf
        .metadata
        .iter()
        .map(|(key, value)| (key.to_owned(), value.clone()))
        .collect();
    metadata(&mut entries);
    let mut owned: Vec<_> = gguf
        .tensors
        .iter()
        .map(|t| Tensor {
            name: t.name.to_owned(),
            dims: t.dims.clone(),
            dtype: t.dtype,
            data: t.data.to_vec(),
        })
        .collect();
    tensors(&mut owned);

    let mut writer = Writer::new();
    for (key, value) in &entries {
        writer.value(key, value);
    }
    for tensor in &owned {
        writer
            .tensor(&tensor.name, &tensor.dims, tensor.dtype)
            .unwrap();
    }
    let mut data = writer.begin(Vec::new()).unwrap();
    for tensor in &owned {
        data.write(&tensor.data).unwrap();
    }
    data.finish().unwrap()
}

/// Sets or adds a metadata value.
pub fn set<'a>(entries: &mut Vec<(String, Value<'a>)>, key: &str, value: Value<'a>) {
    entries.retain(|(k, _)| k != key);
    entries.push((key.to_owned(), value));
}

/// A repeatable stream of 64-bit numbers (xorshift).
pub struct Stream(pub u64);

impl Stream {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Builds files field by field, right or wrong.
#[derive(Clone)]
pub struct Raw(pub Vec<u8>);

impl Raw {
    /// Magic, version and the two counts.
    pub fn head(version: u32, tensors: u64, entries: u64) -> Raw {
        Raw(b"GGUF".to_vec()).u32(version).u64(tensors).u64(entries)
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Raw {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn u32(self, value: u32) -> Raw {
        self.bytes(&value.to_le_bytes())
    }

    pub fn u64(self, value: u64) -> Raw {
        self.bytes(&value.to_le_bytes())
    }

    pub fn string(self, text: &str) -> Raw {
        self.u64(text.len() as u64).bytes(text.as_bytes())
    }

    /// A row of the tensor table.
    pub fn tensor(mut self, name: &str, dims: &[u64], dtype: u32, offset: u64) -> Raw {
        self = self.string(name).u32(dims.len() as u32);
        for dim in dims {
            self = self.u64(*dim);
        }
        self.u32(dtype).u64(offset)
    }

    /// Zeros up to the next multiple of 32, then `count` zeros of data.
    pub fn data(mut self, count: usize) -> Raw {
        let start = self.0.len().next_multiple_of(32);
        self.0.resize(start + count, 0);
        self
    }
}
