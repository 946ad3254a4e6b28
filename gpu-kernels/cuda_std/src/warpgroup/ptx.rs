//! Device only: `wgmma`. Nothing here can be kept apart from its neighbours by LLVM's intrinsics, which Rust
//! cannot declare: their results are structures of 32 or 64 registers.

use core::arch::asm;

macro_rules! products {
    ($($n:literal = $name:ident, $values:ident, $shape:literal: $($i:literal)*;)*) => {$(
        /// # Safety
        /// As `Product::multiply_add`.
        #[inline(always)]
        pub unsafe fn $name(c: &mut [f32; $n], a: [u32; 4], b: u64) {
            // SAFETY: the caller vouches for B; the block is a memory clobber.
            unsafe {
                asm!(
                    concat!(
                        "{{ .reg .pred add; setp.ne.u32 add, 1, 0; wgmma.mma_async.sync.aligned.", $shape,
                        ".f32.f16.f16 {{{0}", $(", {", $i, "}",)*
                        "}}, {{{a0}, {a1}, {a2}, {a3}}}, {b}, add, 1, 1, 0; }}"
                    ),
                    inout(reg32) c[0], $(inout(reg32) c[$i],)*
                    a0 = in(reg32) a[0], a1 = in(reg32) a[1], a2 = in(reg32) a[2], a3 = in(reg32) a[3],
                    b = in(reg64) b, options(nostack)
                );
            }
        }

        /// The sums, read behind the wait that stands before.
        #[inline(always)]
        pub fn $values(mut c: [f32; $n]) -> [f32; $n] {
            // SAFETY: a remark.
            unsafe {
                asm!(concat!("// sums {0}", $(" {", $i, "}",)*), inout(reg32) c[0], $(inout(reg32) c[$i],)*
                    options(nomem, nostack));
            }
            c
        }
    )*};
}

products! {
    32 = m64n64k16, values_32, "m64n64k16":
        1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24
        25 26 27 28 29 30 31;
    64 = m64n128k16, values_64, "m64n128k16":
        1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24
        25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40 41 42 43 44 45 46 47 48
        49 50 51 52 53 54 55 56 57 58 59 60 61 62 63;
}

/// `wgmma.fence.sync.aligned`
#[inline(always)]
pub fn fence() {
    // SAFETY: orders registers.
    unsafe { asm!("wgmma.fence.sync.aligned;", options(nostack)) }
}

/// `wgmma.commit_group.sync.aligned`
#[inline(always)]
pub fn commit() {
    // SAFETY: touches no memory.
    unsafe { asm!("wgmma.commit_group.sync.aligned;", options(nostack)) }
}

/// `wgmma.wait_group.sync.aligned`
#[inline(always)]
pub fn wait<const N: u32>() {
    // SAFETY: waits; a memory clobber.
    unsafe { asm!("wgmma.wait_group.sync.aligned {};", const N, options(nostack)) }
}

/// `fence.proxy.async.shared::cta`
#[inline(always)]
pub fn fence_shared() {
    // SAFETY: orders memory, touches none.
    unsafe { asm!("fence.proxy.async.shared::cta;", options(nostack)) }
}
