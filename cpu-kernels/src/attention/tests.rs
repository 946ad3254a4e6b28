//! Every variant against the reference, at several positions and chunk lengths.

use super::*;
use crate::testing::{Random, assert_close};

fn shape(heads: usize, kv_heads: usize, head_dim: usize, capacity: usize) -> AttentionShape {
    let scale = 1.0 / (head_dim as f32).sqrt();
    AttentionShape {
        heads,
        kv_heads,
        head_dim,
        capacity,
        position: 0,
        scale,
        window: None,
    }
}

fn caches(random: &mut Random, shape: &AttentionShape) -> (Vec<f16>, Vec<f16>) {
    let len = shape.kv_heads * shape.capacity * shape.head_dim;
    let mut cache = |range| {
        random
            .floats(len, range)
            .into_iter()
            .map(f16::from_f32)
            .collect()
    };
    (cache(3.0), cache(1.0))
}

fn by_parts(isa: Isa, q: &[f32], k: &[f16], v: Values<'_>, shape: &AttentionShape) -> Vec<f32> {
    let per_kv = shape.heads / shape.kv_heads;
    let width = per_kv * shape.head_dim;
    let mut out = vec![f32::NAN; q.len()];
    let mut scores = vec![f32::NAN; per_kv * shape.capacity];
    let units = q.chunks_exact(width).zip(out.chunks_exact_mut(width));
    for (unit, (q, out)) in units.enumerate() {
        let (token, head) = (unit / shape.kv_heads, unit % shape.kv_heads);
        part(isa, q, k, v, out, shape, token, head, &mut scores);
    }
    out
}

#[test]
fn every_variant_is_close_to_the_reference() {
    let mut random = Random::new(20);
    for (mut shape, window) in [
        (shape(9, 3, 64, 70), None),
        (shape(4, 2, 20, 41), Some(8)),
        (shape(2, 2, 134, 33), Some(1)),
        (shape(14, 2, 80, 65), Some(64)),
    ] {
        shape.window = window;
        let (k, v) = caches(&mut random, &shape);
        for (position, tokens) in [(0, 1), (0, 17), (5, 3), (shape.capacity - 1, 1), (13, 17)] {
            shape.position = position;
            let q = random.floats(tokens * shape.heads * shape.head_dim, 3.0);
            let mut expected = vec![0.0; q.len()];
            reference(&q, &k, &v, &mut expected, &shape);
            let mut out = vec![f32::NAN; q.len()];
            forward(&q, &k, &v, &mut out, &shape);
            assert_close(&out, &expected, 3e-6, "forward");
            for isa in Isa::available() {
                let what = format!("{isa} {shape:?} t={tokens}");
                let out = by_parts(isa, &q, &k, Values::F16(&v), &shape);
                assert_close(&out, &expected, 3e-6, &what);
            }
            let levels: Vec<i8> = v.iter().map(|v| (v.to_f32() * 127.0) as i8).collect();
            let scales = random.floats(v.len() / shape.head_dim, 0.01);
            let scales: Vec<f16> = scales.into_iter().map(f16::from_f32).collect();
            reference_int8(&q, &k, &levels, &scales, &mut expected, &shape);
            for isa in Isa::available() {
                let what = format!("{isa} {shape:?} t={tokens}, values of 8 bits");
                let out = by_parts(isa, &q, &k, Values::Int8(&levels, &scales), &shape);
                assert_close(&out, &expected, 3e-6, &what);
            }
        }
    }
}

#[test]
fn a_chunk_equals_token_by_token() {
    let mut random = Random::new(21);
    let mut shape = shape(6, 2, 48, 64);
    let (k, v) = caches(&mut random, &shape);
    let width = shape.heads * shape.head_dim;
    let q = random.floats(17 * width, 3.0);
    for isa in Isa::available() {
        shape.position = 11;
        let chunk = by_parts(isa, &q, &k, Values::F16(&v), &shape);
        for (i, (q, expected)) in q
            .chunks_exact(width)
            .zip(chunk.chunks_exact(width))
            .enumerate()
        {
            shape.position = 11 + i;
            assert_eq!(
                by_parts(isa, q, &k, Values::F16(&v), &shape),
                expected,
                "{isa} token {i}"
            );
        }
    }
}

#[test]
fn a_window_sees_its_last_positions_only() {
    let mut random = Random::new(22);
    let mut shape = shape(1, 1, 8, 20);
    let (mut k, mut v) = caches(&mut random, &shape);
    let q = random.floats(3 * 8, 3.0);
    (shape.position, shape.window) = (10, Some(4));
    let mut expected = vec![0.0; q.len()];
    reference(&q, &k, &v, &mut expected, &shape);
    // Tokens at 10, 11 and 12 see from 7 on.
    for cache in [&mut k, &mut v] {
        cache[..7 * 8].fill(f16::NAN);
    }
    let mut got = vec![0.0; q.len()];
    reference(&q, &k, &v, &mut got, &shape);
    assert_eq!(got, expected);
    k[7 * 8..8 * 8].fill(f16::NAN);
    reference(&q, &k, &v, &mut got, &shape);
    assert!(
        got[..8].iter().all(|v| v.is_nan()),
        "the first sees position 7"
    );
    assert_eq!(got[8..], expected[8..]);
}

#[test]
fn large_scores_do_not_overflow() {
    let shape = shape(1, 1, 16, 3);
    let k: Vec<f16> = (0..48)
        .map(|i| f16::from_f32((i / 16) as f32 * 300.0))
        .collect();
    let v: Vec<f16> = (0..48).map(|i| f16::from_f32(i as f32)).collect();
    let shape = AttentionShape {
        position: 2,
        ..shape
    };
    let mut expected = [0.0; 16];
    reference(&[200.0; 16], &k, &v, &mut expected, &shape);
    assert_eq!(expected[0], 32.0);
    for isa in Isa::available() {
        assert_close(
            &by_parts(isa, &[200.0; 16], &k, Values::F16(&v), &shape),
            &expected,
            1e-6,
            isa.name(),
        );
    }
}

#[test]
#[should_panic(expected = "beyond the capacity")]
fn tokens_beyond_the_capacity_are_refused() {
    let shape = AttentionShape {
        position: 3,
        ..shape(1, 1, 16, 3)
    };
    let cache = vec![f16::ZERO; 48];
    forward(&[0.0; 16], &cache, &cache, &mut [0.0; 16], &shape);
}
