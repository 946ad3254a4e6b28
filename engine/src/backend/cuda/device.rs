//! The GPU: its context, the kernels of the chosen tier, and its memory.

use std::collections::BTreeMap;
use std::iter;
use std::sync::Arc;

use cust::context::{Context, CurrentContext};
use cust::device::{Device, DeviceAttribute};
use cust::error::CudaError;
use cust::memory::{CopyDestination, DeviceBuffer, mem_get_info};
use cust::stream::{Stream, StreamFlags};
use cust::sys;
use gpu_kernels::launch::{Call, DeviceInfo, DeviceSlice};
use gpu_kernels::tuned::Tuned;

use super::growing::Growing;
use super::launch::Kernels;
use super::plan::{Counter, Memory, bytes_of};
use super::ptx::TIERS;
use crate::Error;
use crate::backend::Tier;

/// Percent of the most shared memory that every kernel asks a multiprocessor to set apart: 164 of 228
/// KB on an H100, enough for any block. Left to itself the driver gives the attention all of it, and
/// the logits, which read through L1, take 130 us in the place of 90 (H100; 44 to 72 are all the same).
const CARVE_OUT: i32 = 72;
/// A block's most shared memory from which on that is done: the multiprocessors of smaller GPUs have
/// hardly more than a block needs.
const CARVED_FROM_BYTES: u32 = 160 * 1024;

/// An error that names what was being done and what CUDA called the failure.
pub(super) fn failed(what: &str, error: CudaError) -> Error {
    // cust folds codes that it does not know into one; the driver crate remembers the name.
    let name = cuda_driver::last_error().unwrap_or_else(|| format!("{error:?}"));
    Error::machine(format!("{what} failed with {name}"))
}

fn first_device() -> Result<Device, Error> {
    cuda_driver::driver_available().map_err(Error::machine)?;
    Device::get_device(0).map_err(|e| failed("opening CUDA device 0", e))
}

fn attribute(device: Device, attribute: DeviceAttribute) -> Result<u32, Error> {
    let value = device
        .get_attribute(attribute)
        .map_err(|e| failed("asking the CUDA device", e))?;
    u32::try_from(value).map_err(|_| Error::machine(format!("CUDA gave {value} for {attribute:?}")))
}

/// An attribute that `cust` has no name for.
fn raw_attribute(device: Device, attribute: sys::CUdevice_attribute) -> Result<u32, Error> {
    let mut value = 0;
    // SAFETY: `value` is a valid place for the answer.
    let asked = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device.as_raw()) };
    if asked != sys::CUresult::CUDA_SUCCESS {
        return Err(failed("asking the CUDA device", CudaError::UnknownError));
    }
    u32::try_from(value).map_err(|_| Error::machine(format!("CUDA gave {value} for {attribute:?}")))
}

/// Shared memory that a block can have if its launch asks for it.
fn most_shared_bytes(device: Device) -> Result<u32, Error> {
    use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as BYTES;
    raw_attribute(device, BYTES)
}

/// Whether memory can be mapped to addresses that were reserved before.
fn maps_memory(device: Device) -> Result<bool, Error> {
    use sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED as MAPS;
    Ok(raw_attribute(device, MAPS)? != 0)
}

fn capability_of(device: Device) -> Result<u32, Error> {
    let major = attribute(device, DeviceAttribute::ComputeCapabilityMajor)?;
    Ok(10 * major + attribute(device, DeviceAttribute::ComputeCapabilityMinor)?)
}

fn name_of(device: Device) -> Result<String, Error> {
    device
        .name()
        .map_err(|e| failed("asking the CUDA device", e))
}

/// Compute capability of device 0, times ten: 75, 80, 90.
///
/// # Errors
/// [`Error::Machine`] if there is no driver or device.
pub fn capability() -> Result<u32, Error> {
    capability_of(first_device()?)
}

/// What plans know of a device with the kernels of `tier`.
fn info_of(device: Device, tier: Tier) -> Result<DeviceInfo, Error> {
    Ok(DeviceInfo {
        multiprocessors: attribute(device, DeviceAttribute::MultiprocessorCount)?,
        shared_bytes_per_block: most_shared_bytes(device)?,
        // Plans choose among what the loaded PTX has, which may be less than the device can.
        compute_capability: tier.capability(),
        warpgroup_products: tier.has_warpgroup_products(),
    })
}

