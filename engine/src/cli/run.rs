//! `edgellm run`: a prompt in, text out as it is generated, then one line about speed.

use std::io::{Read, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use engine::Error;
use engine::backend::{Backend, Selected, select};
use engine::chat::Message;
use engine::generate::{Limits, Outcome, Piece, Stop, check_prompt, generate};
use engine::sampler::Sampling;
use engine::weights::ModelFile;
use serde::Serialize;

use super::{Failure, ModelArgs, interrupt, model_path, set_threads, stdout_failure, trace};

/// Most bytes read as a prompt from standard input.
const STDIN_LIMIT_BYTES: u64 = 64 << 20;
/// The cache of a run without `--context` is a multiple of this many tokens.
const CONTEXT_STEP_TOKENS: usize = 64;

/// Generate text from a prompt.
///
/// Text is streamed to standard output; one line about model, backend and speed follows on
/// standard error. If the model has a chat template, the prompt becomes a user's message in it.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Prompt; `-` reads it from standard input, without one final line break.
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    input: String,

    /// Most tokens to generate; 0 only reads the prompt.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 200)]
    tokens: usize,

    /// System message for the chat template, instead of the model's own.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,

    /// Continue the prompt as it is, without the chat template.
    #[arg(long)]
    raw: bool,

    /// Always take the most likely token.
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p", "seed"])]
    greedy: bool,

    /// Randomness: 0 is greedy, 1 the model's own distribution.
    #[arg(long, value_name = "T", default_value_t = 0.7)]
    temperature: f32,

    /// Draw from the K most likely tokens, 1 to 64.
    #[arg(long, value_name = "K", default_value_t = 40)]
    top_k: u32,

    /// Draw from the most likely tokens that together reach this probability.
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,

    /// Draw from tokens at least this probable, the most likely one taken as 1.
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,

    /// Makes tokens that the context holds less likely: divides their positive logits and multiplies
    /// their negative ones; 1 leaves them.
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    repetition_penalty: f32,

    /// Seed of the random choice; the same seed gives the same text. Without it, the clock.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Print token ids instead of text: the prompt's on standard error, generated ones on standard
    /// output. The id that ended the answer is among them.
    #[arg(long)]
    ids: bool,

    /// Print one JSON object at the end instead of streaming text.
    #[arg(long)]
    json: bool,

    /// Show on standard error which kernels the next token would take, how they are launched and why, and
    /// what each costs. CUDA only.
    #[arg(long)]
    trace: bool,
}

const EXAMPLES: &str = "\
Examples:
  edgellm run -i \"What is the capital of France?\" --greedy
  edgellm run -m model.gguf -n 200 -i \"Explain quantum computing:\" --temperature 0.3 --seed 7
  edgellm run -i \"Once upon a time\" --raw            continue a text, no chat
  edgellm run -i - --system \"Answer in French.\" < question.txt
  edgellm run -i \"Hi\" --json | python3 -m json.tool   text, ids and speed as JSON
  edgellm run -i \"Hi\" --backend cuda --tier sm_80    force CUDA and a tier";

/// The object that `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    text: &'a str,
    ids: &'a [u32],
    prompt_tokens: usize,
    /// Null if nothing was measured, as are the next two.
    prompt_tokens_per_second: Option<f64>,
    decode_tokens_per_second: Option<f64>,
    ttft_ms: Option<f64>,
    backend: &'a str,
    tier: &'a str,
    model: &'a str,
}

