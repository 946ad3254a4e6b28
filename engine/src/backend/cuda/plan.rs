//! Compiles a recipe into the list of kernel calls that one token takes.
//!
//! ```text
//! recipe:   embed  [norm q k v rope rope kv-append | attention o add norm gate up swiglu down add]*  norm logits
//!           '--------------------- prompt ---------' (in the last layer it stops here)
//!           '------------------------------------------ full -----------------------------------------------'
//! ```
//!
//! Both lists end by advancing the position: the prompt's with `advance_position`, the full one in
//! the logits kernel, which also chooses the next token. Tokens and the position live in device
//! memory, so a list can be recorded once and replayed unchanged.
//! A prompt token whose logits nobody reads only has to leave its keys and values in the cache:
//! its list ends at the last write to it.

use cust::memory::bytemuck;
use gpu_kernels::launch::{Call, DeviceInfo, DeviceSlice, ShapeError};
use gpu_kernels::variant::Choice;
use gpu_kernels::{
    add, attention, embed, kv_append, linear, logits, rmsnorm, rope, sample, swiglu,
};
use half::f16;
use half::slice::HalfFloatSliceExt;
use models::quant::{Int4Matrix, Int8Matrix, Weight};
use models::recipe::{Buffer, Step, WeightId};

use crate::Error;
use crate::backend::LoadedModel;

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
}

/// Adds up what a plan would allocate, without a device.
#[derive(Debug, Default)]
pub struct Counter {
    /// Bytes of all buffers, each rounded up to [`Counter::ALIGN`].
    pub bytes: u64,
}

impl Counter {
    /// What the driver aligns allocations to.
    pub const ALIGN: u64 = 256;
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
        // Never 0, which would be an absent operand.
        let address = Self::ALIGN + self.bytes;
        self.bytes = bytes
            .checked_next_multiple_of(Self::ALIGN)
            .and_then(|bytes| self.bytes.checked_add(bytes))
            .ok_or_else(|| Error::input("the model and its context do not fit 2^64 bytes"))?;
        Ok(DeviceSlice { address, bytes })
    }
}

/// The calls of one token, and the buffers that the host reads or writes.
#[derive(Debug)]
pub struct Plan {
    /// A prompt token whose logits are not needed.
    pub prompt: Vec<Call>,
    /// A token whose logits are needed: computes them, chooses the next token from them.
    pub full: Vec<Call>,
    /// `(1,)` u32: position of the token that the next replay handles.
    pub state: DeviceSlice,
    /// `(context + 1,)` u32: the replay at position p reads `tokens[p]`; a full one writes
    /// `tokens[p + 1]`.
    pub tokens: DeviceSlice,
    /// `(V,)` f32.
    pub logits: DeviceSlice,
}

/// Compiles `model` for a cache of `context` tokens. Weights go to `memory` in the process.
///
/// # Errors
/// [`Error::Input`] for a recipe that the kernels cannot run, naming what is wrong;
/// [`Error::Machine`] from `memory`.
pub fn compile(
    model: &LoadedModel,
    context: usize,
    device: &DeviceInfo,
    memory: &mut dyn Memory,
) -> Result<Plan, Error> {
    if context == 0 {
        return Err(Error::input("a context of 0 tokens holds nothing"));
    }
    let compiler = Compiler::new(model, context, device, memory)?;
    let mut calls = Vec::with_capacity(model.recipe.steps.len());
    let mut prompt_calls = 0;
    for step in &model.recipe.steps {
        calls.push(compiler.call(step)?);
        if matches!(step, Step::KvAppend { .. }) {
            prompt_calls = calls.len();
        }
    }
    let Compiler { state, tokens, .. } = compiler;
    let Some(Step::Logits { dst, .. }) = model.recipe.steps.last() else {
        return Err(Error::input("the recipe does not end with its logits"));
    };
    let logits = compiler.buffer(*dst);
    let advance = sample::plan_advance(device, state).map_err(unsupported)?;
    let mut prompt = calls[..prompt_calls].to_vec();
    prompt.push(advance);
    Ok(Plan {
        prompt,
        full: calls,
        state,
        tokens,
        logits,
    })
}

fn unsupported(error: ShapeError) -> Error {
    Error::input(format!("the GPU kernels cannot run this model: {error}"))
}

/// A weight in device memory.
#[derive(Debug, Clone, Copy)]
enum Placed {
    Int4 {
        rows: usize,
        cols: usize,
        group: usize,
        quants: DeviceSlice,
        scales: DeviceSlice,
        mins: DeviceSlice,
    },
    Int8 {
        rows: usize,
        cols: usize,
        group: usize,
        quants: DeviceSlice,
        scales: DeviceSlice,
    },
    Vector(DeviceSlice),
}

/// Keys and values of one layer, `(KV, S, Dh)` f16 each.
#[derive(Debug, Clone, Copy)]
struct Cache {
    keys: DeviceSlice,
    values: DeviceSlice,
}

