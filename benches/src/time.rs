//! Times a kernel the way that a decode step meets it: launched from a CUDA graph, its weights not
//! in any cache.
//!
//! The graph runs the kernel over enough copies of its operands that, by the time one comes round
//! again, at least [`ROTATE_BYTES`] have gone through, and three times the L2: nothing but the
//! activations, which all copies share, is served from L2. A kernel that only touches activations
//! is timed on one copy, as they do sit in L2.

use std::sync::Arc;

use cust::device::{Device, DeviceAttribute};
use cust::event::{Event, EventFlags};
use cust::memory::{CopyDestination, DeviceBuffer};
use engine::Error;
use engine::backend::cuda::device::{DeviceMemory, Gpu};
use engine::backend::cuda::launch::Graph;
use engine::backend::cuda::plan::Memory;
use gpu_kernels::launch::{Call, DeviceInfo, DeviceSlice};
use gpu_kernels::tuned::Tuned;

use crate::rows::{Operands, Row};

/// Bytes that go by before a copy is used again, at least; more where three times the L2 is more.
pub const ROTATE_BYTES: u64 = 400_000_000;
/// Launches in a graph, at least.
const MIN_LAUNCHES: usize = 128;
/// Copies of the operands, at most.
const MAX_COPIES: usize = 4096;
/// Timed runs of the graph: enough for the 5th and 95th percentile to leave out the extremes.
pub const SAMPLES: usize = 41;
/// Runs before those.
const WARM_UP: usize = 3;

