//! Token choice on the device, greedy here and at random in [`draw`], and the step to the next
//! position.
//!
//! Shapes: logits `(V,)` f32, tokens `(S + 1,)` u32, state `(1,)` u32 = position.
//!
//! ```text
//! argmax_f32: one block of 1024; thread t -> logits 4t + 4096 i .. +4, i = 0, 1, ...
//!             each keeps its best, then lanes, then warps compare
//! advance_position: one thread
//! ```
//!
//! The lowest index wins a tie. NaN is never chosen, unless there is nothing else, when the answer
//! is 0. Bytes moved: `4 V`, from L2 where the logits kernel has just left them. Shared memory
//! holds two words a warp: no bank conflicts. One block is enough while V is some 100,000s: it
//! saves a second launch for the comparison of blocks.

pub mod draw;

pub use self::draw::{CANDIDATES_BYTES, SETTINGS_BYTES};
#[cfg(not(target_arch = "nvptx64"))]
pub use self::draw::{Settings, TopKOperands, TopKShape, plan_topk};
use cuda_std::shared::Shared;
use cuda_std::{kernel, shared, thread, warp};

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::ptx;

/// Threads of the block.
const BLOCK: u32 = 1024;
const _: () = assert!(BLOCK / warp::SIZE == warp::SIZE);
/// Candidates that a token is drawn from at most.
pub const MAX_CANDIDATES: usize = 64;
/// Bytes of a warp's best in shared memory: value and index.
pub(crate) const BEST_BYTES: u32 = 8;

/// Dimensions of the choice.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArgmaxShape {
    /// V.
    pub vocab: usize,
    /// S: tokens that the cache holds.
    pub context: usize,
}

/// Buffers of the choice.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArgmaxOperands {
    /// `(V,)` f32.
    pub logits: DeviceSlice,
    /// `(S + 1,)` u32; the kernel writes `tokens[position + 1]`.
    pub tokens: DeviceSlice,
    /// `(1,)` u32: the position, below S.
    pub state: DeviceSlice,
}

/// The launch of `argmax_f32`.
///
/// # Errors
/// No vocabulary, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan_argmax(
    device: &DeviceInfo,
    shape: &ArgmaxShape,
    ops: &ArgmaxOperands,
) -> Result<Call, ShapeError> {
    let mut call = CallBuilder::new("argmax_f32");
    call.tensor("logits", ops.logits, tensor_bytes(&[shape.vocab], 4), 16)?;
    call.tensor(
        "tokens",
        ops.tokens,
        tensor_bytes(&[shape.context.saturating_add(1)], 4),
        4,
    )?;
    call.tensor("state", ops.state, 4, 4)?;
    call.dim("vocab", shape.vocab)?;
    call.build(
        device,
        Launch::linear(1, BLOCK, BLOCK / warp::SIZE * BEST_BYTES),
    )
}

/// The launch of `advance_position`: `state` is `(1,)` u32.
///
/// # Errors
/// A short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan_advance(device: &DeviceInfo, state: DeviceSlice) -> Result<Call, ShapeError> {
    let mut call = CallBuilder::new("advance_position");
    call.tensor("state", state, 4, 4)?;
    call.build(device, Launch::linear(1, 1, 0))
}

/// A candidate: the greatest logit seen and where.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Best {
    pub(crate) value: f32,
    pub(crate) index: u32,
}

impl Best {
    /// Nothing seen: any number that is not NaN, -inf included, takes its place.
    pub(crate) const NONE: Best = Best {
        value: f32::NEG_INFINITY,
        index: u32::MAX,
    };

    /// The better of two; a NaN compares as neither greater nor equal and so never wins.
    #[inline(always)]
    pub(crate) fn or(self, other: Best) -> Best {
        if other.before(self) { other } else { self }
    }

    /// Whether it is the better of the two, strictly.
    #[inline(always)]
    pub(crate) fn before(self, other: Best) -> bool {
        self.value > other.value || self.value == other.value && self.index < other.index
    }

    /// Whether it is a number and at least as good as `bound`.
    #[inline(always)]
    pub(crate) fn reaches(self, bound: Best) -> bool {
        self.before(bound) || self == bound && self != Best::NONE
    }

    /// The best over the warp, in every lane.
    #[inline(always)]
    pub(crate) fn of_warp(self) -> Best {
        let mut best = self;
        let mut step = warp::SIZE / 2;
        while step > 0 {
            best = best.or(Best {
                value: warp::shuffle_xor_f32(warp::FULL_MASK, best.value, step),
                index: warp::shuffle_xor_u32(warp::FULL_MASK, best.index, step),
            });
            step /= 2;
        }
        best
    }

    /// The token that it stands for: 0 where nothing but NaN was seen.
    #[inline(always)]
    pub(crate) fn token(self) -> u32 {
        if self.index == u32::MAX {
            0
        } else {
            self.index
        }
    }

    /// Leaves it in shared memory, by lane 0.
    ///
    /// # Safety
    /// The [`BEST_BYTES`] at the offset are the warp's.
    #[inline(always)]
    pub(crate) unsafe fn store(self, smem: Shared, offset_bytes: u32) {
        if warp::lane_id() == 0 {
            // SAFETY: by the caller's promise.
            unsafe { self.put(smem, offset_bytes) };
        }
    }

