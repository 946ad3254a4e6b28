//! Compiles a recipe into the list of kernel calls that one token takes.
//!
//! ```text
//! recipe:   embed  [norm q k v   rope rope kv-append | attention   o add   norm gate up swiglu   down add]*  norm logits
//! calls:    embed  [product      rope_kv_append      | attention   product product               product ]*  norm logits
//!           '--------------------- prompt -----------' (in the last layer it stops here)
//!           '-------------------------------------------- full -----------------------------------------------'
//! ```
//!
//! That is a decoder of INT4 matrices; what else a recipe may hold runs step by step, see
//! [`fuse`].
//!
//! Both lists end by advancing the position: the prompt's with `advance_position`, the full one in
//! the logits kernel, which also chooses the next token. Tokens and the position live in device
//! memory, so a list can be recorded once and replayed unchanged.
//! A prompt token whose logits nobody reads only has to leave its keys and values in the cache:
//! its list ends at the last write to it. Where every op has a form for many tokens, prompts go by
//! those instead: see `prompt`.

mod calls;
mod place;
mod prompt;

use cust::memory::bytemuck;
use gpu_kernels::launch::{Call, DeviceInfo, DeviceSlice, ShapeError};
use gpu_kernels::tuned::Tuned;
use gpu_kernels::{attention, logits, sample};
use models::quant::Weight;
use models::recipe::{Buffer, Step};
use rayon::prelude::*;

use self::place::{Placed, int4, pack};
pub use self::prompt::Prompt;
use crate::Error;
use crate::backend::fuse::{self, Op};
use crate::backend::{KvCache, KvForm, LoadedModel};
use crate::sampler::Sampling;

/// Products packed at a time, on all cores: what bounds the memory that the packed copies take.
const PACKED_AT_A_TIME: usize = 16;

/// Where a plan's buffers come from. Addresses are multiples of 16 bytes at least.
pub trait Memory {
    /// A new buffer that holds `bytes`.
    ///
    /// # Errors
    /// [`Error::Machine`] if there is no room or the copy fails.
    fn upload(&mut self, bytes: &[u8]) -> Result<DeviceSlice, Error>;

    /// [`Memory::upload`] of what `make` returns, `bytes` long: not made where only sizes count.
    ///
    /// # Errors
    /// As [`Memory::upload`].
    fn upload_made(
        &mut self,
        bytes: u64,
        make: &mut dyn FnMut() -> Vec<u8>,
    ) -> Result<DeviceSlice, Error> {
        let made = make();
        debug_assert_eq!(made.len() as u64, bytes);
        self.upload(&made)
    }

    /// A new buffer of `bytes` that nothing has written yet.
    ///
    /// # Errors
    /// [`Error::Machine`] if there is no room.
    fn reserve(&mut self, bytes: u64) -> Result<DeviceSlice, Error>;

    /// `count` new buffers `(strips, rows, row_bytes)` that are written row by row, in all strips of all
    /// of them together: memory may come as it is reached.
    ///
    /// # Errors
    /// As [`Memory::reserve`].
    fn reserve_rows(
        &mut self,
        count: usize,
        strips: usize,
        rows: usize,
        row_bytes: usize,
    ) -> Result<Vec<DeviceSlice>, Error> {
        let bytes = bytes_of(&[strips, rows, row_bytes])?;
        (0..count).map(|_| self.reserve(bytes)).collect()
    }

    /// Whether it keeps what is uploaded, rather than only its size.
    fn keeps(&self) -> bool {
        true
    }
}

/// Adds up what a plan would allocate, without a device.
#[derive(Debug, Default)]
pub struct Counter {
    /// Bytes of all buffers, each rounded up to [`Counter::ALIGN`].
    pub bytes: u64,
    /// Of them, what the driver gives pieces of its own, and the rest.
    pieces_bytes: u64,
    small_bytes: u64,
}

impl Counter {
    /// What the driver aligns allocations to.
    pub const ALIGN: u64 = 256;
    /// What the driver takes memory in: buffers of half of it or more by themselves, smaller ones
    /// together.
    const PIECE_BYTES: u64 = 2 << 20;

