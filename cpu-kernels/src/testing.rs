//! Random operands and the comparison that the tests of this crate share.

use half::f16;
use models::quant::{F16Matrix, Int4Matrix, Int8Matrix, TernaryMatrix};

/// A small generator (xorshift64*), so that each test has its own fixed numbers.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn bits(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }

    /// Uniform in `-1.0..1.0`.
    pub(crate) fn float(&mut self) -> f32 {
        (self.bits() >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    pub(crate) fn floats(&mut self, len: usize, range: f32) -> Vec<f32> {
        (0..len).map(|_| self.float() * range).collect()
    }

    fn halves(&mut self, len: usize, range: f32) -> Vec<f16> {
        (0..len)
            .map(|_| f16::from_f32(self.float() * range))
            .collect()
    }

    pub(crate) fn int4(
        &mut self,
        rows: usize,
        cols: usize,
        group: usize,
        mins: bool,
    ) -> Int4Matrix {
        let groups = rows * cols.div_ceil(group);
        Int4Matrix {
            rows,
            cols,
            group,
            quants: (0..rows * cols / 2).map(|_| self.bits() as u8).collect(),
            scales: self.halves(groups, 0.05).into(),
            mins: mins.then(|| self.halves(groups, 0.4).into()),
            zeros: false,
        }
    }

    /// [`Random::int4`] with zeros.
    pub(crate) fn int4_zeros(&mut self, rows: usize, cols: usize, group: usize) -> Int4Matrix {
        let matrix = self.int4(rows, cols, group, false);
        Int4Matrix {
            mins: Some(
                (0..matrix.scales.len())
                    .map(|_| f16::from_f32((self.bits() % 17) as f32))
                    .collect(),
            ),
            zeros: true,
            ..matrix
        }
    }

    pub(crate) fn int8(&mut self, rows: usize, cols: usize, group: usize) -> Int8Matrix {
        Int8Matrix {
            rows,
            cols,
            group,
            quants: (0..rows * cols).map(|_| self.bits() as i8).collect(),
            scales: self.halves(rows * cols.div_ceil(group), 0.01).into(),
        }
    }

    pub(crate) fn f16(&mut self, rows: usize, cols: usize) -> F16Matrix {
        F16Matrix {
            rows,
            cols,
            values: self.halves(rows * cols, 0.5).into(),
        }
    }

    /// With some codes of 3.
    pub(crate) fn ternary(&mut self, rows: usize, cols: usize, group: usize) -> TernaryMatrix {
        TernaryMatrix {
            rows,
            cols,
            group,
            // Code 3 is none.
            quants: (0..rows * cols / 4)
                .map(|_| self.bits() as u8)
                .map(|byte| byte & !(byte >> 1 & byte & 0x55))
                .collect(),
            scales: self.floats(rows * cols.div_ceil(group), 0.3).into(),
        }
    }
}

/// Fails unless the relative L2 error of `got` is at most `bound`; NaN fails.
#[track_caller]
pub(crate) fn assert_close(got: &[f32], expected: &[f32], bound: f64, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: lengths");
    let squares = |f: &dyn Fn(usize) -> f64| (0..got.len()).map(|i| f(i) * f(i)).sum::<f64>();
    let error = squares(&|i| got[i] as f64 - expected[i] as f64).sqrt();
    let norm = squares(&|i| expected[i] as f64).sqrt();
    assert!(
        error <= bound * norm,
        "{what}: relative L2 error {} > {bound}",
        error / norm
    );
}
