//! Flags of `edgellm` and what they start. One file a command.

mod atomic_file;
mod bench;
mod eval;
mod info;
mod interrupt;
mod loaded;
mod logits;
mod model_path;
mod perplexity;
mod pull;
mod quantize;
mod run;
mod synthesize;
mod trace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use engine::Error;
use engine::backend::{Choice, KvCache, KvForm, Tier};

/// Run large language models with kernels written in Rust.
#[derive(Debug, Parser)]
#[command(name = "edgellm", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  edgellm run -i \"What is the capital of France?\" --greedy
  edgellm run -m model.gguf -n 200 -i \"Explain quantum computing:\"
  edgellm bench -m model.gguf
  git diff | edgellm run -i - --system \"Summarise this change in one sentence.\"

Exit codes: 0 done, 1 the machine cannot do it, 2 the input cannot be used, 130 interrupted.";

#[derive(Debug, Subcommand)]
enum Command {
    Run(run::RunArgs),
    Bench(bench::BenchArgs),
    Synthesize(synthesize::SynthesizeArgs),
    Logits(logits::LogitsArgs),
    Perplexity(perplexity::PerplexityArgs),
    Eval(eval::EvalArgs),
    Pull(pull::PullArgs),
    Quantize(quantize::QuantizeArgs),
    Info(info::InfoArgs),
}

impl Cli {
    /// Runs the chosen command.
    pub fn execute(self) -> Result<ExitCode, Failure> {
        match self.command {
            Command::Run(args) => run::execute(args),
            Command::Bench(args) => bench::execute(args),
            Command::Synthesize(args) => synthesize::execute(args),
            Command::Logits(args) => logits::execute(args),
            Command::Perplexity(args) => perplexity::execute(args),
            Command::Eval(args) => eval::execute(args),
            Command::Pull(args) => pull::execute(args),
            Command::Quantize(args) => quantize::execute(args),
            Command::Info(args) => info::execute(args),
        }
    }
}

/// Where a model is and what runs it: shared by all commands that load one.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Model file, or a name that `edgellm pull` takes. Without it the default model is used.
    /// The file must not change while it is in use.
    #[arg(short, long, value_name = "PATH")]
    model: Option<PathBuf>,

    /// What runs the model: `auto` takes CUDA where it works, the CPU otherwise.
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    backend: BackendArg,

    /// Force the CUDA kernels of one tier instead of the highest that the device supports.
    #[arg(long, value_enum)]
    tier: Option<TierArg>,

    /// Tokens that the key/value cache holds: prompt and answer together. Without it, as many as
    /// this run can need.
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    context: Option<usize>,

    /// How the key/value cache holds numbers: k16v8 has values of 8 bits, three quarters of the memory.
    #[arg(long, value_enum, default_value_t = KvArg::K16V16)]
    kv: KvArg,

    /// CPU threads. Without it, one for each core.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl ModelArgs {
    /// A cache of `tokens` in the form that the flags say.
    fn cache(&self, tokens: usize) -> KvCache {
        KvCache {
            tokens,
            form: self.kv.into(),
        }
    }
}

/// `--kv`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KvArg {
    /// Keys and values as halves.
    #[value(name = "k16v16")]
    K16V16,
    /// Keys as halves, values as bytes with a scale a position and head.
    #[value(name = "k16v8")]
    K16V8,
}

impl From<KvArg> for KvForm {
    fn from(arg: KvArg) -> KvForm {
        match arg {
            KvArg::K16V16 => KvForm::K16V16,
            KvArg::K16V8 => KvForm::K16V8,
        }
    }
}

/// `--backend`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum BackendArg {
    /// CUDA where it works, the CPU otherwise.
    Auto,
    /// CUDA or an error.
    Cuda,
    /// The CPU.
    Cpu,
}

impl From<BackendArg> for Choice {
    fn from(arg: BackendArg) -> Choice {
        match arg {
            BackendArg::Auto => Choice::Auto,
            BackendArg::Cuda => Choice::Cuda,
            BackendArg::Cpu => Choice::Cpu,
        }
    }
}

