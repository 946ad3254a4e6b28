//! Causal grouped-query attention of many tokens on the matrix units, on top of what the cache holds:
//! `out[t, h] = softmax(scale q[t, h] K^T) V`, keys and values of the positions `0 ..= position + t`, or of
//! a window the last ones of these.
//!
//! Shapes: q and out `(T, H, Dh)` f16, caches `(KV, S, Dh)` f16, the T tokens' keys and values
//! included; head h reads kv head `h / (H/KV)`. The widths that entries are named after are those of
//! the head rounded up.
//!
//! ```text
//! block (h, i)   query head h, 64 queries; the last ones, with the most keys, in the first blocks
//! warp w         queries 16w .. 16w + 16, all keys: its own softmax, kept in registers
//! a step         64 keys and values (32 before capability 8.0), copied to shared memory while the step before is worked on
//! lane 4g + q    scores: queries g and g + 8, keys 2q and 2q + 1 of each eight
//! ```
//!
//! Scores are `Q K^T` with the queries as operand A. Dh is what these products sum over, so its order
//! within 32 is free: a lane takes 8q .. 8q + 8, which lie side by side, of both. What the weights
//! multiply, V, is summed over the keys: there pairs of rows are turned by `ldmatrix`. The scores'
//! registers are those that operand A of the second product wants.
//!
//! Scores, sums and results are f32: the scores of some models overflow f16. Weights are
//! `2^(score - maximum)`, at most 1, as halves.
//!
//! Bytes moved: K and V up to the last query, once a block, from L2; q and out once. Rows in shared
//! memory are 128 or 256 bytes in chunks of 16. Keys are read four chunks of two rows at a time, so
//! chunks of odd rows are exchanged by fours; values one chunk of eight rows, so row r has chunk c at
//! `c ^ (r % 8)`. No conflicts.

use cuda_std::shared::Shared;
use cuda_std::{kernel, shared, thread, warp};

#[cfg(not(target_arch = "nvptx64"))]
use super::Shape;
#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::product::{at_least_sm_80, mma_k16};
use crate::ptx;
use crate::unroll::unroll;

/// Queries a warp.
const WARP_QUERIES: u32 = 16;
/// Warps a block.
const WARPS: u32 = 4;
/// Queries a block.
const QUERIES: u32 = WARP_QUERIES * WARPS;
const THREADS: u32 = WARPS * 32;
/// Eights of keys a step, and where products take more registers.
const WIDE: usize = 8;
const NARROW: usize = 4;
/// Halves of a 16-byte chunk.
const CHUNK_ELEMS: u32 = 8;
const CHUNK_BYTES: u32 = 16;
/// Steps in shared memory: one is worked on, one on its way.
const STAGES: u32 = 2;
/// Below every score, and far enough from the end of the range to be multiplied.
const LEAST: f32 = -1e30;

/// Buffers of the attention.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(T, H, Dh)` f16, already turned.
    pub q: DeviceSlice,
    /// `(KV, S, Dh)` f16, the tokens' keys included.
    pub k_cache: DeviceSlice,
    /// `(KV, S, Dh)` f16, the tokens' values included.
    pub v_cache: DeviceSlice,
    /// `(1,)` u32: position of the first token; with T at most S.
    pub state: DeviceSlice,
    /// `(T, H, Dh)` f16.
    pub out: DeviceSlice,
}

/// Whether there is a kernel for heads of this width.
#[cfg(not(target_arch = "nvptx64"))]
pub fn takes(head_dim: usize) -> bool {
    head_dim.is_multiple_of(CHUNK_ELEMS as usize) && (1..=128).contains(&head_dim)
}

/// The entry for heads of this width.
#[cfg(not(target_arch = "nvptx64"))]
pub fn entry(head_dim: usize) -> &'static str {
    match head_dim {
        ..=64 => "attention_prompt_f16_d64",
        65..=96 => "attention_prompt_f16_d96",
        _ => "attention_prompt_f16_d128",
    }
}

