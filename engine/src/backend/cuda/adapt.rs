//! Weights whose form has no kernel here in one that has: no number is lost on the way but by the f16
//! rounding of ternary scales that are no f16 numbers.

use models::quant::Weight;
use rayon::prelude::*;

use crate::Error;
use crate::backend::LoadedModel;

/// The model with ternary matrices in INT4 and INT4 matrices with zeros in INT8; `None` if it has none.
///
/// # Errors
/// [`Error::Input`] naming a tensor whose scales f16 does not hold.
pub(super) fn adapt(model: &LoadedModel) -> Result<Option<LoadedModel>, Error> {
    let adapts = |weight: &Weight| match weight {
        Weight::Ternary(_) => true,
        Weight::Int4(matrix) => matrix.zeros,
        _ => false,
    };
    if !model.weights.iter().any(adapts) {
        return Ok(None);
    }
    let weights = model
        .weights
        .par_iter()
        .enumerate()
        .map(|(id, weight)| {
            let adapted = match weight {
                Weight::Ternary(matrix) => matrix.to_int4().map(Weight::Int4),
                Weight::Int4(matrix) if matrix.zeros => matrix.zeros_to_int8().map(Weight::Int8),
                other => Ok(other.clone()),
            };
            adapted.map_err(|error| {
                let name = model.recipe.weights.get(id).map_or("?", |w| &w.name);
                Error::Input(format!("tensor {name}: {error}"))
            })
        })
        .collect::<Result<_, _>>()?;
    Ok(Some(LoadedModel {
        recipe: model.recipe.clone(),
        weights,
    }))
}
