//! What calibration keeps of the inputs of a linear layer: the sum of `x xᵀ` over all tokens. The
//! error that a change `E` of the weights causes in the layer's output is `tr(E G Eᵀ)`.
//!
//! `G` is the largest thing that calibration holds (1.4 GB for 18,944 inputs), so everything that is made of it
//! is made in its place.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::reborrow::{Reborrow, ReborrowMut};
use faer::{Accum, Mat, MatMut, MatRef, Par};
use rayon::prelude::*;

use crate::Error;

/// Rows of `G` that one task adds to. Fixed, so that sums do not depend on the number of threads.
const BAND_ROWS: usize = 64;
/// Share of the mean of the diagonal that is added to the diagonal before it is inverted: what
/// calibration saw little of stays expensive to change.
const DAMPING: f64 = 0.01;
/// Columns of a triangular matrix that are inverted at a time.
const BLOCK_COLS: usize = 128;

/// The sum of `x xᵀ`.
#[derive(Debug, Clone)]
pub struct Gram {
    cols: usize,
    /// `(k, k)`, the upper triangle; what lies left of a band's rows is never read.
    sums: Vec<f32>,
    tokens: usize,
}

impl Gram {
    /// No tokens of `cols` inputs.
    pub fn new(cols: usize) -> Self {
        Gram {
            cols,
            sums: vec![0.0; cols * cols],
            tokens: 0,
        }
    }

    /// K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Adds tokens `(t, k)`.
    pub fn add(&mut self, x: &[f32]) {
        let k = self.cols;
        let tokens = x.len() / k;
        let x = MatRef::from_row_major_slice(x, tokens, k);
        self.sums
            .par_chunks_mut(BAND_ROWS * k)
            .enumerate()
            .for_each(|(band, sums)| {
                let (start, rows) = (band * BAND_ROWS, sums.len() / k);
                let right =
                    MatMut::from_row_major_slice_mut(sums, rows, k).subcols_mut(start, k - start);
                matmul(
                    right,
                    Accum::Add,
                    x.subcols(start, rows).transpose(),
                    x.subcols(start, k - start),
                    1.0,
                    Par::Seq,
                );
            });
        self.tokens += tokens;
    }

    /// `G[i][j]`.
    fn at(&self, i: usize, j: usize) -> f32 {
        self.sums[i.min(j) * self.cols + i.max(j)]
    }

    /// Mean square of each input.
    pub fn mean_squares(&self) -> Vec<f32> {
        let tokens = self.tokens.max(1) as f32;
        (0..self.cols).map(|i| self.at(i, i) / tokens).collect()
    }

    /// The sums of inputs that are divided by `divisors`.
    pub fn divide(&mut self, divisors: &[f32]) {
        for (row, by_row) in self.sums.chunks_exact_mut(self.cols).zip(divisors) {
            for (sum, by_col) in row.iter_mut().zip(divisors) {
                *sum /= by_row * by_col;
            }
        }
    }

    /// All of `G`.
    pub fn full(&mut self) -> MatRef<'_, f32> {
        let k = self.cols;
        for i in 1..k {
            for j in 0..i {
                self.sums[i * k + j] = self.sums[j * k + i];
            }
        }
        MatRef::from_row_major_slice(&self.sums, k, k)
    }

    /// Upper triangular `U` `(k, k)` with `Uᵀ U = (P G Pᵀ + damping)⁻¹`, where row `i` of `P G Pᵀ` is
    /// row `order[i]` of `G`; what is left of the diagonal means nothing. Row `i` of `U`, divided by its
    /// diagonal, is how the error of column `order[i]` is best made up for by the columns after it (GPTQ,
    /// <https://arxiv.org/abs/2210.17323>).
    ///
    /// # Errors
    /// [`Error::Input`] if the inputs were not finite.
    pub fn feedback(mut self, order: &[usize]) -> Result<Vec<f32>, Error> {
        let k = self.cols;
        let diagonal = |i: usize| f64::from(self.at(i, i));
        let mean = (0..k).map(diagonal).sum::<f64>() / k as f64;
        let damping = if mean > 0.0 { DAMPING * mean } else { 1.0 };
        self.full();
        let mut sums = self.sums;
        // With the order reversed the lower factor L gives U as L⁻¹ reversed.
        let reversed: Vec<usize> = order.iter().rev().copied().collect();
        permute(&mut sums, &reversed);
        for sum in sums.iter_mut().step_by(k + 1) {
            *sum += damping as f32;
        }
        let mut matrix = MatMut::from_column_major_slice_mut(&mut sums, k, k);
        let scratch = cholesky_in_place_scratch::<f32>(k, Par::Seq, Default::default());
        cholesky_in_place(
            matrix.as_mut(),
            Default::default(),
            Par::Seq,
            MemStack::new(&mut MemBuffer::new(scratch)),
            Default::default(),
        )
        .map_err(|_| {
            Error::input(
                "the inputs of a linear layer are not finite: cannot calibrate with this text",
            )
        })?;
        invert_in_place(matrix);
        // Column-major and reversed along both axes is mirrored at the other diagonal.
        for i in 0..k {
            for j in i..k - 1 - i {
                sums.swap(i * k + j, (k - 1 - j) * k + k - 1 - i);
            }
        }
        Ok(sums)
    }
}

