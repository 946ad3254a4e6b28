//! Dimensions and constants of a model, and the checks that every file format puts them through.

use serde::{Deserialize, Serialize};

use crate::Error;
use crate::error::shown;

/// Largest dimension or count taken from a file; sizes made of two of them cannot overflow.
pub(crate) const MAX_DIMENSION: u64 = i32::MAX as u64;

/// Dimensions and constants of a decoder-only transformer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Name of the architecture in [`ARCHITECTURES`](super::ARCHITECTURES).
    pub architecture: String,
    /// Model name from the file; the architecture where it has none.
    pub name: String,
    /// Layers.
    pub layers: usize,
    /// D: model width.
    pub width: usize,
    /// H: query heads.
    pub heads: usize,
    /// KV: key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Dh: head width, even.
    pub head_dim: usize,
    /// F: feed-forward width.
    pub ffn: usize,
    /// V: vocabulary size.
    pub vocab: usize,
    /// Trained context in tokens.
    pub context: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// `(head_dim / 2,)` numbers that divide the rotary frequencies, for models whose context was
    /// stretched (Llama 3.x, linear scaling); all finite and positive.
    pub rope_divisors: Option<Vec<f32>>,
    /// Epsilon of RMSNorm.
    pub norm_eps: f32,
    /// Logits use the embedding table.
    pub tied: bool,
    /// The input of every linear layer is rounded to 8 bits, a scale a token (BitNet).
    pub int8_activations: bool,
    /// Where attention does not see all of a context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<Window>,
}

/// Layers whose attention sees the last tokens only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// How many, the newest included; at least 1.
    pub tokens: usize,
    /// Which layers.
    pub layers: WindowLayers,
}

/// Layers with a window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WindowLayers {
    /// This one and all after it.
    From(usize),
    /// Of each layer, whether it has one.
    Listed(Vec<bool>),
}

impl Config {
    /// The most tokens that attention sees in a layer, the newest included; none where it sees all of a
    /// context.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        let window = self.window.as_ref()?;
        let has_one = match &window.layers {
            WindowLayers::From(first) => layer >= *first,
            WindowLayers::Listed(layers) => layers.get(layer) == Some(&true),
        };
        (has_one && window.tokens < self.context).then_some(window.tokens)
    }
}

/// A setting that every format has, under a key of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Field {
    Layers,
    Width,
    Ffn,
    Heads,
    KvHeads,
    HeadDim,
    Context,
    RopeTheta,
    NormEps,
}

/// The settings of a file.
pub(crate) trait Keys {
    /// The key of a setting, as messages name it.
    fn key(&self, field: Field) -> String;
    /// A whole number of 0 or more, if the file has it.
    fn integer(&self, field: Field) -> Result<Option<u64>, Error>;
    /// A number, if the file has it.
    fn float(&self, field: Field) -> Result<Option<f64>, Error>;

    /// The error of a value that cannot be.
    fn fail(&self, field: Field, reason: String) -> Error {
        Error::KeyValue {
            key: shown(&self.key(field)),
            reason,
        }
    }

    /// A dimension or count, if the file has it.
    fn dimension_opt(&self, field: Field) -> Result<Option<usize>, Error> {
        match self.integer(field)? {
            Some(v) if v == 0 || v > MAX_DIMENSION => {
                Err(self.fail(field, format!("{v} is not between 1 and {MAX_DIMENSION}")))
            }
            // No truncation: at most MAX_DIMENSION.
            v => Ok(v.map(|v| v as usize)),
        }
    }

    /// A dimension or count.
    fn dimension(&self, field: Field) -> Result<usize, Error> {
        self.dimension_opt(field)?.ok_or_else(|| Error::MissingKey {
            key: shown(&self.key(field)),
        })
    }

    /// A number above 0, if the file has it.
    fn positive_opt(&self, field: Field) -> Result<Option<f32>, Error> {
        match self.float(field)? {
            Some(v) => positive(v)
                .map(Some)
                .map_err(|reason| self.fail(field, reason)),
            None => Ok(None),
        }
    }