/// The launch of `attention_prompt_f16_*` for `tokens` tokens.
///
/// # Errors
/// Heads that kv heads do not divide, a head width that is no multiple of 8 or above 128, more tokens
/// than the cache holds, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(
    device: &DeviceInfo,
    shape: &Shape,
    tokens: usize,
    ops: &Operands,
) -> Result<Call, ShapeError> {
    let &Shape {
        heads,
        kv_heads,
        head_dim,
        context,
        scale,
        window,
    } = shape;
    let mut call = CallBuilder::new(entry(head_dim));
    call.waits();
    super::require_heads(&call, shape)?;
    call.require(window != Some(0), "window", 0, "it must be above 0")?;
    call.require(
        takes(head_dim),
        "head_dim",
        head_dim,
        "it must be a multiple of 8 and at most 128",
    )?;
    call.require(
        (1..=context).contains(&tokens),
        "tokens",
        tokens,
        "it must be in 1..=context",
    )?;
    let rows = tensor_bytes(&[tokens, heads, head_dim], 2);
    let cache = tensor_bytes(&[kv_heads, context, head_dim], 2);
    call.tensor("q", ops.q, rows, 16)?;
    call.tensor("k_cache", ops.k_cache, cache, 16)?;
    call.tensor("v_cache", ops.v_cache, cache, 16)?;
    call.tensor("state", ops.state, 4, 4)?;
    call.tensor("out", ops.out, rows, 16)?;
    call.u32((heads / kv_heads) as u32);
    let head_dim = call.dim("head_dim", head_dim)?;
    call.dim("context", context)?;
    let tokens = call.dim("tokens", tokens)?;
    call.u32(shape.window());
    call.f32(scale * core::f32::consts::LOG2_E);
    let width = match head_dim {
        ..=64 => 64,
        _ => 128,
    };
    let eights = if device.compute_capability >= 80 {
        WIDE
    } else {
        NARROW
    };
    let keys = eights as u32 * 8;
    let launch = Launch {
        grid: [heads as u32, tokens.div_ceil(QUERIES), 1],
        block: [THREADS, 1, 1],
        shared_bytes: STAGES * 2 * keys * width * 2,
    };
    call.build(device, launch)
}

/// Parameters of a launch.
#[derive(Clone, Copy)]
struct Args {
    q: *const u32,
    k_cache: *const u32,
    v_cache: *const u32,
    out: *mut u32,
    /// Position of the first token.
    position: u32,
    /// Query heads a kv head.
    group: u32,
    head_dim: u32,
    context: u32,
    tokens: u32,
    /// Positions that a token sees at most.
    window: u32,
    /// Multiplies the scores, for powers of 2.
    scale: f32,
}

/// Bytes of a row of keys or values in shared memory.
const fn row_bytes(width: u32) -> u32 {
    if width <= 64 { 128 } else { 256 }
}

/// Offset of a chunk of a key.
#[inline(always)]
fn key_chunk(width: u32, key: u32, chunk: u32) -> u32 {
    key * row_bytes(width) + (chunk ^ ((key & 1) << 2)) * CHUNK_BYTES
}

/// Offset of a chunk of a value, from the end of the keys on.
#[inline(always)]
fn value_chunk(width: u32, key: u32, chunk: u32) -> u32 {
    key * row_bytes(width) + (chunk ^ (key & 7)) * CHUNK_BYTES
}

/// Starts the copies of `keys` keys and values from `first` on; zeros from `end` on, and in columns
/// that fill up the head.
///
/// # Safety
/// All threads of the block call it; nobody reads what was at `at`. `end` is at most the context.
#[inline(always)]
unsafe fn bring(args: &Args, [width, keys]: [u32; 2], base: Shared, at: u32, first: u32, end: u32) {
    let chunks = row_bytes(width) / CHUNK_BYTES;
    let (chunk, mut key) = (
        thread::thread_idx_x() % chunks,
        thread::thread_idx_x() / chunks,
    );
    let kv_head = thread::block_idx_x() / args.group;
    let row = kv_head as usize * args.context as usize + (first + key) as usize;
    let mut from = (row * args.head_dim as usize + (chunk * CHUNK_ELEMS) as usize) / 2;
    let step = (THREADS / chunks * args.head_dim / 2) as usize;
    let values = at + keys * row_bytes(width);
    while key < keys && chunk * CHUNK_ELEMS < width {
        let there = first + key < end && chunk * CHUNK_ELEMS < args.head_dim;
        // SAFETY: what is not there is not read.
        unsafe {
            let k = args.k_cache.wrapping_add(from);
            ptx::cp_async_16_or_zero(there, base, at + key_chunk(width, key, chunk), k);
            let v = args.v_cache.wrapping_add(from);
            ptx::cp_async_16_or_zero(there, base, values + value_chunk(width, key, chunk), v);
        }
        key += THREADS / chunks;
        from += step;
    }
}

/// The larger of two, of a pair of lanes that hold the same query.
#[inline(always)]
fn quad_max(value: f32) -> f32 {
    let value = value.max(warp::shuffle_xor_f32(warp::FULL_MASK, value, 1));
    value.max(warp::shuffle_xor_f32(warp::FULL_MASK, value, 2))
}