/// Element `(i, j)` becomes what element `(order[i], order[j])` was.
fn permute(matrix: &mut [f32], order: &[usize]) {
    let k = order.len();
    let gather = |old: &mut Vec<f32>, row: &mut [f32]| {
        old.clear();
        old.extend_from_slice(row);
        for (new, &from) in row.iter_mut().zip(order) {
            *new = old[from];
        }
    };
    matrix
        .par_chunks_exact_mut(k)
        .for_each_init(Vec::new, gather);
    for i in 0..k {
        // Rows that were swapped away from a place before this one are found where they went.
        let mut from = order[i];
        while from < i {
            from = order[from];
        }
        if from > i {
            let (before, after) = matrix.split_at_mut(from * k);
            before[i * k..(i + 1) * k].swap_with_slice(&mut after[..k]);
        }
    }
}

/// Inverts a lower triangular matrix; what is above the diagonal is neither read nor kept.
fn invert_in_place(mut lower: MatMut<'_, f32>) {
    use BlockStructure::{Rectangular, TriangularLower};
    let k = lower.nrows();
    for start in (0..k).step_by(BLOCK_COLS).rev() {
        let width = BLOCK_COLS.min(k - start);
        let (end, below) = (start + width, k - start - width);
        let mut corner = Mat::<f32>::zeros(width, width);
        let block = lower.rb().submatrix(start, start, width, width);
        invert_lower_triangular(corner.as_mut(), block, Par::Seq);
        // Below: -(inverse of what is to the right) (what is here) (inverse of the corner).
        let mut product = Mat::<f32>::zeros(below, width);
        triangular::matmul(
            product.as_mut(),
            Rectangular,
            Accum::Replace,
            lower.rb().submatrix(end, end, below, below),
            TriangularLower,
            lower.rb().submatrix(end, start, below, width),
            Rectangular,
            -1.0,
            Par::Seq,
        );
        triangular::matmul(
            lower.rb_mut().submatrix_mut(end, start, below, width),
            Rectangular,
            Accum::Replace,
            product.as_ref(),
            Rectangular,
            corner.as_ref(),
            TriangularLower,
            1.0,
            Par::Seq,
        );
        let mut block = lower.rb_mut().submatrix_mut(start, start, width, width);
        block.copy_from_triangular_lower(corner.as_ref());
    }
}

