//! The loops that all instruction sets share: a tile of rows against a few tokens.

use std::ops::Range;

use half::f16;

use super::forms;
use super::layout::{Bits, Packed, Scales, Zero};
use super::{CHUNK_COLS, LINE_BYTES, TILE_ROWS};
use crate::isa::{Isa, Kind};
use crate::levels::{Levels, Precision};
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
    /// Tokens of a full tile.
    const TOKENS: usize;

    /// `sums[t] + Σ u * level` over the 32 columns of the chunk at `lines` (`BITS` lines) for the levels at
    /// `levels[t]`, one byte a column.
    unsafe fn dots<const BITS: usize, const T: usize>(
        lines: *const u8,
        levels: [*const i8; T],
        sums: [Self::Ints; T],
    ) -> [Self::Ints; T];
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
                    (Bits::Two, Precision::Byte) => self.ints::<V, 2, 1, false>(x),
                    (Bits::Two, Precision::Word) => self.ints::<V, 2, 2, false>(x),
                    (Bits::Pairs, _) => match x.tables() {
                        Some(tables) => self.tiles::<V>(forms::LookUp {
                            call: self,
                            x,
                            tables,
                        }),
                        None => self.ints::<V, 2, 1, true>(x),
                    },
                    (Bits::Fives, _) => self.tiles::<V>(forms::Fives { call: self, x }),
                    (Bits::Four, Precision::Byte) => self.ints::<V, 4, 1, false>(x),
                    (Bits::Four, Precision::Word) => self.ints::<V, 4, 2, false>(x),
                    (Bits::Eight, Precision::Byte) => self.ints::<V, 8, 1, false>(x),
                    (Bits::Eight, Precision::Word) => self.ints::<V, 8, 2, false>(x),
                    (Bits::F16, _) => unreachable!("F16 weights take floats"),
                },
            }
        }
    }

    /// # Safety
    /// As [`Call::run`].
    #[inline(always)]
    unsafe fn ints<V: Vector, const BITS: usize, const PLANES: usize, const PAIRS: bool>(
        &self,
        x: Levels<'_>,
    ) {
        // SAFETY: the caller's contract.
        unsafe { self.tiles::<V>(Ints::<BITS, PLANES, PAIRS> { call: self, x }) }
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
                    let left = self.tokens - token;
                    if V::TOKENS >= MOST_TOKENS && left >= MOST_TOKENS {
                        self.tile::<V, MOST_TOKENS>(&product, row, token);
                        token += MOST_TOKENS;
                    } else if V::TOKENS >= 2 && left >= 2 {
                        self.tile::<V, 2>(&product, row, token);
                        token += 2;
                    } else {
                        self.tile::<V, 1>(&product, row, token);
                        token += 1;
                    }
                }
            }
        }
    }

    /// The tile that begins at `row`, for `T` tokens from `token` on.
    ///
    /// # Safety
    /// As [`Call::run`]; the tokens exist.
    #[inline(always)]
    unsafe fn tile<V: Vector, const T: usize>(
        &self,
        product: &impl Product,
        row: usize,
        token: usize,
    ) {
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
    }
}

/// Tokens of the largest tile of any instruction set.
pub(super) const MOST_TOKENS: usize = 6;

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

/// Asks for the chunk of one token's products that lies [`read::AHEAD_BYTES`] behind `lines` and need not exist.
#[inline(always)]
pub(super) fn ahead<const BITS: usize>(lines: *const u8) {
    for line in 0..BITS {
        read::ahead(lines.wrapping_add(line * LINE_BYTES));
    }
}

/// Sums that are kept apart where products of many chunks are added up.
const CHAINS: usize = 4;

/// Weights of `BITS` bits, or pairs of two, by levels of `PLANES` bytes.
struct Ints<'a, const BITS: usize, const PLANES: usize, const PAIRS: bool> {
    call: &'a Call<'a>,
    x: Levels<'a>,
}

impl<const BITS: usize, const PLANES: usize, const PAIRS: bool> Ints<'_, BITS, PLANES, PAIRS> {
    /// [`Vector::dots`] of a chunk in either order.
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    unsafe fn dots<V: Vector, const T: usize>(
        lines: *const u8,
        levels: [*const i8; T],
        sums: [V::Ints; T],
    ) -> [V::Ints; T] {
        // SAFETY: the caller's contract.
        unsafe {
            match PAIRS {
                true => V::dots::<BITS, T>(V::by_row(lines).as_ptr().cast(), levels, sums),
                false => V::dots::<BITS, T>(lines, levels, sums),
            }
        }
    }
}

