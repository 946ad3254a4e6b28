//! Pre-tokenisers: how text is cut before byte-pair merges, by the name in `tokenizer.ggml.pre`.

use tokenizers::normalizers::{NFC, NormalizerWrapper};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use crate::Error;

/// Words, numbers one digit at a time, runs of punctuation, line ends and spaces (Qwen2).
const QWEN2_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with numbers up to three digits at a time (Llama 3).
const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Names that [`Scheme::by_name`] knows, for its error message.
const KNOWN: &str = "gpt-2, default, smollm, starcoder, refact, command-r, qwen2, deepseek-r1-qwen, llama-bpe, llama3, llama-v3";

/// What a pre-tokeniser name stands for.
pub(super) struct Scheme {
    /// Applied to text outside special tokens.
    pub normalizer: Option<NormalizerWrapper>,
    /// Cuts text into words and maps bytes to printable characters.
    pub pre_tokenizer: PreTokenizerWrapper,
    /// A word that is a token as a whole is taken without merging.
    pub ignore_merges: bool,
    /// Whether text starts with the BOS token where the file does not say.
    pub adds_bos: bool,
}

impl Scheme {
    /// The scheme called `name`; files without a name use GPT-2's.
    pub fn by_name(name: Option<&str>) -> Result<Scheme, Error> {
        // `ByteLevel::new(add_prefix_space, trim_offsets, use_regex)`; its own regex is GPT-2's.
        let gpt2_regex = || PreTokenizerWrapper::from(ByteLevel::new(false, true, true));
        let plain = |pre_tokenizer| Scheme {
            normalizer: None,
            pre_tokenizer,
            ignore_merges: false,
            adds_bos: false,
        };
        Ok(match name.unwrap_or("gpt-2") {
            "gpt-2" | "default" => plain(gpt2_regex()),
            "smollm" | "starcoder" | "refact" | "command-r" => {
                plain(sequence(Digits::new(true).into(), gpt2_regex()))
            }
            "qwen2" | "deepseek-r1-qwen" => Scheme {
                normalizer: Some(NFC.into()),
                ..plain(by_pattern(QWEN2_PATTERN)?)
            },
            "llama-bpe" | "llama3" | "llama-v3" => Scheme {
                ignore_merges: true,
                adds_bos: true,
                ..plain(by_pattern(LLAMA3_PATTERN)?)
            },
            other => {
                return Err(Error::Input(format!(
                    "tokenizer.ggml.pre: pre-tokeniser `{}` is not supported (supported: {KNOWN})",
                    crate::error::shown(other)
                )));
            }
        })
    }
}

/// First `first`, then `second` on each of its pieces.
fn sequence(first: PreTokenizerWrapper, second: PreTokenizerWrapper) -> PreTokenizerWrapper {
    Sequence::new(vec![first, second]).into()
}

/// Every match of `pattern` is a piece, then bytes become characters.
fn by_pattern(pattern: &str) -> Result<PreTokenizerWrapper, Error> {
    let split = Split::new(
        SplitPattern::Regex(pattern.to_owned()),
        SplitDelimiterBehavior::Isolated,
        false,
    )
    .map_err(|e| Error::Machine(format!("pre-tokeniser pattern: {e}")))?;
    Ok(sequence(
        split.into(),
        ByteLevel::new(false, true, false).into(),
    ))
}

/// Inverse of the byte-level alphabet: the byte that `c` stands for.
///
/// Printable Latin-1 bytes stand for themselves, the other 68 are `U+0100` onwards in order
/// (GPT-2, <https://github.com/openai/gpt-2>).
pub(super) fn byte_of(c: char) -> Option<u8> {
    /// Bytes that do not stand for themselves, in order.
    const MOVED: [u8; 68] = moved();
    const fn moved() -> [u8; 68] {
        let mut out = [0; 68];
        let (mut n, mut b) = (0, 0u16);
        while b < 256 {
            if !stands_for_itself(b as u32) {
                out[n] = b as u8;
                n += 1;
            }
            b += 1;
        }
        out
    }
    let code = c as u32;
    match code {
        0..=0xFF => stands_for_itself(code).then_some(code as u8),
        _ => MOVED.get((code - 0x100) as usize).copied(),
    }
}

/// Whether the byte `b` is its own character in the byte-level alphabet.
const fn stands_for_itself(b: u32) -> bool {
    matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_alphabet_is_a_bijection() {
        let mut seen = [false; 256];
        for c in (0..0x1000).filter_map(char::from_u32) {
            if let Some(b) = byte_of(c) {
                assert!(!seen[b as usize], "byte {b} twice");
                seen[b as usize] = true;
            }
        }
        assert!(seen.iter().all(|s| *s));
        // Known from the published vocabularies: Ġ is a space, Ċ a line feed.
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
        assert_eq!(byte_of(' '), None);
        assert_eq!(byte_of('日'), None);
    }

    #[test]
    fn every_known_name_has_a_scheme_and_others_are_input_errors() {
        for name in KNOWN.split(", ") {
            assert!(Scheme::by_name(Some(name)).is_ok(), "{name}");
        }
        let error = Scheme::by_name(Some("no-such")).err().expect("an error");
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("no-such"));
    }
}