#[inline(always)]
fn quad_sum(value: f32) -> f32 {
    let value = value + warp::shuffle_xor_f32(warp::FULL_MASK, value, 1);
    value + warp::shuffle_xor_f32(warp::FULL_MASK, value, 2)
}

/// The body of every entry: heads of up to `32 D32` columns, `DT` eights of them, `KT` eights of keys
/// a step.
///
/// # Safety
/// Launched as [`plan`] says.
#[inline(always)]
unsafe fn attention<const D32: usize, const DT: usize, const KT: usize>(args: &Args) {
    let (width, keys) = (D32 as u32 * 32, KT as u32 * 8);
    let thread = thread::thread_idx_x();
    let (lane, number) = (thread % 32, thread / 32);
    let (g, q) = (lane / 4, lane % 4);
    let base = shared::dynamic_shared_mem();
    let head = thread::block_idx_x();
    let heads = thread::grid_dim_x();
    let tile = thread::grid_dim_y() - 1 - thread::block_idx_y();
    let query = tile * QUERIES + number * WARP_QUERIES + g;
    let end = args.position + args.tokens.min((tile + 1) * QUERIES);
    let steps = end.div_ceil(keys);
    // What the block's first query sees comes last of what is seen first.
    let first_step = (args.position + tile * QUERIES + 1).saturating_sub(args.window) / keys;
    let stage = 2 * keys * row_bytes(width);

    // SAFETY: the plan checked q, out and the caches for the tokens; a barrier stands between the
    // arrival of a step and its use, and between its use and the next copies to its place.
    unsafe {
        let at = first_step % STAGES * stage;
        bring(args, [width, keys], base, at, first_step * keys, end);
        ptx::cp_async_commit();

        // Operand A of the scores: of rows g and g + 8 columns 32 j + 8q .. + 8.
        let mut queries = [[[0u32; 4]; 2]; D32];
        unroll!(J < (D32) => {
            let column = J as u32 * 32 + q * CHUNK_ELEMS;
            unroll!(R < 2 => {
                let query = query + R as u32 * 8;
                let there = query < args.tokens && column < args.head_dim;
                let row = query as usize * heads as usize + head as usize;
                let from = (row * args.head_dim as usize + column as usize) / 2;
                let words = ptx::ld_global_v4_u32_if(there, args.q.wrapping_add(from), [0; 4]);
                queries[J % D32][R % 2] = words;
            });
        });

        let mut sums = [[0.0f32; 4]; DT];
        // Finite, as a step may have no key that a query sees.
        let mut maxima = [LEAST; 2];
        let mut weights = [0.0f32; 2];
        let mut step = first_step;
        while step < steps {
            ptx::cp_async_wait::<0>();
            thread::sync_threads();
            let at = step % STAGES * stage;
            if step + 1 < steps {
                bring(
                    args,
                    [width, keys],
                    base,
                    stage - at,
                    (step + 1) * keys,
                    end,
                );
            }
            ptx::cp_async_commit();

            let mut scores = [[0.0f32; 4]; KT];
            unroll!(N < (KT) => {
                unroll!(J < (D32) => {
                    let key = N as u32 * 8 + g;
                    let chunk = key_chunk(width, key, J as u32 * 4 + q);
                    let b = ptx::ld_shared_v4_u32(base, at + chunk);
                    let [upper, lower] = queries[J % D32];
                    let a = [upper[0], lower[0], upper[1], lower[1]];
                    scores[N % KT] = mma_k16(a, [b[0], b[1]], scores[N % KT]);
                    let a = [upper[2], lower[2], upper[3], lower[3]];
                    scores[N % KT] = mma_k16(a, [b[2], b[3]], scores[N % KT]);
                });
            });
            // Keys that come after a query, or so far before it that it no longer sees them: only where
            // some query of the warp misses a key of the step.
            let first = args.position + query - g;
            let ends = (step + 1) * keys > first + 1;
            if ends || step * keys + args.window < first + WARP_QUERIES {
                unroll!(N < (KT) => {
                    unroll!(I < 4 => {
                        let key = step * keys + N as u32 * 8 + 2 * q + I as u32 % 2;
                        // Below 0 for a later key, which is far above any window.
                        let before = (args.position + query + I as u32 / 2 * 8).wrapping_sub(key);
                        if before >= args.window {
                            scores[N % KT][I] = f32::NEG_INFINITY;
                        }
                    });
                });
            }

            unroll!(R < 2 => {
                let mut max = maxima[R];
                unroll!(N < (KT) => {
                    max = max.max(scores[N % KT][2 * R]).max(scores[N % KT][2 * R + 1]);
                });
                let max = quad_max(max);
                let shrink = ptx::exp2((maxima[R] - max) * args.scale);
                maxima[R] = max;
                let offset = -max * args.scale;
                let mut sum = weights[R] * shrink;
                unroll!(N < (KT) => {
                    unroll!(I < 2 => {
                        let score = &mut scores[N % KT][2 * R + I];
                        *score = ptx::exp2(ptx::fma(*score, args.scale, offset));
                        sum += *score;
                    });
                });
                weights[R] = sum;
                unroll!(N < 8 => {
                    if 2 * N < DT {
                        unroll!(I < 2 => {
                            sums[(2 * N) % DT][2 * R + I] *= shrink;
                            sums[(2 * N + 1) % DT][2 * R + I] *= shrink;
                        });
                    }
                });
            });

            unroll!(J < (KT / 2) => {
                let (left, right) = (scores[(2 * J) % KT], scores[(2 * J + 1) % KT]);
                let a = [
                    ptx::f32x2_to_f16x2(left[0], left[1]),
                    ptx::f32x2_to_f16x2(left[2], left[3]),
                    ptx::f32x2_to_f16x2(right[0], right[1]),
                    ptx::f32x2_to_f16x2(right[2], right[3]),
                ];
                // Of a lane: a row of 16 bytes of the matrix `lane / 8`, keys first.
                let key = J as u32 * 16 + lane / 8 % 2 * 8 + lane % 8;
                unroll!(N < 8 => {
                    if 2 * N < DT {
                        let chunk = value_chunk(width, key, 2 * N as u32 + lane / 16);
                        let b = ptx::ldmatrix_x4_trans(base, at + stage / 2 + chunk);
                        let sum = &mut sums[(2 * N) % DT];
                        *sum = mma_k16(a, [b[0], b[1]], *sum);
                        let sum = &mut sums[(2 * N + 1) % DT];
                        *sum = mma_k16(a, [b[2], b[3]], *sum);
                    }
                });
            });
            step += 1;
        }

        unroll!(R < 2 => {
            let inverse = ptx::rcp(quad_sum(weights[R]));
            let query = query + R as u32 * 8;
            let row = query as usize * heads as usize + head as usize;
            unroll!(H < 2 => {
                unroll!(N < 8 => {
                    if 8 * H + N < DT {
                        let column = (8 * H + N) as u32 * 8;
                        let sum = sums[(8 * H + N) % DT];
                        let pair = [sum[2 * R] * inverse, sum[2 * R + 1] * inverse];
                        if query < args.tokens && column < args.head_dim {
                            let to = (row * args.head_dim as usize + column as usize) / 2;
                            let to = args.out.wrapping_add(to + q as usize);
                            ptx::st_global_u32(to, ptx::f32x2_to_f16x2(pair[0], pair[1]));
                        }
                    }
                });
            });
        });
    }
}

