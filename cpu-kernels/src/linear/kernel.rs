//! The loops that all instruction sets share: a tile of rows against a few tokens.

use std::ops::Range;

use half::f16;

use super::forms;
use super::ints::Bytes;
use super::layout::{Bits, Packed};
use super::words::Words;
use super::{LINE_BYTES, TILE_ROWS};
use crate::isa::{Isa, Kind};
use crate::levels::{Levels, Precision, Record};
use crate::pages::Line;
use crate::read;
use crate::team::SharedSlice;

/// What the loops need of an instruction set: 16 rows at a time.
///
/// Its functions are unsafe for two reasons: the CPU must have the instructions, and what a pointer leads to
/// must exist, as much of it as each function says.
pub(super) trait Vector {
    /// An i32 a row.
    type Ints: Copy;
    /// An f32 a row.
    type Floats: Copy;
    /// Tokens of a full tile: 8, 6, 2 or 1.
    const TOKENS: usize;

    /// `sums[p][t] + Σ u * level` over the 32 columns of the chunk at `lines` (`BITS` lines) for the levels at
    /// `levels[p][t]`, one byte a column: of `T` tokens, of `P` planes each.
    unsafe fn dots<const BITS: usize, const T: usize, const P: usize>(
        lines: *const u8,
        levels: [[*const i8; T]; P],
        sums: [[Self::Ints; T]; P],
    ) -> [[Self::Ints; T]; P];
    /// `Σ (u - zero) * level` over the 32 columns of the chunk at `lines` (`BITS` lines) for the 16-bit levels of
    /// the `T` tokens from `records` on; `zero` is 8 where that is the `CENTRED` level, else 0.
    #[inline(always)]
    unsafe fn words<const BITS: usize, const T: usize, const CENTRED: bool>(
        lines: *const u8,
        records: *const Record,
    ) -> [Self::Ints; T] {
        // SAFETY: the caller's contract.
        unsafe {
            let mut planes = [[std::ptr::null(); T]; 2];
            let mut sums = [[Self::ints(0); T]; 2];
            for t in 0..T {
                let record = records.wrapping_add(t);
                planes[0][t] = (&raw const (*record).high).cast();
                planes[1][t] = (&raw const (*record).low).cast();
                if CENTRED {
                    sums[1][t] = Self::ints((*record).centre);
                }
            }
            let [mut high, low] = Self::dots::<BITS, T, 2>(lines, planes, sums);
            for (high, low) in high.iter_mut().zip(low) {
                *high = Self::join(*high, low);
            }
            high
        }
    }
    /// A chunk of pairs as one of two bits.
    #[inline(always)]
    unsafe fn by_row(lines: *const u8) -> [Line; 2] {
        // SAFETY: the caller's contract.
        unsafe { forms::by_row(lines) }
    }
    /// `Σ w * level` over the `chunks` chunks of pairs at `lines`, by the tables at `tables`.
    unsafe fn look_up(lines: *const u8, tables: *const u8, chunks: usize) -> Self::Ints;
    /// `sums[t] + Σ u * level` over the 20 columns of the fives at `line` for the levels at `levels[t]`.
    #[inline(always)]
    unsafe fn fives<const T: usize>(
        line: *const u8,
        levels: [*const i8; T],
        sums: [Self::Ints; T],
    ) -> [Self::Ints; T] {
        let mut ints = [[0; TILE_ROWS]; T];
        // SAFETY: the caller's contract.
        unsafe {
            forms::fives(line, levels, &mut ints);
            std::array::from_fn(|t| Self::add(sums[t], Self::load_ints(&ints[t])))
        }
    }
    /// 16 numbers.
    unsafe fn load_ints(numbers: &[i32; TILE_ROWS]) -> Self::Ints;
    /// The same number in every row.
    unsafe fn ints(value: i32) -> Self::Ints;
    /// `a + b`.
    unsafe fn add(a: Self::Ints, b: Self::Ints) -> Self::Ints;
    /// `256 a + b`.
    unsafe fn join(a: Self::Ints, b: Self::Ints) -> Self::Ints;
    /// As floats.
    unsafe fn to_floats(ints: Self::Ints) -> Self::Floats;
    /// The same number in every row.
    unsafe fn floats(value: f32) -> Self::Floats;
    /// `a * b`.
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b + c`.
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// 16 numbers.
    unsafe fn load_f16(numbers: *const f16) -> Self::Floats;
    /// 16 numbers.
    unsafe fn load_f32(numbers: *const f32) -> Self::Floats;
    /// 16 numbers.
    unsafe fn store(floats: Self::Floats, to: *mut f32);
}

/// Activations `(t, k)`.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// For weights of 2, 4 or 8 bits.
    Levels(Levels<'a>),
    /// For F16 weights.
    Floats(&'a [f32]),
}

/// Computes the rows `rows` of `y = w x + bias` for all tokens of `x`; `y` is `(t, n)`, `rows` begins at a
/// multiple of [`TILE_ROWS`].
///
/// # Panics
/// If a length or the form of `x` does not fit `w`.
///
/// # Safety
/// Until this returns nothing else reads or writes the columns `rows` of `y`.
pub unsafe fn part(
    isa: Isa,
    w: &Packed,
    bias: Option<&[f32]>,
    x: Input<'_>,
    y: SharedSlice<'_, f32>,
    rows: Range<usize>,
) {
    let (cols, tokens) = match x {
        Input::Levels(levels) => (levels.cols(), levels.tokens()),
        Input::Floats(x) => (w.cols, x.len() / w.cols),
    };
    assert!(
        cols == w.cols
            && match x {
                Input::Levels(_) => w.takes_levels(),
                Input::Floats(x) => !w.takes_levels() && x.len() == tokens * cols,
            },
        "linear: x is (t, k) with k = {}, levels for weights of few bits",
        w.cols
    );
    assert_eq!(
        y.len(),
        tokens * w.rows,
        "linear: y is (t, n) with n = {}",
        w.rows
    );
    assert!(
        bias.is_none_or(|bias| bias.len() == w.rows),
        "linear: bias is (n,) with n = {}",
        w.rows
    );
    assert!(
        rows.start.is_multiple_of(TILE_ROWS) && rows.end <= w.rows,
        "linear: rows outside the matrix or within a tile"
    );
    let call = Call {
        w,
        bias,
        x,
        tokens,
        y,
        rows,
    };
    match isa.0 {
        // SAFETY: the caller leaves these columns of `y` to this call.
        Kind::Scalar => unsafe { call.run::<super::scalar::Scalar>() },
        // SAFETY: as above, and an `Isa` only exists for a CPU that has its features.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { super::avx2::run(&call) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { super::avx512::run(&call) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512Vnni => unsafe { super::avx512::run_vnni(&call) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512Vbmi => unsafe { super::avx512::run_vbmi(&call) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => unsafe { super::neon::run(&call) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::NeonDotprod => unsafe { super::neon::run_dotprod(&call) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::NeonI8mm => unsafe { super::neon::run_i8mm(&call) },
    }
}

/// Checked operands of [`part`].
pub(super) struct Call<'a> {
    pub(super) w: &'a Packed,
    bias: Option<&'a [f32]>,
    x: Input<'a>,
    tokens: usize,
    y: SharedSlice<'a, f32>,
    rows: Range<usize>,
}

impl Call<'_> {
    /// # Safety
    /// As [`part`]; the CPU must have the instructions of `V`.
    #[inline(always)]
    pub(super) unsafe fn run<V: Vector>(&self) {
        // SAFETY: the caller's contract.
        unsafe {
            match self.x {
                Input::Floats(x) => self.tiles::<V>(Floats { call: self, x }),
                Input::Levels(x) => match (self.w.bits, x.precision()) {
                    (Bits::Two, Precision::Byte) => self.bytes::<V, 2, false>(x),
                    (Bits::Two, Precision::Word) => self.words::<V, 2>(x),
                    (Bits::Pairs, _) => match x.tables() {
                        Some(tables) => self.tiles::<V>(forms::LookUp {
                            call: self,
                            x,
                            tables,
                        }),
                        None => self.bytes::<V, 2, true>(x),
                    },
                    (Bits::Fives, _) => self.tiles::<V>(forms::Fives { call: self, x }),
                    (Bits::Four, Precision::Byte) => self.bytes::<V, 4, false>(x),
                    (Bits::Four, Precision::Word) => self.words::<V, 4>(x),
                    (Bits::Eight, Precision::Byte) => self.bytes::<V, 8, false>(x),
                    (Bits::Eight, Precision::Word) => self.words::<V, 8>(x),
                    (Bits::F16, _) => unreachable!("F16 weights take floats"),
                },
            }
        }
    }

    /// # Safety
    /// As [`Call::run`].
    #[inline(always)]
    unsafe fn bytes<V: Vector, const BITS: usize, const PAIRS: bool>(&self, x: Levels<'_>) {
        // SAFETY: the caller's contract.
        unsafe { self.tiles::<V>(Bytes::<BITS, PAIRS> { call: self, x }) }
    }

    /// # Safety
    /// As [`Call::run`].
    #[inline(always)]
    unsafe fn words<V: Vector, const BITS: usize>(&self, x: Levels<'_>) {
        // SAFETY: the caller's contract.
        unsafe { self.tiles::<V>(Words::<BITS> { call: self, x }) }
    }

    /// # Safety
    /// As [`Call::run`].
    #[inline(always)]
    unsafe fn tiles<V: Vector>(&self, product: impl Product) {
        for row in self.rows.clone().step_by(TILE_ROWS) {
            let mut token = 0;
            // SAFETY: the caller's contract; a tile of the matrix, tokens of `x`.
            unsafe {
                while token < self.tokens {
                    let most = V::TOKENS.min(self.tokens - token);
                    token += match most {
                        8.. if V::TOKENS >= 8 => self.tile::<V, 8>(&product, row, token),
                        6.. if V::TOKENS >= 6 => self.tile::<V, 6>(&product, row, token),
                        2.. if V::TOKENS >= 2 => self.tile::<V, 2>(&product, row, token),
                        _ => self.tile::<V, 1>(&product, row, token),
                    };
                }
            }
        }
    }

    /// The tile that begins at `row`, for `T` tokens from `token` on; gives `T` back.
    ///
    /// # Safety
    /// As [`Call::run`]; the tokens exist.
    #[inline(always)]
    unsafe fn tile<V: Vector, const T: usize>(
        &self,
        product: &impl Product,
        row: usize,
        token: usize,
    ) -> usize {
        // SAFETY: the caller's contract.
        let sums = unsafe { product.sums::<V, T>(row / TILE_ROWS, token) };
        let end = self.rows.end.min(row + TILE_ROWS);
        for (t, sums) in sums.into_iter().enumerate() {
            let mut out = [0.0; TILE_ROWS];
            // SAFETY: 16 floats.
            unsafe { V::store(sums, out.as_mut_ptr()) };
            let start = (token + t) * self.w.rows;
            // SAFETY: columns that the caller leaves to this call.
            let y = unsafe { self.y.slice_mut(start + row..start + end) };
            match self.bias {
                Some(bias) => {
                    for ((y, sum), bias) in y.iter_mut().zip(out).zip(&bias[row..]) {
                        *y = sum + bias;
                    }
                }
                None => y.copy_from_slice(&out[..y.len()]),
            }
        }
        T
    }
}

/// One form of weights and activations.
pub(super) trait Product {
    /// Sums of the rows of `tile` for `T` tokens from `token` on.
    ///
    /// # Safety
    /// As [`Call::run`]; the tile and the tokens exist.
    unsafe fn sums<V: Vector, const T: usize>(&self, tile: usize, token: usize) -> [V::Floats; T];
}

/// F16 weights by floats.
struct Floats<'a> {
    call: &'a Call<'a>,
    x: &'a [f32],
}

impl Product for Floats<'_> {
    #[inline(always)]
    unsafe fn sums<V: Vector, const T: usize>(&self, tile: usize, token: usize) -> [V::Floats; T] {
        let k = self.call.w.cols;
        let x = &self.x[token * k..(token + T) * k];
        // SAFETY: `k` columns of a tile, 16 halves each, and of `T` tokens.
        unsafe {
            let lines = self
                .call
                .w
                .quants
                .as_ptr()
                .cast::<f16>()
                .add(tile * k * TILE_ROWS);
            // Two chains of additions, even and odd columns.
            let mut sums = [[V::floats(0.0); T]; 2];
            for col in (0..k).step_by(2) {
                for (i, sums) in sums.iter_mut().enumerate() {
                    let w = V::load_f16(lines.add((col + i) * TILE_ROWS));
                    for (t, sum) in sums.iter_mut().enumerate() {
                        *sum = V::mul_add(w, V::floats(*x.get_unchecked(t * k + col + i)), *sum);
                    }
                }
            }
            let [mut even, odd] = sums;
            for (even, odd) in even.iter_mut().zip(odd) {
                *even = V::mul_add(odd, V::floats(1.0), *even);
            }
            even
        }
    }
}

/// Asks for the chunk of one token's products that lies a page behind `lines` and need not exist.
#[inline(always)]
pub(super) fn ahead<const BITS: usize>(lines: *const u8) {
    for line in 0..BITS {
        read::ahead(lines.wrapping_add(line * LINE_BYTES));
    }
}
