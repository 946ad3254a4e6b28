//! Text <-> token ids, from the vocabulary in a GGUF file's own metadata or from a `tokenizer.json`.
//!
//! Byte-level BPE (`tokenizer.ggml.model = gpt2`), which Qwen2, Llama 3 and SmolLM2 use. Merging is
//! the `tokenizers` crate's; turning ids back into bytes is a table look-up here.

mod parts;
mod pre;
mod stream;

use models::file::gguf::{Gguf, Metadata};
use serde::{Deserialize, Serialize};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::processors::template::TemplateProcessing;

pub use stream::Utf8Stream;

use crate::Error;
use crate::error::shown;
use parts::Parts;
use pre::Scheme;

/// Texts of control tokens that end an answer, whatever the metadata's ids say.
const STOP_TEXTS: [&str; 7] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
];

/// Metadata keys of the ids of tokens that end an answer.
const STOP_KEYS: [&str; 3] = [
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
];

/// `tokenizer.ggml.token_type` of tokens that are matched as a whole in text.
mod token_type {
    /// Structure, not text: `<|im_start|>`.
    pub const CONTROL: i64 = 3;
    /// Text that is never split: `<tool_call>`.
    pub const USER_DEFINED: i64 = 4;
}

/// What the files beside a `tokenizer.json` say of special tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Specials {
    /// Text of the BOS token.
    pub bos: Option<String>,
    /// Text of the EOS token.
    pub eos: Option<String>,
    /// Ids that end an answer.
    pub stops: Vec<u64>,
}

