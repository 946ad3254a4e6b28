//! Every instruction set against the references, at shapes that are not round.

use models::quant::{TernaryMatrix, Weight};

use super::ternary::Form;
use super::*;
use crate::isa::Isa;
use crate::levels::{self, Levels, Precision, token_words};
use crate::team::SharedSlice;
use crate::testing::Random;

/// N, K, group, T.
const SHAPES: [(usize, usize, usize, usize); 12] = [
    (1, 576, 32, 1),
    (7, 160, 32, 3),
    (193, 1120, 32, 17),
    (193, 576, 64, 1),
    (7, 1120, 64, 1),   // 17 groups and a short one
    (1, 160, 64, 17),   // two groups and a short one
    (193, 160, 128, 3), // one group and a short one
    (7, 576, 128, 17),
    (1, 1120, 128, 1),
    (7, 32, 32, 2),
    (6, 32, 128, 5), // a short group only
    (66, 96, 32, 7),
];

/// Words of the levels of `x` `(t, k)`.
fn words(isa: Isa, precision: Precision, x: &[f32], k: usize) -> Vec<f32> {
    let mut words = vec![f32::NAN; x.len() / k * token_words(k)];
    let shared = SharedSlice::new(&mut words);
    for (token, x) in x.chunks_exact(k).enumerate() {
        // SAFETY: one thread.
        unsafe { levels::part(isa, precision, x, shared, k, token, 0..k) };
    }
    words
}

/// What the levels in `words` stand for, `(t, k)`.
fn values(words: &[f32], k: usize, precision: Precision) -> Vec<f32> {
    let levels = Levels::new(words, k, precision);
    let of_token = |token| (0..k).map(move |col| levels.level(token, col));
    (0..levels.tokens())
        .flat_map(of_token)
        .map(|(level, scale)| scale * level as f32)
        .collect()
}

fn run(
    isa: Isa,
    w: &Packed,
    bias: Option<&[f32]>,
    x: Input<'_>,
    tokens: usize,
    parts: usize,
) -> Vec<f32> {
    let mut y = vec![f32::NAN; tokens * w.rows()];
    let shared = SharedSlice::new(&mut y);
    for index in 0..parts {
        let rows = crate::team::split(w.rows(), TILE_ROWS, index, parts);
        // SAFETY: one thread.
        unsafe { part(isa, w, bias, x, shared, rows) };
    }
    y
}

fn reference(w: &Weight, bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    match w {
        Weight::Int4(w) => int4::reference(w, bias, x, y),
        Weight::Int4Tiled(w) => int4::reference(&w.in_rows(), bias, x, y),
        Weight::Int8(w) => int8::reference(w, bias, x, y),
        Weight::Ternary(w) => ternary::reference(w, bias, x, y),
        Weight::F16(w) => float16::reference(w, bias, x, y),
        Weight::Vector(_) => panic!("no matrix"),
    }
}

