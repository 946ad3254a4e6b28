//! The weights of a model as the calls read them.

use std::sync::Arc;

use cpu_kernels::linear::Packed;
use cpu_kernels::linear::ternary::Form;
use models::quant::Weight;
use models::recipe::Recipe;
use rayon::prelude::*;

use super::super::LoadedModel;

/// A weight as the calls read it.
pub(super) enum Operand {
    Matrix(Packed),
    Vector(Vec<f32>),
}

/// Lays all matrices out for the kernels, those of ternary weights in `forms`, by weight; each is freed as soon
/// as it is, if nobody else holds the model.
pub(super) fn operands(model: Arc<LoadedModel>, forms: &[Form]) -> (Recipe, Vec<Operand>) {
    let pack = |weight: &Weight, form: Form| match weight {
        Weight::Ternary(w) => Operand::Matrix(Packed::ternary_as(w, form)),
        matrix => Operand::Matrix(Packed::new(matrix).expect("no vector")),
    };
    match Arc::try_unwrap(model) {
        Ok(model) => {
            let own = |(weight, form)| match weight {
                Weight::Vector(vector) => Operand::Vector(vector),
                matrix => pack(&matrix, form),
            };
            let weights = model.weights.into_par_iter().zip(forms.par_iter().copied());
            (model.recipe, weights.map(own).collect())
        }
        Err(shared) => {
            let copy = |(weight, form): (&Weight, &Form)| match weight {
                Weight::Vector(vector) => Operand::Vector(vector.clone()),
                matrix => pack(matrix, *form),
            };
            let weights = shared.weights.par_iter().zip(forms);
            (shared.recipe.clone(), weights.map(copy).collect())
        }
    }
}
