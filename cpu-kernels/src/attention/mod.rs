//! Causal grouped-query attention over the f16 cache, values also of 8 bits.
//!
//! Query head `i` reads key/value head `i / (h / kv)`. The token at position `p` sees positions
//! `0..=p`, of a window of `w` the last `w` of them; keys and values of all tokens of the call are in the cache already.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod plain;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod rows;

use std::ops::Range;

use half::f16;
use rayon::prelude::*;

use crate::isa::{Isa, Kind, per_isa};
use crate::lanes::{exp, max, sum};

/// Dimensions of one attention call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// H: query heads.
    pub heads: usize,
    /// KV: key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Dh: head width.
    pub head_dim: usize,
    /// S: positions that the cache holds.
    pub capacity: usize,
    /// Position of the first token of the call.
    pub position: usize,
    /// Multiplies the scores: `1 / sqrt(dh)`.
    pub scale: f32,
    /// The most positions that a token sees, its own included; none for all.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// The positions that token `token` of the call sees.
    fn seen(&self, token: usize) -> Range<usize> {
        let end = self.position + token + 1;
        end - end.min(self.window.unwrap_or(end))..end
    }

    /// Tokens of a call whose query holds `q` elements.
    ///
    /// # Panics
    /// If a length does not fit the shape.
    pub fn tokens(&self, q: usize, k_cache: usize, v_cache: usize, out: usize) -> usize {
        let width = self.heads * self.head_dim;
        assert!(
            self.kv_heads > 0 && width > 0 && self.heads.is_multiple_of(self.kv_heads),
            "attention: {} heads over {} key/value heads",
            self.heads,
            self.kv_heads
        );
        assert!(
            q.is_multiple_of(width) && out == q,
            "attention: q and out are (t, h, dh)"
        );
        let cache = self.kv_heads * self.capacity * self.head_dim;
        assert!(
            k_cache == cache && v_cache == cache,
            "attention: caches are (kv, s, dh)"
        );
        assert!(
            self.position + q / width <= self.capacity,
            "attention: the last position is beyond the capacity {}",
            self.capacity
        );
        q / width
    }
}

/// Computes `out = softmax(scale * q · kᵀ) · v` for `q` `(t, h, dh)` over the caches `(kv, s, dh)`
/// into `out` `(t, h, dh)`.
///
/// # Panics
/// If a length does not fit `shape`.
pub fn reference(
    q: &[f32],
    k_cache: &[f16],
    v_cache: &[f16],
    out: &mut [f32],
    shape: &AttentionShape,
) {
    let tokens = shape.tokens(q.len(), k_cache.len(), v_cache.len(), out.len());
    attend(q, k_cache, |i| v_cache[i].to_f64(), out, shape, tokens);
}

/// As [`reference`], with values of 8 bits `(kv, s, dh)` and an f16 scale for each position and head,
/// `(kv, s)`.
///
/// # Panics
/// As [`reference`].
pub fn reference_int8(
    q: &[f32],
    k_cache: &[f16],
    v_cache: &[i8],
    v_scales: &[f16],
    out: &mut [f32],
    shape: &AttentionShape,
) {
    let tokens = shape.tokens(q.len(), k_cache.len(), v_cache.len(), out.len());
    assert_eq!(
        v_scales.len() * shape.head_dim,
        v_cache.len(),
        "attention: scales are (kv, s)"
    );
    let value = |i: usize| v_cache[i] as f64 * v_scales[i / shape.head_dim].to_f64();
    attend(q, k_cache, value, out, shape, tokens);
}

/// The body, with the value at an index of the cache.
fn attend(
    q: &[f32],
    k_cache: &[f16],
    value: impl Fn(usize) -> f64,
    out: &mut [f32],
    shape: &AttentionShape,
    tokens: usize,
) {
    let (heads, dh) = (shape.heads, shape.head_dim);
    let heads_per_kv = heads / shape.kv_heads;
    for t in 0..tokens {
        let seen = shape.seen(t);
        for head in 0..heads {
            let q = &q[(t * heads + head) * dh..][..dh];
            let cache = head / heads_per_kv * shape.capacity * dh;
            let scores: Vec<f64> = seen
                .clone()
                .map(|p| {
                    let k = &k_cache[cache + p * dh..][..dh];
                    let dot: f64 = q.iter().zip(k).map(|(&q, k)| q as f64 * k.to_f64()).sum();
                    dot * shape.scale as f64
                })
                .collect();
            let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - greatest).exp()).collect();
            let total: f64 = weights.iter().sum();
            for j in 0..dh {
                let sum: f64 = seen
                    .clone()
                    .zip(&weights)
                    .map(|(p, weight)| weight * value(cache + p * dh + j))
                    .sum();
                out[(t * heads + head) * dh + j] = (sum / total) as f32;
            }
        }
    }
}

