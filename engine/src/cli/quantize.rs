//! `edgellm quantize`: any model in, EdgeLLM's own file out.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use engine::Error;
use engine::quantize::{self, Bits, Head, Hooks, Method, Options};
use engine::tokenizer::Tokenizer;
use engine::weights::ModelFile;
use indicatif::{ProgressBar, ProgressStyle};
use models::file::container::StoredWeight;
use models::quant::Int4Form;
use serde::Serialize;

use super::atomic_file::AtomicFile;
use super::{Failure, interrupt, model_path, positive, set_threads, stdout_failure};

/// Tokens of a piece of the calibration text.
const SEQUENCE_TOKENS: usize = 512;

/// Quantise a model: a GGUF file, a Hugging Face folder or a catalogue name in, one file out.
///
/// The file is a safetensors file with everything a run needs; its matrices lie as the kernels read
/// them, so it loads without decoding. `awq` and `gptq` read a calibration text through the model
/// and cost minutes instead of seconds, and room in a temporary file (TMPDIR); the same flags give the
/// same bytes on the same kind of CPU.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct QuantizeArgs {
    /// Model to read.
    #[arg(value_name = "SRC")]
    source: PathBuf,

    /// File to write.
    #[arg(value_name = "DST")]
    target: PathBuf,

    /// Bits of the linear layers.
    #[arg(long, value_enum, default_value_t = BitsArg::Four)]
    bits: BitsArg,

    /// Weights that share a scale; a ternary row has but one.
    #[arg(long, value_enum, default_value_t = GroupArg::G128)]
    group: GroupArg,

    /// A scale a group, 8 levels below zero and 7 above. This is the default.
    #[arg(long, conflicts_with = "asymmetric")]
    symmetric: bool,

    /// A scale and a minimum a group: 16 levels anywhere, and 16 more bits a group.
    #[arg(long)]
    asymmetric: bool,

    /// How weights are rounded.
    #[arg(long, value_enum, default_value_t = MethodArg::Rtn)]
    method: MethodArg,

    /// UTF-8 text for `awq` and `gptq`, best of the kind that the model is for. Without it the Jargon
    /// File, which `cargo xtask model fetch` fetches.
    #[arg(long, value_name = "TEXT")]
    calibration: Option<PathBuf>,

    /// Tokens of the calibration text that are read, in pieces of 512 spread over it.
    #[arg(long, value_name = "N", default_value_t = 32_768, value_parser = positive)]
    calibration_tokens: usize,

    /// Form of the table that logits are computed from.
    #[arg(long, value_enum, default_value_t = HeadArg::Int8)]
    lm_head: HeadArg,

    /// CPU threads. Without it, one for each core.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  edgellm quantize Qwen2.5-1.5B-Instruct qwen.edgellm
  edgellm quantize Qwen2.5-1.5B-Instruct qwen.edgellm --method gptq --calibration my.txt
  edgellm quantize f16.gguf small.edgellm --group 32 --asymmetric --method awq
  edgellm run -m qwen.edgellm -i \"Hello\"";

/// `--bits`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BitsArg {
    /// INT4.
    #[value(name = "4")]
    Four,
    /// INT8.
    #[value(name = "8")]
    Eight,
    /// -1, 0 and 1.
    Ternary,
}

/// `--group`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum GroupArg {
    /// 32 weights.
    #[value(name = "32")]
    G32,
    /// 64 weights.
    #[value(name = "64")]
    G64,
    /// 128 weights.
    #[value(name = "128")]
    G128,
}

/// `--method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MethodArg {
    /// To the nearest level of the group's range.
    Rtn,
    /// To the nearest level of a range that is searched for.
    Mse,
    /// Columns scaled by the inputs that they meet (calibrated).
    Awq,
    /// Column by column, errors made up for by the columns that follow (calibrated).
    Gptq,
}

/// `--lm-head`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum HeadArg {
    /// One scale a row.
    Int8,
    /// Like the linear layers; for models with a table of its own.
    Int4,
    /// Halves.
    F16,
}

impl QuantizeArgs {
    fn options(&self) -> Result<Options, Error> {
        let options = Options {
            bits: match self.bits {
                BitsArg::Four => Bits::Four,
                BitsArg::Eight => Bits::Eight,
                BitsArg::Ternary => Bits::Ternary,
            },
            group: match self.group {
                GroupArg::G32 => 32,
                GroupArg::G64 => 64,
                GroupArg::G128 => 128,
            },
            form: match self.asymmetric {
                true => Int4Form::Asymmetric,
                false => Int4Form::Symmetric,
            },
            method: match self.method {
                MethodArg::Rtn => Method::Rtn,
                MethodArg::Mse => Method::Mse,
                MethodArg::Awq => Method::Awq,
                MethodArg::Gptq => Method::Gptq,
            },
            head: match self.lm_head {
                HeadArg::Int8 => Head::Int8,
                HeadArg::Int4 => Head::Int4,
                HeadArg::F16 => Head::F16,
            },
        };
        match options.method.calibrates() && options.bits != Bits::Four {
            true => Err(Error::input(
                "--method awq and gptq round to 4 bits: leave --bits out",
            )),
            false => Ok(options),
        }
    }
}