/// What plans know of device 0 with the kernels that it would be given.
///
/// # Errors
/// As [`Gpu::open`].
pub(super) fn info() -> Result<DeviceInfo, Error> {
    let device = first_device()?;
    let built: Vec<Tier> = TIERS.iter().map(|(tier, _)| *tier).collect();
    let tier = choose_tier(&built, capability_of(device)?, None, &name_of(device)?)?;
    info_of(device, tier)
}

/// One device with its stream and the kernels of one tier.
#[derive(Debug)]
pub struct Gpu {
    // Fields are dropped in this order: the context last.
    kernels: Kernels,
    stream: Stream,
    name: String,
    info: DeviceInfo,
    tier: Tier,
    maps_memory: bool,
    tuned: Tuned,
    context: Context,
}

impl Gpu {
    /// Opens device 0 with the kernels of `tier`, or of the highest that it runs.
    ///
    /// # Errors
    /// [`Error::Machine`] if there is no driver or device, or it cannot run the tier;
    /// [`Error::Input`] for a tier that this program was not built with.
    pub fn open(tier: Option<Tier>) -> Result<Arc<Gpu>, Error> {
        let device = first_device()?;
        let name = name_of(device)?;
        let built: Vec<Tier> = TIERS.iter().map(|(tier, _)| *tier).collect();
        let tier = choose_tier(&built, capability_of(device)?, tier, &name)?;
        let ptx = TIERS
            .iter()
            .find(|(built, _)| *built == tier)
            .map_or("", |(_, ptx)| *ptx);
        Gpu::with_kernels(tier, ptx)
    }

    /// Opens device 0 with `ptx`, compiled for `tier`, in the place of the kernels that the program
    /// was built with.
    ///
    /// # Errors
    /// [`Error::Machine`] if there is no driver or device, or it cannot run the kernels.
    pub fn with_kernels(tier: Tier, ptx: &str) -> Result<Arc<Gpu>, Error> {
        let device = first_device()?;
        let name = name_of(device)?;
        let info = info_of(device, tier)?;
        let context = Context::new(device).map_err(|e| failed("creating a CUDA context", e))?;
        let stream = Stream::new(StreamFlags::DEFAULT, None)
            .map_err(|e| failed("creating a CUDA stream", e))?;
        // Kernels of another revision may lack some: launching one of those is an error.
        let names = gpu_kernels::ENTRIES
            .iter()
            .map(|entry| entry.name)
            .filter(|name| ptx.contains(&format!(".entry {name}(")));
        let carve_out = (info.shared_bytes_per_block >= CARVED_FROM_BYTES).then_some(CARVE_OUT);
        let kernels = Kernels::load(ptx, names, carve_out)?;
        Ok(Arc::new(Gpu {
            kernels,
            stream,
            tuned: Tuned::load(&name, tier.capability(), ptx),
            name,
            info,
            tier,
            maps_memory: maps_memory(device)?,
            context,
        }))
    }

    /// Name as the driver gives it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What plans need to know.
    pub fn info(&self) -> DeviceInfo {
        self.info
    }

    /// The tier of the loaded kernels.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// The launches that are tuned for this device and these kernels.
    pub fn tuned(&self) -> &Tuned {
        &self.tuned
    }

    /// The stream that all work goes to, in order.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Makes the device's context current on this thread.
    pub(super) fn make_current(&self) -> Result<(), Error> {
        CurrentContext::set_current(&self.context)
            .map_err(|e| failed("switching to the CUDA context", e))
    }

    /// Queues one kernel.
    ///
    /// # Safety
    /// Every pointer in `call` must be the device memory that its plan checked, alive until the
    /// work is done (or as long as a graph that is recording it is launched).
    ///
    /// # Errors
    /// [`Error::Machine`] with the kernel's name.
    pub unsafe fn queue(&self, call: &Call) -> Result<(), Error> {
        // SAFETY: passed on to the caller.
        unsafe { self.kernels.launch(&self.stream, call) }
    }

    /// Waits until everything queued is done.
    ///
    /// # Errors
    /// [`Error::Machine`] with what failed on the device since the last wait.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.stream
            .synchronize()
            .map_err(|e| failed("work on the GPU", e))
    }

    /// Bytes of free device memory.
    ///
    /// # Errors
    /// [`Error::Machine`] if the driver does not say.
    pub fn free_bytes(&self) -> Result<u64, Error> {
        self.make_current()?;
        let (free, _) = mem_get_info().map_err(|e| failed("asking for free GPU memory", e))?;
        Ok(free as u64)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // The module and the stream are destroyed next, in the current context.
        let _ = CurrentContext::set_current(&self.context);
    }
}

