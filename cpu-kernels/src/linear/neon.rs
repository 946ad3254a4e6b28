//! NEON: byte products added up in 16 bits, in which a chunk of 4-bit levels fits.

use std::arch::aarch64::*;

use half::f16;

use super::kernel::{Call, Vector};
use super::lookup::TABLES_OF_LINE;
use super::{LINE_BYTES, STEP_COLS, STEPS, TILE_ROWS};
use crate::pages::Line;
use crate::sdot::{sdot, usmmla};

struct Neon;
/// `sdot`: four products and their sum in one instruction.
struct Dotprod;
/// `usmmla`: eight columns of two rows by those of two tokens. One token goes by `sdot`.
struct I8mm;

/// # Safety
/// As [`Call::run`].
#[target_feature(enable = "neon")]
pub(super) unsafe fn run(call: &Call<'_>) {
    // SAFETY: the caller's contract.
    unsafe { call.run::<Neon>() }
}

/// # Safety
/// As [`Call::run`].
#[target_feature(enable = "neon,dotprod,i8mm")]
pub(super) unsafe fn run_i8mm(call: &Call<'_>) {
    // SAFETY: the caller's contract.
    unsafe { call.run::<I8mm>() }
}

/// # Safety
/// As [`Call::run`].
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn run_dotprod(call: &Call<'_>) {
    // SAFETY: the caller's contract.
    unsafe { call.run::<Dotprod>() }
}

/// Registers for 16 rows.
const QUARTERS: usize = 4;

/// `line` shifted down by `bits` and masked: at most 15.
#[inline(always)]
unsafe fn field(line: uint8x16_t, bits: usize, mask: u8) -> int8x16_t {
    // SAFETY: every AArch64 CPU has NEON.
    unsafe {
        let shifted = match bits {
            0 => line,
            2 => vshrq_n_u8::<2>(line),
            4 => vshrq_n_u8::<4>(line),
            _ => vshrq_n_u8::<6>(line),
        };
        vreinterpretq_s8_u8(vandq_u8(shifted, vdupq_n_u8(mask)))
    }
}

/// The four levels of a step in every row.
#[inline(always)]
unsafe fn step(levels: *const i8, step: usize) -> int8x16_t {
    // SAFETY: a step of the 32 levels.
    unsafe {
        let four = levels.add(step * STEP_COLS).cast::<i32>().read_unaligned();
        vreinterpretq_s8_s32(vdupq_n_s32(four))
    }
}

/// Products of the rows of a quarter, a token at a time. 8-bit levels go as two nibbles, in 8 bits with a sign as in sums of 16 bits.
macro_rules! dots_by_rows {
    ($tokens:literal, $sum:ty, $zero:expr, $add:ident, $fold:ident) => {
        const TOKENS: usize = $tokens;

        #[inline(always)]
        unsafe fn dots<const BITS: usize, const T: usize, const P: usize>(
            lines: *const u8,
            levels: [[*const i8; T]; P],
            mut sums: [[Self::Ints; T]; P],
        ) -> [[Self::Ints; T]; P] {
            let per_line = STEPS / BITS;
            // SAFETY: `BITS` lines, 32 levels.
            unsafe {
                for quarter in 0..QUARTERS {
                    let mut ones: [[$sum; T]; P] = [[$zero; T]; P];
                    let mut sixteens: [[$sum; T]; P] = [[$zero; T]; P];
                    for line in 0..BITS {
                        let at = line * LINE_BYTES + quarter * (LINE_BYTES / QUARTERS);
                        let bytes = vld1q_u8(lines.add(at));
                        for p in 0..per_line {
                            let mask = if BITS == 2 { 3 } else { 15 };
                            let shift = if BITS == 8 { 0 } else { p * BITS };
                            let weights = field(bytes, shift, mask);
                            for (plane, t) in (0..P * T).map(|i| (i / T, i % T)) {
                                let x = step(levels[plane][t], line * per_line + p);
                                ones[plane][t] = $add(ones[plane][t], weights, x);
                                if BITS == 8 {
                                    let sixteens = &mut sixteens[plane][t];
                                    *sixteens = $add(*sixteens, field(bytes, 4, 15), x);
                                }
                            }
                        }
                    }
                    for (plane, t) in (0..P * T).map(|i| (i / T, i % T)) {
                        let sum = &mut sums[plane][t][quarter];
                        *sum = vaddq_s32(*sum, $fold(ones[plane][t]));
                        if BITS == 8 {
                            let sixteens = $fold(sixteens[plane][t]);
                            *sum = vaddq_s32(*sum, vshlq_n_s32::<4>(sixteens));
                        }
                    }
                }
            }
            sums
        }
    };
}

