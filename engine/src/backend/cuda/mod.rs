//! The CUDA backend: the recipe, compiled once into launches, held in CUDA graphs.
//!
//! | graph | does | used for |
//! |---|---|---|
//! | prompt | one token into the cache, no logits | all but the last token of a prompt that goes one by one |
//! | body | one token, up to what the logits are made of | a token whose successor may be given |
//! | tail | logits, choice of the next token, advance | after a body |
//! | step | body and tail | every token that the device chose itself |
//!
//! The tokens of a prompt go through the layers many at a time, by calls of their own, where the recipe
//! allows it.
//!
//! Position and tokens live on the device and each replay advances them. Once a caller appends what
//! was chosen, steps are queued [`ahead::AHEAD`] tokens ahead of it: the device never waits for the
//! host, and only token ids cross the bus. A caller that appends another token after all, or wants
//! logits, has the position set back; what was computed too much is overwritten.
//!
//! The cache's addresses are those of its whole capacity; memory comes to them as positions are reached,
//! where the driver can do that, and stays.

mod ahead;
pub mod device;
mod growing;
pub mod launch;
pub mod plan;
mod profile;
mod prompt;
mod ptx;

use std::sync::Arc;

use cust::memory::bytemuck;
use gpu_kernels::launch::{DeviceInfo, DeviceSlice};
use gpu_kernels::tuned::Tuned;
use models::recipe::Buffer;

use self::ahead::{AHEAD, TokenReader};
use self::device::{DeviceMemory, Gpu};
use self::launch::Graph;
use self::plan::{Counter, Plan};
use super::{Backend, BackendInfo, KvCache, LoadedModel, Profile, Tier};
use crate::Error;
use crate::sampler::{self, Sampling};

/// Tiers that this program has kernels for, lowest first.
pub fn tiers() -> Vec<Tier> {
    ptx::TIERS.iter().map(|(tier, _)| *tier).collect()
}

/// The kernels of every tier as PTX.
pub fn ptx() -> &'static [(Tier, &'static str)] {
    ptx::TIERS
}

/// Whether a CUDA device can be used here.
///
/// # Errors
/// One line that says why not; what `auto` gives as the reason for taking the CPU.
pub fn available() -> Result<(), String> {
    cuda_driver::driver_available()
}

pub use cuda_driver::EnergyMeter;

/// Bytes of device memory that `model` takes with a full cache on the GPU of this machine, or where there
/// is none on an H100: what a backend allocates, without what the driver keeps for itself.
///
/// # Errors
/// [`Error::Input`] for a model that the kernels cannot run.
pub fn memory_bytes(model: &LoadedModel, cache: KvCache) -> Result<u64, Error> {
    let device = device::info().unwrap_or(H100);
    let mut counter = Counter::default();
    plan::compile(model, cache, &device, &Tuned::default(), &mut counter)?;
    Ok(counter.taken_bytes())
}

/// What plans for an H100 are made for.
const H100: DeviceInfo = DeviceInfo {
    multiprocessors: 132,
    shared_bytes_per_block: 227 * 1024,
    compute_capability: 90,
    warpgroup_products: true,
};

/// The graphs that end with one way of choosing.
#[derive(Debug)]
struct Choice {
    /// Logits, choice, advance.
    tail: Graph,
    /// A whole token.
    step: Graph,
}

/// Runs a model on CUDA device 0.
#[derive(Debug)]
pub struct CudaBackend {
    // Fields are dropped in this order: graphs before the memory that they use.
    prompt: Graph,
    body: Graph,
    greedy: Choice,
    draw: Choice,
    reader: TokenReader,
    memory: DeviceMemory,
    gpu: Arc<Gpu>,
    /// Device memory that was free before the model came.
    free_bytes: u64,
    plan: Plan,
    vocab: usize,
    context: usize,
    /// What the caller has appended.
    tokens: Vec<u32>,
    /// Position on the device after all that is queued.
    position: usize,
    /// The device has chosen, or will have, the tokens of positions below this; at least
    /// `tokens.len()`, which means that no tail follows the last body.
    chosen: usize,
    /// How it chose them.
    sampling: Sampling,
    /// Whether the device's settings are those of `sampling`, where they matter.
    has_settings: bool,
    /// Whether the device knows which tokens it has seen.
    knows_seen: bool,
    /// What it chose to follow `tokens`, once the host has read it.
    next: Option<u32>,
    /// The last token appended was what the device had chosen.
    following: bool,
    /// Whether the last token appended has been through the layers.
    has_body: bool,
    info: BackendInfo,
}

