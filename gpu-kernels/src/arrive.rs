//! The last block of a group to get somewhere goes on with what all have left.

use cuda_std::shared::Shared;
use cuda_std::{atomic, thread};

use crate::ptx;

/// Counts the block as done; whether all `blocks` of the group are. The last one finds what the
/// others wrote to global memory, and leaves the counter at zero for the next launch.
///
/// # Safety
/// All threads of the block call it, each block once. `arrived` is the group's counter, zero before
/// the launch; `flag` is a word of shared memory that nothing else uses meanwhile.
#[inline(always)]
pub(crate) unsafe fn last_to_arrive(arrived: *mut u32, blocks: u32, flag: Shared) -> bool {
    // SAFETY: the word is between barriers.
    unsafe {
        thread::sync_threads();
        if thread::thread_idx_x() == 0 {
            // Releases what the block wrote, ordered before this thread by the barrier, and
            // acquires what the others wrote, for the block by the barrier below.
            atomic::fence_acq_rel_gpu();
            let before = atomic::add_relaxed_gpu_u32(arrived, 1);
            atomic::fence_acq_rel_gpu();
            let last = before + 1 == blocks;
            if last {
                ptx::st_global_u32(arrived, 0);
            }
            ptx::st_shared_u32(flag, 0, u32::from(last));
        }
        thread::sync_threads();
        ptx::ld_shared_u32(flag, 0) != 0
    }
}