impl<const BITS: usize, const PLANES: usize, const PAIRS: bool> Product
    for Ints<'_, BITS, PLANES, PAIRS>
{
    #[inline(always)]
    unsafe fn sums<V: Vector, const T: usize>(&self, tile: usize, token: usize) -> [V::Floats; T] {
        let w = self.call.w;
        let (chunks, groups) = (w.cols / CHUNK_COLS, w.cols.div_ceil(w.group));
        let mut high = [std::ptr::null(); T];
        let mut low = [std::ptr::null(); T];
        let mut scales: [&[f32]; T] = [&[]; T];
        let mut level_sums: [&[i32]; T] = [&[]; T];
        for t in 0..T {
            let x = self.x.token(token + t);
            (high[t], low[t]) = (x.high.as_ptr(), x.low.as_ptr());
            (scales[t], level_sums[t]) = (&x.scales[..chunks], &x.sums[..chunks]);
        }
        let zero_level = match w.zero {
            Zero::Level(level) => level,
            Zero::Mins(_) | Zero::Levels(_) => 0,
        };
        // SAFETY: chunk `chunk < chunks` of a tile of the matrix and of each token; 16 numbers of a group.
        unsafe {
            let mut lines: *const u8 = w.quants.as_ptr().add(tile * chunks * BITS).cast();
            let mut y = [V::floats(0.0); T];
            let mut chunk = 0;
            for group in 0..groups {
                let end = ((group + 1) * (w.group / CHUNK_COLS)).min(chunks);
                // Of scale times dot, and of scale times level, without the scale of the weights.
                let mut in_group = [V::floats(0.0); T];
                let mut total = [0.0f32; T];
                if PLANES == 2 {
                    while chunk < end {
                        if T == 1 {
                            ahead::<BITS>(lines);
                        }
                        let mut ints = [V::ints(0); T];
                        for t in 0..T {
                            let sum = *level_sums[t].get_unchecked(chunk);
                            let scale = *scales[t].get_unchecked(chunk);
                            ints[t] = V::ints(-zero_level * sum);
                            total[t] += scale * sum as f32;
                        }
                        let highs = Self::dots::<V, T>(lines, high, [V::ints(0); T]);
                        let ints = Self::dots::<V, T>(lines, low, ints);
                        for t in 0..T {
                            let scale = V::floats(*scales[t].get_unchecked(chunk));
                            let dot = V::to_floats(V::join(highs[t], ints[t]));
                            in_group[t] = V::mul_add(dot, scale, in_group[t]);
                            high[t] = high[t].wrapping_add(CHUNK_COLS);
                            low[t] = low[t].wrapping_add(CHUNK_COLS);
                        }
                        lines = lines.wrapping_add(BITS * LINE_BYTES);
                        chunk += 1;
                    }
                } else {
                    // A chain of additions alone would wait for itself; that of several tokens does not.
                    let used = if T < CHAINS { CHAINS } else { 1 };
                    let mut chains = [[V::ints(0); T]; CHAINS];
                    for t in 0..T {
                        let sum: i32 = level_sums[t].get_unchecked(chunk..end).iter().sum();
                        chains[0][t] = V::ints(-zero_level * sum);
                        total[t] = scales[t][0] * sum as f32;
                    }
                    while chunk < end {
                        for ints in chains.iter_mut().take(used.min(end - chunk)) {
                            if T == 1 {
                                ahead::<BITS>(lines);
                            }
                            *ints = Self::dots::<V, T>(lines, high, *ints);
                            for high in &mut high {
                                *high = high.wrapping_add(CHUNK_COLS);
                            }
                            lines = lines.wrapping_add(BITS * LINE_BYTES);
                        }
                        chunk += used;
                    }
                    chunk = end;
                    let mut ints = chains[0];
                    for chain in &chains[1..] {
                        for t in 0..T {
                            ints[t] = V::add(ints[t], chain[t]);
                        }
                    }
                    for t in 0..T {
                        let scale = V::floats(scales[t][0]);
                        in_group[t] = V::mul_add(V::to_floats(ints[t]), scale, in_group[t]);
                    }
                }
                let at = (tile * groups + group) * TILE_ROWS;
                if let Zero::Levels(zeros) = &w.zero {
                    let zeros = V::load_f16(zeros.as_ptr().add(at));
                    for t in 0..T {
                        in_group[t] = V::mul_add(zeros, V::floats(-total[t]), in_group[t]);
                    }
                }
                let scale = match &w.scales {
                    Scales::F16(scales) => V::load_f16(scales.as_ptr().add(at)),
                    Scales::F32(scales) => V::load_f32(scales.as_ptr().add(at)),
                    Scales::None => V::floats(1.0),
                };
                for t in 0..T {
                    y[t] = V::mul_add(in_group[t], scale, y[t]);
                }
                if let Zero::Mins(mins) = &w.zero {
                    let mins = V::load_f16(mins.as_ptr().add(at));
                    for t in 0..T {
                        y[t] = V::mul_add(mins, V::floats(total[t]), y[t]);
                    }
                }
            }
            y
        }
    }
}