/// Compares with the reference over the activations that the levels stand for.
fn compare(w: &Weight, tokens: usize, random: &mut Random, what: &str) {
    let (n, k) = w.shape();
    let packed = Packed::new(w.clone()).unwrap();
    let x = random.floats(tokens * k, 2.0);
    let bias = random.floats(n, 3.0);
    let mut weights = vec![0.0; k];
    for precision in [Precision::Word, Precision::Byte] {
        let words = words(Isa::available()[0], precision, &x, k);
        let (input, x) = match packed.takes_levels() {
            true => {
                let levels = Levels::new(&words, k, precision);
                (Input::Levels(levels), values(&words, k, precision))
            }
            false => (Input::Floats(&x), x.clone()),
        };
        // Sum of the absolute terms of each output: what its rounding error is measured by.
        let mut sizes = vec![0.0; tokens * n];
        for row in 0..n {
            w.dequantize_row(row, &mut weights);
            for (x, sizes) in x.chunks_exact(k).zip(sizes.chunks_exact_mut(n)) {
                let terms = weights.iter().zip(x).map(|(w, x)| (w * x).abs());
                sizes[row] = terms.sum::<f32>() + bias[row].abs();
            }
        }
        for bias in [None, Some(&bias[..])] {
            let mut expected = vec![0.0; tokens * n];
            reference(w, bias, &x, &mut expected);
            for isa in Isa::available() {
                for parts in [1, 3] {
                    let y = run(isa, &packed, bias, input, tokens, parts);
                    for (i, ((y, expected), size)) in
                        y.iter().zip(&expected).zip(&sizes).enumerate()
                    {
                        let error = (y - expected).abs();
                        assert!(
                            error <= 2e-6 * size,
                            "{what} {precision:?} {isa}, {parts} parts: {y} for {expected} at {i}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn int4_is_close_to_the_reference() {
    let mut random = Random::new(10);
    for (n, k, group, tokens) in SHAPES {
        for w in [
            random.int4(n, k, group, false),
            random.int4(n, k, group, true),
            random.int4_zeros(n, k, group),
        ] {
            let (mins, zeros) = (w.mins.is_some(), w.zeros);
            let what =
                format!("int4 n={n} k={k} group={group} t={tokens} mins={mins} zeros={zeros}");
            compare(&Weight::Int4(w), tokens, &mut random, &what);
        }
    }
}

#[test]
fn int8_is_close_to_the_reference() {
    let mut random = Random::new(11);
    for (n, k, group, tokens) in SHAPES {
        for group in [group.min(k), k] {
            let w = Weight::Int8(random.int8(n, k, group));
            let what = format!("int8 n={n} k={k} group={group} t={tokens}");
            compare(&w, tokens, &mut random, &what);
        }
    }
}

#[test]
fn f16_and_ternary_are_close_to_the_reference() {
    let mut random = Random::new(15);
    for (n, k, group, tokens) in SHAPES {
        let w = Weight::F16(random.f16(n, k));
        compare(
            &w,
            tokens,
            &mut random,
            &format!("f16 n={n} k={k} t={tokens}"),
        );
        for group in [group.min(k), k] {
            let w = Weight::Ternary(random.ternary(n, k, group));
            let what = format!("ternary n={n} k={k} group={group} t={tokens}");
            compare(&w, tokens, &mut random, &what);
        }
    }
}

/// The product of a ternary matrix in a form, tables and all.
fn run_form(isa: Isa, w: &TernaryMatrix, form: Form, x: &[f32], parts: usize) -> Vec<f32> {
    let (packed, k) = (Packed::ternary_as(w.clone(), form), w.cols);
    let words = words(isa, Precision::Byte, x, k);
    let levels = Levels::new(&words, k, Precision::Byte);
    let mut tables = vec![f32::NAN; lookup::table_words(k)];
    let levels = match levels.tokens() {
        1 => {
            lookup::tables(isa, levels, &mut tables);
            levels.with_tables(&tables)
        }
        _ => levels,
    };
    let input = Input::Levels(levels);
    run(isa, &packed, None, input, levels.tokens(), parts)
}

/// `w x` for the levels of `x`, the sums in integers, plainly.
fn exact(w: &TernaryMatrix, x: &[f32]) -> Vec<f32> {
    let words = words(Isa::available()[0], Precision::Byte, x, w.cols);
    let levels = Levels::new(&words, w.cols, Precision::Byte);
    let mut y = Vec::new();
    for token in (0..levels.tokens()).map(|token| levels.token(token)) {
        for row in 0..w.rows {
            let mut signs = vec![0.0; w.cols];
            let cells = w.row_quants(row).as_chunks().0;
            for (cell, out) in cells.iter().zip(signs.as_chunks_mut().0) {
                models::quant::ternary::decode_cell(cell, 1.0, out);
            }
            let terms = signs.iter().zip(token.high);
            let groups = terms.collect::<Vec<_>>();
            let mut sum = 0.0f32;
            for (group, scale) in groups.chunks(w.group).zip(w.row_scales(row)) {
                let ints = group.iter().map(|(w, x)| **w as i32 * i32::from(**x));
                sum = scale.mul_add(token.scales[0] * ints.sum::<i32>() as f32, sum);
            }
            y.push(sum);
        }
    }
    y
}

#[test]
fn sums_of_ternary_weights_and_bytes_are_exact_in_every_form() {
    let mut random = Random::new(16);
    for (n, k, tokens) in [
        (33, 2560, 1),
        (17, 6912, 7),
        (17, 6912, 1),
        (5, 96, 3),
        (5, 32, 1),
    ] {
        let mut w = random.ternary(n, k, k);
        let mut x = random.floats(tokens * k, 50.0);
        for extreme in [false, true] {
            if extreme {
                // All weights 1 or all -1, levels of 120 and -120: the greatest sums of nibbles.
                w.quants = [0xaa, 0x00][n % 2..][..1].repeat(n * k / 4).into();
                x.fill([120.0, -120.0][k / 32 % 2]);
                x.chunks_exact_mut(k).for_each(|x| x[k / 2] = 127.0);
            }
            let expected = exact(&w, &x);
            for isa in Isa::available() {
                for form in Form::ALL {
                    let y = run_form(isa, &w, form, &x, 2);
                    assert_eq!(y, expected, "{isa} {form} n={n} k={k} t={tokens}");
                }
            }
        }
    }
}

#[test]
fn groups_of_ternary_weights_are_looked_up_as_they_are_multiplied() {
    let mut random = Random::new(18);
    for (n, k, group) in [(33, 2560, 256), (7, 1120, 64), (18, 160, 32)] {
        let w = random.ternary(n, k, group);
        let x = random.floats(k, 50.0);
        for isa in Isa::available() {
            let expected = run_form(isa, &w, Form::Multiply, &x, 1);
            for form in Form::ALL {
                assert_eq!(
                    run_form(isa, &w, form, &x, 1),
                    expected,
                    "{isa} {form} k={k}"
                );
            }
        }
    }
}

#[test]
fn what_a_form_cannot_hold_is_multiplied() {
    let mut random = Random::new(19);
    let mut w = random.ternary(3, 64, 32);
    let form = |w: &TernaryMatrix, form| Packed::ternary_as(w.clone(), form).form().unwrap();
    assert_eq!(form(&w, Form::LookUp), Form::LookUp);
    assert_eq!(form(&w, Form::Fives), Form::Multiply, "groups differ");
    let row = [0.5f32, 0.5, 2.0, 2.0, 0.1, 0.1];
    w.scales = row.to_vec().into();
    assert_eq!(
        form(&w, Form::Fives),
        Form::Fives,
        "a scale a row in blocks"
    );
    w.quants.to_mut()[7] = 0xc0;
    for other in Form::ALL {
        assert_eq!(form(&w, other), Form::Multiply, "a weight of 2");
    }
}

#[test]
fn several_tokens_equal_one_by_one() {
    let mut random = Random::new(12);
    let (n, k, tokens) = (66, 576, 17);
    let x = random.floats(tokens * k, 2.0);
    for w in [
        Weight::Int4(random.int4(n, k, 32, false)),
        Weight::Int4(random.int4(n, k, 32, true)),
        Weight::Int4(random.int4_zeros(n, k, 32)),
        Weight::Int4(random.int4(n, k, 128, false)),
        Weight::Int8(random.int8(n, k, 32)),
        Weight::F16(random.f16(n, k)),
        Weight::Ternary(random.ternary(n, k, 64)),
    ] {
        let packed = Packed::new(w.clone()).unwrap();
        for isa in Isa::available() {
            for precision in [Precision::Word, Precision::Byte] {
                let run = |x: &[f32]| {
                    let words = words(isa, precision, x, k);
                    let input = match packed.takes_levels() {
                        true => Input::Levels(Levels::new(&words, k, precision)),
                        false => Input::Floats(x),
                    };
                    run(isa, &packed, None, input, x.len() / k, 1)
                };
                let single: Vec<f32> = x.chunks_exact(k).flat_map(run).collect();
                assert_eq!(run(&x), single, "{} {isa}: the same bits", packed.format());
            }
        }
    }
}

#[test]
fn rows_of_the_layout_are_the_weights_bit_for_bit() {
    let mut random = Random::new(13);
    for w in [
        Weight::Int4(random.int4(19, 160, 64, false)),
        Weight::Int4(random.int4(3, 1120, 128, true)),
        Weight::Int4(random.int4_zeros(17, 96, 32)),
        Weight::Int8(random.int8(18, 160, 160)),
        Weight::Ternary(random.ternary(18, 160, 32)),
        Weight::F16(random.f16(18, 160)),
    ] {
        let (rows, cols) = w.shape();
        let packed = Packed::new(w.clone()).unwrap();
        let (mut got, mut expected) = (vec![f32::NAN; cols], vec![0.0; cols]);
        for row in 0..rows {
            w.dequantize_row(row, &mut expected);
            packed.dequantize_row(row, &mut got);
            assert_eq!(got, expected, "{} row {row}", packed.format());
        }
    }
    let w = random.ternary(18, 160, 160);
    for form in Form::ALL {
        let packed = Packed::ternary_as(w.clone(), form);
        assert_eq!(packed.form(), Some(form));
        let (mut got, mut expected) = (vec![f32::NAN; 160], vec![0.0; 160]);
        for row in 0..18 {
            w.dequantize_row(row, &mut expected);
            packed.dequantize_row(row, &mut got);
            assert_eq!(got, expected, "{form} row {row}");
        }
    }
}

#[test]
#[should_panic(expected = "another length")]
fn a_matrix_with_missing_scales_is_refused() {
    let mut w = Random::new(14).int4(4, 64, 32, true);
    w.scales.to_mut().pop();
    Packed::int4(w);
}
