//! Queries turned in place, keys turned and appended to the cache with the values: [`rope`] twice
//! and [`kv_append`] twice.

use half::f16;

use crate::{kv_append, rope};

/// Shape of [`reference`]: `(h, dh)` queries, `(kv, dh)` keys and values, caches of `s` positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// H: query heads.
    pub heads: usize,
    /// KV: key/value heads.
    pub kv_heads: usize,
    /// Dh: head width.
    pub head_dim: usize,
    /// S: positions that the caches hold.
    pub capacity: usize,
}

/// One token at `position`: `q` `(h, dh)` turned in place, `k` and `v` `(kv, dh)` into the caches
/// `(kv, s, dh)`, `k` turned. `tables` are cosines and sines `(positions, dh/2)`.
///
/// # Panics
/// If a length does not fit the shape, or tables or caches end before the position.
pub fn reference(
    shape: Shape,
    q: &mut [f32],
    [k, v]: [&[f32]; 2],
    [cos, sin]: [&[f32]; 2],
    [k_cache, v_cache]: [&mut [f16]; 2],
    position: usize,
) {
    let Shape {
        heads,
        kv_heads,
        head_dim,
        capacity,
    } = shape;
    rope::reference(q, heads, head_dim, cos, sin, position);
    let mut turned = k.to_vec();
    rope::reference(&mut turned, kv_heads, head_dim, cos, sin, position);
    kv_append::reference(&turned, k_cache, kv_heads, capacity, head_dim, position);
    kv_append::reference(v, v_cache, kv_heads, capacity, head_dim, position);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn_goes_into_the_row_of_the_position() {
        let shape = Shape {
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            capacity: 2,
        };
        let mut q = [1.0, 2.0];
        let (mut keys, mut values) = ([f16::ONE; 4], [f16::ONE; 4]);
        let quarter = [&[1.0, 0.0][..], &[0.0, 1.0][..]];
        let caches = [&mut keys[..], &mut values[..]];
        reference(
            shape,
            &mut q,
            [&[3.0, 4.0], &[5.0, 6.0]],
            quarter,
            caches,
            1,
        );
        assert_eq!(q, [-2.0, 1.0]);
        assert_eq!(keys.map(f16::to_f32), [1.0, 1.0, -4.0, 3.0]);
        assert_eq!(values.map(f16::to_f32), [1.0, 1.0, 5.0, 6.0]);
    }
}
