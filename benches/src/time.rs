//! Times a kernel the way that a decode step meets it: launched from a CUDA graph, its weights not
//! in any cache.
//!
//! The graph runs the kernel over enough copies of its operands that, by the time one comes round
//! again, at least [`ROTATE_BYTES`] have gone through: nothing but the activations is served from
//! L2. A kernel that only touches activations is timed on one copy, as they do sit in L2.

use std::sync::Arc;

use cust::event::{Event, EventFlags};
use cust::memory::{CopyDestination, DeviceBuffer};
use engine::Error;
use engine::backend::cuda::device::{DeviceMemory, Gpu};
use engine::backend::cuda::launch::Graph;

use crate::rows::Row;

/// Bytes that go by before a copy is used again: eight times the largest L2 of the supported GPUs.
pub const ROTATE_BYTES: u64 = 400_000_000;
/// Launches in a graph, at least.
const MIN_LAUNCHES: usize = 128;
/// Copies of the operands, at most.
const MAX_COPIES: usize = 4096;
/// Timed runs of the graph.
const SAMPLES: usize = 15;
/// Runs before those.
const WARM_UP: usize = 3;

/// Times of one kernel.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Median, microseconds a launch.
    pub median_us: f64,
    /// Fastest sample.
    pub min_us: f64,
    /// Slowest sample.
    pub max_us: f64,
    /// Launches in the graph.
    pub launches: usize,
    /// Copies of the operands that they rotate over.
    pub copies: usize,
    /// Timed runs of the graph.
    pub samples: usize,
}

impl Timing {
    /// Achieved bandwidth in GB/s (10^9) for `bytes` a launch.
    pub fn gb_per_second(&self, bytes: u64) -> f64 {
        bytes as f64 / self.median_us / 1e3
    }

    fn new(mut us: Vec<f64>, launches: usize, copies: usize) -> Timing {
        us.sort_by(f64::total_cmp);
        Timing {
            median_us: us[us.len() / 2],
            min_us: us[0],
            max_us: us[us.len() - 1],
            launches,
            copies,
            samples: us.len(),
        }
    }
}

fn cuda(what: &str) -> impl Fn(cust::error::CudaError) -> Error + '_ {
    move |error| {
        let name = cuda_driver::last_error().unwrap_or_else(|| format!("{error:?}"));
        Error::machine(format!("{what} failed with {name}"))
    }
}

/// Copies of the operands to rotate over.
fn copies(row: &Row) -> usize {
    if !row.streams {
        return 1;
    }
    (ROTATE_BYTES.div_ceil(row.bytes) as usize).clamp(1, MAX_COPIES)
}

/// Times `row` on `gpu`.
///
/// # Errors
/// [`Error::Machine`] from the device, [`Error::Input`] for a shape that the kernel cannot take.
pub fn kernel(gpu: &Arc<Gpu>, row: &Row) -> Result<Timing, Error> {
    let mut memory = DeviceMemory::new(gpu);
    let copies = copies(row);
    let info = gpu.info();
    let distinct = (0..copies)
        .map(|_| (row.make)(&info, &mut memory))
        .collect::<Result<Vec<_>, _>>()?;
    let launches = copies * MIN_LAUNCHES.div_ceil(copies);
    let calls: Vec<_> = distinct.iter().cycle().take(launches).cloned().collect();
    // SAFETY: the calls' memory is `memory`, dropped after the graph below and its last run.
    let graph = unsafe { Graph::capture(gpu, &calls) }?;
    let us = sample(gpu, || graph.launch())?;
    drop(graph);
    Ok(Timing::new(
        us.into_iter().map(|us| us / launches as f64).collect(),
        launches,
        copies,
    ))
}

/// Times a copy of [`ROTATE_BYTES`] within device memory: what this device's memory does at best.
/// Each byte is read once and written once.
///
/// # Errors
/// [`Error::Machine`] from the device.
pub fn device_copy(gpu: &Arc<Gpu>) -> Result<Timing, Error> {
    gpu.free_bytes()?;
    let elems = ROTATE_BYTES as usize;
    let zeros = vec![0u8; elems];
    let source = DeviceBuffer::from_slice(&zeros).map_err(cuda("allocating"))?;
    let mut target = DeviceBuffer::from_slice(&zeros).map_err(cuda("allocating"))?;
    let stream = gpu.stream();
    let us = sample(gpu, || {
        use cust::memory::AsyncCopyDestination;
        // SAFETY: both buffers outlive the copy: `sample` waits for the stream.
        unsafe { target.async_copy_from(&source, stream) }.map_err(cuda("copying"))
    })?;
    // Read something back, so that a failed copy does not pass for a fast one.
    let mut first = [1u8];
    target
        .index(0..1)
        .copy_to(&mut first[..])
        .map_err(cuda("copying"))?;
    Ok(Timing::new(us, 1, 1))
}

/// Microseconds of each timed run of `work`, by CUDA events around it.
fn sample(gpu: &Gpu, mut work: impl FnMut() -> Result<(), Error>) -> Result<Vec<f64>, Error> {
    let stream = gpu.stream();
    let event = || Event::new(EventFlags::DEFAULT).map_err(cuda("making an event"));
    let (start, end) = (event()?, event()?);
    for _ in 0..WARM_UP {
        work()?;
    }
    gpu.synchronize()?;
    (0..SAMPLES)
        .map(|_| {
            start.record(stream).map_err(cuda("recording an event"))?;
            work()?;
            end.record(stream).map_err(cuda("recording an event"))?;
            end.synchronize().map_err(cuda("the timed kernel"))?;
            let ms = end
                .elapsed_time_f32(&start)
                .map_err(cuda("reading the time"))?;
            Ok(f64::from(ms) * 1e3)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_bandwidth() {
        let timing = Timing::new(vec![3.0, 1.0, 2.0], 128, 4);
        assert_eq!(
            (timing.min_us, timing.median_us, timing.max_us),
            (1.0, 2.0, 3.0)
        );
        // 3 MB in 2 us are 1.5 TB/s.
        assert_eq!(timing.gb_per_second(3_000_000), 1500.0);
    }

    #[test]
    fn enough_copies_to_leave_the_caches() {
        for row in crate::rows::all().iter().filter(|row| row.streams) {
            let copies = copies(row);
            assert!(
                copies == MAX_COPIES || copies as u64 * row.bytes >= ROTATE_BYTES,
                "{} {}",
                row.kernel,
                row.shape
            );
        }
    }
}
