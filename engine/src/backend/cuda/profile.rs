//! Where the time of one token goes on the device.
//!
//! A kernel's share is by how much the token gets longer with it: the difference between graphs that
//! end with it and before it. So it has in it what a kernel costs its neighbours, and not what runs
//! beside them.

use std::sync::Arc;

use cust::event::{Event, EventFlags};
use cust::memory::DeviceBuffer;
use gpu_kernels::launch::{Call, DeviceSlice};
use gpu_kernels::read;

use super::device::{DeviceMemory, Gpu, failed};
use super::launch::Graph;
use super::plan::Plan;
use crate::Error;
use crate::backend::KernelTime;

/// Bytes of the plain read: many times what a cache holds.
const READ_BYTES: usize = 1 << 30;
/// Timed runs; the fastest of the read counts, of a graph the median.
const RUNS: usize = 15;

/// The kernels of the token at `position`, which the device has.
///
/// # Errors
/// [`Error::Machine`] from the device.
pub fn kernels(
    gpu: &Arc<Gpu>,
    memory: &mut DeviceMemory,
    plan: &Plan,
    position: usize,
) -> Result<Vec<KernelTime>, Error> {
    let mut kernels: Vec<KernelTime> = Vec::new();
    // An empty graph cannot be timed: the first kernel has the start of the graph in its share.
    let mut before = 0.0;
    for (number, (call, note)) in plan.full.iter().zip(&plan.notes).enumerate() {
        // SAFETY: the plan's memory is `memory`; the graph is gone before this function ends.
        let graph = unsafe { Graph::capture(gpu, &plan.full[..=number]) }?;
        let mut us = Vec::with_capacity(RUNS);
        for _ in 0..RUNS {
            // The whole token advances the position.
            memory.write(plan.state, &(position as u32).to_le_bytes())?;
            us.push(timed(gpu, || graph.launch())?);
        }
        us.sort_by(f64::total_cmp);
        let until = us[RUNS / 2];
        let same = kernels
            .iter_mut()
            .find(|k| k.step == note.step && k.launch == note.launch && k.kernel == call.kernel);
        match same {
            Some(kernel) => {
                kernel.launches += 1;
                kernel.us += until - before;
            }
            None => kernels.push(KernelTime {
                step: note.step.clone(),
                kernel: call.kernel,
                launch: note.launch.clone(),
                launches: 1,
                us: until - before,
            }),
        }
        before = until;
    }
    Ok(kernels)
}

/// Bytes a second of the kernel that only reads.
///
/// # Errors
/// [`Error::Machine`] from the device.
pub fn read_bytes_per_second(gpu: &Arc<Gpu>) -> Result<f64, Error> {
    let free = gpu.free_bytes()? / 2;
    let bytes = READ_BYTES.min(free as usize) / 16 * 16;
    let shape = read::Shape { bytes };
    let out_bytes = 4 * shape.out_words(&gpu.info());
    let allocate = |bytes: usize| {
        DeviceBuffer::<u8>::from_slice(&vec![0x5a; bytes])
            .map_err(|e| failed("allocating memory to read", e))
    };
    let (data, out) = (allocate(bytes)?, allocate(out_bytes)?);
    let slice = |buffer: &DeviceBuffer<u8>| DeviceSlice {
        address: buffer.as_device_ptr().as_raw(),
        bytes: buffer.len() as u64,
    };
    let operands = read::Operands {
        data: slice(&data),
        out: slice(&out),
        // No thread of equal words gives it.
        wanted: 0x9e37_79b9,
    };
    let call: Call = read::plan(&gpu.info(), &shape, &operands).map_err(Error::machine)?;
    let mut best = f64::INFINITY;
    for _ in 0..RUNS {
        // SAFETY: the buffers outlive the work: `timed` waits for it.
        best = best.min(timed(gpu, || unsafe { gpu.queue(&call) })?);
    }
    Ok(bytes as f64 / best * 1e6)
}

/// Microseconds that `work` takes on the device's stream.
fn timed(gpu: &Gpu, work: impl FnOnce() -> Result<(), Error>) -> Result<f64, Error> {
    let event = || Event::new(EventFlags::DEFAULT).map_err(|e| failed("making an event", e));
    let (start, end) = (event()?, event()?);
    let record = |event: &Event| {
        let recorded = event.record(gpu.stream());
        recorded.map_err(|e| failed("recording an event", e))
    };
    record(&start)?;
    work()?;
    record(&end)?;
    end.synchronize()
        .map_err(|e| failed("work on the GPU", e))?;
    let ms = end.elapsed_time_f32(&start);
    Ok(1e3 * f64::from(ms.map_err(|e| failed("reading a time", e))?))
}