macro_rules! entries {
    ($($name:ident: $d32:literal;)*) => {$(
        #[doc = concat!("Heads of up to 32 times ", stringify!($d32), " columns.")]
        ///
        /// # Safety
        /// Launched as [`plan`] says, with a position of at most S - T.
        #[kernel]
        pub unsafe fn $name(
            q: *const u32,       // (T, H, Dh) f16
            k_cache: *const u32, // (KV, S, Dh) f16
            v_cache: *const u32, // (KV, S, Dh) f16
            state: *const u32,   // (1) position
            out: *mut u32,       // (T, H, Dh) f16
            group: u32,
            head_dim: u32,
            context: u32,
            tokens: u32,
            window: u32,
            scale: f32,
        ) {
            thread::max_block_threads::<THREADS>();
            ptx::griddep_launch();
            ptx::griddep_wait();
            // SAFETY: the plan checked it.
            let position = unsafe { ptx::ld_global_u32(state) };
            let args = Args {
                q, k_cache, v_cache, out, position, group, head_dim, context, tokens, window,
                scale,
            };
            // SAFETY: launched as `plan` says.
            unsafe {
                if at_least_sm_80() {
                    attention::<$d32, { $d32 * 4 }, WIDE>(&args);
                } else {
                    attention::<$d32, { $d32 * 4 }, NARROW>(&args);
                }
            }
        }
    )*};
}

entries! {
    attention_prompt_f16_d64: 2;
    attention_prompt_f16_d96: 3;
    attention_prompt_f16_d128: 4;
}
