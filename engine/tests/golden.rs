//! The engine against golden references made by other programs: `transformers` in float32 for ids
//! and logits, the `tokenizers` package for token ids. `golden/make_golden.py` made the data.
//!
//! Every test of a model runs on the CPU, and on a GPU once for each tier of PTX that it can run;
//! without one it prints `skipped: no GPU`. `EDGELLM_GOLDEN_DIR` and `EDGELLM_MODEL` name the data
//! and the default model where the tests run outside of a checkout.

#[path = "golden/agreement.rs"]
mod agreement;
#[path = "golden/blocks.rs"]
mod blocks;
#[path = "golden/choices.rs"]
mod choices;
#[path = "golden/container.rs"]
mod container;
#[path = "golden/greedy.rs"]
mod greedy;
#[path = "golden/hf.rs"]
mod hf;
#[path = "golden/kv.rs"]
mod kv;
#[path = "golden/logits.rs"]
mod logits;
#[path = "golden/needle.rs"]
mod needle;
#[path = "golden/prompts.rs"]
mod prompts;
#[path = "golden/support.rs"]
mod support;
#[path = "golden/templates.rs"]
mod templates;
#[path = "golden/tiny.rs"]
mod tiny;
#[path = "golden/tokenizer.rs"]
mod tokenizer;
