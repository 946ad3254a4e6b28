//! The kernel cases on the emulator: what can be known of correctness without a GPU.

use gpu_kernels::cases::{self, Case, EmulatorDevice};
use gpu_kernels::emulator::{Conflicts, count_conflicts, take_conflicts};
use gpu_kernels::launch::DeviceInfo;

use crate::check::Outcome;
use crate::table;

/// What the emulator finds.
#[derive(Debug)]
pub struct Emulated {
    /// Of each case.
    pub outcomes: Vec<Outcome>,
    /// Accesses of shared memory by line, those with most conflicts first.
    pub conflicts: Vec<Conflicts>,
}

/// Runs every case that `wanted` takes, each on a device of its own, in a random but repeatable
/// order of threads and blocks.
pub fn run(wanted: impl Fn(&Case) -> bool) -> Emulated {
    count_conflicts();
    let outcomes = cases::all()
        .into_iter()
        .filter(|case| wanted(case))
        .map(|case| {
            let info = [DeviceInfo::T4, DeviceInfo::H100]
                .into_iter()
                .find(|info| case.runs_on(info));
            let mut device = EmulatorDevice::new(info.unwrap_or(DeviceInfo::H100), Some(1));
            let result = (case.run)(&mut device).map_err(|error| error.to_string());
            Outcome {
                name: case.name,
                kernel: case.kernel,
                result,
            }
        })
        .collect();
    Emulated {
        outcomes,
        conflicts: take_conflicts(),
    }
}

/// The table of bank conflicts: a line a source line that has some, and the sum of all.
pub fn conflicts(lines: &[Conflicts]) -> String {
    if lines.is_empty() {
        return "shared memory: not used\n".to_owned();
    }
    let cells: Vec<Vec<String>> = lines
        .iter()
        .filter(|line| line.extra > 0)
        .map(|line| {
            vec![
                line.kernel.clone(),
                format!("{}:{}", line.location.file(), line.location.line()),
                if line.stores { "store" } else { "load" }.to_owned(),
                line.bytes.to_string(),
                line.accesses.to_string(),
                line.extra.to_string(),
                format!("{:.2}", line.extra as f64 / line.accesses as f64),
                line.worst.to_string(),
            ]
        })
        .collect();
    let accesses: u64 = lines.iter().map(|line| line.accesses).sum();
    let extra: u64 = lines.iter().map(|line| line.extra).sum();
    let mut text = String::new();
    if !cells.is_empty() {
        let header = [
            "kernel",
            "line",
            "access",
            "bytes",
            "by warps",
            "conflicts",
            "each",
            "worst",
        ];
        text = table::columns(&header, &cells, 3);
    }
    text.push_str(&format!(
        "shared memory, counted by the emulator over all cases: {accesses} accesses by warps, \
         {extra} bank conflicts (passes besides those needed)\n"
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_wanted_runs() {
        let emulated = run(|case| case.kernel == "swiglu_f32");
        assert!(emulated.outcomes.len() >= 3);
        for outcome in emulated.outcomes {
            assert_eq!(outcome.kernel, "swiglu_f32");
            assert!(outcome.result.is_ok(), "{outcome:?}");
        }
        assert_eq!(conflicts(&emulated.conflicts), "shared memory: not used\n");
    }

    #[test]
    fn shared_memory_is_reported_by_line() {
        let emulated = run(|case| case.kernel == "rmsnorm_f32");
        assert!(emulated.conflicts.len() >= 2, "stores and loads");
        let text = conflicts(&emulated.conflicts);
        assert!(text.contains("accesses by warps"), "{text}");
        let mut spoiled = emulated.conflicts;
        spoiled[0].extra = 3 * spoiled[0].accesses;
        spoiled[0].worst = 7;
        let text = conflicts(&spoiled);
        let line = text.lines().nth(1).expect("a row");
        assert!(line.starts_with("rmsnorm_f32  gpu-kernels/src/"), "{text}");
        assert!(line.ends_with("3.00      7"), "{text}");
    }
}
