//! Models as pure data: file formats, weight formats, architectures and their recipes.
//!
//! No device, no threads, no network: bytes in, typed tables out.

pub mod arch;
pub mod catalog;
mod error;
pub mod file;
pub mod hub_name;
pub mod quant;
pub mod recipe;
pub mod synthetic;
pub mod weights;

pub use error::Error;
