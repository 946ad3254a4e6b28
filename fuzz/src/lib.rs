//! What is fuzzed: every parser of something that comes from outside. A target takes any bytes and
//! must return: no panic, no overflow, no memory or time beyond what the bytes are worth. The bytes of
//! `corpus/` go through the same functions in `cargo xtask test`.
//!
//! `cargo install cargo-fuzz`, then for one target, with new inputs kept outside of the repository:
//!
//! ```text
//! RUSTC_BOOTSTRAP=1 cargo fuzz run gguf /tmp/gguf fuzz/corpus/gguf -- -max_total_time=600 -rss_limit_mb=2048
//! ```

mod targets;

pub use targets::*;
