//! Seeded inputs: the same numbers on every machine.

use half::f16;
use models::quant::{F16Matrix, Int4Matrix, Int8Matrix};

/// A SplitMix64 generator (Steele, Lea, Flood: Fast splittable pseudorandom number generators).
pub struct Inputs {
    state: u64,
}

impl Inputs {
    pub fn new(seed: u64) -> Inputs {
        Inputs { state: seed }
    }

    pub fn u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in -1..1.
    pub fn unit(&mut self) -> f32 {
        (self.u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    /// Bell-shaped around 0, standard deviation about `scale`.
    pub fn floats(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count)
            .map(|_| scale * (self.unit() + self.unit() + self.unit()))
            .collect()
    }

    /// Cosines and sines of `count` angles, up to 4 either way.
    pub fn turns(&mut self, count: usize) -> [Vec<f32>; 2] {
        let angles: Vec<f32> = (0..count).map(|_| 4.0 * self.unit()).collect();
        [f32::cos, f32::sin].map(|of| angles.iter().map(|a| of(*a)).collect())
    }

    pub fn halves(&mut self, count: usize, scale: f32) -> Vec<f16> {
        self.floats(count, scale)
            .into_iter()
            .map(f16::from_f32)
            .collect()
    }

    /// Positive scales of a weight format, about `scale`.
    fn scales(&mut self, count: usize, scale: f32) -> Vec<f16> {
        (0..count)
            .map(|_| f16::from_f32(scale * (1.0 + 0.5 * self.unit())))
            .collect()
    }

    /// Every nibble value occurs; weights are about `1 / sqrt(cols)`.
    pub fn int4(&mut self, rows: usize, cols: usize, group: usize, mins: bool) -> Int4Matrix {
        let groups = rows * cols.div_ceil(group);
        let quants = (0..rows * cols / 2).map(|_| self.u64() as u8).collect();
        let scales = self.scales(groups, 0.25 / (cols as f32).sqrt());
        let mins = mins.then(|| {
            scales
                .iter()
                .map(|s| f16::from_f32(s.to_f32() * (-7.5 + self.unit())))
                .collect()
        });
        Int4Matrix {
            rows,
            cols,
            group,
            quants,
            scales: scales.into(),
            mins,
            zeros: false,
        }
    }

    /// [`Inputs::int4`] with every zero that there is in the place of minima.
    pub fn int4_zeros(&mut self, rows: usize, cols: usize, group: usize) -> Int4Matrix {
        let mut w = self.int4(rows, cols, group, false);
        let zeros = (0..w.scales.len()).map(|_| f16::from_f32((self.u64() % 17) as f32));
        w.mins = Some(zeros.collect());
        w.zeros = true;
        w
    }

    /// Weights are about `1 / sqrt(cols)`.
    pub fn f16(&mut self, rows: usize, cols: usize) -> F16Matrix {
        let values = self.floats(rows * cols, 1.7 / (cols as f32).sqrt());
        F16Matrix {
            rows,
            cols,
            values: values.into_iter().map(f16::from_f32).collect(),
        }
    }

    /// Every byte value occurs; weights are about `1 / sqrt(cols)`.
    pub fn int8(&mut self, rows: usize, cols: usize, group: usize) -> Int8Matrix {
        let quants = (0..rows * cols).map(|_| self.u64() as i8).collect();
        let scales = self.scales(
            rows * cols.div_ceil(group),
            1.0 / 64.0 / (cols as f32).sqrt(),
        );
        Int8Matrix {
            rows,
            cols,
            group,
            quants,
            scales: scales.into(),
        }
    }
}
