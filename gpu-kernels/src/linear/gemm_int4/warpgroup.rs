//! The product by warpgroups: `wgmma`, which capability 9.0 alone has.
//!
//! ```text
//! block             a tile of tokens, 64 rows of the matrix a warpgroup; as many tiles as all
//!                   multiprocessors can have take a block each, what is left over is split along K
//! a stage           128 columns: the tiles, x in two halves of 64 columns, scales and mins
//! a warp            a row tile and all tokens of the block: 16 rows of its warpgroup's 64
//! ```
//!
//! Weights are operand A from registers, x is operand B from shared memory, read by all warpgroups. A
//! product takes eight columns of x where they are, so weights have to be in the natural order of
//! columns, and a lane has those of a quarter of 32: lanes of a row exchange them as nibbles
//! ([`natural_order`], a shuffle a product). Then they become halves as in
//! [`block`](super::block), while the product before runs.

use cuda_std::warpgroup::{self, Operand, Product, Sums};
use cuda_std::{shared, thread, warp};

use super::super::gemv_int4_mma::tile::HALVES_1024;
use super::block::{Args, Group, Stage, TILE_BYTES, Work, scale_bytes, weights};
use super::feed::Feed;
use super::store::{add_up, store};
use crate::ptx;
use crate::unroll::unroll;

/// Alignment of x in a stage.
const ALIGN: u32 = 1024;

/// The stage of a block of so many row tiles and tokens.
#[inline(always)]
pub(super) const fn stage(tiles: u32, tokens: u32, group_shift: u32, mins: bool) -> Stage {
    let stage = Stage::new(tiles, tokens, group_shift, mins);
    Stage {
        bytes: stage.bytes.next_multiple_of(ALIGN),
        ..stage
    }
}

/// Offset of eight columns of a token in a stage's x; `eight` of 16.
#[inline(always)]
fn x_offset(tokens: u32, token: u32, eight: u32) -> u32 {
    eight / 8 * (tokens * warpgroup::ROW_BYTES) + warpgroup::operand_offset(token, eight % 8)
}

/// What a lane does when lanes of a row exchange weights.
#[derive(Clone, Copy)]
struct Exchange {
    /// Bit 1 of the lane's number.
    upper: bool,
    /// By bit 0: what brings nibbles to their places in two words, and those that stay.
    shifts: [u32; 2],
    keep: u32,
}

impl Exchange {
    #[inline(always)]
    fn of(lane: u32) -> Exchange {
        let odd = lane & 1;
        Exchange {
            upper: lane & 2 != 0,
            shifts: [4 - 4 * odd, 4 * odd],
            keep: 0x0f0f_0f0f << (4 * odd),
        }
    }
}

/// Two words of a lane, for columns 8q + 4s and the three after it of 32, s the word's number: those of
/// columns 16s + 2q, 2q + 1, 2q + 8 and 2q + 9. Low nibbles of a word are its first two columns.
///
/// Column 8a + 4b + 2c + d moves from lane a, word b, nibble c to where the bits of 8a + 4b + 2c, which are
/// 16s + 8n + 2q, say: first bit 1 of the lane changes places with the word, then bit 0 with the nibble.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
fn natural_order(words: [u32; 2], exchange: &Exchange) -> [u32; 2] {
    const LOW: u32 = 0x0f0f_0f0f;
    let [a, b] = words;
    let given = if exchange.upper { a } else { b };
    let got = warp::shuffle_xor_u32(warp::FULL_MASK, given, 2);
    let [a, b] = if exchange.upper { [got, b] } else { [a, got] };
    // What the other has of the first word in low nibbles, of the second in high ones.
    let given = (a >> exchange.shifts[0] & LOW) | (b << exchange.shifts[1] & !LOW);
    let got = warp::shuffle_xor_u32(warp::FULL_MASK, given, 1);
    let keep = exchange.keep;
    [
        (a & keep) | (got << exchange.shifts[0] & !keep),
        (b & keep) | (got >> exchange.shifts[1] & !keep),
    ]
}

