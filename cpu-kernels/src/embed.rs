//! Embedding lookup: row `token` of an INT8 or F16 table as floats.

use models::quant::{F16Matrix, Int8Matrix};

use crate::linear::Packed;

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

/// [`reference`] for an F16 table.
///
/// # Panics
/// As [`reference`].
pub fn reference_f16(table: &F16Matrix, tokens: &[u32], out: &mut [f32]) {
    let k = table.cols;
    assert_eq!(out.len(), tokens.len() * k, "embed: out is (t, k)");
    for (out, &token) in out.chunks_exact_mut(k).zip(tokens) {
        for (out, value) in out.iter_mut().zip(table.row(token as usize)) {
            *out = value.to_f32();
        }
    }
}

/// As [`reference`], from a table as linear layers read it.
///
/// # Panics
/// As [`reference`].
pub fn part(table: &Packed, tokens: &[u32], out: &mut [f32]) {
    let k = table.cols();
    assert_eq!(out.len(), tokens.len() * k, "embed: out is (t, k)");
    for (out, &token) in out.chunks_exact_mut(k).zip(tokens) {
        table.dequantize_row(token as usize, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn rows_of_the_layout_equal_the_reference() {
        let mut random = Random::new(5);
        for (rows, cols, group) in [(7, 160, 160), (193, 576, 32), (5, 1120, 128)] {
            let table = random.int8(rows, cols, group);
            let tokens = [rows as u32 - 1, 0, rows as u32 / 2];
            let mut expected = vec![0.0; 3 * cols];
            reference(&table, &tokens, &mut expected);
            let mut out = vec![f32::NAN; 3 * cols];
            part(&Packed::int8(table.clone()), &tokens, &mut out);
            assert_eq!(out, expected);
        }
        let table = random.f16(7, 96);
        let mut expected = vec![0.0; 2 * 96];
        reference_f16(&table, &[6, 0], &mut expected);
        let mut out = vec![f32::NAN; 2 * 96];
        part(&Packed::f16(table.clone()), &[6, 0], &mut out);
        assert_eq!(out, expected);
    }

    #[test]
    #[should_panic(expected = "row 7")]
    fn a_token_outside_the_table_panics() {
        let table = Random::new(6).int8(7, 32, 32);
        part(&Packed::int8(table.clone()), &[7], &mut [0.0; 32]);
    }
}