impl CudaBackend {
    /// Uploads `model` to device 0 with a cache, its size and form or tokens as f16, and records its graphs.
    /// `tier` forces the kernels of one tier.
    ///
    /// # Errors
    /// [`Error::Machine`] with the CUDA error's name: no driver, no device, not enough memory (says
    /// how much is needed), a tier that the device cannot run. [`Error::Input`] for a model that
    /// the kernels cannot run, a tier that was not built, or an empty context.
    pub fn new(
        model: &LoadedModel,
        cache: impl Into<KvCache>,
        tier: Option<Tier>,
    ) -> Result<Self, Error> {
        let cache = cache.into();
        let context = cache.tokens;
        let forced = tier.is_some();
        let gpu = Gpu::open(tier)?;
        let device = gpu.info();
        let mut needed = Counter::default();
        plan::compile(model, cache, &device, gpu.tuned(), &mut needed)?;
        let free = gpu.free_bytes()?;
        if needed.taken_bytes() > free {
            return Err(Error::machine(format!(
                "CUDA_ERROR_OUT_OF_MEMORY: the model with a context of {context} tokens needs {} MiB \
                 of GPU memory, {} MiB are free",
                needed.taken_bytes().div_ceil(1 << 20),
                free >> 20
            )));
        }
        let mut memory = DeviceMemory::new(&gpu);
        let plan = plan::compile(model, cache, &device, gpu.tuned(), &mut memory)?;
        // One step outside of a graph, call by call: the driver loads each kernel now rather than
        // while it records, and a kernel that fails is named.
        memory.make_room(1)?;
        for calls in [&plan.full, &plan.draw] {
            memory.write(plan.state, &0u32.to_le_bytes())?;
            for call in calls {
                // SAFETY: the plan took every address from `memory`, which outlives the work.
                unsafe { gpu.queue(call) }?;
                gpu.synchronize()
                    .map_err(|error| Error::machine(format!("{}: {error}", call.kernel)))?;
            }
        }
        let (body, tail) = plan.full.split_at(plan.body_calls);
        let draw = match &plan.draw[..] {
            [] => tail,
            draw => draw,
        };
        let drawn = [body, draw].concat();
        // SAFETY: the plan took every address from `memory`, which is dropped after the graphs.
        let record = |calls: &[_]| unsafe { Graph::capture(&gpu, calls) };
        let tier = gpu.tier();
        let chosen_because = if forced {
            "forced"
        } else {
            "highest that the GPU runs"
        };
        let info = BackendInfo {
            name: "cuda",
            tier: tier.to_string(),
            device: gpu.name().to_owned(),
            reason: format!("{}, kernels {tier} ({chosen_because})", gpu.name()),
            bytes_per_token: model.bytes_per_token(plan::device_bytes),
        };
        Ok(Self {
            prompt: record(&plan.prompt)?,
            body: record(body)?,
            greedy: Choice {
                tail: record(tail)?,
                step: record(&plan.full)?,
            },
            draw: Choice {
                tail: record(draw)?,
                step: record(&drawn)?,
            },
            reader: TokenReader::new(&gpu)?,
            free_bytes: free,
            memory,
            gpu,
            plan,
            vocab: model.recipe.elems(Buffer::Logits),
            context,
            tokens: Vec::with_capacity(context),
            // After the calls above.
            position: 1,
            chosen: 0,
            sampling: Sampling::GREEDY,
            has_settings: true,
            knows_seen: false,
            next: None,
            following: false,
            has_body: false,
            info,
        })
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<(), Error> {
        if tokens.is_empty() {
            return Err(Error::input("there are no tokens to process"));
        }
        if let Some(token) = tokens.iter().find(|token| **token as usize >= self.vocab) {
            return Err(Error::input(format!(
                "token {token} is outside the vocabulary of {}",
                self.vocab
            )));
        }
        if tokens.len() > self.context - self.tokens.len() {
            return Err(Error::input(format!(
                "{} tokens do not fit: {} of the context's {} are used",
                tokens.len(),
                self.tokens.len(),
                self.context
            )));
        }
        Ok(())
    }

    /// Where the device keeps the `len` tokens from position `start` on.
    fn token_slots(&self, start: usize, len: usize) -> DeviceSlice {
        let bytes = size_of::<u32>() as u64;
        DeviceSlice {
            address: self.plan.tokens.address + start as u64 * bytes,
            bytes: len as u64 * bytes,
        }
    }

    /// Makes `position` the next one that the device handles.
    fn set_position(&mut self, position: usize) -> Result<(), Error> {
        if self.position != position {
            let bytes = (position as u32).to_le_bytes();
            self.memory.write(self.plan.state, &bytes)?;
            self.position = position;
        }
        Ok(())
    }

    /// Appends tokens that the device did not choose. No tail follows the last of them.
    fn append(&mut self, tokens: &[u32]) -> Result<(), Error> {
        let start = self.tokens.len();
        self.memory.make_room(start + tokens.len())?;
        self.set_position(start)?;
        let slots = self.token_slots(start, tokens.len());
        self.memory.write(slots, bytemuck::cast_slice(tokens))?;
        if !self.run_many(start, tokens.len(), None)? {
            for _ in 1..tokens.len() {
                self.prompt.launch()?;
                self.position += 1;
            }
            self.body.launch()?;
        }
        self.appended(tokens);
        Ok(())
    }

    /// Notes that `tokens` have been through the layers, and nothing is chosen.
    fn appended(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
        self.chosen = self.tokens.len();
        self.next = None;
        self.following = false;
        self.has_body = true;
        self.knows_seen = false;
    }

    /// The graphs of the sampling at hand.
    fn choice(&self) -> &Choice {
        match self.sampling.is_greedy() {
            true => &self.greedy,
            false => &self.draw,
        }
    }

    /// Makes `sampling` the one that tokens are chosen by from now on, none being chosen.
    fn set_sampling(&mut self, sampling: &Sampling) -> Result<(), Error> {
        self.has_settings &= self.sampling == *sampling;
        self.sampling = *sampling;
        if sampling.is_greedy() {
            // It does not tell the device which tokens it has seen.
            self.knows_seen = false;
            return Ok(());
        }
        if !self.has_settings {
            let settings = plan::draw_settings(sampling);
            self.memory
                .write(self.plan.settings, bytemuck::cast_slice(&settings))?;
            self.has_settings = true;
        }
        if !self.knows_seen && sampling.repetition_penalty != 1.0 {
            let seen = sampler::seen(&self.tokens, self.vocab);
            self.memory
                .write(self.plan.seen, bytemuck::cast_slice(&seen))?;
            self.knows_seen = true;
        }
        Ok(())
    }

    /// Queues a step for a token that the device has chosen itself.
    fn step_ahead(&mut self) -> Result<(), Error> {
        self.memory.make_room(self.position + 1)?;
        self.choice().step.launch()?;
        self.position += 1;
        self.note_choice()
    }

    /// Lets the choice that was queued last be read.
    fn note_choice(&mut self) -> Result<(), Error> {
        let slot = self.token_slots(self.chosen, 1);
        self.reader.queue(&self.memory, slot, self.chosen)?;
        self.chosen += 1;
        Ok(())
    }

    /// Goes back to where the last token appended has been through the layers, and nothing is chosen.
    fn take_back_choices(&mut self) -> Result<(), Error> {
        let tokens = self.tokens.len();
        if self.chosen > tokens {
            self.set_position(tokens - 1)?;
            if self.chosen > tokens + 1 {
                // Later tokens have taken the place of its activations.
                self.body.launch()?;
            }
            self.chosen = tokens;
            self.next = None;
            self.knows_seen = false;
        }
        Ok(())
    }

    /// Queues logits and choice after the last token appended, if they are not.
    fn choose_next(&mut self, sampling: &Sampling) -> Result<(), Error> {
        if self.sampling != *sampling {
            self.take_back_choices()?;
        }
        if self.chosen == self.tokens.len() {
            self.set_sampling(sampling)?;
            self.choice().tail.launch()?;
            self.position += 1;
            self.note_choice()?;
        }
        Ok(())
    }

    fn check_started(&self) -> Result<(), Error> {
        if !self.has_body {
            return Err(Error::machine("there are no logits before the first token"));
        }
        Ok(())
    }
}

impl Backend for CudaBackend {
    fn info(&self) -> &BackendInfo {
        &self.info
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<(), Error> {
        self.check_tokens(tokens)?;
        self.gpu.make_current()?;
        self.append(tokens)?;
        // A failure on the device belongs to the prompt, not to whatever is read next.
        self.gpu.synchronize()
    }

    fn decode(&mut self, token: u32) -> Result<(), Error> {
        self.check_tokens(&[token])?;
        self.gpu.make_current()?;
        if self.next != Some(token) {
            return self.append(&[token]);
        }
        self.tokens.push(token);
        self.next = None;
        self.following = true;
        if self.chosen == self.tokens.len() {
            self.step_ahead()?;
        }
        Ok(())
    }

    fn choose(&mut self, sampling: &Sampling) -> Result<u32, Error> {
        self.check_started()?;
        self.gpu.make_current()?;
        if self.plan.draw.is_empty() && !sampling.is_greedy() {
            let mut logits = self.logits()?;
            return sampler::choose(&mut logits, &self.tokens, sampling);
        }
        self.choose_next(sampling)?;
        let tokens = self.tokens.len();
        while self.following && self.chosen <= (tokens + AHEAD).min(self.context) {
            self.step_ahead()?;
        }
        let token = self.reader.wait(tokens)?;
        self.next = Some(token);
        Ok(token)
    }

    fn logits(&mut self) -> Result<Vec<f32>, Error> {
        self.check_started()?;
        self.gpu.make_current()?;
        if self.chosen > self.tokens.len() + 1 {
            self.take_back_choices()?;
        }
        let sampling = match self.sampling.repetition_penalty {
            1.0 => self.sampling,
            // Logits with a penalty are not the model's.
            _ => Sampling::GREEDY,
        };
        self.choose_next(&sampling)?;
        let mut logits = vec![0f32; self.vocab];
        self.memory
            .read(self.plan.logits, bytemuck::cast_slice_mut(&mut logits))?;
        Ok(logits)
    }

    fn prefill_logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, Error> {
        self.check_tokens(tokens)?;
        self.gpu.make_current()?;
        let start = self.tokens.len();
        self.memory.make_room(start + tokens.len())?;
        let slots = self.token_slots(start, tokens.len());
        self.memory.write(slots, bytemuck::cast_slice(tokens))?;
        let mut logits = Vec::with_capacity(tokens.len() * self.vocab);
        if self.run_many(start, tokens.len(), Some(&mut logits))? {
            self.appended(tokens);
            return Ok(logits);
        }
        super::logits_one_by_one(self, tokens)
    }

    fn prompt_run_tokens(&self) -> usize {
        self.plan.many.as_ref().map_or(256, |many| many.tokens)
    }

    fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    fn rewind(&mut self, tokens: usize) {
        self.tokens.truncate(tokens);
        self.chosen = self.tokens.len();
        self.next = None;
        self.following = false;
        self.has_body = false;
        self.knows_seen = false;
    }

    fn profile(&mut self, kernels: bool) -> Result<Profile, Error> {
        self.check_started()?;
        self.gpu.make_current()?;
        let tokens = self.tokens.len();
        // The token after the last, so that nothing that was appended changes.
        if tokens == self.context {
            return Err(Error::machine(
                "the context is full: no token can be profiled",
            ));
        }
        let memory_bytes = self.free_bytes.saturating_sub(self.gpu.free_bytes()?);
        let read_bytes_per_second = profile::read_bytes_per_second(&self.gpu)?;
        if !kernels {
            return Ok(Profile {
                read_bytes_per_second,
                memory_bytes: Some(memory_bytes),
                kernels: Vec::new(),
            });
        }
        self.memory.make_room(tokens + 1)?;
        self.choose_next(&Sampling::GREEDY)?;
        let kernels = profile::kernels(&self.gpu, &mut self.memory, &self.plan, tokens)?;
        // Whatever the device has chosen by now, it is not what was asked for.
        self.position = usize::MAX;
        self.chosen = tokens;
        self.next = None;
        self.has_body = false;
        Ok(Profile {
            read_bytes_per_second,
            memory_bytes: Some(memory_bytes),
            kernels,
        })
    }
}