    /// Bytes that the driver takes for the buffers.
    pub fn taken_bytes(&self) -> u64 {
        let small = self.small_bytes.next_multiple_of(Self::PIECE_BYTES);
        self.pieces_bytes.saturating_add(small)
    }

    /// An address for `bytes` more.
    fn add(&mut self, bytes: u64) -> Result<DeviceSlice, Error> {
        // Never 0, which would be an absent operand.
        let address = Self::ALIGN + self.bytes;
        self.bytes = bytes
            .checked_next_multiple_of(Self::ALIGN)
            .and_then(|bytes| self.bytes.checked_add(bytes))
            .filter(|bytes| *bytes <= u64::MAX - Self::PIECE_BYTES)
            .ok_or_else(|| Error::input("the model and its context do not fit 2^64 bytes"))?;
        Ok(DeviceSlice { address, bytes })
    }

    fn take(&mut self, bytes: u64) {
        match bytes < Self::PIECE_BYTES / 2 {
            true => self.small_bytes += bytes.next_multiple_of(Self::ALIGN),
            false => {
                let pieces = bytes.next_multiple_of(Self::PIECE_BYTES);
                self.pieces_bytes = self.pieces_bytes.saturating_add(pieces);
            }
        }
    }
}

impl Memory for Counter {
    fn upload(&mut self, bytes: &[u8]) -> Result<DeviceSlice, Error> {
        self.reserve(bytes.len() as u64)
    }

    fn upload_made(
        &mut self,
        bytes: u64,
        _: &mut dyn FnMut() -> Vec<u8>,
    ) -> Result<DeviceSlice, Error> {
        self.reserve(bytes)
    }

    fn reserve(&mut self, bytes: u64) -> Result<DeviceSlice, Error> {
        let slice = self.add(bytes)?;
        self.take(bytes);
        Ok(slice)
    }

    /// One range of memory, as a device maps it.
    fn reserve_rows(
        &mut self,
        count: usize,
        strips: usize,
        rows: usize,
        row_bytes: usize,
    ) -> Result<Vec<DeviceSlice>, Error> {
        let bytes = bytes_of(&[strips, rows, row_bytes])?;
        let slices = (0..count)
            .map(|_| self.add(bytes))
            .collect::<Result<_, _>>()?;
        // No overflow: each was added.
        self.take(count as u64 * bytes);
        Ok(slices)
    }

    fn keeps(&self) -> bool {
        false
    }
}

/// What a call is for, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// What it computes, the same in all layers: `norm attn_q attn_k attn_v`.
    pub step: String,
    /// How it is launched and why so, where there is a choice; else empty.
    pub launch: String,
}

/// The calls of one token and of many, and the buffers that the host reads or writes.
#[derive(Debug)]
pub struct Plan {
    /// A prompt token whose logits are not needed.
    pub prompt: Vec<Call>,
    /// Many tokens of a prompt at once, where the recipe allows it.
    pub many: Option<Prompt>,
    /// The logits of what the body left, and no choice.
    pub plain_logits: Call,
    /// A token whose logits are needed: computes them, chooses the next token from them.
    pub full: Vec<Call>,
    /// Calls of `full` before the logits.
    pub body_calls: usize,
    /// In the place of what `full` has after its body: logits, penalised where `seen` says so, and a
    /// token drawn among the best of them. None where the output table is F16 or INT4: then the host
    /// draws.
    pub draw: Vec<Call>,
    /// What each call of `full` is for.
    pub notes: Vec<Note>,
    /// `(1,)` u32: position of the token that the next replay handles.
    pub state: DeviceSlice,
    /// `(context + 1,)` u32: the replay at position p reads `tokens[p]`; a full one writes
    /// `tokens[p + 1]`.
    pub tokens: DeviceSlice,
    /// `(V,)` f32.
    pub logits: DeviceSlice,
    /// How `draw` draws: `sample::draw::Settings::words`.
    pub settings: DeviceSlice,
    /// `(ceil(V/32),)` u32: a bit a token that `draw` penalises; it sets that of the token it draws.
    pub seen: DeviceSlice,
}

