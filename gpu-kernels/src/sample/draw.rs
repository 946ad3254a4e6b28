//! Draws the next token among the greatest logits: temperature, top-k, top-p, min-p, in this order.
//!
//! Shapes: candidates `(64, 2)` u32 as `logits_int8_top` leaves them, settings `(8,)` u32, seen
//! `(ceil(V/32),)` u32, tokens `(S + 1,)` u32, state `(1,)` u32 = position.
//!
//! ```text
//! one warp; lane l -> candidates l and l + 32
//! weights          -> e^((logit - greatest) / temperature), to shared memory
//! sums             -> every lane adds all weights up in order and keeps its own two sums
//! cuts and draw    -> ballots over the sums
//! ```
//!
//! The arithmetic is that of `cpu_kernels::sample::choose`, operation by operation, without an
//! approximate instruction: the same candidates, settings and position give the same token on both.
//! The random number is a function of seed and position, so a launch keeps no state.
//!
//! Settings lie in device memory: other ones need no other launch. Bytes moved: 512 and some words.
//! Shared memory: lanes write neighbours and read one word together, no bank conflicts.

use cuda_std::{kernel, shared, thread, warp};

use super::{Best, MAX_CANDIDATES};
#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::ptx;

/// Bytes of the candidates.
pub const CANDIDATES_BYTES: u64 = MAX_CANDIDATES as u64 * 8;
/// Bytes of the settings.
pub const SETTINGS_BYTES: u64 = 8 * 4;
const LANES: u32 = warp::SIZE;
const _: () = assert!(MAX_CANDIDATES == 2 * LANES as usize);

/// Where each number of the settings is.
pub(crate) mod setting {
    pub(crate) const INVERSE_TEMPERATURE: usize = 0;
    pub(crate) const TOP_K: usize = 1;
    pub(crate) const TOP_P: usize = 2;
    pub(crate) const MIN_P: usize = 3;
    pub(crate) const PENALTY: usize = 4;
    pub(crate) const INVERSE_PENALTY: usize = 5;
    pub(crate) const SEED: usize = 6;
}

/// How tokens are drawn: `cpu_kernels::sample::Settings`.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Divides the logits; 0 takes the best.
    pub temperature: f32,
    /// Candidates: 1 to [`MAX_CANDIDATES`].
    pub top_k: u32,
    /// Only the best whose probabilities among those first add up to `top_p` stay.
    pub top_p: f32,
    /// Only those at least `min_p` as probable as the best stay.
    pub min_p: f32,
    /// Divides positive logits of tokens that were seen and multiplies others; 1 for none.
    pub repetition_penalty: f32,
    /// Together with the position it gives the random number.
    pub seed: u64,
}

#[cfg(not(target_arch = "nvptx64"))]
impl Settings {
    /// What the kernels read.
    pub fn words(&self) -> [u32; 8] {
        let mut words = [0; 8];
        // The best alone, where the others would be divided by nothing.
        let greedy = self.temperature == 0.0;
        words[setting::INVERSE_TEMPERATURE] = (1.0 / self.temperature).to_bits();
        words[setting::TOP_K] = if greedy { 1 } else { self.top_k };
        words[setting::TOP_P] = self.top_p.to_bits();
        words[setting::MIN_P] = self.min_p.to_bits();
        words[setting::PENALTY] = self.repetition_penalty.to_bits();
        words[setting::INVERSE_PENALTY] = (1.0 / self.repetition_penalty).to_bits();
        words[setting::SEED] = self.seed as u32;
        words[setting::SEED + 1] = (self.seed >> 32) as u32;
        words
    }
}

/// Dimensions of the draw.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopKShape {
    /// V.
    pub vocab: usize,
    /// S: tokens that the cache holds.
    pub context: usize,
    /// Whether the kernel also makes the position the next one.
    pub advance: bool,
}

/// Buffers of the draw.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopKOperands {
    /// `(64, 2)` u32, ids below V.
    pub candidates: DeviceSlice,
    /// [`Settings::words`].
    pub settings: DeviceSlice,
    /// `(ceil(V/32),)` u32, which gets the token's bit; or none.
    pub seen: DeviceSlice,
    /// `(S + 1,)` u32; the kernel writes `tokens[position + 1]`.
    pub tokens: DeviceSlice,
    /// `(1,)` u32: the position, below S.
    pub state: DeviceSlice,
}