    /// Leaves it in shared memory.
    ///
    /// # Safety
    /// The [`BEST_BYTES`] at the offset are the thread's.
    #[inline(always)]
    pub(crate) unsafe fn put(self, smem: Shared, offset_bytes: u32) {
        // SAFETY: by the caller's promise.
        unsafe {
            ptx::st_shared_f32(smem, offset_bytes, self.value);
            ptx::st_shared_u32(smem, offset_bytes + 4, self.index);
        }
    }

    /// Leaves it in global memory: bits of the value, index.
    ///
    /// # Safety
    /// The [`BEST_BYTES`] at `to` are the thread's.
    #[inline(always)]
    pub(crate) unsafe fn leave(self, to: *mut u32) {
        // SAFETY: by the caller's promise.
        unsafe {
            ptx::st_global_u32(to, self.value.to_bits());
            ptx::st_global_u32(to.wrapping_add(1), self.index);
        }
    }

    /// What [`Best::leave`] left there.
    ///
    /// # Safety
    /// It was left before, as this thread sees it.
    #[inline(always)]
    pub(crate) unsafe fn of_global(from: *const u32) -> Best {
        // SAFETY: by the caller's promise.
        unsafe {
            Best {
                value: f32::from_bits(ptx::ld_global_u32(from)),
                index: ptx::ld_global_u32(from.wrapping_add(1)),
            }
        }
    }

    /// What [`Best::store`] left there.
    ///
    /// # Safety
    /// A barrier stands between.
    #[inline(always)]
    pub(crate) unsafe fn of_shared(smem: Shared, offset_bytes: u32) -> Best {
        // SAFETY: by the caller's promise.
        let [value, index] = unsafe { ptx::ld_shared_v2_u32(smem, offset_bytes) };
        Best {
            value: f32::from_bits(value),
            index,
        }
    }
}

/// `tokens[position + 1] = argmax(logits)`.
///
/// # Safety
/// Launched as [`plan_argmax`] says, with a position below S.
#[kernel]
pub unsafe fn argmax_f32(
    logits: *const f32, // (V)
    tokens: *mut u32,   // (S + 1)
    state: *const u32,  // (1) position
    vocab: u32,
) {
    let lane = warp::lane_id();
    let warp_id = warp::warp_id();
    let smem = shared::dynamic_shared_mem();
    let mut best = Best::NONE;
    // SAFETY: indices are below V; each warp has its slot in the shared memory that the plan gave,
    // and the barrier parts writing from reading; the caller promises the position.
    unsafe {
        let mut first = thread::thread_idx_x() * 4;
        while first < vocab {
            if vocab - first >= 4 {
                let v = ptx::ld_global_v4_f32(logits.wrapping_add(first as usize));
                best = best.or(Best {
                    value: v[0],
                    index: first,
                });
                best = best.or(Best {
                    value: v[1],
                    index: first + 1,
                });
                best = best.or(Best {
                    value: v[2],
                    index: first + 2,
                });
                best = best.or(Best {
                    value: v[3],
                    index: first + 3,
                });
            } else {
                let mut i = first;
                while i < vocab {
                    let value = ptx::ld_global_f32(logits.wrapping_add(i as usize));
                    best = best.or(Best { value, index: i });
                    i += 1;
                }
            }
            first += BLOCK * 4;
        }
        best.of_warp().store(smem, warp_id * BEST_BYTES);
        thread::sync_threads();
        if warp_id == 0 {
            best = Best::of_shared(smem, lane * BEST_BYTES).of_warp();
            if lane == 0 {
                let position = ptx::ld_global_u32(state) as usize;
                ptx::st_global_u32(tokens.wrapping_add(position + 1), best.token());
            }
        }
    }
}

/// `position += 1`.
///
/// # Safety
/// Launched as [`plan_advance`] says.
#[kernel]
pub unsafe fn advance_position(state: *mut u32, // (1) position
) {
    // SAFETY: the plan checked the buffer, and there is one thread.
    unsafe { ptx::st_global_u32(state, ptx::ld_global_u32(state) + 1) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_low_and_nan_never_wins() {
        let at = |value, index| Best { value, index };
        assert_eq!(at(1.0, 5).or(at(1.0, 3)).index, 3);
        assert_eq!(at(1.0, 3).or(at(1.0, 5)).index, 3);
        assert_eq!(at(1.0, 3).or(at(2.0, 5)).index, 5);
        assert_eq!(at(1.0, 3).or(at(f32::NAN, 0)).index, 3);
        assert_eq!(Best::NONE.or(at(f32::NAN, 0)), Best::NONE);
        assert_eq!(Best::NONE.or(at(f32::NEG_INFINITY, 7)).index, 7);
    }

    #[test]
    fn plans_check_their_buffers() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 4 * 33,
        };
        let ops = ArgmaxOperands {
            logits: slice,
            tokens: slice,
            state: slice,
        };
        let shape = ArgmaxShape {
            vocab: 33,
            context: 32,
        };
        assert_eq!(
            plan_argmax(&DeviceInfo::T4, &shape, &ops)
                .unwrap()
                .launch
                .block[0],
            1024
        );
        let shape = ArgmaxShape {
            vocab: 33,
            context: 33,
        };
        assert!(plan_argmax(&DeviceInfo::T4, &shape, &ops).is_err());
        assert!(plan_advance(&DeviceInfo::T4, DeviceSlice::NONE).is_err());
    }
}
