//! Matrix products of a warpgroup, `wgmma`: four warps next to each other, 128 threads, that multiply
//! asynchronously. Compute capability 9.0 alone: the tier `sm_90a`.
//!
//! `D += A B` with A (64, 16) halves in the warps' registers, B (16, n) halves in shared memory and
//! D (64, n) floats in the warps' registers, [`Sums`]. Warp w of the group has rows 16w .. 16w + 16, laid
//! out as [`warp::mma_m16n8k16_f16`](crate::warp::mma_m16n8k16_f16) has its A and C: with
//! `g = lane / 4` and `q = lane % 4`, value 4j + i of a lane is row `g + 8 (i / 2)`, column
//! `8j + 2q + i % 2`.
//!
//! The order in which a kernel calls these, all four warps alike:
//!
//! ```text
//! fence()              registers that the next products read or add to are written
//! multiply_add(..)     starts a product
//! commit()             what was started since the last one is a group
//! wait::<N>()          all groups but the last N are done
//! values()             what the sums have come to, when no product is under way
//! ```
//!
//! B is read by another path (the async proxy) than `ld.shared` and `st.shared` take: whoever stored or
//! copied it calls [`fence_shared`] before the barrier after which it is multiplied. It has to stay as it
//! is until the wait.
//!
//! The device's forms are `asm!` blocks with an effect, which LLVM leaves in their order; they have to
//! stand where the whole warpgroup agrees. A goes in by value: the assembler keeps its registers until the
//! wait. Should it ever warn that products are serialised (C7510 and its neighbours), something touches
//! sums between [`Sums::multiply_add`] and [`wait`].

use crate::shared::Shared;

#[cfg(target_arch = "nvptx64")]
mod ptx;

#[cfg(not(target_arch = "nvptx64"))]
use crate::emulator::warpgroup as ptx;

/// Threads of a warpgroup.
pub const THREADS: u32 = 128;

/// Bytes of a row of operand B: 64 halves.
pub const ROW_BYTES: u32 = 128;

/// Where 16 bytes, part `part` of 8, of row `row` of operand B lie: rows follow each other, with the parts
/// of a row exchanged so that eight rows hit different banks (the 128-byte swizzle).
#[inline(always)]
pub const fn operand_offset(row: u32, part: u32) -> u32 {
    row * ROW_BYTES + ((part ^ (row % 8)) * 16)
}

/// Operand B in shared memory: n columns, each a row of 64 halves at [`operand_offset`]. A product takes 16
/// of the 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operand(u64);

impl Operand {
    /// The operand that starts at `start`, a multiple of 1,024 bytes.
    #[inline(always)]
    pub const fn new(start: Shared) -> Operand {
        // Units of 16 bytes: start in bits 0 to 13, distance of eight rows in bits 32 to 45; bits 16 to 29
        // do not count with a swizzle, and 1 in bits 62 and 63 is that of 128 bytes.
        const EIGHT_ROWS: u64 = (8 * ROW_BYTES / 16) as u64;
        const SWIZZLE_128: u64 = 1;
        let start = (start.address() as u64 & 0x3_ffff) >> 4;
        Operand(start | 1 << 16 | EIGHT_ROWS << 32 | SWIZZLE_128 << 62)
    }

    /// The 16 halves of each row from `16 step` on; `step` below 4.
    #[inline(always)]
    pub const fn step(self, step: u32) -> Operand {
        Operand(self.0 + (2 * step) as u64)
    }

    /// As the instruction takes it.
    #[inline(always)]
    pub const fn descriptor(self) -> u64 {
        self.0
    }
}

/// A thread's part of D: N floats, for 2 N columns.
#[derive(Debug)]
pub struct Sums<const N: usize> {
    values: [f32; N],
    /// What the emulator knows them by.
    #[cfg(not(target_arch = "nvptx64"))]
    id: u64,
}

/// Sums for which there is a product.
pub trait Product<const N: usize> {
    /// `wgmma.mma_async.m64nNk16`: starts `D += A B`, by all threads of the warpgroup.
    ///
    /// # Safety
    /// B lies inside the block's shared memory, is written, fenced by [`fence_shared`] and behind a barrier,
    /// and stays as it is until the product is waited for.
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    unsafe fn multiply_add(&mut self, a: [u32; 4], b: Operand);

    /// What the sums have come to. No product may be under way: see [`wait`].
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    fn values(self) -> [f32; N];
}

impl<const N: usize> Sums<N> {
    /// Zeros.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
    pub fn zeros() -> Sums<N> {
        Sums {
            values: [0.0; N],
            #[cfg(not(target_arch = "nvptx64"))]
            id: ptx::new_sums(),
        }
    }
}

/// Implements [`Product`] for sums of N floats.
macro_rules! sums {
    ($($n:literal: $product:ident, $values:ident;)*) => {$(
        impl Product<$n> for Sums<$n> {
            #[inline(always)]
            unsafe fn multiply_add(&mut self, a: [u32; 4], b: Operand) {
                // SAFETY: passed on to the caller.
                #[cfg(target_arch = "nvptx64")]
                unsafe {
                    ptx::$product(&mut self.values, a, b.0);
                }
                #[cfg(not(target_arch = "nvptx64"))]
                ptx::multiply_add(&mut self.values, self.id, a, b.0);
            }

            #[inline(always)]
            fn values(self) -> [f32; $n] {
                #[cfg(target_arch = "nvptx64")]
                return ptx::$values(self.values);
                #[cfg(not(target_arch = "nvptx64"))]
                ptx::values(self.values, self.id)
            }
        }
    )*};
}

sums! {
    32: m64n64k16, values_32;
    64: m64n128k16, values_64;
}

/// `wgmma.fence`: orders the registers of products that follow behind what wrote them before.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn fence() {
    ptx::fence();
}

/// `wgmma.commit_group`: the products started since the last one are a group.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn commit() {
    ptx::commit();
}

/// `wgmma.wait_group`: waits until at most the last `N` groups are under way.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn wait<const N: u32>() {
    ptx::wait::<N>();
}

/// `fence.proxy.async.shared::cta`: what this thread has stored or copied to shared memory (and waited for)
/// can be read by products, after a barrier.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn fence_shared() {
    ptx::fence_shared();
}
