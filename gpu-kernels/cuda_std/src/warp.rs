//! Warps: 32 threads that exchange registers.
//!
//! Every function takes the mask of lanes that take part. All lanes named in it (that have not
//! returned) have to reach the same call with the same mask, and the calling lane has to be among
//! them; a value read from a lane outside is undefined on the device. The emulator reports both.

use crate::{ptx, thread};

/// Lanes of a warp.
pub const SIZE: u32 = 32;

/// All 32 lanes.
pub const FULL_MASK: u32 = 0xffff_ffff;

/// Lane of the thread in its warp, `0..32`.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn lane_id() -> u32 {
    ptx::lane_id()
}

/// Warp of the thread in its block: [`thread::thread_rank`] / 32.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn warp_id() -> u32 {
    thread::thread_rank() / SIZE
}

/// `bar.warp.sync`: waits for the lanes of `mask` and orders their memory accesses before it with
/// those after it. Shuffles and votes do not order memory.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn sync_warp(mask: u32) {
    // SAFETY: as `sync_threads`.
    #[cfg(target_arch = "nvptx64")]
    unsafe {
        ptx::bar_warp_sync(mask)
    };
    #[cfg(not(target_arch = "nvptx64"))]
    ptx::bar_warp_sync(mask);
}

macro_rules! shuffle {
    ($($(#[$doc:meta])* $u32:ident, $f32:ident($operand:ident) = $instruction:ident;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub fn $u32(mask: u32, value: u32, $operand: u32) -> u32 {
            // SAFETY: moves registers only. A lane that does not take part leaves the value
            // unspecified, which every bit pattern of `u32` allows.
            #[cfg(target_arch = "nvptx64")]
            return unsafe { ptx::$instruction(mask, value, $operand) };
            #[cfg(not(target_arch = "nvptx64"))]
            ptx::$instruction(mask, value, $operand)
        }

        $(#[$doc])*
        #[inline(always)]
        #[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
        pub fn $f32(mask: u32, value: f32, $operand: u32) -> f32 {
            f32::from_bits($u32(mask, value.to_bits(), $operand))
        }
    )*};
}

shuffle! {
    /// `shfl.sync.bfly`: the value of lane `lane ^ lane_mask` (the low five bits of `lane_mask`).
    shuffle_xor_u32, shuffle_xor_f32(lane_mask) = shuffle_xor;
    /// `shfl.sync.down`: the value of lane `lane + delta` (the low five bits of `delta`); a lane
    /// for which that is past lane 31 keeps its own value.
    shuffle_down_u32, shuffle_down_f32(delta) = shuffle_down;
    /// `shfl.sync.idx`: the value of lane `source` (its low five bits).
    shuffle_idx_u32, shuffle_idx_f32(source) = shuffle_idx;
}

/// `vote.sync.ballot`: bit *i* is the predicate of lane *i*; lanes outside `mask` give 0.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn ballot(mask: u32, predicate: bool) -> u32 {
    // SAFETY: moves predicates only.
    #[cfg(target_arch = "nvptx64")]
    return unsafe { ptx::vote_ballot(mask, predicate) };
    #[cfg(not(target_arch = "nvptx64"))]
    ptx::vote_ballot(mask, predicate)
}

/// Whether the predicate holds in at least one lane of `mask`.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn any(mask: u32, predicate: bool) -> bool {
    ballot(mask, predicate) != 0
}

/// Whether the predicate holds in every lane of `mask`.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn all(mask: u32, predicate: bool) -> bool {
    ballot(mask, !predicate) == 0
}

/// `mma.sync.m16n8k16` of halves onto single precision, by all 32 lanes: `A B + C` with A (16, 16),
/// B (16, 8) and C (16, 8), each spread over the warp. Capability 8.0 on.
///
/// With `g = lane / 4`, `q = lane % 4` and two halves a register, the lower one first, a lane holds
///
/// ```text
/// a[0]  A[g,     2q .. 2q + 2]        b[0]  B[2q .. 2q + 2,      g]
/// a[1]  A[g + 8, 2q .. 2q + 2]        b[1]  B[2q + 8 .. 2q + 10, g]
/// a[2]  A[g,     2q + 8 .. 2q + 10]   c[0], c[1]  C[g,     2q], C[g,     2q + 1]
/// a[3]  A[g + 8, 2q + 8 .. 2q + 10]   c[2], c[3]  C[g + 8, 2q], C[g + 8, 2q + 1]
/// ```
///
/// and gets its part of the result in the places of C. Products are exact; the device does not say
/// in which order and with which rounding it adds them, the emulator adds in double precision and
/// rounds once.
///
/// The device's form is an `asm!` block with an effect: LLVM neither drops nor moves it, but may
/// copy it into the branches of a condition before it. Where it stands, that has to be one on which
/// the whole warp agrees.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn mma_m16n8k16_f16(a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
    ptx::mma_m16n8k16(a, b, c)
}

/// `mma.sync.m16n8k8` of halves onto single precision: the first half of what
/// [`mma_m16n8k16_f16`] does, with A (16, 8) in its `a[0]` and `a[1]` and B (8, 8) in its `b[0]`.
/// Capability 7.5 on.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn mma_m16n8k8_f16(a: [u32; 2], b: u32, c: [f32; 4]) -> [f32; 4] {
    ptx::mma_m16n8k8(a, b, c)
}

/// Sum over the 32 lanes, the same bits in every lane: an xor butterfly 16, 8, 4, 2, 1.
///
/// Needs all 32 lanes.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn reduce_sum_f32(value: f32) -> f32 {
    let mut sum = value;
    sum += shuffle_xor_f32(FULL_MASK, sum, 16);
    sum += shuffle_xor_f32(FULL_MASK, sum, 8);
    sum += shuffle_xor_f32(FULL_MASK, sum, 4);
    sum += shuffle_xor_f32(FULL_MASK, sum, 2);
    sum += shuffle_xor_f32(FULL_MASK, sum, 1);
    sum
}

/// Maximum over the 32 lanes, in every lane: an xor butterfly 16, 8, 4, 2, 1. NaN is passed over.
///
/// Needs all 32 lanes.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub fn reduce_max_f32(value: f32) -> f32 {
    let mut max = value;
    max = max.max(shuffle_xor_f32(FULL_MASK, max, 16));
    max = max.max(shuffle_xor_f32(FULL_MASK, max, 8));
    max = max.max(shuffle_xor_f32(FULL_MASK, max, 4));
    max = max.max(shuffle_xor_f32(FULL_MASK, max, 2));
    max = max.max(shuffle_xor_f32(FULL_MASK, max, 1));
    max
}
