//! The tokenizer and chat template of files whose ids are known by construction, and of the default
//! model where it has been fetched.

mod support;

use std::path::PathBuf;

use engine::chat::Message;
use engine::tokenizer::Tokenizer;
use engine::weights::ModelFile;
use models::file::gguf::Gguf;
use support::{edited, model};

const VOCAB: usize = 320;

fn tokenizer(bytes: &[u8]) -> Tokenizer {
    Tokenizer::from_gguf(&Gguf::parse(bytes).expect("parsed"), VOCAB).expect("built")
}

/// The file with another pre-tokeniser.
fn with_pre(pre: &'static str) -> Tokenizer {
    tokenizer(&edited(&model("tiny"), |key, writer| match key {
        "tokenizer.ggml.pre" => {
            writer.string(key, pre);
            true
        }
        _ => false,
    }))
}

#[test]
fn bytes_special_tokens_and_merges_have_their_ids() {
    let tokenizer = tokenizer(&model("tiny"));
    assert_eq!(tokenizer.encode("ab\n", true).unwrap(), [97, 98, 10]);
    assert_eq!(tokenizer.encode("é", true).unwrap(), [0xC3, 0xA9]);
    assert_eq!(
        tokenizer.encode("a<|im_start|>b<|im_end|>", true).unwrap(),
        [97, 257, 98, 258]
    );
    // Not quite a special token.
    assert_eq!(tokenizer.encode("<|im_start", true).unwrap().len(), 10);
    // " the": first "Ġ t" (rank 0), then "h e", then "Ġt he" (rank 7): one token after 259 others.
    assert_eq!(tokenizer.encode(" the", true).unwrap(), [259 + 7]);
    assert_eq!(tokenizer.encode("", true).unwrap(), [0u32; 0]);
    assert!(tokenizer.is_stop(258) && tokenizer.is_stop(256) && !tokenizer.is_stop(257));
    assert_eq!(tokenizer.bos_text(), "<|endoftext|>");
    assert_eq!(tokenizer.eos_text(), "<|im_end|>");
}

#[test]
fn decoding_gives_the_text_back_without_control_tokens() {
    let tokenizer = tokenizer(&model("tiny"));
    for text in [
        "plain",
        " the and then",
        "tabs\t\tand\r\nlines\n\n",
        "日本語 naïve 🦀",
        "\u{0}\u{7f}",
    ] {
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokenizer.decode(&ids), text);
    }
    assert_eq!(tokenizer.decode(&[257, 97, 258, 98]), "ab");
    assert_eq!(tokenizer.decode(&[0xF0, 0x9F, 97]), "\u{FFFD}a");
    assert_eq!(tokenizer.decode(&[u32::MAX, 97]), "a");
}

#[test]
fn the_pre_tokeniser_decides_where_merges_stop() {
    // One more merge, "1 2" -> "12", shows how digits are cut.
    let digits = |pre: &'static str| {
        let bytes = edited(&model("tiny"), |key, writer| match key {
            "tokenizer.ggml.pre" => {
                writer.string(key, pre);
                true
            }
            "tokenizer.ggml.tokens" => {
                let mut tokens = vec![String::new(); VOCAB];
                let file = model("tiny");
                let gguf = Gguf::parse(&file).expect("parsed");
                for (token, text) in tokens
                    .iter_mut()
                    .zip(gguf.metadata.strings(key).expect("there"))
                {
                    *token = text.to_owned();
                }
                tokens[300] = "12".into();
                tokens[301] = "1212".into();
                writer.strings(key, &tokens);
                true
            }
            "tokenizer.ggml.merges" => {
                writer.strings(key, &["1 2", "12 12"]);
                true
            }
            _ => false,
        });
        tokenizer(&bytes).encode("1212", false).unwrap()
    };
    assert_eq!(digits("gpt-2"), [301]);
    assert_eq!(digits("smollm"), [49, 50, 49, 50]);
    assert_eq!(digits("qwen2"), [49, 50, 49, 50]);
    // Three digits, then one.
    assert_eq!(digits("llama-bpe"), [300, 49, 50]);
}

