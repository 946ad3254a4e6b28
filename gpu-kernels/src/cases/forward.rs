//! A short decode of a two-layer model, every kernel in its place: what single cases cannot show
//! is that they agree on layouts, on the position and on who writes which token.

use cpu_kernels::attention::AttentionShape;
use half::f16;
use models::quant::{Int4Matrix, Int8Matrix};

use super::{Buffers, Case, CaseError, Device, Inputs, within};
use crate::launch::{Call, DeviceSlice};
use crate::linear::gemv_int4;
use crate::variant::Choice;
use crate::{add, attention, embed, kv_append, logits, rmsnorm, rope, swiglu};

const VOCAB: usize = 101;
const WIDTH: usize = 96;
const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 16;
const FFN: usize = 224;
const LAYERS: usize = 2;
const CONTEXT: usize = 9;
const GROUP: usize = 64;
const EPS: f32 = 1e-5;
const SCALE: f32 = 0.25;
const FIRST_TOKEN: u32 = 17;
/// Rounding grows through two layers, softmax and cache rounding included.
const BOUND: f64 = 2e-5;

struct Layer {
    norm: Vec<f32>,
    q: Int4Matrix,
    k: Int4Matrix,
    v: Int4Matrix,
    q_bias: Vec<f32>,
    o: Int4Matrix,
    ffn_norm: Vec<f32>,
    gate: Int4Matrix,
    up: Int4Matrix,
    down: Int4Matrix,
}

struct Model {
    table: Int8Matrix,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Model {
    fn new() -> Model {
        let mut inputs = Inputs::new(12);
        let gain = |inputs: &mut Inputs| -> Vec<f32> {
            inputs.floats(WIDTH, 0.2).iter().map(|v| 1.0 + v).collect()
        };
        let (q_rows, kv_rows) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        let layers = (0..LAYERS)
            .map(|_| Layer {
                norm: gain(&mut inputs),
                q: inputs.int4(q_rows, WIDTH, GROUP, true),
                k: inputs.int4(kv_rows, WIDTH, GROUP, true),
                v: inputs.int4(kv_rows, WIDTH, GROUP, false),
                q_bias: inputs.floats(q_rows, 0.3),
                o: inputs.int4(WIDTH, q_rows, GROUP, true),
                ffn_norm: gain(&mut inputs),
                gate: inputs.int4(FFN, WIDTH, GROUP, true),
                up: inputs.int4(FFN, WIDTH, GROUP, false),
                down: inputs.int4(WIDTH, FFN, GROUP, true),
            })
            .collect();
        let angles = (0..CONTEXT * HEAD_DIM / 2)
            .map(|i| (i / (HEAD_DIM / 2)) as f32 * 0.5f32.powi((i % (HEAD_DIM / 2)) as i32));
        let (sin, cos) = angles.map(f32::sin_cos).unzip();
        Model {
            table: inputs.int8(VOCAB, WIDTH, 32),
            layers,
            norm: gain(&mut inputs),
            cos,
            sin,
        }
    }

    /// Logits of every position and the greedy token after each, by the references.
    fn reference(&self) -> (Vec<f32>, Vec<u32>) {
        let cache = vec![f16::ZERO; KV_HEADS * CONTEXT * HEAD_DIM];
        let mut caches = vec![(cache.clone(), cache); LAYERS];
        let mut tokens = vec![FIRST_TOKEN];
        let mut all_logits = Vec::new();
        for position in 0..CONTEXT {
            let mut x = vec![0.0; WIDTH];
            cpu_kernels::embed::reference(&self.table, &tokens[position..], &mut x);
            for (layer, (k_cache, v_cache)) in self.layers.iter().zip(&mut caches) {
                reference_layer(self, layer, &mut x, k_cache, v_cache, position);
            }
            let mut normed = vec![0.0; WIDTH];
            cpu_kernels::rmsnorm::reference(&x, &self.norm, EPS, &mut normed);
            let mut logits = vec![0.0; VOCAB];
            cpu_kernels::logits::reference(&self.table, None, &normed, &mut logits);
            tokens.push(cpu_kernels::sample::reference(&logits));
            all_logits.extend(logits);
        }
        (all_logits, tokens)
    }
}

fn reference_linear(w: &Int4Matrix, bias: Option<&[f32]>, x: &[f32]) -> Vec<f32> {
    let mut y = vec![0.0; w.rows];
    cpu_kernels::linear::int4::reference(w, bias, x, &mut y);
    y
}

fn reference_layer(
    model: &Model,
    layer: &Layer,
    x: &mut [f32],
    k_cache: &mut [f16],
    v_cache: &mut [f16],
    position: usize,
) {
    let mut normed = vec![0.0; WIDTH];
    cpu_kernels::rmsnorm::reference(x, &layer.norm, EPS, &mut normed);
    let mut q = reference_linear(&layer.q, Some(&layer.q_bias), &normed);
    let mut k = reference_linear(&layer.k, None, &normed);
    let v = reference_linear(&layer.v, None, &normed);
    let turn = cpu_kernels::rope::reference;
    turn(&mut q, HEADS, HEAD_DIM, &model.cos, &model.sin, position);
    turn(&mut k, KV_HEADS, HEAD_DIM, &model.cos, &model.sin, position);
    let append = cpu_kernels::kv_append::reference;
    append(&k, k_cache, KV_HEADS, CONTEXT, HEAD_DIM, position);
    append(&v, v_cache, KV_HEADS, CONTEXT, HEAD_DIM, position);
    let shape = AttentionShape {
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        capacity: CONTEXT,
        position,
        scale: SCALE,
        window: None,
    };
    let mut attended = vec![0.0; HEADS * HEAD_DIM];
    cpu_kernels::attention::reference(&q, k_cache, v_cache, &mut attended, &shape);
    cpu_kernels::add::reference(&reference_linear(&layer.o, None, &attended), x);
    cpu_kernels::rmsnorm::reference(x, &layer.ffn_norm, EPS, &mut normed);
    let gate = reference_linear(&layer.gate, None, &normed);
    let up = reference_linear(&layer.up, None, &normed);
    let mut gated = vec![0.0; FFN];
    cpu_kernels::swiglu::reference(&gate, &up, &mut gated);
    cpu_kernels::add::reference(&reference_linear(&layer.down, None, &gated), x);
}

/// The launches of one step, made once: nothing in them depends on the position.
struct Program {
    calls: Vec<Call>,
    logits: DeviceSlice,
    tokens: DeviceSlice,
}

struct Builder<'a> {
    device: &'a mut dyn Device,
    calls: Vec<Call>,
    state: DeviceSlice,
}

