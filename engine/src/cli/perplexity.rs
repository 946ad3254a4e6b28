//! `edgellm perplexity`: how well a model predicts a text, and how close it is to a reference.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use engine::Error;
use engine::backend::{Backend, Selected};
use engine::quality::log_probs::{self, LogProbs, StoredPrediction};
use engine::quality::{Estimate, Prediction, Reference, Score, Summary, Windows, score};
use indicatif::{ProgressBar, ProgressStyle};
use memmap2::Mmap;
use rayon::prelude::*;
use serde::Serialize;

use super::atomic_file::AtomicFile;
use super::loaded::Loaded;
use super::{Failure, ModelArgs, interrupt, model_path, positive, set_threads, stdout_failure};

/// Tokens of a window without `--context`: what llama.cpp's program takes.
const DEFAULT_WINDOW_TOKENS: usize = 512;
/// Tokens whose logits are held at once: as many as the CPU backend reads together.
const SCORED_AT_ONCE_TOKENS: usize = 32;

/// Measure how well a model predicts a text, and how close it stays to a reference.
///
/// The text is cut into windows of 512 tokens (--context sets another length), each read from an
/// empty cache; the second half of a window is scored. A BOS token takes the place of a window's
/// first token if the model wants one. Perplexity, divergence and agreement are those of
/// llama.cpp's perplexity program.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct PerplexityArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// UTF-8 text. Without it the Jargon File, which `cargo xtask model fetch` fetches, or the text
    /// of a reference file.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// What to compare with: a file that --save-logits wrote, or a model, which is run beside this
    /// one.
    #[arg(long, value_name = "LOGITS|MODEL")]
    kl_reference: Option<PathBuf>,

    /// Save the model's predictions, to be the reference of later runs.
    #[arg(long, value_name = "FILE")]
    save_logits: Option<PathBuf>,

    /// Windows to read, from the start of the text. Without it, all.
    #[arg(long, value_name = "N", value_parser = positive)]
    chunks: Option<usize>,

    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  edgellm perplexity -m model.gguf --chunks 32
  edgellm perplexity -m f16.gguf --chunks 32 --save-logits f16.logits
  edgellm perplexity -m int4.gguf --kl-reference f16.logits        the same windows of the same text
  edgellm perplexity -m int4.gguf --kl-reference f16.gguf --text my.txt --json";

/// The object that `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    model: &'a str,
    backend: &'a str,
    tier: &'a str,
    /// Model that is the reference; null without one.
    reference_model: Option<&'a str>,
    windows: usize,
    window_tokens: usize,
    seconds: f64,
    #[serde(flatten)]
    summary: &'a Summary,
}

