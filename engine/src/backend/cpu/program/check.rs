//! Whether a recipe and its weights fit each other.

use models::quant::Weight;
use models::recipe::{Buffer, Recipe, Step, WeightId};

use super::LoadedModel;
use crate::Error;

/// Weights of the right kind and shape, so that no kernel meets a surprise while the team runs.
pub(super) fn check(model: &LoadedModel, step: &Step) -> Result<(), Error> {
    let recipe = &model.recipe;
    let name = |id: WeightId| recipe.weights.get(id).map_or("?", |w| w.name.as_str());
    let fail = |id: WeightId, wanted: String| {
        Err(Error::input(format!("tensor {:?}: not {wanted}", name(id))))
    };
    let vector = |id: WeightId, len: usize| match model.weights.get(id) {
        Some(Weight::Vector(v)) if v.len() == len => Ok(()),
        _ => fail(id, format!("a vector of {len}")),
    };
    let matrix = |id: WeightId, rows: usize, cols: usize| match model.weights.get(id) {
        Some(weight) if !matches!(weight, Weight::Vector(_)) && weight.shape() == (rows, cols) => {
            Ok(())
        }
        _ => fail(id, format!("a ({rows}, {cols}) matrix")),
    };
    let same = |what: &str, elems: &[usize]| {
        if elems.windows(2).all(|pair| pair[0] == pair[1]) {
            return Ok(());
        }
        Err(Error::input(format!(
            "recipe: buffers of a {what} step differ in length"
        )))
    };
    let apart = |src: &Buffer, dst: &Buffer| match src == dst {
        true => Err(Error::input("recipe: a norm step onto its own source")),
        false => Ok(()),
    };
    let config = &recipe.config;
    let elems = |buffer: &Buffer| recipe.elems(*buffer);
    match step {
        Step::Embed { table, dst } => match model.weights.get(*table) {
            Some(Weight::Int8(m)) if m.rows >= config.vocab && m.cols == elems(dst) => Ok(()),
            Some(Weight::F16(m)) if m.rows >= config.vocab && m.cols == elems(dst) => Ok(()),
            _ => fail(
                *table,
                format!("an INT8 or F16 table ({}, {})", config.vocab, elems(dst)),
            ),
        },
        Step::RmsNorm {
            weight, src, dst, ..
        } => {
            same("norm", &[elems(src), elems(dst)])?;
            apart(src, dst)?;
            vector(*weight, elems(dst))
        }
        Step::HeadNorm {
            weight,
            buffer,
            heads,
            ..
        } => {
            same("head norm", &[elems(buffer), heads * config.head_dim])?;
            vector(*weight, config.head_dim)
        }
        Step::RoundToInt8 { .. } => Ok(()),
        Step::Linear {
            weight,
            bias,
            src,
            dst,
        } => {
            matrix(*weight, elems(dst), elems(src))?;
            bias.map_or(Ok(()), |bias| vector(bias, elems(dst)))
        }
        Step::Logits { table, src, dst } => matrix(*table, elems(dst), elems(src)),
        Step::Rope { buffer, heads } => {
            same("rope", &[elems(buffer), heads * config.head_dim])?;
            same("rope", &[config.head_dim % 2, 0])
        }
        Step::KvAppend { layer, key, value } => {
            let elems = [elems(key), elems(value), config.kv_heads * config.head_dim];
            same("cache", &elems)?;
            check_layer(recipe, *layer)
        }
        Step::Attention {
            layer, query, dst, ..
        } => {
            same(
                "attention",
                &[elems(query), elems(dst), config.heads * config.head_dim],
            )?;
            check_layer(recipe, *layer)
        }
        Step::SwiGlu { gate, up, dst } | Step::ReluSquaredGlu { gate, up, dst } => {
            same("gate", &[elems(gate), elems(up), elems(dst)])
        }
        Step::Add { src, dst } => same("residual", &[elems(src), elems(dst)]),
    }
}

fn check_layer(recipe: &Recipe, layer: usize) -> Result<(), Error> {
    let c = &recipe.config;
    if layer >= c.layers || c.kv_heads == 0 || !c.heads.is_multiple_of(c.kv_heads) {
        return Err(Error::input(format!(
            "recipe: layer {layer} of {} with {} heads over {} key/value heads",
            c.layers, c.heads, c.kv_heads
        )));
    }
    Ok(())
}
