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
//! [`block`](super::block), for a group of products at a time while the group before runs: two sets of
//! registers take turns. What is to be multiplied next is asked for when a group is under way, too, so the
//! barrier between stages leaves no unit idle.

use cuda_std::warpgroup::{self, Operand, Product, Sums};
use cuda_std::{shared, thread, warp};

use super::super::gemv_int4_mma::tile::HALVES_1024;
use super::block::{Args, Group, Stage, TILE_BYTES, Work, scale_bytes, weights};
use super::feed::Feed;
use super::gather::finish;
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

/// Where a warp stands, and what is the same for all its stages.
#[derive(Clone, Copy)]
struct Place {
    lane: u32,
    /// Row tile in the block: the warp's number.
    tile: u32,
    exchange: Exchange,
    halves: u32,
    zeros: u32,
    group_shift: u32,
}

/// What a lane needs of a row tile for the weights of `P` products.
#[derive(Clone, Copy)]
struct Packed<const P: usize> {
    words: [u32; P],
    /// Of each 32 columns; where there are 32, the second is the first.
    groups: [Group; 2],
}

impl<const P: usize> Packed<P> {
    /// Of the products from `P part` on of the stage at `at`.
    ///
    /// # Safety
    /// The stage is there.
    #[inline(always)]
    unsafe fn load<const MINS: bool>(
        stage: &Stage,
        place: &Place,
        base: shared::Shared,
        at: u32,
        part: u32,
    ) -> Packed<P> {
        let shift = place.group_shift;
        let quarter = part * P as u32 / 2;
        let from = at + place.tile * TILE_BYTES + place.lane * 16 + quarter / 2 * (TILE_BYTES / 2);
        let pairs = place.tile * scale_bytes(shift) + ((place.lane / 4) << (9 - shift));
        let scales = at + stage.scales + pairs;
        let mins = scales + (stage.mins - stage.scales);
        let mut words = [0u32; P];
        let mut groups = [Group::SYMMETRIC; 2];
        // SAFETY: by the caller's promise.
        unsafe {
            if P == 4 {
                let loaded = ptx::ld_shared_v4_u32(base, from);
                unroll!(I < 4 => { words[I % P] = loaded[I]; });
            } else {
                let loaded = ptx::ld_shared_v2_u32(base, from + quarter % 2 * 8);
                unroll!(I < 2 => { words[I % P] = loaded[I]; });
            }
            unroll!(I < 2 => {
                if 2 * I < P {
                    let offset = ((quarter + I as u32) * 32) >> shift << 2;
                    groups[I] = Group::SYMMETRIC
                        .load::<MINS>(base, scales + offset, mins + offset, place.zeros);
                }
            });
        }
        Packed { words, groups }
    }

    /// Operand A of the products. All lanes of the warp call it.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn weights(&self, place: &Place) -> [[u32; 4]; P] {
        let mut a = [[0; 4]; P];
        unroll!(I < 2 => {
            if 2 * I < P {
                let words = [self.words[2 * I % P], self.words[(2 * I + 1) % P]];
                let words = natural_order(words, &place.exchange);
                unroll!(S < 2 => {
                    a[(2 * I + S) % P] = weights(words[S], place.halves, &self.groups[I]);
                });
            }
        });
        a
    }
}

/// The body of every entry: `THREADS / 128` warpgroups, `2 SUMS` tokens, a ring of `STAGES` stages, groups of
/// `P` products, 2 or 4; with `MINS` there are minima or zeros.
///
/// # Safety
/// Launched as the plan says.
#[inline(always)]
pub(super) unsafe fn gemm<
    const THREADS: u32,
    const SUMS: usize,
    const STAGES: u32,
    const P: usize,
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
        group_shift: args.group_shift,
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
    let half_bytes = tokens * warpgroup::ROW_BYTES;

    let mut sums = Sums::zeros();
    // SAFETY: the plan checked the buffers and gave the stages; a barrier stands between the arrival of a
    // stage and its products; those of the stage before are over at the barrier, and what is copied then
    // takes its place.
    unsafe {
        let x_offset = |token, eight| x_offset(tokens, token, eight);
        let mut feed =
            Feed::<THREADS, { warpgroup::ROW_BYTES }>::new(args, &work, thread, tokens, x_offset);
        ptx::griddep_launch();
        // What no launch writes is asked for while others may still run.
        unroll!(I < 4 => {
            let into = I as u32 * stage.bytes;
            if I as u32 + 1 < STAGES && first + (I as u32) < end {
                feed.bring_weights(args, &stage, thread, base, into);
            }
        });
        ptx::griddep_wait();
        unroll!(I < 4 => {
            let into = I as u32 * stage.bytes;
            if I as u32 + 1 < STAGES {
                if first + (I as u32) < end {
                    feed.bring_x(args, &stage, tokens, thread, base, into);
                }
                // Also an empty group counts.
                ptx::cp_async_commit();
            }
        });
        let (mut into, mut ahead) = ((STAGES - 1) * stage.bytes, first + STAGES - 1);
        wait_for_all_but(STAGES - 2);
        warpgroup::fence_shared();
        thread::sync_threads();
        let mut at = 0;
        let mut tile = first;
        let mut a = [[[0; 4]; P]; 2];
        a[0] = Packed::<P>::load::<MINS>(&stage, &place, base, at, 0).weights(&place);
        // Every part has a tile. A loop that might not run at all would define the sums beside it, in the
        // middle of what is under way, and the assembler would wait after each product.
        loop {
            // While a group of products runs, the weights of the next are made.
            unroll!(I < 4 => {
                if I < 8 / P {
                    let product = (I * P) as u32;
                    let b = at + stage.x + product / 4 * half_bytes;
                    let b = Operand::new(base.offset_bytes(b));
                    warpgroup::fence();
                    unroll!(S < 4 => {
                        if S < P {
                            let b = b.step(product % 4 + S as u32);
                            sums.multiply_add(a[I % 2][S % P], b);
                        }
                    });
                    warpgroup::commit();
                    if I + 1 < 8 / P {
                        let next = Packed::<P>::load::<MINS>(&stage, &place, base, at, I as u32 + 1);
                        // The registers of the group before this one are free for the next.
                        warpgroup::wait::<1>();
                        a[(I + 1) % 2] = next.weights(&place);
                    }
                }
            });
            tile += 1;
            if tile >= end {
                break;
            }
            at = next(at);
            wait_for_all_but(STAGES - 3);
            warpgroup::fence_shared();
            thread::sync_threads();
            if ahead < end {
                feed.bring(args, &stage, tokens, thread, base, into);
            }
            ptx::cp_async_commit();
            (into, ahead) = (next(into), ahead + 1);
            let packed = Packed::<P>::load::<MINS>(&stage, &place, base, at, 0);
            warpgroup::wait::<1>();
            a[0] = packed.weights(&place);
        }
        warpgroup::wait::<0>();
        // Others may be reading the stages that y takes the place of.
        thread::sync_threads();
        finish::<THREADS, SUMS>(args, &work, base, thread, &sums.values());
    }
}

/// Waits until at most so many stages are under way: 0, 1 or 2.
#[inline(always)]
fn wait_for_all_but(stages: u32) {
    match stages {
        0 => ptx::cp_async_wait::<0>(),
        1 => ptx::cp_async_wait::<1>(),
        _ => ptx::cp_async_wait::<2>(),
    }
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