/// Runs the command.
pub fn execute(args: PerplexityArgs) -> Result<ExitCode, Failure> {
    set_threads(args.model.threads);
    interrupt::catch()?;
    let loaded = Loaded::open(args.model.model.as_deref())?;
    let saved = args
        .kl_reference
        .as_deref()
        .map(SavedFile::open)
        .transpose()?
        .flatten();
    let saved = saved.as_ref().map(SavedFile::parse).transpose()?;
    let mut windows = windows(&args, &loaded, saved.as_ref())?;
    if let Some(chunks) = args.chunks {
        windows.truncate(chunks);
    }
    let mut reference = match (saved, &args.kl_reference) {
        (Some(saved), _) => Beside::Saved(saved),
        (None, Some(path)) => Beside::model(path, &args, &loaded, &windows)?,
        (None, None) => Beside::Nothing,
    };
    let Selected {
        mut backend,
        reason,
    } = loaded.backend(&args.model, windows.length())?;
    let mut out = match &args.save_logits {
        Some(path) => Some(log_probs::Writer::new(
            AtomicFile::create(path)?,
            loaded.name(),
            loaded.vocab(),
            &windows,
        )?),
        None => None,
    };

    let started = Instant::now();
    let read_tokens = windows.scored().end;
    let progress = progress((windows.count() * read_tokens) as u64)?;
    let mut scores = Vec::new();
    for ids in windows.iter() {
        let stored = reference.begin_window()?;
        let mut pass = Pass {
            backend: backend.as_mut(),
            windows: &windows,
            ids,
            progress: &progress,
        };
        pass.score(&mut reference, &stored, out.as_mut(), &mut scores)?;
        if interrupt::raised() {
            progress.finish_and_clear();
            return Ok(ExitCode::from(interrupt::EXIT_CODE));
        }
        if let Some(summary) = Summary::of(&scores) {
            progress.set_message(headline(&summary));
        }
    }
    progress.finish_and_clear();
    if let Some(out) = out {
        out.finish()?.commit()?;
    }

    let summary = Summary::of(&scores).ok_or_else(|| Error::machine("nothing was scored"))?;
    let info = backend.info();
    let report = Report {
        model: loaded.name(),
        backend: info.name,
        tier: &info.tier,
        reference_model: reference.name(),
        windows: windows.count(),
        window_tokens: windows.length(),
        seconds: started.elapsed().as_secs_f64(),
        summary: &summary,
    };
    let text = match args.json {
        true => serde_json::to_string(&report).map_err(Error::machine)? + "\n",
        false => {
            eprintln!(
                "{} | {} {} ({reason}) | {} windows of {} tokens in {:.1} s",
                report.model,
                report.backend,
                report.tier,
                report.windows,
                report.window_tokens,
                report.seconds
            );
            table(&report)
        }
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(stdout_failure)?;
    Ok(ExitCode::SUCCESS)
}

/// The windows to read: those of the saved reference, which must be the beginning of `--text` if
/// both are given, else those of the text.
fn windows(
    args: &PerplexityArgs,
    loaded: &Loaded,
    saved: Option<&LogProbs<'_>>,
) -> Result<Windows, Error> {
    if let Some(saved) = saved {
        check_vocabularies(loaded, saved.name, saved.vocab)?;
        if args
            .model
            .context
            .is_some_and(|length| length != saved.windows.length())
        {
            return Err(Error::Input(format!(
                "--context: the saved logits have windows of {} tokens",
                saved.windows.length()
            )));
        }
        if args.text.is_none() {
            loaded.check_context(saved.windows.length())?;
            return Ok(saved.windows.clone());
        }
    }
    let length = match (saved, args.model.context) {
        (Some(saved), _) => saved.windows.length(),
        (None, Some(context)) => context,
        (None, None) => DEFAULT_WINDOW_TOKENS,
    };
    loaded.check_context(length)?;
    let path = match &args.text {
        Some(path) => path.clone(),
        None => model_path::default_text()?,
    };
    let text = std::fs::read_to_string(&path)
        .map_err(|e| Error::Input(format!("cannot read {}: {e}", path.display())))?;
    let ids = loaded.tokenizer.encode(&text, true)?;
    let limit = match (saved, args.chunks) {
        (Some(saved), _) => Some(saved.windows.count()),
        (None, chunks) => chunks,
    };
    let windows = Windows::cut(ids, length, loaded.tokenizer.added_bos(), limit)?;
    match saved {
        Some(saved) if saved.windows != windows => Err(Error::Input(format!(
            "the saved logits are not of {}, or {} splits it into other tokens than {} does",
            path.display(),
            loaded.name(),
            saved.name
        ))),
        _ => Ok(windows),
    }
}

fn check_vocabularies(loaded: &Loaded, name: &str, vocab: usize) -> Result<(), Error> {
    match loaded.vocab() == vocab {
        true => Ok(()),
        false => Err(Error::Input(format!(
            "{} has {} tokens, the reference {name} has {vocab}: they cannot be compared",
            loaded.name(),
            loaded.vocab()
        ))),
    }
}

/// A file of saved logits mapped into memory.
struct SavedFile(Mmap);

impl SavedFile {
    /// Maps `path` if it is a file of saved logits; anything else is to be read as a model.
    fn open(path: &Path) -> Result<Option<Self>, Error> {
        let Ok(mut file) = File::open(path) else {
            return Ok(None);
        };
        let mut magic = [0; log_probs::MAGIC.len()];
        if !path.is_file() || file.read_exact(&mut magic).is_err() || magic != *log_probs::MAGIC {
            return Ok(None);
        }
        // SAFETY: the map is private and read-only. The file was renamed into place when it was
        // whole; who changes it in place while it is in use breaks their own run.
        let map = unsafe { Mmap::map(&file) }
            .map_err(|e| Error::Input(format!("cannot read {}: {e}", path.display())))?;
        Ok(Some(Self(map)))
    }

    fn parse(&self) -> Result<LogProbs<'_>, Error> {
        LogProbs::parse(&self.0)
    }
}

/// What the model is compared with.
enum Beside<'a> {
    Nothing,
    Saved(LogProbs<'a>),
    Model {
        name: String,
        backend: Box<dyn Backend>,
    },
}

impl Beside<'_> {
    /// Loads a reference model; it must split the text as the measured one does.
    fn model(
        path: &Path,
        args: &PerplexityArgs,
        loaded: &Loaded,
        windows: &Windows,
    ) -> Result<Self, Error> {
        let reference = Loaded::open(Some(path))?;
        check_vocabularies(loaded, reference.name(), reference.vocab())?;
        if !loaded.tokenizer.agrees_with(&reference.tokenizer) {
            return Err(Error::Input(format!(
                "{} and {} have different tokens: they cannot be compared",
                loaded.name(),
                reference.name()
            )));
        }
        reference.check_context(windows.length())?;
        Ok(Self::Model {
            backend: reference.backend(&args.model, windows.length())?.backend,
            name: reference.name().to_owned(),
        })
    }

    fn name(&self) -> Option<&str> {
        match self {
            Beside::Nothing => None,
            Beside::Saved(saved) => Some(saved.name),
            Beside::Model { name, .. } => Some(name),
        }
    }

    /// The saved predictions of the window that begins.
    fn begin_window(&mut self) -> Result<Vec<StoredPrediction>, Error> {
        match self {
            Beside::Saved(saved) => saved.next_window(),
            Beside::Nothing | Beside::Model { .. } => Ok(Vec::new()),
        }
    }
}

