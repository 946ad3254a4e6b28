//! `sdot` and others of AArch64 whose intrinsics are not stable yet.

use std::arch::aarch64::{float32x4_t, int8x16_t, int32x4_t, uint8x16_t, uint16x4_t};
use std::arch::asm;

/// `sum[i] + Σ w[4i + j] * x[4i + j]` over `j` of 0..4.
///
/// # Safety
/// The CPU has `dotprod`.
#[inline(always)]
pub(crate) unsafe fn sdot(mut sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: registers only; the caller has the instruction.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.16b",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// `sum[2i + j] + Σ w[8i + k] * x[8j + k]` over `k` of 0..8, for `i` and `j` of 0..2; `w` has no sign.
///
/// # Safety
/// The CPU has `i8mm`.
#[inline(always)]
pub(crate) unsafe fn usmmla(mut sum: int32x4_t, w: uint8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: registers only; the caller has the instruction.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "usmmla {sum:v}.4s, {w:v}.16b, {x:v}.16b",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Halves, as bits, as floats.
#[inline(always)]
pub(crate) fn fcvtl(halves: uint16x4_t) -> float32x4_t {
    let floats: float32x4_t;
    // SAFETY: registers only; every AArch64 CPU has the instruction.
    unsafe {
        asm!(
            "fcvtl {floats:v}.4s, {halves:v}.4h",
            floats = lateout(vreg) floats,
            halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    floats
}
