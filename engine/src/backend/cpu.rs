//! The CPU backend: a recipe as a list of calls that a fixed team of threads runs together.
//!
//! The list is cut into phases ([`program`] decides where, once, at load), a phase into shares; all
//! threads walk the phases together and take shares as they come. Threads are woken once a token, not
//! once a matrix. Every buffer exists before the first token: a step allocates nothing.

mod cache;
mod forward;
mod program;
mod system;
mod team;

pub use system::System;

use std::sync::Arc;

use cpu_kernels::attention::{self, AttentionShape};
use cpu_kernels::buffer::AlignedBuffer;
use cpu_kernels::isa::Isa;
use cpu_kernels::levels::{self, Levels};
use cpu_kernels::linear::{self, Input, Packed};
use cpu_kernels::team::{Phases, SharedSlice, split};
use cpu_kernels::{add, embed, read, relu2_glu, rmsnorm, rope, round_int8, sample, swiglu};
use models::quant::Weight;
use models::recipe::{Buffer, Recipe, Step, WeightId};
use rayon::prelude::*;

use self::cache::{Cache, SharedCache};
use self::program::{Cut, Op, Program};
use self::team::Team;
use super::{Backend, BackendInfo, KvCache, LoadedModel, Profile};
use crate::Error;
use crate::sampler::{self, Sampling};

/// Tokens of a prompt that go through the list together: enough that reading the weights once for all of them is
/// lost in the products, few enough that their levels stay in the second-level cache. A multiple of the tokens
/// that the products take at once.
pub const CHUNK_TOKENS: usize = 48;

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
    /// [`Error::Input`] if the recipe and its weights do not fit each other, the cache holds nothing, or
    /// `EDGELLM_CPU` names an instruction set that this CPU lacks; [`Error::Machine`] if the cache
    /// does not fit in memory or threads cannot be started.
    pub fn new(model: Arc<LoadedModel>, cache: impl Into<KvCache>) -> Result<CpuBackend, Error> {
        let (isa, why) = system::chosen()?;
        CpuBackend::with(model, cache.into(), isa, team::default_threads()?, why)
    }

    fn with(
        model: Arc<LoadedModel>,
        cache: KvCache,
        isa: Isa,
        threads: usize,
        why: String,
    ) -> Result<CpuBackend, Error> {
        let context = cache.tokens;
        if context == 0 {
            return Err(Error::input("a context of 0 tokens holds nothing"));
        }
        let program = Program::compile(&model, CHUNK_TOKENS)?;
        let team = Team::new(threads)?;
        let bytes_per_token = model.bytes_per_token();
        let (recipe, weights) = operands(model);
        // First: where it fits, the tables do.
        let cache = Cache::new(&recipe.config, cache).ok_or_else(|| {
            Error::machine(format!(
                "no memory for a cache of {context} tokens: lower --context"
            ))
        })?;
        let (cos, sin) = recipe.rope_tables(context);
        let scratch = scores_elems(context) * threads;
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
        let scratch_elems = scores_elems(self.context);
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

/// Floats that attention scores of one thread take, a whole number of cache lines.
fn scores_elems(context: usize) -> usize {
    context.next_multiple_of(16)
}

/// A weight as the calls read it.
enum Operand {
    Matrix(Packed),
    Vector(Vec<f32>),
}

/// Lays all matrices out for the kernels, each freed as soon as it is, if nobody else holds the model.
fn operands(model: Arc<LoadedModel>) -> (Recipe, Vec<Operand>) {
    let pack = |weight: &Weight| Packed::new(weight).map(Operand::Matrix);
    match Arc::try_unwrap(model) {
        Ok(model) => {
            let own = |weight| match weight {
                Weight::Vector(vector) => Operand::Vector(vector),
                matrix => pack(&matrix).expect("no vector"),
            };
            (
                model.recipe,
                model.weights.into_par_iter().map(own).collect(),
            )
        }
        Err(shared) => {
            let copy = |weight: &Weight| match weight {
                Weight::Vector(vector) => Operand::Vector(vector.clone()),
                matrix => pack(matrix).expect("no vector"),
            };
            (
                shared.recipe.clone(),
                shared.weights.par_iter().map(copy).collect(),
            )
        }
    }
}

/// Which tokens of a call get logits.
enum Logits<'a> {
    Unwanted,
    /// The last one, into its activation buffer.
    Last,
    /// All of them, into `(tokens, V)`.
    Each(&'a mut [f32]),
}

/// What the threads of a team share while they run the list once.
struct Job<'a> {
    program: &'a Program,
    weights: &'a [Operand],
    isa: Isa,
    tokens: &'a [u32],
    /// `(n, V)`: where the logits of the last `n` tokens go, if they are wanted.
    logits: Option<SharedSlice<'a, f32>>,
    position: usize,
    context: usize,
    shape: AttentionShape,
    cos: &'a [f32],
    sin: &'a [f32],
    activations: SharedSlice<'a, f32>,
    cache: SharedCache<'a>,
}

