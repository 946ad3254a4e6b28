//! Asynchronous copies from global to shared memory, and what reads matrices from there.

#[cfg(target_arch = "nvptx64")]
use core::arch::asm;
#[cfg(not(target_arch = "nvptx64"))]
use cuda_std::emulator::access;
use cuda_std::shared::Shared;

#[cfg(all(target_arch = "nvptx64", not(target_feature = "sm_80")))]
use super::super::{ld_global_u32, ld_global_v4_u32_if, st_shared_u32, st_shared_v4_u32};

/// Starts a copy from global to shared memory that does not go through registers; see
/// [`cp_async_commit`] and [`cp_async_wait`].
macro_rules! copy_async {
    ($($(#[$doc:meta])* $name:ident: $bytes:literal = $instruction:literal;)*) => {$(
        $(#[$doc])*
        ///
        /// Below sm_80 the bytes are there at once.
        ///
        /// # Safety
        /// The bytes at `p` are aligned, in bounds, initialised global memory that stays as it is
        /// until the copy is waited for; `base` + `offset_bytes` is aligned and inside the block's
        /// shared memory, and no other thread touches it before that and a barrier.
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub unsafe fn $name(base: Shared, offset_bytes: u32, p: *const u32) {
            // SAFETY: the caller vouches for both addresses; the block is a memory clobber.
            #[cfg(all(target_arch = "nvptx64", target_feature = "sm_80"))]
            unsafe {
                let address = base.offset_bytes(offset_bytes).address();
                asm!($instruction, in(reg32) address, in(reg64) p, options(nostack));
            }
            // SAFETY: as above.
            #[cfg(all(target_arch = "nvptx64", not(target_feature = "sm_80")))]
            unsafe {
                let mut at = 0;
                while at < $bytes / 4 {
                    let word = ld_global_u32(p.wrapping_add(at as usize));
                    st_shared_u32(base, offset_bytes + 4 * at, word);
                    at += 1;
                }
            }
            #[cfg(not(target_arch = "nvptx64"))]
            access::copy_async::<[u32; $bytes / 4]>(
                base.offset_bytes(offset_bytes).address(),
                Some(p.cast()),
            );
        }
    )*};
}

copy_async! {
    /// `cp.async.ca.shared.global` of 4 bytes.
    cp_async_4: 4 = "cp.async.ca.shared.global [{}], [{}], 4;";
    /// `cp.async.ca.shared.global` of 8 bytes.
    cp_async_8: 8 = "cp.async.ca.shared.global [{}], [{}], 8;";
    /// `cp.async.cg.shared.global` of 16 bytes, past L1.
    cp_async_16: 16 = "cp.async.cg.shared.global [{}], [{}], 16;";
    /// `cp.async.ca.shared.global.L2::256B` of 8 bytes: what follows them is wanted in L2.
    cp_async_8_onward: 8 = "cp.async.ca.shared.global.L2::256B [{}], [{}], 8;";
    /// `cp.async.cg.shared.global.L2::256B` of 16 bytes: what follows them is wanted in L2.
    cp_async_16_onward: 16 = "cp.async.cg.shared.global.L2::256B [{}], [{}], 16;";
}

/// As [`cp_async_16`] where `there` holds; elsewhere zeros arrive, and `p` is not read.
///
/// # Safety
/// As [`cp_async_16`]; of `p` only if `there` holds.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn cp_async_16_or_zero(there: bool, base: Shared, offset_bytes: u32, p: *const u32) {
    // SAFETY: the caller vouches for both addresses; the block is a memory clobber.
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_80"))]
    unsafe {
        let address = base.offset_bytes(offset_bytes).address();
        let bytes = if there { 16 } else { 0 };
        asm!("cp.async.cg.shared.global [{}], [{}], 16, {};",
            in(reg32) address, in(reg64) p, in(reg32) bytes, options(nostack));
    }
    // SAFETY: as above.
    #[cfg(all(target_arch = "nvptx64", not(target_feature = "sm_80")))]
    unsafe {
        st_shared_v4_u32(base, offset_bytes, ld_global_v4_u32_if(there, p, [0; 4]));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    access::copy_async::<[u32; 4]>(
        base.offset_bytes(offset_bytes).address(),
        there.then_some(p.cast()),
    );
}

/// `ldmatrix.x4.trans` by all 32 lanes: four matrices of 8 by 8 halves. Lane l names row `l % 8` of
/// matrix `l / 8`, 16 bytes at `base` + `offset_bytes`; lane `4g + q` gets of each matrix elements g
/// of the rows 2q and 2q + 1: operand B of a product, where matrices are stored row by row.
///
/// # Safety
/// As [`ld_shared_u32`], for 16 bytes; all lanes of the warp call it.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub unsafe fn ldmatrix_x4_trans(base: Shared, offset_bytes: u32) -> [u32; 4] {
    let address = base.offset_bytes(offset_bytes).address();
    #[cfg(target_arch = "nvptx64")]
    {
        let (a, b, c, d);
        // SAFETY: the caller vouches for the address. Not `pure`: it must stay where the warp is whole.
        unsafe {
            asm!("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{}, {}, {}, {}}}, [{}];",
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) address,
                options(readonly, nostack));
        }
        [a, b, c, d]
    }
    #[cfg(not(target_arch = "nvptx64"))]
    access::load_matrices_transposed(address)
}

/// `cp.async.commit_group`: the copies that this thread started since the last one are a group.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn cp_async_commit() {
    // SAFETY: a memory clobber, so that no copy moves across it.
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_80"))]
    unsafe {
        asm!("cp.async.commit_group;", options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    access::commit_copies();
}

/// `cp.async.wait_group`: waits until at most the last `N` groups of this thread are under way. What
/// the others copied, this thread sees; other threads see it after a barrier.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn cp_async_wait<const N: u32>() {
    // SAFETY: a memory clobber, so that no load moves across it.
    #[cfg(all(target_arch = "nvptx64", target_feature = "sm_80"))]
    unsafe {
        asm!("cp.async.wait_group {};", const N, options(nostack));
    }
    #[cfg(not(target_arch = "nvptx64"))]
    access::wait_for_copies(N);
}
