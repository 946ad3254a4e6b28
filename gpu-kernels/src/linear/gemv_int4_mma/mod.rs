//! INT4 matrix by the activations of 1 to 8 tokens on the matrix units:
//! `y[t, n] = sum_k w[n, k] x[t, k]`, with what comes before and after it in a decoder layer.
//!
//! Shapes: quants, scales and mins as `models::quant::int4_tiled` lays them out, in tiles of 16 rows
//! by 128 columns; x `(T, K)`, y `(T, N)`, with `w = scale q + min`, or `scale (q - 8)` without mins.
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
//! of them a conversion. x is operand B, as halves, a token a column; a sixteenth of it where it
//! meets `16 q`. The 1024 and the zero point 8 multiply the sum of x over the group, which is
//! computed once from the halves themselves: the sum of products starts from minus that, and what
//! is left is `sum q x`. Groups are summed in single precision:
//!
//! ```text
//! y += scale * (sum (1024 + q) x - sum 1024 x)  +  min * sum x
//! ```
//!
//! x is rounded to halves, which costs a relative error of 3e-4. It has to stay below 65504.
//!
//! Bytes moved: `N K / 2` quants, `2 N ceil(K/group)` scales (twice with mins), and `4 T K` of x a
//! block, from L2. A warp has four tiles in flight, the next row tile's among them while this one's
//! sums are put together, so the loads never pause. The first leaves before x is touched.
//! Shared memory holds x as halves in natural order: a warp reads it four lanes wide, the same for
//! all rows (one token), or from eight columns whose strides differ by half the banks: no
//! conflicts. x that does not fit is staged in chunks along K, once a round.
//!
//! Norm in front ([`Operands::gain`]): every block computes the mean square for itself.
//! [`Epilogue::Add`] adds to y, for the residual. [`Epilogue::SwiGlu`] takes tiles of 8 gate and
//! 8 up rows and writes `silu(gate) up`. Several matrices behind one input are one, row after row.
//!
//! Sums are added up in an order that depends on shape and tiling alone. Before capability 8.0 a
//! product is two instructions of half the depth; the layout is the same.

mod kernel;
mod one;
mod ring;
#[cfg(not(target_arch = "nvptx64"))]
mod plan;
mod stage;

use cuda_std::{kernel, thread};

use kernel::{Args, gemv};
#[cfg(not(target_arch = "nvptx64"))]
pub use plan::{Epilogue, Operands, Shape, Tiling, entry, max_warps, plan, rule};

/// Rows a tile.
const TILE_ROWS: u32 = 16;
/// Columns a tile.
const TILE_COLS: u32 = 128;
/// Threads a block at most: four warps to each quarter of a multiprocessor, 128 registers a thread.
/// The scales of the smallest groups take more: three warps, 168 registers.
const fn max_block_threads(group: u32) -> u32 {
    if group == 32 { 384 } else { 512 }
}

/// y is added to instead of written.
const FLAG_ACCUMULATE: u32 = 1;
/// The upper half of each tile's rows gates the lower.
const FLAG_SWIGLU: u32 = 2;
/// y is halves.
const FLAG_HALF_Y: u32 = 4;
/// Extra bytes a token's activations: puts neighbouring tokens in different banks.
const TOKEN_PAD_BYTES: u32 = 64;

/// Byte offsets in a block's shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Regions {
    /// Bytes a token's activations: halves, `chunk` tiles.
    x_stride: u32,
    /// What the sums of products start from, f32: 4 a group that are the same (one token), or 8.
    offsets: u32,
    /// Sums of x, f32: a group (one token), or 8 a group. Only with minima.
    sums: u32,
    /// Sums of squares, f32: a warp and token.
    norm: u32,
    /// Two times `(warps, tokens, 16)` f32.
    partials: u32,
    /// All of it.
    bytes: u32,
}

impl Regions {
    #[inline(always)]
    const fn new(chunk: u32, group: u32, mins: bool, tokens: u32, warps: u32) -> Regions {
        let one = tokens == 1;
        let x_stride = chunk * TILE_COLS * 2 + if one { 0 } else { TOKEN_PAD_BYTES };
        let groups = chunk * (TILE_COLS / group);
        let offsets = tokens * x_stride;
        let sums = offsets + groups * if one { 16 } else { 32 };
        let sum_bytes = groups * if one { 4 } else { 32 };
        let norm = if mins { sums + sum_bytes } else { sums };
        let partials = norm + tokens * warps * 4;
        Regions {
            x_stride,
            offsets,
            sums,
            norm,
            partials,
            bytes: partials + 2 * warps * tokens * TILE_ROWS * 4,
        }
    }
}