/// Compiles `model` for a cache, with the launches of `tuned` where it has one.
/// Weights go to `memory` in the process.
///
/// # Errors
/// [`Error::Input`] for a recipe that the kernels cannot run, naming what is wrong;
/// [`Error::Machine`] from `memory`.
pub fn compile(
    model: &LoadedModel,
    cache: KvCache,
    device: &DeviceInfo,
    tuned: &Tuned,
    memory: &mut dyn Memory,
) -> Result<Plan, Error> {
    if cache.tokens == 0 {
        return Err(Error::input("a context of 0 tokens holds nothing"));
    }
    let fuse::Fused {
        ops,
        neighbours,
        half_gated,
    } = fuse::fuse(&model.recipe, cache.form, &|id| int4(model, id));
    let mut compiler = Compiler::new(model, cache, device, tuned, &neighbours, memory)?;
    compiler.half_gated = half_gated;
    let mut many = prompt::Builder::new(&mut compiler, &ops)?;
    let mut calls = Vec::with_capacity(ops.len());
    let mut notes = Vec::with_capacity(ops.len());
    let (mut prompt_calls, mut body_calls) = (0, 0);
    for ops in ops.chunks(PACKED_AT_A_TIME) {
        let keeps = compiler.memory.keeps();
        let packed = ops
            .par_iter()
            .map(|op| match op {
                Op::Product(product) if keeps => pack(model, product).map(Some),
                _ => Ok(None),
            })
            .collect::<Result<Vec<_>, Error>>()?;
        for (op, packed) in ops.iter().zip(packed) {
            if matches!(op, Op::Step(Step::Logits { .. })) {
                body_calls = calls.len();
            }
            let mut launch = String::new();
            let mut row_scales = DeviceSlice::NONE;
            calls.push(match op {
                &Op::Step(&Step::Attention {
                    layer,
                    query,
                    dst,
                    scale,
                    window,
                }) => {
                    let (call, chosen) = compiler.attention(layer, [query, dst], scale, window)?;
                    launch = chosen;
                    call
                }
                Op::Step(step) => compiler.step(step)?,
                Op::Levels(buffer) => compiler.round(*buffer, true)?,
                Op::Product(product) => {
                    let placed = compiler.place(product, packed.as_deref())?;
                    if let Some(many) = &mut many {
                        many.product(&mut compiler, product, &placed)?;
                    }
                    row_scales = placed.row_scales;
                    let (call, chosen) = compiler.product(product, &placed)?;
                    launch = chosen;
                    call
                }
                Op::RopeKvAppend {
                    layer,
                    query,
                    heads,
                    key,
                    value,
                } => compiler.rope_kv_append([*query, *key, *value], *layer, *heads)?,
            });
            notes.push(Note {
                step: compiler.name(op),
                launch,
            });
            if let Op::Product(product) = op
                && let Some(call) = compiler.rescale(product, row_scales)?
            {
                calls.push(call);
                notes.push(Note {
                    step: "rescale".to_owned(),
                    launch: String::new(),
                });
            }
            if op.appends() {
                prompt_calls = calls.len();
            }
            if let Some(many) = &mut many {
                many.op(&mut compiler, op)?;
            }
            if let Op::Step(step) = op {
                for (call, what) in compiler.choice(step)? {
                    calls.push(call);
                    notes.push(Note {
                        step: what.to_owned(),
                        launch: String::new(),
                    });
                }
            }
        }
    }
    let Some(Step::Logits { table, src, dst }) = model.recipe.steps.last() else {
        return Err(Error::input("the recipe does not end with its logits"));
    };
    let vocab = model.recipe.elems(*dst);
    // Greedy to begin with, and nothing seen.
    let settings = draw_settings(&Sampling::GREEDY);
    let settings = compiler.memory.upload(bytemuck::cast_slice(&settings))?;
    let seen = compiler.memory.upload(&vec![0; 4 * vocab.div_ceil(32)])?;
    let draw = compiler.draw(*table, [*src, *dst], settings, seen)?;
    let plain_logits = compiler.plain_logits(*table, [*src, *dst], &calls[body_calls])?;
    let many = many.and_then(|many| many.finish(device, compiler.buffer(*src)));
    let Compiler { state, tokens, .. } = compiler;
    let logits = compiler.buffer(*dst);
    let advance = sample::plan_advance(device, state).map_err(unsupported)?;
    let mut prompt = calls[..prompt_calls].to_vec();
    prompt.push(advance);
    Ok(Plan {
        prompt,
        many,
        plain_logits,
        full: calls,
        body_calls,
        draw,
        notes,
        state,
        tokens,
        logits,
        settings,
        seen,
    })
}

