//! What becomes of a block's sums: parts of K are added up, and y is written.

use cuda_std::thread;

use super::block::{Args, BLOCK_TILES, Place, TILE_ROWS};
use super::{BLOCK_THREADS, FLAG_ACCUMULATE, FLAG_HALF_Y, FLAG_SWIGLU};
use crate::unroll::unroll;
use crate::{ptx, swiglu};

/// Leaves a thread's sums: four of each product, next to those of the other threads.
///
/// # Safety
/// `to` has room for the block's sums.
#[inline(always)]
pub(super) unsafe fn leave<const MT: usize, const NT: usize>(
    to: *mut f32,
    place: &Place,
    sums: &[[[f32; 4]; NT]; MT],
) {
    unroll!(M < (MT) => {
        unroll!(N < (NT) => {
            let at = ((M * NT + N) as u32 * BLOCK_THREADS + place.thread) * 4;
            // SAFETY: by the caller's promise.
            unsafe { ptx::st_global_v4_f32(to.wrapping_add(at as usize), sums[M % MT][N % NT]) };
        });
    });
}

/// Adds what a part has left to the sums.
///
/// # Safety
/// All blocks of the tile have left theirs.
#[inline(always)]
pub(super) unsafe fn add<const MT: usize, const NT: usize>(
    from: *const f32,
    place: &Place,
    sums: &mut [[[f32; 4]; NT]; MT],
) {
    unroll!(M < (MT) => {
        unroll!(N < (NT) => {
            let at = ((M * NT + N) as u32 * BLOCK_THREADS + place.thread) * 4;
            // SAFETY: by the caller's promise.
            let part = unsafe { ptx::ld_global_v4_f32(from.wrapping_add(at as usize)) };
            let sum = &mut sums[M % MT][N % NT];
            *sum = [sum[0] + part[0], sum[1] + part[1], sum[2] + part[2], sum[3] + part[3]];
        });
    });
}

/// Where an element of y lies.
#[derive(Clone, Copy)]
struct Output {
    /// Whether it is one.
    there: bool,
    row: u32,
    token: u32,
}

impl Output {
    /// Element I (a row and a token of two each) of a lane's part of a product.
    #[inline(always)]
    fn of(args: &Args, [row, token]: [u32; 2], i: usize) -> Output {
        let (row, token) = (row + i as u32 / 2 * 8, token + i as u32 % 2);
        Output {
            there: row < args.rows && token < args.tokens,
            row,
            token,
        }
    }

    #[inline(always)]
    fn index(&self, args: &Args) -> usize {
        self.token as usize * args.rows as usize + self.row as usize
    }

    /// What is added to the product: the bias, and what y was.
    ///
    /// # Safety
    /// Launched as the plan says.
    #[inline(always)]
    unsafe fn addend(&self, args: &Args) -> f32 {
        let mut sum = 0.0;
        // SAFETY: loads are made only where the element is there.
        unsafe {
            if !args.bias.is_null() {
                let bias = args.bias.wrapping_add(self.row as usize);
                sum += ptx::ld_global_f32_if(self.there, bias, 0.0);
            }
            if args.flags & FLAG_ACCUMULATE != 0 {
                let y = args.y.wrapping_add(self.index(args)).cast_const();
                sum += ptx::ld_global_f32_if(self.there, y, 0.0);
            }
        }
        sum
    }

    /// # Safety
    /// Launched as the plan says.
    #[inline(always)]
    unsafe fn store(&self, args: &Args, value: f32) {
        if self.there {
            let at = self.index(args);
            // SAFETY: the element is there.
            unsafe {
                if args.flags & FLAG_HALF_Y != 0 {
                    let y = args.y.cast::<u16>().wrapping_add(at);
                    ptx::st_global_u16(y, ptx::f32_to_f16(value));
                } else {
                    ptx::st_global_f32(args.y.wrapping_add(at), value);
                }
            }
        }
    }
}

/// Writes the block's part of y, or what its pairs of gate and up come to.
///
/// # Safety
/// Launched as the plan says.
#[inline(always)]
pub(super) unsafe fn store<const MT: usize, const NT: usize>(
    args: &Args,
    place: &Place,
    token_0: u32,
    sums: &mut [[[f32; 4]; NT]; MT],
) {
    let first_tile = thread::block_idx_y() * BLOCK_TILES + place.row_tile;
    let first_token = token_0 + place.eight * 8 + 2 * place.q;
    let swiglu = args.flags & FLAG_SWIGLU != 0;
    let outputs = if swiglu { TILE_ROWS / 2 } else { TILE_ROWS };
    unroll!(M < (MT) => {
        let row = (first_tile + M as u32) * outputs + place.g;
        // All loads of a row tile, then all its stores: no load waits for a store.
        if !swiglu {
            unroll!(N < (NT) => {
                unroll!(I < 4 => {
                    let output = Output::of(args, [row, first_token + N as u32 * 8], I);
                    // SAFETY: passed on.
                    sums[M % MT][N % NT][I] += unsafe { output.addend(args) };
                });
            });
        }
        unroll!(N < (NT) => {
            let sum = sums[M % MT][N % NT];
            unroll!(I < 4 => {
                let output = Output::of(args, [row, first_token + N as u32 * 8], I);
                // SAFETY: passed on.
                unsafe {
                    if !swiglu {
                        output.store(args, sum[I]);
                    } else if I < 2 {
                        output.store(args, swiglu::gated(sum[I], sum[I % 2 + 2]));
                    }
                }
            });
        });
    });
}