/// Times of one kernel.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Median, microseconds a launch.
    pub median_us: f64,
    /// 5th percentile of the samples.
    pub p5_us: f64,
    /// 95th percentile of the samples.
    pub p95_us: f64,
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
        let percentile = |percent: usize| us[(us.len() - 1) * percent / 100];
        Timing {
            median_us: percentile(50),
            p5_us: percentile(5),
            p95_us: percentile(95),
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

/// Copies of operands of `bytes` to rotate over, so that `rotate_bytes` go by.
fn copies(bytes: u64, rotate_bytes: u64) -> usize {
    (rotate_bytes.div_ceil(bytes) as usize).clamp(1, MAX_COPIES)
}

/// Bytes of the L2.
///
/// # Errors
/// [`Error::Machine`] from the driver.
pub fn l2_bytes() -> Result<u64, Error> {
    let l2 = Device::get_device(0)
        .and_then(|device| device.get_attribute(DeviceAttribute::L2CacheSize))
        .map_err(cuda("asking for the L2 size"))?;
    Ok(u64::try_from(l2).unwrap_or(0))
}

/// Bytes to rotate over.
fn rotate_bytes() -> Result<u64, Error> {
    Ok(ROTATE_BYTES.max(3 * l2_bytes()?))
}

/// Memory for the copies of one row's operands: buffers of activations are made once.
struct Copies {
    tuned: Tuned,
    memory: DeviceMemory,
    /// In the order in which a row makes them.
    activations: Vec<DeviceSlice>,
    /// How many of them the copy at hand has taken.
    taken: usize,
}

impl Copies {
    fn new(gpu: &Arc<Gpu>, tuned: &Tuned) -> Copies {
        Copies {
            tuned: tuned.clone(),
            memory: DeviceMemory::new(gpu),
            activations: Vec::new(),
            taken: 0,
        }
    }
}

impl Memory for Copies {
    fn upload(&mut self, bytes: &[u8]) -> Result<DeviceSlice, Error> {
        self.memory.upload(bytes)
    }

    fn reserve(&mut self, bytes: u64) -> Result<DeviceSlice, Error> {
        self.memory.reserve(bytes)
    }
}

impl Operands for Copies {
    fn activations(&mut self, bytes: &[u8]) -> Result<DeviceSlice, Error> {
        let slice = match self.activations.get(self.taken) {
            Some(slice) => *slice,
            None => {
                let slice = self.memory.upload(bytes)?;
                self.activations.push(slice);
                slice
            }
        };
        self.taken += 1;
        Ok(slice)
    }

    fn tuned(&self) -> &Tuned {
        &self.tuned
    }
}

/// Times `row` on `gpu`; also returns one of its calls, whose memory is gone, for its launch.
///
/// # Errors
/// [`Error::Machine`] from the device, [`Error::Input`] for a shape that the kernel cannot take.
pub fn kernel(gpu: &Arc<Gpu>, row: &Row) -> Result<(Timing, Call), Error> {
    kernel_with(gpu, gpu.tuned(), row)
}

/// [`kernel`] with other launches than those that are tuned for the kernels of `gpu`.
///
/// # Errors
/// As [`kernel`].
pub fn kernel_with(gpu: &Arc<Gpu>, tuned: &Tuned, row: &Row) -> Result<(Timing, Call), Error> {
    let mut memory = Copies::new(gpu, tuned);
    let info = gpu.info();
    let copies = if row.streams {
        copies(row.bytes, rotate_bytes()?)
    } else {
        1
    };
    let distinct = (0..copies)
        .map(|_| {
            memory.taken = 0;
            (row.make)(&info, &mut memory)
        })
        .collect::<Result<Vec<_>, _>>()?;
    // SAFETY: the calls' memory is `memory`, dropped after it.
    let timing = unsafe { rotation(gpu, &distinct, SAMPLES) }?;
    Ok((timing, distinct[0].clone()))
}

/// Several calls of the same operands, each over copies of these that rotate.
pub struct Forms {
    // In this order, though nothing of it is launched any more when it is dropped.
    copies: Vec<Vec<Call>>,
    gpu: Arc<Gpu>,
    _memory: Copies,
}

impl Forms {
    /// `make` allocates one copy, of `bytes`, and plans all the calls of it.
    ///
    /// # Errors
    /// As [`kernel`].
    pub fn new(
        gpu: &Arc<Gpu>,
        bytes: u64,
        make: impl Fn(&DeviceInfo, &mut dyn Operands) -> Result<Vec<Call>, Error>,
    ) -> Result<Forms, Error> {
        let mut memory = Copies::new(gpu, gpu.tuned());
        let info = gpu.info();
        let copies = (0..copies(bytes, rotate_bytes()?))
            .map(|_| {
                memory.taken = 0;
                make(&info, &mut memory)
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Forms {
            copies,
            gpu: Arc::clone(gpu),
            _memory: memory,
        })
    }

    /// Times call `form`, with as many samples.
    ///
    /// # Errors
    /// As [`kernel`].
    pub fn time(&self, form: usize, samples: usize) -> Result<Timing, Error> {
        let calls: Vec<Call> = self
            .copies
            .iter()
            .map(|forms| forms[form].clone())
            .collect();
        // SAFETY: the calls' memory is this object's.
        unsafe { rotation(&self.gpu, &calls, samples) }
    }
}

/// Times a graph of the calls, one after another, repeated until there are enough of them.
///
/// # Safety
/// The memory that the calls name outlives this function.
unsafe fn rotation(gpu: &Arc<Gpu>, distinct: &[Call], samples: usize) -> Result<Timing, Error> {
    let copies = distinct.len();
    let launches = copies * MIN_LAUNCHES.div_ceil(copies);
    let calls: Vec<_> = distinct.iter().cycle().take(launches).cloned().collect();
    // SAFETY: by the caller's promise; the graph's last run ends in `sample`.
    let graph = unsafe { Graph::capture(gpu, &calls) }?;
    let us = sample(gpu, samples, || graph.launch())?;
    drop(graph);
    let us = us.into_iter().map(|us| us / launches as f64).collect();
    Ok(Timing::new(us, launches, copies))
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
    let us = sample(gpu, SAMPLES, || {
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

/// Microseconds of one run of `work`, by CUDA events around it.
///
/// # Errors
/// [`Error::Machine`] from the device.
pub fn once(gpu: &Gpu, work: impl FnOnce() -> Result<(), Error>) -> Result<f64, Error> {
    let event = || Event::new(EventFlags::DEFAULT).map_err(cuda("making an event"));
    between(gpu, [&event()?, &event()?], work)
}

/// Microseconds of `work` between the two events.
fn between(
    gpu: &Gpu,
    [start, end]: [&Event; 2],
    work: impl FnOnce() -> Result<(), Error>,
) -> Result<f64, Error> {
    let stream = gpu.stream();
    start.record(stream).map_err(cuda("recording an event"))?;
    work()?;
    end.record(stream).map_err(cuda("recording an event"))?;
    end.synchronize().map_err(cuda("the timed kernel"))?;
    let ms = end
        .elapsed_time_f32(start)
        .map_err(cuda("reading the time"))?;
    Ok(f64::from(ms) * 1e3)
}

/// Microseconds of each timed run of `work`, by CUDA events around it.
fn sample(
    gpu: &Gpu,
    samples: usize,
    mut work: impl FnMut() -> Result<(), Error>,
) -> Result<Vec<f64>, Error> {
    let event = || Event::new(EventFlags::DEFAULT).map_err(cuda("making an event"));
    let (start, end) = (event()?, event()?);
    for _ in 0..WARM_UP {
        work()?;
    }
    gpu.synchronize()?;
    (0..samples)
        .map(|_| between(gpu, [&start, &end], &mut work))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_and_bandwidth() {
        let timing = Timing::new((1..=41).rev().map(f64::from).collect(), 128, 4);
        assert_eq!(
            (timing.p5_us, timing.median_us, timing.p95_us),
            (3.0, 21.0, 39.0)
        );
        let one = Timing::new(vec![2.0], 128, 4);
        assert_eq!((one.p5_us, one.median_us, one.p95_us), (2.0, 2.0, 2.0));
        // 3 MB in 2 us are 1.5 TB/s.
        assert_eq!(one.gb_per_second(3_000_000), 1500.0);
    }

    #[test]
    fn enough_copies_to_leave_the_caches() {
        for row in crate::rows::all().iter().filter(|row| row.streams) {
            let copies = copies(row.bytes, ROTATE_BYTES);
            assert!(
                copies == MAX_COPIES || copies as u64 * row.bytes >= ROTATE_BYTES,
                "{} {}",
                row.kernel,
                row.shape
            );
        }
    }
}
