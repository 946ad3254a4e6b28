//! The generation loop against a backend that plays back a script.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};

use engine::Error;
use engine::backend::{Backend, BackendInfo, Profile};
use engine::generate::{Limits, Outcome, Stop, generate};
use engine::sampler::Sampling;
use engine::tokenizer::Tokenizer;
use models::file::gguf::Gguf;

const VOCAB: usize = 320;
/// `<|im_end|>` of the synthetic vocabulary.
const END: u32 = 258;

/// Answers with `script`, one token after another, whatever it is given.
struct Scripted {
    info: BackendInfo,
    script: Vec<u32>,
    /// How each token was to be chosen.
    asked: Vec<Sampling>,
    appended: Vec<u32>,
    calls: Vec<usize>,
}

impl Scripted {
    fn new(script: &[u32]) -> Self {
        Self {
            info: BackendInfo {
                name: "cpu",
                tier: "script".into(),
                device: String::new(),
                reason: String::new(),
                bytes_per_token: 1,
            },
            script: script.to_vec(),
            asked: Vec::new(),
            appended: Vec::new(),
            calls: Vec::new(),
        }
    }
}

impl Backend for Scripted {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<(), Error> {
        self.appended.extend(tokens);
        self.calls.push(tokens.len());
        Ok(())
    }

    fn decode(&mut self, token: u32) -> Result<(), Error> {
        self.prefill(&[token])
    }

    fn choose(&mut self, sampling: &Sampling) -> Result<u32, Error> {
        self.asked.push(*sampling);
        Ok(self.script[self.asked.len() - 1])
    }

    fn logits(&mut self) -> Result<Vec<f32>, Error> {
        Err(Error::Machine("a script has no logits".into()))
    }

    fn tokens(&self) -> &[u32] {
        &self.appended
    }

    fn rewind(&mut self, tokens: usize) {
        self.appended.truncate(tokens);
    }

    fn profile(&mut self, _: bool) -> Result<Profile, Error> {
        Err(Error::Machine("a script takes no time".into()))
    }
}

fn tokenizer() -> Tokenizer {
    let bytes = support::model("tiny");
    Tokenizer::from_gguf(&Gguf::parse(&bytes).expect("parsed"), VOCAB).expect("built")
}

/// Runs `script` and returns the outcome and the pieces of text as they came.
fn play(
    backend: &mut Scripted,
    sampling: Sampling,
    prompt: &[u32],
    limits: Limits<'_>,
) -> Result<(Outcome, Vec<String>), Error> {
    let mut pieces = Vec::new();
    let outcome = generate(backend, &tokenizer(), &sampling, prompt, limits, |piece| {
        pieces.push(piece.text.to_owned());
        Ok(())
    })?;
    Ok((outcome, pieces))
}

fn limits(max_tokens: usize, context: usize) -> Limits<'static> {
    static NEVER: AtomicBool = AtomicBool::new(false);
    Limits {
        max_tokens,
        context,
        interrupt: &NEVER,
    }
}

