//! Appends keys or values to the cache: f32 `(t, kv, dh)` to f16 `(kv, s, dh)`.

use half::f16;

/// Writes token `i` of `k` to cache position `position + i` of each head, rounded to f16.
///
/// # Panics
/// If a length does not fit its shape or the tokens do not fit the capacity.
pub fn reference(
    k: &[f32],
    cache: &mut [f16],
    kv_heads: usize,
    capacity: usize,
    head_dim: usize,
    position: usize,
) {
    check(k.len(), cache.len(), kv_heads, capacity, head_dim, position);
    for (i, token) in k.chunks_exact(kv_heads * head_dim).enumerate() {
        for (head, values) in token.chunks_exact(head_dim).enumerate() {
            let start = (head * capacity + position + i) * head_dim;
            for (j, &value) in values.iter().enumerate() {
                cache[start + j] = f16::from_f32(value);
            }
        }
    }
}

fn check(
    k: usize,
    cache: usize,
    kv_heads: usize,
    capacity: usize,
    head_dim: usize,
    position: usize,
) {
    let token = kv_heads * head_dim;
    assert!(
        token > 0 && k.is_multiple_of(token),
        "kv_append: k is (t, kv, dh)"
    );
    assert_eq!(cache, token * capacity, "kv_append: cache is (kv, s, dh)");
    assert!(
        position + k / token <= capacity,
        "kv_append: position {position} + {} tokens, the capacity is {capacity}",
        k / token
    );
}
