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

/// Start of the block's dynamic shared memory, aligned to 1,024 bytes. Its contents are not initialised
/// when the block starts.
///
/// The crate whose PTX is loaded has to declare the symbol, since a `global_asm!` of a dependency
/// does not reach it: `.extern .shared .align 1024 .b8 dyn_smem[];`
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn dynamic_shared_mem() -> Shared {
    Shared(ptx::dynamic_shared_base())
}