fn ids(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

#[test]
fn a_prompt_that_begins_like_the_cache_starts_from_it() {
    let mut backend = Scripted::new(&[65, END, 66, END, 67, END]);
    let run = |backend: &mut Scripted, prompt: &[u32]| {
        backend.calls.clear();
        let (outcome, _) = play(backend, Sampling::GREEDY, prompt, limits(9, 64)).expect("run");
        outcome.prompt_tokens
    };
    assert_eq!(run(&mut backend, &ids("first question")), 14);
    // The conversation so far and more: what was said is in the cache.
    assert_eq!(backend.tokens(), ids("first questionA"));
    assert_eq!(run(&mut backend, &ids("first questionA second")), 7);
    assert_eq!(backend.calls[0], 7);
    assert_eq!(backend.tokens(), ids("first questionA secondB"));
    // Another second half; then the same again, of which one token has to be computed.
    assert_eq!(run(&mut backend, &ids("first quest")), 1);
    assert_eq!(backend.tokens(), ids("first questC"));
}

#[test]
fn text_is_streamed_by_whole_characters_and_ends_with_the_answer() {
    let mut script = ids("naïve 🦀!");
    script.push(END);
    script.extend(ids("never said"));
    let mut backend = Scripted::new(&script);
    let (outcome, pieces) =
        play(&mut backend, Sampling::GREEDY, &[1, 2, 3], limits(100, 256)).expect("ran");
    assert_eq!(outcome.text, "naïve 🦀!");
    assert_eq!(pieces.concat(), outcome.text);
    // ï and 🦀 come with their last byte; the bytes before give nothing.
    assert_eq!(pieces[2..4], ["", "ï"]);
    assert_eq!(pieces[7..11], ["", "", "", "🦀"]);
    assert_eq!(outcome.stop, Stop::EndOfAnswer);
    assert_eq!(
        outcome.ids,
        script[..script.len() - ids("never said").len()]
    );
    assert_eq!(outcome.prompt_tokens, 3);
    // What was chosen last is not appended.
    assert_eq!(backend.appended.len(), 3 + outcome.ids.len() - 1);
    assert!(outcome.first_token.is_some() && outcome.decode_tokens_per_second().is_some());
}

#[test]
fn a_character_cut_off_at_the_end_becomes_a_replacement_character() {
    let crab = ids("🦀");
    let mut backend = Scripted::new(&crab);
    let (outcome, pieces) =
        play(&mut backend, Sampling::GREEDY, &[1], limits(3, 256)).expect("ran");
    assert_eq!(outcome.text, "\u{FFFD}");
    assert_eq!(pieces, ["", "", "", "\u{FFFD}"]);
    assert_eq!(outcome.ids.len(), 3);
    assert_eq!(outcome.stop, Stop::Length);
}

#[test]
fn a_full_context_ends_the_run() {
    let mut backend = Scripted::new(&ids("abcdefgh"));
    let (outcome, _) = play(
        &mut backend,
        Sampling::GREEDY,
        &[1, 2, 3, 4],
        limits(100, 6),
    )
    .expect("ran");
    assert_eq!(outcome.text, "abc");
    assert_eq!(outcome.stop, Stop::ContextFull);
    assert_eq!(backend.position(), 6);
    // A prompt that fills the context still has a first token.
    let mut backend = Scripted::new(&ids("abcdefgh"));
    let (outcome, _) = play(
        &mut backend,
        Sampling::GREEDY,
        &[1, 2, 3, 4],
        limits(100, 4),
    )
    .expect("ran");
    assert_eq!(outcome.text, "a");
}

#[test]
fn no_tokens_asked_reads_the_prompt_only() {
    let mut backend = Scripted::new(&[]);
    let (outcome, pieces) =
        play(&mut backend, Sampling::GREEDY, &[7; 10], limits(0, 256)).expect("ran");
    assert_eq!(
        (outcome.prompt_tokens, outcome.ids.len(), pieces.len()),
        (10, 0, 0)
    );
    assert_eq!(outcome.stop, Stop::Length);
    assert!(outcome.first_token.is_none());
    assert!(outcome.decode_tokens_per_second().is_none());
    assert_eq!(backend.position(), 10);
}

#[test]
fn prompts_that_do_not_fit_never_reach_the_backend() {
    for (prompt, context) in [(&[][..], 256), (&[1, 2, 3][..], 2)] {
        let mut backend = Scripted::new(&[]);
        let error =
            play(&mut backend, Sampling::GREEDY, prompt, limits(1, context)).expect_err("refused");
        assert_eq!(error.exit_code(), 2);
        assert_eq!(backend.position(), 0);
    }
}

#[test]
fn every_token_is_chosen_as_asked() {
    let hot = Sampling {
        temperature: 1.0,
        seed: 1,
        ..Sampling::GREEDY
    };
    let script = ids("same text");
    let mut backend = Scripted::new(&script);
    let (outcome, _) = play(&mut backend, hot, &[1], limits(9, 64)).expect("ran");
    assert_eq!(outcome.text, "same text");
    assert_eq!(backend.asked, [hot; 9]);
}

#[test]
fn an_interrupt_ends_the_run_after_the_current_token() {
    let flag = AtomicBool::new(false);
    let stoppable = Limits {
        max_tokens: 100,
        context: 2048,
        interrupt: &flag,
    };
    let mut backend = Scripted::new(&ids("abcdef"));
    let outcome = generate(
        &mut backend,
        &tokenizer(),
        &Sampling::GREEDY,
        &[1],
        stoppable,
        |piece| {
            flag.store(piece.text == "c", Ordering::Relaxed);
            Ok(())
        },
    )
    .expect("ran");
    assert_eq!(
        (outcome.text.as_str(), outcome.stop),
        ("abc", Stop::Interrupted)
    );

    // Raised during a long prompt: the rest of the prompt is left.
    flag.store(true, Ordering::Relaxed);
    let mut backend = Scripted::new(&[]);
    let outcome = generate(
        &mut backend,
        &tokenizer(),
        &Sampling::GREEDY,
        &[1; 1000],
        stoppable,
        |_| Ok(()),
    )
    .expect("ran");
    assert_eq!(
        (outcome.stop, outcome.prompt_tokens),
        (Stop::Interrupted, 0)
    );
}

#[test]
fn long_prompts_arrive_complete_and_in_order() {
    let prompt: Vec<u32> = (0..1000).map(|i| i % VOCAB as u32).collect();
    let mut backend = Scripted::new(&ids("x"));
    play(&mut backend, Sampling::GREEDY, &prompt, limits(1, 2048)).expect("ran");
    assert_eq!(backend.appended, prompt);
    assert!(backend.calls.len() < 10, "{} calls", backend.calls.len());
}

#[test]
fn a_failing_reader_ends_the_run_with_its_error() {
    let mut backend = Scripted::new(&ids("abc"));
    let error = generate(
        &mut backend,
        &tokenizer(),
        &Sampling::GREEDY,
        &[1],
        limits(3, 64),
        |_| Err(Error::Machine("pipe closed".into())),
    )
    .expect_err("failed");
    assert_eq!(error.to_string(), "pipe closed");
}
