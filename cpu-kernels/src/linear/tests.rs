//! Every variant against the reference, at shapes that are not round.

use super::*;
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

fn run<M: Matrix>(isa: Isa, w: &M, bias: Option<&[f32]>, x: &[f32], parts: usize) -> Vec<f32> {
    let (n, k) = (w.rows(), w.cols());
    let mut y = vec![f32::NAN; x.len() / k * n];
    let shared = SharedSlice::new(&mut y);
    let mut scratch = vec![f32::NAN; scratch_elems(k)];
    for index in 0..parts {
        let rows = crate::team::split(n, TILE_ROWS, index, parts);
        // SAFETY: one thread.
        unsafe { part(isa, w, bias, x, shared, rows, &mut scratch) };
    }
    y
}

fn compare<M: Matrix>(
    w: &M,
    tokens: usize,
    random: &mut Random,
    reference: impl Fn(Option<&[f32]>, &[f32], &mut [f32]),
    forward: impl Fn(Option<&[f32]>, &[f32], &mut [f32]),
    what: &str,
) {
    let (n, k) = (w.rows(), w.cols());
    let x = random.floats(tokens * k, 2.0);
    let bias = random.floats(n, 3.0);
    // Sum of the absolute terms of each output: what its rounding error is measured by.
    let mut sizes = vec![0.0; tokens * n];
    let mut weights = vec![0.0; k];
    for row in 0..n {
        w.dequantize(Isa::available()[0], row, &mut weights);
        for (x, sizes) in x.chunks_exact(k).zip(sizes.chunks_exact_mut(n)) {
            let terms = weights.iter().zip(x).map(|(w, x)| (w * x).abs());
            sizes[row] = terms.sum::<f32>() + bias[row].abs();
        }
    }
    for bias in [None, Some(&bias[..])] {
        let mut expected = vec![0.0; tokens * n];
        reference(bias, &x, &mut expected);
        let mut y = vec![f32::NAN; tokens * n];
        forward(bias, &x, &mut y);
        let check = |y: &[f32], what: &str| {
            for (i, ((y, expected), size)) in y.iter().zip(&expected).zip(&sizes).enumerate() {
                let error = (y - expected).abs();
                assert!(error <= 1e-6 * size, "{what}: {y} for {expected} at {i}");
            }
        };
        check(&y, &format!("{what} forward"));
        for isa in Isa::available() {
            for parts in [1, 3] {
                let y = run(isa, w, bias, &x, parts);
                check(&y, &format!("{what} {isa}, {parts} parts"));
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
            compare(
                &w,
                tokens,
                &mut random,
                |bias, x, y| int4::reference(&w, bias, x, y),
                |bias, x, y| int4::forward(&w, bias, x, y),
                &format!(
                    "int4 n={n} k={k} group={group} t={tokens} mins={} zeros={}",
                    w.mins.is_some(),
                    w.zeros
                ),
            );
        }
    }
}

#[test]
fn int8_is_close_to_the_reference() {
    let mut random = Random::new(11);
    for (n, k, group, tokens) in SHAPES {
        for group in [group, k] {
            let w = random.int8(n, k, group);
            compare(
                &w,
                tokens,
                &mut random,
                |bias, x, y| int8::reference(&w, bias, x, y),
                |bias, x, y| int8::forward(&w, bias, x, y),
                &format!("int8 n={n} k={k} group={group} t={tokens}"),
            );
        }
    }
}

#[test]
fn f16_and_ternary_are_close_to_the_reference() {
    let mut random = Random::new(15);
    for (n, k, group, tokens) in SHAPES {
        let w = random.f16(n, k);
        compare(
            &w,
            tokens,
            &mut random,
            |bias, x, y| float16::reference(&w, bias, x, y),
            |bias, x, y| float16::forward(&w, bias, x, y),
            &format!("f16 n={n} k={k} t={tokens}"),
        );
        for group in [group.min(k), k] {
            let w = random.ternary(n, k, group);
            compare(
                &w,
                tokens,
                &mut random,
                |bias, x, y| ternary::reference(&w, bias, x, y),
                |bias, x, y| ternary::forward(&w, bias, x, y),
                &format!("ternary n={n} k={k} group={group} t={tokens}"),
            );
        }
    }
}

#[test]
fn several_tokens_equal_one_by_one() {
    let mut random = Random::new(12);
    let (n, k, tokens) = (66, 576, 17);
    let four = random.int4(n, k, 32, true);
    let eight = random.int8(n, k, 32);
    let (half, two) = (random.f16(n, k), random.ternary(n, k, 64));
    let x = random.floats(tokens * k, 2.0);
    for isa in Isa::available() {
        for (what, run) in [
            (
                "int4",
                &(|x: &[f32]| run(isa, &four, None, x, 1)) as &dyn Fn(&[f32]) -> Vec<f32>,
            ),
            ("int8", &|x| run(isa, &eight, None, x, 1)),
            ("f16", &|x| run(isa, &half, None, x, 1)),
            ("ternary", &|x| run(isa, &two, None, x, 1)),
        ] {
            let single: Vec<f32> = x.chunks_exact(k).flat_map(run).collect();
            assert_eq!(run(&x), single, "{what} {isa}: the same bits");
        }
    }
}

#[test]
fn dequantized_rows_are_the_weights_bit_for_bit() {
    let mut random = Random::new(13);
    for w in [
        random.int4(3, 160, 64, false),
        random.int4(3, 1120, 128, true),
        random.int4(3, 32, 32, true),
        random.int4_zeros(3, 96, 32),
        random.int4_zeros(3, 1120, 128),
    ] {
        let (k, group) = (w.cols, w.group);
        for isa in Isa::available() {
            for row in 0..3 {
                let mut got = vec![0.0; k];
                w.dequantize(isa, row, &mut got);
                for (j, got) in got.into_iter().enumerate() {
                    let byte = w.quants[row * k / 2 + j / 32 * 16 + j % 16];
                    let q = if j % 32 < 16 { byte & 15 } else { byte >> 4 } as f32;
                    let i = row * k.div_ceil(group) + j / group;
                    let scale = w.scales[i].to_f32();
                    let weight = match &w.mins {
                        // Exact, as the product of an f16 and four bits is: one rounding at most.
                        Some(zeros) if w.zeros => scale * (q - zeros[i].to_f32()),
                        Some(mins) => scale * q + mins[i].to_f32(),
                        None => scale * (q - 8.0),
                    };
                    assert_eq!(got, weight, "{isa} row {row} column {j}");
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "another length")]
fn a_matrix_with_missing_scales_is_refused() {
    let mut w = Random::new(14).int4(4, 64, 32, true);
    w.scales.to_mut().pop();
    int4::forward(&w, None, &[0.0; 64], &mut [0.0; 4]);
}
