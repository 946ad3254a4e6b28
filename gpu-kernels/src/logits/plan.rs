//! Shapes, operands and launches of the logits kernels.

use super::{Layout, ROWS, WARPS, top};
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::linear;
use crate::sample::BEST_BYTES;
use crate::sample::draw::{CANDIDATES_BYTES, SETTINGS_BYTES};

/// Dimensions of the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// V: rows.
    pub vocab: usize,
    /// D: columns, a multiple of 32.
    pub width: usize,
    /// Weights that share a scale: a power of two from 32 on, or D.
    pub group: usize,
}

/// Buffers of the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(V, D)` i8.
    pub quants: DeviceSlice,
    /// `(V, ceil(D/group))` f16.
    pub scales: DeviceSlice,
    /// `(D,)` f32, below 65504 in magnitude.
    pub x: DeviceSlice,
    /// `(V,)` f32, or none if only the choice is wanted.
    pub logits: DeviceSlice,
    /// [`scratch_bytes`], zero before the first launch; every launch leaves its first word zero.
    pub scratch: DeviceSlice,
}

/// Where the greedy choice goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greedy {
    /// S: tokens that the cache holds.
    pub context: usize,
    /// `(S + 1,)` u32; the kernel writes `tokens[position + 1]`.
    pub tokens: DeviceSlice,
    /// `(1,)` u32: the position, below S.
    pub state: DeviceSlice,
    /// Whether the kernel also makes it the next one.
    pub advance: bool,
}

/// Where the greatest logits go, and the penalty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Top {
    /// `(64, 2)` u32: bits of the logit, and id; greatest first, equal ones by id, NaN never. Where
    /// there are fewer, `-inf` and `u32::MAX`.
    pub candidates: DeviceSlice,
    /// `(ceil(V/32),)` u32: bit `v % 32` of word `v / 32` tells that token v was seen. Or none, and
    /// no penalty.
    pub seen: DeviceSlice,
    /// [`draw::Settings`](crate::sample::draw::Settings) with the penalty; or none with `seen`.
    pub settings: DeviceSlice,
}

/// Bytes of [`Operands::scratch`]: a counter, then each warp's or each block's candidate.
pub fn scratch_bytes(device: &DeviceInfo) -> u64 {
    16 + u64::from(most_blocks(device) * WARPS) * u64::from(BEST_BYTES)
}

/// As many as run at once: at 128 registers a thread a multiprocessor has room for two.
fn most_blocks(device: &DeviceInfo) -> u32 {
    (2 * device.multiprocessors).min(top::MAX_BLOCKS)
}

/// The launch of `logits_int8`, or of `logits_int8_by_row` where a row has one scale. Without
/// `greedy` nothing is chosen.
///
/// # Errors
/// A width that is no multiple of 32 or does not fit shared memory, an unsupported group, a short
/// or misaligned buffer.
pub fn plan(
    device: &DeviceInfo,
    shape: &Shape,
    ops: &Operands,
    greedy: Option<&Greedy>,
) -> Result<Call, ShapeError> {
    let (mut call, shift) = product(shape, ops, kernel(shape))?;
    call.optional("logits", ops.logits, tensor_bytes(&[shape.vocab], 4), 4)?;
    call.tensor("scratch", ops.scratch, scratch_bytes(device), 16)?;
    let none = Greedy {
        context: 0,
        tokens: DeviceSlice::NONE,
        state: DeviceSlice::NONE,
        advance: false,
    };
    let to = greedy.unwrap_or(&none);
    let token_bytes = tensor_bytes(&[to.context.saturating_add(1)], 4);
    if greedy.is_some() {
        call.tensor("tokens", to.tokens, token_bytes, 4)?;
        call.tensor("state", to.state, 4, 4)?;
    } else {
        call.optional("tokens", to.tokens, token_bytes, 4)?;
        call.optional("state", to.state, 4, 4)?;
    }
    let (vocab, width) = dims(&mut call, shape, shift)?;
    call.u32(u32::from(to.advance));
    let blocks = blocks(device, vocab);
    call.build(
        device,
        Launch::linear(blocks, WARPS * 32, Layout::new(width).bytes()),
    )
}

/// The launch of `logits_int8_top`, or of `logits_int8_by_row_top` where a row has one scale. The
/// logits have to have a buffer.
///
/// # Errors
/// As [`plan`].
pub fn plan_top(
    device: &DeviceInfo,
    shape: &Shape,
    ops: &Operands,
    top: &Top,
) -> Result<Call, ShapeError> {
    let (mut call, shift) = product(shape, ops, top_kernel(shape))?;
    call.tensor("logits", ops.logits, tensor_bytes(&[shape.vocab], 4), 16)?;
    call.tensor("scratch", ops.scratch, scratch_bytes(device), 16)?;
    call.tensor("candidates", top.candidates, CANDIDATES_BYTES, 4)?;
    let seen_bytes = tensor_bytes(&[shape.vocab.div_ceil(32)], 4);
    call.optional("seen", top.seen, seen_bytes, 4)?;
    if top.seen == DeviceSlice::NONE {
        call.optional("settings", top.settings, SETTINGS_BYTES, 4)?;
    } else {
        call.tensor("settings", top.settings, SETTINGS_BYTES, 4)?;
    }
    let (vocab, width) = dims(&mut call, shape, shift)?;
    let blocks = blocks(device, vocab);
    let bytes = Layout::new(width).bytes();
    let bytes = bytes.max(top::Layout::new(blocks).bytes());
    call.build(device, Launch::linear(blocks, WARPS * 32, bytes))
}

/// A call of one of the kernels with the operands of the product, and the shift of a group.
fn product(
    shape: &Shape,
    ops: &Operands,
    kernel: &'static str,
) -> Result<(CallBuilder, u32), ShapeError> {
    let &Shape {
        vocab,
        width,
        group,
    } = shape;
    let mut call = CallBuilder::new(kernel);
    call.require(
        width.is_multiple_of(32) && width <= 1 << 20,
        "width",
        width,
        "it must be a multiple of 32 up to 2^20",
    )?;
    let shift = linear::int8_group_shift(&call, group, width)?;
    call.tensor("quants", ops.quants, tensor_bytes(&[vocab, width], 1), 16)?;
    call.tensor(
        "scales",
        ops.scales,
        tensor_bytes(&[vocab, width.div_ceil(group)], 2),
        2,
    )?;
    call.tensor("x", ops.x, tensor_bytes(&[width], 4), 16)?;
    call.waits();
    Ok((call, shift))
}

/// Adds the dimensions; the vocabulary and the width.
fn dims(call: &mut CallBuilder, shape: &Shape, shift: u32) -> Result<(u32, u32), ShapeError> {
    let vocab = call.dim("vocab", shape.vocab)?;
    let width = call.dim("width", shape.width)?;
    call.u32(shift);
    Ok((vocab, width))
}

/// Blocks of a launch.
fn blocks(device: &DeviceInfo, vocab: u32) -> u32 {
    vocab.div_ceil(ROWS * WARPS).min(most_blocks(device))
}

/// The kernel for a shape.
pub fn kernel(shape: &Shape) -> &'static str {
    if shape.group >= shape.width {
        "logits_int8_by_row"
    } else {
        "logits_int8"
    }
}

/// The kernel with the greatest logits for a shape.
pub fn top_kernel(shape: &Shape) -> &'static str {
    if shape.group >= shape.width {
        "logits_int8_by_row_top"
    } else {
        "logits_int8_top"
    }
}
