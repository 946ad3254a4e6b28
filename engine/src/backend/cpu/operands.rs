//! The weights of a model as the calls read them.

use std::cmp::Reverse;
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

/// Lays all matrices out for the kernels, those of ternary weights in `forms`, by weight. If nobody else holds the
/// model, its own memory is given back meanwhile, of a matrix piece by piece, of a file after each matrix: little
/// is ever there twice. The largest comes first, when least else is there.
pub(super) fn operands(model: Arc<LoadedModel>, forms: &[Form]) -> (Recipe, Vec<Operand>) {
    let pack = |weight: Weight, form: Form| match weight {
        Weight::Vector(vector) => Operand::Vector(vector),
        Weight::Ternary(w) => Operand::Matrix(Packed::ternary_as(w, form)),
        matrix => Operand::Matrix(Packed::new(matrix).expect("no vector")),
    };
    match Arc::try_unwrap(model) {
        Ok(LoadedModel {
            recipe,
            weights,
            file,
        }) => {
            let mut weights: Vec<(usize, Weight)> = weights.into_iter().enumerate().collect();
            weights.sort_by_key(|(_, weight)| Reverse(weight.bytes()));
            let mut operands: Vec<(usize, Operand)> = weights
                .into_par_iter()
                .map(|(i, weight)| {
                    let operand = pack(weight, forms[i]);
                    if let Some(file) = &file {
                        file.release();
                    }
                    (i, operand)
                })
                .collect();
            operands.sort_by_key(|(i, _)| *i);
            (
                recipe,
                operands.into_iter().map(|(_, operand)| operand).collect(),
            )
        }
        Err(shared) => {
            let weights = shared.weights.par_iter().cloned().zip(forms);
            let operands = weights.map(|(weight, form)| pack(weight, *form)).collect();
            (shared.recipe.clone(), operands)
        }
    }
}
