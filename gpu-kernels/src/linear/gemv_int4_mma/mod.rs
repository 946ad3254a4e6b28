//! INT4 matrix by the activations of a token on the matrix units:
//! `y[n] = sum_k w[n, k] x[k]`, with what comes before and after it in a decoder layer.
//!
//! Shapes: quants, scales and mins as `models::quant::int4_tiled` lays them out, in tiles of 16 rows
//! by 128 columns; x `(K,)`, y `(N,)`, with `w = scale q + min`, or `scale (q - 8)` without mins. With
//! [`Operands::zeros`] mins hold zeros, `w = scale (q - zero)`: the minimum is `-scale zero`, made in single
//! precision, which holds it exactly.
//!
//! ```text
//! block b of B   teams of warps; team t -> row tiles b + B (t + teams r), r = 0, 1, ...
//! a team         its warps share a row tile: warp m -> tiles m, m + split, ... along K
//! a warp         a tile of 1 KiB: two 16-byte loads a lane, 8 products m16n8k16
//! ```
//!
//! Weights are operand A. A lane's word holds eight of them: the masks 0x000f000f and 0x00f000f0,
//! on the word and on the word shifted by 8, put them into the mantissa of the half 1024, as
//! `1024 + q` and `1024 + 16 q`. One shift and four three-input operations for eight weights, none
//! of them a conversion. x is operand B, as halves, the same in every column; a sixteenth of it where it
//! meets `16 q`. The 1024 and the zero point 8 multiply the sum of x over the group, which is
//! computed once from the halves themselves: the sum of products starts from minus that, and what
//! is left is `sum q x`. Groups are summed in single precision:
//!
//! ```text
//! y += scale * (sum (1024 + q) x - sum 1024 x)  +  min * sum x
//! ```
//!
//! x is rounded to halves, which costs a relative error of 3e-4; or it comes as halves, which is half
//! the bytes for every block to fetch. It has to stay below 65504.
//!
//! Bytes moved: `N K / 2` quants, `2 N ceil(K/group)` scales (twice with mins), and x once a block, from
//! L2. A warp has four tiles in flight, the next row tile's among them while this one's sums are put
//! together, so the loads never pause. Tiles come by asynchronous copies into a ring in shared memory,
//! each lane's part its own, which takes few registers; before capability 8.0 they come straight to
//! registers. Several tokens: [`gemm_int4`](super::gemm_int4).
//!
//! What decides is when x arrives: no product starts without it, and its loads queue up behind every
//! load of weights that went before. So at most half of the tiles in flight are asked for before x. From
//! capability 9.0 on these are asked for while the launch before still runs ([`ptx::griddep_wait`]).
//!
//! Shared memory holds x as halves in natural order: a warp reads it four lanes wide, the same for
//! all rows: no conflicts.
//!
//! Norm in front ([`Operands::gain`]): every block computes the mean square for itself.
//! [`Epilogue::Add`] adds to y, for the residual. [`Epilogue::SwiGlu`] takes tiles of 8 gate and
//! 8 up rows and writes `silu(gate) up`. Several matrices behind one input are one, row after row; the
//! entries `_heads` take q, k and v so, turn queries and keys and append keys and values to the cache.
//!
//! Sums are added up in an order that depends on shape and tiling alone. Before capability 8.0 a
//! product is two instructions of half the depth; the layout is the same.
//!
//! [`ptx::griddep_wait`]: crate::ptx::griddep_wait

mod one;
#[cfg(not(target_arch = "nvptx64"))]
mod plan;
#[cfg(not(target_arch = "nvptx64"))]
mod space;
pub(super) mod tile;

use cuda_std::{kernel, thread};

#[cfg(not(target_arch = "nvptx64"))]
pub use plan::{
    Epilogue, Heads, HeadsOperands, Operands, Shape, Tiling, entry, entry_heads, max_warps, plan,
    plan_heads, rule,
};
#[cfg(not(target_arch = "nvptx64"))]
pub use space::candidates;

/// Rows a tile.
const TILE_ROWS: u32 = 16;
/// Columns a tile.
const TILE_COLS: u32 = 128;
/// Threads a block at most: four warps to each quarter of a multiprocessor, 128 registers a thread.
const MAX_BLOCK_THREADS: u32 = 512;

/// y is added to instead of written.
const FLAG_ACCUMULATE: u32 = 1;
/// The upper half of each tile's rows gates the lower.
const FLAG_SWIGLU: u32 = 2;
/// y is halves.
const FLAG_HALF_Y: u32 = 4;
/// Minima are zeros.
const FLAG_ZEROS: u32 = 8;