#[test]
fn qwen2_composes_characters_and_the_others_do_not() {
    let decomposed = "e\u{301}";
    assert_eq!(
        with_pre("qwen2").encode(decomposed, false).unwrap(),
        [0xC3, 0xA9]
    );
    assert_eq!(
        with_pre("smollm").encode(decomposed, false).unwrap(),
        [101, 0xCC, 0x81]
    );
}

#[test]
fn bos_is_added_as_the_file_says_and_never_to_a_chat() {
    let flagged = |value: Option<bool>, pre: &'static str| {
        tokenizer(&edited(&model("tiny"), |key, writer| match (key, value) {
            ("tokenizer.ggml.pre", _) => {
                writer.string(key, pre);
                true
            }
            ("tokenizer.ggml.add_bos_token", Some(value)) => {
                writer.bool(key, value);
                true
            }
            // Kept under another name, which nobody reads.
            ("tokenizer.ggml.add_bos_token", None) => {
                writer.bool("tokenizer.unused", true);
                true
            }
            _ => false,
        }))
    };
    let (with, without) = (vec![256, 97], vec![97]);
    assert_eq!(
        flagged(Some(true), "smollm").encode("a", true).unwrap(),
        with
    );
    assert_eq!(
        flagged(Some(true), "smollm").encode("a", false).unwrap(),
        without
    );
    assert_eq!(
        flagged(Some(false), "llama-bpe").encode("a", true).unwrap(),
        without
    );
    // Where the file does not say, Llama 3's vocabulary wants it.
    assert_eq!(flagged(None, "llama-bpe").encode("a", true).unwrap(), with);
    assert_eq!(flagged(None, "qwen2").encode("a", true).unwrap(), without);
}

#[test]
fn user_defined_tokens_are_matched_whole_and_stay_text() {
    let bytes = edited(&model("tiny"), |key, writer| match key {
        "tokenizer.ggml.token_type" => {
            let mut types = vec![1; VOCAB];
            types[257] = 4;
            writer.i32s(key, &types);
            true
        }
        _ => false,
    });
    let tokenizer = tokenizer(&bytes);
    assert_eq!(
        tokenizer.encode("x<|im_start|>", false).unwrap(),
        [120, 257]
    );
    assert_eq!(tokenizer.decode(&[120, 257]), "x<|im_start|>");
}

/// The default model: named by `EDGELLM_MODEL`, or fetched into the checkout.
fn default_model() -> Option<PathBuf> {
    let catalog = models::catalog::Catalog::builtin().expect("valid");
    let fetched = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../models/files")
        .join(&catalog.default_model().file);
    let path = std::env::var_os("EDGELLM_MODEL").map_or(fetched, PathBuf::from);
    path.is_file().then_some(path)
}

#[test]
fn the_default_models_template_brings_its_system_prompt() {
    let Some(path) = default_model() else {
        println!("skipped: the default model has not been fetched (cargo xtask model fetch)");
        return;
    };
    let mapped = ModelFile::open(&path).expect("opened");
    let file = mapped.parse().expect("parsed");
    let recipe = mapped.recipe(&file).expect("a recipe");
    let tokenizer = mapped.tokenizer(&file, &recipe).expect("a tokenizer");
    let template = mapped
        .chat_template(&file, &tokenizer)
        .expect("compiled")
        .expect("a template");

    let user = Message::new("user", "What is the capital of France?");
    let prompt = template
        .render(std::slice::from_ref(&user))
        .expect("rendered");
    assert_eq!(
        prompt,
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    );
    let ids = tokenizer.encode(&prompt, false).expect("encoded");
    assert_eq!(ids[0], 1, "<|im_start|>");
    assert_eq!(ids.iter().filter(|id| **id == 2).count(), 2, "<|im_end|>");

    let own = template
        .render(&[Message::new("system", "Be brief."), user])
        .expect("rendered");
    assert!(
        own.starts_with("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"),
        "{own}"
    );
    assert!(tokenizer.is_stop(2) && tokenizer.is_stop(0) && !tokenizer.is_stop(1));
}
