//! Which steps of a recipe one kernel of a GPU takes together, and so which INT4 matrices share tiles.
//!
//! ```text
//! [norm] linear linear ...          one product of the matrices packed row after row
//! [norm] linear linear swiglu       one product of gate and up interleaved
//! [norm] linear add                 one product that adds to what is there
//! [norm] linear linear linear       one product of q, k and v that turns queries and keys and appends
//!   rope(q) rope(k) kv-append(k, v)   keys and values, where tiles hold whole heads and values are halves
//! rope(q) rope(k) kv-append(k, v)   one launch
//! round  linear ...  [add]          levels, which f16 holds, one product of them, which f32 holds, and its scale
//! ```
//!
//! The steps of a pattern follow each other in the recipe, and what the fused kernel no longer
//! writes is read by nothing after it. Steps in another arrangement run one by one.

use models::quant::Int4Shape;
use models::quant::int4_tiled::{Order, TILE_ROWS};
use models::recipe::{Buffer, Recipe, Step, WeightId};

use super::KvForm;

/// What becomes one kernel call.
#[derive(Debug, Clone, PartialEq)]
pub enum Op<'a> {
    /// A step by itself.
    Step(&'a Step),
    /// Activations that become levels, because nothing but products of INT4 matrices reads them.
    Levels(Buffer),
    /// INT4 matrices behind one input.
    Product(Product),
    /// Queries turned in place, keys turned and appended with the values.
    RopeKvAppend {
        /// Layer of the cache.
        layer: usize,
        /// Queries.
        query: Buffer,
        /// Heads of the queries.
        heads: usize,
        /// Keys.
        key: Buffer,
        /// Values.
        value: Buffer,
    },
}

impl Op<'_> {
    /// Whether it writes the cache.
    pub fn appends(&self) -> bool {
        match self {
            Op::Step(step) => matches!(step, Step::KvAppend { .. }),
            Op::RopeKvAppend { .. } => true,
            Op::Levels(_) => false,
            Op::Product(product) => matches!(product.then, Then::RopeKvAppend { .. }),
        }
    }
}

/// A norm in front of a product.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// Its gain.
    pub weight: WeightId,
    /// What is added to the mean of the squares.
    pub eps: f32,
}

/// What becomes of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// Written.
    Store,
    /// Added to what is there.
    Add,
    /// Gated.
    SwiGlu,
    /// Turned, and keys and values appended to the cache of a layer.
    RopeKvAppend {
        /// The layer.
        layer: usize,
    },
}

/// INT4 matrices behind one input.
#[derive(Debug, Clone, PartialEq)]
pub struct Product {
    /// The norm in front.
    pub norm: Option<Norm>,
    /// Input of the norm, or of the matrices if there is none.
    pub src: Buffer,
    /// Matrices of the same columns, groups and form; gate and up with [`Then::SwiGlu`].
    pub matrices: Vec<WeightId>,
    /// A matrix each.
    pub biases: Vec<Option<WeightId>>,
    /// Where the rows of each matrix go, one after the other in memory; one with [`Then::SwiGlu`], the
    /// queries' with [`Then::RopeKvAppend`].
    pub dsts: Vec<Buffer>,
    /// What becomes of the result.
    pub then: Then,
    /// The input holds levels: the sums lie here, and in what follows, until they are multiplied by its scale.
    pub sums: Option<Buffer>,
}

impl Product {
    /// How its matrices share tiles in a model with heads of `head_dim`.
    pub fn order(&self, head_dim: usize) -> Order {
        match self.then {
            Then::SwiGlu => Order::GateUp,
            Then::RopeKvAppend { .. } => Order::Heads { head_dim },
            Then::Store | Then::Add => Order::Rows,
        }
    }
}

/// The calls to make, and the buffers that have to lie one after the other, in this order.
#[derive(Debug, Default)]
pub struct Fused<'a> {
    /// The calls, in order.
    pub ops: Vec<Op<'a>>,
    /// Buffers that lie one after the other.
    pub neighbours: Vec<Vec<Buffer>>,
    /// Whether the gated activations are halves: products write them and products read them.
    pub half_gated: bool,
}

/// A recipe, the form of its cache, and which of its weights are INT4.
#[derive(Clone, Copy)]
struct Model<'a> {
    recipe: &'a Recipe,
    kv: KvForm,
    int4: &'a dyn Fn(WeightId) -> Option<Int4Shape>,
}