/// The numbers of [`Plan::settings`].
pub fn draw_settings(sampling: &Sampling) -> [u32; 8] {
    let settings = sample::draw::Settings {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        seed: sampling.seed,
    };
    settings.words()
}

/// Bytes of a weight in device memory.
pub fn device_bytes(weight: &Weight) -> u64 {
    match weight {
        Weight::Ternary(matrix) => {
            let shape = matrix.int4();
            let groups = shape.rows * shape.cols.div_ceil(shape.group);
            (shape.rows * shape.cols / 2 + groups * size_of::<half::f16>()) as u64
        }
        other => other.bytes(),
    }
}

fn unsupported(error: ShapeError) -> Error {
    Error::input(format!("the GPU kernels cannot run this model: {error}"))
}

/// Keys and values of one layer.
#[derive(Debug, Clone, Copy)]
struct Cache {
    /// `(KV, S, Dh)` f16.
    keys: DeviceSlice,
    /// `(KV, S, Dh)` f16, or i8.
    values: DeviceSlice,
    /// `(KV, S)` f16 where the values are i8, else none.
    scales: DeviceSlice,
}

struct Compiler<'a> {
    model: &'a LoadedModel,
    context: usize,
    form: KvForm,
    device: &'a DeviceInfo,
    tuned: &'a Tuned,
    memory: &'a mut dyn Memory,
    /// Whether [`Buffer::Gated`] holds halves.
    half_gated: bool,
    /// Weights as they are, each placed when a step first asks for it.
    weights: Vec<Option<Placed>>,
    /// In the order of [`Buffer::ALL`].
    buffers: Vec<DeviceSlice>,
    caches: Vec<Cache>,
    /// What the blocks of an attention leave for each other: one layer at a time.
    partials: DeviceSlice,
    logits_scratch: DeviceSlice,
    /// `(1,)` f32: what multiplies the levels of a token.
    level_scale: DeviceSlice,
    cos: DeviceSlice,
    sin: DeviceSlice,
    state: DeviceSlice,
    tokens: DeviceSlice,
}

