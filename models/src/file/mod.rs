//! Model file formats: bytes -> configuration and a tensor table. Every length is checked before use.
//!
//! A [`Source`] is what the formats have in common; recipes, weights and the quantiser read nothing
//! else of a file.

pub mod container;
mod dtype;
pub mod gguf;
pub mod hugging_face;
pub mod safetensors;

pub use dtype::DType;
pub use hugging_face::Packing;

use std::ops::Range;

use self::container::Container;
use crate::Error;
use crate::arch::Config;
use crate::error::shown;
use crate::quant::floats;

/// A model as configuration and named tensors.
pub trait Source: Sync {
    /// How its tensors are called.
    fn naming(&self) -> Naming;

    /// Dimensions and constants of the model.
    ///
    /// # Errors
    /// A value that is missing, out of range, contradicts the tensors or asks for something that no
    /// recipe can express; the message names it.
    fn config(&self) -> Result<Config, Error>;

    /// How its linear layers are packed, if they are not tensors of a type of their own.
    fn packing(&self) -> Option<&Packing> {
        None
    }

    /// The container that it is, which holds weights in the form that kernels read.
    fn container(&self) -> Option<&Container<'_>> {
        None
    }

    /// Every tensor, in file order. Names are unique.
    fn tensors(&self) -> &[Tensor<'_>];

    /// The tensor with this name.
    fn tensor(&self, name: &str) -> Option<&Tensor<'_>>;

    /// The tensor with this name, its absence being an error.
    fn require_tensor(&self, name: &str) -> Result<&Tensor<'_>, Error> {
        self.tensor(name)
            .ok_or_else(|| Error::MissingTensor { name: shown(name) })
    }
}

/// How the tensors of a source are called and how the rows of q and k lie in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// `blk.0.attn_q.weight`; some families store rotary pairs as neighbours.
    Gguf,
    /// `model.layers.0.self_attn.q_proj.weight`; rotary pairs always lie half a head apart.
    HuggingFace,
}

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor<'a> {
    /// Name.
    pub name: &'a str,
    /// Dimensions, fastest first: `[k, n]` for a matrix of `n` rows; none is zero, one at least.
    pub dims: Vec<u64>,
    /// Element type.
    pub dtype: DType,
    /// Exactly the bytes of the tensor.
    pub data: &'a [u8],
}

impl Tensor<'_> {
    /// `(rows, columns)`: columns run fastest, all outer dimensions are rows.
    pub fn shape(&self) -> (usize, usize) {
        // The bytes are in memory and a block of a row takes at least one, so the product of the
        // dimensions fits.
        let rows = self.dims[1..].iter().product::<u64>() as usize;
        (rows, self.dims[0] as usize)
    }

    /// Writes `rows` as floats to `out`, which holds `rows.len() x columns` of them. Exact for floats;
    /// for block types the product that the format defines, rounded to f32.
    ///
    /// # Errors
    /// A type whose values are not floats, naming tensor and type.
    ///
    /// # Panics
    /// If `rows` are not rows of the tensor or `out` has another length.
    pub fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), Error> {
        let (count, cols) = self.shape();
        assert!(rows.end <= count && out.len() == rows.len() * cols);
        let decode = floats::row_decoder(self.dtype).ok_or_else(|| {
            self.fail(format!(
                "type {} cannot be read as floats",
                self.dtype.name()
            ))
        })?;
        let row_bytes = self.data.len() / count;
        decode(
            &self.data[rows.start * row_bytes..rows.end * row_bytes],
            out,
        );
        Ok(())
    }

    /// An error of this tensor.
    pub fn fail(&self, reason: String) -> Error {
        Error::Tensor {
            name: shown(self.name),
            reason,
        }
    }
}