/// The launch of `sample_topk`.
///
/// # Errors
/// A short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan_topk(
    device: &DeviceInfo,
    shape: &TopKShape,
    ops: &TopKOperands,
) -> Result<Call, ShapeError> {
    let mut call = CallBuilder::new("sample_topk");
    call.tensor("candidates", ops.candidates, CANDIDATES_BYTES, 4)?;
    call.tensor("settings", ops.settings, SETTINGS_BYTES, 4)?;
    let seen_bytes = tensor_bytes(&[shape.vocab.div_ceil(32)], 4);
    call.optional("seen", ops.seen, seen_bytes, 4)?;
    let token_bytes = tensor_bytes(&[shape.context.saturating_add(1)], 4);
    call.tensor("tokens", ops.tokens, token_bytes, 4)?;
    call.tensor("state", ops.state, 4, 4)?;
    call.dim("vocab", shape.vocab)?;
    call.u32(u32::from(shape.advance));
    call.waits();
    call.build(device, Launch::linear(1, LANES, MAX_CANDIDATES as u32 * 4))
}

/// `tokens[position + 1]` = one of the candidates.
///
/// # Safety
/// Launched as [`plan_topk`] says, with a position below S and ids below V.
#[kernel]
pub unsafe fn sample_topk(
    candidates: *const u32, // (64, 2) bits of the logit, id
    settings: *const u32,   // (8)
    seen: *mut u32,         // (ceil(V/32)), or null
    tokens: *mut u32,       // (S + 1)
    state: *mut u32,        // (1) position
    vocab: u32,
    advance: u32,
) {
    ptx::griddep_launch();
    ptx::griddep_wait();
    let lane = thread::thread_idx_x();
    // SAFETY: as planned: 64 candidates, 8 settings, and the caller promises position and ids.
    unsafe {
        let position = ptx::ld_global_u32(state);
        let word = |at| ptx::ld_global_u32(settings.wrapping_add(at));
        let number = |at| f32::from_bits(word(at));
        let at = |i: u32| Best::of_global(candidates.wrapping_add(2 * i as usize));
        let mine = [at(lane), at(lane + LANES)];
        let settings = Drawing {
            inverse_temperature: number(setting::INVERSE_TEMPERATURE),
            top_k: word(setting::TOP_K),
            top_p: number(setting::TOP_P),
            min_p: number(setting::MIN_P),
            seed: [word(setting::SEED), word(setting::SEED + 1)],
        };
        let chosen = settings.choose(mine, position);
        if lane == 0 {
            let token = at(chosen).token();
            ptx::st_global_u32(tokens.wrapping_add(position as usize + 1), token);
            if !seen.is_null() && token < vocab {
                let word = seen.wrapping_add(token as usize / 32);
                ptx::st_global_u32(word, ptx::ld_global_u32(word) | 1 << (token % 32));
            }
            if advance != 0 {
                ptx::st_global_u32(state, position + 1);
            }
        }
    }
}

/// The settings as the kernel has them.
#[derive(Clone, Copy)]
struct Drawing {
    inverse_temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    seed: [u32; 2],
}

impl Drawing {
    /// The number of the chosen candidate; the lane has candidates l and l + 32.
    ///
    /// # Safety
    /// A whole warp calls it, with 64 words of shared memory.
    #[inline(always)]
    unsafe fn choose(&self, mine: [Best; 2], position: u32) -> u32 {
        let lane = thread::thread_idx_x();
        let smem = shared::dynamic_shared_mem();
        let there = both(mine.map(|best| best != Best::NONE));
        let kept = there
            .count_ones()
            .min(self.top_k)
            .min(MAX_CANDIDATES as u32);
        let greatest = warp::shuffle_idx_f32(warp::FULL_MASK, mine[0].value, 0);
        if kept <= 1 || greatest == f32::INFINITY {
            return 0;
        }
        let weight = |i: usize| {
            let weight = exp((mine[i].value - greatest) * self.inverse_temperature);
            if lane + LANES * (i as u32) < kept {
                weight
            } else {
                0.0
            }
        };
        let weights = [weight(0), weight(1)];
        // SAFETY: the lane's words; the barrier parts writing from reading.
        unsafe {
            ptx::st_shared_f32(smem, lane * 4, weights[0]);
            ptx::st_shared_f32(smem, (lane + LANES) * 4, weights[1]);
        }
        thread::sync_threads();
        let mut sums = [0.0; 2];
        let mut total = 0.0f32;
        let mut i = 0;
        while i < kept {
            // SAFETY: written before the barrier.
            total += unsafe { ptx::ld_shared_f32(smem, i * 4) };
            if i % LANES == lane {
                if i < LANES {
                    sums[0] = total;
                } else {
                    sums[1] = total;
                }
            }
            i += 1;
        }
        let of_kept = |predicate: [bool; 2]| {
            both([
                predicate[0] && lane < kept,
                predicate[1] && lane + LANES < kept,
            ])
        };
        let probable = of_kept(weights.map(|weight| weight >= self.min_p));
        let nucleus = total * self.top_p;
        let full = of_kept(sums.map(|sum| sum >= nucleus));
        let mut count = 64 - probable.leading_zeros();
        if full != 0 {
            count = count.min(full.trailing_zeros() + 1);
        } else {
            count = count.min(kept);
        }
        count = count.max(1);
        let last = count - 1;
        let last_sums = sums.map(|sum| warp::shuffle_idx_f32(warp::FULL_MASK, sum, last % LANES));
        let drawn = uniform(self.seed, position) * last_sums[usize::from(last >= LANES)];
        let above = of_kept(sums.map(|sum| sum > drawn));
        if above == 0 {
            return last;
        }
        above.trailing_zeros().min(last)
    }
}

