//! Writes the container: the header first, from what is known of the weights, then their bytes as
//! they are produced, so that a file larger than memory can be made.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;

use bytemuck::cast_slice;
use serde::Serialize;

use super::stored::Part;
use super::{
    ALIGNMENT, CONFIG_KEY, FORMAT, FORMAT_KEY, LENGTH_BYTES, PACKS_KEY, PADDING, Pack,
    StoredWeight, VERSION, VERSION_KEY, WEIGHTS_KEY,
};
use crate::Error;
use crate::arch::Config;
use crate::error::shown;
use crate::file::DType;
use crate::quant::int4_tiled::Order;
use crate::quant::{Int4Matrix, Int4Tiled, Weight};

/// Collects metadata and weights; [`Writer::begin`] writes the header and hands over to a
/// [`DataWriter`].
#[derive(Debug, Clone, Default)]
pub struct Writer {
    metadata: BTreeMap<String, String>,
    weights: Vec<StoredWeight>,
    packs: Vec<Pack>,
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

/// A header and what follows from it.
struct Plan {
    header: Vec<u8>,
    data_bytes: u64,
    packs: Packs,
}

/// Every INT4 matrix with those that it shares tiles with.
#[derive(Debug)]
struct Packs {
    packs: Vec<Pack>,
    /// Places of the members of each among the weights.
    members: Vec<Vec<usize>>,
    /// The pack of each weight, by its place.
    of_weight: HashMap<usize, usize>,
}

impl Packs {
    /// The packs asked for, and one for each INT4 matrix in none of them.
    fn new(weights: &[StoredWeight], asked: &[Pack]) -> Result<Packs, Error> {
        let index: HashMap<&str, usize> = weights
            .iter()
            .enumerate()
            .map(|(i, weight)| (weight.name.as_str(), i))
            .collect();
        let mut packs = Packs {
            packs: Vec::new(),
            members: Vec::new(),
            of_weight: HashMap::new(),
        };
        for pack in asked {
            packs.add(pack.clone(), |name| index.get(name).copied())?;
        }
        for (i, weight) in weights.iter().enumerate() {
            if weight.int4().is_some() && !packs.of_weight.contains_key(&i) {
                let alone = Pack::new(Order::Rows, vec![weight.name.clone()]);
                packs.add(alone, |_| Some(i))?;
            }
        }
        Ok(packs)
    }

    fn add(&mut self, pack: Pack, place: impl Fn(&str) -> Option<usize>) -> Result<(), Error> {
        let members: Option<Vec<usize>> = pack.members.iter().map(|name| place(name)).collect();
        let members =
            members.ok_or_else(|| failed(&format!("no such weights: {:?}", pack.members)))?;
        for (i, &weight) in members.iter().enumerate() {
            let before = self.of_weight.insert(weight, self.packs.len());
            if before.is_some() {
                return Err(failed(&format!(
                    "{} is packed twice",
                    shown(&pack.members[i])
                )));
            }
        }
        self.packs.push(pack);
        self.members.push(members);
        Ok(())
    }

    /// The tensors that are written once the weight at this place is known: its own, or those of the pack
    /// that it completes.
    fn parts(&self, weights: &[StoredWeight], place: usize) -> Result<Vec<Part>, Error> {
        let Some(&pack) = self.of_weight.get(&place) else {
            return weights[place].parts();
        };
        let members = &self.members[pack];
        match members.iter().max() == Some(&place) {
            true => {
                let members: Vec<_> = members.iter().map(|&i| &weights[i]).collect();
                Ok(self.packs[pack].parts(&members)?.0)
            }
            false => Ok(Vec::new()),
        }
    }
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

