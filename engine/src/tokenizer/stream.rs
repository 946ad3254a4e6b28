//! Bytes of tokens -> text, never half a character.

/// Collects bytes and gives them out as text as soon as characters are complete.
///
/// What comes out over a whole run, [`Utf8Stream::finish`] included, equals
/// `String::from_utf8_lossy` of all bytes: bytes that cannot belong to a character become U+FFFD.
#[derive(Debug, Default, Clone)]
pub struct Utf8Stream {
    /// The beginning of a character whose end has not come yet: at most 3 bytes between calls.
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// An empty stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `bytes` and appends to `out` every character that is now complete.
    pub fn push(&mut self, bytes: &[u8], out: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut done = 0;
        loop {
            match std::str::from_utf8(&self.pending[done..]) {
                Ok(text) => {
                    out.push_str(text);
                    done = self.pending.len();
                    break;
                }
                Err(error) => {
                    let valid = done + error.valid_up_to();
                    if let Ok(text) = std::str::from_utf8(&self.pending[done..valid]) {
                        out.push_str(text);
                    }
                    done = valid;
                    match error.error_len() {
                        Some(invalid) => {
                            out.push(char::REPLACEMENT_CHARACTER);
                            done += invalid;
                        }
                        None => break, // an unfinished character: wait for its end
                    }
                }
            }
        }
        self.pending.drain(..done);
    }

    /// Ends the stream: an unfinished character becomes one U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        if !self.pending.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Streams `bytes` in pieces cut at `cuts` and returns all output.
    fn stream(bytes: &[u8], piece: usize) -> String {
        let (mut stream, mut out) = (Utf8Stream::new(), String::new());
        for part in bytes.chunks(piece) {
            stream.push(part, &mut out);
        }
        stream.finish(&mut out);
        out
    }

    #[test]
    fn any_cutting_gives_the_whole_text() {
        let text = "naïve 日本語 🦀👩‍👩‍👧 end";
        for piece in 1..=text.len() {
            assert_eq!(stream(text.as_bytes(), piece), text);
        }
    }

    #[test]
    fn invalid_bytes_become_replacement_characters_as_from_utf8_lossy_does() {
        let cases: [&[u8]; 6] = [
            b"a\xFFb",
            b"\xF0\x9F\xA6",
            b"\xE2\x82 ok",
            b"\x80\x80",
            b"\xED\xA0\x80",
            b"tail \xC3",
        ];
        for bytes in cases {
            for piece in 1..=bytes.len() {
                assert_eq!(stream(bytes, piece), String::from_utf8_lossy(bytes));
            }
        }
    }

    #[test]
    fn half_a_character_is_never_given_out() {
        let (mut stream, mut out) = (Utf8Stream::new(), String::new());
        let crab = "🦀".as_bytes();
        for byte in &crab[..3] {
            stream.push(&[*byte], &mut out);
            assert!(out.is_empty());
        }
        stream.push(&crab[3..], &mut out);
        assert_eq!(out, "🦀");
    }
}
