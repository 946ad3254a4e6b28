//! The parts of a `tokenizer.json` on which the `tokenizers` crate panics where they are malformed.

use serde::Deserialize;
use serde_json::Value;

/// Parsed by themselves first: what is wrong with them is an error then.
#[derive(Deserialize)]
pub(super) struct Parts {
    normalizer: Option<Value>,
    post_processor: Option<Value>,
    /// Only its JSON has to be whole.
    #[serde(rename = "decoder")]
    _decoder: Option<Value>,
}

impl Parts {
    /// Parses the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// What is wrong with it, for people: no JSON, or a normalizer that only SentencePiece's vocabularies have.
    pub fn parse(json: &str) -> Result<Parts, String> {
        let parts: Parts = serde_json::from_str(json).map_err(|e| e.to_string())?;
        match parts.normalizer.as_ref().is_none_or(is_known) {
            true => Ok(parts),
            false => Err("only byte-level BPE is supported: no Precompiled normalizer".to_owned()),
        }
    }

    /// The token that is put before every text.
    pub fn first_token(&self) -> Option<u32> {
        first_of(self.post_processor.as_ref()?)
    }
}

fn is_known(normalizer: &Value) -> bool {
    let parts = normalizer["normalizers"].as_array();
    match normalizer["type"].as_str() {
        Some("Sequence") => parts.is_some_and(|parts| parts.iter().all(is_known)),
        Some(kind) => kind != "Precompiled",
        None => false,
    }
}

fn first_of(processor: &Value) -> Option<u32> {
    let id = match processor["type"].as_str()? {
        "Sequence" => {
            return processor["processors"]
                .as_array()?
                .iter()
                .find_map(first_of);
        }
        "TemplateProcessing" => {
            let name = processor["single"][0]["SpecialToken"]["id"].as_str()?;
            &processor["special_tokens"][name]["ids"][0]
        }
        "BertProcessing" | "RobertaProcessing" => &processor["cls"][1],
        _ => return None,
    };
    id.as_u64()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_token_is_that_of_the_template() {
        let first = |processor: Value| {
            let json = json!({ "post_processor": processor }).to_string();
            Parts::parse(&json).expect("parsed").first_token()
        };
        let template = json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}},
        });
        assert_eq!(first(template.clone()), Some(7));
        let byte_level = json!({"type": "ByteLevel"});
        let both = json!({"type": "Sequence", "processors": [byte_level, template]});
        assert_eq!(first(both), Some(7));
        assert_eq!(
            first(json!({"type": "RobertaProcessing", "cls": ["<s>", 3]})),
            Some(3)
        );
        let mut unnamed = template.clone();
        unnamed["special_tokens"] = json!({"</s>": {"ids": [7]}});
        assert_eq!(first(unnamed), None);
        let mut text_first = template;
        text_first["single"]
            .as_array_mut()
            .expect("a list")
            .reverse();
        assert_eq!(first(text_first), None);
        for other in [byte_level, json!(null), json!([1]), json!({"type": 5})] {
            assert_eq!(first(other), None);
        }
    }

    #[test]
    fn what_the_crate_panics_on_is_an_error() {
        for bad in [
            r#"{"decoder": {"type"ion": 1}}"#,
            r#"{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA=="}}"#,
            r#"{"normalizer": {"type": "Sequence", "normalizers": [{"precompiled_charsmap": ""}]}}"#,
        ] {
            assert!(Parts::parse(bad).is_err(), "{bad}");
        }
    }
}
