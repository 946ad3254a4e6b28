//! What becomes of a block's sums: parts of K are added up, and y is written.

use cuda_std::shared::Shared;

use super::block::{Args, TILE_ROWS, Work};
use super::{FLAG_ACCUMULATE, FLAG_HALF_Y, FLAG_SWIGLU, MAX_PARTS};
use crate::arrive::last_to_arrive;
use crate::unroll::unroll;
use crate::{ptx, swiglu};

/// Parts whose sums a thread loads at a time, of so many products: as many as there are registers for.
const fn batch(products: usize) -> usize {
    match products {
        1 => BATCH,
        2 => 6,
        3 | 4 => 4,
        _ => 2,
    }
}

/// The most of them.
const BATCH: usize = MAX_PARTS as usize;

/// Leaves the sums of a thread of `THREADS` of a block that does a part of its tile's work: four of each
/// product, next to those of the other threads. Whether the block is the last of its tile: it gets the sums
/// of all parts, in their order.
///
/// # Safety
/// All threads of the block call it, launched as the plan says; nobody reads the first word at `base`.
#[inline(always)]
pub(super) unsafe fn add_up<const NT: usize, const THREADS: u32>(
    args: &Args,
    work: &Work,
    base: Shared,
    thread: u32,
    sums: &mut [[f32; 4]; NT],
) -> bool {
    let step = 4 * THREADS as usize;
    let place = |part: u32| {
        let block = (work.split_tile * work.parts + part) as usize * (NT * step);
        args.partials.wrapping_add(block + 4 * thread as usize)
    };
    // SAFETY: by the caller's promise; others' sums are read when all have left theirs.
    unsafe {
        let own = place(work.part);
        unroll!(N < (NT) => {
            ptx::st_global_v4_f32(own.wrapping_add(N * step), sums[N % NT]);
        });
        let arrived = args.arrived.wrapping_add(work.split_tile as usize);
        if !last_to_arrive(arrived, work.parts, base) {
            return false;
        }
        *sums = [[0.0; 4]; NT];
        let mut part = 0;
        while part < work.parts {
            // Sums of some parts are on their way at a time.
            let mut loaded = [[[0.0f32; 4]; NT]; BATCH];
            unroll!(P < (batch(NT)) => {
                let there = part + (P as u32) < work.parts;
                let from = place(part + P as u32).cast_const();
                unroll!(N < (NT) => {
                    let from = from.wrapping_add(N * step);
                    loaded[P % BATCH][N % NT] = ptx::ld_global_v4_f32_if(there, from, [0.0; 4]);
                });
            });
            unroll!(P < (batch(NT)) => {
                unroll!(N < (NT) => {
                    unroll!(I < 4 => {
                        sums[N % NT][I] += loaded[P % BATCH][N % NT][I];
                    });
                });
            });
            part += batch(NT) as u32;
        }
    }
    true
}

/// Where an element of y lies.
#[derive(Clone, Copy)]
pub(super) struct Output {
    /// Whether it is one.
    there: bool,
    row: u32,
    token: u32,
}

impl Output {
    /// Element I (a row and a token of two each) of a lane's part of a product.
    #[inline(always)]
    fn of(args: &Args, [row, token]: [u32; 2], i: usize) -> Output {
        Output::new(args, row + i as u32 / 2 * 8, token + i as u32 % 2)
    }

    #[inline(always)]
    pub fn new(args: &Args, row: u32, token: u32) -> Output {
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
            sum + self.before(args)
        }
    }

    /// What y was, if it is added to.
    ///
    /// # Safety
    /// Launched as the plan says.
    #[inline(always)]
    pub unsafe fn before(&self, args: &Args) -> f32 {
        if args.flags & FLAG_ACCUMULATE == 0 {
            return 0.0;
        }
        let y = args.y.wrapping_add(self.index(args)).cast_const();
        // SAFETY: the load is made only where the element is there.
        unsafe { ptx::ld_global_f32_if(self.there, y, 0.0) }
    }

    /// # Safety
    /// Launched as the plan says.
    #[inline(always)]
    pub unsafe fn store(&self, args: &Args, value: f32) {
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

/// Writes the warp's part of y, or what its pairs of gate and up come to: of a row tile and the tokens from
/// `token` on.
///
/// # Safety
/// Launched as the plan says.
#[inline(always)]
pub(super) unsafe fn store<const NT: usize>(
    args: &Args,
    row_tile: u32,
    token: u32,
    lane: u32,
    sums: &mut [[f32; 4]; NT],
) {
    let first_token = token + 2 * (lane % 4);
    let swiglu = args.flags & FLAG_SWIGLU != 0;
    let outputs = if swiglu { TILE_ROWS / 2 } else { TILE_ROWS };
    let row = row_tile * outputs + lane / 4;
    // The loads of four products, then their stores: few registers, and few loads that wait for stores.
    unroll!(C < 4 => {
        if 4 * C < NT {
            if !swiglu {
                unroll!(J < 4 => {
                    unroll!(I < 4 => {
                        if 4 * C + J < NT {
                            let token = first_token + (4 * C + J) as u32 * 8;
                            let output = Output::of(args, [row, token], I);
                            // SAFETY: passed on.
                            sums[(4 * C + J) % NT][I] += unsafe { output.addend(args) };
                        }
                    });
                });
            }
            unroll!(J < 4 => {
                if 4 * C + J < NT {
                    let sum = sums[(4 * C + J) % NT];
                    unroll!(I < 4 => {
                        let token = first_token + (4 * C + J) as u32 * 8;
                        let output = Output::of(args, [row, token], I);
                        // SAFETY: passed on.
                        unsafe {
                            if !swiglu {
                                output.store(args, sum[I]);
                            } else if I < 2 {
                                output.store(args, swiglu::gated(sum[I], sum[I % 2 + 2]));
                            }
                        }
                    });
                }
            });
        }
    });
}
