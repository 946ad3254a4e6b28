//! A byte-level BPE tokenizer for synthetic models: the 256 bytes, three special tokens, a few
//! merges, and filler tokens up to the vocabulary of the shape.

use super::Shape;
use crate::Error;
use crate::file::gguf::Writer;

/// Special tokens, right after the 256 bytes: end of text, start and end of a chat turn.
pub(super) const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const END_OF_TEXT: u32 = 256;
const END_OF_TURN: u32 = 258;

/// Merges by rank; `Ġ` is the space of the byte alphabet. Each side is a byte or an earlier merge.
const MERGES: [&str; 20] = [
    "Ġ t", "h e", "i n", "Ġ a", "o n", "e r", "r e", "Ġt he", "a t", "n d", "i s", "o r", "in g",
    "Ġ s", "Ġ w", "Ġa nd", "e s", "Ġ o", "o u", "t i",
];

/// Token types of `tokenizer.ggml.token_type`.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const UNUSED: i32 = 5;

const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' \
     + message['content'] + '<|im_end|>\n' }}{% endfor %}\
     {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The character that stands for a byte in byte-level BPE vocabularies: printable Latin-1 stands
/// for itself, the other bytes are counted up from U+0100.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 33..=126 | 161..=172 | 174..=255);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(0x100 + rank).unwrap_or('\u{fffd}')
}

/// Writes the tokenizer's metadata. A byte's token id is the byte itself.
///
/// # Errors
/// A vocabulary that cannot hold the bytes and special tokens.
pub(super) fn put(writer: &mut Writer, shape: &Shape) -> Result<(), Error> {
    let mut tokens: Vec<String> = (0..=255).map(|b| byte_char(b).to_string()).collect();
    tokens.extend(SPECIAL.map(str::to_owned));
    let Some(room) = shape.vocab.checked_sub(tokens.len()) else {
        return Err(Error::Write {
            reason: format!("a vocabulary of {} is below {}", shape.vocab, tokens.len()),
        });
    };
    let merges = &MERGES[..MERGES.len().min(room)];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let mut types = vec![NORMAL; tokens.len()];
    types[256..256 + SPECIAL.len()].fill(CONTROL);
    types.resize(shape.vocab, UNUSED);
    tokens.extend((tokens.len()..shape.vocab).map(|id| format!("<filler{id}>")));

    writer
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", shape.pre_tokenizer)
        .strings("tokenizer.ggml.tokens", &tokens)
        .i32s("tokenizer.ggml.token_type", &types)
        .strings("tokenizer.ggml.merges", merges)
        .u32("tokenizer.ggml.bos_token_id", END_OF_TEXT)
        .u32("tokenizer.ggml.eos_token_id", END_OF_TURN)
        .u32("tokenizer.ggml.padding_token_id", END_OF_TEXT)
        .bool("tokenizer.ggml.add_bos_token", false)
        .string("tokenizer.chat_template", CHAT_TEMPLATE);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_alphabet_is_that_of_byte_level_bpe() {
        assert_eq!(byte_char(b' '), 'Ġ');
        assert_eq!(byte_char(b'\n'), 'Ċ');
        assert_eq!(byte_char(b'A'), 'A');
        assert_eq!(byte_char(0), 'Ā');
        assert_eq!(byte_char(173), 'Ń');
        assert_eq!(byte_char(255), 'ÿ');
        let distinct: std::collections::HashSet<char> = (0..=255).map(byte_char).collect();
        assert_eq!(distinct.len(), 256);
    }

    #[test]
    fn merges_build_on_what_comes_before() {
        let mut known: Vec<String> = (0..=255).map(|b| byte_char(b).to_string()).collect();
        for merge in MERGES {
            let (left, right) = merge.split_once(' ').unwrap();
            assert!(
                known.iter().any(|k| k == left) && known.iter().any(|k| k == right),
                "{merge}"
            );
            assert!(!known.contains(&format!("{left}{right}")), "{merge} twice");
            known.push(format!("{left}{right}"));
        }
    }
}