/// Kernels to run on a device of compute capability `capability`.
fn choose_tier(
    built: &[Tier],
    capability: u32,
    forced: Option<Tier>,
    device: &str,
) -> Result<Tier, Error> {
    let list = || {
        built
            .iter()
            .map(Tier::to_string)
            .collect::<Vec<_>>()
            .join(", ")
    };
    match forced {
        _ if built.is_empty() => Err(Error::machine(
            "this program was built without GPU kernels: build it with the feature `ptx`",
        )),
        Some(tier) if !built.contains(&tier) => Err(Error::input(format!(
            "there are no {tier} kernels in this program: it has {}",
            list()
        ))),
        Some(tier) if !tier.runs_on(capability) => Err(Error::machine(format!(
            "{device} is sm_{capability}: it cannot run {tier} kernels"
        ))),
        Some(tier) => Ok(tier),
        None => built
            .iter()
            .copied()
            .filter(|tier| tier.runs_on(capability))
            .max()
            .ok_or_else(|| {
                Error::machine(format!(
                    "{device} is sm_{capability}: too old for the kernels in this program ({})",
                    list()
                ))
            }),
    }
}

/// Device memory, freed together.
#[derive(Debug)]
pub struct DeviceMemory {
    gpu: Arc<Gpu>,
    /// By address.
    buffers: BTreeMap<u64, DeviceBuffer<u8>>,
    growing: Vec<Growing>,
    /// Rows of all that grows that there is memory for.
    rows: usize,
}

impl DeviceMemory {
    /// Memory of `gpu`, nothing allocated yet.
    pub fn new(gpu: &Arc<Gpu>) -> DeviceMemory {
        DeviceMemory {
            gpu: Arc::clone(gpu),
            buffers: BTreeMap::new(),
            growing: Vec::new(),
            rows: usize::MAX,
        }
    }

    /// Sees to it that there is memory for the first `rows` rows of what grows.
    ///
    /// # Errors
    /// [`Error::Machine`] if there is no memory left.
    pub(super) fn make_room(&mut self, rows: usize) -> Result<(), Error> {
        if rows <= self.rows {
            return Ok(());
        }
        self.gpu.make_current()?;
        let mut reach = usize::MAX;
        for growing in &mut self.growing {
            reach = reach.min(growing.grow(rows)?);
        }
        self.rows = reach;
        Ok(())
    }

    /// The part of an allocation that `slice` names.
    pub(super) fn find(&self, slice: DeviceSlice) -> Result<cust::memory::DeviceSlice<u8>, Error> {
        let outside = || {
            Error::machine(format!(
                "{} bytes at {:#x} are not device memory of this model",
                slice.bytes, slice.address
            ))
        };
        let (base, buffer) = self
            .buffers
            .range(..=slice.address)
            .next_back()
            .ok_or_else(outside)?;
        let start = (slice.address - base) as usize;
        let end = start
            .checked_add(slice.bytes as usize)
            .ok_or_else(outside)?;
        if end > buffer.len() {
            return Err(outside());
        }
        Ok(buffer.index(start..end))
    }

    /// Overwrites `slice`, after the work queued so far.
    ///
    /// # Errors
    /// [`Error::Machine`] if `slice` is not inside one allocation of exactly this size or the copy
    /// fails.
    pub fn write(&mut self, slice: DeviceSlice, bytes: &[u8]) -> Result<(), Error> {
        self.gpu.make_current()?;
        let mut target = self.find(slice)?;
        if target.len() != bytes.len() {
            return Err(Error::machine(format!(
                "{} bytes do not fill a device buffer of {}",
                bytes.len(),
                target.len()
            )));
        }
        target
            .copy_from(bytes)
            .map_err(|e| failed("copying to the GPU", e))
    }

    /// Reads `slice`, after the work queued so far.
    ///
    /// # Errors
    /// [`Error::Machine`] if `slice` is not inside one allocation of exactly this size or the copy
    /// fails.
    pub fn read(&self, slice: DeviceSlice, bytes: &mut [u8]) -> Result<(), Error> {
        self.gpu.make_current()?;
        let source = self.find(slice)?;
        if source.len() != bytes.len() {
            return Err(Error::machine(format!(
                "a device buffer of {} bytes does not fill {}",
                source.len(),
                bytes.len()
            )));
        }
        source
            .copy_to(bytes)
            .map_err(|e| failed("copying from the GPU", e))
    }