/// What all of them share.
macro_rules! quarters {
    () => {
        type Ints = [int32x4_t; QUARTERS];
        type Floats = [float32x4_t; QUARTERS];

        #[inline(always)]
        unsafe fn by_row(lines: *const u8) -> [Line; 2] {
            let mut rows = [Line([0; LINE_BYTES]); 2];
            for (line, rows) in rows.iter_mut().enumerate() {
                // SAFETY: four columns of 16 rows, and as many bytes to write.
                unsafe {
                    let cols = vld1q_u8_x4(lines.add(line * LINE_BYTES));
                    vst4q_u8(
                        rows.0.as_mut_ptr(),
                        uint8x16x4_t(cols.0, cols.1, cols.2, cols.3),
                    );
                }
            }
            rows
        }

        #[inline(always)]
        unsafe fn look_up(lines: *const u8, tables: *const u8, chunks: usize) -> Self::Ints {
            // Two columns add four sums of at most 16 to a byte, at most 17 * 64 to a word: 15 lines fit one.
            const LINES: usize = 15;
            // SAFETY: two lines a chunk, and their tables.
            unsafe {
                let mut sums = [vdupq_n_s32(0); QUARTERS];
                let end = 2 * chunks;
                let mut line = 0;
                while line < end {
                    // Rows 0 to 7 and 8 to 15.
                    let mut words = [vdupq_n_s16(0); 2];
                    for line in line..(line + LINES).min(end) {
                        let codes = lines.add(line * LINE_BYTES);
                        let tables = tables.add(line * TABLES_OF_LINE).cast::<i8>();
                        for cols in [[0, 1], [2, 3]] {
                            let (mut high, mut low) = (vdupq_n_s8(0), vdupq_n_s8(0));
                            for col in cols {
                                let at = col * TILE_ROWS;
                                let bytes = vld1q_u8(codes.add(at));
                                let table =
                                    |which: usize| vld1q_s8(tables.add(which * LINE_BYTES + at));
                                let first = vandq_u8(bytes, vdupq_n_u8(15));
                                let second = vshrq_n_u8::<4>(bytes);
                                high = vaddq_s8(high, vqtbl1q_s8(table(0), first));
                                low = vaddq_s8(low, vqtbl1q_s8(table(1), first));
                                high = vaddq_s8(high, vqtbl1q_s8(table(2), second));
                                low = vaddq_s8(low, vqtbl1q_s8(table(3), second));
                            }
                            let sixteen = vdupq_n_s8(16);
                            words[0] = vmlal_s8(words[0], vget_low_s8(high), vget_low_s8(sixteen));
                            words[1] = vmlal_high_s8(words[1], high, sixteen);
                            words[0] = vaddw_s8(words[0], vget_low_s8(low));
                            words[1] = vaddw_high_s8(words[1], low);
                        }
                    }
                    for (i, words) in words.into_iter().enumerate() {
                        sums[2 * i] = vaddw_s16(sums[2 * i], vget_low_s16(words));
                        sums[2 * i + 1] = vaddw_high_s16(sums[2 * i + 1], words);
                    }
                    line += LINES;
                }
                sums
            }
        }

        #[inline(always)]
        unsafe fn load_ints(numbers: &[i32; TILE_ROWS]) -> Self::Ints {
            // SAFETY: 16 numbers.
            unsafe { std::array::from_fn(|i| vld1q_s32(numbers.as_ptr().add(4 * i))) }
        }

        #[inline(always)]
        unsafe fn ints(value: i32) -> Self::Ints {
            // SAFETY: every AArch64 CPU has NEON; so for all below.
            unsafe { [vdupq_n_s32(value); QUARTERS] }
        }

        #[inline(always)]
        unsafe fn add(a: Self::Ints, mut b: Self::Ints) -> Self::Ints {
            for (a, b) in a.into_iter().zip(&mut b) {
                // SAFETY: as above.
                *b = unsafe { vaddq_s32(a, *b) };
            }
            b
        }

        #[inline(always)]
        unsafe fn join(a: Self::Ints, mut b: Self::Ints) -> Self::Ints {
            for (a, b) in a.into_iter().zip(&mut b) {
                // SAFETY: as above.
                *b = unsafe { vaddq_s32(vshlq_n_s32::<8>(a), *b) };
            }
            b
        }

        #[inline(always)]
        unsafe fn to_floats(ints: Self::Ints) -> Self::Floats {
            // SAFETY: as above.
            unsafe {
                [
                    vcvtq_f32_s32(ints[0]),
                    vcvtq_f32_s32(ints[1]),
                    vcvtq_f32_s32(ints[2]),
                    vcvtq_f32_s32(ints[3]),
                ]
            }
        }

        #[inline(always)]
        unsafe fn floats(value: f32) -> Self::Floats {
            // SAFETY: as above.
            unsafe { [vdupq_n_f32(value); QUARTERS] }
        }

        #[inline(always)]
        unsafe fn mul(a: Self::Floats, mut b: Self::Floats) -> Self::Floats {
            for (a, b) in a.into_iter().zip(&mut b) {
                // SAFETY: as above.
                *b = unsafe { vmulq_f32(a, *b) };
            }
            b
        }

        #[inline(always)]
        unsafe fn mul_add(a: Self::Floats, b: Self::Floats, mut c: Self::Floats) -> Self::Floats {
            for ((a, b), c) in a.into_iter().zip(b).zip(&mut c) {
                // SAFETY: as above.
                *c = unsafe { vfmaq_f32(*c, a, b) };
            }
            c
        }

        #[inline(always)]
        unsafe fn load_f16(numbers: *const f16) -> Self::Floats {
            let mut floats = [0.0; 4 * QUARTERS];
            // SAFETY: as above, and 16 numbers.
            let halves = unsafe { &*numbers.cast::<[f16; 4 * QUARTERS]>() };
            crate::lanes::widen(halves, &mut floats);
            // SAFETY: 16 numbers.
            unsafe { Self::load_f32(floats.as_ptr()) }
        }

        #[inline(always)]
        unsafe fn load_f32(numbers: *const f32) -> Self::Floats {
            // SAFETY: as above.
            unsafe {
                [
                    vld1q_f32(numbers),
                    vld1q_f32(numbers.add(4)),
                    vld1q_f32(numbers.add(8)),
                    vld1q_f32(numbers.add(12)),
                ]
            }
        }

        #[inline(always)]
        unsafe fn store(floats: Self::Floats, to: *mut f32) {
            for (i, quarter) in floats.into_iter().enumerate() {
                // SAFETY: as above.
                unsafe { vst1q_f32(to.add(4 * i), quarter) };
            }
        }
    };
}

