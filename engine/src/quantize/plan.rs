//! Which form each weight of a recipe takes.

use models::arch::hugging_face_name;
use std::collections::HashSet;

use models::file::container::{Layout, Pack, StoredWeight};
use models::recipe::{Recipe, Step, WeightKind};

use super::{Bits, Head, Options};
use crate::Error;
use crate::backend::KvForm;
use crate::backend::fuse::{self, Op};

/// The form of every weight, in the recipe's order.
///
/// # Errors
/// [`Error::Input`] if the options do not fit the model.
pub fn plan(recipe: &Recipe, options: &Options) -> Result<Vec<StoredWeight>, Error> {
    let head = recipe.steps.iter().find_map(|step| match step {
        Step::Logits { table, .. } => Some(*table),
        _ => None,
    });
    if recipe.config.tied && options.head == Head::Int4 {
        return Err(Error::input(
            "--lm-head int4: this model reads its embedding from the same table, which INT4 is too coarse for: use int8 or f16",
        ));
    }
    recipe
        .weights
        .iter()
        .enumerate()
        .map(|(id, weight)| {
            let name = hugging_face_name(&weight.name).ok_or_else(|| {
                Error::input(format!(
                    "tensor `{}` has no name in the container",
                    weight.name
                ))
            })?;
            Ok(StoredWeight {
                name,
                rows: weight.rows,
                cols: weight.cols,
                layout: layout(weight.kind, weight.cols, head == Some(id), options),
            })
        })
        .collect()
}

/// Which INT4 matrices share tiles: those that one kernel of a GPU takes together.
pub fn packs(recipe: &Recipe, planned: &[StoredWeight]) -> Vec<Pack> {
    let fused = fuse::fuse(recipe, KvForm::default(), &|id| planned.get(id)?.int4());
    let mut packed = HashSet::new();
    let mut packs = Vec::new();
    for op in fused.ops {
        let Op::Product(product) = op else { continue };
        // A matrix of several products is packed for the first.
        if product.matrices.iter().all(|id| !packed.contains(id)) {
            packed.extend(product.matrices.iter().copied());
            let members = product.matrices.iter().map(|&id| planned[id].name.clone());
            packs.push(Pack::new(
                product.order(recipe.config.head_dim),
                members.collect(),
            ));
        }
    }
    packs
}

fn layout(kind: WeightKind, cols: usize, is_head: bool, options: &Options) -> Layout {
    let group = options.group.min(cols);
    let int4 = Layout::Int4 {
        group: options.group,
        form: options.form,
    };
    match kind {
        WeightKind::Vector => Layout::F32,
        WeightKind::Linear => match options.bits {
            Bits::Four => int4,
            Bits::Eight => Layout::Int8 { group },
            // A scale a row: models that are ternary were trained with one a tensor.
            Bits::Ternary => Layout::Ternary { group: cols },
        },
        WeightKind::Embedding | WeightKind::FloatTable => match (is_head, options.head) {
            (true, Head::Int4) => int4,
            (true, Head::F16) => Layout::F16,
            _ => Layout::Int8 { group: cols },
        },
    }
}

#[cfg(test)]
mod tests {
    use models::file::container::Writer;
    use models::file::gguf::Gguf;
    use models::quant::Int4Form;
    use models::synthetic;

    use super::super::Method;
    use super::*;

    fn options(head: Head) -> Options {
        Options {
            bits: Bits::Four,
            group: 128,
            form: Int4Form::Symmetric,
            method: Method::Rtn,
            head,
        }
    }

    fn recipe(shape: &str) -> Recipe {
        let shape = synthetic::shape(shape).expect("known");
        let bytes = synthetic::to_vec(shape, &synthetic::Options::default()).expect("made");
        models::arch::recipe(&Gguf::parse(&bytes).expect("parsed")).expect("a recipe")
    }

    #[test]
    fn the_output_table_takes_the_form_asked_for_where_it_can() {
        let layout_of = |shape: &str, head, name: &str| {
            let planned = plan(&recipe(shape), &options(head))?;
            let found = planned.iter().find(|stored| stored.name == name);
            Ok::<_, Error>(found.expect("planned").layout)
        };
        let table = "model.embed_tokens.weight";
        let rows = Layout::Int8 { group: 64 };
        assert_eq!(layout_of("tiny", Head::Int8, table).unwrap(), rows);
        assert_eq!(layout_of("tiny", Head::F16, table).unwrap(), Layout::F16);
        assert_eq!(
            layout_of("tiny", Head::Int4, table)
                .unwrap_err()
                .exit_code(),
            2
        );
        assert_eq!(layout_of("tiny-qwen2", Head::F16, table).unwrap(), rows);
        let head = layout_of("tiny-qwen2", Head::Int4, "lm_head.weight").unwrap();
        assert!(matches!(head, Layout::Int4 { group: 128, .. }));
    }

    #[test]
    fn a_model_of_1_5_billion_weights_stays_below_0_93_gigabytes() {
        // The shape's own weight list, from one layer of it: no gigabyte is made.
        let shape = synthetic::shape("qwen2.5-1.5b").expect("known");
        let (rows, cols, ffn) = (shape.vocab, shape.width, shape.ffn);
        let keys = shape.kv_heads * shape.head_dim;
        let mut writer = Writer::new();
        // A tokenizer of this vocabulary as its JSON is escaped: 11 MB.
        writer.text("tokenizer.json", "x".repeat(11_000_000));
        let mut put = |name: String, kind, rows, cols, is_head| {
            writer.weight(StoredWeight {
                name,
                rows,
                cols,
                layout: layout(kind, cols, is_head, &options(Head::Int8)),
            });
        };
        put("table".to_owned(), WeightKind::Embedding, rows, cols, true);
        for layer in 0..shape.layers {
            for (name, rows, cols) in [
                ("q", cols, cols),
                ("k", keys, cols),
                ("v", keys, cols),
                ("o", cols, cols),
                ("gate", ffn, cols),
                ("up", ffn, cols),
                ("down", cols, ffn),
            ] {
                put(
                    format!("{layer}.{name}"),
                    WeightKind::Linear,
                    rows,
                    cols,
                    false,
                );
            }
            for (name, len) in [
                ("n1", cols),
                ("n2", cols),
                ("bq", cols),
                ("bk", keys),
                ("bv", keys),
            ] {
                put(format!("{layer}.{name}"), WeightKind::Vector, 1, len, false);
            }
        }
        put("norm".to_owned(), WeightKind::Vector, 1, cols, false);
        let bytes = writer.file_bytes().expect("a size");
        assert!(bytes <= 930_000_000, "{bytes} bytes");
        assert!(bytes >= 900_000_000, "{bytes} bytes: something is missing");
    }
}