/// Goes through the recipe and takes the longest pattern at each place. `int4` gives the shapes of the
/// weights that are INT4. A value of 8 bits needs the greatest of its head first, whose tiles are spread
/// over blocks: a launch of its own appends it.
pub fn fuse<'a>(
    recipe: &'a Recipe,
    kv: KvForm,
    int4: &dyn Fn(WeightId) -> Option<Int4Shape>,
) -> Fused<'a> {
    let steps = &recipe.steps;
    let model = Model { recipe, kv, int4 };
    let mut fused = Fused::default();
    let mut at = 0;
    while at < steps.len() {
        let (op, taken) = product(model, at, &mut fused.neighbours)
            .or_else(|| rope_kv_append(steps, at))
            .or_else(|| match steps[at] {
                Step::RoundToInt8 { buffer } if leaves_levels(model, at) => {
                    Some((Op::Levels(buffer), 1))
                }
                _ => None,
            })
            .unwrap_or((Op::Step(&steps[at]), 1));
        fused.ops.push(op);
        at += taken;
    }
    fused.half_gated = fused.ops.iter().all(|op| match op {
        Op::Product(product) => {
            (product.then == Then::SwiGlu) == product.dsts.contains(&Buffer::Gated)
                && (product.src != Buffer::Gated || product.norm.is_none())
        }
        Op::Step(step) => {
            let (reads, writes) = buffers(step);
            !reads.contains(&Some(Buffer::Gated)) && writes != Some(Buffer::Gated)
        }
        Op::RopeKvAppend {
            query, key, value, ..
        } => ![query, key, value].contains(&&Buffer::Gated),
        Op::Levels(buffer) => *buffer != Buffer::Gated,
    });
    fused
}

/// A linear step of an INT4 matrix.
#[derive(Clone, Copy)]
struct Linear {
    weight: WeightId,
    matrix: Int4Shape,
    bias: Option<WeightId>,
    src: Buffer,
    dst: Buffer,
}

fn linear(model: Model<'_>, at: usize) -> Option<Linear> {
    let Step::Linear {
        weight,
        bias,
        src,
        dst,
    } = *model.recipe.steps.get(at)?
    else {
        return None;
    };
    let matrix = (model.int4)(weight)?;
    (src != dst).then_some(Linear {
        weight,
        matrix,
        bias,
        src,
        dst,
    })
}

/// The product that starts at step `at`, and the steps that it stands for.
fn product<'a>(
    model: Model<'_>,
    at: usize,
    neighbours: &mut Vec<Vec<Buffer>>,
) -> Option<(Op<'a>, usize)> {
    let steps = &model.recipe.steps;
    let (norm, src, first) = match steps[at] {
        Step::RmsNorm {
            weight,
            eps,
            src,
            dst,
        } => (Some((Norm { weight, eps }, dst)), src, at + 1),
        _ => (None, linear(model, at)?.src, at),
    };
    let run = run(model, first);
    let head = run.first()?;
    if norm.is_some_and(|(_, normed)| normed != head.src) {
        return None;
    }
    // Without a norm of its own, or with one whose result nobody else wants.
    let normed_is_dead = |next: usize| norm.is_none_or(|(_, normed)| is_dead(steps, next, normed));
    let levels = norm.is_none() && are_levels(model, at, src);
    let make = |matrices: &[Linear], dsts: Vec<Buffer>, then| {
        let product = Product {
            norm: norm.map(|(norm, _)| norm),
            src,
            matrices: matrices.iter().map(|l| l.weight).collect(),
            biases: matrices.iter().map(|l| l.bias).collect(),
            dsts,
            then,
            sums: levels.then_some(matrices[0].dst),
        };
        Op::Product(product)
    };

    if let (
        [gate, up],
        Some(&Step::SwiGlu {
            gate: g,
            up: u,
            dst,
        }),
    ) = (&run[..], steps.get(first + 2))
        && (gate.dst, up.dst) == (g, u)
        && gate.matrix.rows == up.matrix.rows
        && (gate.bias, up.bias) == (None, None)
        && dst != src
        && !levels
    {
        let next = first + 3;
        let unread = |buffer| buffer == dst || is_dead(steps, next, buffer);
        if unread(g) && unread(u) && normed_is_dead(next) {
            return Some((make(&run, vec![dst], Then::SwiGlu), next - at));
        }
    }
    if let ([only], Some(&Step::Add { src: added, dst })) = (&run[..], steps.get(first + 1))
        && only.dst == added
        && dst != src
        && dst != added
        && is_dead(steps, first + 2, added)
        && normed_is_dead(first + 2)
    {
        return Some((make(&run, vec![dst], Then::Add), first + 2 - at));
    }
    if let [q, k, v] = &run[..]
        && model.kv == KvForm::K16V16
        && let Some((
            Op::RopeKvAppend {
                layer,
                query,
                heads,
                key,
                value,
            },
            taken,
        )) = rope_kv_append(steps, first + 3)
        && (q.dst, k.dst, v.dst) == (query, key, value)
        && query != src
        && !levels
        && are_heads(model, heads, [q.matrix, k.matrix, v.matrix])
        && is_dead(steps, first + 3 + taken, value)
        && normed_is_dead(first + 3 + taken)
    {
        let op = make(&run, vec![query], Then::RopeKvAppend { layer });
        return Some((op, first + 3 + taken - at));
    }
    // As many as can be packed; else the first by itself, if the norm leaves nothing to the rest.
    let dsts: Vec<Buffer> = run.iter().map(|l| l.dst).collect();
    let side_by_side = run
        .iter()
        .all(|l| l.matrix.rows == model.recipe.elems(l.dst) && l.matrix.rows.is_multiple_of(4))
        && accept(neighbours, &dsts);
    let run = if side_by_side { &run[..] } else { &run[..1] };
    let next = first + run.len();
    let apart = run.iter().all(|l| l.dst != src);
    if !apart || !normed_is_dead(next) {
        return None;
    }
    let dsts = run.iter().map(|l| l.dst).collect();
    Some((make(run, dsts, Then::Store), next - at))
}

