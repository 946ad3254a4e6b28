//! Quantises a model: any source in, EdgeLLM's container out, tensor by tensor.
//!
//! Without calibration a weight needs its own memory and no other's. With it (`awq`, `gptq`) the
//! activations of the calibration text lie in a temporary file between the layers, and layers are quantised in
//! order: each sees what the layers before it make of the text once they are quantised. What takes most memory
//! then is the square of a layer's inputs, in 32 bits.

pub mod awq;
mod calibrate;
mod encode;
mod flow;
pub mod gptq;
pub mod gram;
mod plan;
mod spool;

use std::io::Write;

use models::file::Source;
use models::file::container::{StoredWeight, Writer};
use models::quant::{Int4Form, Weight};
use models::recipe::{Recipe, WeightRef};
use models::weights::{self, FloatRows};
use serde::Serialize;

use crate::Error;

/// Key of [`Made`] in the container.
const MADE_KEY: &str = "edgellm.quantizer";

/// Bits of the linear layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// INT4.
    Four,
    /// INT8.
    Eight,
    /// -1, 0 and 1.
    Ternary,
}

/// How weights are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// To the nearest level of the group's range.
    Rtn,
    /// To the nearest level of a range that is searched for.
    Mse,
    /// Columns scaled by the inputs that they meet.
    Awq,
    /// Column by column, errors made up for by the columns that follow.
    Gptq,
}

impl Method {
    /// Whether a calibration text is needed.
    pub fn calibrates(self) -> bool {
        matches!(self, Method::Awq | Method::Gptq)
    }
}

/// Form of the table that logits are computed from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// INT8, one scale a row.
    Int8,
    /// INT4 like the linear layers; needs a table of its own.
    Int4,
    /// Halves.
    F16,
}

/// What to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Bits of the linear layers.
    pub bits: Bits,
    /// Weights that share a scale.
    pub group: usize,
    /// Form of INT4.
    pub form: Int4Form,
    /// How weights are rounded.
    pub method: Method,
    /// Form of the output table.
    pub head: Head,
}

/// How the work is watched and stopped.
pub struct Hooks<'a> {
    /// Told the name of each tensor as it begins, and its weights.
    pub begin: &'a (dyn Fn(&str, usize) + Sync),
    /// Asked often.
    pub interrupted: &'a (dyn Fn() -> bool + Sync),
    /// The source's bytes read so far are not needed in memory any more.
    pub release: &'a (dyn Fn() + Sync),
}

/// Texts that a container carries beside the weights: key and text.
pub type Texts<'a> = [(&'a str, String)];

/// What the container says of how it was made.
#[derive(Debug, Serialize)]
struct Made<'a> {
    program: &'a str,
    method: Method,
    calibration_tokens: usize,
}

/// Writes the container of a model to `out`; gives back the weights that it lists. `sequences` are the
/// token ids of the calibration text, for the methods that need them.
///
/// # Errors
/// [`Error::Input`] that names the tensor or setting at fault; [`Error::Machine`] if `out` fails or the
/// work is interrupted.
pub fn quantize<W: Write>(
    source: &dyn Source,
    recipe: &Recipe,
    options: &Options,
    texts: &Texts<'_>,
    sequences: Vec<Vec<u32>>,
    hooks: &Hooks<'_>,
    out: W,
) -> Result<(Vec<StoredWeight>, W), Error> {
    let planned = plan::plan(recipe, options)?;
    let mut writer = Writer::new();
    writer.config(&recipe.config)?;
    for (key, text) in texts {
        writer.text(key, text.clone());
    }
    writer.json(
        MADE_KEY,
        &Made {
            program: concat!("edgellm ", env!("CARGO_PKG_VERSION")),
            method: options.method,
            calibration_tokens: sequences.iter().map(Vec::len).sum(),
        },
    )?;
    for stored in &planned {
        writer.weight(stored.clone());
    }
    for pack in plan::packs(recipe, &planned) {
        writer.pack(pack);
    }
    let mut data = writer.begin(out).map_err(Error::machine)?;
    let mut write = |weight: Weight| data.write(weight).map_err(Error::machine);
    if options.method.calibrates() && options.bits == Bits::Four {
        calibrate::quantize(
            source, recipe, &planned, options, sequences, hooks, &mut write,
        )?;
    } else {
        for (reference, stored) in recipe.weights.iter().zip(&planned) {
            write(uncalibrated(
                source,
                reference,
                stored,
                options.method,
                hooks,
            )?)?;
        }
    }
    let out = data.finish().map_err(Error::machine)?;
    Ok((planned, out))
}

/// One weight on its own.
fn uncalibrated(
    source: &dyn Source,
    reference: &WeightRef,
    stored: &StoredWeight,
    method: Method,
    hooks: &Hooks<'_>,
) -> Result<Weight, Error> {
    if (hooks.interrupted)() {
        return Err(Error::machine("interrupted"));
    }
    (hooks.begin)(&stored.name, stored.rows * stored.cols);
    if reference.kind == models::recipe::WeightKind::Vector {
        return Ok(weights::decode(source, reference)?);
    }
    let rows = FloatRows::new(source, reference)?;
    encode::encode(stored, &rows, method, hooks)
}
