//! Index helpers and launch plans of the logits kernels.

use super::*;
use crate::launch::{DeviceInfo, DeviceSlice, Launch};

#[test]
fn places_of_x_are_a_permutation() {
    let mut places: Vec<u32> = (0..2 * SPAN / 4)
        .flat_map(|quad| [Layout::x(quad, 0), Layout::x(quad, 1)])
        .collect();
    places.sort_unstable();
    assert!(places.iter().copied().eq((0..2 * SPAN * 4).step_by(8)));
}

/// Of 8 lanes, four read 16 bytes of x each and the others the zeros.
#[test]
fn eight_lanes_never_share_a_bank_group() {
    let zeros = Layout::new(SPAN).zeros();
    for first in [0, 64] {
        for offset in [0, 16] {
            let x = [0, 32, 64, 96].map(|lane| first * 2 + lane + offset);
            let bank = |offset: u32| offset / 16 % 8;
            let seen = x.iter().fold(1u32 << bank(zeros + offset), |seen, &x| {
                assert_eq!(seen >> bank(x) & 1, 0);
                seen | 1 << bank(x)
            });
            assert_eq!(seen.count_ones(), 5);
        }
    }
}

#[test]
fn plan_is_two_blocks_a_multiprocessor() {
    let slice = DeviceSlice {
        address: 0x1000,
        bytes: 1 << 30,
    };
    let ops = Operands {
        quants: slice,
        scales: slice,
        x: slice,
        logits: DeviceSlice::NONE,
        scratch: slice,
    };
    let shape = Shape {
        vocab: 49_152,
        width: 576,
        group: 32,
    };
    let greedy = Greedy {
        context: 7,
        tokens: slice,
        state: slice,
        advance: true,
    };
    let call = plan(&DeviceInfo::T4, &shape, &ops, Some(&greedy)).unwrap();
    assert_eq!(call.launch, Launch::linear(80, 256, 768 * 4 + 64 + 68));
    assert_eq!(call.kernel, "logits_int8");
    assert_eq!(call.args[5..], [0x1000, 0x1000, 49_152, 576, 5, 1]);
    let by_row = Shape {
        group: 576,
        vocab: 65,
        ..shape
    };
    let call = plan(&DeviceInfo::T4, &by_row, &ops, None).unwrap();
    assert_eq!(
        (call.kernel, call.launch.grid[0]),
        ("logits_int8_by_row", 2)
    );
    assert_eq!(call.args[5..], [0, 0, 65, 576, 31, 0]);
    let short = DeviceSlice {
        address: 0x1000,
        bytes: 4,
    };
    let refused = |ops| plan(&DeviceInfo::T4, &shape, &ops, None).is_err();
    assert!(refused(Operands {
        logits: short,
        ..ops
    }));
    assert!(refused(Operands {
        scratch: short,
        ..ops
    }));
    let wide = Shape {
        width: 1 << 14,
        ..shape
    };
    assert!(plan(&DeviceInfo::T4, &wide, &ops, None).is_err());
}
