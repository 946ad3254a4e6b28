//! The CUDA backend: the recipe, compiled once into launches, held in two CUDA graphs.
//!
//! | graph | does | used for |
//! |---|---|---|
//! | prompt | one token into the cache, no logits | all but the last token of a prompt |
//! | full | the whole pass, logits, the greedy choice of the next token | the last token, and every decoded one |
//!
//! Position and tokens live on the device and each replay advances them, so a decode step is one
//! graph launch, and only token ids cross the bus.

pub mod device;
pub mod launch;
pub mod plan;
mod ptx;

use std::sync::Arc;

use cust::memory::bytemuck;
use gpu_kernels::launch::DeviceSlice;
use models::recipe::Buffer;

use self::device::{DeviceMemory, Gpu};
use self::launch::Graph;
use self::plan::{Counter, Plan};
use super::{Backend, BackendInfo, LoadedModel};
use crate::Error;

/// Tiers that this program has kernels for, as compute capabilities: 75, 80, 90.
pub fn tiers() -> Vec<u32> {
    ptx::TIERS.iter().map(|(tier, _)| *tier).collect()
}

/// The kernels of every tier as PTX: compute capability and text.
pub fn ptx() -> &'static [(u32, &'static str)] {
    ptx::TIERS
}

/// Whether a CUDA device can be used here.
///
/// # Errors
/// One line that says why not; what `auto` gives as the reason for taking the CPU.
pub fn available() -> Result<(), String> {
    cuda_driver::driver_available()
}

/// Runs a model on CUDA device 0.
#[derive(Debug)]
pub struct CudaBackend {
    // Fields are dropped in this order: graphs before the memory that they use.
    prompt: Graph,
    full: Graph,
    memory: DeviceMemory,
    gpu: Arc<Gpu>,
    state: DeviceSlice,
    tokens: DeviceSlice,
    logits: DeviceSlice,
    vocab: usize,
    context: usize,
    position: usize,
    /// The device's position has to be set back to 0 before the next token.
    rewind: bool,
    /// What the device chose after the last token, once the host has read it: `tokens[position]`
    /// on the device already holds it.
    chosen: Option<u32>,
    info: BackendInfo,
}

impl CudaBackend {
    /// Uploads `model` to device 0 with a cache of `context` tokens, and records its graphs.
    /// `tier` forces the kernels of one compute capability (75, 80, 90).
    ///
    /// # Errors
    /// [`Error::Machine`] with the CUDA error's name: no driver, no device, not enough memory (says
    /// how much is needed), a tier that the device cannot run. [`Error::Input`] for a model that
    /// the kernels cannot run, a tier that was not built, or an empty context.
    pub fn new(model: &LoadedModel, context: usize, tier: Option<u32>) -> Result<Self, Error> {
        let forced = tier.is_some();
        let gpu = Gpu::open(tier)?;
        let device = gpu.info();
        let mut needed = Counter::default();
        plan::compile(model, context, &device, gpu.tuned(), &mut needed)?;
        let free = gpu.free_bytes()?;
        if needed.bytes > free {
            return Err(Error::machine(format!(
                "CUDA_ERROR_OUT_OF_MEMORY: the model with a context of {context} tokens needs {} MiB \
                 of GPU memory, {} MiB are free",
                needed.bytes.div_ceil(1 << 20),
                free >> 20
            )));
        }
        let mut memory = DeviceMemory::new(&gpu);
        let Plan {
            prompt,
            full,
            state,
            tokens,
            logits,
            ..
        } = plan::compile(model, context, &device, gpu.tuned(), &mut memory)?;
        // One step outside of a graph, call by call: the driver loads each kernel now rather than
        // while it records, and a kernel that fails is named.
        for call in &full {
            // SAFETY: the plan took every address from `memory`, which outlives the work.
            unsafe { gpu.queue(call) }?;
            gpu.synchronize()
                .map_err(|error| Error::machine(format!("{}: {error}", call.kernel)))?;
        }
        // SAFETY: the plan took every address from `memory`, which is dropped after the graphs.
        let prompt = unsafe { Graph::capture(&gpu, &prompt) }?;
        // SAFETY: as above.
        let full = unsafe { Graph::capture(&gpu, &full) }?;

        let tier = gpu.tier();
        let chosen_because = if forced {
            "forced"
        } else {
            "highest that the GPU runs"
        };
        let info = BackendInfo {
            name: "cuda",
            tier: format!("sm_{tier}"),
            device: gpu.name().to_owned(),
            reason: format!("{}, kernels sm_{tier} ({chosen_because})", gpu.name()),
            bytes_per_token: model.bytes_per_token(),
        };
        Ok(Self {
            prompt,
            full,
            memory,
            gpu,
            state,
            tokens,
            logits,
            vocab: model.recipe.elems(Buffer::Logits),
            context,
            position: 0,
            // After the step above.
            rewind: true,
            chosen: None,
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
        if tokens.len() > self.context - self.position {
            return Err(Error::input(format!(
                "{} tokens do not fit: {} of the context's {} are used",
                tokens.len(),
                self.position,
                self.context
            )));
        }
        Ok(())
    }

    /// Where the device keeps the `len` tokens from position `start` on.
    fn token_slots(&self, start: usize, len: usize) -> DeviceSlice {
        let bytes = size_of::<u32>() as u64;
        DeviceSlice {
            address: self.tokens.address + start as u64 * bytes,
            bytes: len as u64 * bytes,
        }
    }

    /// Puts `tokens` where the device will read them, from the current position on.
    fn write_tokens(&mut self, tokens: &[u32]) -> Result<(), Error> {
        if self.rewind {
            self.memory.write(self.state, bytemuck::bytes_of(&0u32))?;
            self.rewind = false;
        }
        if matches!(tokens, [token] if self.chosen == Some(*token)) {
            return Ok(());
        }
        let slots = self.token_slots(self.position, tokens.len());
        self.memory.write(slots, bytemuck::cast_slice(tokens))
    }

    fn run(&mut self, graph_of: fn(&Self) -> &Graph) -> Result<(), Error> {
        graph_of(self).launch()?;
        self.position += 1;
        self.chosen = None;
        Ok(())
    }

    fn check_started(&self) -> Result<(), Error> {
        if self.position == 0 {
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
        self.write_tokens(tokens)?;
        for _ in 1..tokens.len() {
            self.run(|backend| &backend.prompt)?;
        }
        self.run(|backend| &backend.full)?;
        // A failure on the device belongs to the prompt, not to whatever is read next.
        self.gpu.synchronize()
    }

    fn decode(&mut self, token: u32) -> Result<(), Error> {
        self.check_tokens(&[token])?;
        self.gpu.make_current()?;
        self.write_tokens(&[token])?;
        self.run(|backend| &backend.full)
    }

    fn argmax(&mut self) -> Result<u32, Error> {
        self.check_started()?;
        if let Some(token) = self.chosen {
            return Ok(token);
        }
        let mut token = 0u32;
        let slot = self.token_slots(self.position, 1);
        self.memory.read(slot, bytemuck::bytes_of_mut(&mut token))?;
        self.chosen = Some(token);
        Ok(token)
    }

    fn logits(&mut self) -> Result<Vec<f32>, Error> {
        self.check_started()?;
        let mut logits = vec![0f32; self.vocab];
        self.memory
            .read(self.logits, bytemuck::cast_slice_mut(&mut logits))?;
        Ok(logits)
    }

    fn position(&self) -> usize {
        self.position
    }

    fn reset(&mut self) {
        self.position = 0;
        self.rewind = true;
        self.chosen = None;
    }
}
