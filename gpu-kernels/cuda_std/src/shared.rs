//! Dynamic shared memory: a range per block whose size is given at launch.

use crate::ptx;

/// An address in the 32-bit shared window, as `ld.shared`, `st.shared` and `cp.async` take it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Shared(u32);

impl Shared {
    /// The address as a number.
    #[inline(always)]
    pub const fn address(self) -> u32 {
        self.0
    }

    /// The address `bytes` further on.
    #[inline(always)]
    pub const fn offset_bytes(self, bytes: u32) -> Shared {
        Shared(self.0.wrapping_add(bytes))
    }
}

/// Start of the block's dynamic shared memory, 16-byte aligned. Its contents are not initialised
/// when the block starts.
///
/// The kernel crate has to declare the symbol once: see
/// [`declare_dynamic_shared_memory!`](crate::declare_dynamic_shared_memory).
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn dynamic_shared_mem() -> Shared {
    Shared(ptx::dynamic_shared_base())
}

/// Declares the symbol of the dynamic shared memory, in the one crate whose PTX is loaded (a
/// `global_asm!` of a dependency does not reach it). Nothing on the host.
#[macro_export]
macro_rules! declare_dynamic_shared_memory {
    () => {
        #[cfg(target_arch = "nvptx64")]
        ::core::arch::global_asm!(".extern .shared .align 16 .b8 dyn_smem[];");
    };
}
