//! Linear layer with ternary weights: the reference, with float activations, and the forms of the fast kernels.

use std::fmt;

use models::quant::TernaryMatrix;
use models::quant::ternary::{CELL_BYTES, CELL_WEIGHTS};

/// How ternary weights lie in memory, and with that what a single token's levels meet. All forms give the same
/// bits; which is fastest is measured (`cargo xtask tune --cpu`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Two bits a weight, multiplied.
    Multiply,
    /// Two bits a weight, the sums of pairs looked up in tables of the token ([`lookup`](super::lookup)).
    LookUp,
    /// Five weights a byte, 1.6 bits each, taken apart and multiplied.
    Fives,
}

impl Form {
    /// All of them.
    pub const ALL: [Form; 3] = [Form::Multiply, Form::LookUp, Form::Fives];

    /// Name as tables and the environment give it.
    pub fn name(self) -> &'static str {
        match self {
            Form::Multiply => "multiply",
            Form::LookUp => "lookup",
            Form::Fives => "fives",
        }
    }

    /// The one called `name`.
    ///
    /// # Errors
    /// A sentence that lists the names.
    pub fn named(name: &str) -> Result<Form, String> {
        let found = Form::ALL.into_iter().find(|form| form.name() == name);
        found.ok_or_else(|| {
            let names = Form::ALL.map(Form::name).join(", ");
            format!("`{name}` is no form of ternary weights, which are: {names}")
        })
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `y = w x + bias` for `x` `(t, k)` into `y` `(t, n)`; `bias` is `(n,)`.
///
/// # Panics
/// If a length does not fit the shape of `w`.
pub fn reference(w: &TernaryMatrix, bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    super::tokens(w.rows, w.cols, bias, x.len(), y.len());
    for (x, y) in x.chunks_exact(w.cols).zip(y.chunks_exact_mut(w.rows)) {
        for (row, y) in y.iter_mut().enumerate() {
            let mut sum = bias.map_or(0.0, |b| b[row] as f64);
            for (k, &x) in x.iter().enumerate() {
                let cell = row * w.cols / 4 + k / CELL_WEIGHTS * CELL_BYTES;
                let (byte, pair) = (k % CELL_BYTES, k % CELL_WEIGHTS / CELL_BYTES);
                let code = w.quants[cell + byte] >> (2 * pair) & 3;
                let scale = w.row_scales(row)[k / w.group] as f64;
                sum += scale * (code as f64 - 1.0) * x as f64;
            }
            *y = sum as f32;
        }
    }
}
