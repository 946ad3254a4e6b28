//! `edgellm eval`: multiple-choice questions, to see that a changed model keeps its answers.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use engine::Error;
use engine::backend::Selected;
use engine::quality::questions::{Kind, Question, questions};
use engine::quality::{Estimate, Prediction};
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use serde::Serialize;

use super::loaded::Loaded;
use super::{Failure, ModelArgs, interrupt, model_path, positive, set_threads, stdout_failure};

/// Ask a model multiple-choice questions, and see whether it answers as a reference does.
///
/// The questions are made from a dictionary, the same ones every time: which of four definitions
/// follows a term, and which of four terms stands where a text refers to one. A model's answer is the
/// choice with the highest mean log-probability a token. Guessing is right in a quarter of the cases.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Dictionary with lines `:term:`, UTF-8. Without it the Jargon File, which `cargo xtask model
    /// fetch jargon` fetches.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// Questions to ask.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = positive)]
    questions: usize,

    /// Model to compare the answers with: the one that this one was made from.
    #[arg(long, value_name = "MODEL")]
    reference: Option<PathBuf>,

    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  edgellm eval -m model.gguf
  edgellm eval -m int4.gguf --reference f16.gguf --questions 400
  edgellm eval -m int4.gguf --reference f16.gguf --json";

/// The object that `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    backend: &'static str,
    tier: String,
    questions: usize,
    /// Share of right answers.
    accuracy: Estimate,
    /// Of definitions alone.
    definitions: Option<Estimate>,
    /// Of references alone.
    references: Option<Estimate>,
    /// Null without a reference model.
    reference: Option<Comparison>,
    /// The choices taken, 0 to 3.
    answers: Vec<usize>,
}

#[derive(Debug, Serialize)]
struct Comparison {
    model: String,
    accuracy: Estimate,
    /// Share of questions that both models answer alike.
    agreement: Estimate,
    answers: Vec<usize>,
}

/// Runs the command.
pub fn execute(args: EvalArgs) -> Result<ExitCode, Failure> {
    set_threads(args.model.threads);
    interrupt::catch()?;
    let path = match &args.text {
        Some(path) => path.clone(),
        None => model_path::default_text()?,
    };
    let text = std::fs::read_to_string(&path)
        .map_err(|e| Error::Input(format!("cannot read {}: {e}", path.display())))?;
    let asked = questions(&text, args.questions)?;

    let model = Loaded::open(args.model.model.as_deref())?;
    let reference = match &args.reference {
        Some(path) => Some(Loaded::open(Some(path))?),
        None => None,
    };
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} questions, {msg}{eta} left")
        .map_err(Error::machine)?;
    let runs = 1 + u64::from(reference.is_some());
    let progress = ProgressBar::new(runs * asked.len() as u64).with_style(style);
    let mut examinee = Examinee::new(&model, &args.model, &asked)?;
    let answers = examinee.answer_all(&asked, &progress)?;
    let expected = match &reference {
        Some(loaded) if !interrupt::raised() => {
            let mut examinee = Examinee::new(loaded, &args.model, &asked)?;
            Some((loaded, examinee.answer_all(&asked, &progress)?))
        }
        _ => None,
    };
    progress.finish_and_clear();
    if interrupt::raised() {
        return Ok(ExitCode::from(interrupt::EXIT_CODE));
    }

    let right = |answers: &[usize], kind: Option<Kind>| {
        let answered = asked.iter().zip(answers);
        let of_kind =
            answered.filter(|(question, _)| kind.is_none_or(|kind| question.kind == kind));
        share(of_kind.map(|(question, answer)| question.answer == *answer))
    };
    let none = || Error::machine("nothing was asked");
    let info = examinee.selected.backend.info();
    let report = Report {
        model: model.name().to_owned(),
        backend: info.name,
        tier: info.tier.clone(),
        questions: asked.len(),
        accuracy: right(&answers, None).ok_or_else(none)?,
        definitions: right(&answers, Some(Kind::Definition)),
        references: right(&answers, Some(Kind::Reference)),
        reference: match expected {
            Some((loaded, expected)) => Some(Comparison {
                model: loaded.name().to_owned(),
                accuracy: right(&expected, None).ok_or_else(none)?,
                agreement: share(answers.iter().zip(&expected).map(|(a, b)| a == b))
                    .ok_or_else(none)?,
                answers: expected,
            }),
            None => None,
        },
        answers,
    };
    let text = match args.json {
        true => serde_json::to_string(&report).map_err(Error::machine)? + "\n",
        false => {
            eprintln!(
                "{} | {} {} ({})",
                report.model, report.backend, report.tier, examinee.selected.reason
            );
            table(&report)
        }
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(stdout_failure)?;
    Ok(ExitCode::SUCCESS)
}

