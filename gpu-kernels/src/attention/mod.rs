//! Grouped-query attention of one token over the cache, of many in [`prompt`]: `out[h] = softmax(scale q[h] K^T) V`, keys
//! and values of the positions `0 ..= position`.
//!
//! Shapes: q and out `(H, Dh)` f32, caches `(KV, S, Dh)` f16, values also int8 with scales `(KV, S)`
//! f16; head h reads kv head `h / (H/KV)`.
//!
//! | kernel | head widths | how |
//! |---|---|---|
//! | [`split`] | multiples of 8, to 128 for values of 8 bits | the context split over blocks, K and V read once for all heads of a kv head |
//! | [`block_a_head`] | even | a block a query head |
//!
//! The position is read from device memory and the grid does not depend on it: a captured launch
//! serves every position. Everything is added up in a fixed order: two runs give identical bits.

pub mod block_a_head;
pub mod prompt;
pub mod split;

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, ShapeError, tensor_bytes};
#[cfg(not(target_arch = "nvptx64"))]
use crate::tuned::{Chosen, Tuned};

/// A word of [`Operands::partials`] that no block has written yet: a NaN that no result is.
pub const UNWRITTEN: u32 = u32::MAX;

/// Widest head.
#[cfg(not(target_arch = "nvptx64"))]
const MAX_HEAD_DIM: usize = 256;

/// Dimensions of the attention.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// H: query heads.
    pub heads: usize,
    /// KV: key/value heads; divides H.
    pub kv_heads: usize,
    /// Dh: head width, even, at most 256.
    pub head_dim: usize,
    /// S: positions that the cache holds.
    pub context: usize,
    /// Multiplies the scores: `1 / sqrt(Dh)`.
    pub scale: f32,
    /// The most positions that a token sees, its own included; none for all.
    pub window: Option<usize>,
}

#[cfg(not(target_arch = "nvptx64"))]
impl Shape {
    /// The window as kernels take it: 2^30 is more than any context there is memory for, and leaves room
    /// above it.
    fn window(&self) -> u32 {
        const MOST: usize = 1 << 30;
        self.window.unwrap_or(MOST).min(MOST) as u32
    }
}

/// Buffers of the attention.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(H, Dh)` f32, already turned.
    pub q: DeviceSlice,
    /// `(KV, S, Dh)` f16, this token's keys included.
    pub k_cache: DeviceSlice,
    /// `(KV, S, Dh)` f16, or i8, this token's values included.
    pub v_cache: DeviceSlice,
    /// `(KV, S)` f16 where the values are i8, none where they are f16.
    pub v_scales: DeviceSlice,
    /// `(1,)` u32: the position, below S.
    pub state: DeviceSlice,
    /// `(H, Dh)` f32.
    pub out: DeviceSlice,
    /// [`scratch_bytes`], words of [`UNWRITTEN`] before the first launch; every launch leaves them
    /// so.
    pub partials: DeviceSlice,
}

/// How [`split`] is launched for this shape: as the table says, with no more splits than there is work for, or else
/// its rule. `of_8_bits`: whether the values are.
#[cfg(not(target_arch = "nvptx64"))]
pub fn choose(
    device: &DeviceInfo,
    tuned: &Tuned,
    shape: &Shape,
    of_8_bits: bool,
) -> Chosen<split::Tuning> {
    let kernel = if of_8_bits {
        split::kernel_v8
    } else {
        split::kernel
    };
    let chosen = tuned.choose(kernel(shape.head_dim), &split::name(shape), || {
        split::Tuning::of(device, shape)
    });
    Chosen {
        launch: chosen.launch.within(shape),
        ..chosen
    }
}

/// Bytes of [`Operands::partials`] that [`plan`] needs for this launch: launches that do not overlap
/// can share them. None where nothing is split.
#[cfg(not(target_arch = "nvptx64"))]
pub fn scratch_bytes(shape: &Shape, tuning: split::Tuning) -> u64 {
    if split::takes(shape) {
        tuning.scratch_bytes(shape)
    } else {
        0
    }
}

/// The launch for this shape: [`split`] wherever it takes it, else [`block_a_head`].
///
/// # Errors
/// Heads that kv heads do not divide, an odd or too wide head, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(
    device: &DeviceInfo,
    shape: &Shape,
    ops: &Operands,
    tuning: split::Tuning,
) -> Result<Call, ShapeError> {
    if split::takes(shape) || ops.v_scales != DeviceSlice::NONE {
        split::plan(device, shape, ops, tuning)
    } else {
        block_a_head::plan(device, shape, ops)
    }
}

/// What both kernels want of a shape.
#[cfg(not(target_arch = "nvptx64"))]
fn require_heads(call: &CallBuilder, shape: &Shape) -> Result<(), ShapeError> {
    let &Shape {
        heads,
        kv_heads,
        head_dim,
        ..
    } = shape;
    let divides = kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads);
    call.require(
        divides,
        "kv_heads",
        kv_heads,
        "it must divide the query heads",
    )?;
    call.require(heads < 1 << 31, "heads", heads, "it must be in 1..2^31")?;
    let narrow = head_dim.is_multiple_of(2) && (1..=MAX_HEAD_DIM).contains(&head_dim);
    call.require(
        narrow,
        "head_dim",
        head_dim,
        "it must be even and at most 256",
    )
}

/// Adds the pointers that both kernels take first: q, caches, state, out.
#[cfg(not(target_arch = "nvptx64"))]
fn tensors(
    call: &mut CallBuilder,
    shape: &Shape,
    ops: &Operands,
    align: u64,
) -> Result<(), ShapeError> {
    let per_token = tensor_bytes(&[shape.heads, shape.head_dim], 4);
    let cache = [shape.kv_heads, shape.context, shape.head_dim];
    let value_bytes = if ops.v_scales == DeviceSlice::NONE {
        2
    } else {
        1
    };
    call.tensor("q", ops.q, per_token, align)?;
    call.tensor("k_cache", ops.k_cache, tensor_bytes(&cache, 2), 16)?;
    call.tensor(
        "v_cache",
        ops.v_cache,
        tensor_bytes(&cache, value_bytes),
        16,
    )?;
    call.tensor("state", ops.state, 4, 4)?;
    call.tensor("out", ops.out, per_token, align)
}