/// The warp's votes for its 64 candidates.
#[inline(always)]
fn both(predicate: [bool; 2]) -> u64 {
    let [low, high] = predicate.map(|p| warp::ballot(warp::FULL_MASK, p));
    u64::from(low) | u64::from(high) << 32
}

/// e^x for x of at most 0, within 2 units in the last place; 0 below about -87.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let exponent = x * core::f32::consts::LOG2_E;
    // NaN, which only infinities make, counts as nothing.
    if exponent.is_nan() || exponent < -126.0 {
        return 0.0;
    }
    // Adding and taking away 1.5 2^23 rounds to the nearest whole number.
    let rounded = (exponent + ROUND) - ROUND;
    let rest = exponent - rounded;
    let mut power = EXP2[0];
    power = ptx::fma(power, rest, EXP2[1]);
    power = ptx::fma(power, rest, EXP2[2]);
    power = ptx::fma(power, rest, EXP2[3]);
    power = ptx::fma(power, rest, EXP2[4]);
    power = ptx::fma(power, rest, EXP2[5]);
    power = ptx::fma(power, rest, EXP2[6]);
    power = ptx::fma(power, rest, EXP2[7]);
    power * f32::from_bits(((rounded as i32 + 127) as u32) << 23)
}

const ROUND: f32 = 12_582_912.0;

/// Taylor coefficients of 2^x, highest first: ln(2)^n / n!.
const EXP2: [f32; 8] = [
    1.525_273_4e-5,
    1.540_353e-4,
    1.333_355_8e-3,
    9.618_129e-3,
    5.550_411e-2,
    2.402_265e-1,
    core::f32::consts::LN_2,
    1.0,
];

/// A number in `[0, 1)`, a multiple of 2^-24.
#[inline(always)]
fn uniform(seed: [u32; 2], position: u32) -> f32 {
    let word = philox([position, 0, 0, 0], seed)[0];
    (word >> 8) as f32 / (1 << 24) as f32
}

/// Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, Parallel random numbers: as easy as 1, 2, 3).
#[inline(always)]
fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut a, mut b, mut c, mut d] = counter;
    let [mut low, mut high] = key;
    let mut round = 0;
    while round < 10 {
        let product_a = u64::from(a) * 0xD251_1F53;
        let product_c = u64::from(c) * 0xCD9E_8D57;
        [a, b, c, d] = [
            (product_c >> 32) as u32 ^ b ^ low,
            product_c as u32,
            (product_a >> 32) as u32 ^ d ^ high,
            product_a as u32,
        ];
        low = low.wrapping_add(0x9E37_79B9);
        high = high.wrapping_add(0xBB67_AE85);
        round += 1;
    }
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_checks_its_buffers() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 512,
        };
        let ops = TopKOperands {
            candidates: slice,
            settings: slice,
            seen: DeviceSlice::NONE,
            tokens: slice,
            state: slice,
        };
        let shape = TopKShape {
            vocab: 4097,
            context: 127,
            advance: true,
        };
        let plan = |ops, shape| plan_topk(&DeviceInfo::T4, &shape, &ops);
        let call = plan(ops, shape).unwrap();
        assert_eq!(call.launch, Launch::linear(1, 32, 256));
        assert_eq!(call.args[5..], [4097, 1]);
        let seen = TopKOperands { seen: slice, ..ops };
        assert!(plan(seen, shape).is_err(), "129 words");
        let long = TopKShape {
            context: 128,
            ..shape
        };
        assert!(plan(ops, long).is_err());
    }

    #[test]
    fn no_temperature_takes_the_best() {
        let settings = Settings {
            temperature: 0.0,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.0,
            repetition_penalty: 1.1,
            seed: 1 << 40 | 5,
        };
        let words = settings.words();
        assert_eq!(words[setting::TOP_K], 1);
        assert_eq!(words[setting::SEED..], [5, 1 << 8]);
    }
}