impl<'a> Compiler<'a> {
    fn new(
        model: &'a LoadedModel,
        cache: KvCache,
        device: &'a DeviceInfo,
        tuned: &'a Tuned,
        neighbours: &[Vec<Buffer>],
        memory: &'a mut dyn Memory,
    ) -> Result<Self, Error> {
        let config = &model.recipe.config;
        let buffers = place_buffers(model, neighbours, memory)?;
        let context = cache.tokens;
        let of_8_bits = cache.form == KvForm::K16V8;
        let mut cached = |row_bytes: usize| {
            memory.reserve_rows(config.layers, config.kv_heads, context, row_bytes)
        };
        let keys = cached(config.head_dim.saturating_mul(2))?;
        let values = cached(
            config
                .head_dim
                .saturating_mul(if of_8_bits { 1 } else { 2 }),
        )?;
        let scales = match of_8_bits {
            true => cached(2)?,
            false => vec![DeviceSlice::NONE; config.layers],
        };
        let caches = keys.into_iter().zip(values).zip(scales);
        let caches = caches.map(|((keys, values), scales)| Cache {
            keys,
            values,
            scales,
        });
        let caches = caches.collect();
        let scratch_bytes = model.recipe.steps.iter().filter_map(|step| match *step {
            Step::Attention { scale, window, .. } => {
                let shape = attention_shape(model, context, scale, window);
                let chosen = attention::choose(device, tuned, &shape, of_8_bits);
                Some(attention::scratch_bytes(&shape, chosen.launch))
            }
            _ => None,
        });
        let partials = match scratch_bytes.max() {
            Some(bytes) if bytes > 0 => memory.upload_made(bytes, &mut || {
                attention::UNWRITTEN
                    .to_le_bytes()
                    .repeat(bytes as usize / 4)
            })?,
            _ => DeviceSlice::NONE,
        };
        let table_bytes = bytes_of(&[context, config.head_dim / 2, size_of::<f32>()])?;
        let mut table = |sine: bool| {
            memory.upload_made(table_bytes, &mut || {
                let (cos, sin) = model.recipe.rope_tables(context);
                bytemuck::cast_slice(if sine { &sin } else { &cos }).to_vec()
            })
        };
        let (cos, sin) = (table(false)?, table(true)?);
        let token_bytes = bytes_of(&[context + 1, size_of::<u32>()])?;
        Ok(Self {
            model,
            context,
            form: cache.form,
            device,
            tuned,
            half_gated: false,
            weights: vec![None; model.weights.len()],
            buffers,
            caches,
            partials,
            logits_scratch: memory.upload(&vec![0; logits::scratch_bytes(device) as usize])?,
            level_scale: memory.reserve(size_of::<f32>() as u64)?,
            cos,
            sin,
            state: memory.upload(bytemuck::cast_slice(&[0u32]))?,
            // Filled, because the embedding may only be given ids inside the vocabulary.
            tokens: memory.upload_made(token_bytes, &mut || vec![0; token_bytes as usize])?,
            memory,
        })
    }

    fn buffer(&self, buffer: Buffer) -> DeviceSlice {
        self.buffers[buffer as usize]
    }

    fn cache(&self, layer: usize) -> Result<Cache, Error> {
        self.caches
            .get(layer)
            .copied()
            .ok_or_else(|| Error::input(format!("there is no layer {layer}")))
    }
}

/// Room for every buffer, in the order of [`Buffer::ALL`]: those of a group of neighbours one after
/// the other in one piece.
fn place_buffers(
    model: &LoadedModel,
    neighbours: &[Vec<Buffer>],
    memory: &mut dyn Memory,
) -> Result<Vec<DeviceSlice>, Error> {
    let bytes = |buffer: Buffer| bytes_of(&[model.recipe.elems(buffer), size_of::<f32>()]);
    let mut placed = vec![DeviceSlice::NONE; Buffer::ALL.len()];
    let alone = Buffer::ALL.iter().filter(|buffer| {
        let grouped = neighbours.iter().flatten().any(|other| other == *buffer);
        !grouped
    });
    let groups = alone.map(std::slice::from_ref);
    for group in groups.chain(neighbours.iter().map(Vec::as_slice)) {
        let sizes = group
            .iter()
            .map(|b| bytes(*b))
            .collect::<Result<Vec<_>, _>>()?;
        let mut address = memory.reserve(sizes.iter().sum())?.address;
        for (buffer, bytes) in group.iter().zip(sizes) {
            placed[*buffer as usize] = DeviceSlice { address, bytes };
            address += bytes;
        }
    }
    Ok(placed)
}

fn attention_shape(
    model: &LoadedModel,
    context: usize,
    scale: f32,
    window: Option<usize>,
) -> attention::Shape {
    let config = &model.recipe.config;
    attention::Shape {
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        context,
        scale,
        window,
    }
}

/// Bytes of a dense tensor; the last factor is the element size.
pub(super) fn bytes_of(dims: &[usize]) -> Result<u64, Error> {
    dims.iter()
        .try_fold(1u64, |bytes, dim| bytes.checked_mul(*dim as u64))
        .ok_or_else(|| Error::input(format!("a buffer of {dims:?} does not fit 2^64 bytes")))
}

#[cfg(test)]
mod tests;