/// One window going through the model.
struct Pass<'a> {
    backend: &'a mut dyn Backend,
    windows: &'a Windows,
    /// `(length,)`.
    ids: &'a [u32],
    progress: &'a ProgressBar,
}

impl Pass<'_> {
    /// Appends the window's scores, and its records to `out`. `stored` are the saved predictions
    /// of its scored positions, if the reference is a file.
    fn score(
        &mut self,
        reference: &mut Beside<'_>,
        stored: &[StoredPrediction],
        mut out: Option<&mut log_probs::Writer<AtomicFile>>,
        scores: &mut Vec<Score>,
    ) -> Result<(), Error> {
        let scored = self.windows.scored();
        let mut beside = match reference {
            Beside::Model { backend, .. } => Some(backend.as_mut()),
            Beside::Nothing | Beside::Saved(_) => None,
        };
        let before = &self.ids[..scored.start];
        self.backend.rewind(0);
        self.backend.prefill(before)?;
        if let Some(backend) = &mut beside {
            backend.rewind(0);
            backend.prefill(before)?;
        }
        self.progress.inc(scored.start as u64);
        for start in scored.clone().step_by(SCORED_AT_ONCE_TOKENS) {
            let positions = start..(start + SCORED_AT_ONCE_TOKENS).min(scored.end);
            let ids = &self.ids[positions.clone()];
            let logits = self.backend.prefill_logits(ids)?;
            let vocab = logits.len() / ids.len();
            let other = match &mut beside {
                Some(backend) => backend.prefill_logits(ids)?,
                None => Vec::new(),
            };
            let saves = out.is_some();
            let results: Vec<(Score, Vec<u8>)> = positions
                .clone()
                .into_par_iter()
                .map(|at| {
                    let row = (at - start) * vocab..(at - start + 1) * vocab;
                    let prediction = Prediction::new(&logits[row.clone()])?;
                    let next = self.ids[at + 1];
                    let reference = match (other.get(row), stored.get(at - scored.start)) {
                        (Some(other), _) => Some(Reference::Model(Prediction::new(other)?)),
                        (None, Some(stored)) => Some(Reference::Stored(stored)),
                        (None, None) => None,
                    };
                    let record = match saves {
                        true => log_probs::record(&prediction, next),
                        false => Vec::new(),
                    };
                    Ok((score(&prediction, next, reference), record))
                })
                .collect::<Result<_, Error>>()?;
            for (score, record) in results {
                scores.push(score);
                if let Some(out) = &mut out {
                    out.write(&record)?;
                }
            }
            self.progress.inc(ids.len() as u64);
        }
        Ok(())
    }
}

fn progress(tokens: u64) -> Result<ProgressBar, Error> {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} tokens, {msg}{eta} left")
        .map_err(Error::machine)?;
    Ok(ProgressBar::new(tokens).with_style(style))
}

/// The running figures beside the bar.
fn headline(summary: &Summary) -> String {
    let perplexity = format!("perplexity {:.3}, ", summary.perplexity.mean);
    match &summary.reference {
        Some(reference) => format!("{perplexity}mean KL {:.5}, ", reference.kl.mean),
        None => perplexity,
    }
}

/// The figures, a line each.
fn table(report: &Report<'_>) -> String {
    let Summary {
        tokens,
        perplexity,
        reference,
    } = report.summary;
    let line = |name: &str, value: String| format!("{name:<28}{value}\n");
    let with_error =
        |e: &Estimate, digits: usize| format!("{:.digits$} ± {:.digits$}", e.mean, e.error);
    let percent = |share: f64| 100.0 * share;
    let mut text = line("scored tokens", tokens.to_string());
    text += &line("perplexity", with_error(perplexity, 4));
    if let (Some(reference), Some(name)) = (reference, report.reference_model) {
        text += &line("reference", name.to_owned());
        text += &line("  perplexity", with_error(&reference.perplexity, 4));
        text += &line(
            "  ln of the ratio",
            with_error(&reference.log_perplexity_ratio, 6),
        );
        text += &line("  mean KL divergence", with_error(&reference.kl, 7));
        text += &line(
            "  median KL divergence",
            format!("{:.7}", reference.kl_median),
        );
        text += &line("  99% KL divergence", format!("{:.6}", reference.kl_99));
        text += &line(
            "  maximum KL divergence",
            format!("{:.6}", reference.kl_max),
        );
        text += &line(
            "  same top token",
            format!(
                "{:.2}% ± {:.2}%",
                percent(reference.top1.mean),
                percent(reference.top1.error)
            ),
        );
        text += &line(
            "  RMS change of p(next)",
            format!("{:.3}%", percent(reference.rms_probability_change)),
        );
    }
    text
}
