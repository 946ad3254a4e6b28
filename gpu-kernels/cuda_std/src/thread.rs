//! Where a thread stands in its block and grid, and the barrier of its block.

use crate::ptx;

macro_rules! special_register {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub fn $name() -> u32 {
            // SAFETY: reads a special register that is constant over the thread's life.
            #[cfg(target_arch = "nvptx64")]
            return unsafe { ptx::$name() as u32 };
            #[cfg(not(target_arch = "nvptx64"))]
            ptx::$name()
        }
    )*};
}

special_register! {
    /// `threadIdx.x`, in `0..block_dim_x()`.
    thread_idx_x;
    /// `threadIdx.y`, in `0..block_dim_y()`.
    thread_idx_y;
    /// `threadIdx.z`, in `0..block_dim_z()`.
    thread_idx_z;
    /// `blockIdx.x`, in `0..grid_dim_x()`.
    block_idx_x;
    /// `blockIdx.y`, in `0..grid_dim_y()`.
    block_idx_y;
    /// `blockIdx.z`, in `0..grid_dim_z()`.
    block_idx_z;
    /// Threads of a block along x.
    block_dim_x;
    /// Threads of a block along y.
    block_dim_y;
    /// Threads of a block along z.
    block_dim_z;
    /// Blocks of the grid along x.
    grid_dim_x;
    /// Blocks of the grid along y.
    grid_dim_y;
    /// Blocks of the grid along z.
    grid_dim_z;
}

/// Index of the thread in a one-dimensional grid: `block_idx_x * block_dim_x + thread_idx_x`.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn index_1d() -> u32 {
    block_idx_x() * block_dim_x() + thread_idx_x()
}

/// Index of the thread in its block, x fastest: the order in which threads fill warps.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn thread_rank() -> u32 {
    thread_idx_x() + block_dim_x() * (thread_idx_y() + block_dim_y() * thread_idx_z())
}

/// Block barrier (`bar.sync 0`): waits for every thread of the block, and makes what they wrote to
/// shared and global memory before it visible to all of them after it.
///
/// Every thread of the block has to reach the same call. On the device a barrier in divergent code
/// hangs or lets threads through early; the emulator reports it.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn sync_threads() {
    // SAFETY: a barrier touches no memory of its own; reaching it divergently is a bug of the
    // kernel, not undefined behaviour of this program's memory.
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        ptx::barrier()
    };
    #[cfg(not(target_arch = "nvptx64"))]
    ptx::barrier();
}

/// Promises the assembler that no block of the kernel has more than `N` threads: it may then use as
/// many registers as `N` threads leave each other, and no more, so that such a block can be
/// launched. Called once in the kernel, before anything else.
///
/// rustc has no attribute for it. On the device this leaves a remark in the PTX, which
/// `cuda_builder` turns into the kernel's `.maxntid`; the emulator does not check it.
#[inline(always)]
pub fn max_block_threads<const N: u32>() {
    #[cfg(target_arch = "nvptx64")]
    ptx::remark_max_threads::<N>();
}
