//! Dot products and weighted sums over f16 rows, for the queries that read the same keys and values: a row is
//! loaded and widened once for up to three of them.
//!
//! Loops stand where closures would be shorter: a closure does not have the instructions of the function around it,
//! and what is not inlined into one is called with vectors in memory.

use half::f16;

/// What the loops need of an instruction set.
///
/// Its functions are unsafe for two reasons: the CPU must have the instructions, and as many numbers as each says
/// must exist.
pub(super) trait Vector {
    /// Some f32.
    type Floats: Copy;
    /// How many.
    const LANES: usize;

    /// The same number in every lane.
    unsafe fn splat(value: f32) -> Self::Floats;
    /// The `len` numbers at `at`, at most [`Vector::LANES`], and zeros.
    unsafe fn load(at: *const f32, len: usize) -> Self::Floats;
    /// As [`Vector::load`].
    unsafe fn load_f16(at: *const f16, len: usize) -> Self::Floats;
    /// `a * b + c`.
    unsafe fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// Writes the first `len` lanes, at most all.
    unsafe fn store(floats: Self::Floats, at: *mut f32, len: usize);
    /// The sum of each one's lanes.
    unsafe fn sums(of: [Self::Floats; KEYS]) -> [f32; KEYS];
}

/// Keys taken at once, so that their sums are reduced together.
pub(super) const KEYS: usize = 4;
/// Queries taken at once at most.
const QUERIES: usize = 3;
/// Registers that hold a piece of a query's output.
const REGISTERS: usize = 4;

/// Queries to take at once where `left` are left: two and two rather than three and one.
fn queries(left: usize) -> usize {
    match left {
        4 => 2,
        _ => left.min(QUERIES),
    }
}

/// `out[i][p] = q[i] · keys[p]`: `q` is `(g, dh)`, `out` `(g, p)`.
///
/// # Safety
/// The CPU has the instructions of `V`; `keys` is `(p, dh)`, of at least one row.
#[inline(always)]
pub(super) unsafe fn dot<V: Vector>(q: &[f32], keys: &[f16], out: &mut [f32], dh: usize) {
    let count = keys.len() / dh;
    let mut first = 0;
    while first < q.len() / dh {
        let now = queries(q.len() / dh - first);
        let q = &q[first * dh..(first + now) * dh];
        let out = &mut out[first * count..(first + now) * count];
        // SAFETY: the caller's contract.
        unsafe {
            match now {
                3 => dot_of::<V, 3>(q, keys, out, dh),
                2 => dot_of::<V, 2>(q, keys, out, dh),
                _ => dot_of::<V, 1>(q, keys, out, dh),
            }
        }
        first += now;
    }
}

/// [`dot`] of `Q` queries.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn dot_of<V: Vector, const Q: usize>(q: &[f32], keys: &[f16], out: &mut [f32], dh: usize) {
    let count = keys.len() / dh;
    for first in (0..count).step_by(KEYS) {
        // The last rows are taken again where there are none left.
        let rows: [usize; KEYS] = std::array::from_fn(|i| (first + i).min(count - 1) * dh);
        // SAFETY: columns of queries and of rows.
        let sums = unsafe {
            let mut sums = [[V::splat(0.0); KEYS]; Q];
            for column in (0..dh).step_by(V::LANES) {
                let len = (dh - column).min(V::LANES);
                let mut of_q = [V::splat(0.0); Q];
                for (i, of_q) in of_q.iter_mut().enumerate() {
                    *of_q = V::load(q.as_ptr().add(i * dh + column), len);
                }
                for key in 0..KEYS {
                    let k = V::load_f16(keys.as_ptr().add(rows[key] + column), len);
                    for i in 0..Q {
                        sums[i][key] = V::mul_add(of_q[i], k, sums[i][key]);
                    }
                }
            }
            let mut folded = [[0.0; KEYS]; Q];
            for (folded, sums) in folded.iter_mut().zip(sums) {
                *folded = V::sums(sums);
            }
            folded
        };
        let len = KEYS.min(count - first);
        for (out, sums) in out.chunks_exact_mut(count).zip(sums) {
            out[first..first + len].copy_from_slice(&sums[..len]);
        }
    }
}

/// `out[i] = Σ weights[i][p] * values[p]`: `weights` is `(g, p)`, `out` `(g, dh)`.
///
/// # Safety
/// The CPU has the instructions of `V`; `values` is `(p, dh)`.
#[inline(always)]
pub(super) unsafe fn blend<V: Vector>(weights: &[f32], values: &[f16], out: &mut [f32], dh: usize) {
    let count = values.len() / dh;
    let mut first = 0;
    while first < out.len() / dh {
        let now = queries(out.len() / dh - first);
        let weights = &weights[first * count..(first + now) * count];
        let out = &mut out[first * dh..(first + now) * dh];
        // SAFETY: the caller's contract.
        unsafe {
            match now {
                3 => blend_of::<V, 3>(weights, values, out, dh),
                2 => blend_of::<V, 2>(weights, values, out, dh),
                _ => blend_of::<V, 1>(weights, values, out, dh),
            }
        }
        first += now;
    }
}

/// [`blend`] for `Q` queries.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn blend_of<V: Vector, const Q: usize>(
    weights: &[f32],
    values: &[f16],
    out: &mut [f32],
    dh: usize,
) {
    let count = values.len() / dh;
    for column in (0..dh).step_by(REGISTERS * V::LANES) {
        let start = |register: usize| column + register * V::LANES;
        let len = |register: usize| dh.saturating_sub(start(register)).min(V::LANES);
        // SAFETY: columns of rows and of outputs; no number is read or written where `len` is 0.
        unsafe {
            let mut sums = [[V::splat(0.0); Q]; REGISTERS];
            for p in 0..count {
                let row = values.as_ptr().add(p * dh);
                let mut weight = [V::splat(0.0); Q];
                for (i, weight) in weight.iter_mut().enumerate() {
                    *weight = V::splat(*weights.get_unchecked(i * count + p));
                }
                for (register, sums) in sums.iter_mut().enumerate() {
                    let v = V::load_f16(row.wrapping_add(start(register)), len(register));
                    for (sum, weight) in sums.iter_mut().zip(weight) {
                        *sum = V::mul_add(weight, v, *sum);
                    }
                }
            }
            for (register, sums) in sums.into_iter().enumerate() {
                for (i, sum) in sums.into_iter().enumerate() {
                    let at = out.as_mut_ptr().wrapping_add(i * dh + start(register));
                    V::store(sum, at, len(register));
                }
            }
        }
    }
}

/// Defines `dot` and `blend` of a vector for a set of features.
macro_rules! of_features {
    ($vector:ty, $features:literal) => {
        /// As [`rows::dot`](super::rows::dot).
        ///
        /// # Safety
        /// As there.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn dot(q: &[f32], keys: &[f16], out: &mut [f32], dh: usize) {
            // SAFETY: the caller's contract.
            unsafe { super::rows::dot::<$vector>(q, keys, out, dh) }
        }

        /// As [`rows::blend`](super::rows::blend).
        ///
        /// # Safety
        /// As there.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn blend(weights: &[f32], values: &[f16], out: &mut [f32], dh: usize) {
            // SAFETY: the caller's contract.
            unsafe { super::rows::blend::<$vector>(weights, values, out, dh) }
        }
    };
}
pub(super) use of_features;
