//! Logits: the INT8 vocabulary matrix `(v, d)` times the last hidden state.
//! The same arithmetic as [`crate::linear::int8`].

pub use crate::linear::int8::reference;
