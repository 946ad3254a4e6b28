//! Kernel variants of one operation: a table a family, each row with a stable id.
//!
//! An id names a variant in bench results and on the command line, so it is never given to
//! another kernel. A table lists the variants in order of preference.

use crate::launch::{DeviceInfo, ShapeError};

/// Stable name of a variant within its table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VariantId(pub u32);

/// Which variant a plan takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// The first of the table that can run here.
    #[default]
    Auto,
    /// This one, or an error if it cannot run here.
    Force(VariantId),
}

/// One kernel of a family.
#[derive(Debug, Clone, Copy)]
pub struct Variant {
    /// Stable id.
    pub id: VariantId,
    /// Short name, the last part of the kernel's.
    pub name: &'static str,
    /// Entry in the PTX.
    pub kernel: &'static str,
    /// Lowest compute capability that runs it, times ten.
    pub min_compute_capability: u32,
    /// Whether it takes a matrix of `rows` by `cols`.
    pub eligible: fn(rows: usize, cols: usize) -> bool,
}

/// [`INT4_GEMV`]: a block a row.
pub const INT4_GEMV_BASELINE: VariantId = VariantId(1);
/// [`INT4_GEMV`]: several rows a warp.
pub const INT4_GEMV_MULTIROW: VariantId = VariantId(2);

/// `linear_gemv_int4_*`: both take every shape of the format, so the baseline runs when forced.
pub const INT4_GEMV: &[Variant] = &[
    Variant {
        id: INT4_GEMV_MULTIROW,
        name: "multirow",
        kernel: "linear_gemv_int4_multirow",
        min_compute_capability: 75,
        eligible: |_, _| true,
    },
    Variant {
        id: INT4_GEMV_BASELINE,
        name: "baseline",
        kernel: "linear_gemv_int4_baseline",
        min_compute_capability: 75,
        eligible: |_, _| true,
    },
];

/// The variant of `table` that `choice` means for an `(rows, cols)` matrix on `device`.
///
/// # Errors
/// A forced id that the table does not have, or a variant that cannot run here.
pub fn choose<'a>(
    table: &'a [Variant],
    family: &'static str,
    choice: Choice,
    device: &DeviceInfo,
    rows: usize,
    cols: usize,
) -> Result<&'a Variant, ShapeError> {
    let runs = |v: &&Variant| {
        device.compute_capability >= v.min_compute_capability && (v.eligible)(rows, cols)
    };
    let (found, value) = match choice {
        Choice::Auto => (table.iter().find(runs), 0),
        Choice::Force(id) => (table.iter().filter(|v| v.id == id).find(runs), id.0),
    };
    found.ok_or(ShapeError::Unsupported {
        kernel: family,
        what: "variant",
        value: u64::from(value),
        rule: "no such variant runs this shape on this device",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_kernels_are_unique() {
        for (i, a) in INT4_GEMV.iter().enumerate() {
            for b in &INT4_GEMV[i + 1..] {
                assert_ne!(a.id, b.id);
                assert_ne!(a.kernel, b.kernel);
            }
        }
    }

    #[test]
    fn auto_takes_the_first_that_runs_and_force_is_obeyed() {
        let table = [
            Variant {
                min_compute_capability: 90,
                ..INT4_GEMV[0]
            },
            Variant {
                eligible: |rows, _| rows > 8,
                ..INT4_GEMV[1]
            },
        ];
        let pick = |choice, device: DeviceInfo, rows| {
            choose(&table, "family", choice, &device, rows, 64).map(|v| v.id)
        };
        let hopper = DeviceInfo {
            compute_capability: 90,
            ..DeviceInfo::T4
        };
        assert_eq!(pick(Choice::Auto, hopper, 100), Ok(INT4_GEMV_MULTIROW));
        assert_eq!(
            pick(Choice::Auto, DeviceInfo::T4, 100),
            Ok(INT4_GEMV_BASELINE)
        );
        assert!(pick(Choice::Auto, DeviceInfo::T4, 8).is_err());
        assert_eq!(
            pick(Choice::Force(INT4_GEMV_BASELINE), hopper, 9),
            Ok(INT4_GEMV_BASELINE)
        );
        assert!(pick(Choice::Force(INT4_GEMV_MULTIROW), DeviceInfo::T4, 9).is_err());
        assert!(pick(Choice::Force(VariantId(99)), hopper, 9).is_err());
    }
}