impl Builder<'_> {
    fn floats(&mut self, elems: usize) -> Result<DeviceSlice, CaseError> {
        Ok(self.device.uninit(elems as u64 * 4)?)
    }

    fn norm(&mut self, x: DeviceSlice, weight: &[f32]) -> Result<DeviceSlice, CaseError> {
        let out = self.floats(WIDTH)?;
        let ops = rmsnorm::Operands {
            x,
            weight: self.device.put_f32(weight)?,
            out,
        };
        let shape = rmsnorm::Shape {
            tokens: 1,
            width: WIDTH,
            eps: EPS,
        };
        self.calls
            .push(rmsnorm::plan(&self.device.info(), &shape, &ops)?);
        Ok(out)
    }

    fn linear(
        &mut self,
        w: &Int4Matrix,
        bias: Option<&[f32]>,
        x: DeviceSlice,
    ) -> Result<DeviceSlice, CaseError> {
        let y = self.floats(w.rows)?;
        let mut optional = DeviceSlice::NONE;
        if let Some(mins) = &w.mins {
            optional = self.device.put_f16(mins)?;
        }
        let bias = match bias {
            Some(bias) => self.device.put_f32(bias)?,
            None => DeviceSlice::NONE,
        };
        let ops = gemv_int4::Operands {
            quants: self.device.upload(&w.quants)?,
            scales: self.device.put_f16(&w.scales)?,
            mins: optional,
            bias,
            x,
            y,
        };
        let shape = gemv_int4::Shape {
            rows: w.rows,
            cols: w.cols,
            group: w.group,
        };
        self.calls.push(gemv_int4::plan(
            &self.device.info(),
            &shape,
            &ops,
            Choice::Auto,
        )?);
        Ok(y)
    }

    fn turn(
        &mut self,
        x: DeviceSlice,
        heads: usize,
        cos: DeviceSlice,
        sin: DeviceSlice,
    ) -> Result<(), CaseError> {
        let ops = rope::Operands {
            x,
            cos,
            sin,
            state: self.state,
        };
        let shape = rope::Shape {
            heads,
            head_dim: HEAD_DIM,
            context: CONTEXT,
        };
        self.calls
            .push(rope::plan(&self.device.info(), &shape, &ops)?);
        Ok(())
    }

    fn add(&mut self, x: DeviceSlice, y: DeviceSlice) -> Result<(), CaseError> {
        let shape = add::Shape { elems: WIDTH };
        self.calls.push(add::plan(
            &self.device.info(),
            &shape,
            &add::Operands { x, y },
        )?);
        Ok(())
    }

    fn layer(
        &mut self,
        layer: &Layer,
        x: DeviceSlice,
        cos: DeviceSlice,
        sin: DeviceSlice,
    ) -> Result<(), CaseError> {
        let info = self.device.info();
        let normed = self.norm(x, &layer.norm)?;
        let q = self.linear(&layer.q, Some(&layer.q_bias), normed)?;
        let k = self.linear(&layer.k, None, normed)?;
        let v = self.linear(&layer.v, None, normed)?;
        self.turn(q, HEADS, cos, sin)?;
        self.turn(k, KV_HEADS, cos, sin)?;
        let cache_bytes = (KV_HEADS * CONTEXT * HEAD_DIM * 2) as u64;
        let k_cache = self.device.uninit(cache_bytes)?;
        let v_cache = self.device.uninit(cache_bytes)?;
        let shape = kv_append::Shape {
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            context: CONTEXT,
        };
        let ops = kv_append::Operands {
            k,
            v,
            k_cache,
            v_cache,
            v_scales: DeviceSlice::NONE,
            state: self.state,
        };
        self.calls.push(kv_append::plan(&info, &shape, &ops)?);
        let shape = attention::Shape {
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: HEAD_DIM,
            context: CONTEXT,
            scale: SCALE,
            window: None,
        };
        let out = self.floats(HEADS * HEAD_DIM)?;
        let tuning = attention::split::Tuning::of(&info, &shape);
        let words = attention::scratch_bytes(&shape, tuning) as usize / 4;
        let ops = attention::Operands {
            q,
            k_cache,
            v_cache,
            v_scales: DeviceSlice::NONE,
            state: self.state,
            out,
            partials: self.device.put_u32(&vec![attention::UNWRITTEN; words])?,
        };
        self.calls
            .push(attention::plan(&info, &shape, &ops, tuning)?);
        let projected = self.linear(&layer.o, None, out)?;
        self.add(projected, x)?;
        let normed = self.norm(x, &layer.ffn_norm)?;
        let gate = self.linear(&layer.gate, None, normed)?;
        let up = self.linear(&layer.up, None, normed)?;
        let gated = self.floats(FFN)?;
        let ops = swiglu::Operands {
            gate,
            up,
            out: gated,
        };
        self.calls
            .push(swiglu::plan(&info, &swiglu::Shape { elems: FFN }, &ops)?);
        let projected = self.linear(&layer.down, None, gated)?;
        self.add(projected, x)
    }
}