/// Starts the products of a stage, a group each. When it returns, the last may be under way.
///
/// # Safety
/// All threads of the warpgroup call it; the stage is there, fenced, and stays until a wait.
#[inline(always)]
unsafe fn multiply<const SUMS: usize, const MINS: bool>(
    args: &Args,
    stage: &Stage,
    place: &Place,
    base: shared::Shared,
    at: u32,
    sums: &mut Sums<SUMS>,
) where
    Sums<SUMS>: Product<SUMS>,
{
    let shift = args.group_shift;
    let tile = at + place.tile * TILE_BYTES + place.lane * 16;
    let pairs = place.tile * scale_bytes(shift) + ((place.lane / 4) << (9 - shift));
    let scales = at + stage.scales + pairs;
    let mins = scales + (stage.mins - stage.scales);
    let x = at + stage.x;
    let half_bytes = 2 * SUMS as u32 * warpgroup::ROW_BYTES;
    let mut words = [0u32; 4];
    let mut group = Group::SYMMETRIC;
    // SAFETY: by the caller's promise.
    unsafe {
        unroll!(Q < 4 => {
            let quarter = Q as u32;
            if Q % 2 == 0 {
                let [a, b, c, d] =
                    ptx::ld_shared_v4_u32(base, tile + quarter / 2 * (TILE_BYTES / 2));
                let [a, b] = natural_order([a, b], &place.exchange);
                let [c, d] = natural_order([c, d], &place.exchange);
                words = [a, b, c, d];
            }
            let offset = (quarter * 32) >> shift << 2;
            group = group.load::<MINS>(base, scales + offset, mins + offset, place.zeros);
            unroll!(S < 2 => {
                let a = weights(words[Q % 2 * 2 + S], place.halves, &group);
                let b = Operand::new(base.offset_bytes(x + quarter / 2 * half_bytes));
                warpgroup::fence();
                sums.multiply_add(a, b.step(quarter % 2 * 2 + S as u32));
                warpgroup::commit();
                // The registers of the product before this one are free for the next.
                warpgroup::wait::<1>();
            });
        });
    }
}

/// Where a warp stands, and what is the same for all its stages.
#[derive(Clone, Copy)]
struct Place {
    lane: u32,
    /// Row tile in the block: the warp's number.
    tile: u32,
    exchange: Exchange,
    halves: u32,
    zeros: u32,
}

/// The body of every entry: `THREADS / 128` warpgroups, `2 SUMS` tokens, `NT` eights of them, a ring of
/// `STAGES` stages; with `MINS` there are minima or zeros.
///
/// # Safety
/// Launched as the plan says.
#[inline(always)]
pub(super) unsafe fn gemm<
    const THREADS: u32,
    const SUMS: usize,
    const NT: usize,
    const STAGES: u32,
    const MINS: bool,
