//! The calls that take many tokens of a prompt through the layers at once.
//!
//! ```text
//! embed  [norm product  rope, append  attention  product  norm product  product]*  norm of a row
//! ```
//!
//! The matrices are those of the one-token plan, the same bytes. Between the kernels the residual
//! stream, queries, keys and values are f32, everything else f16. Values of 8 bits become halves for
//! the attention, a layer at a time, in one buffer. A recipe with a step that has no form for many
//! tokens has no such plan: its prompts go one token at a time.

use gpu_kernels::launch::{Call, DeviceInfo, DeviceSlice, ShapeError};
use gpu_kernels::linear::gemm_int4;
use gpu_kernels::linear::gemv_int4_mma::Epilogue;
use gpu_kernels::rope_kv_append::tokens::Strided;
use gpu_kernels::{attention, embed, kv_values, rmsnorm, rope_kv_append};
use models::recipe::{Buffer, Step};

use super::place::{Placed, PlacedProduct};
use super::{Cache, Compiler, attention_shape, bytes_of, unsupported};
use crate::Error;
use crate::backend::fuse::{Op, Product, Then};
use crate::backend::{KvForm, LoadedModel};

/// Most tokens at once: more make the products no faster and take more memory.
const MOST_TOKENS: usize = 1024;

/// A call for any number of tokens.
#[derive(Debug)]
enum Many {
    Embed(embed::Shape, embed::Operands),
    EmbedF16(embed::F16Shape, embed::F16Operands),
    Norm(rmsnorm::Shape, rmsnorm::Operands),
    Product(gemm_int4::Shape, gemm_int4::Operands, gemm_int4::Tilings),
    Rope(rope_kv_append::Shape, rope_kv_append::tokens::Operands),
    Values(kv_values::Shape, kv_values::Operands),
    Attention(attention::Shape, attention::prompt::Operands),
}

impl Many {
    /// The call for `tokens` tokens, the first one at the position that `state` holds.
    fn call(
        &self,
        device: &DeviceInfo,
        tokens: usize,
        state: DeviceSlice,
    ) -> Result<Call, ShapeError> {
        match self {
            Many::Embed(shape, ops) => {
                let shape = embed::Shape { tokens, ..*shape };
                embed::plan(device, &shape, &embed::Operands { state, ..*ops })
            }
            Many::EmbedF16(shape, ops) => {
                let shape = embed::F16Shape { tokens, ..*shape };
                embed::plan_f16(device, &shape, &embed::F16Operands { state, ..*ops })
            }
            Many::Norm(shape, ops) => {
                let shape = rmsnorm::Shape { tokens, ..*shape };
                rmsnorm::plan_f16(device, &shape, ops)
            }
            Many::Product(shape, ops, tilings) => {
                let shape = gemm_int4::Shape { tokens, ..*shape };
                gemm_int4::plan(device, &shape, ops, tilings.choose(device, &shape))
            }
            Many::Rope(shape, ops) => {
                let ops = rope_kv_append::tokens::Operands { state, ..*ops };
                rope_kv_append::tokens::plan(device, shape, tokens, &ops)
            }
            Many::Values(shape, ops) => {
                let ops = kv_values::Operands { state, ..*ops };
                kv_values::plan(device, shape, tokens, &ops)
            }
            Many::Attention(shape, ops) => {
                let ops = attention::prompt::Operands { state, ..*ops };
                attention::prompt::plan(device, shape, tokens, &ops)
            }
        }
    }
}

/// The calls of a run of tokens.
#[derive(Debug)]
pub struct Prompt {
    /// Most tokens of a run.
    pub tokens: usize,
    /// `(ceil(context / tokens),)` u32: positions of the first tokens of runs.
    pub starts: DeviceSlice,
    device: DeviceInfo,
    calls: Vec<Many>,
    /// The last norm, of one token.
    norm: (rmsnorm::Shape, rmsnorm::Operands),
}