/// The tokenizer of one model.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Bytes of every token, one after another: token `i` is `bytes[starts[i]..starts[i + 1]]`.
    bytes: Vec<u8>,
    /// `(V + 1,)` starts in `bytes`.
    starts: Vec<usize>,
    /// `(V,)` tokens that are structure, not text.
    control: Vec<bool>,
    bos: Option<u32>,
    eos: Option<u32>,
    adds_bos: bool,
    /// Ids that end an answer, sorted.
    stops: Vec<u32>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab", &self.vocab())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Builds the tokenizer of a model whose embedding table has `vocab` rows.
    ///
    /// # Errors
    /// [`Error::Input`] if the metadata holds no byte-level BPE vocabulary, its pre-tokeniser is
    /// unknown, it does not have `vocab` tokens, or its parts contradict each other.
    pub fn from_gguf(file: &Gguf<'_>, vocab: usize) -> Result<Self, Error> {
        let metadata = &file.metadata;
        let model = metadata.string("tokenizer.ggml.model")?;
        if model != "gpt2" {
            return Err(Error::Input(format!(
                "tokenizer.ggml.model: `{}` is not supported (supported: gpt2, byte-level BPE)",
                shown(model)
            )));
        }
        let scheme = Scheme::by_name(metadata.string_opt("tokenizer.ggml.pre")?)?;
        let tokens = metadata.strings("tokenizer.ggml.tokens")?;
        if tokens.len() != vocab {
            return Err(Error::Input(format!(
                "vocabulary mismatch: tokenizer.ggml.tokens has {} tokens, the embedding table {vocab} rows",
                tokens.len()
            )));
        }
        let tokens: Vec<&str> = tokens.collect();
        let types: Vec<i64> = match metadata.integers_opt("tokenizer.ggml.token_type")? {
            Some(types) if types.len() == vocab => types.collect(),
            Some(types) => {
                return Err(Error::Input(format!(
                    "vocabulary mismatch: tokenizer.ggml.token_type has {} entries for {vocab} tokens",
                    types.len()
                )));
            }
            None => Vec::new(),
        };
        let is = |id: usize, kind: i64| types.get(id) == Some(&kind);

        let merges = metadata.strings("tokenizer.ggml.merges")?;
        let mut inner = tokenizers::Tokenizer::new(bpe(&tokens, merges, scheme.ignore_merges)?);
        let added = (0..vocab)
            .filter(|id| is(*id, token_type::CONTROL) || is(*id, token_type::USER_DEFINED))
            .filter(|id| !tokens[*id].is_empty())
            .map(|id| {
                tokenizers::AddedToken::from(tokens[id], is(id, token_type::CONTROL))
                    .normalized(false)
            });
        inner
            .with_normalizer(scheme.normalizer)
            .and_then(|inner| {
                inner.with_pre_tokenizer(Some(scheme.pre_tokenizer));
                inner.add_tokens(added)
            })
            .map_err(|e| Error::Input(format!("tokenizer.ggml.tokens: {e}")))?;

        let mut bytes = Vec::new();
        let mut starts = Vec::with_capacity(vocab + 1);
        starts.push(0);
        for token in &tokens {
            push_bytes(token, &mut bytes);
            starts.push(bytes.len());
        }
        let control: Vec<bool> = (0..vocab).map(|id| is(id, token_type::CONTROL)).collect();

        let bos = token_id(metadata, "tokenizer.ggml.bos_token_id", vocab)?;
        let eos = token_id(metadata, STOP_KEYS[0], vocab)?;
        let mut stops = Vec::new();
        for key in STOP_KEYS {
            stops.extend(token_id(metadata, key, vocab)?);
        }
        stops.extend(
            (0u32..)
                .zip(&tokens)
                .filter(|(id, token)| control[*id as usize] && STOP_TEXTS.contains(token))
                .map(|(id, _)| id),
        );
        stops.sort_unstable();
        stops.dedup();

        let adds_bos = metadata
            .bool_opt("tokenizer.ggml.add_bos_token")?
            .unwrap_or(scheme.adds_bos);
        Ok(Self {
            inner,
            bytes,
            starts,
            control,
            bos,
            eos,
            adds_bos,
            stops,
        })
    }

    /// Builds the tokenizer of a model whose embedding table has `vocab` rows from a `tokenizer.json`;
    /// rows beyond the tokenizer's tokens are padding and stand for nothing.
    ///
    /// # Errors
    /// [`Error::Input`] if the text is no tokenizer, not a byte-level one, or has a token beyond the
    /// table.
    pub fn from_json(json: &str, specials: &Specials, vocab: usize) -> Result<Self, Error> {
        let fail = |why: String| Error::Input(format!("tokenizer.json: {why}"));
        let parts = Parts::parse(json).map_err(|why| fail(shown(&why)))?;
        let mut inner = json
            .parse::<tokenizers::Tokenizer>()
            .map_err(|e| fail(shown(&e.to_string())))?;
        // Settings for batches of training texts.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| fail(e.to_string()))?;
        // All that it does to the ids is put a token in front.
        inner.with_post_processor(None::<PostProcessorWrapper>);
        if !matches!(inner.get_model(), ModelWrapper::BPE(_))
            || !matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)))
        {
            return Err(fail(
                "only byte-level BPE is supported (decoder ByteLevel)".to_owned(),
            ));
        }
        let mut texts = vec![None; vocab];
        for (text, id) in inner.get_vocab(true) {
            let Some(place) = texts.get_mut(id as usize) else {
                return Err(fail(format!(
                    "vocabulary mismatch: token {id} `{}` is beyond the {vocab} rows of the embedding table",
                    shown(&text)
                )));
            };
            *place = Some(text);
        }
        let added = inner.get_added_tokens_decoder();
        let mut bytes = Vec::new();
        let mut starts = Vec::with_capacity(vocab + 1);
        starts.push(0);
        for (id, text) in (0u32..).zip(&texts) {
            match (added.get(&id), text) {
                (Some(token), _) => bytes.extend_from_slice(token.content.as_bytes()),
                (None, Some(text)) => push_bytes(text, &mut bytes),
                (None, None) => {}
            }
            starts.push(bytes.len());
        }
        let control: Vec<bool> = (0..vocab as u32)
            .map(|id| added.get(&id).is_some_and(|token| token.special))
            .collect();
        let named = |name: &Option<String>| -> Option<u32> { inner.token_to_id(name.as_deref()?) };
        let eos = named(&specials.eos);
        // What the tokenizer itself puts before a text.
        let first = parts.first_token().filter(|id| Some(*id) != eos);
        if let Some(id) = first.filter(|id| *id as usize >= vocab) {
            return Err(fail(format!(
                "vocabulary mismatch: token {id} before every text is beyond the {vocab} rows of the embedding table"
            )));
        }
        let mut stops: Vec<u32> = (0u32..)
            .zip(&texts)
            .filter(|(id, text)| {
                control[*id as usize] && text.as_deref().is_some_and(|t| STOP_TEXTS.contains(&t))
            })
            .map(|(id, _)| id)
            .collect();
        stops.extend(eos);
        for id in &specials.stops {
            match u32::try_from(*id) {
                Ok(id) if (id as usize) < vocab => stops.push(id),
                _ => {
                    return Err(Error::Input(format!(
                        "vocabulary mismatch: generation_config.json: eos_token_id {id} is beyond the {vocab} tokens"
                    )));
                }
            }
        }
        stops.sort_unstable();
        stops.dedup();
        Ok(Self {
            bos: first.or_else(|| named(&specials.bos)),
            adds_bos: first.is_some(),
            inner,
            bytes,
            starts,
            control,
            eos,
            stops,
        })
    }

    /// The tokenizer as a `tokenizer.json`, for [`Tokenizer::from_json`] with
    /// [`Tokenizer::specials`].
    ///
    /// # Errors
    /// [`Error::Machine`] if the tokenizer cannot be written as JSON.
    pub fn to_json(&self) -> Result<String, Error> {
        let mut inner = self.inner.clone();
        inner.with_decoder(Some(ByteLevel::default()));
        let bos = self.bos.filter(|_| self.adds_bos);
        if let Some((id, text)) = bos.and_then(|id| Some((id, inner.id_to_token(id)?))) {
            let first = TemplateProcessing::builder()
                .try_single(format!("{text} $A"))
                .map_err(Error::machine)?
                .special_tokens(vec![(text, id)])
                .build()
                .map_err(Error::machine)?;
            inner.with_post_processor(Some(first));
        }
        inner.to_string(false).map_err(Error::machine)
    }

    /// The special tokens.
    pub fn specials(&self) -> Specials {
        let text = |id: Option<u32>| id.and_then(|id| self.inner.id_to_token(id));
        Specials {
            bos: text(self.bos),
            eos: text(self.eos),
            stops: self.stops.iter().map(|&id| id.into()).collect(),
        }
    }

    /// V: number of tokens.
    pub fn vocab(&self) -> usize {
        self.control.len()
    }

    /// Ids of `text`. Special tokens written out in the text become their ids. With `add_bos`, the
    /// BOS token comes first where the model wants it; a chat template writes its own.
    ///
    /// # Errors
    /// [`Error::Input`] if the tokenizer refuses the text.
    pub fn encode(&self, text: &str, add_bos: bool) -> Result<Vec<u32>, Error> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|e| Error::Input(format!("cannot tokenize the prompt: {e}")))?;
        let bos = self.added_bos().filter(|_| add_bos);
        Ok(bos
            .into_iter()
            .chain(encoding.get_ids().iter().copied())
            .collect())
    }

    /// The BOS token, if the model wants one in front of a text.
    pub fn added_bos(&self) -> Option<u32> {
        self.bos.filter(|_| self.adds_bos)
    }

    /// Text of `ids` without control tokens; bytes that are no character become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let (mut stream, mut out) = (Utf8Stream::new(), String::new());
        for id in ids {
            stream.push(self.token_bytes(*id), &mut out);
        }
        stream.finish(&mut out);
        out
    }

    /// Whether each id stands for the same bytes in `other`.
    pub fn agrees_with(&self, other: &Tokenizer) -> bool {
        (&self.starts, &self.bytes) == (&other.starts, &other.bytes)
    }

    /// Bytes that `id` adds to the text: none for a control token or an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        match self.control.get(id as usize) {
            Some(false) => self.stored_bytes(id),
            _ => &[],
        }
    }

    /// Whether `id` ends an answer.
    pub fn is_stop(&self, id: u32) -> bool {
        self.stops.binary_search(&id).is_ok()
    }

    /// Text of the BOS token, empty if there is none.
    pub fn bos_text(&self) -> String {
        self.special_text(self.bos)
    }

    /// Text of the EOS token, empty if there is none.
    pub fn eos_text(&self) -> String {
        self.special_text(self.eos)
    }

    fn special_text(&self, id: Option<u32>) -> String {
        id.map(|id| String::from_utf8_lossy(self.stored_bytes(id)).into_owned())
            .unwrap_or_default()
    }

    fn stored_bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        &self.bytes[self.starts[id]..self.starts[id + 1]]
    }
}

