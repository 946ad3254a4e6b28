//! What can go wrong, each with the way out.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::{MENDING_COMMAND, NvvmArch};

/// An error of the builder. The message is one line unless it carries a tool's own output.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// The toolchain has no `core` for the device target.
    #[error(
        "the Rust toolchain in {} has no `core` library for GPU code; run `{MENDING_COMMAND}`",
        sysroot.display()
    )]
    MissingCore {
        /// Sysroot of the toolchain.
        sysroot: PathBuf,
    },
    /// rustc rejected the kernel crate; `messages` is its own output.
    #[error("{messages}the GPU kernels do not compile for {arch}")]
    Compile {
        /// Tier that was being built.
        arch: NvvmArch,
        /// What cargo and rustc printed.
        messages: String,
    },
    /// The PTX calls functions that no one defines, so no driver would load it.
    #[error(
        "the PTX for {arch} calls functions that it does not contain: {}; if they are panics of the \
         precompiled `core`, `{MENDING_COMMAND}` installs its sources",
        functions.join(", ")
    )]
    UnresolvedFunctions {
        /// Tier that was being built.
        arch: NvvmArch,
        /// Symbols without a body.
        functions: Vec<String>,
    },
    /// A tool could not be started.
    #[error("cannot run {program}: {source}")]
    Spawn {
        /// Program.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// A tool ran and failed; `output` is the end of what it printed.
    #[error("{program} failed: {output}")]
    Tool {
        /// Program.
        program: String,
        /// What it printed.
        output: String,
    },
    /// A file operation failed.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was being done: "cannot read", "cannot create".
        action: &'static str,
        /// Path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A piece of the tool chain could not be installed; the message says what to do by hand.
    #[error("{0}")]
    Setup(String),
}

impl Error {
    /// Attaches a path to an I/O error; for `map_err`.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io {
            action,
            path,
            source,
        }
    }
}
