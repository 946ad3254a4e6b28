//! Causal grouped-query attention over the f16 cache.
//!
//! Query head `i` reads key/value head `i / (h / kv)`. The token at position `p` sees positions
//! `0..=p`; keys and values of all tokens of the call are in the cache already.

use half::f16;

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
}

impl AttentionShape {
    /// Tokens of a call whose query holds `q` elements.
    ///
    /// # Panics
    /// If a length does not fit the shape.
    fn tokens(&self, q: usize, k_cache: usize, v_cache: usize, out: usize) -> usize {
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
    let (heads, dh) = (shape.heads, shape.head_dim);
    let heads_per_kv = heads / shape.kv_heads;
    for t in 0..tokens {
        let seen = shape.position + t + 1;
        for head in 0..heads {
            let q = &q[(t * heads + head) * dh..][..dh];
            let cache = head / heads_per_kv * shape.capacity * dh;
            let scores: Vec<f64> = (0..seen)
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
                let sum: f64 = (0..seen)
                    .map(|p| weights[p] * v_cache[cache + p * dh + j].to_f64())
                    .sum();
                out[(t * heads + head) * dh + j] = (sum / total) as f32;
            }
        }
    }
}