/// Products of the first and of the last two rows.
type Wide = (int16x8_t, int16x8_t);

#[inline(always)]
unsafe fn add_wide(sum: Wide, w: int8x16_t, x: int8x16_t) -> Wide {
    // SAFETY: every AArch64 CPU has NEON.
    unsafe {
        (
            vmlal_s8(sum.0, vget_low_s8(w), vget_low_s8(x)),
            vmlal_high_s8(sum.1, w, x),
        )
    }
}

#[inline(always)]
unsafe fn fold_wide(sum: Wide) -> int32x4_t {
    // SAFETY: as above.
    unsafe { vpaddq_s32(vpaddlq_s16(sum.0), vpaddlq_s16(sum.1)) }
}

#[inline(always)]
unsafe fn same(sum: int32x4_t) -> int32x4_t {
    sum
}

impl Vector for Neon {
    quarters!();
    dots_by_rows!(
        2,
        Wide,
        (vdupq_n_s16(0), vdupq_n_s16(0)),
        add_wide,
        fold_wide
    );
}

impl Vector for Dotprod {
    quarters!();
    dots_by_rows!(6, int32x4_t, vdupq_n_s32(0), sdot, same);
}

impl Vector for I8mm {
    quarters!();
    const TOKENS: usize = 6;

    #[inline(always)]
    unsafe fn dots<const BITS: usize, const T: usize, const P: usize>(
        lines: *const u8,
        levels: [[*const i8; T]; P],
        mut sums: [[Self::Ints; T]; P],
    ) -> [[Self::Ints; T]; P] {
        if T == 1 {
            // SAFETY: the caller's contract.
            return unsafe { Dotprod::dots::<BITS, T, P>(lines, levels, sums) };
        }
        const PAIRS: usize = I8mm::TOKENS / 2;
        assert!(T.is_multiple_of(2) && T <= 2 * PAIRS, "tokens go in pairs");
        let per_line = STEPS / BITS;
        // SAFETY: `BITS` lines, 32 levels.
        unsafe {
            for quarter in 0..QUARTERS {
                let step_of = |step: usize| {
                    let at = step / per_line * LINE_BYTES + quarter * (LINE_BYTES / QUARTERS);
                    let bytes = vld1q_u8(lines.add(at));
                    let weights = match BITS {
                        8 => bytes,
                        4 => vreinterpretq_u8_s8(field(bytes, step % per_line * BITS, 15)),
                        _ => vreinterpretq_u8_s8(field(bytes, step % per_line * BITS, 3)),
                    };
                    vreinterpretq_u32_u8(weights)
                };
                // Of rows 0 and 1, and 2 and 3: both rows by both tokens.
                let mut products = [[[vdupq_n_s32(0); 2]; PAIRS]; P];
                for step in (0..STEPS).step_by(2) {
                    let (even, odd) = (step_of(step), step_of(step + 1));
                    let rows = [vzip1q_u32(even, odd), vzip2q_u32(even, odd)];
                    for (products, levels) in products.iter_mut().zip(levels) {
                        let pairs = levels.as_chunks::<2>().0;
                        for (products, [a, b]) in products.iter_mut().zip(pairs) {
                            let at = step * STEP_COLS;
                            let x = vcombine_s8(vld1_s8(a.add(at)), vld1_s8(b.add(at)));
                            for (product, rows) in products.iter_mut().zip(rows) {
                                *product = usmmla(*product, vreinterpretq_u8_u32(rows), x);
                            }
                        }
                    }
                }
                for (sums, products) in sums.iter_mut().zip(products) {
                    let pairs = sums.as_chunks_mut::<2>().0;
                    for ([a, b], [first, last]) in pairs.iter_mut().zip(products) {
                        a[quarter] = vaddq_s32(a[quarter], vuzp1q_s32(first, last));
                        b[quarter] = vaddq_s32(b[quarter], vuzp2q_s32(first, last));
                    }
                }
            }
        }
        sums
    }
}
