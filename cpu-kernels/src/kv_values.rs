//! Cached values of 8 bits as halves: `(kv, s, dh)` i8 with scales `(kv, s)` to `(kv, s, dh)` f16.

use half::f16;

/// The values of positions below `positions`, each its level times the scale of its position and head,
/// rounded to f16. The others stay as they are.
///
/// # Panics
/// If a length does not fit the shape, or there are more positions than the capacity.
pub fn reference(
    levels: &[i8],
    scales: &[f16],
    values: &mut [f16],
    capacity: usize,
    head_dim: usize,
    positions: usize,
) {
    assert_eq!(
        values.len(),
        levels.len(),
        "kv_values: both are (kv, s, dh)"
    );
    assert_eq!(
        scales.len() * head_dim,
        levels.len(),
        "kv_values: scales are (kv, s)"
    );
    assert!(
        positions <= capacity,
        "kv_values: positions beyond the capacity"
    );
    let rows = levels
        .chunks_exact(head_dim)
        .zip(values.chunks_exact_mut(head_dim));
    for (row, ((levels, values), scale)) in rows.zip(scales).enumerate() {
        if row % capacity < positions {
            for (value, level) in values.iter_mut().zip(levels) {
                *value = f16::from_f32(f32::from(*level) * scale.to_f32());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_count_scales() {
        let scales = [0.5, 2.0, 4.0, 0.25].map(f16::from_f32);
        let mut values = [f16::ONE; 8];
        reference(
            &[1, -2, 3, 4, 127, -127, 5, 6],
            &scales,
            &mut values,
            2,
            2,
            1,
        );
        let values = values.map(f16::to_f32);
        assert_eq!(values, [0.5, -1.0, 1.0, 1.0, 508.0, -508.0, 1.0, 1.0]);
    }
}
