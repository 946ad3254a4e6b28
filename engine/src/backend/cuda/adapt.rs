//! Ternary weights, which have no kernel here, in INT4: no number is lost on the way but by the f16 rounding
//! of scales that are no f16 numbers.

use models::quant::Weight;
use rayon::prelude::*;

use crate::Error;
use crate::backend::LoadedModel;

/// The model with its ternary matrices in INT4; `None` if it has none.
///
/// # Errors
/// [`Error::Input`] naming a tensor whose scales f16 does not hold.
pub(super) fn adapt(model: &LoadedModel) -> Result<Option<LoadedModel>, Error> {
    let ternary = |weight: &Weight| matches!(weight, Weight::Ternary(_));
    if !model.weights.iter().any(ternary) {
        return Ok(None);
    }
    let weights = model
        .weights
        .par_iter()
        .enumerate()
        .map(|(id, weight)| {
            let adapted = match weight {
                Weight::Ternary(matrix) => matrix.to_int4().map(Weight::Int4),
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
