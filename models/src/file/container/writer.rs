//! Writes the container: the header first, from what is known of the weights, then their bytes as
//! they are produced, so that a file larger than memory can be made.

use std::collections::BTreeMap;
use std::io::Write;

use bytemuck::cast_slice;
use serde::Serialize;

use super::{
    ALIGNMENT, CONFIG_KEY, FORMAT, FORMAT_KEY, LENGTH_BYTES, PADDING, StoredWeight, VERSION,
    VERSION_KEY, WEIGHTS_KEY,
};
use crate::Error;
use crate::arch::Config;
use crate::error::shown;
use crate::file::DType;
use crate::quant::Weight;

/// Collects metadata and weights; [`Writer::begin`] writes the header and hands over to a
/// [`DataWriter`].
#[derive(Debug, Clone, Default)]
pub struct Writer {
    metadata: BTreeMap<String, String>,
    weights: Vec<StoredWeight>,
}

/// The header as safetensors spells it.
#[derive(Serialize)]
struct Header<'a> {
    #[serde(rename = "__metadata__")]
    metadata: Metadata<'a>,
    #[serde(flatten)]
    tensors: BTreeMap<String, Tensor>,
}

/// The format comes first, where [`super::Container::is_container`] looks for it.
#[derive(Serialize)]
struct Metadata<'a> {
    format: &'static str,
    #[serde(flatten)]
    rest: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
struct Tensor {
    dtype: &'static str,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A header and the sizes that follow from it.
struct Plan {
    header: Vec<u8>,
    data_bytes: u64,
}

impl Writer {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds text.
    pub fn text(&mut self, key: &str, value: impl Into<String>) -> &mut Self {
        self.metadata.insert(key.to_owned(), value.into());
        self
    }

    /// Adds a value as JSON.
    ///
    /// # Errors
    /// A value that JSON cannot express.
    pub fn json(&mut self, key: &str, value: &impl Serialize) -> Result<&mut Self, Error> {
        let text = serde_json::to_string(value).map_err(|e| failed(&e))?;
        Ok(self.text(key, text))
    }

    /// Sets the model's configuration.
    ///
    /// # Errors
    /// A number that JSON cannot express.
    pub fn config(&mut self, config: &Config) -> Result<&mut Self, Error> {
        self.json(CONFIG_KEY, config)
    }

    /// Adds a weight whose bytes follow in the same order.
    pub fn weight(&mut self, weight: StoredWeight) -> &mut Self {
        self.weights.push(weight);
        self
    }

    /// Bytes of the file.
    ///
    /// # Errors
    /// As [`Writer::begin`].
    pub fn file_bytes(&self) -> Result<u64, Error> {
        let plan = self.plan()?;
        Ok(plan.header.len() as u64 + plan.data_bytes)
    }

    /// Writes the header.
    ///
    /// # Errors
    /// Weights that share a name or overflow, a failure of `out`.
    pub fn begin<W: Write>(self, mut out: W) -> Result<DataWriter<W>, Error> {
        let plan = self.plan()?;
        out.write_all(&plan.header).map_err(|e| failed(&e))?;
        Ok(DataWriter {
            out,
            weights: self.weights,
            written: 0,
        })
    }

    fn plan(&self) -> Result<Plan, Error> {
        let mut metadata = self.metadata.clone();
        metadata.remove(FORMAT_KEY);
        metadata.insert(VERSION_KEY.to_owned(), VERSION.to_string());
        let weights = serde_json::to_string(&self.weights).map_err(|e| failed(&e))?;
        metadata.insert(WEIGHTS_KEY.to_owned(), weights);

        let mut tensors = BTreeMap::new();
        let mut at = 0u64;
        let mut paddings = 0;
        for weight in &self.weights {
            for part in weight.parts()? {
                let mut put = |name: String, dtype: DType, shape, bytes: u64| {
                    let offsets = (at, at + bytes);
                    at += bytes;
                    let tensor = Tensor {
                        dtype: dtype.name(),
                        shape,
                        data_offsets: offsets,
                    };
                    match tensors.insert(name.clone(), tensor) {
                        None => Ok(()),
                        Some(_) => Err(failed(&format!("two tensors {}", shown(&name)))),
                    }
                };
                put(part.name, part.dtype, part.shape, part.bytes)?;
                let padding = padding(part.bytes);
                if padding > 0 {
                    let name = format!("{PADDING}{paddings}");
                    put(name, DType::U8, vec![padding as u64], padding as u64)?;
                    paddings += 1;
                }
            }
        }
        let header = Header {
            metadata: Metadata {
                format: FORMAT,
                rest: &metadata,
            },
            tensors,
        };
        let mut bytes = vec![0; LENGTH_BYTES];
        serde_json::to_writer(&mut bytes, &header).map_err(|e| failed(&e))?;
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), b' ');
        let length = (bytes.len() - LENGTH_BYTES) as u64;
        bytes[..LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
        Ok(Plan {
            header: bytes,
            data_bytes: at,
        })
    }
}

/// Streams the weights of a file in the order in which they were declared.
#[derive(Debug)]
pub struct DataWriter<W> {
    out: W,
    weights: Vec<StoredWeight>,
    /// Weights written.
    written: usize,
}

impl<W: Write> DataWriter<W> {
    /// Writes the next weight.
    ///
    /// # Errors
    /// A weight that is not the next one declared, a failure of the output.
    pub fn write(&mut self, weight: &Weight) -> Result<(), Error> {
        let Some(next) = self.weights.get(self.written) else {
            return Err(failed(&"more weights than declared"));
        };
        if StoredWeight::of(next.name.clone(), weight) != *next {
            return Err(next.fail("is not what was declared"));
        }
        match weight {
            Weight::Int4(m) => {
                self.part(&m.quants)?;
                self.part(cast_slice(&m.scales))?;
                if let Some(mins) = &m.mins {
                    self.part(cast_slice(mins))?;
                }
            }
            Weight::Int8(m) => {
                self.part(cast_slice(&m.quants))?;
                self.part(cast_slice(&m.scales))?;
            }
            Weight::Ternary(m) => {
                self.part(&m.quants)?;
                self.part(cast_slice(&m.scales))?;
            }
            Weight::F16(m) => self.part(cast_slice(&m.values))?,
            Weight::Vector(values) => self.part(cast_slice(values))?,
        }
        self.written += 1;
        Ok(())
    }

    fn part(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let zeros = [0; ALIGNMENT];
        self.out
            .write_all(bytes)
            .and_then(|()| self.out.write_all(&zeros[..padding(bytes.len() as u64)]))
            .map_err(|e| failed(&e))
    }

    /// Gives the output back.
    ///
    /// # Errors
    /// Weights that were declared and not written.
    pub fn finish(self) -> Result<W, Error> {
        match self.weights.get(self.written) {
            None => Ok(self.out),
            Some(missing) => Err(missing.fail("was declared and not written")),
        }
    }
}

/// Bytes that fill up `bytes` to the alignment.
fn padding(bytes: u64) -> usize {
    // No truncation: less than the alignment.
    (bytes.next_multiple_of(ALIGNMENT as u64) - bytes) as usize
}

fn failed(reason: &dyn std::fmt::Display) -> Error {
    Error::Write {
        reason: reason.to_string(),
    }
}
