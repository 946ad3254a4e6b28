//! Which rows a command line means, and which variant each is.

use engine::Error;
use gpu_kernels::variant::{INT4_GEMV, Variant};

use crate::models::{self, Model};
use crate::rows::{self, Row, Tiled};

/// Kernels that compute the same thing.
struct Family {
    /// What their names begin with.
    prefix: &'static str,
    /// What the others are compared with.
    baseline: &'static str,
    /// Those with a number.
    variants: &'static [Variant],
}

/// The seven INT4 matrices of the targets: q and o, gate and up, down of Qwen2.5-1.5B; the same of
/// Llama 8B; a vocabulary.
pub const SEVEN: [(usize, usize); 7] = [
    (1536, 1536),
    (8960, 1536),
    (1536, 8960),
    (4096, 4096),
    (14_336, 4096),
    (4096, 14_336),
    (151_936, 1536),
];

const FAMILIES: &[Family] = &[
    Family {
        prefix: "linear_gemv_int4",
        baseline: "linear_gemv_int4_baseline",
        variants: INT4_GEMV,
    },
    Family {
        prefix: "attention_",
        baseline: "attention_decode_f16",
        variants: &[],
    },
];

fn family(kernel: &str) -> Option<&'static Family> {
    FAMILIES
        .iter()
        .find(|family| kernel.starts_with(family.prefix))
}

/// The kernel that `kernel` is compared with: itself where it is the baseline, `None` where the
/// operation has one kernel only.
pub fn baseline(kernel: &str) -> Option<&'static str> {
    family(kernel).map(|family| family.baseline)
}

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Part of a kernel's name; empty for all.
    pub kernel: String,
    /// Rows and columns of a matrix.
    pub shape: Option<(usize, usize)>,
    /// Name of a model: its matrices, logits and attention.
    pub model: Option<String>,
    /// Number or name of a variant.
    pub variant: Option<String>,
    /// Weights that share a scale, for `shape` and `model`.
    pub group: usize,
    /// Whether the format has minima, likewise.
    pub mins: bool,
}

/// `NxK`, as in `8960x1536`.
///
/// # Errors
/// What is wrong with the text.
pub fn parse_shape(text: &str) -> Result<(usize, usize), String> {
    let (n, k) = text
        .split_once(['x', 'X'])
        .ok_or("a shape is rows x columns, as in 8960x1536")?;
    let number = |text: &str| {
        let text = text.trim();
        match text.parse::<usize>() {
            Ok(value @ 1..=1_000_000) => Ok(value),
            _ => Err(format!("`{text}` is not in 1..=1000000")),
        }
    };
    Ok((number(n)?, number(k)?))
}

impl Model {
    fn rows(&self, group: usize, mins: bool) -> Vec<Row> {
        let mut rows: Vec<Row> = Vec::new();
        for (n, k) in self.matrices() {
            rows.extend(rows::matrix(n, k, group, mins));
        }
        for product in self.products() {
            rows.push(rows::gemv_int4_mma(&Tiled::of(&product, group, mins)));
        }
        rows.push(rows::output_matrix(self.vocab, self.width));
        for context in [512, 4096, 16_384] {
            rows.extend(rows::attention_over(
                self.heads,
                self.kv_heads,
                self.head_dim,
                context,
            ));
        }
        rows
    }
}

/// The number of a variant, or its part of the kernel's name.
fn is_variant(kernel: &str, variant: &str) -> bool {
    match variant.parse::<u32>() {
        Ok(id) => family(kernel)
            .into_iter()
            .flat_map(|family| family.variants)
            .any(|known| known.kernel == kernel && known.id.0 == id),
        Err(_) => format!("{kernel}_").contains(&format!("_{variant}_")),
    }
}

impl Selection {
    /// Whether `kernel` is asked for.
    pub fn takes(&self, kernel: &str) -> bool {
        kernel.contains(&self.kernel)
            && self
                .variant
                .as_deref()
                .is_none_or(|variant| is_variant(kernel, variant))
    }

