//! Prompts of published chat templates against those that `transformers` renders. `golden/templates.py`
//! made them.

use engine::chat::{ChatTemplate, Message};
use serde::Deserialize;

use crate::support;
use crate::tokenizer::{Package, packaged};

#[derive(Deserialize)]
struct Reference {
    #[serde(flatten)]
    package: Package,
    bos: String,
    eos: String,
    prompts: Vec<Prompt>,
}

#[derive(Deserialize)]
struct Prompt {
    messages: Vec<Turn>,
    prompt: String,
}

#[derive(Deserialize)]
struct Turn {
    role: String,
    content: String,
}

#[derive(Deserialize)]
struct Config {
    chat_template: String,
}

#[test]
fn prompts_are_those_of_transformers() {
    let references: Vec<Reference> = support::json("templates.json");
    assert!(references.len() >= 2);
    for Reference {
        package,
        bos,
        eos,
        prompts,
    } in references
    {
        let Some(config) = packaged(&package, "tokenizer_config.json") else {
            continue;
        };
        let config: Config = serde_json::from_str(&config).expect("tokenizer_config.json");
        let template = ChatTemplate::new(&config.chat_template, &bos, &eos).expect("compiled");
        for Prompt { messages, prompt } in prompts {
            let messages: Vec<Message> = messages
                .into_iter()
                .map(|turn| Message::new(turn.role, turn.content))
                .collect();
            let rendered = template.render(&messages).expect("rendered");
            assert_eq!(rendered, prompt, "{package:?}");
        }
    }
}
