//! The host twins: arithmetic at its edges, and every accessor under the emulator.

use super::*;
use cuda_std::emulator::{Buffer, Fault, Launch, Report, launch};
use cuda_std::shared::dynamic_shared_mem;
use std::panic::Location;

#[test]
fn half_conversions_round_to_nearest_even() {
    assert_eq!(f32_to_f16(1.0), 0x3c00);
    // 1 + 2^-11 lies halfway between 1 and 1 + 2^-10: to the even one.
    assert_eq!(f32_to_f16(1.0 + 2f32.powi(-11)), 0x3c00);
    assert_eq!(f32_to_f16(1.0 + 3.0 * 2f32.powi(-11)), 0x3c02);
    assert_eq!(f32_to_f16(65519.0), 0x7bff);
    assert_eq!(f32_to_f16(65520.0), 0x7c00);
    assert_eq!(f32_to_f16(2f32.powi(-24)), 1, "the smallest subnormal half");
    assert_eq!(
        f32_to_f16(2f32.powi(-25)),
        0,
        "halfway to zero goes to the even one"
    );
    assert_eq!(f32_to_f16(-0.0), 0x8000);
    assert_eq!(f32_to_f16(-f32::NAN), 0x7fff);
    assert_eq!(f16_to_f32(1), 2f32.powi(-24));
    assert_eq!(f16_to_f32(0xfc00), f32::NEG_INFINITY);
    for bits in 0..=u16::MAX {
        let value = f16_to_f32(bits);
        if !value.is_nan() {
            assert_eq!(f32_to_f16(value), bits);
        }
    }
}

#[test]
fn fma_rounds_once() {
    let a = 1.0 + f32::EPSILON;
    // a*a = 1 + 2e + e^2: the e^2 survives only without an intermediate rounding.
    assert_eq!(
        fma(a, a, -(1.0 + 2.0 * f32::EPSILON)),
        f32::EPSILON * f32::EPSILON
    );
    assert_eq!(a * a - (1.0 + 2.0 * f32::EPSILON), 0.0);
}

#[test]
fn exp2_flushes_subnormals() {
    assert_eq!(exp2(3.0), 8.0);
    assert_eq!(exp2(-126.0), f32::MIN_POSITIVE);
    assert_eq!(exp2(-126.5), 0.0, "a subnormal result");
    assert_eq!(exp2(f32::from_bits(1)), 1.0, "a subnormal input");
    assert_eq!(exp2(128.0), f32::INFINITY);
    assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
    assert!(exp2(f32::NAN).is_nan());
}

#[test]
fn exp_is_close_to_e_to_the_x() {
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    assert_eq!(exp(-88.0), 0.0);
    assert_eq!(exp(89.0), f32::INFINITY);
    for i in -800..=800 {
        let x = i as f32 / 10.0;
        let exact = f64::from(x).exp();
        let error = (f64::from(exp(x)) - exact).abs() / exact;
        let bound = f64::from(x.abs()) * 2f64.powi(-24) * 1.5 + 2f64.powi(-23);
        assert!(error <= bound, "exp({x}): relative error {error:e}");
    }
}

#[test]
fn rsqrt_and_rcp_at_their_edges() {
    assert_eq!(rsqrt(4.0), 0.5);
    assert_eq!(rsqrt(0.0), f32::INFINITY);
    assert_eq!(rsqrt(-0.0), f32::NEG_INFINITY);
    assert_eq!(rsqrt(f32::INFINITY), 0.0);
    assert!(rsqrt(-1.0).is_nan());
    assert_eq!(
        rsqrt(2f32.powi(-140)),
        2f32.powi(70),
        "a subnormal input is not flushed"
    );
    assert_eq!(rcp(4.0), 0.25);
    assert_eq!(rcp(-0.0), f32::NEG_INFINITY);
    assert_eq!(rcp(f32::NEG_INFINITY).to_bits(), (-0.0f32).to_bits());
}

#[test]
fn dp4a_signs_and_wraps() {
    let bytes = |b: [i8; 4]| u32::from_le_bytes(b.map(i8::cast_unsigned));
    assert_eq!(
        dp4a(bytes([1, -2, 3, -4]), bytes([5, 6, -7, -8]), 10),
        10 + 5 - 12 - 21 + 32
    );
    assert_eq!(dp4a(bytes([-128; 4]), bytes([-128; 4]), 0), 65536);
    assert_eq!(
        dp4a(bytes([1, 0, 0, 0]), bytes([1, 0, 0, 0]), i32::MAX),
        i32::MIN
    );
    assert_eq!(dp4a_u8_i8(0xff, bytes([-1, 0, 0, 0]), 0), -255);
    assert_eq!(dp4a(0xff, bytes([-1, 0, 0, 0]), 0), 1);
}

fn on_one_thread(thread: impl Fn()) -> Result<Report, Fault> {
    launch(
        "one_thread",
        &Launch::linear(1, 1).with_shared_bytes(64),
        thread,
    )
}