/// `tr(E G Eᵀ)` for `errors` `(n, k)` and [`Gram::full`].
pub fn loss(full: MatRef<'_, f32>, errors: &[f32]) -> f64 {
    let k = full.ncols();
    let bands: Vec<f64> = errors
        .par_chunks(BAND_ROWS * k)
        .map(|band| {
            let rows = band.len() / k;
            let mut product = vec![0.0f32; band.len()];
            let left = MatRef::from_row_major_slice(band, rows, k);
            let out = MatMut::from_row_major_slice_mut(&mut product, rows, k);
            matmul(out, Accum::Replace, left, full, 1.0, Par::Seq);
            band.iter()
                .zip(&product)
                .map(|(a, b)| f64::from(a * b))
                .sum()
        })
        .collect();
    bands.iter().sum()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// `(tokens, k)` inputs that follow each other's directions, some of them large.
    pub fn correlated(tokens: usize, k: usize, seed: u64) -> Vec<f32> {
        let mut random = Random(seed);
        let directions: Vec<f32> = (0..8 * k).map(|_| random.bell()).collect();
        let sizes: Vec<f32> = (0..k).map(|_| (1.2 * random.bell()).exp()).collect();
        (0..tokens)
            .flat_map(|_| {
                let common: Vec<f32> = (0..8).map(|_| random.bell()).collect();
                (0..k)
                    .map(|j| {
                        let shared: f32 = (0..8).map(|d| common[d] * directions[d * k + j]).sum();
                        sizes[j] * (shared * 0.5 + random.bell() * 0.5)
                    })
                    .collect::<Vec<f32>>()
            })
            .collect()
    }

    /// `(n, k)` bell-shaped weights.
    pub fn weights(n: usize, k: usize, seed: u64) -> Vec<f32> {
        let mut random = Random(seed);
        (0..n * k).map(|_| 0.05 * random.bell()).collect()
    }

    /// SplitMix64.
    struct Random(u64);

    impl Random {
        fn unit(&mut self) -> f32 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
        }

        fn bell(&mut self) -> f32 {
            (0..12).map(|_| self.unit()).sum::<f32>() - 6.0
        }
    }

    #[test]
    fn sums_losses_and_mean_squares_are_those_of_the_outputs() {
        let (tokens, k, n) = (150, 96, 7);
        let x = correlated(tokens, k, 1);
        let errors = weights(n, k, 2);
        let mut gram = Gram::new(k);
        gram.add(&x[..64 * k]);
        gram.add(&x[64 * k..]);
        let mut exact = 0.0f64;
        for x in x.chunks_exact(k) {
            for e in errors.chunks_exact(k) {
                let y: f64 = e.iter().zip(x).map(|(e, x)| f64::from(e * x)).sum();
                exact += y * y;
            }
        }
        assert!((loss(gram.full(), &errors) / exact - 1.0).abs() < 1e-4);
        let squares: f32 = x.chunks_exact(k).map(|x| x[70] * x[70]).sum();
        assert!((gram.mean_squares()[70] * tokens as f32 / squares - 1.0).abs() < 1e-4);

        let divisors: Vec<f32> = (0..k).map(|i| 1.0 + i as f32 * 0.1).collect();
        gram.divide(&divisors);
        let scaled: Vec<f32> = errors
            .iter()
            .enumerate()
            .map(|(i, e)| e * divisors[i % k])
            .collect();
        assert!((loss(gram.full(), &scaled) / exact - 1.0).abs() < 1e-4);
    }

    #[test]
    fn feedback_is_a_factor_of_the_inverse() {
        // Two whole blocks and a part of one.
        for k in [80, 300] {
            feedback_is_a_factor(k);
        }
    }

    fn feedback_is_a_factor(k: usize) {
        let mut gram = Gram::new(k);
        gram.add(&correlated(1000, k, 3));
        let order: Vec<usize> = (0..k).map(|i| i * 7 % k).collect();
        let upper = gram.clone().feedback(&order).expect("finite");
        let mean = (0..k).map(|i| f64::from(gram.at(i, i))).sum::<f64>() / k as f64;
        // (Uᵀ U) (P G Pᵀ + damping) is the identity.
        for i in (0..k).step_by(9) {
            let inverse: Vec<f64> = (0..k)
                .map(|j| {
                    (0..=i.min(j))
                        .map(|m| f64::from(upper[m * k + i]) * f64::from(upper[m * k + j]))
                        .sum()
                })
                .collect();
            for j in 0..k {
                let product: f64 = (0..k)
                    .map(|m| {
                        let damping = if m == j { DAMPING * mean } else { 0.0 };
                        inverse[m] * (f64::from(gram.at(order[m], order[j])) + damping)
                    })
                    .sum();
                let expected = if i == j { 1.0 } else { 0.0 };
                assert!((product - expected).abs() < 1e-3, "{i} {j}: {product}");
            }
        }
        gram.add(&vec![f32::NAN; k]);
        assert_eq!(gram.feedback(&order).expect_err("refused").exit_code(), 2);
    }
}
