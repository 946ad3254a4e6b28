//! The kernel call of each step and of each fused pattern.

use gpu_kernels::launch::{Call, DeviceSlice};
use gpu_kernels::linear::gemv_int4_mma;
use gpu_kernels::{
    add, attention, embed, kv_append, linear, logits, relu2_glu, rescale, rmsnorm, rope,
    rope_kv_append, round_int8, sample, swiglu,
};
use models::quant::Weight;
use models::recipe::{Buffer, Step, WeightId};

use super::place::{Placed, PlacedProduct, pack};
use super::{Cache, Compiler, attention_shape, unsupported};
use crate::Error;
use crate::backend::KvForm;
use crate::backend::fuse::{Op, Product, Then};

impl Compiler<'_> {
    /// The kernel call of one step.
    pub(super) fn step(&mut self, step: &Step) -> Result<Call, Error> {
        let (device, context, config) = (self.device, self.context, &self.model.recipe.config);
        let (state, tokens) = (self.state, self.tokens);
        match *step {
            Step::Embed { table, dst } => {
                let out = self.buffer(dst);
                if let Placed::F16 { rows, cols, values } = self.weight(table)? {
                    let shape = embed::F16Shape {
                        vocab: rows,
                        width: cols,
                        context,
                        tokens: 1,
                    };
                    let operands = embed::F16Operands {
                        table: values,
                        tokens,
                        state,
                        out,
                    };
                    return embed::plan_f16(device, &shape, &operands).map_err(unsupported);
                }
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
                    tokens: 1,
                };
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
                if let Placed::F16 { rows, cols, values } = self.weight(weight)? {
                    return self.float_product([rows, cols], [values, bias, x, y]);
                }
                let Placed::Int8 {
                    rows,
                    cols,
                    group,
                    quants,
                    scales,
                } = self.weight(weight)?
                else {
                    return Err(self.wrong_kind(weight, "a matrix"));
                };
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
                    scales: v_scales,
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
                    v_scales,
                    state,
                };
                kv_append::plan(device, &shape, &operands)
            }
            Step::Attention {
                layer,
                query,
                dst,
                scale,
                window,
            } => {
                let (call, _) = self.attention(layer, [query, dst], scale, window)?;
                return Ok(call);
            }
            Step::SwiGlu { gate, up, dst } => {
                let shape = swiglu::Shape {
                    elems: self.model.recipe.elems(dst),
                };
                let (gate, up, out) = (self.buffer(gate), self.buffer(up), self.buffer(dst));
                swiglu::plan(device, &shape, &swiglu::Operands { gate, up, out })
            }
            Step::HeadNorm {
                weight,
                eps,
                buffer,
                heads,
            } => {
                let shape = rmsnorm::Shape {
                    tokens: heads,
                    width: config.head_dim,
                    eps,
                };
                let (x, weight) = (self.buffer(buffer), self.vector(weight)?);
                rmsnorm::plan(device, &shape, &rmsnorm::Operands { x, weight, out: x })
            }
            Step::RoundToInt8 { buffer } => return self.round(buffer, false),
            Step::ReluSquaredGlu { gate, up, dst } => {
                let shape = relu2_glu::Shape {
                    elems: self.model.recipe.elems(dst),
                };
                let (gate, up, out) = (self.buffer(gate), self.buffer(up), self.buffer(dst));
                relu2_glu::plan(device, &shape, &relu2_glu::Operands { gate, up, out })
            }
            Step::Add { src, dst } => {
                let shape = add::Shape {
                    elems: self.model.recipe.elems(dst),
                };
                let (x, y) = (self.buffer(src), self.buffer(dst));
                add::plan(device, &shape, &add::Operands { x, y })
            }
            Step::Logits { table, src, dst } => {
                // The choice is a call of its own: [`Compiler::choice`].
                let int4 = self.model.weights.get(table).and_then(Weight::int4);
                if int4.is_some() {
                    let product = Product {
                        norm: None,
                        src,
                        matrices: vec![table],
                        biases: vec![None],
                        dsts: vec![dst],
                        then: Then::Store,
                        sums: None,
                    };
                    let packed = self.memory.keeps().then(|| pack(self.model, &product));
                    let placed = self.place(&product, packed.transpose()?.as_deref())?;
                    let (call, _) = self.product(&product, &placed)?;
                    return Ok(call);
                }
                if let Placed::F16 { rows, cols, values } = self.weight(table)? {
                    let (x, y) = (self.buffer(src), self.buffer(dst));
                    return self.float_product([rows, cols], [values, DeviceSlice::NONE, x, y]);
                }
                let (shape, operands) = self.logits(table, [src, dst])?;
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

    /// Activations rounded to 8 bits, or made levels of them.
    pub(super) fn round(&self, buffer: Buffer, levels: bool) -> Result<Call, Error> {
        let shape = round_int8::Shape {
            tokens: 1,
            width: self.model.recipe.elems(buffer),
        };
        let scale = match levels {
            true => self.level_scale,
            false => DeviceSlice::NONE,
        };
        round_int8::plan(self.device, &shape, self.buffer(buffer), scale).map_err(unsupported)
    }

    /// The call that gives a product of levels its scale.
    pub(super) fn rescale(
        &self,
        product: &Product,
        row_scales: DeviceSlice,
    ) -> Result<Option<Call>, Error> {
        if product.sums.is_none() {
            return Ok(None);
        }
        let x = self.sums(product);
        let adds = product.then == Then::Add;
        let y = match adds {
            true => self.buffer(product.dsts[0]),
            false => x,
        };
        let rows = |id: &WeightId| self.model.weights.get(*id).map_or(0, |w| w.shape().0);
        let shape = rescale::Shape {
            elems: product.matrices.iter().map(rows).sum(),
            adds,
        };
        let scale = self.level_scale;
        let operands = rescale::Operands {
            x,
            scale,
            row_scales,
            y,
        };
        let call = rescale::plan(self.device, &shape, &operands);
        call.map(Some).map_err(unsupported)
    }

    /// Where a product writes: its destinations, one after the other, or what lies in front of the addition.
    fn sums(&self, product: &Product) -> DeviceSlice {
        if let (Some(sums), Then::Add) = (product.sums, product.then) {
            return self.buffer(sums);
        }
        DeviceSlice {
            address: self.buffer(product.dsts[0]).address,
            bytes: product.dsts.iter().map(|b| self.buffer(*b).bytes).sum(),
        }
    }

    fn float_product(
        &self,
        [rows, cols]: [usize; 2],
        [weights, bias, x, y]: [DeviceSlice; 4],
    ) -> Result<Call, Error> {
        let shape = linear::gemv_f16::Shape { rows, cols };
        let operands = linear::gemv_f16::Operands {
            weights,
            bias,
            x,
            y,
        };
        linear::gemv_f16::plan(self.device, &shape, &operands).map_err(unsupported)
    }

    /// The logits without a choice; `own` is the step's call.
    pub(super) fn plain_logits(
        &mut self,
        table: WeightId,
        buffers: [Buffer; 2],
        own: &Call,
    ) -> Result<Call, Error> {
        if !self.chooses(table) {
            return Ok(own.clone());
        }
        let (shape, operands) = self.logits(table, buffers)?;
        logits::plan(self.device, &shape, &operands, None).map_err(unsupported)
    }

    /// Whether the logits' own call chooses the next token: that of an 8-bit table does.
    fn chooses(&self, table: WeightId) -> bool {
        !matches!(
            self.model.weights.get(table),
            Some(Weight::F16(_) | Weight::Int4(_) | Weight::Int4Tiled(_))
        )
    }

    /// The calls that choose the next token and advance the position, where the logits' own call does not.
    pub(super) fn choice(&mut self, step: &Step) -> Result<Vec<(Call, &'static str)>, Error> {
        let Step::Logits { table, dst, .. } = *step else {
            return Ok(Vec::new());
        };
        if self.chooses(table) {
            return Ok(Vec::new());
        }
        let shape = sample::ArgmaxShape {
            vocab: self.model.recipe.elems(dst),
            context: self.context,
        };
        let operands = sample::ArgmaxOperands {
            logits: self.buffer(dst),
            tokens: self.tokens,
            state: self.state,
        };
        let choose = sample::plan_argmax(self.device, &shape, &operands).map_err(unsupported)?;
        let advance = sample::plan_advance(self.device, self.state).map_err(unsupported)?;
        Ok(vec![(choose, "choice"), (advance, "advance")])
    }

    /// The product of the output table with `src`, to `dst`.
    fn logits(
        &mut self,
        table: WeightId,
        [src, dst]: [Buffer; 2],
    ) -> Result<(logits::Shape, logits::Operands), Error> {
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
        Ok((shape, operands))
    }

    /// The calls of [`Plan::draw`](super::Plan::draw).
    pub(super) fn draw(
        &mut self,
        table: WeightId,
        buffers: [Buffer; 2],
        settings: DeviceSlice,
        seen: DeviceSlice,
    ) -> Result<Vec<Call>, Error> {
        if !self.chooses(table) {
            return Ok(Vec::new());
        }
        let (shape, operands) = self.logits(table, buffers)?;
        let candidates = self.memory.reserve(sample::draw::CANDIDATES_BYTES)?;
        let top = logits::Top {
            candidates,
            seen,
            settings,
        };
        let top = logits::plan_top(self.device, &shape, &operands, &top).map_err(unsupported)?;
        let shape = sample::draw::TopKShape {
            vocab: shape.vocab,
            context: self.context,
            advance: true,
        };
        let operands = sample::draw::TopKOperands {
            candidates,
            settings,
            seen,
            tokens: self.tokens,
            state: self.state,
        };
        let draw = sample::draw::plan_topk(self.device, &shape, &operands).map_err(unsupported)?;
        Ok(vec![top, draw])
    }

    /// The call of INT4 matrices behind one input, and how it is launched.
    pub(super) fn product(
        &self,
        product: &Product,
        placed: &PlacedProduct,
    ) -> Result<(Call, String), Error> {
        let &PlacedProduct {
            tiles, bias, gain, ..
        } = placed;
        let y = self.sums(product);
        let shape = gemv_int4_mma::Shape {
            rows: tiles.rows,
            cols: tiles.cols,
            group: tiles.group,
            epilogue: match product.then {
                _ if product.sums.is_some() => gemv_int4_mma::Epilogue::Store,
                Then::Store | Then::RopeKvAppend { .. } => gemv_int4_mma::Epilogue::Store,
                Then::Add => gemv_int4_mma::Epilogue::Add,
                Then::SwiGlu => gemv_int4_mma::Epilogue::SwiGlu,
            },
            eps: product.norm.map_or(0.0, |norm| norm.eps),
            half_x: self.half_gated && product.src == Buffer::Gated,
            half_y: self.half_gated && product.then == Then::SwiGlu,
        };
        let operands = gemv_int4_mma::Operands {
            quants: tiles.quants,
            scales: tiles.scales,
            mins: tiles.mins,
            zeros: tiles.zeros,
            bias,
            x: self.buffer(product.src),
            gain,
            y,
        };
        let mut name = shape.name(product.norm.is_some());
        let rule = || gemv_int4_mma::rule(self.device, &shape);
        let mins = tiles.mins != DeviceSlice::NONE;
        if let Then::RopeKvAppend { layer } = product.then {
            let config = &self.model.recipe.config;
            let Cache { keys, values, .. } = self.cache(layer)?;
            let heads = gemv_int4_mma::Heads {
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                context: self.context,
            };
            let of_heads = gemv_int4_mma::HeadsOperands {
                cos: self.cos,
                sin: self.sin,
                k_cache: keys,
                v_cache: values,
                state: self.state,
            };
            let entry = gemv_int4_mma::entry_heads(shape.group, mins);
            name.push_str(" heads");
            let chosen = self.tuned.choose(entry, &name, rule);
            let tiling = Some(chosen.launch);
            let call = gemv_int4_mma::plan_heads(
                self.device,
                &shape,
                &heads,
                &operands,
                &of_heads,
                tiling,
            );
            return Ok((call.map_err(unsupported)?, format!("{name}: {chosen}")));
        }
        let entry = gemv_int4_mma::entry(shape.group, mins, shape.half_x);
        let chosen = self.tuned.choose(entry, &name, rule);
        let call = gemv_int4_mma::plan(self.device, &shape, &operands, Some(chosen.launch))
            .map_err(unsupported)?;
        Ok((call, format!("{name}: {chosen}")))
    }

    /// The call of [`Step::Attention`], and its launch.
    pub(super) fn attention(
        &mut self,
        layer: usize,
        [query, dst]: [Buffer; 2],
        scale: f32,
        window: Option<usize>,
    ) -> Result<(Call, String), Error> {
        let Cache {
            keys: k_cache,
            values: v_cache,
            scales: v_scales,
        } = self.cache(layer)?;
        let shape = attention_shape(self.model, self.context, scale, window);
        let operands = attention::Operands {
            q: self.buffer(query),
            k_cache,
            v_cache,
            v_scales,
            state: self.state,
            out: self.buffer(dst),
            partials: self.partials,
        };
        let of_8_bits = self.form == KvForm::K16V8;
        let chosen = attention::choose(self.device, self.tuned, &shape, of_8_bits);
        let call =
            attention::plan(self.device, &shape, &operands, chosen.launch).map_err(unsupported)?;
        let launch = match attention::split::takes(&shape) {
            true => format!("{}: {chosen}", attention::split::name(&shape)),
            false => String::new(),
        };
        Ok((call, launch))
    }

    /// The call of [`Op::RopeKvAppend`].
    pub(super) fn rope_kv_append(
        &self,
        [query, key, value]: [Buffer; 3],
        layer: usize,
        heads: usize,
    ) -> Result<Call, Error> {
        let config = &self.model.recipe.config;
        let Cache {
            keys,
            values,
            scales,
        } = self.cache(layer)?;
        let shape = rope_kv_append::Shape {
            heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            context: self.context,
        };
        let operands = rope_kv_append::Operands {
            q: self.buffer(query),
            k: self.buffer(key),
            v: self.buffer(value),
            cos: self.cos,
            sin: self.sin,
            k_cache: keys,
            v_cache: values,
            v_scales: scales,
            state: self.state,
        };
        rope_kv_append::plan(self.device, &shape, &operands).map_err(unsupported)
    }

    /// What a call computes, for people: the same for all layers.
    pub(super) fn name(&self, op: &Op<'_>) -> String {
        // `blk.7.attn_q.weight` -> `attn_q`.
        let short = |id: WeightId| {
            let name = self.model.recipe.weights.get(id).map_or("?", |w| &w.name);
            let name = name.strip_suffix(".weight").unwrap_or(name);
            name.rsplit('.').next().unwrap_or(name).to_owned()
        };
        match op {
            Op::RopeKvAppend { .. } => "rope q k, append".to_owned(),
            Op::Levels(_) => "round".to_owned(),
            Op::Product(product) => {
                let mut parts: Vec<String> = product.norm.iter().map(|_| "norm".into()).collect();
                parts.extend(product.matrices.iter().map(|id| short(*id)));
                match product.then {
                    Then::Store => {}
                    Then::Add => parts.push("add".to_owned()),
                    Then::SwiGlu => parts.push("swiglu".to_owned()),
                    Then::RopeKvAppend { .. } => parts.push("rope append".to_owned()),
                }
                parts.join(" ")
            }
            Op::Step(Step::Embed { .. }) => "embed".to_owned(),
            Op::Step(Step::RmsNorm { weight, .. }) => format!("norm {}", short(*weight)),
            Op::Step(Step::Linear { weight, .. }) => short(*weight),
            Op::Step(Step::HeadNorm { weight, .. }) => format!("norm {}", short(*weight)),
            Op::Step(Step::RoundToInt8 { .. }) => "round".to_owned(),
            Op::Step(Step::Rope { .. }) => "rope".to_owned(),
            Op::Step(Step::KvAppend { .. }) => "append".to_owned(),
            Op::Step(Step::Attention { .. }) => "attention".to_owned(),
            Op::Step(Step::SwiGlu { .. }) => "swiglu".to_owned(),
            Op::Step(Step::ReluSquaredGlu { .. }) => "relu2".to_owned(),
            Op::Step(Step::Add { .. }) => "add".to_owned(),
            Op::Step(Step::Logits { table, .. }) if self.chooses(*table) => {
                "logits, choice".to_owned()
            }
            Op::Step(Step::Logits { .. }) => "logits".to_owned(),
        }
    }
}