macro_rules! one_token {
    ($($name:ident: $group:literal, $mins:literal, $half_x:literal;)*) => {$(
        #[doc = concat!("One token. Groups of ", stringify!($group), "; minima: ", stringify!($mins),
            "; x are halves: ", stringify!($half_x), ".")]
        ///
        /// # Safety
        /// Launched as [`plan`] says.
        #[kernel]
        pub unsafe fn $name(
            quants: *const u32, // (ceil(N/16), ceil(K/128), 256) int4
            scales: *const u32, // (ceil(N/16), ceil(K/128), 8, 128/group) pairs of f16
            mins: *const u32,   // as scales, or null
            bias: *const f32,   // (N), or null
            x: *const u32,      // (K) f32 or f16
            gain: *const f32,   // (K), or null
            y: *mut f32,        // (N) f32 or f16
            rows: u32,
            cols: u32,
            row_tiles: u32,
            depth_tiles: u32,
            eps: f32,
            flags: u32,
        ) {
            thread::max_block_threads::<MAX_BLOCK_THREADS>();
            let weights = tile::Weights { quants, scales, mins };
            let args = one::Args {
                weights, bias, x, gain, y, rows, cols, row_tiles, depth_tiles, eps, flags,
            };
            // SAFETY: launched as `plan` says.
            unsafe { one::gemv::<$group, $mins, $half_x>(&args, &one::Rows) }
        }
    )*};
}

one_token! {
    linear_gemv_int4_mma_g32: 32, false, false;
    linear_gemv_int4_mma_g64: 64, false, false;
    linear_gemv_int4_mma_g128: 128, false, false;
    linear_gemv_int4_mma_g32_min: 32, true, false;
    linear_gemv_int4_mma_g64_min: 64, true, false;
    linear_gemv_int4_mma_g128_min: 128, true, false;
    linear_gemv_int4_mma_g32_half: 32, false, true;
    linear_gemv_int4_mma_g64_half: 64, false, true;
    linear_gemv_int4_mma_g128_half: 128, false, true;
    linear_gemv_int4_mma_g32_min_half: 32, true, true;
    linear_gemv_int4_mma_g64_min_half: 64, true, true;
    linear_gemv_int4_mma_g128_min_half: 128, true, true;
}

macro_rules! heads {
    ($($name:ident: $group:literal, $mins:literal;)*) => {$(
        #[doc = concat!("One token's q, k and v, turned and appended. Groups of ", stringify!($group),
            "; minima: ", stringify!($mins), ".")]
        ///
        /// # Safety
        /// Launched as [`plan_heads`] says, with a position below S.
        #[kernel]
        pub unsafe fn $name(
            quants: *const u32, // ((H + 2 KV) Dh/16, ceil(K/128), 256) int4, halves of heads by eights
            scales: *const u32, // ((H + 2 KV) Dh/16, ceil(K/128), 8, 128/group) pairs of f16
            mins: *const u32,   // as scales, or null
            bias: *const f32,   // ((H + 2 KV) Dh), or null
            x: *const u32,      // (K) f32
            gain: *const f32,   // (K), or null
            q: *mut f32,        // (H, Dh)
            rows: u32,
            cols: u32,
            row_tiles: u32,
            depth_tiles: u32,
            eps: f32,
            flags: u32,
            cos: *const f32,   // (S, Dh/2)
            sin: *const f32,   // (S, Dh/2)
            k_cache: *mut u16, // (KV, S, Dh) f16
            v_cache: *mut u16, // (KV, S, Dh) f16
            state: *const u32, // (1) position
            heads: u32,
            kv_heads: u32,
            half: u32,
            context: u32,
        ) {
            thread::max_block_threads::<MAX_BLOCK_THREADS>();
            let weights = tile::Weights { quants, scales, mins };
            let args = one::Args {
                weights, bias, x, gain, y: q, rows, cols, row_tiles, depth_tiles, eps, flags,
            };
            let outputs = one::Heads {
                cos, sin, k_cache, v_cache, state, heads, kv_heads, half, context,
            };
            // SAFETY: launched as `plan_heads` says.
            unsafe { one::gemv::<$group, $mins, false>(&args, &outputs) }
        }
    )*};
}

heads! {
    linear_gemv_int4_mma_g32_heads: 32, false;
    linear_gemv_int4_mma_g64_heads: 64, false;
    linear_gemv_int4_mma_g128_heads: 128, false;
    linear_gemv_int4_mma_g32_min_heads: 32, true;
    linear_gemv_int4_mma_g64_min_heads: 64, true;
    linear_gemv_int4_mma_g128_min_heads: 128, true;
}
