//! Errors of model files: one line each, naming the field or tensor at fault.

use thiserror::Error;

/// What is wrong with a model file, a catalog or a matrix.
///
/// Names that come from a file are escaped and shortened before they are stored here, so that a
/// message stays one readable line whatever the file holds.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Error {
    /// The file does not start with the GGUF magic.
    #[error("not a GGUF file: it starts with {found}, not with \"GGUF\"")]
    NotGguf {
        /// First bytes, printable.
        found: String,
    },
    /// The file was written in big-endian byte order.
    #[error("big-endian GGUF file (version {version}): only little-endian files are read")]
    BigEndian {
        /// Version after swapping the bytes.
        version: u32,
    },
    /// A version of the container that is not read.
    #[error("GGUF version {version} is not supported: versions 2 and 3 are")]
    Version {
        /// Version in the file.
        version: u32,
    },
    /// The file ends inside a field.
    #[error("file is truncated: {what} needs {need} bytes at byte {at}, {left} are left")]
    Truncated {
        /// Field being read.
        what: String,
        /// Offset of the field in the file.
        at: u64,
        /// Bytes that the field needs.
        need: u64,
        /// Bytes that are left.
        left: u64,
    },
    /// A field that cannot be what the format says.
    #[error("{what}: {reason}")]
    Malformed {
        /// Field.
        what: String,
        /// Why.
        reason: String,
    },
    /// A metadata key that has to be there is not.
    #[error("metadata key {key} is missing")]
    MissingKey {
        /// Key.
        key: String,
    },
    /// A metadata key whose value has another type.
    #[error("metadata key {key} is {found}, expected {expected}")]
    KeyType {
        /// Key.
        key: String,
        /// Type in the file.
        found: String,
        /// Type expected.
        expected: &'static str,
    },
    /// A metadata value that is out of range, contradicts another or is not supported.
    #[error("metadata key {key}: {reason}")]
    KeyValue {
        /// Key.
        key: String,
        /// Why.
        reason: String,
    },
    /// An architecture that has no recipe.
    #[error("unknown architecture {found}: known are {known}")]
    UnknownArchitecture {
        /// Name in the file.
        found: String,
        /// Known names, comma separated.
        known: String,
    },
    /// A tensor that the architecture needs is not in the file.
    #[error("tensor {name} is missing")]
    MissingTensor {
        /// Tensor.
        name: String,
    },
    /// A tensor with the wrong shape, type or content.
    #[error("tensor {name}: {reason}")]
    Tensor {
        /// Tensor.
        name: String,
        /// Why.
        reason: String,
    },
    /// One of several files of a model that cannot be read.
    #[error("{file}: {reason}")]
    Shard {
        /// File name.
        file: String,
        /// Why.
        reason: String,
    },
    /// A matrix whose parts do not fit together.
    #[error("{format} matrix: {reason}")]
    Matrix {
        /// Weight format.
        format: &'static str,
        /// Why.
        reason: String,
    },
    /// The catalog of known models is malformed.
    #[error("model catalog: {reason}")]
    Catalog {
        /// Why.
        reason: String,
    },
    /// A name that is neither in the catalog nor a known shape.
    #[error("unknown {what} {found}: known are {known}")]
    UnknownName {
        /// What was looked up.
        what: &'static str,
        /// Name given.
        found: String,
        /// Known names, comma separated.
        known: String,
    },
    /// Writing a model file failed.
    #[error("cannot write the model file: {reason}")]
    Write {
        /// Why.
        reason: String,
    },
    /// A name that names no repository of a model hub.
    #[error(
        "{name} names no repository: it has to be hf:OWNER/REPO, hf:OWNER/REPO:FILE or hf:OWNER/REPO@REVISION:FILE"
    )]
    HubName {
        /// What was given.
        name: String,
    },
}

/// Longest name, in characters, that a message repeats.
const SHOWN_CHARS: usize = 80;

/// A name from a file as messages show it: in backquotes, control characters escaped, shortened.
pub(crate) fn shown(name: &str) -> String {
    let mut out = String::from("`");
    for (i, c) in name.chars().enumerate() {
        if i == SHOWN_CHARS {
            out.push('…');
            break;
        }
        if c.is_control() || c == '\u{2028}' || c == '\u{2029}' {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out.push('`');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shown_names_are_one_short_line() {
        assert_eq!(shown("blk.0"), "`blk.0`");
        assert_eq!(shown("a\nb\u{1b}"), "`a\\nb\\u{1b}`");
        assert!(shown(&"x".repeat(10_000)).chars().count() < 100);
    }
}
