//! Models of random weights in memory, to measure speed.

use models::file::gguf::{DType, Gguf};
use models::synthetic::{self, Options};
use rayon::prelude::*;

use crate::Error;
use crate::backend::LoadedModel;

/// A GGUF file of the shape called `name`, its linear layers of type `linear`, trained (in a manner of
/// speaking) for `context` tokens at least.
///
/// # Errors
/// [`Error::Input`] for an unknown name, or a type that the shape does not allow.
pub fn file(name: &str, context: usize, linear: DType) -> Result<Vec<u8>, Error> {
    let options = Options {
        linear,
        ..Options::default()
    };
    let mut shape = synthetic::shape(name)?.clone();
    // A file says it in 32 bits.
    shape.context = shape.context.max(context).min(u32::MAX as usize);
    Ok(synthetic::to_vec(&shape, &options)?)
}

/// The model of such a file.
///
/// # Errors
/// As [`file`].
pub fn load(name: &str, context: usize, linear: DType) -> Result<LoadedModel, Error> {
    let bytes = file(name, context, linear)?;
    let file = Gguf::parse(&bytes)?;
    let recipe = models::arch::recipe(&file)?;
    let weights = recipe
        .weights
        .par_iter()
        .map(|weight| models::weights::decode(&file, weight))
        .collect::<Result<_, _>>()?;
    Ok(LoadedModel::new(recipe, weights))
}
