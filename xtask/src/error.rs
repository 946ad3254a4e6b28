//! Why a task failed.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// A task's error; the message says what to do next where there is something to do.
#[derive(Debug, Error)]
pub enum Error {
    /// A task's own finding.
    #[error("{0}")]
    Failed(String),
    /// A wrong command line.
    #[error("{0}")]
    Usage(String),
    /// A file operation failed.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// Path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The device build or the set-up failed.
    #[error(transparent)]
    Builder(#[from] cuda_builder::Error),
    /// The model catalogue or a model file.
    #[error(transparent)]
    Model(#[from] models::Error),
}

impl Error {
    /// An error with a message of its own.
    pub fn failed(message: impl Into<String>) -> Error {
        Error::Failed(message.into())
    }

    /// Attaches a path to an I/O error; for `map_err`.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io {
            action,
            path,
            source,
        }
    }

    /// Exit code: 2 for a wrong command line, 1 for the rest.
    pub fn exit_code(&self) -> i32 {
        match self {
            Error::Usage(_) => 2,
            _ => 1,
        }
    }
}
