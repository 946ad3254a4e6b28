//! Products of a warpgroup, rightly and wrongly used.

use cuda_std::emulator::access::{store_global, store_shared};
use cuda_std::emulator::{Buffer, Fault, FaultKind, Launch, launch};
use cuda_std::shared::dynamic_shared_mem;
use cuda_std::warpgroup::{self, Operand, Product, Sums};
use cuda_std::{thread, warp};
use half::f16;

/// Columns of B.
const COLUMNS: u32 = 64;
const B_BYTES: u32 = COLUMNS * warpgroup::ROW_BYTES;

/// What a kernel leaves out or does too early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    None,
    NoFence,
    NoFenceOfShared,
    NoBarrier,
    NothingWritten,
    StoreBeforeWait,
    SumsBeforeWait,
    SumsOfOpenGroup,
    WarpLeftOut,
    OtherOperand,
    Misaligned,
}

/// Row r, column k of A: small whole numbers, whose sums are exact.
fn a(row: u32, k: u32) -> f32 {
    ((3 * row + 5 * k) % 17) as f32 - 8.0
}

/// Row k of column c of B.
fn b(column: u32, k: u32) -> f32 {
    ((7 * column + k) % 13) as f32 - 6.0
}

fn halves(low: f32, high: f32) -> u32 {
    let bits = |value| u32::from(f16::from_f32(value).to_bits());
    bits(low) | bits(high) << 16
}

/// A thread of a product of 64 rows by 64 columns over a depth of 64.
fn multiply(mistake: Mistake, y: *mut f32) {
    let shared = dynamic_shared_mem();
    let rank = thread::thread_idx_x();
    let (warp, lane) = (rank / 32, rank % 32);
    let (g, q) = (lane / 4, lane % 4);
    let store_b = || {
        for i in (rank..COLUMNS * 32).step_by(128) {
            let (column, pair) = (i / 32, i % 32);
            let at = warpgroup::operand_offset(column, pair / 4) + pair % 4 * 4;
            let value = halves(b(column, 2 * pair), b(column, 2 * pair + 1));
            store_shared(shared.offset_bytes(at).address(), value);
        }
        if mistake != Mistake::NoFenceOfShared {
            warpgroup::fence_shared();
        }
    };
    if mistake != Mistake::NothingWritten {
        store_b();
    }
    thread::sync_threads();
    if mistake == Mistake::NoBarrier && rank == 0 {
        store_b();
    }
    let mut sums = Sums::<32>::zeros();
    let start = if mistake == Mistake::Misaligned {
        256
    } else {
        0
    };
    let operand = Operand::new(shared.offset_bytes(start));
    if mistake != Mistake::NoFence {
        warpgroup::fence();
    }
    let steps = if mistake == Mistake::WarpLeftOut && warp == 3 {
        3
    } else {
        4
    };
    for step in 0..steps {
        let of = |i: u32| {
            let (row, k) = (16 * warp + g + 8 * (i % 2), 16 * step + 2 * q + 8 * (i / 2));
            halves(a(row, k), a(row, k + 1))
        };
        let other = mistake == Mistake::OtherOperand && warp == 2;
        let operand = operand.step(if other { 3 - step } else { step });
        // SAFETY: the emulator checks the operand.
        unsafe { sums.multiply_add([of(0), of(1), of(2), of(3)], operand) };
    }
    if mistake != Mistake::SumsOfOpenGroup {
        warpgroup::commit();
    }
    if mistake == Mistake::StoreBeforeWait {
        thread::sync_threads();
        store_shared(shared.address(), 0u32);
    }
    if mistake == Mistake::SumsBeforeWait {
        warpgroup::wait::<1>();
    } else {
        warpgroup::wait::<0>();
    }
    for (i, value) in sums.values().into_iter().enumerate() {
        let i = i as u32;
        let (row, column) = (16 * warp + g + i % 4 / 2 * 8, i / 4 * 8 + 2 * q + i % 2);
        store_global(y.wrapping_add((row * COLUMNS + column) as usize), value);
    }
    warp::sync_warp(warp::FULL_MASK);
}

fn outcome(mistake: Mistake) -> Result<Vec<f32>, Fault> {
    let y = Buffer::<f32>::uninit((64 * COLUMNS) as usize);
    let block = Launch::linear(1, 128).with_shared_bytes(B_BYTES + 256);
    launch("multiply", &block, || multiply(mistake, y.as_mut_ptr()))?;
    y.to_vec()
}

#[test]
fn the_product_is_that_of_its_matrices() {
    let y = outcome(Mistake::None).unwrap();
    for row in 0..64 {
        for column in 0..COLUMNS {
            let want: f32 = (0..64).map(|k| a(row, k) * b(column, k)).sum();
            assert_eq!(
                y[(row * COLUMNS + column) as usize],
                want,
                "{row}, {column}"
            );
        }
    }
}

#[test]
fn mistakes_are_reported() {
    let wrong = |mistake, kind, detail: &str| {
        let fault = outcome(mistake).expect_err("the kernel is wrong");
        let text = fault.to_string();
        assert_eq!(fault.kind, kind, "{mistake:?}: {text}");
        assert!(text.contains(detail), "{mistake:?}: {text}");
    };
    let product = FaultKind::AsyncProduct;
    wrong(Mistake::NoFence, product, "without `fence`");
    wrong(
        Mistake::NoFenceOfShared,
        product,
        "no `fence_shared` after it",
    );
    wrong(
        Mistake::NoBarrier,
        FaultKind::Race,
        "with no barrier between",
    );
    wrong(
        Mistake::NothingWritten,
        FaultKind::Uninitialised,
        "nothing wrote it",
    );
    wrong(Mistake::StoreBeforeWait, product, "may read it");
    wrong(Mistake::SumsBeforeWait, product, "may still add to");
    wrong(Mistake::SumsOfOpenGroup, product, "may still add to");
    wrong(
        Mistake::WarpLeftOut,
        product,
        "has started 3 products, its warpgroup 4",
    );
    wrong(
        Mistake::OtherOperand,
        product,
        "another warp of its warpgroup starts",
    );
    wrong(Mistake::Misaligned, product, "aligned to 1024");
}
