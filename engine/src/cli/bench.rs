//! `edgellm bench`: how fast a model reads a prompt and writes text here, and how close that is to
//! what memory allows.

mod report;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use engine::Error;
use engine::backend::{Backend, LoadedModel, Selected, select};
use engine::sampler::Sampling;
use engine::synthetic;
use engine::weights::ModelFile;

use self::report::{Latency, Rate, Report};
use super::synthesize::LinearArg;
use super::{Failure, ModelArgs, model_path, positive, set_threads};

/// Measure prompt and decode speed, latency and energy of a model.
///
/// Speeds are those of `llama-bench`: a prompt of P random tokens, and N tokens generated one by one,
/// each after D tokens of context. A run of each comes first that does not count.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  edgellm bench -m model.gguf
  edgellm bench --synthetic qwen2.5-1.5b -n 128 -d 4096 --json
  edgellm bench --synthetic qwen2.5-1.5b --trace        where a token's time goes, kernel by kernel")]
pub struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,

    /// Random weights of a known shape in the place of a model: see `edgellm synthesize`.
    #[arg(long, value_name = "SHAPE", conflicts_with = "model")]
    synthetic: Option<String>,

    /// Type of the linear layers of `--synthetic`.
    #[arg(long, value_enum, default_value_t = LinearArg::Q4_0, requires = "synthetic", conflicts_with = "model")]
    linear: LinearArg,

    /// Tokens of the prompt; 0 measures none.
    #[arg(short, long, value_name = "P", default_value_t = 512)]
    prompt: usize,

    /// Tokens to generate; 0 measures none.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    tokens: usize,

    /// Tokens in the context before either.
    #[arg(short, long, value_name = "D", default_value_t = 0)]
    depth: usize,

    /// Runs that count.
    #[arg(long, value_name = "R", default_value_t = 5, value_parser = positive)]
    repeat: usize,

    /// Also show what each kernel of a token takes. CUDA only.
    #[arg(long)]
    trace: bool,

    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn execute(args: BenchArgs) -> Result<ExitCode, Failure> {
    set_threads(args.model.threads);
    let start = Instant::now();
    let needed = needed_context(&args)?;
    let model = Arc::new(load(&args, needed)?);
    let config = &model.recipe.config.clone();
    let context = args.model.context.unwrap_or(needed);
    for (what, tokens) in [
        ("the model was trained for", config.context),
        ("--context has", context),
    ] {
        if needed > tokens {
            return Err(Error::Input(format!(
                "depth, prompt and tokens need a context of {needed} tokens, {what} {tokens}"
            ))
            .into());
        }
    }
    let Selected {
        mut backend,
        reason,
    } = select(
        args.model.backend.into(),
        model,
        args.model.cache(context),
        args.model.tier.map(Into::into),
    )?;
    let load_seconds = start.elapsed().as_secs_f64();

    let backend = backend.as_mut();
    let vocab = config.vocab;
    let depth = random_tokens(args.depth, vocab, 1);
    if !depth.is_empty() {
        backend.prefill(&depth)?;
    }
    let prompt = random_tokens(args.prompt, vocab, 2);
    let mut prompt_rates = Vec::new();
    let mut decoded = Decoded::default();
    let mut energy = Energy::open(backend);
    for run in 0..=args.repeat {
        if !prompt.is_empty() {
            backend.rewind(args.depth);
            let start = Instant::now();
            backend.prefill(&prompt)?;
            // The backend has computed the prompt's last logits once it can choose.
            backend.choose(&Sampling::GREEDY)?;
            let rate = prompt.len() as f64 / start.elapsed().as_secs_f64();
            if run > 0 {
                prompt_rates.push(rate);
            }
        }
        if args.tokens > 0 {
            backend.rewind(args.depth);
            let first = random_tokens(1, vocab, 3);
            let joules = energy.joules();
            let run_of = decode(backend, &first, args.tokens)?;
            if run > 0 {
                energy.add(joules);
                decoded.add(run_of)?;
            }
        }
    }
    backend.rewind(args.depth);
    backend.prefill(&random_tokens(1, vocab, 4))?;
    let profile = backend.profile(args.trace)?;

    let info = backend.info();
    // What the average token of a run reads: all weights, and keys and values before it.
    let average_depth = args.depth as f64 + 1.0 + args.tokens as f64 / 2.0;
    let kv_bytes = average_depth * (4 * config.layers * config.kv_heads * config.head_dim) as f64;
    let bytes_per_token = info.bytes_per_token as f64 + kv_bytes;
    let floor = profile.read_bytes_per_second / bytes_per_token;
    let decode_rate = Rate::of(&decoded.rates);
    let report = Report {
        model: &config.name,
        backend: info.name,
        tier: &info.tier,
        device: &info.device,
        prompt_tokens: args.prompt,
        decode_tokens: args.tokens,
        depth: args.depth,
        repeat: args.repeat,
        load_seconds,
        prompt_tokens_per_second: Rate::of(&prompt_rates).map(|r| r.mean),
        prompt_tokens_per_second_deviation: Rate::of(&prompt_rates).map(|r| r.deviation),
        decode_tokens_per_second: decode_rate.map(|r| r.mean),
        decode_tokens_per_second_deviation: decode_rate.map(|r| r.deviation),
        latency_ms: Latency::of(&decoded.latencies),
        first_tenth_tokens_per_second: decoded.tenth(true),
        last_tenth_tokens_per_second: decoded.tenth(false),
        ids_hash: decoded
            .ids
            .as_deref()
            .map(|ids| format!("{:016x}", fnv(ids))),
        bytes_per_token,
        read_gb_per_second: profile.read_bytes_per_second / 1e9,
        floor_tokens_per_second: floor,
        share_of_floor: decode_rate.map(|r| r.mean / floor),
        memory_bytes: profile.memory_bytes,
        joules_per_token: energy.per_token(args.repeat * args.tokens),
        kernels: profile.kernels,
    };
    report.print(&reason, args.json)?;
    Ok(ExitCode::SUCCESS)
}