/// Runs the command.
pub fn execute(args: RunArgs) -> Result<ExitCode, Failure> {
    set_threads(args.model.threads);
    let seed = args.seed.unwrap_or_else(clock_seed);
    let chosen = match args.greedy {
        true => Sampling::GREEDY,
        false => Sampling {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
            seed,
            ..Sampling::GREEDY
        },
    };
    let sampling = Sampling {
        repetition_penalty: args.repetition_penalty,
        ..chosen
    };
    sampling.check()?;
    let input = read_input(&args.input)?;
    if input.is_empty() {
        return Err(Error::Input("the prompt is empty".into()).into());
    }
    interrupt::catch()?;

    let mapped = ModelFile::open(&model_path::resolve(args.model.model.as_deref())?)?;
    let file = mapped.parse()?;
    let recipe = mapped.recipe(&file)?;
    let (tokenizer, model) = rayon::join(
        || mapped.tokenizer(&file, &recipe),
        || mapped.load(&file, recipe.clone()),
    );
    let tokenizer = tokenizer?;
    let template = match args.raw {
        true => None,
        false => mapped.chat_template(&file, &tokenizer)?,
    };
    if template.is_none() && args.system.is_some() {
        return Err(Error::Input("--system needs a model with a chat template".into()).into());
    }
    let prompt = match template {
        None => tokenizer.encode(&input, true)?,
        Some(template) => {
            let system = args.system.map(|text| Message::new("system", text));
            let messages: Vec<Message> = system
                .into_iter()
                .chain([Message::new("user", input)])
                .collect();
            tokenizer.encode(&template.render(&messages)?, false)?
        }
    };
    let trained = recipe.config.context;
    // The trace is of one more token.
    let tokens = args.tokens.saturating_add(usize::from(args.trace));
    let context = context_tokens(args.model.context, trained, prompt.len(), tokens)?;
    check_prompt(prompt.len(), context)?;

    // Given away: a backend that lays weights out anew frees them as it goes.
    let selected = select(
        args.model.backend.into(),
        Arc::new(model?),
        args.model.cache(context),
        args.model.tier.map(Into::into),
    )?;
    let Selected {
        mut backend,
        reason,
    } = selected;
    mapped.release();
    if args.trace && backend.info().name != "cuda" {
        return Err(Error::Input(format!(
            "--trace shows the kernels of the CUDA backend, this is {} ({reason})",
            backend.info().name
        ))
        .into());
    }

    if args.ids {
        eprintln!("prompt ids: {}", join_ids(&prompt));
    }
    let mut stdout = std::io::stdout().lock();
    let mut pipe_broke = None;
    let mut count = 0usize;
    let outcome = generate(
        backend.as_mut(),
        &tokenizer,
        &sampling,
        &prompt,
        Limits {
            max_tokens: args.tokens,
            context,
            interrupt: &interrupt::RAISED,
        },
        |piece: Piece<'_>| {
            let written = match (args.json, args.ids, piece.id) {
                (true, _, _) | (false, true, None) => Ok(()),
                (false, true, Some(id)) => {
                    let separator = if count == 0 { "" } else { " " };
                    write!(stdout, "{separator}{id}").and_then(|()| stdout.flush())
                }
                (false, false, _) => stdout
                    .write_all(piece.text.as_bytes())
                    .and_then(|()| stdout.flush()),
            };
            count += 1;
            written.map_err(|error| {
                let message = Error::machine(&error);
                pipe_broke = Some(error);
                message
            })
        },
    );
    let outcome = match (outcome, pipe_broke) {
        (_, Some(error)) => return Err(stdout_failure(error)),
        (outcome, None) => outcome?,
    };

    let info = backend.info();
    let last_line = match args.json {
        true => {
            let report = Report {
                text: &outcome.text,
                ids: &outcome.ids,
                prompt_tokens: outcome.prompt_tokens,
                prompt_tokens_per_second: outcome.prompt_tokens_per_second(),
                decode_tokens_per_second: outcome.decode_tokens_per_second(),
                ttft_ms: outcome.first_token.map(|time| 1e3 * time.as_secs_f64()),
                backend: info.name,
                tier: &info.tier,
                model: &recipe.config.name,
            };
            serde_json::to_string(&report).map_err(Error::machine)?
        }
        false => String::new(),
    };
    // Streamed text ends with a line break of its own or gets one.
    if args.json || !(outcome.ids.is_empty() || outcome.text.ends_with('\n') && !args.ids) {
        writeln!(stdout, "{last_line}")
            .and_then(|()| stdout.flush())
            .map_err(stdout_failure)?;
    }
    let drawn = sampling.temperature != 0.0 && sampling.top_k != 1;
    let sampled = drawn.then_some(seed);
    eprintln!(
        "{}",
        summary(
            &recipe.config.name,
            backend.as_ref(),
            &reason,
            &outcome,
            context,
            sampled
        )
    );
    if args.trace {
        eprintln!("{}", trace::table(&backend.profile(true)?.kernels));
    }
    Ok(match outcome.stop {
        Stop::Interrupted => ExitCode::from(130),
        Stop::EndOfAnswer | Stop::Length | Stop::ContextFull => ExitCode::SUCCESS,
    })
}

