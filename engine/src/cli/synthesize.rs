//! `edgellm synthesize`: a model file of a known shape with random weights.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use engine::Error;
use indicatif::{ProgressBar, ProgressStyle};
use models::file::gguf::DType;
use models::synthetic::{self, Options};

use super::Failure;
use super::atomic_file::AtomicFile;

/// Write a model file of a known shape with random weights, to measure speed.
///
/// The file runs like a real one and takes as long; what it says is noise.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  edgellm synthesize qwen2.5-1.5b /tmp/qwen.gguf
  edgellm run -m /tmp/qwen.gguf --raw --greedy -n 128 -i \"Hello\"")]
pub struct SynthesizeArgs {
    /// Shape: qwen2.5-0.5b, qwen2.5-1.5b, qwen2.5-3b, llama-3.2-1b, llama-3.2-3b, smollm2-135m,
    /// bitnet-2b-4t, tiny, tiny-qwen2, tiny-llama3.
    name: String,

    /// File to write.
    file: PathBuf,

    /// Seed of the weights; the same seed gives the same file.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Type of the linear layers.
    #[arg(long, value_enum, default_value_t = LinearArg::Q4_0)]
    linear: LinearArg,
}

/// `--linear`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LinearArg {
    /// 4 bits, a scale for 32 weights.
    #[value(name = "q4_0")]
    Q4_0,
    /// 4 bits, a scale and a minimum for 32 weights.
    #[value(name = "q4_1")]
    Q4_1,
    /// 8 bits, a scale for 32 weights.
    #[value(name = "q8_0")]
    Q8_0,
    /// -1, 0 and 1 in 2 bits, a scale for 256 weights.
    #[value(name = "tq2_0")]
    TQ2_0,
}

impl From<LinearArg> for DType {
    fn from(arg: LinearArg) -> DType {
        match arg {
            LinearArg::Q4_0 => DType::Q4_0,
            LinearArg::Q4_1 => DType::Q4_1,
            LinearArg::Q8_0 => DType::Q8_0,
            LinearArg::TQ2_0 => DType::TQ2_0,
        }
    }
}

/// Passes bytes on and counts them.
struct Counted<'a> {
    file: &'a mut AtomicFile,
    progress: ProgressBar,
}

impl Write for Counted<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let written = self.file.write(data)?;
        self.progress.inc(written as u64);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Runs the command.
pub fn execute(args: SynthesizeArgs) -> Result<ExitCode, Failure> {
    let shape = synthetic::shape(&args.name).map_err(Error::from)?;
    let options = Options {
        seed: args.seed,
        linear: args.linear.into(),
        ..Options::default()
    };
    let mut file = AtomicFile::create(&args.file)?;
    let style = ProgressStyle::with_template("writing {wide_msg} {bytes} at {bytes_per_sec}")
        .map_err(Error::machine)?;
    let progress = ProgressBar::new_spinner()
        .with_style(style)
        .with_message(args.file.display().to_string());
    let counted = Counted {
        file: &mut file,
        progress: progress.clone(),
    };
    // The shape was found and its options are from a list, so what fails is the writing.
    synthetic::write(shape, &options, counted).map_err(Error::machine)?;
    progress.finish_and_clear();
    let bytes = progress.position();
    file.commit()?;
    eprintln!("{} | {} | {bytes} bytes", args.file.display(), shape.name);
    Ok(ExitCode::SUCCESS)
}
