//! The kernel cases on the emulator: what can be known of correctness without a GPU.

use gpu_kernels::cases::{self, Case, EmulatorDevice};
use gpu_kernels::launch::DeviceInfo;

use crate::check::Outcome;

/// Runs every case that `wanted` takes, each on a device of its own, in a random but repeatable
/// order of threads and blocks.
pub fn run(wanted: impl Fn(&Case) -> bool) -> Vec<Outcome> {
    cases::all()
        .into_iter()
        .filter(|case| wanted(case))
        .map(|case| {
            let mut device = EmulatorDevice::new(DeviceInfo::T4, Some(1));
            let result = (case.run)(&mut device).map_err(|error| error.to_string());
            Outcome {
                name: case.name,
                kernel: case.kernel,
                result,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_wanted_runs() {
        let outcomes = run(|case| case.kernel == "swiglu_f32");
        assert!(outcomes.len() >= 3);
        for outcome in outcomes {
            assert_eq!(outcome.kernel, "swiglu_f32");
            assert!(outcome.result.is_ok(), "{outcome:?}");
        }
    }
}
