//! The models whose matrices are timed and tuned.

use engine::Error;
use gpu_kernels::linear::gemv_int4_mma::Epilogue;
use models::synthetic;

/// Dimensions of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Model {
    /// D.
    pub width: usize,
    /// H.
    pub heads: usize,
    /// KV.
    pub kv_heads: usize,
    /// Dh.
    pub head_dim: usize,
    /// F.
    pub ffn: usize,
    /// V.
    pub vocab: usize,
}

/// Models that are timed but not made with random weights: their files are large.
const LARGE: [(&str, Model); 3] = [
    (
        "qwen2.5-7b",
        Model {
            width: 3584,
            heads: 28,
            kv_heads: 4,
            head_dim: 128,
            ffn: 18_944,
            vocab: 152_064,
        },
    ),
    (
        "llama-3.2-3b",
        Model {
            width: 3072,
            heads: 24,
            kv_heads: 8,
            head_dim: 128,
            ffn: 8192,
            vocab: 128_256,
        },
    ),
    (
        "llama-3.1-8b",
        Model {
            width: 4096,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            ffn: 14_336,
            vocab: 128_256,
        },
    ),
];

/// Stands for all of them.
pub const ALL: &str = "all";

/// A matrix as a decoder layer meets it, with what is fused to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Product {
    /// N: outputs.
    pub rows: usize,
    /// K.
    pub cols: usize,
    /// Whether an RMSNorm comes first.
    pub norm: bool,
    /// What becomes of the product.
    pub epilogue: Epilogue,
    /// Whether x are halves: the gated activations are.
    pub half_x: bool,
    /// Whether y are halves.
    pub half_y: bool,
}

fn known() -> Vec<(&'static str, Model)> {
    let small = synthetic::SHAPES
        .iter()
        .filter(|shape| !LARGE.iter().any(|(name, _)| *name == shape.name))
        .map(|shape| {
            let model = Model {
                width: shape.width,
                heads: shape.heads,
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
                ffn: shape.ffn,
                vocab: shape.vocab,
            };
            (shape.name, model)
        });
    small.chain(LARGE).collect()
}

/// Whether the model is too small to say anything of speed.
pub fn is_tiny(name: &str) -> bool {
    name.starts_with("tiny")
}

/// Names that `--model` takes.
pub fn names() -> Vec<&'static str> {
    let known = known().into_iter().map(|(name, _)| name);
    known.chain([ALL]).collect()
}

/// The model of a name, or every one.
///
/// # Errors
/// [`Error::Input`] for a name that is not among [`names`].
pub fn named(name: &str) -> Result<Vec<Model>, Error> {
    let found: Vec<Model> = known()
        .into_iter()
        .filter(|(known, _)| name == ALL || *known == name)
        .map(|(_, model)| model)
        .collect();
    if found.is_empty() {
        let names = names().join(", ");
        return Err(Error::input(format!(
            "no model `{name}`; known are {names}"
        )));
    }
    Ok(found)
}

impl Model {
    fn query(&self) -> usize {
        self.heads * self.head_dim
    }

    fn key(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The matrices of a layer, `(N, K)`: q; k and v; o; gate and up; down.
    pub fn matrices(&self) -> [(usize, usize); 5] {
        [
            (self.query(), self.width),
            (self.key(), self.width),
            (self.width, self.query()),
            (self.ffn, self.width),
            (self.width, self.ffn),
        ]
    }

    /// The fused products of a layer: norm, q, k and v; o and residual; norm, gate, up and SwiGLU;
    /// down and residual.
    pub fn products(&self) -> [Product; 4] {
        let product = |rows, cols, norm, epilogue| Product {
            rows,
            cols,
            norm,
            epilogue,
            half_x: false,
            half_y: false,
        };
        [
            product(
                self.query() + 2 * self.key(),
                self.width,
                true,
                Epilogue::Store,
            ),
            product(self.width, self.query(), false, Epilogue::Add),
            Product {
                half_y: true,
                ..product(self.ffn, self.width, true, Epilogue::SwiGlu)
            },
            Product {
                half_x: true,
                ..product(self.width, self.ffn, false, Epilogue::Add)
            },
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_have_dimensions() {
        let names = names();
        for (i, name) in names.iter().enumerate() {
            assert!(!names[..i].contains(name), "{name} twice");
            let models = named(name).expect("a model");
            assert_eq!(models.len(), if *name == ALL { names.len() - 1 } else { 1 });
        }
        assert_eq!(named("gpt").err().map(|error| error.exit_code()), Some(2));
    }

    #[test]
    fn products_hold_the_weights_of_the_matrices() {
        for model in named(ALL).expect("models") {
            let [q, kv, o, up, down] = model.matrices().map(|(n, k)| n * k);
            let weights = |product: &Product| {
                let gated = product.epilogue == Epilogue::SwiGlu;
                product.rows * product.cols * if gated { 2 } else { 1 }
            };
            let [qkv, out, gated, last] = model.products();
            assert_eq!(weights(&qkv), q + 2 * kv);
            assert_eq!(weights(&out), o);
            assert_eq!(weights(&gated), 2 * up);
            assert_eq!(weights(&last), down);
        }
    }
}