/// The object that `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    model: &'a str,
    file: String,
    file_bytes: u64,
    weights: u64,
    /// Of all weights, scales included.
    bits_per_weight: f64,
    /// Of the linear layers.
    linear_bits_per_weight: f64,
    calibration_tokens: usize,
}

/// Runs the command.
pub fn execute(args: QuantizeArgs) -> Result<ExitCode, Failure> {
    set_threads(args.threads);
    let options = args.options()?;
    interrupt::catch()?;
    let mapped = ModelFile::open(&model_path::resolve(Some(&args.source))?)?;
    let file = mapped.parse()?;
    let recipe = mapped.recipe(&file)?;
    let tokenizer = mapped.tokenizer(&file, &recipe)?;
    let sequences = match options.method.calibrates() {
        true => sequences(&args, &tokenizer, recipe.config.context)?,
        false => Vec::new(),
    };
    let calibration_tokens = sequences.iter().map(Vec::len).sum();
    let mut out = AtomicFile::create(&args.target)?;
    let texts = mapped.container_texts(&file, &tokenizer)?;

    let all: usize = recipe.weights.iter().map(|w| w.rows * w.cols).sum();
    let style = ProgressStyle::with_template("{bar:40} {percent}% {wide_msg} {eta} left")
        .map_err(Error::machine)?;
    let progress = ProgressBar::new(all as u64).with_style(style);
    let hooks = Hooks {
        begin: &|name, weights| {
            progress.set_message(name.to_owned());
            progress.inc(weights as u64);
        },
        interrupted: &interrupt::raised,
        release: &|| mapped.release(),
    };
    let made = quantize::quantize(
        file.source(),
        &recipe,
        &options,
        &texts,
        sequences,
        &hooks,
        &mut out,
    );
    progress.finish_and_clear();
    if interrupt::raised() {
        // Dropped before it is committed, the file leaves nothing.
        return Ok(ExitCode::from(interrupt::EXIT_CODE));
    }
    let (stored, _) = made?;
    out.commit()?;

    let file_bytes = std::fs::metadata(&args.target)
        .map_err(Error::machine)?
        .len();
    let report = report(
        &recipe.config.name,
        &args.target,
        file_bytes,
        &stored,
        calibration_tokens,
    )?;
    if args.json {
        use std::io::Write;
        let line = serde_json::to_string(&report).map_err(Error::machine)?;
        writeln!(std::io::stdout(), "{line}").map_err(stdout_failure)?;
    } else {
        eprintln!(
            "{} | {} | {:.3} GB | {:.2} bits a weight, {:.2} in linear layers",
            report.file,
            report.model,
            file_bytes as f64 / 1e9,
            report.bits_per_weight,
            report.linear_bits_per_weight
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn report<'a>(
    model: &'a str,
    target: &Path,
    file_bytes: u64,
    stored: &[StoredWeight],
    calibration_tokens: usize,
) -> Result<Report<'a>, Error> {
    let (mut weights, mut bytes) = ([0u64; 2], [0u64; 2]);
    for weight in stored {
        let linear = usize::from(weight.name.contains("_proj.weight"));
        weights[linear] += (weight.rows * weight.cols) as u64;
        bytes[linear] += weight.bytes()?;
    }
    let bits = |bytes: u64, weights: u64| 8.0 * bytes as f64 / weights.max(1) as f64;
    Ok(Report {
        model,
        file: target.display().to_string(),
        file_bytes,
        weights: weights[0] + weights[1],
        bits_per_weight: bits(bytes[0] + bytes[1], weights[0] + weights[1]),
        linear_bits_per_weight: bits(bytes[1], weights[1]),
        calibration_tokens,
    })
}

/// Pieces of the calibration text, spread evenly over it.
fn sequences(
    args: &QuantizeArgs,
    tokenizer: &Tokenizer,
    context: usize,
) -> Result<Vec<Vec<u32>>, Error> {
    let path = match &args.calibration {
        Some(path) => path.clone(),
        None => model_path::default_text()?,
    };
    let text = std::fs::read_to_string(&path)
        .map_err(|e| Error::Input(format!("cannot read {}: {e}", path.display())))?;
    let ids = tokenizer.encode(&text, true)?;
    let length = SEQUENCE_TOKENS.min(context);
    let pieces: Vec<&[u32]> = ids.chunks_exact(length).collect();
    if pieces.is_empty() {
        return Err(Error::Input(format!(
            "{} has {} tokens: a calibration text has {length} or more",
            path.display(),
            ids.len()
        )));
    }
    let wanted = args.calibration_tokens.div_ceil(length).min(pieces.len());
    Ok((0..wanted)
        .map(|i| pieces[i * pieces.len() / wanted].to_vec())
        .collect())
}
