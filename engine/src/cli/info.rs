//! `edgellm info`: what a model file holds and what it takes to run it.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use engine::Error;
use engine::backend::cpu::System;
use engine::backend::{KvCache, LoadedModel};
use engine::synthetic;
use engine::weights::ModelFile;
use models::arch::Config;
use models::file::Source;
use models::file::gguf::{DType, Gguf};
use models::quant::Weight;
use models::recipe::{Buffer, Recipe, Step};
use models::weights;
use rayon::prelude::*;
use serde::Serialize;

use super::{Failure, KvArg, model_path, positive, set_threads, stdout_failure};

/// Show what a model file holds: architecture, sizes, bits a weight, memory on a device.
///
/// Every tensor is decoded once, so a file that this command accepts can be loaded.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct InfoArgs {
    /// GGUF file, Hugging Face folder, file of `edgellm quantize`, or the name of a model in the
    /// catalogue.
    #[arg(value_name = "FILE", required_unless_present_any = ["system", "synthetic"])]
    model: Option<PathBuf>,

    /// Random weights of a known shape in the place of a file: see `edgellm synthesize`.
    #[arg(long, value_name = "SHAPE", conflicts_with = "model")]
    synthetic: Option<String>,

    /// Show this machine instead: what the CPU has and what each operation uses of it.
    #[arg(long, conflicts_with_all = ["model", "synthetic", "context"])]
    system: bool,

    /// Tokens that the key/value cache shall hold. Without it, as many as the model was trained for.
    #[arg(long, value_name = "TOKENS", value_parser = positive)]
    context: Option<usize>,

    /// How that cache holds numbers.
    #[arg(long, value_enum, default_value_t = KvArg::K16V16)]
    kv: KvArg,

    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  edgellm info model.gguf
  edgellm info Qwen2.5-1.5B-Instruct --context 4096
  edgellm info qwen.edgellm --json
  edgellm info --synthetic qwen2.5-1.5b --context 100000 --kv k16v8
  EDGELLM_CPU=avx2 edgellm info --system";

/// Tensors of one use.
#[derive(Debug, Default, Serialize)]
struct Kind {
    name: &'static str,
    tensors: usize,
    weights: u64,
    /// In the file, scales included.
    file_bytes: u64,
    /// As kernels read them.
    loaded_bytes: u64,
}

impl Kind {
    fn bits(&self) -> f64 {
        8.0 * self.file_bytes as f64 / self.weights.max(1) as f64
    }
}

/// The object that `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    config: Config,
    kinds: Vec<Kind>,
    weights: u64,
    bits_per_weight: f64,
    /// Tokens of the cache.
    context: usize,
    weight_bytes: u64,
    cache_bytes: u64,
    /// Activations, those of many tokens at once too, tables, logits.
    buffer_bytes: u64,
    /// All that the CUDA backend allocates once the context is full; the driver keeps some more for itself.
    device_bytes: u64,
}

/// Runs the command.
pub fn execute(args: InfoArgs) -> Result<ExitCode, Failure> {
    if args.system {
        return system(args.json);
    }
    set_threads(None);
    let report = match &args.synthetic {
        Some(name) => {
            let context = args.context.unwrap_or(0);
            let bytes = synthetic::file(name, context, DType::Q4_0)?;
            let file = Gguf::parse(&bytes).map_err(Error::from)?;
            let recipe = models::arch::recipe(&file).map_err(Error::from)?;
            inspect(&file, recipe, args.context, args.kv)?
        }
        None => {
            let mapped = ModelFile::open(&model_path::resolve(args.model.as_deref())?)?;
            let file = mapped.parse()?;
            let recipe = mapped.recipe(&file)?;
            inspect(file.source(), recipe, args.context, args.kv)?
        }
    };
    let text = match args.json {
        true => serde_json::to_string(&report).map_err(Error::machine)? + "\n",
        false => show(&report),
    };
    print(&text)
}

fn print(text: &str) -> Result<ExitCode, Failure> {
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(stdout_failure)?;
    Ok(ExitCode::SUCCESS)
}

/// `--system`.
fn system(json: bool) -> Result<ExitCode, Failure> {
    let system = System::detect()?;
    if json {
        return print(&(serde_json::to_string(&system).map_err(Error::machine)? + "\n"));
    }
    let mut text = format!(
        "CPU           {}, {} threads\n\
         has           {}\n\
         uses          {}, {}\n",
        system.cpu,
        system.threads,
        system.available.join(", "),
        system.used,
        system.reason,
    );
    for operation in &system.operations {
        text += &format!("  {:<48}{}\n", operation.operation, operation.instructions);
    }
    for ternary in &system.ternary {
        let what = format!("linear ternary, one token, {}", ternary.shape);
        text += &format!("  {what:<48}{} ({})\n", ternary.form, ternary.reason);
    }
    print(&text)
}

