//! Weight formats: block layout, encode, decode. One file a format.

pub mod int4;
pub mod int8;

pub use int4::Int4Matrix;
pub use int8::Int8Matrix;

/// A decoded tensor in the form that kernels read.
#[derive(Debug, Clone, PartialEq)]
pub enum Weight {
    /// 4-bit matrix.
    Int4(Int4Matrix),
    /// 8-bit matrix.
    Int8(Int8Matrix),
    /// Float vector.
    Vector(Vec<f32>),
}
