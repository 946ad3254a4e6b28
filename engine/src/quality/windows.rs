//! A text cut into windows that a model reads one by one, from an empty cache.

use std::ops::Range;

use crate::Error;

/// Windows of equal length, one after another; what is left over at the end is not read.
///
/// Only the second half is scored, so that every scored token has at least half a window before
/// it. The logits at position `i` predict token `i + 1`: scored are those of the positions
/// `length / 2 .. length - 1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// `(windows, length)`.
    ids: Vec<u32>,
    length: usize,
}

/// Fewer tokens would leave nothing to score.
const MIN_LENGTH: usize = 4;

impl Windows {
    /// Cuts `ids` into windows of `length` tokens, at most `limit` of them. With a `bos`, it takes
    /// the place of the first token of each window, as llama.cpp does it.
    ///
    /// # Errors
    /// [`Error::Input`] if `length` is below 4 or `ids` do not fill one window.
    pub fn cut(
        mut ids: Vec<u32>,
        length: usize,
        bos: Option<u32>,
        limit: Option<usize>,
    ) -> Result<Self, Error> {
        if length < MIN_LENGTH {
            return Err(Error::Input(format!(
                "a window of {length} tokens is too short to score: at least {MIN_LENGTH}"
            )));
        }
        let windows = (ids.len() / length).min(limit.unwrap_or(usize::MAX));
        if windows == 0 {
            return Err(Error::Input(format!(
                "the text has {} tokens, one window takes {length}: give a longer text or a smaller --context",
                ids.len()
            )));
        }
        ids.truncate(windows * length);
        if let Some(bos) = bos {
            for window in ids.chunks_mut(length) {
                window[0] = bos;
            }
        }
        Ok(Self { ids, length })
    }

    /// Windows.
    pub fn count(&self) -> usize {
        self.ids.len() / self.length
    }

    /// Tokens of a window.
    pub fn length(&self) -> usize {
        self.length
    }

    /// All tokens, `(windows, length)`.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The windows, each `(length,)`.
    pub fn iter(&self) -> impl Iterator<Item = &[u32]> {
        self.ids.chunks(self.length)
    }

    /// Positions of a window whose logits are scored.
    pub fn scored(&self) -> Range<usize> {
        self.length / 2..self.length - 1
    }

    /// Keeps the first `limit` windows.
    pub fn truncate(&mut self, limit: usize) {
        self.ids.truncate(limit.saturating_mul(self.length));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_windows_are_kept_and_bos_takes_the_first_place() {
        let windows = Windows::cut((0..25).collect(), 8, Some(99), None).expect("cut");
        assert_eq!((windows.count(), windows.length()), (3, 8));
        let firsts: Vec<_> = windows.iter().map(|w| (w[0], w[1])).collect();
        assert_eq!(firsts, [(99, 1), (99, 9), (99, 17)]);
        // Positions 4, 5, 6 predict tokens 5, 6, 7.
        assert_eq!(windows.scored(), 4..7);
        assert_eq!(
            Windows::cut((0..1024).collect(), 512, None, Some(1))
                .expect("cut")
                .scored()
                .len(),
            255
        );
    }

    #[test]
    fn too_little_text_is_an_input_error() {
        for (ids, length) in [(7, 8), (100, 3), (0, 512)] {
            let error = Windows::cut((0..ids).collect(), length, None, None).expect_err("refused");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
