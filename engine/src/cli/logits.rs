//! `edgellm logits`: the logits of every position of a text, to compare with another
//! implementation (KL divergence, top-1 agreement).

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use engine::Error;
use engine::backend::Selected;
use engine::generate::check_prompt;
use indicatif::{ProgressBar, ProgressStyle};

use super::atomic_file::AtomicFile;
use super::loaded::Loaded;
use super::{Failure, ModelArgs, set_threads};

/// Write the logits of every position of a text, to compare with another implementation.
///
/// Tokens are fed one at a time, as when text is generated. The file is float32, little-endian,
/// row-major: (tokens, vocabulary). Row i holds the logits after token i.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct LogitsArgs {
    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    source: Source,

    /// File to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

/// Where the tokens come from.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Source {
    /// UTF-8 text, tokenised as a raw prompt.
    #[arg(long, value_name = "FILE")]
    text_file: Option<PathBuf>,

    /// Token ids, separated by white space or commas.
    #[arg(long, value_name = "FILE")]
    ids_file: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  edgellm logits -m model.gguf --text-file text.txt --out logits.f32
  edgellm logits --ids-file ids.txt --out logits.f32 --backend cuda --tier sm_75";

/// Runs the command.
pub fn execute(args: LogitsArgs) -> Result<ExitCode, Failure> {
    set_threads(args.model.threads);
    let loaded = Loaded::open(args.model.model.as_deref())?;
    let ids = match (&args.source.text_file, &args.source.ids_file) {
        (Some(path), _) => loaded.tokenizer.encode(&read_text(path)?, true)?,
        (None, Some(path)) => parse_ids(&read_text(path)?)?,
        (None, None) => Vec::new(),
    };
    let context = loaded.check_context(args.model.context.unwrap_or(ids.len()))?;
    check_prompt(ids.len(), context)?;
    let Selected {
        mut backend,
        reason,
    } = loaded.backend(&args.model, context)?;

    let mut out = AtomicFile::create(&args.out)?;
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} tokens, {eta} left")
        .map_err(Error::machine)?;
    let progress = ProgressBar::new(ids.len() as u64).with_style(style);
    for id in &ids {
        backend.decode(*id)?;
        let logits = backend.logits()?;
        let bytes: Vec<u8> = logits
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect();
        out.write_all(&bytes)
            .map_err(|e| Error::Machine(format!("cannot write {}: {e}", args.out.display())))?;
        progress.inc(1);
    }
    progress.finish_and_clear();
    out.commit()?;
    let info = backend.info();
    eprintln!(
        "{} | {} {} ({reason}) | ({}, {}) float32",
        args.out.display(),
        info.name,
        info.tier,
        ids.len(),
        loaded.vocab()
    );
    Ok(ExitCode::SUCCESS)
}

fn read_text(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path)
        .map_err(|e| Error::Input(format!("cannot read {}: {e}", path.display())))
}

fn parse_ids(text: &str) -> Result<Vec<u32>, Error> {
    text.split(|c: char| c.is_whitespace() || c == ',')
        .filter(|word| !word.is_empty())
        .map(|word| {
            word.parse()
                .map_err(|_| Error::Input(format!("--ids-file: `{word}` is not a token id")))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_separated_by_white_space_or_commas() {
        assert_eq!(parse_ids("1, 2\n3,4\t5\n").unwrap(), [1, 2, 3, 4, 5]);
        assert!(parse_ids("").unwrap().is_empty());
        assert_eq!(parse_ids("1 x").unwrap_err().exit_code(), 2);
        assert!(parse_ids("-1").is_err());
    }
}
