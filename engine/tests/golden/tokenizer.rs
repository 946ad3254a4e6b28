//! Token ids of varied strings against the reference tokenizer.

use serde::Deserialize;

use crate::support;

#[derive(Deserialize)]
struct Strings {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
}

#[test]
fn smollm2_ids_are_the_reference_ids() {
    let tokenizer = &support::default_model().tokenizer;
    let strings: Strings = support::json("smollm2_tokenizer.json");
    assert!(strings.cases.len() >= 500);
    let mut wrong = Vec::new();
    for case in &strings.cases {
        let ids = tokenizer.encode(&case.text, false).expect("encodes");
        if ids != case.ids {
            wrong.push(format!(
                "{:?}\n  have {ids:?}\n  want {:?}",
                case.text, case.ids
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {} strings differ, the first:\n{}",
        wrong.len(),
        strings.cases.len(),
        wrong[..wrong.len().min(5)].join("\n")
    );
}
