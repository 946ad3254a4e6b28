//! The barrier of a whole grid, for cooperative launches.

use crate::{atomic, thread};

/// The bit of the counter that flips each time the whole grid has arrived.
const PHASE: u32 = 1 << 31;

/// Grid barrier: waits for every thread of every block, and makes what they wrote to global memory
/// before it visible to all of them after it.
///
/// `counter` is one `u32`, zero before its first use and used for nothing else. It needs no reset
/// between barriers or launches: each barrier adds exactly 2^31 (block 0 adds
/// 2^31 - (blocks - 1), every other block 1), so the top bit flips when the last block has arrived
/// and the low bits are back at zero. At most 2^31 blocks.
///
/// All blocks have to be resident at once: only in a cooperative launch. Data written before the
/// barrier by other blocks must not be read through `ld.global.nc` after it.
///
/// # Safety
/// `counter` is a 4-byte aligned address of global memory; every thread of the grid reaches this
/// call.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn sync(counter: *mut u32) {
    thread::sync_threads();
    if thread::thread_rank() == 0 {
        let block = thread::block_idx_x() | thread::block_idx_y() | thread::block_idx_z();
        let blocks = thread::grid_dim_x() * thread::grid_dim_y() * thread::grid_dim_z();
        let arrival = if block == 0 { PHASE - (blocks - 1) } else { 1 };
        // The fence releases what the block wrote: the barrier above ordered it before this thread.
        atomic::fence_acq_rel_gpu();
        // SAFETY: the caller vouches for the address, and only this barrier uses it.
        let before = unsafe { atomic::add_relaxed_gpu_u32(counter, arrival) };
        // SAFETY: as above.
        while (unsafe { atomic::load_acquire_gpu_u32(counter) } ^ before) & PHASE == 0 {}
    }
    thread::sync_threads();
}
