//! The targets. This file is also part of `engine/tests/fuzz_corpus.rs`.

use bytes::Bytes;
use engine::chat::{ChatTemplate, Message};
use engine::quality::log_probs::LogProbs;
use engine::tokenizer::{Specials, Tokenizer};
use models::catalog::Catalog;
use models::file::Source;
use models::file::container::Container;
use models::file::gguf::Gguf;
use models::file::hugging_face::{HuggingFace, Index};
use models::file::safetensors::SafeTensors;
use sha2::{Digest, Sha256};

/// A target and its name: the folder of its inputs in `corpus/`.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const ALL: [Target; 9] = [
    ("gguf", gguf),
    ("safetensors", safetensors),
    ("container", container),
    ("hugging_face", hugging_face),
    ("tokenizer", tokenizer),
    ("tokenizer_json", tokenizer_json),
    ("chat_template", chat_template),
    ("catalog", catalog),
    ("saved_logits", saved_logits),
];

/// A GGUF file: table of contents, configuration, recipe, every tensor that the recipe uses.
pub fn gguf(data: &[u8]) {
    if let Ok(file) = Gguf::parse(data) {
        read(&file);
    }
}

/// A safetensors file.
pub fn safetensors(data: &[u8]) {
    if let Ok(file) = SafeTensors::parse(data) {
        for tensor in &file.tensors {
            read_first_row(tensor);
        }
    }
}

/// The quantiser's own file, at an address as a mapped file has it.
pub fn container(data: &[u8]) {
    let bytes = Bytes::from(data.to_vec());
    if let Ok(file) = Container::parse(&bytes) {
        for weight in file.weights() {
            // Unusable weights are errors.
            let _ = file.weight(&weight.name);
        }
        read(&file);
    }
}

/// A Hugging Face folder: `config.json` (architecture, AWQ, GPTQ and BitNet packing), a byte of
/// zero, the index or nothing, a byte of zero, the one shard.
pub fn hugging_face(data: &[u8]) {
    let mut parts = data.splitn(3, |byte| *byte == 0);
    let (Some(config), Some(index), Some(shard)) = (parts.next(), parts.next(), parts.next())
    else {
        return;
    };
    let (config, index) = (
        String::from_utf8_lossy(config),
        String::from_utf8_lossy(index),
    );
    let index = match index.is_empty() {
        true => None,
        false => match Index::parse(&index) {
            Ok(index) => Some(index),
            Err(_) => return,
        },
    };
    let shards = [("model.safetensors", shard)];
    if let Ok(folder) = HuggingFace::parse(&config, index.as_ref(), &shards) {
        read(&folder);
    }
}

/// A tokenizer in the metadata of a GGUF file, and a text that goes through it.
pub fn tokenizer(data: &[u8]) {
    let Ok(file) = Gguf::parse(data) else {
        return;
    };
    let tokens = file.metadata.strings("tokenizer.ggml.tokens");
    let vocab = tokens.map_or(0, |tokens| tokens.len());
    if let Ok(tokenizer) = Tokenizer::from_gguf(&file, vocab) {
        tokenize(&tokenizer);
    }
}

/// A `tokenizer.json`, and a text that goes through it.
pub fn tokenizer_json(data: &[u8]) {
    let Ok(json) = std::str::from_utf8(data) else {
        return;
    };
    let specials = Specials {
        eos: Some("<|im_end|>".to_owned()),
        ..Specials::default()
    };
    if let Ok(tokenizer) = Tokenizer::from_json(json, &specials, 64) {
        tokenize(&tokenizer);
    }
}

fn tokenize(tokenizer: &Tokenizer) {
    let text = "Hello, wörld! 12 <|im_end|>\n";
    if let Ok(ids) = tokenizer.encode(text, true) {
        assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab()));
        tokenizer.decode(&ids);
    }
}

/// A chat template: compiled, and rendered with a conversation.
pub fn chat_template(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(template) = ChatTemplate::new(source, "<s>", "</s>") {
        let messages = [
            Message::new("system", "Be brief."),
            Message::new("user", "What is 2 + 2?"),
            Message::new("assistant", "4"),
            Message::new("user", " And\n3? "),
        ];
        // Templates that fail are errors.
        let _ = template.render(&messages);
    }
}

/// The catalogue of models.
pub fn catalog(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        // Malformed catalogues are errors.
        let _ = Catalog::parse(text);
    }
}

/// Saved predictions; the checksum is put right, so that what it guards is reached.
pub fn saved_logits(data: &[u8]) {
    let mut bytes = data.to_vec();
    bytes.extend(Sha256::digest(data));
    if let Ok(mut saved) = LogProbs::parse(&bytes) {
        while saved.next_window().is_ok() {}
    }
}

/// Everything that loading a model does with its file.
fn read(source: &dyn Source) {
    for tensor in source.tensors() {
        read_first_row(tensor);
    }
    if let Ok(recipe) = models::arch::recipe(source) {
        for weight in &recipe.weights {
            // Unusable weights are errors.
            let _ = models::weights::decode(source, weight);
        }
    }
}

fn read_first_row(tensor: &models::file::Tensor<'_>) {
    let (_, columns) = tensor.shape();
    // A type that is not read as floats is an error.
    let _ = tensor.read_rows(0..1, &mut vec![0.0; columns]);
}
