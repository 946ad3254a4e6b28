//! What it takes to run tests for AArch64 on a machine of another kind: Rust's library for it, and an emulator.

use std::path::PathBuf;

use super::{Progress, RUSTUP_LIMIT, apt, lock, rustup};
use crate::{Error, Toolchain, cache};

/// A target that links with Rust's own linker and C library: no C compiler for AArch64 is needed.
pub const TARGET: &str = "aarch64-unknown-linux-musl";

/// Makes sure that programs for [`TARGET`] can be built and run; returns the emulator.
///
/// # Errors
/// [`Error::Setup`] if the library or the emulator cannot be fetched.
pub fn install(progress: &dyn Progress) -> Result<PathBuf, Error> {
    let library = Toolchain::find()?.sysroot.join("lib/rustlib").join(TARGET);
    let cache = cache::dir()?;
    if !library.join("lib").is_dir() {
        let _lock = lock(&cache)?;
        progress.step(&format!("rustup target add {TARGET}"));
        rustup(&["target", "add", TARGET], RUSTUP_LIMIT)
            .map_err(|why| Error::Setup(format!("rustup target add {TARGET}: {why}")))?;
    }
    let member = "usr/bin/qemu-aarch64-static";
    apt::fetch_member("qemu-user-static", member, &cache, progress)
}
