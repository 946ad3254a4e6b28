//! Plain Rust, for any CPU.

use half::f16;

use super::kernel::Vector;
use super::lookup::TABLES_OF_LINE;
use super::{LINE_BYTES, STEP_COLS, STEPS, TILE_ROWS};

pub(super) struct Scalar;

impl Vector for Scalar {
    type Ints = [i32; TILE_ROWS];
    type Floats = [f32; TILE_ROWS];
    const TOKENS: usize = 1;

    #[inline(always)]
    unsafe fn dots<const BITS: usize, const T: usize, const P: usize>(
        lines: *const u8,
        levels: [[*const i8; T]; P],
        mut sums: [[Self::Ints; T]; P],
    ) -> [[Self::Ints; T]; P] {
        let per_line = STEPS / BITS;
        for step in 0..STEPS {
            // SAFETY: `BITS` lines, 32 levels.
            let line = unsafe {
                &*lines
                    .add(step / per_line * LINE_BYTES)
                    .cast::<[u8; LINE_BYTES]>()
            };
            let shift = step % per_line * BITS;
            let mask = ((1u32 << BITS) - 1) as u8;
            let sums = sums.as_flattened_mut().iter_mut();
            for (sums, levels) in sums.zip(levels.as_flattened()) {
                // SAFETY: as above.
                let x = unsafe { &*levels.add(step * STEP_COLS).cast::<[i8; STEP_COLS]>() };
                for (sum, bytes) in sums.iter_mut().zip(line.as_chunks::<STEP_COLS>().0) {
                    for (byte, x) in bytes.iter().zip(x) {
                        *sum += (byte >> shift & mask) as i32 * *x as i32;
                    }
                }
            }
        }
        sums
    }

    #[inline(always)]
    unsafe fn look_up(lines: *const u8, tables: *const u8, chunks: usize) -> Self::Ints {
        let mut sums = [0; TILE_ROWS];
        for line in 0..2 * chunks {
            // SAFETY: two lines a chunk, and their tables.
            let (line, tables) = unsafe {
                (
                    &*lines.add(line * LINE_BYTES).cast::<[u8; LINE_BYTES]>(),
                    &*tables
                        .add(line * TABLES_OF_LINE)
                        .cast::<[[[i8; LINE_BYTES]; 2]; 2]>(),
                )
            };
            for (lane, codes) in line.as_chunks::<TILE_ROWS>().0.iter().enumerate() {
                for (sum, code) in sums.iter_mut().zip(codes) {
                    for (nibble, [high, low]) in [code & 15, code >> 4].into_iter().zip(tables) {
                        let entry = TILE_ROWS * lane + usize::from(nibble);
                        *sum += 16 * i32::from(high[entry]) + i32::from(low[entry]);
                    }
                }
            }
        }
        sums
    }

    #[inline(always)]
    unsafe fn load_ints(numbers: &[i32; TILE_ROWS]) -> Self::Ints {
        *numbers
    }

    #[inline(always)]
    unsafe fn ints(value: i32) -> Self::Ints {
        [value; TILE_ROWS]
    }

    #[inline(always)]
    unsafe fn add(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn join(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        std::array::from_fn(|i| (a[i] << 8) + b[i])
    }

    #[inline(always)]
    unsafe fn to_floats(ints: Self::Ints) -> Self::Floats {
        ints.map(|v| v as f32)
    }

    #[inline(always)]
    unsafe fn floats(value: f32) -> Self::Floats {
        [value; TILE_ROWS]
    }

    #[inline(always)]
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    unsafe fn load_f16(numbers: *const f16) -> Self::Floats {
        // SAFETY: 16 numbers.
        unsafe { *numbers.cast::<[f16; TILE_ROWS]>() }.map(f16::to_f32)
    }

    #[inline(always)]
    unsafe fn load_f32(numbers: *const f32) -> Self::Floats {
        // SAFETY: 16 numbers.
        unsafe { *numbers.cast::<[f32; TILE_ROWS]>() }
    }

    #[inline(always)]
    unsafe fn store(floats: Self::Floats, to: *mut f32) {
        // SAFETY: room for 16 numbers.
        unsafe { *to.cast::<[f32; TILE_ROWS]>() = floats };
    }
}