/// The model of `-m`, or of `--synthetic` in memory: random weights are trained for any context.
fn load(args: &BenchArgs, context: usize) -> Result<LoadedModel, Error> {
    let Some(name) = &args.synthetic else {
        let mapped = ModelFile::open(&model_path::resolve(args.model.model.as_deref())?)?;
        let file = mapped.parse()?;
        return mapped.load(&file, mapped.recipe(&file)?);
    };
    synthetic::load(name, context, args.linear.into())
}

/// Tokens that the cache must hold: one more than is measured, which the profile appends.
fn needed_context(args: &BenchArgs) -> Result<usize, Error> {
    args.prompt
        .max(args.tokens.saturating_add(1))
        .checked_add(args.depth)
        .and_then(|tokens| tokens.checked_add(1))
        .ok_or_else(|| Error::input("depth, prompt and tokens are more than can be counted"))
}

/// Ids that look random and are the same every time.
fn random_tokens(count: usize, vocab: usize, stream: u64) -> Vec<u32> {
    let mut state = stream.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..count)
        .map(|_| {
            // Knuth's MMIX generator; its low bits are weak.
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % vocab as u64) as u32
        })
        .collect()
}

/// What one run generated.
struct Run {
    ids: Vec<u32>,
    /// Seconds from token to token.
    latencies: Vec<f64>,
}

/// Appends `first` and generates `count` tokens, each from the one before.
fn decode(backend: &mut dyn Backend, first: &[u32], count: usize) -> Result<Run, Error> {
    backend.prefill(first)?;
    let mut run = Run {
        ids: Vec::with_capacity(count),
        latencies: Vec::with_capacity(count),
    };
    // The first choice belongs to the prompt.
    let mut id = backend.choose(&Sampling::GREEDY)?;
    let mut last = Instant::now();
    for _ in 0..count {
        backend.decode(id)?;
        id = backend.choose(&Sampling::GREEDY)?;
        let now = Instant::now();
        run.latencies.push((now - last).as_secs_f64());
        run.ids.push(id);
        last = now;
    }
    Ok(run)
}

/// What all runs generated.
#[derive(Default)]
struct Decoded {
    /// Tokens a second of each run.
    rates: Vec<f64>,
    /// Of all runs, each in its order.
    latencies: Vec<Vec<f64>>,
    /// Those of the first run.
    ids: Option<Vec<u32>>,
}

