//! Linear layers: `y = w x + bias`, one file a weight format.

pub mod int4;
pub mod int8;

/// Tokens of a call; checks every length against the shape of the matrix.
fn tokens(rows: usize, cols: usize, bias: Option<&[f32]>, x: usize, y: usize) -> usize {
    assert!(
        cols > 0 && x.is_multiple_of(cols),
        "linear: x is (t, k) with k = {cols}"
    );
    let tokens = x / cols;
    assert_eq!(y, tokens * rows, "linear: y is (t, n) with n = {rows}");
    assert!(
        bias.is_none_or(|b| b.len() == rows),
        "linear: bias is (n,) with n = {rows}"
    );
    tokens
}
