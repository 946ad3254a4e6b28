//! What the register instructions compute, in plain Rust.

use half::f16;

pub fn f16_to_f32(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

pub fn f32_to_f16(value: f32) -> u16 {
    if value.is_nan() {
        0x7fff
    } else {
        f16::from_f32(value).to_bits()
    }
}

/// The two halves of a register, low first.
fn halves(register: u32) -> [f32; 2] {
    [register as u16, (register >> 16) as u16].map(f16_to_f32)
}

pub fn permute_bytes(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
    let byte = |i: u32| bytes[(selector >> (4 * i)) as usize & 7];
    u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
}

/// Two values rounded to halves, the first one low.
fn round_halves(exact: [f64; 2]) -> u32 {
    let [low, high] = exact.map(|exact| {
        let rounded = f16::from_f64(exact);
        let nan = rounded.is_nan();
        u32::from(if nan { 0x7fff } else { rounded.to_bits() })
    });
    low | high << 16
}

pub fn sub_f16x2(a: u32, b: u32) -> u32 {
    let (a, b) = (halves(a), halves(b));
    // A difference of halves has at most 41 bits, so it is exact in double precision.
    round_halves([0, 1].map(|i| f64::from(a[i]) - f64::from(b[i])))
}

pub fn fma_f16x2(a: u32, b: u32, c: u32) -> u32 {
    let (a, b, c) = (halves(a), halves(b), halves(c));
    // The product is exact; the sum may round once in double precision before it rounds to a
    // half, which matters only where it is within 2^-42 of the middle between two halves.
    round_halves([0, 1].map(|i| f64::from(a[i]).mul_add(f64::from(b[i]), f64::from(c[i]))))
}

/// The value with a subnormal replaced by the zero of its sign.
fn flush(value: f32) -> f32 {
    if value.is_subnormal() {
        0.0f32.copysign(value)
    } else {
        value
    }
}

pub fn exp2(x: f32) -> f32 {
    flush(f64::from(flush(x)).exp2() as f32)
}

pub fn rsqrt(x: f32) -> f32 {
    if x == 0.0 {
        return f32::INFINITY.copysign(x);
    }
    (1.0 / f64::from(x).sqrt()) as f32
}

pub fn dp4a(a: u32, b: u32, c: i32) -> i32 {
    let products = a.to_le_bytes().into_iter().zip(b.to_le_bytes());
    products.fold(c, |sum, (a, b)| {
        sum.wrapping_add(i32::from(a.cast_signed()) * i32::from(b.cast_signed()))
    })
}

pub fn dp4a_u8_i8(a: u32, b: u32, c: i32) -> i32 {
    let products = a.to_le_bytes().into_iter().zip(b.to_le_bytes());
    products.fold(c, |sum, (a, b)| {
        sum.wrapping_add(i32::from(a) * i32::from(b.cast_signed()))
    })
}
