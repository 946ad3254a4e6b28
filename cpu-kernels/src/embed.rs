//! Embedding lookup: row `token` of an INT8 table, de-quantised.

use models::quant::Int8Matrix;

/// Writes `out[i] = table[tokens[i]]`; `out` is `(t, k)`.
///
/// # Panics
/// If a token is not a row of the table, or `out` is not `(tokens, k)`.
pub fn reference(table: &Int8Matrix, tokens: &[u32], out: &mut [f32]) {
    let k = table.cols;
    assert_eq!(out.len(), tokens.len() * k, "embed: out is (t, k)");
    let groups = k.div_ceil(table.group);
    for (out, &token) in out.chunks_exact_mut(k).zip(tokens) {
        let row = token as usize;
        assert!(
            row < table.rows,
            "embed: token {token} is outside the table of {} rows",
            table.rows
        );
        for (j, out) in out.iter_mut().enumerate() {
            let scale = table.scales[row * groups + j / table.group].to_f32();
            *out = scale * table.quants[row * k + j] as f32;
        }
    }
}
