//! Plain loops over 16 lanes that the compiler turns into vector code inside `per_isa!`.

#[cfg(any(test, target_arch = "aarch64"))]
use half::f16;

/// Lanes that the loops keep apart: one AVX-512 register of f32.
pub(crate) const LANES: usize = 16;

#[inline(always)]
fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    // Without the instruction `mul_add` is a library call.
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` within 2 units in the last place for `x` in -87..88; saturates outside, NaN stays NaN.
///
/// `e^x = 2^n * e^r` with `n = round(x / ln 2)` and a Taylor polynomial for `|r| <= ln 2 / 2`.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two pieces; the first has zeros at the end, so that n times it is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = mul_add::<FMA>(x, LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add::<FMA>(n, -LN2_HIGH, x);
    let r = mul_add::<FMA>(n, -LN2_LOW, r);
    let mut p = 1.0 / 5040.0;
    for factor in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = mul_add::<FMA>(p, r, factor);
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    p * power
}

/// Sum of `f(x)` over a slice, 16 partial sums folded in halves.
#[inline(always)]
pub(crate) fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f(value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane += f(value);
    }
    fold(lanes, |a, b| a + b)
}

/// Sum of squares, in f64, rounded once.
#[inline(always)]
pub(crate) fn sum_of_squares(values: &[f32]) -> f32 {
    let mut lanes = [0.0f64; LANES];
    let square = |value: f32| f64::from(value) * f64::from(value);
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += square(value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane += square(value);
    }
    lanes.iter().sum::<f64>() as f32
}

/// Greatest value that is not NaN; negative infinity if there is none.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = greater(*lane, value);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = greater(*lane, value);
    }
    fold(lanes, greater)
}

/// Halves as floats, where there is no instruction for it: by the bits: a subnormal is what remains of `1.m` with its one taken away again. No NaN and
/// no infinity is among them.
#[cfg(any(test, target_arch = "aarch64"))]
#[inline(always)]
pub(crate) fn widen(halves: &[f16], out: &mut [f32]) {
    // 2^-14, where f16's subnormals begin.
    const LEAST: u32 = (127 - 14) << 23;
    for (out, half) in out.iter_mut().zip(halves) {
        let bits = u32::from(half.to_bits());
        let (sign, magnitude) = ((bits & 0x8000) << 16, (bits & 0x7fff) << 13);
        let normal = magnitude + (112 << 23);
        let small = f32::from_bits(LEAST | magnitude) - f32::from_bits(LEAST);
        let value = if magnitude < 1 << 23 {
            small.to_bits()
        } else {
            normal
        };
        *out = f32::from_bits(sign | value);
    }
}

/// One value of 16, in halves.
#[inline(always)]
pub(crate) fn fold<T: Copy>(mut lanes: [T; LANES], f: impl Fn(T, T) -> T) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_and_saturates() {
        for i in -86_900..=87_900 {
            let x = i as f32 * 1e-3;
            let truth = (x as f64).exp();
            for got in [exp::<true>(x), exp::<false>(x)] {
                assert!(
                    ((got as f64 - truth) / truth).abs() < 3e-7,
                    "exp({x}) = {got}"
                );
            }
        }
        assert!(exp::<true>(f32::NEG_INFINITY) < 1e-37);
        assert!(exp::<true>(f32::INFINITY) > 1e38);
        assert!(exp::<true>(f32::NAN).is_nan());
        assert_eq!(exp::<true>(0.0), 1.0);
    }

    #[test]
    fn every_finite_half_becomes_its_float() {
        let halves: Vec<f16> = (0..=u16::MAX)
            .map(f16::from_bits)
            .filter(|half| half.is_finite())
            .collect();
        let mut out = vec![f32::NAN; halves.len()];
        widen(&halves, &mut out);
        for (half, out) in halves.iter().zip(out) {
            assert_eq!(out.to_bits(), half.to_f32().to_bits(), "{half:?}");
        }
    }

    #[test]
    fn sum_and_max_take_the_remainder() {
        let values: Vec<f32> = (0..37).map(|i| ((i * 7) % 37) as f32 - 40.0).collect();
        assert_eq!(sum(&values, |v| v), values.iter().sum::<f32>());
        assert_eq!(max(&values), -4.0);
        assert_eq!(max(&[]), f32::NEG_INFINITY);
        assert_eq!(max(&[f32::NAN, -3.0]), -3.0);
    }
}
