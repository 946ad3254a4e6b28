//! Atomics on global memory, as far as synchronisation between blocks needs them.
//!
//! These are not `core::sync::atomic`: for this target `AtomicU32::fetch_add(_, Release)` compiles
//! to a relaxed `atom.add`, and the ordering is lost.

use crate::ptx;

macro_rules! instruction {
    ($($(#[$doc:meta])* $name:ident($($argument:ident: $ty:ty),*) $(-> $result:ty)? = $instruction:ident;)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// `p` is a 4-byte aligned address of global memory that nothing else accesses without
        /// atomics at the same time.
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub unsafe fn $name($($argument: $ty),*) $(-> $result)? {
            // SAFETY: the caller's obligations are the instruction's.
            #[cfg(target_arch = "nvptx64")]
            return unsafe { ptx::$instruction($($argument),*) };
            #[cfg(not(target_arch = "nvptx64"))]
            ptx::$instruction($($argument),*)
        }
    )*};
}

instruction! {
    /// `atom.relaxed.gpu.global.add.u32`: adds, wrapping, and returns the value before. Orders
    /// nothing else.
    add_relaxed_gpu_u32(p: *mut u32, value: u32) -> u32 = atom_add_relaxed_gpu;
    /// `red.release.gpu.global.add.u32`: adds, wrapping; all writes of this thread before it, and
    /// those it has observed, are visible to whoever acquires the sum.
    red_release_gpu_add_u32(p: *mut u32, value: u32) = red_add_release_gpu;
    /// `ld.acquire.gpu.global.u32`: loads; what was released with the value is visible after it.
    /// The load to poll with.
    load_acquire_gpu_u32(p: *const u32) -> u32 = ld_acquire_gpu;
}

/// `ld.relaxed.gpu.global.v4.u32`: four words, each of which another block may be storing. Orders
/// nothing: the load to poll with where a word itself tells whether it is there.
///
/// # Safety
/// The 16 bytes at `p` are aligned, initialised global memory.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn load_relaxed_gpu_v4_u32(p: *const u32) -> [u32; 4] {
    // SAFETY: the caller's obligations are the instruction's.
    #[cfg(target_arch = "nvptx64")]
    return unsafe { ptx::ld_relaxed_gpu_v4(p) };
    #[cfg(not(target_arch = "nvptx64"))]
    ptx::ld_relaxed_gpu_v4(p)
}

/// `st.relaxed.gpu.global.v4.u32`: four words that other blocks may be loading. Each of them is
/// seen whole; nothing is said of their order.
///
/// # Safety
/// The 16 bytes at `p` are aligned global memory.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn store_relaxed_gpu_v4_u32(p: *mut u32, value: [u32; 4]) {
    // SAFETY: the caller's obligations are the instruction's.
    #[cfg(target_arch = "nvptx64")]
    return unsafe { ptx::st_relaxed_gpu_v4(p, value) };
    #[cfg(not(target_arch = "nvptx64"))]
    ptx::st_relaxed_gpu_v4(p, value)
}

/// `ld.relaxed.gpu.global.v2.u64`: two words of 8 bytes, each of which another block may be storing and
/// is seen whole. Orders nothing: the load to poll with where a word itself tells whether it is there.
///
/// # Safety
/// The 16 bytes at `p` are aligned, initialised global memory.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn load_relaxed_gpu_v2_u64(p: *const u64) -> [u64; 2] {
    // SAFETY: the caller's obligations are the instruction's.
    #[cfg(target_arch = "nvptx64")]
    return unsafe { ptx::ld_relaxed_gpu_v2_u64(p) };
    #[cfg(not(target_arch = "nvptx64"))]
    ptx::ld_relaxed_gpu_v2_u64(p)
}

/// `st.relaxed.gpu.global.u64`: a word of 8 bytes that other blocks may be loading and see whole.
///
/// # Safety
/// The 8 bytes at `p` are aligned global memory.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn store_relaxed_gpu_u64(p: *mut u64, value: u64) {
    // SAFETY: the caller's obligations are the instruction's.
    #[cfg(target_arch = "nvptx64")]
    return unsafe { ptx::st_relaxed_gpu_u64(p, value) };
    #[cfg(not(target_arch = "nvptx64"))]
    ptx::st_relaxed_gpu_u64(p, value)
}

/// `st.relaxed.gpu.global.u32`: a word that other blocks may be loading.
///
/// # Safety
/// The 4 bytes at `p` are aligned global memory.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn store_relaxed_gpu_u32(p: *mut u32, value: u32) {
    // SAFETY: the caller's obligations are the instruction's.
    #[cfg(target_arch = "nvptx64")]
    return unsafe { ptx::st_relaxed_gpu_u32(p, value) };
    #[cfg(not(target_arch = "nvptx64"))]
    ptx::st_relaxed_gpu_u32(p, value)
}

/// `fence.acq_rel.gpu`: orders this thread's accesses before it with those after it, as seen by
/// every thread of the GPU.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn fence_acq_rel_gpu() {
    ptx::fence_acq_rel_gpu();
}
