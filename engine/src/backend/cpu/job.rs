//! One walk through the list of calls: what the threads of a team share, and what each operation does.

use cpu_kernels::attention::{self, AttentionShape};
use cpu_kernels::isa::Isa;
use cpu_kernels::levels::{self, Levels};
use cpu_kernels::linear::{self, Input, Packed, lookup};
use cpu_kernels::team::{SharedSlice, split};
use cpu_kernels::{add, embed, relu2_glu, rmsnorm, rope, round_int8, swiglu};
use models::recipe::{Buffer, Step, WeightId};

use super::cache::SharedCache;
use super::operands::Operand;
use super::program::{Cut, Op, Program};

/// Which tokens of a call get logits.
pub(super) enum Logits<'a> {
    Unwanted,
    /// The last one, into its activation buffer.
    Last,
    /// All of them, into `(tokens, V)`.
    Each(&'a mut [f32]),
}

/// What the threads of a team share while they run the list once.
pub(super) struct Job<'a> {
    pub(super) program: &'a Program,
    pub(super) weights: &'a [Operand],
    pub(super) isa: Isa,
    pub(super) tokens: &'a [u32],
    /// `(n, V)`: where the logits of the last `n` tokens go, if they are wanted.
    pub(super) logits: Option<SharedSlice<'a, f32>>,
    pub(super) position: usize,
    pub(super) context: usize,
    pub(super) shape: AttentionShape,
    pub(super) cos: &'a [f32],
    pub(super) sin: &'a [f32],
    pub(super) activations: SharedSlice<'a, f32>,
    pub(super) cache: SharedCache<'a>,
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
    /// that this one reads, or reads that this one writes, lies in an earlier phase. [`program`](super::program)
    /// knows for every step which share touches which elements.
    pub(super) unsafe fn call(
        &self,
        op: &Op,
        unit: usize,
        part: usize,
        parts: usize,
        scores: &mut [f32],
    ) {
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
                window,
            } => {
                let (dh, heads) = (self.shape.head_dim, self.shape.heads);
                let shape = AttentionShape {
                    scale,
                    window,
                    ..self.shape
                };
                // SAFETY: the cache was complete before this phase.
                let (keys, values) = unsafe { self.cache.layer(layer) };
                let (query, dst) = (self.buffer(query), self.buffer(dst));
                // The heads that read the same keys and values go together.
                let per_kv = heads / self.shape.kv_heads;
                let own = split(tokens * heads, per_kv, part, parts);
                for unit in own.step_by(per_kv) {
                    let own = unit * dh..(unit + per_kv) * dh;
                    // SAFETY: heads of this share.
                    let (q, out) = unsafe { (query.slice(own.clone()), dst.slice_mut(own)) };
                    let (token, head) = (unit / heads, unit % heads / per_kv);
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
                    let levels = Levels::new(words, place.cols, place.precision).last(count);
                    Input::Levels(match self.program.tables(id, tokens) {
                        Some(tables) => levels.with_tables(self.activations.slice(tables)),
                        None => levels,
                    })
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
        let round = |token: usize, cols: std::ops::Range<usize>| {
            // SAFETY: columns of this share, complete since its last operation.
            unsafe {
                let start = token * k;
                let x = src.slice(start + cols.start..start + cols.end);
                levels::part(self.isa, place.precision, x, words, k, token, cols);
            }
        };
        match cut {
            Cut::Tokens => {
                for token in split(tokens, 1, part, parts) {
                    round(token, 0..k);
                    if let Some(tables) = self.program.tables(id, tokens) {
                        // SAFETY: the only token is this share's, and so are its tables.
                        unsafe {
                            let words = words.slice(0..words.len());
                            let levels = Levels::new(words, k, place.precision);
                            lookup::tables(self.isa, levels, self.activations.slice_mut(tables));
                        }
                    }
                }
            }
            Cut::Columns => (0..tokens).for_each(|token| round(token, split(k, unit, part, parts))),
            Cut::Heads => {
                let (dh, heads) = (self.shape.head_dim, k / self.shape.head_dim);
                // As attention cuts what it writes.
                let per_kv = match heads == self.shape.heads {
                    true => heads / self.shape.kv_heads,
                    false => 1,
                };
                for unit in split(tokens * heads, per_kv, part, parts) {
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