/// The merging model. Every merge must join two tokens into a third.
fn bpe<'a>(
    tokens: &[&str],
    merges: impl ExactSizeIterator<Item = &'a str>,
    ignore_merges: bool,
) -> Result<BPE, Error> {
    let mut vocab = Vocab::with_capacity(tokens.len());
    // The first of two equal tokens is the one that text is encoded to.
    for (id, token) in (0u32..).zip(tokens) {
        vocab.entry((*token).to_owned()).or_insert(id);
    }
    let longest = tokens.iter().map(|t| t.len()).max().unwrap_or(0);
    let pairs: Merges = merges
        .enumerate()
        .map(|(rank, merge)| {
            // Byte-level tokens hold no space, so the first one separates the two.
            let bad = |why: &str| {
                Error::Input(format!(
                    "tokenizer.ggml.merges: entry {rank} `{}` {why}",
                    shown(merge)
                ))
            };
            let (left, right) = merge
                .split_once(' ')
                .filter(|(left, right)| !left.is_empty() && !right.is_empty())
                .ok_or_else(|| bad("is not two tokens"))?;
            if left.len() + right.len() > longest {
                return Err(bad("makes a token that is not in the vocabulary"));
            }
            Ok((left.to_owned(), right.to_owned()))
        })
        .collect::<Result<_, Error>>()?;
    BPE::builder()
        .vocab_and_merges(vocab, pairs)
        .ignore_merges(ignore_merges)
        .build()
        .map_err(|e| {
            Error::Input(format!(
                "vocabulary mismatch: tokenizer.ggml.merges: {}",
                shown(&e.to_string())
            ))
        })
}

/// Appends the bytes that a token's text stands for: mapped through the byte-level alphabet, or as
/// they are if a character is outside it.
fn push_bytes(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in token.chars() {
        match pre::byte_of(c) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// The token id under `key`, if present.
fn token_id(metadata: &Metadata<'_>, key: &str, vocab: usize) -> Result<Option<u32>, Error> {
    match metadata.u64_opt(key)? {
        None => Ok(None),
        Some(id) if id < vocab as u64 => Ok(Some(id as u32)),
        Some(id) => Err(Error::Input(format!(
            "vocabulary mismatch: {key} is {id}, the vocabulary has {vocab} tokens"
        ))),
    }
}