macro_rules! entries {
    ($($name:ident: $group:literal, $mins:literal, $one:literal;)*) => {$(
        #[doc = concat!("Groups of ", stringify!($group), "; minima: ", stringify!($mins),
            "; one token: ", stringify!($one), ".")]
        ///
        /// # Safety
        /// Launched as [`plan`] says.
        #[kernel]
        pub unsafe fn $name(
            quants: *const u32, // (ceil(N/16), ceil(K/128), 256) int4
            scales: *const u32, // (ceil(N/16), ceil(K/128), 8, 128/group) pairs of f16
            mins: *const u32,   // as scales, or null
            bias: *const f32,   // (N), or null
            x: *const f32,      // (T, K)
            gain: *const f32,   // (K), or null
            y: *mut f32,        // (T, N)
            rows: u32,
            cols: u32,
            tokens: u32,
            chunk: u32,
            eps: f32,
            flags: u32,
        ) {
            thread::max_block_threads::<{ max_block_threads($group) }>();
            let args = Args {
                quants, scales, mins, bias, x, gain, y, rows, cols, tokens, chunk, eps, flags,
            };
            // SAFETY: launched as `plan` says.
            unsafe { gemv::<$group, $mins, $one>(&args) }
        }
    )*};
}

entries! {
    linear_gemv_int4_mma_g32: 32, false, true;
    linear_gemv_int4_mma_g64: 64, false, true;
    linear_gemv_int4_mma_g128: 128, false, true;
    linear_gemv_int4_mma_g32_min: 32, true, true;
    linear_gemv_int4_mma_g64_min: 64, true, true;
    linear_gemv_int4_mma_g128_min: 128, true, true;
    linear_gemv_int4_mma_g32_tokens: 32, false, false;
    linear_gemv_int4_mma_g64_tokens: 64, false, false;
    linear_gemv_int4_mma_g128_tokens: 128, false, false;
    linear_gemv_int4_mma_g32_min_tokens: 32, true, false;
    linear_gemv_int4_mma_g64_min_tokens: 64, true, false;
    linear_gemv_int4_mma_g128_min_tokens: 128, true, false;
}

macro_rules! one_entries {
    ($($name:ident: $group:literal, $mins:literal, $half:literal, $abl:literal;)*) => {$(
        /// .
        ///
        /// # Safety
        /// Launched as [`plan`] says.
        #[kernel]
        pub unsafe fn $name(
            quants: *const u32,
            scales: *const u32,
            mins: *const u32,
            bias: *const f32,
            x: *const u32,
            gain: *const f32,
            y: *mut f32,
            rows: u32,
            cols: u32,
            row_tiles: u32,
            depth_tiles: u32,
            eps: f32,
            flags: u32,
        ) {
            thread::max_block_threads::<{ max_block_threads($group) }>();
            let args = one::OneArgs {
                quants, scales, mins, bias, x, gain, y, rows, cols, row_tiles, depth_tiles, eps, flags,
            };
            // SAFETY: launched as `plan` says.
            unsafe { one::gemv_one::<$group, $mins, $half, $abl>(&args) }
        }
    )*};
}
one_entries! {
    linear_one_f32: 128, false, false, 0;
    linear_one_f16: 128, false, true, 0;
    linear_one_min: 32, true, true, 0;
    linear_abl8: 128, false, true, 8;
    linear_abl8f: 128, false, false, 8;
    linear_abl1: 128, false, true, 1;
    linear_abl16: 128, false, true, 16;
    linear_abl32: 128, false, true, 32;
    linear_abl64: 128, false, true, 64;
}

macro_rules! ring_entries {
    ($($name:ident: $group:literal, $mins:literal, $half:literal, $depth:literal, $early:literal;)*) => {$(
        /// .
        ///
        /// # Safety
        /// Launched as [`plan`] says.
        #[kernel]
        pub unsafe fn $name(
            quants: *const u32,
            scales: *const u32,
            mins: *const u32,
            bias: *const f32,
            x: *const u32,
            gain: *const f32,
            y: *mut f32,
            rows: u32,
            cols: u32,
            row_tiles: u32,
            depth_tiles: u32,
            eps: f32,
            flags: u32,
        ) {
            thread::max_block_threads::<{ 512 }>();
            let args = ring::OneArgs {
                quants, scales, mins, bias, x, gain, y, rows, cols, row_tiles, depth_tiles, eps, flags,
            };
            // SAFETY: launched as `plan` says.
            unsafe { ring::gemv_ring::<$group, $mins, $half, $depth, $early>(&args) }
        }
    )*};
}
ring_entries! {
    linear_ring4: 128, false, true, 4, 1;
    linear_ring4e2: 128, false, true, 4, 2;
    linear_ring8: 128, false, true, 8, 1;
    linear_ring8e2: 128, false, true, 8, 2;
    linear_ring8e4: 128, false, true, 8, 4;
    linear_ring2: 128, false, true, 2, 1;
    linear_ring4f32: 128, false, false, 4, 1;
}
