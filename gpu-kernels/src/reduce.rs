//! Block-wide reductions in a fixed order: two runs give identical bits.

use cuda_std::shared::Shared;
use cuda_std::{thread, warp};

use crate::ptx;

/// Shared memory that [`block_sum_f32`] needs, bytes: a float a warp, 32 warps at most.
#[cfg(not(target_arch = "nvptx64"))]
pub const SCRATCH_BYTES: u32 = 32 * 4;

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