impl Program {
    fn new(device: &mut dyn Device, model: &Model) -> Result<Program, CaseError> {
        let info = device.info();
        let mut first = [0; CONTEXT + 1];
        first[0] = FIRST_TOKEN;
        let tokens = device.put_u32(&first)?;
        let state = device.put_u32(&[0])?;
        let quants = device.put_i8(&model.table.quants)?;
        let scales = device.put_f16(&model.table.scales)?;
        let (cos, sin) = (device.put_f32(&model.cos)?, device.put_f32(&model.sin)?);
        let group = model.table.group;

        let mut builder = Builder {
            device,
            calls: Vec::new(),
            state,
        };
        let x = builder.floats(WIDTH)?;
        let ops = embed::Operands {
            quants,
            scales,
            tokens,
            state,
            out: x,
        };
        let shape = embed::Shape {
            vocab: VOCAB,
            width: WIDTH,
            group,
            context: CONTEXT,
            tokens: 1,
        };
        builder.calls.push(embed::plan(&info, &shape, &ops)?);
        for layer in &model.layers {
            builder.layer(layer, x, cos, sin)?;
        }
        let normed = builder.norm(x, &model.norm)?;
        let logits = builder.floats(VOCAB)?;
        let scratch = vec![0; logits::scratch_bytes(&info) as usize];
        let ops = logits::Operands {
            quants,
            scales,
            x: normed,
            logits,
            scratch: builder.device.upload(&scratch)?,
        };
        let shape = logits::Shape {
            vocab: VOCAB,
            width: WIDTH,
            group,
        };
        let greedy = logits::Greedy {
            context: CONTEXT,
            tokens,
            state,
            advance: true,
        };
        let call = logits::plan(&info, &shape, &ops, Some(&greedy))?;
        builder.calls.push(call);
        Ok(Program {
            calls: builder.calls,
            logits,
            tokens,
        })
    }
}

/// A case of no single kernel: it is listed under the last of the step.
pub fn cases() -> Vec<Case> {
    vec![Case::new(
        "logits_int8",
        "after a whole forward pass".into(),
        decode,
    )]
}

fn decode(device: &mut dyn Device) -> Result<f64, CaseError> {
    let model = Model::new();
    let program = Program::new(device, &model)?;
    let (want, want_tokens) = model.reference();
    let mut got = Vec::new();
    for _ in 0..CONTEXT {
        for call in &program.calls {
            device.run(call)?;
        }
        got.extend(device.take_f32(program.logits)?);
    }
    let tokens = device.take_u32(program.tokens)?;
    for (got, want) in tokens.into_iter().zip(want_tokens) {
        super::sample::equal("token", got, want)?;
    }
    within(&got, &want, BOUND)
}
