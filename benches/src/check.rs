//! The kernel cases on a CUDA device.

use std::sync::{Arc, Mutex, PoisonError};

use engine::backend::cuda::device::{DeviceMemory, Gpu};
use engine::backend::cuda::plan::Memory;
use gpu_kernels::cases::{self, Case, Device, DeviceError};
use gpu_kernels::launch::{Call, DeviceInfo, DeviceSlice};
use indicatif::{ParallelProgressIterator, ProgressBar, ProgressStyle};
use rayon::prelude::*;

/// A CUDA device for one case; its memory is freed when it is dropped.
#[derive(Debug)]
pub struct CudaDevice<'a> {
    gpu: Arc<Gpu>,
    memory: DeviceMemory,
    /// Held while a kernel runs: cases share a stream, and a failure is the running kernel's.
    running: &'a Mutex<()>,
}

impl<'a> CudaDevice<'a> {
    /// A device with no memory allocated yet.
    pub fn new(gpu: &Arc<Gpu>, running: &'a Mutex<()>) -> CudaDevice<'a> {
        CudaDevice {
            gpu: Arc::clone(gpu),
            memory: DeviceMemory::new(gpu),
            running,
        }
    }
}

fn fault(error: engine::Error) -> DeviceError {
    DeviceError(error.to_string())
}

impl Device for CudaDevice<'_> {
    fn info(&self) -> DeviceInfo {
        self.gpu.info()
    }

    fn upload(&mut self, bytes: &[u8]) -> Result<DeviceSlice, DeviceError> {
        self.memory.upload(bytes).map_err(fault)
    }

    fn uninit(&mut self, bytes: u64) -> Result<DeviceSlice, DeviceError> {
        let slice = self.memory.reserve(bytes).map_err(fault)?;
        // Not-a-number in every float width: what a kernel fails to write cannot pass for a result.
        self.memory
            .write(slice, &vec![0xff; bytes as usize])
            .map_err(fault)?;
        Ok(slice)
    }

    fn download(&mut self, slice: DeviceSlice) -> Result<Vec<u8>, DeviceError> {
        let mut bytes = vec![0; slice.bytes as usize];
        self.memory.read(slice, &mut bytes).map_err(fault)?;
        Ok(bytes)
    }

    fn run(&mut self, call: &Call) -> Result<(), DeviceError> {
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: a case builds its call with the kernel's plan from slices of this device, which
        // live until the device is dropped, after the wait below.
        unsafe { self.gpu.queue(call) }.map_err(fault)?;
        self.gpu.synchronize().map_err(fault)
    }
}

/// What one case showed.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Name of the case.
    pub name: String,
    /// Kernel entry.
    pub kernel: &'static str,
    /// Relative L2 error against the CPU reference, or what went wrong.
    pub result: Result<f64, String>,
}

/// Runs every case that `wanted` takes on `gpu`: those that the emulator also runs, and the shapes
/// of real models.
///
/// The references take most of the time: cases run on all cores, their kernels one after the other.
pub fn run(gpu: &Arc<Gpu>, wanted: impl Fn(&Case) -> bool) -> Vec<Outcome> {
    let cases: Vec<Case> = cases::all()
        .into_iter()
        .chain(cases::large())
        .filter(|case| case.runs_on(&gpu.info()) && wanted(case))
        .collect();
    let style = ProgressStyle::with_template("checking {wide_bar} {pos}/{len}")
        .expect("the template is well-formed");
    let progress = ProgressBar::new(cases.len() as u64).with_style(style);
    let running = Mutex::new(());
    let outcomes = cases
        .into_par_iter()
        .progress_with(progress.clone())
        .map(|case| {
            let mut device = CudaDevice::new(gpu, &running);
            let result = (case.run)(&mut device).map_err(|error| error.to_string());
            Outcome {
                name: case.name,
                kernel: case.kernel,
                result,
            }
        })
        .collect();
    progress.finish_and_clear();
    outcomes
}

/// Prints a table of the outcomes on `place`; returns how many failed.
pub fn report(place: &str, outcomes: &[Outcome]) -> usize {
    let mut failed = 0;
    for outcome in outcomes {
        match &outcome.result {
            Ok(error) => println!("pass  {place}  {:<64} {error:.2e}", outcome.name),
            Err(reason) => {
                failed += 1;
                println!("FAIL  {place}  {:<64} {reason}", outcome.name);
            }
        }
    }
    failed
}