struct Compiler<'a> {
    model: &'a LoadedModel,
    context: usize,
    device: &'a DeviceInfo,
    weights: Vec<Placed>,
    /// In the order of [`Buffer::ALL`].
    buffers: Vec<DeviceSlice>,
    caches: Vec<Cache>,
    /// What the blocks of an attention leave for each other: one layer at a time.
    partials: DeviceSlice,
    logits_scratch: DeviceSlice,
    cos: DeviceSlice,
    sin: DeviceSlice,
    state: DeviceSlice,
    tokens: DeviceSlice,
}

impl<'a> Compiler<'a> {
    fn new(
        model: &'a LoadedModel,
        context: usize,
        device: &'a DeviceInfo,
        memory: &mut dyn Memory,
    ) -> Result<Self, Error> {
        let config = &model.recipe.config;
        let weights = model
            .weights
            .iter()
            .map(|w| place(w, memory))
            .collect::<Result<Vec<_>, _>>()?;
        let buffers = Buffer::ALL
            .iter()
            .map(|buffer| {
                memory.reserve(bytes_of(&[model.recipe.elems(*buffer), size_of::<f32>()])?)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let cache_bytes = bytes_of(&[config.kv_heads, context, config.head_dim, size_of::<f16>()])?;
        let caches = (0..config.layers)
            .map(|_| {
                Ok(Cache {
                    keys: memory.reserve(cache_bytes)?,
                    values: memory.reserve(cache_bytes)?,
                })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let scratch_bytes = model.recipe.steps.iter().find_map(|step| match *step {
            Step::Attention { scale, .. } => Some(attention::scratch_bytes(
                device,
                &attention_shape(model, context, scale),
            )),
            _ => None,
        });
        let partials = match scratch_bytes {
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
            device,
            weights,
            buffers,
            caches,
            partials,
            logits_scratch: memory.upload(&vec![0; logits::scratch_bytes(device) as usize])?,
            cos,
            sin,
            state: memory.upload(bytemuck::cast_slice(&[0u32]))?,
            // Filled, because the embedding may only be given ids inside the vocabulary.
            tokens: memory.upload_made(token_bytes, &mut || vec![0; token_bytes as usize])?,
        })
    }

    fn buffer(&self, buffer: Buffer) -> DeviceSlice {
        self.buffers[buffer as usize]
    }

    fn weight(&self, id: WeightId) -> Result<Placed, Error> {
        self.weights
            .get(id)
            .copied()
            .ok_or_else(|| Error::input(format!("there is no weight {id}")))
    }

    fn vector(&self, id: WeightId) -> Result<DeviceSlice, Error> {
        match self.weight(id)? {
            Placed::Vector(slice) => Ok(slice),
            _ => Err(self.wrong_kind(id, "a vector")),
        }
    }

    fn wrong_kind(&self, id: WeightId, wanted: &str) -> Error {
        let name = self
            .model
            .recipe
            .weights
            .get(id)
            .map_or("?", |weight| weight.name.as_str());
        Error::input(format!("tensor {name} should be {wanted}"))
    }

    fn cache(&self, layer: usize) -> Result<Cache, Error> {
        self.caches
            .get(layer)
            .copied()
            .ok_or_else(|| Error::input(format!("there is no layer {layer}")))
    }

    /// The kernel call of one step.
    fn call(&self, step: &Step) -> Result<Call, Error> {
        let (device, context, config) = (self.device, self.context, &self.model.recipe.config);
        let (state, tokens) = (self.state, self.tokens);
        match *step {
            Step::Embed { table, dst } => {
                let Placed::Int8 {
                    rows,
                    cols,
                    group,
                    quants,
                    scales,
                } = self.weight(table)?
                else {
                    return Err(self.wrong_kind(table, "an 8-bit table"));
                };
                let shape = embed::Shape {
                    vocab: rows,
                    width: cols,
                    group,
                    context,
                };
                let out = self.buffer(dst);
                embed::plan(
                    device,
                    &shape,
                    &embed::Operands {
                        quants,
                        scales,
                        tokens,
                        state,
                        out,
                    },
                )
            }
            Step::RmsNorm {
                weight,
                eps,
                src,
                dst,
            } => {
                let shape = rmsnorm::Shape {
                    tokens: 1,
                    width: self.model.recipe.elems(src),
                    eps,
                };
                let (x, out) = (self.buffer(src), self.buffer(dst));
                let weight = self.vector(weight)?;
                rmsnorm::plan(device, &shape, &rmsnorm::Operands { x, weight, out })
            }
            Step::Linear {
                weight,
                bias,
                src,
                dst,
            } => {
                let bias = bias.map_or(Ok(DeviceSlice::NONE), |bias| self.vector(bias))?;
                let (x, y) = (self.buffer(src), self.buffer(dst));
                match self.weight(weight)? {
                    Placed::Int4 {
                        rows,
                        cols,
                        group,
                        quants,
                        scales,
                        mins,
                    } => {
                        let shape = linear::gemv_int4::Shape { rows, cols, group };
                        let operands = linear::gemv_int4::Operands {
                            quants,
                            scales,
                            mins,
                            bias,
                            x,
                            y,
                        };
                        linear::gemv_int4::plan(device, &shape, &operands, Choice::Auto)
                    }
                    Placed::Int8 {
                        rows,
                        cols,
                        group,
                        quants,
                        scales,
                    } => {
                        let shape = linear::gemv_int8::Shape { rows, cols, group };
                        let operands = linear::gemv_int8::Operands {
                            quants,
                            scales,
                            bias,
                            x,
                            y,
                        };
                        linear::gemv_int8::plan(device, &shape, &operands)
                    }
                    Placed::Vector(_) => return Err(self.wrong_kind(weight, "a matrix")),
                }
            }
            Step::Rope { buffer, heads } => {
                let shape = rope::Shape {
                    heads,
                    head_dim: config.head_dim,
                    context,
                };
                let (x, cos, sin) = (self.buffer(buffer), self.cos, self.sin);
                rope::plan(device, &shape, &rope::Operands { x, cos, sin, state })
            }
            Step::KvAppend { layer, key, value } => {
                let Cache {
                    keys: k_cache,
                    values: v_cache,
                } = self.cache(layer)?;
                let shape = kv_append::Shape {
                    kv_heads: config.kv_heads,
                    head_dim: config.head_dim,
                    context,
                };
                let (k, v) = (self.buffer(key), self.buffer(value));
                let operands = kv_append::Operands {
                    k,
                    v,
                    k_cache,
                    v_cache,
                    state,
                };
                kv_append::plan(device, &shape, &operands)
            }
            Step::Attention {
                layer,
                query,
                dst,
                scale,
            } => {
                let Cache {
                    keys: k_cache,
                    values: v_cache,
                } = self.cache(layer)?;
                let shape = attention_shape(self.model, context, scale);
                let (q, out) = (self.buffer(query), self.buffer(dst));
                let operands = attention::Operands {
                    q,
                    k_cache,
                    v_cache,
                    state,
                    out,
                    partials: self.partials,
                };
                attention::plan(device, &shape, &operands)
            }
            Step::SwiGlu { gate, up, dst } => {
                let shape = swiglu::Shape {
                    elems: self.model.recipe.elems(dst),
                };
                let (gate, up, out) = (self.buffer(gate), self.buffer(up), self.buffer(dst));
                swiglu::plan(device, &shape, &swiglu::Operands { gate, up, out })
            }
            Step::Add { src, dst } => {
                let shape = add::Shape {
                    elems: self.model.recipe.elems(dst),
                };
                let (x, y) = (self.buffer(src), self.buffer(dst));
                add::plan(device, &shape, &add::Operands { x, y })
            }
            Step::Logits { table, src, dst } => {
                let Placed::Int8 {
                    rows,
                    cols,
                    group,
                    quants,
                    scales,
                } = self.weight(table)?
                else {
                    return Err(self.wrong_kind(table, "an 8-bit table"));
                };
                let shape = logits::Shape {
                    vocab: rows,
                    width: cols,
                    group,
                };
                let operands = logits::Operands {
                    quants,
                    scales,
                    x: self.buffer(src),
                    logits: self.buffer(dst),
                    scratch: self.logits_scratch,
                };
                let greedy = logits::Greedy {
                    context,
                    tokens,
                    state,
                    advance: true,
                };
                logits::plan(device, &shape, &operands, Some(&greedy))
            }
        }
        .map_err(unsupported)
    }
}

fn attention_shape(model: &LoadedModel, context: usize, scale: f32) -> attention::Shape {
    let config = &model.recipe.config;
    attention::Shape {
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        context,
        scale,
    }
}

/// Bytes of a dense tensor; the last factor is the element size.
fn bytes_of(dims: &[usize]) -> Result<u64, Error> {
    dims.iter()
        .try_fold(1u64, |bytes, dim| bytes.checked_mul(*dim as u64))
        .ok_or_else(|| Error::input(format!("a buffer of {dims:?} does not fit 2^64 bytes")))
}

fn place(weight: &Weight, memory: &mut dyn Memory) -> Result<Placed, Error> {
    let halves = |memory: &mut dyn Memory, halves: &[f16]| {
        memory.upload(bytemuck::cast_slice(halves.reinterpret_cast()))
    };
    Ok(match weight {
        Weight::Int4(Int4Matrix {
            rows,
            cols,
            group,
            quants,
            scales,
            mins,
        }) => Placed::Int4 {
            rows: *rows,
            cols: *cols,
            group: *group,
            quants: memory.upload(quants)?,
            scales: halves(memory, scales)?,
            mins: match mins {
                Some(mins) => halves(memory, mins)?,
                None => DeviceSlice::NONE,
            },
        },
        Weight::Int8(Int8Matrix {
            rows,
            cols,
            group,
            quants,
            scales,
        }) => Placed::Int8 {
            rows: *rows,
            cols: *cols,
            group: *group,
            quants: memory.upload(bytemuck::cast_slice(quants))?,
            scales: halves(memory, scales)?,
        },
        Weight::Vector(values) => Placed::Vector(memory.upload(bytemuck::cast_slice(values))?),
    })
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
