//! Block-wide reductions in a fixed order: two runs give identical bits.

use cuda_std::shared::Shared;
use cuda_std::{thread, warp};

use crate::ptx;

/// Shared memory that [`block_sum_f32`] needs, bytes: a float a warp, 32 warps at most.
#[cfg(not(target_arch = "nvptx64"))]
pub const SCRATCH_BYTES: u32 = 32 * 4;

/// Shared memory that [`block_sum_twofold`] needs, bytes: two floats a warp.
#[cfg(not(target_arch = "nvptx64"))]
pub const TWOFOLD_SCRATCH_BYTES: u32 = 2 * SCRATCH_BYTES;

/// Sum of `value` over the block, given to every thread. The block is a multiple of 32 threads.
///
/// # Safety
/// Every thread of the block calls it, and `scratch` is [`SCRATCH_BYTES`] of shared memory that no
/// thread touches until the next barrier.
#[inline(always)]
pub unsafe fn block_sum_f32(value: f32, scratch: Shared) -> f32 {
    let lane = warp::lane_id();
    let warps = thread::block_dim_x() / 32;
    let sum = warp::reduce_sum_f32(value);
    if lane == 0 {
        // SAFETY: a warp index is below 32, so the slot lies in the scratch.
        unsafe { ptx::st_shared_f32(scratch, warp::warp_id() * 4, sum) };
    }
    thread::sync_threads();
    let mut partial = 0.0;
    if lane < warps {
        // SAFETY: each of the block's warps has written its slot before the barrier.
        partial = unsafe { ptx::ld_shared_f32(scratch, lane * 4) };
    }
    warp::reduce_sum_f32(partial)
}

/// A number as the sum of two floats, the second what the first lost in rounding: 48 bits. Summed so, other
/// orders give the same float in the end, but for one in millions.
#[derive(Clone, Copy)]
pub struct Twofold {
    sum: f32,
    lost: f32,
}

impl Twofold {
    pub const ZERO: Twofold = Twofold {
        sum: 0.0,
        lost: 0.0,
    };

    /// `self + other` (the error of an addition: Knuth, TAOCP 2, 4.2.2).
    #[inline(always)]
    fn plus(self, other: Twofold) -> Twofold {
        let sum = self.sum + other.sum;
        let moved = sum - self.sum;
        let lost = (self.sum - (sum - moved)) + (other.sum - moved);
        Twofold {
            sum,
            lost: self.lost + other.lost + lost,
        }
    }

    /// `self + x²`.
    #[inline(always)]
    pub fn plus_square(self, x: f32) -> Twofold {
        let sum = x * x;
        let lost = ptx::fma(x, x, -sum);
        self.plus(Twofold { sum, lost })
    }

    #[inline(always)]
    fn warp_sum(self) -> Twofold {
        let total = self.plus(self.of_lane(16));
        let total = total.plus(total.of_lane(8));
        let total = total.plus(total.of_lane(4));
        let total = total.plus(total.of_lane(2));
        total.plus(total.of_lane(1))
    }

    /// That of the lane whose number differs in `mask`.
    #[inline(always)]
    fn of_lane(self, mask: u32) -> Twofold {
        Twofold {
            sum: warp::shuffle_xor_f32(warp::FULL_MASK, self.sum, mask),
            lost: warp::shuffle_xor_f32(warp::FULL_MASK, self.lost, mask),
        }
    }
}

/// As [`block_sum_f32`], of numbers of two floats, rounded at the end.
///
/// # Safety
/// As [`block_sum_f32`], with [`TWOFOLD_SCRATCH_BYTES`].
#[inline(always)]
pub unsafe fn block_sum_twofold(value: Twofold, scratch: Shared) -> f32 {
    let lane = warp::lane_id();
    let warps = thread::block_dim_x() / 32;
    let total = value.warp_sum();
    if lane == 0 {
        let slot = warp::warp_id() * 8;
        // SAFETY: a warp index is below 32, so both slots lie in the scratch.
        unsafe {
            ptx::st_shared_f32(scratch, slot, total.sum);
            ptx::st_shared_f32(scratch, slot + 4, total.lost);
        }
    }
    thread::sync_threads();
    let mut partial = Twofold::ZERO;
    if lane < warps {
        // SAFETY: each of the block's warps has written its slots before the barrier.
        unsafe {
            partial.sum = ptx::ld_shared_f32(scratch, lane * 8);
            partial.lost = ptx::ld_shared_f32(scratch, lane * 8 + 4);
        }
    }
    let total = partial.warp_sum();
    total.sum + total.lost
}
