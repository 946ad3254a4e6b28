//! The configuration in a GGUF file's metadata, under keys that begin with the architecture's name.

use super::Gguf;
use crate::arch::{self, Config, Field, Keys, MAX_DIMENSION, Window, WindowLayers, positive};
use crate::error::shown;
use crate::file::Source;
use crate::recipe::{RowOrder, WeightKind, WeightRef};
use crate::{Error, weights};

/// Tensor of the rotary frequency divisors, one for all layers.
pub(crate) const ROPE_DIVISORS: &str = "rope_freqs.weight";
/// Tensor of the embedding table.
const TABLE: &str = "token_embd.weight";

pub(super) fn config(gguf: &Gguf<'_>) -> Result<Config, Error> {
    let metadata = &gguf.metadata;
    let family = metadata.string(arch::ARCHITECTURE_KEY)?;
    let architecture = arch::find(family, |a| a.gguf)?;
    let keys = GgufKeys { gguf, family };
    keys.refuse_unsupported()?;
    let mut config = arch::read(&keys, architecture.name, keys.vocab()?)?;
    for name in ["attention.value_length", "rope.dimension_count"] {
        if let Some(other) = keys.number(name)?
            && other != config.head_dim as u64
        {
            let reason = format!("{other} differs from the head width {}", config.head_dim);
            return Err(keys.refuse(name, reason));
        }
    }
    if let Some(name) = metadata.string_opt("general.name")? {
        config.name = name.to_owned();
    }
    config.tied = gguf.tensor("output.weight").is_none();
    config.rope_divisors = rope_divisors(&keys, config.head_dim)?;
    config.int8_activations = architecture.name == arch::bitnet::NAME;
    let window = "attention.sliding_window";
    match keys.number(window)? {
        Some(0) => return Err(keys.refuse(window, "a window of 0 tokens sees nothing".to_owned())),
        Some(tokens) if tokens < config.context as u64 => {
            config.window = Some(Window {
                tokens: tokens as usize,
                layers: WindowLayers::From(0),
            });
        }
        _ => {}
    }
    Ok(config)
}

/// Metadata under the family's prefix.
struct GgufKeys<'g, 'a> {
    gguf: &'g Gguf<'a>,
    family: &'g str,
}

impl Keys for GgufKeys<'_, '_> {
    fn key(&self, field: Field) -> String {
        self.full(match field {
            Field::Layers => "block_count",
            Field::Width => "embedding_length",
            Field::Ffn => "feed_forward_length",
            Field::Heads => "attention.head_count",
            Field::KvHeads => "attention.head_count_kv",
            Field::HeadDim => "attention.key_length",
            Field::Context => "context_length",
            Field::RopeTheta => "rope.freq_base",
            Field::NormEps => "attention.layer_norm_rms_epsilon",
        })
    }

    fn integer(&self, field: Field) -> Result<Option<u64>, Error> {
        self.gguf.metadata.u64_opt(&self.key(field))
    }

    fn float(&self, field: Field) -> Result<Option<f64>, Error> {
        self.gguf.metadata.f64_opt(&self.key(field))
    }
}

impl GgufKeys<'_, '_> {
    fn full(&self, name: &str) -> String {
        format!("{}.{name}", self.family)
    }

    fn refuse(&self, name: &str, reason: String) -> Error {
        Error::KeyValue {
            key: shown(&self.full(name)),
            reason,
        }
    }

    fn number(&self, name: &str) -> Result<Option<u64>, Error> {
        self.gguf.metadata.u64_opt(&self.full(name))
    }

    fn factor(&self, name: &str) -> Result<Option<f32>, Error> {
        match self.gguf.metadata.f64_opt(&self.full(name))? {
            Some(v) => positive(v)
                .map(Some)
                .map_err(|reason| self.refuse(name, reason)),
            None => Ok(None),
        }
    }

    /// Settings that change the result and that the recipe cannot express.
    fn refuse_unsupported(&self) -> Result<(), Error> {
        let metadata = &self.gguf.metadata;
        if let Some(experts) = self.number("expert_count")?
            && experts > 0
        {
            let reason = "mixtures of experts are not supported".to_owned();
            return Err(self.refuse("expert_count", reason));
        }
        for name in [
            "logit_scale",
            "embedding_scale",
            "residual_scale",
            "attention.scale",
        ] {
            if let Some(scale) = metadata.f64_opt(&self.full(name))?
                && scale != 0.0
            {
                return Err(self.refuse(name, format!("{scale} is not supported")));
            }
        }
        if metadata.bool_opt(&self.full("attention.causal"))? == Some(false) {
            let reason = "attention to later tokens is not supported".to_owned();
            return Err(self.refuse("attention.causal", reason));
        }
        Ok(())
    }

    /// Rows of the embedding table, which tokenizer and metadata have to agree with.
    fn vocab(&self) -> Result<usize, Error> {
        let table = self.gguf.require_tensor(TABLE)?;
        let rows = table.dims.get(1).copied().unwrap_or(1);
        let tokens = self.gguf.metadata.array_opt("tokenizer.ggml.tokens")?;
        let claims = [
            (
                "tokenizer.ggml.tokens".to_owned(),
                tokens.map(|tokens| tokens.len() as u64),
            ),
            (self.full("vocab_size"), self.number("vocab_size")?),
        ];
        for (key, claim) in claims {
            if let Some(claim) = claim
                && claim != rows
            {
                return Err(Error::KeyValue {
                    key: shown(&key),
                    reason: format!("vocabulary of {claim} tokens, but {TABLE} has {rows} rows"),
                });
            }
        }
        if rows > MAX_DIMENSION {
            return Err(table.fail(format!("{rows} rows are more than {MAX_DIMENSION}")));
        }
        Ok(rows as usize)
    }

    /// Factor by which positions are stretched uniformly.
    fn linear_rope_factor(&self) -> Result<f32, Error> {
        let kind = self
            .gguf
            .metadata
            .string_opt(&self.full("rope.scaling.type"))?;
        match kind {
            Some("none") => Ok(1.0),
            // The older key, and files with a factor and no type, mean linear scaling.
            None | Some("linear") => Ok(match self.factor("rope.scaling.factor")? {
                Some(factor) => factor,
                None => self.factor("rope.scale_linear")?.unwrap_or(1.0),
            }),
            Some(other) => {
                let reason = format!("{} is not supported: none and linear are", shown(other));
                Err(self.refuse("rope.scaling.type", reason))
            }
        }
    }
}

/// The divisors of the rotary frequencies: those of the file times the linear factor.
fn rope_divisors(keys: &GgufKeys<'_, '_>, head_dim: usize) -> Result<Option<Vec<f32>>, Error> {
    let factor = keys.linear_rope_factor()?;
    if keys.gguf.tensor(ROPE_DIVISORS).is_none() {
        return Ok((factor != 1.0).then(|| vec![factor; head_dim / 2]));
    }
    let weight = WeightRef {
        name: ROPE_DIVISORS.to_owned(),
        rows: 1,
        cols: head_dim / 2,
        kind: WeightKind::Vector,
        row_order: RowOrder::AsStored,
    };
    let mut divisors = weights::decode_vector(keys.gguf, &weight)?;
    for divisor in &mut divisors {
        *divisor *= factor;
        if !divisor.is_finite() || *divisor <= 0.0 {
            return Err(Error::Tensor {
                name: shown(ROPE_DIVISORS),
                reason: format!("{divisor} cannot divide a frequency"),
            });
        }
    }
    Ok(Some(divisors))
}