/// Whether all that reads what the rounding at step `at` leaves are products without a bias, which can take
/// levels.
fn leaves_levels(model: Model<'_>, at: usize) -> bool {
    let Step::RoundToInt8 { buffer } = model.recipe.steps[at] else {
        return false;
    };
    let mut read = false;
    for (i, step) in model.recipe.steps.iter().enumerate().skip(at + 1) {
        let (reads, writes) = buffers(step);
        if reads.contains(&Some(buffer)) {
            if linear(model, i).is_none_or(|linear| linear.bias.is_some()) {
                return false;
            }
            read = true;
        }
        if writes == Some(buffer) {
            break;
        }
    }
    read
}

/// Whether `buffer` holds levels at step `at`.
fn are_levels(model: Model<'_>, at: usize, buffer: Buffer) -> bool {
    for i in (0..at).rev() {
        let step = &model.recipe.steps[i];
        if *step == (Step::RoundToInt8 { buffer }) {
            return leaves_levels(model, i);
        }
        if buffers(step).1 == Some(buffer) {
            return false;
        }
    }
    false
}

/// Whether the rows are those of the model's heads, and tiles hold halves of heads side by side.
fn are_heads(model: Model<'_>, heads: usize, [q, k, v]: [Int4Shape; 3]) -> bool {
    let config = &model.recipe.config;
    let kv_rows = config.kv_heads * config.head_dim;
    config.head_dim.is_multiple_of(TILE_ROWS)
        && heads == config.heads
        && q.rows == heads * config.head_dim
        && (k.rows, v.rows) == (kv_rows, kv_rows)
}

/// The INT4 matrices from step `at` on that read one buffer and can be packed.
fn run(model: Model<'_>, at: usize) -> Vec<Linear> {
    let mut run: Vec<Linear> = Vec::new();
    while let Some(next) = linear(model, at + run.len()) {
        let fits = run
            .first()
            .is_none_or(|first: &Linear| first.src == next.src && first.matrix.fits(next.matrix));
        let new = run.iter().all(|l| l.dst != next.dst && l.src != next.dst);
        if !fits || !new {
            break;
        }
        run.push(next);
    }
    run
}

/// Whether the buffers can lie one after the other, given those that already do.
fn accept(neighbours: &mut Vec<Vec<Buffer>>, dsts: &[Buffer]) -> bool {
    if dsts.len() < 2 || neighbours.iter().any(|group| group == dsts) {
        return true;
    }
    if neighbours
        .iter()
        .flatten()
        .any(|buffer| dsts.contains(buffer))
    {
        return false;
    }
    neighbours.push(dsts.to_vec());
    true
}

fn rope_kv_append(steps: &[Step], at: usize) -> Option<(Op<'_>, usize)> {
    match *steps.get(at..at + 3)? {
        [
            Step::Rope {
                buffer: query,
                heads,
            },
            Step::Rope { buffer: turned, .. },
            Step::KvAppend { layer, key, value },
        ] if turned == key
            && query != key
            && query != value
            && key != value
            && is_dead(steps, at + 3, key) =>
        {
            let op = Op::RopeKvAppend {
                layer,
                query,
                heads,
                key,
                value,
            };
            Some((op, 3))
        }
        _ => None,
    }
}

/// Whether nothing from step `from` on reads what is in `buffer` now.
fn is_dead(steps: &[Step], from: usize, buffer: Buffer) -> bool {
    for step in &steps[from.min(steps.len())..] {
        let (reads, writes) = buffers(step);
        if reads.contains(&Some(buffer)) {
            return false;
        }
        if writes == Some(buffer) {
            return true;
        }
    }
    // The host reads the logits.
    buffer != Buffer::Logits
}

/// What a step reads and what it overwrites.
fn buffers(step: &Step) -> ([Option<Buffer>; 2], Option<Buffer>) {
    match *step {
        Step::Embed { dst, .. } => ([None; 2], Some(dst)),
        Step::RmsNorm { src, dst, .. }
        | Step::Linear { src, dst, .. }
        | Step::Logits { src, dst, .. } => ([Some(src), None], Some(dst)),
        Step::Rope { buffer, .. }
        | Step::HeadNorm { buffer, .. }
        | Step::RoundToInt8 { buffer } => ([Some(buffer), None], None),
        Step::KvAppend { key, value, .. } => ([Some(key), Some(value)], None),
        Step::Attention { query, dst, .. } => ([Some(query), None], Some(dst)),
        Step::SwiGlu { gate, up, dst } | Step::ReluSquaredGlu { gate, up, dst } => {
            ([Some(gate), Some(up)], Some(dst))
        }
        Step::Add { src, dst } => ([Some(src), Some(dst)], None),
    }
}