impl Job<'_> {
    /// One buffer of all tokens of the job.
    fn buffer(&self, buffer: Buffer) -> SharedSlice<'_, f32> {
        self.activations
            .part(self.program.buffer(buffer, self.tokens.len()))
    }

    /// # Safety
    /// No thread writes the buffer in this phase.
    unsafe fn read(&self, buffer: Buffer) -> &[f32] {
        let buffer = self.buffer(buffer);
        // SAFETY: the caller excludes writers.
        unsafe { buffer.slice(0..buffer.len()) }
    }

    fn vector(&self, id: WeightId) -> &[f32] {
        match &self.weights[id] {
            Operand::Vector(vector) => vector,
            Operand::Matrix(_) => unreachable!("the program was compiled with a vector here"),
        }
    }

    fn matrix(&self, id: WeightId) -> &Packed {
        match &self.weights[id] {
            Operand::Matrix(matrix) => matrix,
            Operand::Vector(_) => unreachable!("the program was compiled with a matrix here"),
        }
    }

    /// Share `part` of `parts` of one operation, whose columns are cut at multiples of `unit`.
    ///
    /// # Safety
    /// Shares of one step have equal `parts` and `part`s of their own; whatever another share wrote
    /// that this one reads, or reads that this one writes, lies in an earlier phase. [`program`]
    /// knows for every step which share touches which elements.
    unsafe fn call(&self, op: &Op, unit: usize, part: usize, parts: usize, scores: &mut [f32]) {
        let (isa, tokens) = (self.isa, self.tokens.len());
        let (step, levels) = match op {
            Op::Step(step, levels) => (step, *levels),
            Op::Round { src, levels, cut } => {
                // SAFETY: the caller's contract.
                return unsafe { self.round(*src, *levels, *cut, unit, part, parts) };
            }
        };
        match *step {
            Step::Embed { table, dst } => {
                let own = split(tokens, 1, part, parts);
                let dst = self.buffer(dst);
                let width = dst.len() / tokens;
                // SAFETY: the rows of this share's tokens.
                let dst = unsafe { dst.slice_mut(own.start * width..own.end * width) };
                embed::part(self.matrix(table), &self.tokens[own], dst);
            }
            Step::RmsNorm {
                weight,
                eps,
                src,
                dst,
            } => {
                let own = split(tokens, 1, part, parts);
                let weight = self.vector(weight);
                let own = own.start * weight.len()..own.end * weight.len();
                // SAFETY: the rows of this share's tokens.
                let (src, dst) = unsafe {
                    (
                        self.buffer(src).slice(own.clone()),
                        self.buffer(dst).slice_mut(own),
                    )
                };
                rmsnorm::part(isa, src, weight, eps, dst);
            }
            Step::Linear {
                weight,
                bias,
                src,
                dst,
            } => {
                let bias = bias.map(|bias| self.vector(bias));
                let dst = self.buffer(dst);
                let own = split(dst.len() / tokens, unit, part, parts);
                // SAFETY: `src` was complete before this phase; this share's columns of `dst`.
                unsafe {
                    let x = self.input(src, levels, tokens);
                    linear::part(isa, self.matrix(weight), bias, x, dst, own);
                }
            }
            Step::Logits {
                table,
                src,
                dst: dst_buffer,
            } => {
                let Some(dst) = self.logits else {
                    return;
                };
                let vocab = self.program.buffer(dst_buffer, 1).len();
                let own = split(vocab, unit, part, parts);
                // SAFETY: as above.
                unsafe {
                    let x = self.input(src, levels, dst.len() / vocab);
                    linear::part(isa, self.matrix(table), None, x, dst, own);
                }
            }
            Step::HeadNorm {
                weight,
                eps,
                buffer,
                heads,
            } => {
                let (dh, weight) = (self.shape.head_dim, self.vector(weight));
                let buffer = self.buffer(buffer);
                for unit in split(tokens * heads, 1, part, parts) {
                    // SAFETY: a head of this share.
                    let head = unsafe { buffer.slice_mut(unit * dh..(unit + 1) * dh) };
                    rmsnorm::part_in_place(isa, head, weight, eps);
                }
            }
            Step::RoundToInt8 { buffer } => {
                let own = split(tokens, 1, part, parts);
                let buffer = self.buffer(buffer);
                let width = buffer.len() / tokens;
                // SAFETY: the rows of this share's tokens.
                let own = unsafe { buffer.slice_mut(own.start * width..own.end * width) };
                round_int8::part(isa, own, width);
            }
            Step::Rope { buffer, heads } => {
                let (dh, half) = (self.shape.head_dim, self.shape.head_dim / 2);
                let buffer = self.buffer(buffer);
                for unit in split(tokens * heads, 1, part, parts) {
                    let angles = (self.position + unit / heads) * half;
                    let angles = angles..angles + half;
                    // SAFETY: a head of this share.
                    let head = unsafe { buffer.slice_mut(unit * dh..(unit + 1) * dh) };
                    rope::part(isa, head, &self.cos[angles.clone()], &self.sin[angles]);
                }
            }
            Step::KvAppend { layer, key, value } => {
                let (dh, heads) = (self.shape.head_dim, self.shape.kv_heads);
                let buffers = [key, value].map(|buffer| self.buffer(buffer));
                for unit in split(tokens * heads, 1, part, parts) {
                    let (token, head) = (unit / heads, unit % heads);
                    let row = head * self.context + self.position + token;
                    // SAFETY: a head of this share, and its own place in the cache.
                    unsafe {
                        let own = buffers.map(|buffer| buffer.slice(unit * dh..(unit + 1) * dh));
                        self.cache.append(layer, row, own);
                    }
                }
            }
            Step::Attention {
                layer,
                query,
                dst,
                scale,
            } => {
                let (dh, heads) = (self.shape.head_dim, self.shape.heads);
                let shape = AttentionShape {
                    scale,
                    ..self.shape
                };
                // SAFETY: the cache was complete before this phase.
                let (keys, values) = unsafe { self.cache.layer(layer) };
                let (query, dst) = (self.buffer(query), self.buffer(dst));
                for unit in split(tokens * heads, 1, part, parts) {
                    let own = unit * dh..(unit + 1) * dh;
                    // SAFETY: a head of this share.
                    let (q, out) = unsafe { (query.slice(own.clone()), dst.slice_mut(own)) };
                    let (token, head) = (unit / heads, unit % heads);
                    attention::part(isa, q, keys, values, out, &shape, token, head, scores);
                }
            }
            Step::SwiGlu { gate, up, dst } => {
                let (gate, up, dst) = (self.buffer(gate), self.buffer(up), self.buffer(dst));
                for own in columns(dst.len(), tokens, unit, part, parts) {
                    // SAFETY: this share's columns of all three.
                    unsafe {
                        let (gate, up) = (gate.slice(own.clone()), up.slice(own.clone()));
                        swiglu::part(isa, gate, up, dst.slice_mut(own));
                    }
                }
            }
            Step::ReluSquaredGlu { gate, up, dst } => {
                let (gate, up, dst) = (self.buffer(gate), self.buffer(up), self.buffer(dst));
                for own in columns(dst.len(), tokens, unit, part, parts) {
                    // SAFETY: this share's columns of all three.
                    unsafe {
                        let (gate, up) = (gate.slice(own.clone()), up.slice(own.clone()));
                        relu2_glu::part(isa, gate, up, dst.slice_mut(own));
                    }
                }
            }
            Step::Add { src, dst } => {
                let (src, dst) = (self.buffer(src), self.buffer(dst));
                for own in columns(dst.len(), tokens, unit, part, parts) {
                    // SAFETY: this share's columns of both.
                    unsafe { add::part(isa, src.slice(own.clone()), dst.slice_mut(own)) };
                }
            }
        }
    }

    /// What a matrix reads, of the last `count` tokens.
    ///
    /// # Safety
    /// No thread writes it in this phase.
    unsafe fn input(&self, src: Buffer, levels: Option<usize>, count: usize) -> Input<'_> {
        let tokens = self.tokens.len();
        // SAFETY: the caller excludes writers.
        unsafe {
            match levels {
                Some(id) => {
                    let (range, place) = self.program.levels(id, tokens);
                    let words = self.activations.slice(range);
                    Input::Levels(Levels::new(words, place.cols, place.precision).last(count))
                }
                None => {
                    let x = self.read(src);
                    Input::Floats(&x[(tokens - count) * (x.len() / tokens)..])
                }
            }
        }
    }

    /// Rounds a share of a buffer to levels.
    ///
    /// # Safety
    /// As [`Job::call`].
    unsafe fn round(
        &self,
        src: Buffer,
        id: usize,
        cut: Cut,
        unit: usize,
        part: usize,
        parts: usize,
    ) {
        let tokens = self.tokens.len();
        let (range, place) = self.program.levels(id, tokens);
        let (src, k) = (self.buffer(src), place.cols);
        let words = self.activations.part(range);
        let stride = words.len() / tokens;
        let round = |token: usize, cols: std::ops::Range<usize>| {
            let words = words.part(token * stride..(token + 1) * stride);
            // SAFETY: columns of this share, complete since its last operation.
            unsafe {
                let start = token * k;
                let x = src.slice(start + cols.start..start + cols.end);
                levels::part(self.isa, place.precision, x, words, cols);
            }
        };
        match cut {
            Cut::Tokens => split(tokens, 1, part, parts).for_each(|token| round(token, 0..k)),
            Cut::Columns => (0..tokens).for_each(|token| round(token, split(k, unit, part, parts))),
            Cut::Heads => {
                let (dh, heads) = (self.shape.head_dim, k / self.shape.head_dim);
                for unit in split(tokens * heads, 1, part, parts) {
                    let head = unit % heads;
                    round(unit / heads, head * dh..(head + 1) * dh);
                }
            }
            Cut::Whole => unreachable!("rounding is shared out"),
        }
    }
}

/// The columns of share `part` of a `(tokens, n)` buffer of `len` elements, a range for each token:
/// the columns that the same share of a linear step writes.
fn columns(
    len: usize,
    tokens: usize,
    unit: usize,
    part: usize,
    parts: usize,
) -> impl Iterator<Item = std::ops::Range<usize>> {
    let n = len / tokens;
    let own = split(n, unit, part, parts);
    (0..tokens).map(move |token| token * n + own.start..token * n + own.end)
}

#[cfg(test)]
mod tests;