    fn allocate(&mut self, bytes: u64) -> Result<&mut DeviceBuffer<u8>, Error> {
        self.gpu.make_current()?;
        // SAFETY: the memory is written before it is read: by `upload` below, or by kernels, whose
        // plans order every read after a write.
        let buffer = unsafe { DeviceBuffer::uninitialized(bytes as usize) }.map_err(|e| {
            let free = self.gpu.free_bytes().map_or(0, |free| free >> 20);
            let what = format!(
                "allocating {} MiB of GPU memory ({free} MiB are free)",
                bytes.div_ceil(1 << 20)
            );
            failed(&what, e)
        })?;
        let address = buffer.as_device_ptr().as_raw();
        Ok(self.buffers.entry(address).or_insert(buffer))
    }
}

impl Memory for DeviceMemory {
    fn upload(&mut self, bytes: &[u8]) -> Result<DeviceSlice, Error> {
        let buffer = self.allocate(bytes.len() as u64)?;
        buffer
            .copy_from(bytes)
            .map_err(|e| failed("copying to the GPU", e))?;
        Ok(DeviceSlice {
            address: buffer.as_device_ptr().as_raw(),
            bytes: bytes.len() as u64,
        })
    }

    fn reserve(&mut self, bytes: u64) -> Result<DeviceSlice, Error> {
        let buffer = self.allocate(bytes)?;
        Ok(DeviceSlice {
            address: buffer.as_device_ptr().as_raw(),
            bytes,
        })
    }

    /// In one range of addresses, so that buffers share the pages at their ends.
    fn reserve_rows(
        &mut self,
        count: usize,
        strips: usize,
        rows: usize,
        row_bytes: usize,
    ) -> Result<Vec<DeviceSlice>, Error> {
        let bytes = bytes_of(&[strips, rows, row_bytes])?;
        if !self.gpu.maps_memory {
            return iter::repeat_with(|| self.reserve(bytes))
                .take(count)
                .collect();
        }
        let stride = bytes.checked_next_multiple_of(Counter::ALIGN);
        let stride = stride.filter(|stride| stride.checked_mul(count as u64).is_some());
        let stride = stride.ok_or_else(|| Error::input("the cache does not fit 2^64 bytes"))?;
        let buffers = (0..count as u64).map(|i| i * stride);
        let strip_bytes = (rows * row_bytes) as u64;
        let starts = buffers
            .clone()
            .flat_map(|start| (0..strips as u64).map(move |strip| start + strip * strip_bytes));
        self.gpu.make_current()?;
        let growing = Growing::reserve(starts.collect(), rows, row_bytes as u64)?;
        let slices = buffers.map(|start| DeviceSlice {
            address: growing.base() + start,
            bytes,
        });
        let slices = slices.collect();
        self.growing.push(growing);
        self.rows = 0;
        Ok(slices)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // The buffers are freed next, in the current context, and what grows wants no work under way.
        let _ = self.gpu.make_current();
        let _ = self.gpu.synchronize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUILT: &[Tier] = &Tier::ALL;

    #[test]
    fn the_highest_tier_that_the_device_runs() {
        for (capability, tier) in [
            (75, Tier::SM_75),
            (80, Tier::SM_80),
            (86, Tier::SM_80),
            (89, Tier::SM_80),
            (90, Tier::SM_90A),
            (100, Tier::SM_90),
            (120, Tier::SM_90),
        ] {
            assert_eq!(choose_tier(BUILT, capability, None, "gpu").ok(), Some(tier));
        }
        let error = choose_tier(BUILT, 70, None, "V100").unwrap_err();
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().contains("V100 is sm_70"), "{error}");
    }

    #[test]
    fn a_forced_tier_is_kept_or_refused() {
        assert_eq!(
            choose_tier(BUILT, 90, Some(Tier::SM_75), "gpu").ok(),
            Some(Tier::SM_75)
        );
        let above = choose_tier(BUILT, 75, Some(Tier::SM_90), "T4").unwrap_err();
        assert_eq!(
            (above.exit_code(), above.to_string().as_str()),
            (1, "T4 is sm_75: it cannot run sm_90 kernels")
        );
        assert_eq!(
            choose_tier(BUILT, 100, Some(Tier::SM_90A), "gpu")
                .unwrap_err()
                .exit_code(),
            1
        );
        assert_eq!(
            choose_tier(&BUILT[..3], 90, Some(Tier::SM_90A), "gpu")
                .unwrap_err()
                .exit_code(),
            2
        );
    }
}