#[test]
fn global_accessors_read_and_write_their_width() {
    let bytes: Vec<u8> = (0..32).map(|i| 0xf0 + i % 16).collect();
    let source = Buffer::from_slice(&bytes);
    let (p, y) = (source.as_ptr(), Buffer::<u32>::uninit(8));
    let out = y.as_mut_ptr();
    // SAFETY: the emulator checks every access.
    on_one_thread(|| unsafe {
        assert_eq!((ld_global_u8(p), ld_global_nc_u8(p)), (0xf0, 0xf0));
        assert_eq!(
            (ld_global_i8(p.cast()), ld_global_nc_i8(p.cast())),
            (-16, -16)
        );
        assert_eq!(
            (ld_global_u16(p.cast()), ld_global_nc_u16(p.cast())),
            (0xf1f0, 0xf1f0)
        );
        let word = 0xf3f2_f1f0;
        assert_eq!(
            (ld_global_u32(p.cast()), ld_global_nc_u32(p.cast())),
            (word, word)
        );
        assert_eq!(ld_global_f32(p.cast()).to_bits(), word);
        assert_eq!(ld_global_nc_f32(p.cast()).to_bits(), word);
        let words = [word, 0xf7f6_f5f4, 0xfbfa_f9f8, 0xfffe_fdfc];
        assert_eq!(ld_global_nc_v2_u32(p.cast()), words[..2]);
        assert_eq!(ld_global_v4_u32(p.cast()), words);
        assert_eq!(ld_global_nc_v4_u32(p.cast()), words);
        assert_eq!(ld_global_v4_f32(p.cast()).map(f32::to_bits), words);
        assert_eq!(ld_global_nc_v4_f32(p.cast()).map(f32::to_bits), words);
        st_global_v4_f32(out.cast(), [1.0, 2.0, 3.0, 4.0]);
        st_global_u32(out.wrapping_add(4), 5);
        st_global_f32(out.wrapping_add(5).cast(), 6.0);
        st_global_u16(out.wrapping_add(6).cast(), 7);
        st_global_u16(out.wrapping_add(6).cast::<u16>().wrapping_add(1), 8);
        st_global_u32(out.wrapping_add(7), 9);
    })
    .unwrap();
    let bits = f32::to_bits;
    let expected = [
        bits(1.0),
        bits(2.0),
        bits(3.0),
        bits(4.0),
        5,
        bits(6.0),
        0x8_0007,
        9,
    ];
    assert_eq!(y.to_vec().unwrap(), expected);
}

#[test]
fn shared_accessors_read_and_write_their_width() {
    // SAFETY: the emulator checks every access.
    on_one_thread(|| unsafe {
        let base = dynamic_shared_mem();
        st_shared_v4_f32(base, 16, [1.0, 2.0, 3.0, 4.0]);
        st_shared_u32(base.offset_bytes(16), 4, 7);
        st_shared_f32(base, 24, 8.0);
        assert_eq!((ld_shared_f32(base, 16), ld_shared_u32(base, 20)), (1.0, 7));
        assert_eq!(ld_shared_v4_f32(base, 16)[2..], [8.0, 4.0]);
    })
    .unwrap();
}

/// The fault of the access that the closure makes names this file and the closure's line.
#[track_caller]
fn names_its_line(access: impl Fn()) {
    let fault = on_one_thread(access).expect_err("refused");
    let location = fault
        .place
        .as_ref()
        .and_then(|place| place.location)
        .expect("a line");
    let caller = Location::caller();
    assert_eq!(location.file(), caller.file(), "{fault}");
    // The closure stands in the line of the call or the one below.
    assert!(
        (0..=1).contains(&(location.line() - caller.line())),
        "{fault}"
    );
}

#[test]
fn a_fault_names_the_line_that_called_the_accessor() {
    let null = std::ptr::null_mut::<f32>();
    let base = dynamic_shared_mem;
    // SAFETY: the emulator refuses every one of these accesses.
    unsafe {
        names_its_line(|| _ = ld_global_f32(null));
        names_its_line(|| _ = ld_global_nc_v2_u32(null.cast()));
        names_its_line(|| _ = ld_global_nc_v4_f32(null));
        names_its_line(|| st_global_f32(null, 1.0));
        names_its_line(|| st_global_v4_f32(null, [1.0; 4]));
        names_its_line(|| _ = ld_shared_f32(base(), 0));
        names_its_line(|| _ = ld_shared_v4_f32(base(), 0));
        names_its_line(|| st_shared_u32(base(), 64, 1));
        names_its_line(|| st_shared_v4_f32(base(), 56, [1.0; 4]));
    }
}

#[test]
fn packed_halves_subtract_on_their_own() {
    // 1024 + 200 and 1024 + 3, less 1152: what bytes under the exponent of 1024 become.
    assert_eq!(sub_f16x2(0x6403_64c8, 0x6480_6480), {
        u32::from(f32_to_f16(-125.0)) << 16 | u32::from(f32_to_f16(72.0))
    });
    assert_eq!(
        sub_f16x2(0x3c00_7c00, 0x3c00_7c00),
        0x7fff,
        "infinity less itself"
    );
}

#[test]
fn bytes_are_picked_from_two_registers() {
    let (a, b) = (0x3322_1100, 0x7766_5544);
    assert_eq!(permute_bytes(a, b, 0x3210), a);
    assert_eq!(permute_bytes(a, b, 0x5410), 0x5544_1100);
    assert_eq!(permute_bytes(a, b, 0x7632), 0x7766_3322);
}

#[test]
fn two_floats_become_two_halves() {
    assert_eq!(f32x2_to_f16x2(1.0, -2.0), 0xc000_3c00);
}
