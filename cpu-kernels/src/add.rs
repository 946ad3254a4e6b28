//! Residual addition: `y += x`.

/// Adds `x` to `y`, element by element.
///
/// # Panics
/// If the lengths differ.
pub fn reference(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "add: lengths of x and y");
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}