fn inspect(
    source: &dyn Source,
    recipe: Recipe,
    context: Option<usize>,
    kv: KvArg,
) -> Result<Report, Error> {
    let context = match context {
        Some(asked) if asked > recipe.config.context => {
            return Err(Error::Input(format!(
                "--context {asked} is more than the {} tokens that the model was trained for",
                recipe.config.context
            )));
        }
        Some(asked) => asked,
        None => recipe.config.context,
    };
    let (file_bytes, weights): (Vec<u64>, Vec<Weight>) = recipe
        .weights
        .par_iter()
        .map(|weight| {
            let file = weights::stored_bytes(source, weight)?;
            Ok((file, weights::decode(source, weight)?))
        })
        .collect::<Result<Vec<_>, models::Error>>()?
        .into_iter()
        .unzip();
    let uses = uses(&recipe);
    let names = [
        "embedding",
        "output table",
        "linear layers",
        "norms and biases",
    ];
    let mut kinds: Vec<Kind> = names
        .map(|name| Kind {
            name,
            ..Kind::default()
        })
        .into();
    let sizes = file_bytes
        .into_iter()
        .zip(weights.iter().map(Weight::bytes));
    for ((weight, (file, loaded)), kind) in recipe.weights.iter().zip(sizes).zip(uses) {
        let kind = &mut kinds[kind];
        kind.tensors += 1;
        kind.weights += (weight.rows * weight.cols) as u64;
        kind.file_bytes += file;
        kind.loaded_bytes += loaded;
    }
    kinds.retain(|kind| kind.tensors > 0);
    let config = &recipe.config;
    let sum = |of: fn(&Kind) -> u64| kinds.iter().map(of).sum::<u64>();
    let (all, weight_bytes) = (sum(|kind| kind.weights), sum(|kind| kind.loaded_bytes));
    let cache = KvCache {
        tokens: context,
        form: kv.into(),
    };
    let cache_bytes = cache.bytes(config).unwrap_or(u64::MAX);
    let bits_per_weight = 8.0 * sum(|kind| kind.file_bytes) as f64 / all.max(1) as f64;
    let model = LoadedModel::new(recipe, weights);
    let besides = weight_bytes.saturating_add(cache_bytes);
    let device_bytes = device_bytes(&model, cache).unwrap_or_else(|| {
        let buffers = Buffer::ALL.iter().map(|b| model.recipe.elems(*b) as u64);
        besides.saturating_add(4 * buffers.sum::<u64>())
    });
    Ok(Report {
        bits_per_weight,
        weights: all,
        kinds,
        context,
        weight_bytes,
        cache_bytes,
        buffer_bytes: device_bytes.saturating_sub(besides),
        device_bytes,
        config: model.recipe.config,
    })
}

/// What the CUDA backend allocates; `None` for a model that its kernels do not run.
#[cfg(feature = "cuda")]
fn device_bytes(model: &LoadedModel, cache: KvCache) -> Option<u64> {
    engine::backend::cuda::memory_bytes(model, cache).ok()
}

#[cfg(not(feature = "cuda"))]
fn device_bytes(_: &LoadedModel, _: KvCache) -> Option<u64> {
    None
}

/// For each weight, its place among the kinds.
fn uses(recipe: &Recipe) -> Vec<usize> {
    let mut uses = vec![3; recipe.weights.len()];
    for step in &recipe.steps {
        match *step {
            Step::Embed { table, .. } => uses[table] = 0,
            Step::Logits { table, .. } if uses[table] != 0 => uses[table] = 1,
            Step::Linear { weight, .. } => uses[weight] = 2,
            _ => {}
        }
    }
    uses
}

fn show(report: &Report) -> String {
    let c = &report.config;
    let mut text = format!(
        "{}: {}, {} layers of width {}, {} heads over {} key/value heads of {}, feed-forward {}, vocabulary {}{}\n",
        c.name,
        c.architecture,
        c.layers,
        c.width,
        c.heads,
        c.kv_heads,
        c.head_dim,
        c.ffn,
        c.vocab,
        if c.tied { ", tied" } else { "" }
    );
    text += &format!(
        "\n{:18}{:>9}{:>16}{:>14}{:>8}{:>14}\n",
        "", "tensors", "weights", "in the file", "bits", "loaded"
    );
    for kind in &report.kinds {
        text += &format!(
            "{:18}{:>9}{:>16}{:>14}{:>8.2}{:>14}\n",
            kind.name,
            kind.tensors,
            kind.weights,
            megabytes(kind.file_bytes),
            kind.bits(),
            megabytes(kind.loaded_bytes)
        );
    }
    text += &format!(
        "\n{} weights, {:.2} bits each\n\
         memory on a device with a context of {} tokens: {} = weights {} + cache {} + buffers {}\n",
        report.weights,
        report.bits_per_weight,
        report.context,
        megabytes(report.device_bytes),
        megabytes(report.weight_bytes),
        megabytes(report.cache_bytes),
        megabytes(report.buffer_bytes)
    );
    text.retain(|c| c == '\n' || !c.is_control());
    text
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}
