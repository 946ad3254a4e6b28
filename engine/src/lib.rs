//! EdgeLLM's engine: the only crate that talks to the outside. Flags come in through the `edgellm`
//! binary, tokens move through a [`backend::Backend`], text goes out.

pub mod backend;
mod error;

pub use error::Error;
