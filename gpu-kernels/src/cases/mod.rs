//! Cases that hold a device to the CPU references: the same list runs on the emulator and on a GPU.
//!
//! A case uploads seeded inputs, plans and runs the kernel twice, wants identical bits, and
//! compares with the `reference` of `cpu-kernels`. Shapes are chosen not to be round: K that is no
//! multiple of a warp's reach, N of 1, 7 and 193, short last groups, several tiles of x.

mod attention;
mod draw;
mod elementwise;
mod emulator;
mod forward;
mod gemm;
mod inputs;
mod linear;
mod linear_heads;
mod linear_mma;
mod logits;
mod prompt;
mod read;
mod sample;
mod top;
mod values;

use half::f16;
use thiserror::Error;

pub use self::emulator::EmulatorDevice;
use self::inputs::Inputs;
use crate::launch::{Call, DeviceInfo, DeviceSlice, ShapeError};
use crate::linear::gemm_int4::needs_warpgroup_products;

/// A failure of the device: out of memory, a launch that failed, a fault that the emulator found.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct DeviceError(pub String);

impl From<String> for DeviceError {
    fn from(message: String) -> DeviceError {
        DeviceError(message)
    }
}

/// Something that holds buffers and runs calls. Buffers live until the device is dropped.
pub trait Device {
    /// What plans need to know of it.
    fn info(&self) -> DeviceInfo;

    /// A buffer with these contents, aligned to at least 16 bytes.
    ///
    /// # Errors
    /// No memory.
    fn upload(&mut self, bytes: &[u8]) -> Result<DeviceSlice, DeviceError>;

    /// A buffer of `bytes` that nothing has written, aligned to at least 16 bytes.
    ///
    /// # Errors
    /// No memory.
    fn uninit(&mut self, bytes: u64) -> Result<DeviceSlice, DeviceError>;

    /// The contents of a buffer that [`Device::upload`] or [`Device::uninit`] gave.
    ///
    /// # Errors
    /// An unknown buffer, or one with bytes that nothing has written where that is known.
    fn download(&mut self, slice: DeviceSlice) -> Result<Vec<u8>, DeviceError>;

    /// Runs `call` and waits for it.
    ///
    /// # Errors
    /// A launch that cannot be made or that failed.
    fn run(&mut self, call: &Call) -> Result<(), DeviceError>;
}

/// Why a case failed.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum CaseError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The plan refused the shape.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The result is not the reference's.
    #[error("relative error {error:e}, at most {bound:e} is allowed")]
    Inexact {
        /// `|result - reference| / |reference|`, L2 norms.
        error: f64,
        /// Greatest error allowed.
        bound: f64,
    },
    /// Integers that have to be equal are not.
    #[error("{what} is {got}, the reference has {want}")]
    Unequal {
        /// What was compared.
        what: &'static str,
        /// From the device.
        got: u64,
        /// From the reference.
        want: u64,
    },
    /// Two runs gave different bits.
    #[error("two runs differ, first at element {element}")]
    NotDeterministic {
        /// Index of the first difference.
        element: usize,
    },
}

/// What a case does: its relative error, already checked against its bound.
pub type Run = Box<dyn Fn(&mut dyn Device) -> Result<f64, CaseError> + Send + Sync>;

/// One kernel at one shape.
pub struct Case {
    /// Kernel and shape, for people and filters.
    pub name: String,
    /// Entry name of the kernel.
    pub kernel: &'static str,
    /// Runs it.
    pub run: Run,
}

impl Case {
    fn new(
        kernel: &'static str,
        shape: String,
        run: impl Fn(&mut dyn Device) -> Result<f64, CaseError> + Send + Sync + 'static,
    ) -> Case {
        Case {
            name: format!("{kernel} {shape}"),
            kernel,
            run: Box::new(run),
        }
    }

    /// Whether a device of these dimensions has the kernel.
    pub fn runs_on(&self, device: &DeviceInfo) -> bool {
        device.warpgroup_products || !needs_warpgroup_products(self.kernel)
    }
}

/// Every case that is small enough for the emulator, and a short forward pass.
pub fn all() -> Vec<Case> {
    let mut cases = elementwise::cases();
    cases.extend(linear::cases());
    cases.extend(logits::cases());
    cases.extend(linear_mma::cases());
    cases.extend(gemm::cases());
    cases.extend(prompt::cases());
    cases.extend(values::cases());
    cases.extend(linear_heads::cases());
    cases.extend(attention::cases());
    cases.extend(sample::cases());
    cases.extend(top::cases());
    cases.extend(draw::cases());
    cases.extend(read::cases());
    cases.extend(forward::cases());
    cases
}

/// Shapes of real models, too slow for the emulator.
pub fn large() -> Vec<Case> {
    let mut cases = linear::large();
    cases.extend(logits::large());
    cases.extend(linear_mma::large());
    cases.extend(gemm::large());
    cases.extend(prompt::large());
    cases.extend(linear_heads::large());
    cases.extend(attention::large());
    cases.extend(top::large());
    cases
}

/// Runs `once` twice, each time from fresh buffers, and wants the same bits.
fn same_twice(
    device: &mut dyn Device,
    once: impl Fn(&mut dyn Device) -> Result<Vec<f32>, CaseError>,
) -> Result<Vec<f32>, CaseError> {
    let first = once(device)?;
    let second = once(device)?;
    let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
    match first.iter().zip(&second).position(differs) {
        Some(element) => Err(CaseError::NotDeterministic { element }),
        None => Ok(first),
    }
}

