//! INT4 matrix by the activations of many tokens on the matrix units:
//! `y[t, n] = sum_k w[n, k] x[t, k]`, with what comes after it in a decoder layer.
//!
//! Shapes: quants, scales and mins as `models::quant::int4_tiled` lays them out, the bytes that
//! [`gemv_int4_mma`](super::gemv_int4_mma) reads; x `(T, K)` f16, y `(T, N)` f32 or f16, with
//! `w = scale q + min`, `scale (q - 8)` without mins, or `scale (q - zero)` where they are zeros.
//!
//! ```text
//! block (i, j, s)   tokens TILE i .. + TILE, 128 rows of the matrix from 128 j on,
//!                   the s-th part of the tiles along K
//! a stage           128 columns: 8 tiles of 1 KiB, x of TILE tokens, scales and mins,
//!                   brought by asynchronous copies while the stages before are worked on
//! a warp            a row tile by NT times 8 tokens; lane 4g + q holds of each product
//!                   rows g, g + 8 and tokens 2q, 2q + 1
//! ```
//!
//! Weights are operand A, straight from the words of a tile: two masks, a shift and two packed
//! operations make eight of them the halves `scale (q - zero) + min`, rounded once. The order of
//! columns within 32 is that of the tiles: what a lane needs of x for two products of depth 16 lies
//! side by side in 16 bytes of natural order, so x needs no rearrangement.
//!
//! | entry | tokens a block | wins |
//! |---|---|---|
//! | `linear_gemm_int4_t8`, `t16` | 8, 16 | limited by memory: little x |
//! | `linear_gemm_int4_t32` | 32 | up to 64 tokens: two tiles of 32 keep more multiprocessors busy than one of 64 |
//! | `linear_gemm_int4_t64` | 64 | weights are made once for 64 tokens, and two blocks a multiprocessor hide each other's waits |
//!
//! | `linear_gemm_int4_r128_t128` | 128 | `wgmma`, from 65 tokens on: where tiles of 256 rows are too few |
//! | `linear_gemm_int4_r256_t128` | 128 | `wgmma`, x read half as often, four warpgroups hide each other's waits |
//!
//! The last two, and their forms with minima, `_min`, are those of [`warpgroup`] and of the tier `sm_90a`.
//! By warps, two of them side by side along the tokens, or 128 tokens a block, make the same weights twice or leave
//! room for one block: 5 to 30% slower (H100, 2026-11-24).
//!
//! Bytes moved: the matrix once a tile of tokens (from L2 but for the first), x once 128 rows.
//! Shared memory holds x a token a row, 256 bytes, odd tokens with the upper and lower half of each 128
//! bytes exchanged: the eight lanes that a 16-byte load serves at once, four columns of two tokens,
//! hit different banks. Everything else is read in the order of the lanes: no conflicts.
//!
//! Where blocks are too few for the multiprocessors, K is split: each block leaves its sums, the
//! last one of a tile adds them up in the order of the parts. Two runs give identical bits.
//!
//! x has to be finite; weights have to stay below 65504.

mod block;
mod feed;
#[cfg(not(target_arch = "nvptx64"))]
mod plan;
mod store;
#[cfg(not(target_arch = "nvptx64"))]
mod tilings;
#[cfg(any(not(target_arch = "nvptx64"), target_feature = "sm_90a"))]
mod warpgroup;

use cuda_std::{kernel, thread};

#[cfg(not(target_arch = "nvptx64"))]
pub use plan::{
    Operands, Shape, Tiling, candidates, entry, most_scratch_bytes, needs_warpgroup_products, plan,
    rule,
};
#[cfg(not(target_arch = "nvptx64"))]
pub use tilings::{FAMILY, TOKENS, Tilings, name};

/// Rows of the matrix a block.
const BLOCK_ROWS: u32 = 128;
/// Threads a block: eight warps.
const BLOCK_THREADS: u32 = 256;

/// Tells the assembler to take so few registers that two blocks fit a multiprocessor; not on sm_75, whose
/// products of half the depth need more.
const TWO_BLOCKS_THREADS: u32 = if cfg!(all(target_arch = "nvptx64", not(target_feature = "sm_80")))
{
    BLOCK_THREADS
} else {
    2 * BLOCK_THREADS
};

/// y is added to instead of written.
const FLAG_ACCUMULATE: u32 = 1;
/// The upper half of each tile's rows gates the lower.
const FLAG_SWIGLU: u32 = 2;
/// y is halves.
const FLAG_HALF_Y: u32 = 4;
/// Minima are zeros.
const FLAG_ZEROS: u32 = 8;