/// `--tier`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TierArg {
    /// Turing and newer.
    #[value(name = "sm_75", alias = "75")]
    Sm75,
    /// Ampere and newer.
    #[value(name = "sm_80", alias = "80")]
    Sm80,
    /// Hopper and newer.
    #[value(name = "sm_90", alias = "90")]
    Sm90,
    /// Hopper alone.
    #[value(name = "sm_90a", alias = "90a")]
    Sm90a,
}

impl From<TierArg> for Tier {
    fn from(arg: TierArg) -> Tier {
        match arg {
            TierArg::Sm75 => Tier::SM_75,
            TierArg::Sm80 => Tier::SM_80,
            TierArg::Sm90 => Tier::SM_90,
            TierArg::Sm90a => Tier::SM_90A,
        }
    }
}

/// A whole number of at least 1.
fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

/// Why a command ended without its result.
#[derive(Debug)]
pub enum Failure {
    /// Something to tell the user.
    Error(Error),
    /// The reader of standard output went away: nobody is left to tell.
    BrokenPipe,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Error(error)
    }
}

/// A failed write to standard output.
fn stdout_failure(error: std::io::Error) -> Failure {
    match error.kind() {
        std::io::ErrorKind::BrokenPipe => Failure::BrokenPipe,
        _ => Failure::Error(Error::Machine(format!(
            "cannot write to standard output: {error}"
        ))),
    }
}

/// Tells the user what went wrong, in one line, and gives the exit code.
pub fn report(result: Result<ExitCode, Failure>) -> ExitCode {
    match result {
        Ok(code) => code,
        Err(Failure::BrokenPipe) => ExitCode::SUCCESS,
        Err(Failure::Error(error)) => {
            let message: String = error
                .to_string()
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect();
            eprintln!("error: {message}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Sets how many threads decode weights and run the CPU's kernels. To be called before anything
/// else: it changes the environment of the process.
fn set_threads(threads: Option<u16>) {
    if let Some(threads) = threads {
        // SAFETY: the commands call this first, so this is the only thread and nothing else reads
        // the environment.
        unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn documented_examples_parse() {
        for line in [
            "edgellm run -m model.gguf -n 200 -i hello",
            "edgellm run -i hi --temperature 0.5 --top-k 3 --top-p 0.9 --seed 1 --backend auto --tier sm_75 --context 100 --json --threads 2",
            "edgellm run -i hi --greedy --raw --ids --backend cpu",
            "edgellm run -i hi --min-p 0.1 --repetition-penalty 1.1",
            "edgellm bench --synthetic qwen2.5-1.5b -p 512 -n 128 -d 4096 --repeat 5 --threads 2 --backend cpu --json --trace",
            "edgellm bench -m model.gguf",
            "edgellm synthesize tiny out.gguf --seed 3",
            "edgellm logits -m m.gguf --text-file t.txt --out o.bin",
            "edgellm pull hf:o/r:m.gguf --into models",
            "edgellm pull --list",
            "edgellm eval -m m.gguf --reference r.gguf --questions 20 --json",
            "edgellm quantize a.gguf b.edgellm --bits 4 --group 64 --asymmetric --method gptq --calibration t.txt --lm-head f16 --json",
            "edgellm info b.edgellm --context 100 --json",
            "edgellm perplexity -m m.gguf --text t.txt --kl-reference r.logits --chunks 4 --json",
        ] {
            Cli::try_parse_from(line.split(' ')).expect(line);
        }
    }

    #[test]
    fn contradictory_flags_are_refused() {
        for line in [
            "edgellm run",
            "edgellm run -i hi --greedy --temperature 1",
            "edgellm run -i hi --raw --system x",
            "edgellm run -i hi --context 0",
            "edgellm bench --synthetic tiny -m model.gguf",
            "edgellm bench --linear q8_0 -m model.gguf",
            "edgellm bench --repeat 0",
            "edgellm run -i hi -n -1",
            "edgellm run -i hi --tier sm_60",
            "edgellm logits -m m.gguf --out o.bin",
            "edgellm perplexity --chunks 0",
            "edgellm pull",
            "edgellm pull name --list",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