    /// The value, a multiple of 32 as kernels need it.
    fn multiple_of_32(&self, field: Field, value: usize) -> Result<usize, Error> {
        if value.is_multiple_of(32) {
            return Ok(value);
        }
        Err(self.fail(field, format!("{value} is not a multiple of 32")))
    }
}

/// The number as f32 if it is finite and above 0 there.
pub(crate) fn positive(value: f64) -> Result<f32, String> {
    let narrow = value as f32;
    match narrow.is_finite() && narrow > 0.0 {
        true => Ok(narrow),
        false => Err(format!("{value} is not a positive number")),
    }
}

/// Reads and checks what every format has. `vocab` is the number of rows of the embedding table.
pub(crate) fn read(keys: &dyn Keys, architecture: &str, vocab: usize) -> Result<Config, Error> {
    let width = keys.multiple_of_32(Field::Width, keys.dimension(Field::Width)?)?;
    let ffn = keys.multiple_of_32(Field::Ffn, keys.dimension(Field::Ffn)?)?;
    let heads = keys.dimension(Field::Heads)?;
    let kv_heads = keys.dimension_opt(Field::KvHeads)?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        let reason = format!("{kv_heads} key/value heads do not divide {heads} heads");
        return Err(keys.fail(Field::KvHeads, reason));
    }
    let norm_eps = keys
        .positive_opt(Field::NormEps)?
        .ok_or_else(|| Error::MissingKey {
            key: shown(&keys.key(Field::NormEps)),
        })?;
    Ok(Config {
        architecture: architecture.to_owned(),
        name: architecture.to_owned(),
        layers: keys.dimension(Field::Layers)?,
        width,
        heads,
        kv_heads,
        head_dim: head_dim(keys, width, heads)?,
        ffn,
        vocab,
        context: keys.dimension(Field::Context)?,
        rope_theta: keys.positive_opt(Field::RopeTheta)?.unwrap_or(10_000.0),
        rope_divisors: None,
        norm_eps,
        tied: false,
        int8_activations: false,
        window: None,
    })
}

fn head_dim(keys: &dyn Keys, width: usize, heads: usize) -> Result<usize, Error> {
    let stated = keys.dimension_opt(Field::HeadDim)?;
    let head_dim = match stated {
        Some(length) => length,
        None if width.is_multiple_of(heads) => width / heads,
        None => {
            let reason = format!("{heads} heads do not divide the width {width}");
            return Err(keys.fail(Field::Heads, reason));
        }
    };
    let field = match stated {
        Some(_) => Field::HeadDim,
        None => Field::Width,
    };
    if !head_dim.is_multiple_of(2) {
        return Err(keys.fail(field, format!("head width {head_dim} is odd")));
    }
    match heads.checked_mul(head_dim) {
        Some(all) if all as u64 <= MAX_DIMENSION => keys.multiple_of_32(field, all)?,
        _ => return Err(keys.fail(field, format!("{heads} heads of {head_dim} are too wide"))),
    };
    Ok(head_dim)
}

/// Llama 3's context stretching: slow frequencies are divided by `factor`, fast ones kept, those
/// between interpolated by how often they turn within the original context.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stretch {
    /// Divisor of the slow frequencies.
    pub factor: f64,
    /// Turns within the original context below which a frequency is slow.
    pub low_turns: f64,
    /// Turns above which it is fast.
    pub high_turns: f64,
    /// Context before stretching, tokens.
    pub original_context: f64,
}

impl Stretch {
    /// `(head_dim / 2,)` divisors of the rotary frequencies.
    pub fn divisors(&self, head_dim: usize, theta: f64) -> Vec<f32> {
        let divisor = |i: usize| {
            let frequency = theta.powf(-2.0 * i as f64 / head_dim as f64);
            let turns = self.original_context * frequency / std::f64::consts::TAU;
            let fast = (turns - self.low_turns) / (self.high_turns - self.low_turns);
            let fast = fast.clamp(0.0, 1.0);
            (1.0 / ((1.0 - fast) / self.factor + fast)) as f32
        };
        (0..head_dim / 2).map(divisor).collect()
    }
}
