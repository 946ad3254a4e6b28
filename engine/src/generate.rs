//! The generation loop: prefill the prompt, then one token at a time, with the times that the
//! summary reports.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::Error;
use crate::backend::Backend;
use crate::sampler::Sampling;
use crate::tokenizer::{Tokenizer, Utf8Stream};

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The model ended its answer.
    EndOfAnswer,
    /// The requested number of tokens was reached.
    Length,
    /// The context is full.
    ContextFull,
    /// The interrupt flag was raised.
    Interrupted,
}

/// What a run produced.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Generated text, without control tokens.
    pub text: String,
    /// Generated ids, the one that ended the answer included.
    pub ids: Vec<u32>,
    /// Prompt tokens that were appended.
    pub prompt_tokens: usize,
    /// Why it ended.
    pub stop: Stop,
    /// From the start until the prompt's last logits were there.
    pub prefill: Duration,
    /// From the start until the first token was chosen; `None` without one.
    pub first_token: Option<Duration>,
    /// From the first token until the last one was chosen.
    pub decode: Duration,
}

impl Outcome {
    /// Prompt tokens per second.
    pub fn prompt_tokens_per_second(&self) -> Option<f64> {
        rate(self.prompt_tokens, self.prefill)
    }

    /// Generated tokens per second, the first one not counted: it belongs to the prompt.
    pub fn decode_tokens_per_second(&self) -> Option<f64> {
        rate(self.ids.len().saturating_sub(1), self.decode)
    }
}

/// `count` per second, if there was anything to measure.
fn rate(count: usize, time: Duration) -> Option<f64> {
    (count > 0 && time > Duration::ZERO).then(|| count as f64 / time.as_secs_f64())
}

/// One generated token as it is given to the caller.
#[derive(Debug)]
pub struct Piece<'a> {
    /// The token; none for the rest of a cut-off character at the end.
    pub id: Option<u32>,
    /// Text that became complete with it; may be empty.
    pub text: &'a str,
}

/// Limits of one run.
#[derive(Debug, Clone, Copy)]
pub struct Limits<'a> {
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Tokens that the backend's cache holds.
    pub context: usize,
    /// Raised from outside to end the run early.
    pub interrupt: &'a AtomicBool,
}

/// Appends `prompt` to the backend's cache and generates up to `limits.max_tokens` tokens. `emit`
/// gets every token as soon as it is chosen, and once at the end the text of a cut-off character.
///
/// # Errors
/// [`Error::Input`] if the prompt is empty or longer than the context; otherwise whatever the
/// backend or `emit` return.
pub fn generate(
    backend: &mut dyn Backend,
    tokenizer: &Tokenizer,
    sampling: &Sampling,
    prompt: &[u32],
    limits: Limits<'_>,
    mut emit: impl FnMut(Piece<'_>) -> Result<(), Error>,
) -> Result<Outcome, Error> {
    check_prompt(prompt.len(), limits.context)?;
    let interrupted = || limits.interrupt.load(Ordering::Relaxed);
    let mut outcome = Outcome {
        text: String::new(),
        ids: Vec::new(),
        prompt_tokens: 0,
        stop: Stop::Length,
        prefill: Duration::ZERO,
        first_token: None,
        decode: Duration::ZERO,
    };

    let start = Instant::now();
    for chunk in prompt.chunks(backend.prompt_run_tokens()) {
        if interrupted() {
            outcome.stop = Stop::Interrupted;
            break;
        }
        backend.prefill(chunk)?;
        outcome.prompt_tokens += chunk.len();
        outcome.prefill = start.elapsed();
    }
    if outcome.stop == Stop::Interrupted {
        return Ok(outcome);
    }

    let mut stream = Utf8Stream::new();
    let mut first = start;
    while outcome.ids.len() < limits.max_tokens {
        if interrupted() {
            outcome.stop = Stop::Interrupted;
            break;
        }
        if let Some(last) = outcome.ids.last() {
            if backend.position() >= limits.context {
                outcome.stop = Stop::ContextFull;
                break;
            }
            backend.decode(*last)?;
        }
        let id = backend.choose(sampling)?;
        let now = Instant::now();
        if outcome.first_token.is_none() {
            outcome.first_token = Some(now - start);
            // The device may still have been busy when prefill returned.
            outcome.prefill = now - start;
            first = now;
        }
        outcome.decode = now - first;
        outcome.ids.push(id);
        let ended = tokenizer.is_stop(id);
        let from = outcome.text.len();
        if !ended {
            stream.push(tokenizer.token_bytes(id), &mut outcome.text);
        }
        emit(Piece {
            id: Some(id),
            text: &outcome.text[from..],
        })?;
        if ended {
            outcome.stop = Stop::EndOfAnswer;
            break;
        }
    }
    let from = outcome.text.len();
    stream.finish(&mut outcome.text);
    if outcome.text.len() > from {
        emit(Piece {
            id: None,
            text: &outcome.text[from..],
        })?;
    }
    Ok(outcome)
}

/// Whether a prompt of `tokens` can be run at all.
///
/// # Errors
/// [`Error::Input`] if it is empty or longer than the context.
pub fn check_prompt(tokens: usize, context: usize) -> Result<(), Error> {
    if tokens == 0 {
        return Err(Error::Input("the prompt is empty".into()));
    }
    if tokens > context {
        return Err(Error::Input(format!(
            "the prompt has {tokens} tokens, the context holds {context}"
        )));
    }
    Ok(())
}
