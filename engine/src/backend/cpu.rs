//! The CPU backend: a recipe as a list of calls that a fixed team of threads runs together.
//!
//! The list is cut into phases ([`program`] decides where, once, at load), a phase into shares; all
//! threads walk the phases together and take shares as they come. Threads are woken once a token, not
//! once a matrix. Every buffer exists before the first token: a step allocates nothing.

mod cache;
mod forward;
mod job;
mod operands;
mod program;
mod system;
mod team;

pub use system::System;

use std::sync::Arc;

use cpu_kernels::attention::AttentionShape;
use cpu_kernels::buffer::AlignedBuffer;
use cpu_kernels::isa::Isa;
use cpu_kernels::team::{Phases, SharedSlice};
use cpu_kernels::tuned::Tuned;
use cpu_kernels::{read, sample};
use models::recipe::{Buffer, Recipe};

use self::cache::Cache;
use self::job::{Job, Logits};
use self::operands::{Operand, operands};
use self::program::Program;
use self::team::Team;
use super::{Backend, BackendInfo, KvCache, LoadedModel, Profile};
use crate::Error;
use crate::sampler::{self, Sampling};

/// Tokens of a prompt that go through the list together: enough that reading the weights once for all of them is
/// lost in the products, few enough that their levels stay in the second-level cache. A multiple of the tokens
/// that the products take at once.
pub const CHUNK_TOKENS: usize = 64;

/// Runs a model on the CPU.
pub struct CpuBackend {
    info: BackendInfo,
    recipe: Recipe,
    /// Indexed by [`WeightId`].
    weights: Vec<Operand>,
    program: Program,
    isa: Isa,
    team: Team,
    phases: Phases,
    /// Tokens that the cache holds at most.
    context: usize,
    /// `(context, dh/2)`.
    cos: Vec<f32>,
    /// `(context, dh/2)`.
    sin: Vec<f32>,
    /// All activation buffers, each where the program says.
    activations: AlignedBuffer,
    cache: Cache,
    /// Scores of attention for each thread.
    scratch: AlignedBuffer,
    /// What the cache holds.
    tokens: Vec<u32>,
    /// Whether the last token's logits are there.
    has_logits: bool,
}

impl CpuBackend {
    /// Compiles `model` for this CPU, with a cache: its size and form, or tokens as f16. Takes the instruction set that
    /// `EDGELLM_CPU` names, else the fastest, and as many threads as `RAYON_NUM_THREADS` says, else
    /// as the CPU has cores.
    ///
    /// # Errors
    /// [`Error::Input`] if the recipe and its weights do not fit each other, the cache holds nothing,
    /// `EDGELLM_CPU` names an instruction set that this CPU lacks, or `EDGELLM_CPU_TERNARY` no form of
    /// ternary weights; [`Error::Machine`] if the cache
    /// does not fit in memory or threads cannot be started.
    pub fn new(model: Arc<LoadedModel>, cache: impl Into<KvCache>) -> Result<CpuBackend, Error> {
        let (isa, why) = system::chosen()?;
        let threads = team::default_threads()?;
        let tuned = Tuned::load(&system::cpu_name(), isa, threads).map_err(Error::Input)?;
        CpuBackend::with(model, cache.into(), isa, threads, &tuned, why)
    }

    fn with(
        model: Arc<LoadedModel>,
        cache: KvCache,
        isa: Isa,
        threads: usize,
        tuned: &Tuned,
        why: String,
    ) -> Result<CpuBackend, Error> {
        let context = cache.tokens;
        if context == 0 {
            return Err(Error::input("a context of 0 tokens holds nothing"));
        }
        let program = Program::compile(&model, CHUNK_TOKENS, tuned)?;
        let team = Team::new(threads)?;
        let bytes_per_token = model.bytes_per_token(models::quant::Weight::bytes);
        let (recipe, weights) = operands(model, &program.forms);
        // First: where it fits, the tables do.
        let cache = Cache::new(&recipe.config, cache).ok_or_else(|| {
            Error::machine(format!(
                "no memory for a cache of {context} tokens: lower --context"
            ))
        })?;
        let (cos, sin) = recipe.rope_tables(context);
        let scratch = scores_elems(&recipe, context) * threads;
        let info = BackendInfo {
            name: "cpu",
            tier: isa.name().to_owned(),
            device: format!("{}, {threads} threads", system::cpu_name()),
            reason: format!("{isa}, {why}"),
            bytes_per_token,
        };
        Ok(CpuBackend {
            info,
            activations: AlignedBuffer::zeroed(program.activation_elems),
            scratch: AlignedBuffer::zeroed(scratch),
            phases: Phases::new(program.phases.len()),
            recipe,
            weights,
            program,
            isa,
            team,
            context,
            cos,
            sin,
            cache,
            tokens: Vec::with_capacity(context),
            has_logits: false,
        })
    }