impl Prompt {
    /// The calls that put `tokens` tokens into the cache, the first one at the position that `state`
    /// holds.
    ///
    /// # Errors
    /// [`Error::Input`] for more tokens than a run may have.
    pub fn calls(&self, tokens: usize, state: DeviceSlice) -> Result<Vec<Call>, Error> {
        let calls = self.calls.iter();
        calls
            .map(|call| call.call(&self.device, tokens, state).map_err(unsupported))
            .collect()
    }

    /// The call that leaves what the logits of token `row` of the last run are made of where the
    /// one-token plan has it.
    ///
    /// # Errors
    /// [`Error::Input`] for a row past the most tokens of a run.
    pub fn output(&self, row: usize) -> Result<Call, Error> {
        let (shape, operands) = &self.norm;
        let bytes = 4 * (row * shape.width) as u64;
        let x = rest(operands.x, bytes);
        let operands = rmsnorm::Operands { x, ..*operands };
        rmsnorm::plan(&self.device, shape, &operands).map_err(unsupported)
    }
}

/// `slice` without its first `bytes`.
fn rest(slice: DeviceSlice, bytes: u64) -> DeviceSlice {
    DeviceSlice {
        address: slice.address + bytes,
        bytes: slice.bytes.saturating_sub(bytes),
    }
}

/// Whether every op has a form for many tokens.
fn takes(model: &LoadedModel, ops: &[Op<'_>]) -> bool {
    let one = |op: &Op<'_>, next: Option<&Op<'_>>| match op {
        Op::Product(product) => {
            let from = match product.norm {
                Some(_) => product.src == Buffer::Residual,
                None => matches!(
                    product.src,
                    Buffer::Normed | Buffer::Attended | Buffer::Gated
                ),
            };
            from && match product.then {
                Then::Store => product
                    .dsts
                    .iter()
                    .all(|dst| matches!(dst, Buffer::Query | Buffer::Key | Buffer::Value)),
                Then::Add => product.dsts == [Buffer::Residual],
                Then::SwiGlu => product.dsts == [Buffer::Gated],
                Then::RopeKvAppend { .. } => product.dsts == [Buffer::Query],
            }
        }
        Op::RopeKvAppend {
            query,
            heads,
            key,
            value,
            ..
        } => {
            (*query, *key, *value) == (Buffer::Query, Buffer::Key, Buffer::Value)
                && *heads == model.recipe.config.heads
        }
        Op::Step(Step::Embed { dst, .. }) => *dst == Buffer::Residual,
        Op::Step(Step::RmsNorm { src, dst, .. }) => {
            (*src, *dst) == (Buffer::Residual, Buffer::Normed)
        }
        // Taken over by the kernel that turns the heads.
        Op::Step(Step::HeadNorm { buffer, .. }) => {
            matches!(buffer, Buffer::Query | Buffer::Key)
                && matches!(
                    next,
                    Some(Op::RopeKvAppend { .. } | Op::Step(Step::HeadNorm { .. }))
                )
        }
        Op::Step(Step::Attention { query, dst, .. }) => {
            (*query, *dst) == (Buffer::Query, Buffer::Attended)
        }
        Op::Step(Step::Logits { src, .. }) => *src == Buffer::Normed && next.is_none(),
        Op::Step(_) | Op::Levels(_) => false,
    };
    let head_eps = |op: &Op<'_>| match op {
        Op::Step(Step::HeadNorm { eps, .. }) => Some(*eps),
        _ => None,
    };
    let mut eps = ops.iter().filter_map(head_eps);
    let first_eps = eps.next();
    let ends_with_norm = matches!(
        ops,
        [
            ..,
            Op::Step(Step::RmsNorm { .. }),
            Op::Step(Step::Logits { .. })
        ]
    );
    attention::prompt::takes(model.recipe.config.head_dim)
        && ends_with_norm
        && eps.all(|eps| Some(eps) == first_eps)
        && (0..ops.len()).all(|i| one(&ops[i], ops.get(i + 1)))
}

