//! Architectures: model configuration -> [`Recipe`]. One file each.

pub mod bitnet;
mod config;
mod decoder;
pub mod llama;
mod names;
pub mod qwen2;
pub mod qwen3;

pub use config::{Config, Stretch, Window, WindowLayers};
pub(crate) use config::{Field, Keys, MAX_DIMENSION, positive, read};
pub use names::hugging_face_name;

use decoder::Family;

use crate::Error;
use crate::error::shown;
use crate::file::Source;
use crate::recipe::Recipe;

/// One row of the registry.
#[derive(Debug, Clone, Copy)]
pub struct Architecture {
    /// Name in [`Config::architecture`].
    pub name: &'static str,
    /// Names in `general.architecture` of GGUF files.
    pub gguf: &'static [&'static str],
    /// Names in `model_type` of `config.json`.
    pub hugging_face: &'static [&'static str],
    /// How its decoder differs from the others.
    pub(crate) family: Family,
}

/// Every architecture that can run.
pub const ARCHITECTURES: &[Architecture] = &[
    llama::ARCHITECTURE,
    qwen2::ARCHITECTURE,
    qwen3::ARCHITECTURE,
    bitnet::ARCHITECTURE,
];

/// Metadata key of the architecture's name in GGUF files.
pub const ARCHITECTURE_KEY: &str = "general.architecture";

/// The architecture with this name in the format whose names `names` picks.
///
/// # Errors
/// An unknown name; the message lists the known ones.
pub(crate) fn find(
    name: &str,
    names: fn(&Architecture) -> &'static [&'static str],
) -> Result<&'static Architecture, Error> {
    ARCHITECTURES
        .iter()
        .find(|a| names(a).contains(&name))
        .ok_or_else(|| Error::UnknownArchitecture {
            found: shown(name),
            known: ARCHITECTURES
                .iter()
                .flat_map(|a| names(a).iter().copied())
                .collect::<Vec<_>>()
                .join(", "),
        })
}

/// Makes the recipe of a model.
///
/// # Errors
/// An unknown architecture; a configuration that is missing, out of range or asks for something that
/// the recipe cannot express; tensors that are missing, unknown or have another shape than the
/// configuration says. Every message names the key or tensor.
pub fn recipe(source: &dyn Source) -> Result<Recipe, Error> {
    let config = source.config()?;
    let known = ARCHITECTURES.iter().find(|a| a.name == config.architecture);
    match known {
        Some(architecture) => decoder::recipe(source, config, &architecture.family),
        None => Err(Error::UnknownArchitecture {
            found: shown(&config.architecture),
            known: ARCHITECTURES
                .iter()
                .map(|a| a.name)
                .collect::<Vec<_>>()
                .join(", "),
        }),
    }
}