    /// The rows that are asked for, and the baselines that they are compared with: rows of one shape
    /// stand together, the baseline first.
    ///
    /// # Errors
    /// [`Error::Input`] for an unknown model, or where nothing is left.
    pub fn rows(&self) -> Result<Vec<Row>, Error> {
        let mut rows = match (&self.model, self.shape) {
            (Some(name), _) => models::named(name)?
                .iter()
                .flat_map(|model| model.rows(self.group, self.mins))
                .collect(),
            (None, Some((n, k))) => {
                let listed: Vec<Row> = rows::all()
                    .into_iter()
                    .filter(|row| of_shape(row, n, k))
                    .collect();
                if listed.iter().any(|row| self.takes(row.kernel)) {
                    listed
                } else {
                    rows::matrix(n, k, self.group, self.mins)
                }
            }
            (None, None) => rows::all(),
        };
        if let (Some(_), Some((n, k))) = (&self.model, self.shape) {
            rows.retain(|row| of_shape(row, n, k));
        }
        let wanted: Vec<(&str, String)> = rows
            .iter()
            .filter(|row| self.takes(row.kernel))
            .map(|row| (row.kernel, row.shape.clone()))
            .collect();
        if wanted.is_empty() {
            return Err(Error::input(format!(
                "nothing to time matches; kernels: {}",
                names(&rows).join(", ")
            )));
        }
        rows.retain(|row| {
            wanted.iter().any(|(kernel, shape)| {
                *shape == row.shape
                    && (row.kernel == *kernel || baseline(kernel) == Some(row.kernel))
            })
        });
        let mut order: Vec<String> = Vec::new();
        for row in &rows {
            if !order.contains(&row.shape) {
                order.push(row.shape.clone());
            }
        }
        rows.sort_by_key(|row| {
            (
                order.iter().position(|shape| *shape == row.shape),
                baseline(row.kernel).unwrap_or(row.kernel),
                baseline(row.kernel) != Some(row.kernel),
            )
        });
        rows.dedup_by(|a, b| a.kernel == b.kernel && a.shape == b.shape);
        Ok(rows)
    }
}

fn of_shape(row: &Row, n: usize, k: usize) -> bool {
    let shape = format!("{n} x {k}");
    row.shape
        .strip_prefix(&shape)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
}

fn names(rows: &[Row]) -> Vec<&'static str> {
    let mut names: Vec<_> = rows.iter().map(|row| row.kernel).collect();
    names.sort_unstable();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(selection: &Selection) -> Vec<String> {
        let rows = selection.rows().expect("rows");
        rows.iter()
            .map(|row| format!("{} {}", row.kernel, row.shape))
            .collect()
    }

    #[test]
    fn shapes_are_parsed() {
        assert_eq!(parse_shape("8960x1536"), Ok((8960, 1536)));
        assert_eq!(parse_shape("7 x 32"), Ok((7, 32)));
        for wrong in ["8960", "0x32", "x", "1x-1", "2000000x32"] {
            assert!(parse_shape(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn everything_is_the_default() {
        let rows = Selection::default().rows().expect("rows");
        assert_eq!(rows.len(), rows::all().len());
    }

    #[test]
    fn a_variant_brings_its_baseline() {
        let selection = Selection {
            shape: Some((8960, 1536)),
            variant: Some("multirow".into()),
            kernel: "int4".into(),
            group: 128,
            ..Selection::default()
        };
        let by_name = shown(&selection);
        assert_eq!(
            by_name,
            [
                "linear_gemv_int4_baseline 8960 x 1536 group 128",
                "linear_gemv_int4_multirow 8960 x 1536 group 128"
            ]
        );
        let by_number = Selection {
            variant: Some("2".into()),
            ..selection
        };
        assert_eq!(shown(&by_number), by_name);
    }

    #[test]
    fn a_shape_that_is_not_listed_is_made() {
        let selection = Selection {
            kernel: "linear_gemv_int4".into(),
            shape: Some((193, 96)),
            group: 32,
            ..Selection::default()
        };
        assert!(
            shown(&selection).contains(&"linear_gemv_int4_multirow 193 x 96 group 32".to_owned())
        );
    }

    #[test]
    fn models_have_their_matrices() {
        for name in models::names() {
            let selection = Selection {
                model: Some(name.into()),
                group: 32,
                ..Selection::default()
            };
            assert!(selection.rows().expect("rows").len() > 8, "{name}");
        }
        let selection = Selection {
            model: Some("qwen2.5-1.5b".into()),
            group: 128,
            ..Selection::default()
        };
        let rows = shown(&selection);
        for wanted in [
            "linear_gemv_int4_multirow 256 x 1536 group 128",
            "linear_gemv_int4_multirow 1536 x 8960 group 128",
            "logits_int8_by_row 151936 x 1536 group 1536",
        ] {
            assert!(rows.iter().any(|row| row == wanted), "{wanted}: {rows:?}");
        }
        let unknown = Selection {
            model: Some("gpt".into()),
            ..Selection::default()
        };
        assert_eq!(unknown.rows().err().map(|e| e.exit_code()), Some(2));
    }

    #[test]
    fn nothing_left_is_an_error() {
        let selection = Selection {
            kernel: "no such".into(),
            ..Selection::default()
        };
        assert!(selection.rows().is_err());
    }
}
