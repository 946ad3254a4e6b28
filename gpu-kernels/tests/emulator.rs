//! Every case on the emulator, in order and in a random order of threads and blocks.

use gpu_kernels::cases::{self, EmulatorDevice};
use gpu_kernels::launch::DeviceInfo;

/// Runs each case on a device of its own and reports all failures together.
fn run_all(seed: Option<u64>) {
    let mut failures = Vec::new();
    for case in cases::all() {
        let info = if case.runs_on(&DeviceInfo::T4) {
            DeviceInfo::T4
        } else {
            // So few multiprocessors that tiles are left for a part of them.
            DeviceInfo {
                multiprocessors: 5,
                ..DeviceInfo::H100
            }
        };
        let mut device = EmulatorDevice::new(info, seed);
        match (case.run)(&mut device) {
            Ok(error) => println!("{}: relative error {error:.1e}", case.name),
            Err(error) => failures.push(format!("{}: {error}", case.name)),
        }
    }
    assert!(
        failures.is_empty(),
        "{} cases failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

#[test]
fn every_case_in_order() {
    run_all(None);
}

#[test]
fn every_case_in_a_random_order() {
    run_all(Some(1));
}
