//! `edgellm`.
fn main() {}