    /// Has INT4 matrices share tiles; without, each has its own.
    pub fn pack(&mut self, pack: Pack) -> &mut Self {
        self.packs.push(pack);
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
    /// Weights that share a name or overflow, packs of what cannot share tiles, a failure of `out`.
    pub fn begin<W: Write>(self, mut out: W) -> Result<DataWriter<W>, Error> {
        let plan = self.plan()?;
        out.write_all(&plan.header).map_err(|e| failed(&e))?;
        Ok(DataWriter {
            out,
            weights: self.weights,
            packs: plan.packs,
            held: HashMap::new(),
            written: 0,
        })
    }

    fn plan(&self) -> Result<Plan, Error> {
        let mut metadata = self.metadata.clone();
        metadata.remove(FORMAT_KEY);
        metadata.insert(VERSION_KEY.to_owned(), VERSION.to_string());
        let weights = serde_json::to_string(&self.weights).map_err(|e| failed(&e))?;
        metadata.insert(WEIGHTS_KEY.to_owned(), weights);
        let packs = Packs::new(&self.weights, &self.packs)?;
        let listed = serde_json::to_string(&packs.packs).map_err(|e| failed(&e))?;
        metadata.insert(PACKS_KEY.to_owned(), listed);

        let mut tensors = BTreeMap::new();
        let mut at = 0u64;
        let mut paddings = 0;
        for place in 0..self.weights.len() {
            for part in packs.parts(&self.weights, place)? {
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
            packs,
        })
    }
}

/// Streams the weights of a file in the order in which they were declared.
#[derive(Debug)]
pub struct DataWriter<W> {
    out: W,
    weights: Vec<StoredWeight>,
    packs: Packs,
    /// Members of packs that are not complete, by their place among the weights.
    held: HashMap<usize, Int4Matrix>,
    /// Weights written.
    written: usize,
}

impl<W: Write> DataWriter<W> {
    /// Writes the next weight; one that shares tiles once it has the last of those that it shares them with.
    ///
    /// # Errors
    /// A weight that is not the next one declared, a failure of the output.
    pub fn write(&mut self, weight: Weight) -> Result<(), Error> {
        let Some(next) = self.weights.get(self.written) else {
            return Err(failed(&"more weights than declared"));
        };
        if StoredWeight::of(next.name.clone(), &weight) != *next {
            return Err(next.fail("is not what was declared"));
        }
        match weight {
            Weight::Int4(matrix) => self.int4(matrix)?,
            Weight::Int4Tiled(part) => self.int4(part.in_rows())?,
            Weight::Int8(m) => {
                self.part(cast_slice(&m.quants))?;
                self.part(cast_slice(&m.scales))?;
            }
            Weight::Ternary(m) => {
                self.part(&m.quants)?;
                self.part(cast_slice(&m.scales))?;
            }
            Weight::F16(m) => self.part(cast_slice(&m.values))?,
            Weight::Vector(values) => self.part(cast_slice(&values))?,
        }
        self.written += 1;
        Ok(())
    }

    /// Takes an INT4 matrix, and writes its pack if that is complete.
    fn int4(&mut self, matrix: Int4Matrix) -> Result<(), Error> {
        self.held.insert(self.written, matrix);
        let Some(&pack) = self.packs.of_weight.get(&self.written) else {
            return Err(self.weights[self.written].fail("is in no pack"));
        };
        let (pack, members) = (&self.packs.packs[pack], &self.packs.members[pack]);
        if !members.iter().all(|member| self.held.contains_key(member)) {
            return Ok(());
        }
        let matrices: Vec<Int4Matrix> = members
            .iter()
            .filter_map(|member| self.held.remove(member))
            .collect();
        let matrices: Vec<&Int4Matrix> = matrices.iter().collect();
        let tiles = Int4Tiled::pack_as(pack.order, &matrices).map_err(|error| pack.fail(error))?;
        self.part(cast_slice(&tiles.quants))?;
        self.part(cast_slice(&tiles.scales))?;
        match &tiles.mins {
            Some(mins) => self.part(cast_slice(mins)),
            None => Ok(()),
        }
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
