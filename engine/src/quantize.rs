//! Quantising models.

pub mod awq;
pub mod gptq;
pub mod gram;
