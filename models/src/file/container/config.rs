//! The configuration in a container goes through the checks that every other format's does.

use super::CONFIG_KEY;
use crate::Error;
use crate::arch::{self, Config, Field, Keys, MAX_DIMENSION, WindowLayers};
use crate::error::shown;

struct StoredKeys<'a>(&'a Config);

impl Keys for StoredKeys<'_> {
    fn key(&self, field: Field) -> String {
        let name = match field {
            Field::Layers => "layers",
            Field::Width => "width",
            Field::Ffn => "ffn",
            Field::Heads => "heads",
            Field::KvHeads => "kv_heads",
            Field::HeadDim => "head_dim",
            Field::Context => "context",
            Field::RopeTheta => "rope_theta",
            Field::NormEps => "norm_eps",
        };
        format!("{CONFIG_KEY}.{name}")
    }

    fn integer(&self, field: Field) -> Result<Option<u64>, Error> {
        let value = match field {
            Field::Layers => self.0.layers,
            Field::Width => self.0.width,
            Field::Ffn => self.0.ffn,
            Field::Heads => self.0.heads,
            Field::KvHeads => self.0.kv_heads,
            Field::HeadDim => self.0.head_dim,
            Field::Context => self.0.context,
            Field::RopeTheta | Field::NormEps => return Ok(None),
        };
        Ok(Some(value as u64))
    }

    fn float(&self, field: Field) -> Result<Option<f64>, Error> {
        Ok(match field {
            Field::RopeTheta => Some(self.0.rope_theta.into()),
            Field::NormEps => Some(self.0.norm_eps.into()),
            _ => None,
        })
    }
}

/// The configuration if it is one.
pub(super) fn checked(stored: Config) -> Result<Config, Error> {
    let fail = |name: &str, reason: String| Error::KeyValue {
        key: shown(&format!("{CONFIG_KEY}.{name}")),
        reason,
    };
    if stored.vocab == 0 || stored.vocab as u64 > MAX_DIMENSION {
        let reason = format!("{} is not between 1 and {MAX_DIMENSION}", stored.vocab);
        return Err(fail("vocab", reason));
    }
    let checked = arch::read(&StoredKeys(&stored), &stored.architecture, stored.vocab)?;
    if let Some(window) = &stored.window {
        if window.tokens == 0 {
            return Err(fail("window.tokens", "0 tokens see nothing".to_owned()));
        }
        if let WindowLayers::Listed(layers) = &window.layers
            && layers.len() != checked.layers
        {
            let reason = format!("{} for {} layers", layers.len(), checked.layers);
            return Err(fail("window.layers", reason));
        }
    }
    if let Some(divisors) = &stored.rope_divisors {
        if divisors.len() != checked.head_dim / 2 {
            let reason = format!(
                "{} numbers for heads of {}",
                divisors.len(),
                checked.head_dim
            );
            return Err(fail("rope_divisors", reason));
        }
        if let Some(bad) = divisors.iter().find(|d| !d.is_finite() || **d <= 0.0) {
            return Err(fail(
                "rope_divisors",
                format!("{bad} cannot divide a frequency"),
            ));
        }
    }
    Ok(stored)
}