/// The line after a run.
fn summary(
    model: &str,
    backend: &dyn Backend,
    reason: &str,
    outcome: &Outcome,
    context: usize,
    seed: Option<u64>,
) -> String {
    let info = backend.info();
    let mut parts = vec![
        model.to_owned(),
        format!("{} {} ({reason})", info.name, info.tier),
    ];
    if let Some(rate) = outcome.prompt_tokens_per_second() {
        parts.push(format!(
            "prompt {} tokens, {rate:.1} tok/s",
            outcome.prompt_tokens
        ));
    }
    if let Some(rate) = outcome.decode_tokens_per_second() {
        let gigabytes = rate * info.bytes_per_token as f64 / 1e9;
        parts.push(format!(
            "decode {} tokens, {rate:.1} tok/s, {gigabytes:.2} GB/s of weights",
            outcome.ids.len()
        ));
    }
    if let Some(time) = outcome.first_token {
        parts.push(format!("first token {:.0} ms", 1e3 * time.as_secs_f64()));
    }
    if let Some(seed) = seed {
        parts.push(format!("seed {seed}"));
    }
    match outcome.stop {
        Stop::ContextFull => {
            parts.push(format!("stopped: the context of {context} tokens is full"))
        }
        Stop::Interrupted => parts.push("interrupted".to_owned()),
        Stop::EndOfAnswer | Stop::Length => {}
    }
    let line: String = parts.join(" | ");
    line.chars().filter(|c| !c.is_control()).collect()
}

/// Tokens that the cache must hold.
fn context_tokens(
    asked: Option<usize>,
    trained: usize,
    prompt: usize,
    generated: usize,
) -> Result<usize, Error> {
    match asked {
        Some(asked) if asked > trained => Err(Error::Input(format!(
            "--context {asked} is more than the {trained} tokens that the model was trained for"
        ))),
        Some(asked) => Ok(asked),
        None => Ok(prompt
            .saturating_add(generated)
            .checked_next_multiple_of(CONTEXT_STEP_TOKENS)
            .unwrap_or(usize::MAX)
            .min(trained)),
    }
}

/// The prompt: the flag's value, or standard input for `-`.
fn read_input(flag: &str) -> Result<String, Error> {
    if flag != "-" {
        return Ok(flag.to_owned());
    }
    let mut bytes = Vec::new();
    std::io::stdin()
        .lock()
        .take(STDIN_LIMIT_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::Input(format!("cannot read standard input: {e}")))?;
    if bytes.len() as u64 > STDIN_LIMIT_BYTES {
        return Err(Error::Input(format!(
            "standard input is longer than {STDIN_LIMIT_BYTES} bytes"
        )));
    }
    let mut text = String::from_utf8(bytes)
        .map_err(|e| Error::Input(format!("standard input is not UTF-8: {e}")))?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text)
}

/// A seed that differs from run to run.
fn clock_seed() -> u64 {
    let nanos = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_nanos() as u64);
    // Short enough to type again.
    (nanos ^ (nanos >> 20)) % 1_000_000
}

fn join_ids(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_context_is_what_the_run_needs_within_what_the_model_has() {
        assert_eq!(context_tokens(None, 8192, 10, 200).unwrap(), 256);
        assert_eq!(context_tokens(None, 8192, 10, 0).unwrap(), 64);
        assert_eq!(context_tokens(None, 100, 10, 200).unwrap(), 100);
        assert_eq!(context_tokens(None, 8192, 10, usize::MAX).unwrap(), 8192);
        assert_eq!(context_tokens(Some(100), 8192, 10, 200).unwrap(), 100);
        assert_eq!(
            context_tokens(Some(9000), 8192, 1, 1)
                .unwrap_err()
                .exit_code(),
            2
        );
    }
}
