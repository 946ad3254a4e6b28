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
//! a warp            MT row tiles by NT times 8 tokens; lane 4g + q holds of each product
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
//! | `linear_gemm_int4_t8` | 8 | limited by memory: many stages in flight, little x |
//! | `linear_gemm_int4_t16`, `t32`, `t64` | 16, 32, 64 | in between |
//! | `linear_gemm_int4_t128` | 128 | limited by the matrix units: 8 products for each load of x |
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

use cuda_std::{kernel, thread};

#[cfg(not(target_arch = "nvptx64"))]
pub use plan::{
    ENTRIES, Operands, Shape, Tiling, candidates, entry, most_scratch_bytes, plan, rule,
};

/// Rows of the matrix a block.
const BLOCK_ROWS: u32 = 128;
/// Threads a block: eight warps.
const BLOCK_THREADS: u32 = 256;

/// y is added to instead of written.
const FLAG_ACCUMULATE: u32 = 1;
/// The upper half of each tile's rows gates the lower.
const FLAG_SWIGLU: u32 = 2;
/// y is halves.
const FLAG_HALF_Y: u32 = 4;
/// Minima are zeros.
const FLAG_ZEROS: u32 = 8;

macro_rules! entries {
    ($($name:ident: $tokens:literal, $form:expr, $under_way:literal;)*) => {
        $(
            #[doc = concat!("Tiles of ", stringify!($tokens), " tokens.")]
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
            ) {
                thread::max_block_threads::<BLOCK_THREADS>();
                let args = block::Args {
                    quants, scales, mins, bias, x, y, partials, arrived,
                    rows, cols, tokens, row_tiles, depth_tiles, group_shift, flags,
                };
                const FORM: block::Form = $form;
                // SAFETY: launched as `plan` says.
                unsafe {
                    block::gemm::<
                        { FORM.row_tiles },
                        { FORM.token_tiles },
                        { FORM.token_warps },
                        $under_way,
                    >(&args);
                }
            }
        )*

        /// Tokens a tile, entry, form and stages under way, narrowest first.
        #[cfg(not(target_arch = "nvptx64"))]
        const FORMS: &[(u32, &str, block::Form, u32)] =
            &[$(($tokens, stringify!($name), $form, $under_way)),*];
    };
}

entries! {
    linear_gemm_int4_t8: 8, block::Form::new(1, 1, 1), 4;
    linear_gemm_int4_t16: 16, block::Form::new(2, 1, 2), 4;
    linear_gemm_int4_t32: 32, block::Form::new(2, 2, 2), 2;
    linear_gemm_int4_t64: 64, block::Form::new(2, 4, 2), 2;
    linear_gemm_int4_t128: 128, block::Form::new(2, 8, 2), 0;
}