fn share(yes: impl Iterator<Item = bool>) -> Option<Estimate> {
    let values: Vec<f64> = yes.map(|yes| f64::from(u8::from(yes))).collect();
    Estimate::of(&values)
}

/// A model that answers questions.
struct Examinee<'a> {
    loaded: &'a Loaded,
    selected: Selected,
    /// Tokens at the beginning of the backend's cache.
    cached: Vec<u32>,
}

impl<'a> Examinee<'a> {
    /// The model with room for the longest of `questions`.
    fn new(loaded: &'a Loaded, args: &ModelArgs, questions: &[Question]) -> Result<Self, Error> {
        let mut longest = 0;
        for question in questions {
            for choice in &question.choices {
                longest = longest.max(sequence(loaded, question, choice)?.0.len());
            }
        }
        let context = loaded.check_context(args.context.unwrap_or(longest))?;
        if context < longest {
            return Err(Error::Input(format!(
                "--context {context}: the longest question takes {longest} tokens"
            )));
        }
        Ok(Self {
            loaded,
            selected: loaded.backend(args, context)?,
            cached: Vec::new(),
        })
    }

    fn answer_all(
        &mut self,
        questions: &[Question],
        progress: &ProgressBar,
    ) -> Result<Vec<usize>, Error> {
        let (mut answers, mut right) = (Vec::new(), 0);
        for question in questions {
            if interrupt::raised() {
                break;
            }
            let answer = self.answer(question)?;
            answers.push(answer);
            right += usize::from(answer == question.answer);
            progress.inc(1);
            progress.set_message(format!("{right} of {} right, ", answers.len()));
        }
        Ok(answers)
    }

    /// The likeliest choice; the first of equals.
    fn answer(&mut self, question: &Question) -> Result<usize, Error> {
        let (mut best, mut best_score) = (0, f64::NEG_INFINITY);
        for (number, choice) in question.choices.iter().enumerate() {
            let (ids, given) = sequence(self.loaded, question, choice)?;
            let score = self.mean_log_prob(&ids, given)?;
            if score > best_score {
                (best, best_score) = (number, score);
            }
        }
        Ok(best)
    }

    /// Mean log-probability of `ids[given..]`, each after all before it.
    fn mean_log_prob(&mut self, ids: &[u32], given: usize) -> Result<f64, Error> {
        let backend = self.selected.backend.as_mut();
        let (before, scored) = (&ids[..given - 1], &ids[given..]);
        // The choices of a question have the prompt in common: it is read once.
        let known = before
            .iter()
            .zip(&self.cached)
            .take_while(|(a, b)| a == b)
            .count();
        backend.rewind(known);
        if known < before.len() {
            backend.prefill(&before[known..])?;
        }
        self.cached = before.to_vec();
        let logits = backend.prefill_logits(&ids[given - 1..ids.len() - 1])?;
        let vocab = logits.len() / scored.len();
        let log_probs: Vec<f64> = logits
            .par_chunks(vocab)
            .zip(scored)
            .map(|(row, next)| Ok(Prediction::new(row)?.log_prob(*next)))
            .collect::<Result<_, Error>>()?;
        Ok(log_probs.iter().sum::<f64>() / scored.len() as f64)
    }
}

/// Ids of the prompt with a choice, and how many of them belong to the prompt: at least one, so that
/// the first token of the choice is predicted from something.
fn sequence(
    loaded: &Loaded,
    question: &Question,
    choice: &str,
) -> Result<(Vec<u32>, usize), Error> {
    let prompt = loaded.tokenizer.encode(&question.prompt, true)?;
    let whole = format!("{}{choice}", question.prompt);
    let ids = loaded.tokenizer.encode(&whole, true)?;
    // A tokenizer may join the end of the prompt with the beginning of the choice.
    let shared = ids.iter().zip(&prompt).take_while(|(a, b)| a == b).count();
    let given = shared.clamp(1, ids.len().saturating_sub(1).max(1));
    Ok((ids, given))
}

/// The figures, a line each.
fn table(report: &Report) -> String {
    let line = |name: &str, share: &Estimate| {
        format!(
            "{name:<28}{:.1}% ± {:.1}%\n",
            100.0 * share.mean,
            100.0 * share.error
        )
    };
    let mut text = format!("{:<28}{}\n", "questions", report.questions);
    text += &line("right", &report.accuracy);
    for (name, part) in [
        ("  definitions", &report.definitions),
        ("  references", &report.references),
    ] {
        if let Some(part) = part {
            text += &line(name, part);
        }
    }
    if let Some(reference) = &report.reference {
        text += &format!("{:<28}{}\n", "reference", reference.model);
        text += &line("  right", &reference.accuracy);
        text += &line("  same answers", &reference.agreement);
    }
    text
}