/// Tokens whose results are compared: all of a few, of many a sample with both ends, as the references
/// are plain loops.
fn compared(tokens: usize) -> Vec<usize> {
    const MOST: usize = 96;
    if tokens <= MOST {
        return (0..tokens).collect();
    }
    (0..MOST / 2)
        .map(|i| i * (tokens - 1) / (MOST / 2 - 1))
        .collect()
}

/// The rows of `values` that belong to `tokens`, each `width` long.
fn rows_of<T: Copy>(values: &[T], width: usize, tokens: &[usize]) -> Vec<T> {
    let rows = tokens.iter().map(|token| &values[token * width..][..width]);
    rows.flatten().copied().collect()
}

fn to_floats(halves: Vec<f16>) -> Vec<f32> {
    halves.into_iter().map(f16::to_f32).collect()
}

/// The relative error of `got` against `want`, if it is within `bound`. NaN is never within.
fn within(got: &[f32], want: &[f32], bound: f64) -> Result<f64, CaseError> {
    within_of(got, want, 0.0, bound)
}

/// As [`within`], for results that are about `typical` in size: a few whose terms happen to cancel
/// are judged against that rather than against what little is left.
fn within_of(got: &[f32], want: &[f32], typical: f64, bound: f64) -> Result<f64, CaseError> {
    if got.len() != want.len() {
        let (got, want) = (got.len() as u64, want.len() as u64);
        return Err(CaseError::Unequal {
            what: "length",
            got,
            want,
        });
    }
    let squares: f64 = want.iter().map(|&w| f64::from(w).powi(2)).sum();
    let norm = squares.sqrt().max(typical * (want.len() as f64).sqrt());
    let differences = got
        .iter()
        .zip(want)
        .map(|(&g, &w)| f64::from(g) - f64::from(w));
    let distance = differences.map(|d| d.powi(2)).sum::<f64>().sqrt();
    let error = if distance == 0.0 {
        0.0
    } else {
        distance / norm
    };
    if error <= bound {
        Ok(error)
    } else {
        Err(CaseError::Inexact { error, bound })
    }
}

/// Typed access to a device.
trait Buffers {
    fn put_f32(&mut self, values: &[f32]) -> Result<DeviceSlice, DeviceError>;
    fn put_f16(&mut self, values: &[half::f16]) -> Result<DeviceSlice, DeviceError>;
    fn put_i8(&mut self, values: &[i8]) -> Result<DeviceSlice, DeviceError>;
    fn put_u32(&mut self, values: &[u32]) -> Result<DeviceSlice, DeviceError>;
    fn take_f32(&mut self, slice: DeviceSlice) -> Result<Vec<f32>, DeviceError>;
    fn take_f16(&mut self, slice: DeviceSlice) -> Result<Vec<half::f16>, DeviceError>;
    fn take_u32(&mut self, slice: DeviceSlice) -> Result<Vec<u32>, DeviceError>;
}

impl Buffers for dyn Device + '_ {
    fn put_f32(&mut self, values: &[f32]) -> Result<DeviceSlice, DeviceError> {
        self.upload(
            &values
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect::<Vec<u8>>(),
        )
    }

    fn put_f16(&mut self, values: &[half::f16]) -> Result<DeviceSlice, DeviceError> {
        self.upload(
            &values
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect::<Vec<u8>>(),
        )
    }

    fn put_i8(&mut self, values: &[i8]) -> Result<DeviceSlice, DeviceError> {
        self.upload(&values.iter().map(|&v| v as u8).collect::<Vec<u8>>())
    }

    fn put_u32(&mut self, values: &[u32]) -> Result<DeviceSlice, DeviceError> {
        self.upload(
            &values
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect::<Vec<u8>>(),
        )
    }

    fn take_f32(&mut self, slice: DeviceSlice) -> Result<Vec<f32>, DeviceError> {
        Ok(self
            .take_u32(slice)?
            .into_iter()
            .map(f32::from_bits)
            .collect())
    }

    fn take_f16(&mut self, slice: DeviceSlice) -> Result<Vec<half::f16>, DeviceError> {
        let bytes = self.download(slice)?;
        let (halves, _) = bytes.as_chunks::<2>();
        Ok(halves
            .iter()
            .map(|&b| half::f16::from_le_bytes(b))
            .collect())
    }

    fn take_u32(&mut self, slice: DeviceSlice) -> Result<Vec<u32>, DeviceError> {
        let bytes = self.download(slice)?;
        let (words, _) = bytes.as_chunks::<4>();
        Ok(words.iter().map(|&b| u32::from_le_bytes(b)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<String> = all().into_iter().chain(large()).map(|c| c.name).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn every_kernel_has_three_cases() {
        let cases = all();
        for entry in crate::ENTRIES {
            let count = cases.iter().filter(|c| c.kernel == entry.name).count();
            assert!(count >= 3, "{} has {count} cases", entry.name);
        }
    }

    #[test]
    fn errors_are_relative_and_nan_fails() {
        assert_eq!(within(&[3.0, 4.0], &[3.0, 4.0], 0.0), Ok(0.0));
        let error = within(&[3.0, 4.5], &[3.0, 4.0], 0.2).unwrap();
        assert!((error - 0.1).abs() < 1e-12);
        assert!(within(&[3.0, 4.5], &[3.0, 4.0], 0.05).is_err());
        assert!(within(&[f32::NAN], &[1.0], 1.0).is_err());
        assert!(within(&[1.0], &[0.0], 1.0).is_err());
        assert!(within(&[1.0], &[], 1.0).is_err());
        assert!(within_of(&[0.02], &[0.01], 1.0, 0.02).is_ok());
        assert!(within_of(&[0.04], &[0.01], 1.0, 0.02).is_err());
    }
}
