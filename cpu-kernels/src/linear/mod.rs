//! Linear layers: `y = w x + bias`.
//!
//! A matrix is laid out once, at load ([`Packed`]): 16 rows side by side, a row a lane, so that a product adds
//! to all of them, nothing is summed across lanes, and a thread reads its rows as one stream. Weights of 2, 4
//! and 8 bits meet activations as [`levels`](crate::levels), F16 weights meet floats.
//!
//! ```text
//! tile    16 rows; those beyond the matrix are zero
//! chunk   32 columns of a tile: 8 steps of 4 columns
//! line    64 bytes: byte 4r + c belongs to row r, column c of a step
//!
//! 8 bits: 8 lines a chunk, line s holds step s
//! 4 bits: 4 lines, line j holds step 2j in the low nibbles and 2j + 1 in the high ones
//! 2 bits: 2 lines, line j holds step 4j + p in bits 2p and 2p + 1
//! pairs:  the same with byte 16c + r for row r, column c: what tables are looked up by ([`lookup`])
//! fives:  no chunks, a line is 5 steps of ternary levels, step p counts 3^p
//! F16:    16 lines, line j holds columns 2j and 2j + 1, 16 rows each
//! ```
//!
//! A weight of few bits is a level `u >= 0` with `w = scale * (u - zero)` or `w = scale * u + min`. Its
//! integers are exact, in any order; floats are added group by group in one order, whatever the number of
//! tokens: a prompt gives the same bits in one call as token by token.
//!
//! Vector instructions for a chunk (512 weights) and a token with AVX-512 VNNI: 16 products for the two planes of
//! 16-bit levels and 4 to shift and to scale, a fifth for minima; splitting 4 bits takes 12, shared by the tokens
//! of a tile. At two a cycle that bounds the multiply-adds at 74% of the products' own peak (248 billion a second
//! of two planes on the Xeon below, at 4 GHz); 61% are reached.
//!
//! One thread of an Intel Xeon with AVX-512 VNNI, 2026-11-24, other programs running, median of many calls,
//! billions of multiplications with addition a second (`cargo xtask bench --cpu`):
//!
//! | | VNNI |
//! |---|---|
//! | INT4, group 32, 8960 x 1536, one token | 26 (15 GB/s) |
//! | same, 64 tokens | 151 |
//! | INT4, group 32 with minima, 576 x 1536, 64 tokens | 148 |
//! | ternary, levels of 8 bits, 6912 x 2560, 64 tokens | 282 |

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod float16;
mod forms;
pub mod int4;
pub mod int8;
mod ints;
mod kernel;
mod layout;
pub mod lookup;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
pub mod ternary;
mod words;

pub use kernel::{Input, part};
pub use layout::Packed;

/// Rows of a tile. Work is cut at multiples of it.
pub const TILE_ROWS: usize = 16;
/// Columns of a chunk.
const CHUNK_COLS: usize = crate::levels::CHUNK_COLS;
/// Columns of a step.
const STEP_COLS: usize = 4;
/// Steps of a chunk.
const STEPS: usize = CHUNK_COLS / STEP_COLS;
/// Columns of a line of fives.
const FIVES_COLS: usize = 5 * STEP_COLS;
/// Bytes of a line.
const LINE_BYTES: usize = TILE_ROWS * STEP_COLS;
const _: () = assert!(LINE_BYTES == crate::pages::LINE_BYTES);

/// Tokens of a call, after the lengths of a reference's operands are checked.
fn tokens(rows: usize, cols: usize, bias: Option<&[f32]>, x: usize, y: usize) -> usize {
    assert!(
        cols > 0 && x.is_multiple_of(cols),
        "linear: x is (t, k) with k = {cols}"
    );
    let tokens = x / cols;
    assert_eq!(y, tokens * rows, "linear: y is (t, n) with n = {rows}");
    assert!(
        bias.is_none_or(|b| b.len() == rows),
        "linear: bias is (n,) with n = {rows}"
    );
    tokens
}

#[cfg(test)]
mod tests;
