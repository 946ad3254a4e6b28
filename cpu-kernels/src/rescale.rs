//! A product of levels in the unit of its result: `y = x s r`, or `y += x s r`, `s` the scale of the levels that
//! [`round_int8`](crate::round_int8) left, `r` that of the matrix's row.

/// Multiplies `x` by `scale` and, where there are any, by `row_scales`; adds the result to `y` or writes it there.
///
/// # Panics
/// If the lengths differ.
pub fn reference(x: &[f32], scale: f32, row_scales: Option<&[f32]>, y: &mut [f32], adds: bool) {
    assert_eq!(x.len(), y.len(), "rescale: lengths of x and y");
    assert!(
        row_scales.is_none_or(|rows| rows.len() == x.len()),
        "rescale: a scale a row"
    );
    for (i, (y, x)) in y.iter_mut().zip(x).enumerate() {
        let row = row_scales.map_or(1.0, |rows| rows[i]);
        *y = x * (scale * row) + if adds { *y } else { 0.0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_or_adds() {
        let mut y = [1.0, 2.0];
        reference(&[4.0, -6.0], 0.5, None, &mut y, true);
        assert_eq!(y, [3.0, -1.0]);
        reference(&[4.0, -6.0], 0.5, Some(&[1.0, 2.0]), &mut y, false);
        assert_eq!(y, [2.0, -6.0]);
    }
}