/// Where queries, keys or values of a run lie: in the result of a product.
#[derive(Debug, Clone)]
struct Results {
    dsts: Vec<Buffer>,
    slice: DeviceSlice,
    rows: usize,
}

/// Collects the calls while the one-token plan is compiled.
pub(super) struct Builder {
    tokens: usize,
    starts: DeviceSlice,
    calls: Vec<Many>,
    /// `(tokens, D)` f32.
    residual: DeviceSlice,
    /// `(tokens, D)`, `(tokens, H Dh)` twice, `(tokens, F)` f16.
    normed: DeviceSlice,
    turned: DeviceSlice,
    attended: DeviceSlice,
    gated: DeviceSlice,
    /// The one written last at the end.
    results: Vec<Results>,
    scratch: DeviceSlice,
    /// `(KV, S, Dh)` f16: a layer's values where the cache has bytes, else none.
    values: DeviceSlice,
    /// Of the norms of heads in front of the next rope: epsilon, weights of queries and keys.
    head_norms: (f32, [DeviceSlice; 2]),
}

impl Builder {
    /// Room for the buffers, if the recipe can be run so.
    pub fn new(compiler: &mut Compiler<'_>, ops: &[Op<'_>]) -> Result<Option<Builder>, Error> {
        if !takes(compiler.model, ops) {
            return Ok(None);
        }
        let tokens = compiler.context.min(MOST_TOKENS);
        let recipe = &compiler.model.recipe;
        let mut reserve = |buffer: Buffer, elem_bytes: usize| {
            let bytes = bytes_of(&[tokens, recipe.elems(buffer), elem_bytes])?;
            compiler.memory.reserve(bytes)
        };
        let residual = reserve(Buffer::Residual, 4)?;
        let normed = reserve(Buffer::Normed, 2)?;
        let turned = reserve(Buffer::Query, 2)?;
        let attended = reserve(Buffer::Attended, 2)?;
        let gated = reserve(Buffer::Gated, 2)?;
        let starts = bytes_of(&[compiler.context.div_ceil(tokens), size_of::<u32>()])?;
        let values = match compiler.form {
            KvForm::K16V16 => DeviceSlice::NONE,
            KvForm::K16V8 => {
                let config = &recipe.config;
                let (heads, row_bytes) = (config.kv_heads, 2 * config.head_dim);
                let context = compiler.context;
                compiler.memory.reserve_rows(1, heads, context, row_bytes)?[0]
            }
        };
        let scratch = gemm_int4::most_scratch_bytes(compiler.device);
        Ok(Some(Builder {
            tokens,
            starts: compiler.memory.reserve(starts)?,
            calls: Vec::with_capacity(ops.len() + ops.len() / 2),
            residual,
            normed,
            turned,
            attended,
            gated,
            results: Vec::new(),
            values,
            scratch: compiler
                .memory
                .upload_made(scratch, &mut || vec![0; scratch as usize])?,
            head_norms: (0.0, [DeviceSlice::NONE; 2]),
        }))
    }

    /// Adds what `op`, other than a product, becomes.
    pub fn op(&mut self, compiler: &mut Compiler<'_>, op: &Op<'_>) -> Result<(), Error> {
        let context = compiler.context;
        match *op {
            Op::Step(&Step::Embed { table, .. }) => {
                let (tokens, state, out) = (compiler.tokens, compiler.state, self.residual);
                self.calls.push(match compiler.weight(table)? {
                    Placed::F16 { rows, cols, values } => Many::EmbedF16(
                        embed::F16Shape {
                            vocab: rows,
                            width: cols,
                            context,
                            tokens: 1,
                        },
                        embed::F16Operands {
                            table: values,
                            tokens,
                            state,
                            out,
                        },
                    ),
                    Placed::Int8 {
                        rows,
                        cols,
                        group,
                        quants,
                        scales,
                    } => Many::Embed(
                        embed::Shape {
                            vocab: rows,
                            width: cols,
                            group,
                            context,
                            tokens: 1,
                        },
                        embed::Operands {
                            quants,
                            scales,
                            tokens,
                            state,
                            out,
                        },
                    ),
                    Placed::Vector(_) => return Err(compiler.wrong_kind(table, "a table")),
                });
            }
            Op::Step(&Step::RmsNorm { weight, eps, .. }) => {
                let weight = compiler.vector(weight)?;
                self.norm(compiler, weight, eps);
            }
            Op::Step(&Step::HeadNorm {
                weight,
                eps,
                buffer,
                ..
            }) => {
                self.head_norms.0 = eps;
                self.head_norms.1[usize::from(buffer == Buffer::Key)] = compiler.vector(weight)?;
            }
            Op::RopeKvAppend { layer, .. } => {
                let results = [
                    self.result(compiler.model, Buffer::Query)?,
                    self.result(compiler.model, Buffer::Key)?,
                    self.result(compiler.model, Buffer::Value)?,
                ];
                self.rope(compiler, layer, results, None)?;
            }
            Op::Step(&Step::Attention {
                layer,
                scale,
                window,
                ..
            }) => {
                let Cache {
                    keys,
                    mut values,
                    scales,
                } = compiler.cache(layer)?;
                if self.values != DeviceSlice::NONE {
                    let config = &compiler.model.recipe.config;
                    let shape = kv_values::Shape {
                        kv_heads: config.kv_heads,
                        head_dim: config.head_dim,
                        context,
                    };
                    let operands = kv_values::Operands {
                        levels: values,
                        scales,
                        state: compiler.state,
                        values: self.values,
                    };
                    self.calls.push(Many::Values(shape, operands));
                    values = self.values;
                }
                let operands = attention::prompt::Operands {
                    q: self.turned,
                    k_cache: keys,
                    v_cache: values,
                    state: compiler.state,
                    out: self.attended,
                };
                let shape = attention_shape(compiler.model, context, scale, window);
                self.calls.push(Many::Attention(shape, operands));
            }
            Op::Step(_) | Op::Levels(_) | Op::Product(_) => {}
        }
        Ok(())
    }

    /// Turns and appends what `results` hold: queries, keys and values; of a product whose heads are
    /// packed in tiles with its biases.
    fn rope(
        &mut self,
        compiler: &Compiler<'_>,
        layer: usize,
        [q, k, v]: [Strided; 3],
        tiles_bias: Option<DeviceSlice>,
    ) -> Result<(), Error> {
        let config = &compiler.model.recipe.config;
        let Cache {
            keys,
            values,
            scales,
        } = compiler.cache(layer)?;
        let shape = rope_kv_append::Shape {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            context: compiler.context,
        };
        let (eps, [q_gain, k_gain]) =
            std::mem::replace(&mut self.head_norms, (0.0, [DeviceSlice::NONE; 2]));
        let operands = rope_kv_append::tokens::Operands {
            q,
            k,
            v,
            in_tiles: tiles_bias.is_some(),
            bias: tiles_bias.unwrap_or(DeviceSlice::NONE),
            q_gain,
            k_gain,
            eps,
            cos: compiler.cos,
            sin: compiler.sin,
            turned: self.turned,
            k_cache: keys,
            v_cache: values,
            v_scales: scales,
            state: compiler.state,
        };
        self.calls.push(Many::Rope(shape, operands));
        Ok(())
    }

    fn norm(&mut self, compiler: &Compiler<'_>, weight: DeviceSlice, eps: f32) {
        let shape = rmsnorm::Shape {
            tokens: 1,
            width: compiler.model.recipe.elems(Buffer::Residual),
            eps,
        };
        let operands = rmsnorm::Operands {
            x: self.residual,
            weight,
            out: self.normed,
        };
        self.calls.push(Many::Norm(shape, operands));
    }

    /// Adds a product whose matrices are placed, and the norm in front of it.
    pub fn product(
        &mut self,
        compiler: &mut Compiler<'_>,
        product: &Product,
        placed: &PlacedProduct,
    ) -> Result<(), Error> {
        if let Some(norm) = product.norm {
            self.norm(compiler, placed.gain, norm.eps);
        }
        let tiles = &placed.tiles;
        let (y, epilogue) = match product.then {
            Then::Store | Then::RopeKvAppend { .. } => {
                let y = self.place(compiler, product, tiles.rows)?;
                (y, Epilogue::Store)
            }
            Then::Add => (self.residual, Epilogue::Add),
            Then::SwiGlu => (self.gated, Epilogue::SwiGlu),
        };
        let shape = gemm_int4::Shape {
            rows: tiles.rows,
            cols: tiles.cols,
            group: tiles.group,
            tokens: 1,
            epilogue,
            half_y: product.then == Then::SwiGlu,
        };
        let operands = gemm_int4::Operands {
            quants: tiles.quants,
            scales: tiles.scales,
            mins: tiles.mins,
            zeros: tiles.zeros,
            // What turns the heads adds it where their order is not that of the bias.
            bias: match product.then {
                Then::RopeKvAppend { .. } => DeviceSlice::NONE,
                _ => placed.bias,
            },
            x: match product.src {
                Buffer::Attended => self.attended,
                Buffer::Gated => self.gated,
                _ => self.normed,
            },
            y,
            scratch: self.scratch,
        };
        let mins = tiles.mins != DeviceSlice::NONE;
        let tilings = gemm_int4::Tilings::of(compiler.tuned, &shape, mins);
        self.calls.push(Many::Product(shape, operands, tilings));
        if let Then::RopeKvAppend { layer } = product.then {
            let recipe = &compiler.model.recipe;
            let [q, k] = [Buffer::Query, Buffer::Key].map(|buffer| recipe.elems(buffer));
            let results = [0, q, q + k].map(|first| Strided {
                slice: rest(y, 4 * first as u64),
                stride: tiles.rows,
            });
            self.rope(compiler, layer, results, Some(placed.bias))?;
        }
        Ok(())
    }

    /// Room for the result of a product, the same in all layers.
    fn place(
        &mut self,
        compiler: &mut Compiler<'_>,
        product: &Product,
        rows: usize,
    ) -> Result<DeviceSlice, Error> {
        if let Some(i) = self.results.iter().position(|r| r.dsts == product.dsts) {
            let there = self.results.remove(i);
            let slice = there.slice;
            self.results.push(there);
            return Ok(slice);
        }
        let bytes = bytes_of(&[self.tokens, rows, 4])?;
        let slice = compiler.memory.reserve(bytes)?;
        self.results.push(Results {
            dsts: product.dsts.clone(),
            slice,
            rows,
        });
        Ok(slice)
    }

    /// Where `buffer` of a run lies: in the product that wrote it last.
    fn result(&self, model: &LoadedModel, buffer: Buffer) -> Result<Strided, Error> {
        for Results { dsts, slice, rows } in self.results.iter().rev() {
            if let Some(i) = dsts.iter().position(|dst| *dst == buffer) {
                let before: usize = dsts[..i].iter().map(|dst| model.recipe.elems(*dst)).sum();
                return Ok(Strided {
                    slice: rest(*slice, 4 * before as u64),
                    stride: *rows,
                });
            }
        }
        Err(Error::input(format!(
            "the recipe reads {buffer:?} before it writes it"
        )))
    }

    /// The finished plan: its last norm becomes one of a single token, for the logits, to `out`.
    pub fn finish(mut self, device: &DeviceInfo, out: DeviceSlice) -> Option<Prompt> {
        let Some(Many::Norm(shape, operands)) = self.calls.pop() else {
            return None;
        };
        Some(Prompt {
            tokens: self.tokens,
            starts: self.starts,
            device: *device,
            calls: self.calls,
            norm: (shape, rmsnorm::Operands { out, ..operands }),
        })
    }
}
