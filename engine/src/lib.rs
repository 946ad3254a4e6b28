//! EdgeLLM's engine: the only crate that talks to the outside. Flags come in through the `edgellm`
//! binary, tokens move through a [`backend::Backend`], text goes out.

pub mod backend;
pub mod chat;
mod error;
pub mod generate;
pub mod hub;
pub mod quality;
pub mod quantize;
pub mod sampler;
pub mod synthetic;
pub mod tokenizer;
pub mod weights;

pub use error::Error;
