//! A kernel crate with a type error.
#![no_std]

/// Returns text where a number is promised.
pub fn width() -> u32 {
    "thirty-two"
}