impl Decoded {
    fn add(&mut self, run: Run) -> Result<(), Error> {
        match &self.ids {
            None => self.ids = Some(run.ids),
            Some(ids) if *ids == run.ids => {}
            Some(ids) => {
                let differs = |(a, b): (&u32, &u32)| a != b;
                let at = ids.iter().zip(&run.ids).position(differs);
                return Err(Error::machine(format!(
                    "two runs of the same tokens differ from token {} on",
                    at.unwrap_or(0) + 1
                )));
            }
        }
        let seconds: f64 = run.latencies.iter().sum();
        self.rates.push(run.latencies.len() as f64 / seconds);
        self.latencies.push(run.latencies);
        Ok(())
    }

    /// Tokens a second over the first or the last tenth of the runs: what a growing cache costs.
    fn tenth(&self, first: bool) -> Option<f64> {
        let (mut tokens, mut seconds) = (0, 0.0);
        for run in &self.latencies {
            let count = run.len().div_ceil(10);
            let part = if first {
                &run[..count]
            } else {
                &run[run.len() - count..]
            };
            tokens += count;
            seconds += part.iter().sum::<f64>();
        }
        (tokens > 0).then(|| tokens as f64 / seconds)
    }
}

/// FNV-1a, 64 bits, over the bytes of the ids: to compare runs of two machines.
fn fnv(ids: &[u32]) -> u64 {
    let bytes = ids.iter().flat_map(|id| id.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// What the GPU's counter says that the runs took.
struct Energy {
    #[cfg(feature = "cuda")]
    meter: Option<engine::backend::cuda::EnergyMeter>,
    joules: Option<f64>,
}

impl Energy {
    /// A meter where the backend's device has one.
    #[cfg(feature = "cuda")]
    fn open(backend: &dyn Backend) -> Energy {
        let meter = match backend.info().name {
            "cuda" => engine::backend::cuda::EnergyMeter::open(),
            _ => None,
        };
        let joules = meter.is_some().then_some(0.0);
        Energy { meter, joules }
    }

    #[cfg(not(feature = "cuda"))]
    fn open(_: &dyn Backend) -> Energy {
        Energy { joules: None }
    }

    #[cfg(feature = "cuda")]
    fn joules(&self) -> Option<f64> {
        self.meter.as_ref()?.joules()
    }

    #[cfg(not(feature = "cuda"))]
    fn joules(&self) -> Option<f64> {
        None
    }

    /// Adds what was used since the counter stood at `before`.
    fn add(&mut self, before: Option<f64>) {
        let used = self.joules().zip(before).map(|(now, before)| now - before);
        self.joules = self.joules.zip(used).map(|(sum, used)| sum + used);
    }

    /// None where the counter did not move: the runs were too short for it.
    fn per_token(&self, tokens: usize) -> Option<f64> {
        let joules = self.joules.filter(|joules| *joules > 0.0)?;
        (tokens > 0).then(|| joules / tokens as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_tokens_are_in_the_vocabulary_and_repeat() {
        let tokens = random_tokens(1000, 37, 5);
        assert!(tokens.iter().all(|token| *token < 37));
        assert_eq!(tokens, random_tokens(1000, 37, 5));
        assert_ne!(tokens, random_tokens(1000, 37, 6));
        assert_eq!(tokens[..10], random_tokens(10, 37, 5));
    }

    #[test]
    fn runs_that_differ_are_an_error() {
        let run = |ids: &[u32]| Run {
            ids: ids.to_vec(),
            latencies: vec![0.5; ids.len()],
        };
        let mut decoded = Decoded::default();
        decoded.add(run(&[1, 2, 3])).unwrap();
        decoded.add(run(&[1, 2, 3])).unwrap();
        assert_eq!(decoded.rates, [2.0, 2.0]);
        assert_eq!(
            (decoded.tenth(true), decoded.tenth(false)),
            (Some(2.0), Some(2.0))
        );
        let error = decoded.add(run(&[1, 2, 4])).unwrap_err();
        assert!(error.to_string().contains("from token 3 on"), "{error}");
    }
}