>(
    args: &Args,
) where
    Sums<SUMS>: Product<SUMS>,
{
    let tokens = 2 * SUMS as u32;
    let thread = thread::thread_idx_x();
    let lane = thread % 32;
    // From lane 0, so that the assembler sees that the whole warp agrees on it.
    let number = warp::shuffle_idx_u32(warp::FULL_MASK, thread / 32, 0);
    let place = Place {
        lane,
        tile: number,
        exchange: Exchange::of(lane),
        // In a register, which it stays in where the compiler does not see that nothing is taken off.
        halves: HALVES_1024 - (number >> 5),
        zeros: args.zeros_mask(),
    };
    let base = shared::dynamic_shared_mem();
    let stage = stage(THREADS / 32, tokens, args.group_shift, MINS);
    let work = Work::in_order(args, tokens);
    let (first, end) = work.depth(args);
    let ring = STAGES * stage.bytes;
    let next = |at: u32| {
        let next = at + stage.bytes;
        if next == ring { 0 } else { next }
    };

    ptx::griddep_launch();
    ptx::griddep_wait();
    let mut sums = Sums::<SUMS>::zeros();
    // SAFETY: the plan checked the buffers and gave the stages. A barrier stands between the arrival of a
    // stage and its products; those of the stage before the last are over at the barrier, and what is
    // copied then takes its place.
    unsafe {
        let x_offset = |token, eight| x_offset(tokens, token, eight);
        let mut feed =
            Feed::<THREADS, { warpgroup::ROW_BYTES }>::new(args, &work, thread, tokens, x_offset);
        let mut into = 0;
        let mut ahead = first;
        unroll!(I < 8 => {
            if I as u32 + 2 < STAGES {
                if ahead < end {
                    feed.bring(args, &stage, tokens, thread, base, into);
                }
                // Also an empty group counts.
                ptx::cp_async_commit();
                (into, ahead) = (into + stage.bytes, ahead + 1);
            }
        });
        let mut at = 0;
        let mut tile = first;
        // Every part has a tile. A loop that might not run at all would define the sums beside it, in the
        // middle of what is under way, and the assembler would wait after each product.
        loop {
            match STAGES {
                3 => ptx::cp_async_wait::<0>(),
                4 => ptx::cp_async_wait::<1>(),
                _ => ptx::cp_async_wait::<2>(),
            }
            warpgroup::fence_shared();
            thread::sync_threads();
            if ahead < end {
                feed.bring(args, &stage, tokens, thread, base, into);
            }
            ptx::cp_async_commit();
            (into, ahead) = (next(into), ahead + 1);
            multiply::<SUMS, MINS>(args, &stage, &place, base, at, &mut sums);
            (at, tile) = (next(at), tile + 1);
            if tile >= end {
                break;
            }
        }
        warpgroup::wait::<0>();
        let mut sums = by_product::<SUMS, NT>(sums.values());
        let one_of = work.parts > 1;
        if one_of && !add_up::<NT, THREADS>(args, &work, base, thread, &mut sums) {
            return;
        }
        let row_tile = work.row_block * (THREADS / 32) + place.tile;
        store(args, row_tile, work.token_tile * tokens, lane, &mut sums);
    }
}

/// A thread's sums, four of each eight tokens.
#[inline(always)]
fn by_product<const SUMS: usize, const NT: usize>(sums: [f32; SUMS]) -> [[f32; 4]; NT] {
    let mut tiles = [[0.0; 4]; NT];
    unroll!(N < (NT) => {
        unroll!(I < 4 => {
            tiles[N % NT][I] = sums[(4 * N + I) % SUMS];
        });
    });
    tiles
}

#[cfg(test)]
mod tests {
    use super::*;
    use cuda_std::emulator::{Buffer, Launch, launch};

    /// Two words of a lane, with a value for each column of 32 and row of two; `column` of word, nibble.
    fn words(column: impl Fn(u32, u32) -> u32, value: impl Fn(u32, u32) -> u32) -> [u32; 2] {
        [0, 1].map(|word| {
            let nibbles = (0..8).map(|i| value(column(word, i), i >> 1 & 1) << (4 * i));
            nibbles.fold(0, |word, nibble| word | nibble)
        })
    }

    #[test]
    fn columns_come_to_their_lanes() {
        // Bit 0 of a nibble's number: the upper two columns; bit 1: row g + 8; bit 2: the second column.
        let tiled = |q: u32| move |word: u32, i: u32| 8 * q + 4 * word + 2 * (i & 1) + i / 4;
        let natural = |q: u32| move |word: u32, i: u32| 16 * word + 8 * (i & 1) + 2 * q + i / 4;
        // Columns have five bits: the lower and the upper four, one after the other.
        for bit in [0, 1] {
            let value = |column: u32, row: u32| (column >> bit & 15) ^ (5 * row);
            let out = Buffer::<u32>::uninit(64);
            launch("exchange", &Launch::linear(1, 32), || {
                let lane = thread::thread_idx_x();
                let words = words(tiled(lane % 4), value);
                for (i, word) in natural_order(words, &Exchange::of(lane))
                    .into_iter()
                    .enumerate()
                {
                    // SAFETY: the emulator checks the access.
                    unsafe {
                        ptx::st_global_u32(
                            out.as_mut_ptr().wrapping_add(2 * lane as usize + i),
                            word,
                        )
                    };
                }
            })
            .unwrap();
            let got = out.to_vec().unwrap();
            for lane in 0..32 {
                let want = words(natural(lane as u32 % 4), value);
                assert_eq!(got[2 * lane..2 * lane + 2], want, "lane {lane}");
            }
        }
    }
}
