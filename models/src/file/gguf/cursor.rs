//! A bounds-checked little-endian reader over the bytes of a file.

use crate::Error;
use crate::error::shown;

/// Reads forward through a byte slice; every read is checked against what is left.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Cursor { bytes, at: 0 }
    }

    /// Offset of the next byte.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    /// Bytes not yet read.
    pub(super) fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// The bytes from `start` up to the present position.
    pub(super) fn since(&self, start: usize) -> &'a [u8] {
        &self.bytes[start..self.at]
    }

    /// The next `count` bytes.
    pub(super) fn take(&mut self, count: u64, what: &str) -> Result<&'a [u8], Error> {
        if count > self.left() {
            return Err(Error::Truncated {
                what: what.to_owned(),
                at: self.at as u64,
                need: count,
                left: self.left(),
            });
        }
        let start = self.at;
        // No truncation: `count` is at most the length of a slice.
        self.at += count as usize;
        Ok(&self.bytes[start..self.at])
    }

    /// The next `N` bytes as an array.
    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A string: a 64-bit length and that many bytes of UTF-8.
    pub(super) fn string(&mut self, what: &str) -> Result<&'a str, Error> {
        let len = self.u64(what)?;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|_| Error::Malformed {
            what: what.to_owned(),
            reason: format!("{} is not UTF-8", shown(&String::from_utf8_lossy(bytes))),
        })
    }
}
