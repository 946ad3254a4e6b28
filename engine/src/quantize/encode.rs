//! One weight in its new form, without calibration: bands of rows on all cores, straight into place.

use half::f16;
use models::file::container::{Layout, StoredWeight};
use models::quant::{
    F16Matrix, Int4Fit, Int4Form, Int4Matrix, Int8Matrix, Shared, TernaryMatrix, Weight,
};
use models::weights::FloatRows;
use rayon::prelude::*;

use super::{Hooks, Method};
use crate::Error;

/// Weights that one task decodes and rounds at a time.
const BAND_WEIGHTS: usize = 1 << 18;

/// Encodes a matrix as `stored` says.
///
/// # Errors
/// [`Error::Input`] naming the tensor if a weight is not finite or beyond f16.
pub fn encode(
    stored: &StoredWeight,
    rows: &FloatRows<'_>,
    method: Method,
    hooks: &Hooks<'_>,
) -> Result<Weight, Error> {
    let (n, k) = (stored.rows, stored.cols);
    let bands = Bands {
        stored,
        rows,
        hooks,
    };
    let weight = match stored.layout {
        Layout::Int4 { group, form } => {
            let groups = n * k.div_ceil(group);
            let (mut quants, mut scales) = (vec![0u8; n * k / 2], vec![f16::ZERO; groups]);
            let minima = if form == Int4Form::Asymmetric {
                groups
            } else {
                0
            };
            let mut mins = vec![f16::ZERO; minima];
            bands.fill(
                [&mut quants],
                [&mut scales, &mut mins],
                |rows, floats, [q], [s, m]| {
                    let band =
                        Int4Matrix::encode_with(rows, k, group, floats, |_, w| match method {
                            Method::Rtn => Int4Fit::range(w, form),
                            Method::Mse | Method::Awq | Method::Gptq => {
                                Int4Fit::search(w, None, form)
                            }
                        })?;
                    q.copy_from_slice(&band.quants);
                    s.copy_from_slice(&band.scales);
                    m.copy_from_slice(band.mins.as_deref().unwrap_or(&[]));
                    Ok(())
                },
            )?;
            let mins = (form == Int4Form::Asymmetric).then(|| Shared::from(mins));
            Weight::Int4(Int4Matrix::from_shared(
                n,
                k,
                group,
                quants.into(),
                scales.into(),
                mins,
            )?)
        }
        Layout::Int8 { group } => {
            let (mut quants, mut scales) =
                (vec![0i8; n * k], vec![f16::ZERO; n * k.div_ceil(group)]);
            bands.fill([&mut quants], [&mut scales], |rows, floats, [q], [s]| {
                let band = Int8Matrix::encode(rows, k, group, floats)?;
                q.copy_from_slice(&band.quants);
                s.copy_from_slice(&band.scales);
                Ok(())
            })?;
            Weight::Int8(Int8Matrix::new(n, k, group, quants, scales)?)
        }
        Layout::Ternary { group } => {
            let (mut quants, mut scales) =
                (vec![0u8; n * k / 4], vec![0f32; n * k.div_ceil(group)]);
            bands.fill([&mut quants], [&mut scales], |rows, floats, [q], [s]| {
                let band = TernaryMatrix::encode(rows, k, group, floats)?;
                q.copy_from_slice(&band.quants);
                s.copy_from_slice(&band.scales);
                Ok(())
            })?;
            Weight::Ternary(TernaryMatrix::new(n, k, group, quants, scales)?)
        }
        Layout::F16 => {
            let mut values = vec![f16::ZERO; n * k];
            bands.fill(
                [&mut values],
                [&mut [] as &mut [f16]],
                |rows, floats, [v], _| {
                    let halves: Vec<f16> = floats.iter().map(|w| f16::from_f32(*w)).collect();
                    v.copy_from_slice(&F16Matrix::new(rows, k, halves)?.values);
                    Ok(())
                },
            )?;
            Weight::F16(F16Matrix::new(n, k, values)?)
        }
        Layout::F32 | Layout::Int4Zeros { .. } => {
            return Err(Error::input(format!(
                "{}: neither a vector nor zeros of another quantiser are rounded to",
                stored.name
            )));
        }
    };
    Ok(weight)
}

/// A matrix cut into bands of rows.
struct Bands<'a> {
    stored: &'a StoredWeight,
    rows: &'a FloatRows<'a>,
    hooks: &'a Hooks<'a>,
}

impl Bands<'_> {
    /// Calls `encode` with the number of rows and the floats of every band, and the band's share of
    /// each array.
    fn fill<Q: Send, S: Send, const A: usize, const B: usize>(
        &self,
        quants: [&mut [Q]; A],
        scales: [&mut [S]; B],
        encode: impl Fn(usize, &[f32], [&mut [Q]; A], [&mut [S]; B]) -> Result<(), models::Error> + Sync,
    ) -> Result<(), Error> {
        let (n, k) = (self.stored.rows, self.stored.cols);
        let band = (BAND_WEIGHTS / k).clamp(1, n);
        let mut quants = quants.map(|all| shares(all, n, band));
        let mut scales = scales.map(|all| shares(all, n, band));
        let bands: Vec<_> = (0..n)
            .step_by(band)
            .map(|start| {
                let q = quants
                    .each_mut()
                    .map(|shares| shares.next().unwrap_or_default());
                let s = scales
                    .each_mut()
                    .map(|shares| shares.next().unwrap_or_default());
                (start, q, s)
            })
            .collect();
        bands
            .into_par_iter()
            .try_for_each(|(start, quants, scales)| {
                if (self.hooks.interrupted)() {
                    return Err(Error::machine("interrupted"));
                }
                let rows = band.min(n - start);
                let mut floats = vec![0f32; rows * k];
                for (i, row) in floats.chunks_exact_mut(k).enumerate() {
                    self.rows.read(start + i, row);
                }
                let encoded = encode(rows, &floats, quants, scales);
                (self.hooks.release)();
                encoded.map_err(|_| self.not_finite(start, &floats))
            })
    }

    /// What makes a band of finite shape impossible to encode.
    fn not_finite(&self, start: usize, floats: &[f32]) -> Error {
        let k = self.stored.cols;
        let bad = floats
            .iter()
            .position(|w| !w.is_finite())
            .or_else(|| floats.iter().position(|w| !f16::from_f32(*w).is_finite()))
            .unwrap_or(0);
        Error::input(format!(
            "tensor `{}`: row {}, column {} is {}: weights are finite and within ±65504",
            self.stored.name,
            start + bad / k,
            bad % k,
            floats[bad]
        ))
    }
}

/// The shares of bands of `band` rows in an array of `n` rows, which may be empty.
fn shares<T>(all: &mut [T], n: usize, band: usize) -> impl Iterator<Item = &mut [T]> {
    let row = all.len() / n;
    all.chunks_mut((row * band).max(1))
}