/// The blocks of a form.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy)]
struct Form {
    /// Rows of the matrix a block.
    rows: u32,
    /// Tokens a block.
    tokens: u32,
    threads: u32,
    /// Stages of the ring.
    stages: u32,
    /// Entries without and with minima.
    entries: [&'static str; 2],
    /// Whether it takes `wgmma`.
    warpgroups: bool,
}

/// An entry, whose body has `args`.
macro_rules! entry {
    ($(#[$attribute:meta])* $name:ident, $args:ident, $threads:expr, $body:expr) => {
        $(#[$attribute])*
        ///
        /// # Safety
        /// Launched as [`plan`] says.
        #[kernel]
        pub unsafe fn $name(
            quants: *const u32,  // (ceil(N/16), ceil(K/128), 256) int4
            scales: *const u32,  // (ceil(N/16), ceil(K/128), 8, 128/group) pairs of f16
            mins: *const u32,    // as scales, or null
            bias: *const f32,    // (N), or null
            x: *const u32,       // (T, K) f16
            y: *mut f32,         // (T, N) f32 or f16
            partials: *mut f32,  // sums of the parts of K, or null
            arrived: *mut u32,   // (row blocks, token tiles) zeros, or null
            rows: u32,
            cols: u32,
            tokens: u32,
            row_tiles: u32,
            depth_tiles: u32,
            group_shift: u32,
            flags: u32,
            whole: u32, // tiles of y that have a block each
            parts: u32, // blocks that share each of the others
        ) {
            thread::max_block_threads::<{ $threads }>();
            let $args = block::Args {
                quants, scales, mins, bias, x, y, partials, arrived,
                rows, cols, tokens, row_tiles, depth_tiles, group_shift, flags, whole, parts,
            };
            // SAFETY: launched as `plan` says.
            unsafe { $body }
        }
    };
}

/// By warps: entries, and their forms, narrowest first.
macro_rules! by_warps {
    ($($name:ident: $eights:literal;)*) => {
        $(entry! {
            #[doc = concat!("128 rows by ", stringify!($eights), " times 8 tokens, a row tile a warp.")]
            $name, args, TWO_BLOCKS_THREADS, block::gemm::<$eights, UNDER_WAY>(&args)
        })*

        #[cfg(not(target_arch = "nvptx64"))]
        const BY_WARPS: &[Form] = &[$(Form {
            rows: BLOCK_ROWS,
            tokens: 8 * $eights,
            threads: BLOCK_THREADS,
            stages: UNDER_WAY + 2,
            entries: [stringify!($name); 2],
            warpgroups: false,
        }),*];
    };
}

/// Stages that may be under way while one is worked on; one more is asked for.
const UNDER_WAY: u32 = 2;

by_warps! {
    linear_gemm_int4_t8: 1;
    linear_gemm_int4_t16: 2;
    linear_gemm_int4_t32: 4;
    linear_gemm_int4_t64: 8;
}

/// By warpgroups: entries without and with minima, and their forms.
macro_rules! by_warpgroups {
    ($($name:ident, $with_mins:ident: $rows:literal x $eights:literal, $stages:literal;)*) => {
        $(
            entry! {
                #[doc = concat!(stringify!($rows), " rows by ", stringify!($eights), " times 8 tokens.")]
                #[cfg(any(not(target_arch = "nvptx64"), target_feature = "sm_90a"))]
                $name, args, 2 * $rows,
                warpgroup::gemm::<{ 2 * $rows }, { 4 * $eights }, $eights, $stages, false>(&args)
            }
            entry! {
                #[doc = concat!("[`", stringify!($name), "`] with minima or zeros.")]
                #[cfg(any(not(target_arch = "nvptx64"), target_feature = "sm_90a"))]
                $with_mins, args, 2 * $rows,
                warpgroup::gemm::<{ 2 * $rows }, { 4 * $eights }, $eights, $stages, true>(&args)
            }
        )*

        #[cfg(not(target_arch = "nvptx64"))]
        const BY_WARPGROUPS: &[Form] = &[$(Form {
            rows: $rows,
            tokens: 8 * $eights,
            threads: 2 * $rows,
            stages: $stages,
            entries: [stringify!($name), stringify!($with_mins)],
            warpgroups: true,
        }),*];
    };
}

by_warpgroups! {
    linear_gemm_int4_r128_t128, linear_gemm_int4_r128_t128_min: 128 x 16, 4;
    linear_gemm_int4_r256_t128, linear_gemm_int4_r256_t128_min: 256 x 16, 3;
}
