//! The engine's error: whose fault it is decides the exit code.

use thiserror::Error;

/// What went wrong, in one line.
#[derive(Debug, Error)]
pub enum Error {
    /// The caller's input cannot be used: a file, a flag, a prompt. Exit code 2.
    #[error("{0}")]
    Input(String),
    /// The machine cannot do it: no driver, no memory, a failed write. Exit code 1.
    #[error("{0}")]
    Machine(String),
}

impl Error {
    /// An [`Error::Input`] from anything that displays.
    pub fn input(message: impl std::fmt::Display) -> Self {
        Error::Input(message.to_string())
    }

    /// An [`Error::Machine`] from anything that displays.
    pub fn machine(message: impl std::fmt::Display) -> Self {
        Error::Machine(message.to_string())
    }

    /// Process exit code: 2 for input, 1 for the machine.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Input(_) => 2,
            Error::Machine(_) => 1,
        }
    }
}

impl From<models::Error> for Error {
    /// A model file that cannot be used is the caller's input.
    fn from(error: models::Error) -> Self {
        Error::input(error)
    }
}

/// Text from a file or a flag as messages repeat it: control characters escaped, 80 characters.
pub(crate) fn shown(text: &str) -> String {
    const SHOWN_CHARS: usize = 80;
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == SHOWN_CHARS {
            out.push('…');
            break;
        }
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}
