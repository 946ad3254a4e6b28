//! Appends keys or values to the cache: f32 `(t, kv, dh)` to f16 `(kv, s, dh)`.

use half::f16;
use half::slice::HalfFloatSliceExt;

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

/// As [`reference`], to i8 with an f16 scale a position and head, `(kv, s)`: 127 stands for the
/// greatest magnitude of the head's elements.
///
/// # Panics
/// As [`reference`].
pub fn reference_int8(
    v: &[f32],
    cache: &mut [i8],
    scales: &mut [f16],
    kv_heads: usize,
    capacity: usize,
    head_dim: usize,
    position: usize,
) {
    check(v.len(), cache.len(), kv_heads, capacity, head_dim, position);
    assert_eq!(scales.len(), kv_heads * capacity, "scales are (kv, s)");
    for (i, token) in v.chunks_exact(kv_heads * head_dim).enumerate() {
        for (head, values) in token.chunks_exact(head_dim).enumerate() {
            let row = head * capacity + position + i;
            let greatest = values.iter().fold(0.0f32, |most, v| most.max(v.abs()));
            scales[row] = f16::from_f32(greatest * (1.0 / 127.0));
            let scale = scales[row].to_f32();
            let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
            let cache = &mut cache[row * head_dim..][..head_dim];
            for (level, value) in cache.iter_mut().zip(values) {
                *level = (value * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
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

/// As [`reference`], by the conversion instructions of this CPU.
///
/// # Panics
/// As [`reference`].
pub fn forward(
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
            part(values, &mut cache[start..start + head_dim]);
        }
    }
}

/// Rounds one head `(dh,)` into its place in the cache.
///
/// # Panics
/// If the lengths differ.
pub fn part(values: &[f32], cache: &mut [f16]) {
    cache.convert_from_f32_slice(values);
}

/// Rounds one head `(dh,)` to bytes in its place in the cache, as [`reference_int8`]; the scale.
///
/// # Panics
/// If the lengths differ.
pub fn part_int8(values: &[f32], cache: &mut [i8]) -> f16 {
    assert_eq!(values.len(), cache.len(), "kv_append: one head");
    let greatest = values.iter().fold(0.0f32, |most, v| most.max(v.abs()));
    let stored = f16::from_f32(greatest * (1.0 / 127.0));
    let scale = stored.to_f32();
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (level, value) in cache.iter_mut().zip(values) {
        *level = (value * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
    }
    stored
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn a_head_of_bytes_equals_the_reference() {
        let mut random = Random::new(5);
        for greatest in [0.0, 1e-9, 0.3, 200.0] {
            let v = random.floats(80, greatest);
            let (mut expected, mut got) = ([1; 80], [2; 80]);
            let mut scales = [f16::ONE];
            reference_int8(&v, &mut expected, &mut scales, 1, 1, 80, 0);
            assert_eq!(part_int8(&v, &mut got), scales[0]);
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn bytes_span_the_greatest_magnitude_of_a_head() {
        let v = [1.0, -2.54, 0.013, 0.0, 0.0, 0.0, 0.0, 0.0];
        let (mut cache, mut scales) = ([9; 24], [f16::ONE; 6]);
        reference_int8(&v, &mut cache, &mut scales, 2, 3, 4, 1);
        assert_eq!(cache[4..8], [50, -127, 1, 0]);
        assert_eq!(scales[1], f16::from_f32(0.02));
        assert_eq!(cache[16..20], [0; 4]);
        assert_eq!(scales[4], f16::ZERO);
        assert!(
            cache[..4]
                .iter()
                .chain(&cache[8..16])
                .all(|&level| level == 9)
        );
        assert_eq!(scales[0], f16::ONE);
    }

    #[test]
    fn equals_the_reference_and_touches_nothing_else() {
        let mut random = Random::new(4);
        for (tokens, kv, dh, capacity, position) in
            [(1, 3, 64, 20, 19), (3, 2, 20, 9, 0), (17, 1, 6, 40, 13)]
        {
            let k = random.floats(tokens * kv * dh, 9.0);
            let marker = f16::from_f32(-77.0);
            let mut expected = vec![marker; kv * capacity * dh];
            let mut got = expected.clone();
            reference(&k, &mut expected, kv, capacity, dh, position);
            forward(&k, &mut got, kv, capacity, dh, position);
            assert_eq!(got, expected);
            let untouched = got.iter().filter(|&&v| v == marker).count();
            assert_eq!(untouched, kv * (capacity - tokens) * dh);
        }
    }
}