/// As [`reference`], by the fastest instructions of this CPU, heads over rayon's current pool.
///
/// # Panics
/// If a length does not fit `shape`.
pub fn forward(
    q: &[f32],
    k_cache: &[f16],
    v_cache: &[f16],
    out: &mut [f32],
    shape: &AttentionShape,
) {
    let isa = Isa::selected();
    let tokens = shape.tokens(q.len(), k_cache.len(), v_cache.len(), out.len());
    let per_kv = shape.heads / shape.kv_heads;
    let units = q
        .par_chunks_exact(per_kv * shape.head_dim)
        .zip(out.par_chunks_exact_mut(per_kv * shape.head_dim));
    let values = per_kv * shape.head_dim * (shape.position + tokens);
    let min_len = (VALUES_PER_TASK / values).max(1);
    units.enumerate().with_min_len(min_len).for_each_init(
        || vec![0.0; per_kv * (shape.position + tokens)],
        |scores, (unit, (q, out))| {
            let (token, head) = (unit / shape.kv_heads, unit % shape.kv_heads);
            let values = Values::F16(v_cache);
            part(isa, q, k_cache, values, out, shape, token, head, scores);
        },
    );
}

/// The values of a cache.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// `(kv, s, dh)`.
    F16(&'a [f16]),
    /// `(kv, s, dh)` with a scale for each position and head, `(kv, s)`.
    Int8(&'a [i8], &'a [f16]),
}

/// Cached values that are worth a task of their own.
const VALUES_PER_TASK: usize = 64 * 1024;

/// Attention of one token's query heads that read key/value head `kv_head`: `q` and `out` are `(h/kv, dh)`;
/// `scores` is scratch memory for at least `position + token + 1` floats for each. Scales of values go to
/// the weights.
///
/// # Panics
/// If a length does not fit `shape`.
#[allow(
    clippy::too_many_arguments,
    reason = "operands, then which part of the work"
)]
pub fn part(
    isa: Isa,
    q: &[f32],
    k_cache: &[f16],
    v_cache: Values<'_>,
    out: &mut [f32],
    shape: &AttentionShape,
    token: usize,
    kv_head: usize,
    scores: &mut [f32],
) {
    let (dh, per_kv) = (shape.head_dim, shape.heads / shape.kv_heads);
    assert!(
        q.len() == per_kv * dh && out.len() == q.len() && kv_head < shape.kv_heads,
        "attention: the queries of a key/value head"
    );
    let seen = shape.seen(token);
    let first = kv_head * shape.capacity + seen.start;
    let seen = seen.len();
    let rows = first * dh..(first + seen) * dh;
    let keys = &k_cache[rows.clone()];
    let scores = &mut scores[..per_kv * seen];
    match isa.0 {
        // SAFETY: an `Isa` only exists for a CPU that has its features; `keys` is `(seen, dh)`.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { avx2::dot(q, keys, scores, dh) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 | Kind::Avx512Vnni | Kind::Avx512Vbmi => unsafe {
            avx512::dot(q, keys, scores, dh);
        },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::Neon | Kind::NeonDotprod | Kind::NeonI8mm => unsafe {
            neon::dot(q, keys, scores, dh);
        },
        Kind::Scalar => {
            let rows = q.chunks_exact(dh).zip(scores.chunks_exact_mut(seen));
            rows.for_each(|(q, scores)| plain::dot(q, keys, scores));
        }
    }
    for scores in scores.chunks_exact_mut(seen) {
        softmax(isa, scores, shape.scale);
    }
    match v_cache {
        Values::F16(values) => blend(isa, scores, &values[rows], out, dh),
        Values::Int8(values, scales) => {
            let (values, scales) = (&values[rows], &scales[first..first + seen]);
            let heads = scores.chunks_exact_mut(seen);
            for (weights, out) in heads.zip(out.chunks_exact_mut(dh)) {
                for (weight, scale) in weights.iter_mut().zip(scales) {
                    *weight *= scale.to_f32();
                }
                plain::blend_int8(weights, values, out);
            }
        }
    }
}

/// `out = weights * values` for `weights` `(heads, seen)`, `values` `(seen, dh)`, `out` `(heads, dh)`.
fn blend(isa: Isa, weights: &[f32], values: &[f16], out: &mut [f32], dh: usize) {
    let seen = values.len() / dh;
    assert_eq!(weights.len() * dh, out.len() * seen, "a weight a position");
    match isa.0 {
        // SAFETY: an `Isa` only exists for a CPU that has its features; the lengths fit each other.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { avx2::blend(weights, values, out, dh) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 | Kind::Avx512Vnni | Kind::Avx512Vbmi => unsafe {
            avx512::blend(weights, values, out, dh);
        },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::Neon | Kind::NeonDotprod | Kind::NeonI8mm => unsafe {
            neon::blend(weights, values, out, dh);
        },
        Kind::Scalar => {
            let rows = weights.chunks_exact(seen).zip(out.chunks_exact_mut(dh));
            rows.for_each(|(weights, out)| plain::blend(weights, values, out));
        }
    }
}

per_isa! {
    /// Turns dot products into weights that sum to 1.
    fn softmax(scores: &mut [f32], scale: f32) = softmax_body
}

#[inline(always)]
fn softmax_body<const FMA: bool>(scores: &mut [f32], scale: f32) {
    for score in scores.iter_mut() {
        *score *= scale;
    }
    let greatest = max(scores);
    for score in scores.iter_mut() {
        *score = exp::<FMA>(*score - greatest);
    }
    let factor = 1.0 / sum(scores, |v| v);
    for score in scores.iter_mut() {
        *score *= factor;
    }
}

#[cfg(test)]
mod tests;
