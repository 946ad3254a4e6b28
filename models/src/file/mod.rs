//! Model file formats: bytes -> metadata and a tensor table. Every length is checked before use.

pub mod container;
pub mod gguf;