    /// Tokens are usable and fit.
    fn check(&self, tokens: &[u32]) -> Result<(), Error> {
        let vocab = self.recipe.config.vocab;
        if tokens.is_empty() {
            return Err(Error::input("no tokens to append"));
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            return Err(Error::input(format!(
                "token {token} is outside the vocabulary of {vocab}"
            )));
        }
        if tokens.len() > self.context - self.tokens.len() {
            return Err(Error::input(format!(
                "{} tokens after {} do not fit in the context of {}",
                tokens.len(),
                self.tokens.len(),
                self.context
            )));
        }
        Ok(())
    }

    /// Runs the list for at most [`CHUNK_TOKENS`] checked tokens.
    fn run(&mut self, tokens: &[u32], logits: Logits<'_>) {
        let scratch_elems = scores_elems(&self.recipe, self.context);
        let position = self.tokens.len();
        let has_logits = !matches!(logits, Logits::Unwanted);
        let activations = SharedSlice::new(&mut self.activations);
        let logits = match logits {
            Logits::Unwanted => None,
            Logits::Last => Some(activations.part(self.program.buffer(Buffer::Logits, 1))),
            Logits::Each(all) => Some(SharedSlice::new(all)),
        };
        let job = Job {
            program: &self.program,
            weights: &self.weights,
            isa: self.isa,
            tokens,
            logits,
            position,
            context: self.context,
            shape: AttentionShape {
                heads: self.recipe.config.heads,
                kv_heads: self.recipe.config.kv_heads,
                head_dim: self.recipe.config.head_dim,
                capacity: self.context,
                position,
                scale: 1.0,
                window: None,
            },
            cos: &self.cos,
            sin: &self.sin,
            activations,
            cache: self.cache.share(),
        };
        let scratch = SharedSlice::new(&mut self.scratch);
        self.phases.restart();
        let (phases, threads) = (&self.phases, self.team.threads());
        let positions = position + tokens.len();
        self.team.run(|thread| {
            let own = thread * scratch_elems..(thread + 1) * scratch_elems;
            // SAFETY: each thread of the team takes the area of its own number.
            let scores = unsafe { scratch.slice_mut(own) };
            for (i, phase) in job.program.phases.iter().enumerate() {
                let shares = phase.shares(threads, tokens.len(), positions);
                phases.run(i, shares, |share| {
                    for op in &phase.ops {
                        // SAFETY: all threads run the same job phase by phase, each share is taken
                        // once, and the program put steps into one phase only where that is enough.
                        unsafe { job.call(op, phase.unit, share, shares, scores) };
                    }
                });
            }
        });
        self.tokens.extend_from_slice(tokens);
        self.has_logits = has_logits;
    }

    fn last_logits(&self) -> Result<&[f32], Error> {
        if !self.has_logits {
            return Err(Error::machine(
                "no token was appended yet: there are no logits",
            ));
        }
        Ok(&self.activations[self.program.buffer(Buffer::Logits, 1)])
    }
}

impl Backend for CpuBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<(), Error> {
        self.check(tokens)?;
        let chunks = tokens.len().div_ceil(CHUNK_TOKENS);
        for (i, chunk) in tokens.chunks(CHUNK_TOKENS).enumerate() {
            let wanted = match i + 1 == chunks {
                true => Logits::Last,
                false => Logits::Unwanted,
            };
            self.run(chunk, wanted);
        }
        Ok(())
    }

    fn decode(&mut self, token: u32) -> Result<(), Error> {
        self.check(&[token])?;
        self.run(&[token], Logits::Last);
        Ok(())
    }

    fn choose(&mut self, sampling: &Sampling) -> Result<u32, Error> {
        let logits = self.last_logits()?;
        if sampling.is_greedy() {
            let best = sample::part(self.isa, logits).map(|(token, _)| token);
            return best.ok_or_else(sampler::no_number);
        }
        sampler::choose(&mut logits.to_vec(), &self.tokens, sampling)
    }

    fn prefill_logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, Error> {
        self.check(tokens)?;
        let last = self.program.buffer(Buffer::Logits, 1);
        let mut all = vec![0.0; tokens.len() * last.len()];
        let rows = all.chunks_mut(CHUNK_TOKENS * last.len());
        for (chunk, rows) in tokens.chunks(CHUNK_TOKENS).zip(rows) {
            self.run(chunk, Logits::Each(rows));
        }
        let kept = all.len() - last.len();
        self.activations[last].copy_from_slice(&all[kept..]);
        Ok(all)
    }

    fn logits(&mut self) -> Result<Vec<f32>, Error> {
        Ok(self.last_logits()?.to_vec())
    }

    fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    fn rewind(&mut self, tokens: usize) {
        self.tokens.truncate(tokens);
        self.has_logits = false;
    }

    fn profile(&mut self, _: bool) -> Result<Profile, Error> {
        Ok(Profile {
            read_bytes_per_second: read::bytes_per_second(self.team.threads())
                .ok_or_else(|| Error::machine("no memory to measure its speed with"))?,
            memory_bytes: None,
            kernels: Vec::new(),
        })
    }
}

/// Floats that attention scores of one thread take, those of the heads that read the same keys; a whole number of
/// cache lines.
fn scores_elems(recipe: &Recipe, context: usize) -> usize {
    let config = &recipe.config;
    (config.heads / config.kv_heads * context).next_multiple_of(16)
}

#[cfg(test)]
mod tests;
