//! What the driver made of each kernel on the device at hand: registers, memory, occupancy.

use cust::device::{Device, DeviceAttribute};
use cust::function::{BlockSize, FunctionAttribute};
use cust::module::Module;
use cust::sys;
use engine::Error;
use engine::backend::cuda::device::Gpu;
use gpu_kernels::launch::Call;

/// Resources of one launch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Resources {
    /// Registers a thread.
    pub registers: u32,
    /// Shared memory a block, static and dynamic, bytes.
    pub shared_bytes: u32,
    /// Local memory a thread, bytes: spills and indexed arrays.
    pub local_bytes: u32,
    /// Share of a multiprocessor's threads that registers, shared memory and block size allow.
    pub occupancy_limit: f64,
    /// Share that the grid fills at once: the limit, or less where there are too few blocks.
    pub occupancy: f64,
}

/// The kernels of one tier, loaded once more to be asked.
pub struct Inspector {
    module: Module,
    multiprocessors: u32,
    threads: u32,
}

fn cuda_error(what: &str) -> impl Fn(cust::error::CudaError) -> Error + '_ {
    move |error| {
        let name = cuda_driver::last_error().unwrap_or_else(|| format!("{error:?}"));
        Error::machine(format!("{what} failed with {name}"))
    }
}

impl Inspector {
    /// Loads `ptx`, the kernels of `gpu`, whose context becomes current.
    ///
    /// # Errors
    /// [`Error::Machine`] from the driver.
    pub fn new(gpu: &Gpu, ptx: &str) -> Result<Inspector, Error> {
        // Makes the context current.
        gpu.free_bytes()?;
        let module = Module::from_ptx(ptx, &[]).map_err(cuda_error("loading the GPU kernels"))?;
        let threads = Device::get_device(0)
            .and_then(|device| device.get_attribute(DeviceAttribute::MaxThreadsPerMultiprocessor))
            .map_err(cuda_error("asking the device"))?;
        Ok(Inspector {
            module,
            multiprocessors: gpu.info().multiprocessors,
            threads: threads.max(1) as u32,
        })
    }

    /// Resources of `call`.
    ///
    /// # Errors
    /// [`Error::Machine`] from the driver.
    pub fn resources(&self, call: &Call) -> Result<Resources, Error> {
        let function = self
            .module
            .get_function(call.kernel)
            .map_err(cuda_error("looking up a kernel"))?;
        let attribute = |attribute| {
            function
                .get_attribute(attribute)
                .map(|value| value.max(0) as u32)
                .map_err(cuda_error("asking for a kernel's resources"))
        };
        let [x, y, z] = call.launch.block;
        // Until a kernel has asked for its shared memory, no block of it counts as fitting.
        let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let bytes = call.launch.shared_bytes.cast_signed();
        // SAFETY: the function belongs to the module, which is loaded.
        let asked = unsafe { sys::cuFuncSetAttribute(function.to_raw(), most, bytes) };
        if asked != sys::CUresult::CUDA_SUCCESS {
            return Err(Error::machine(format!(
                "giving {} its shared memory failed with {asked:?}",
                call.kernel
            )));
        }
        let blocks = function
            .max_active_blocks_per_multiprocessor(
                BlockSize { x, y, z },
                call.launch.shared_bytes as usize,
            )
            .map_err(cuda_error("asking for a kernel's occupancy"))?;
        let grid = call
            .launch
            .grid
            .iter()
            .map(|&side| u64::from(side))
            .product();
        let (occupancy_limit, occupancy) =
            occupancy(blocks, x * y * z, grid, self.multiprocessors, self.threads);
        Ok(Resources {
            registers: attribute(FunctionAttribute::NumRegisters)?,
            shared_bytes: attribute(FunctionAttribute::SharedMemorySizeBytes)?
                + call.launch.shared_bytes,
            local_bytes: attribute(FunctionAttribute::LocalSizeBytes)?,
            occupancy_limit,
            occupancy,
        })
    }
}

/// The share of `max_threads` a multiprocessor that `blocks` of `block_threads` are, and the share
/// that a grid fills, averaged over the multiprocessors.
fn occupancy(
    blocks: u32,
    block_threads: u32,
    grid: u64,
    multiprocessors: u32,
    max_threads: u32,
) -> (f64, f64) {
    let of_threads = f64::from(block_threads) / f64::from(max_threads);
    let limit = f64::from(blocks) * of_threads;
    let filled = grid as f64 / f64::from(multiprocessors.max(1)) * of_threads;
    (limit, limit.min(filled))
}

#[cfg(test)]
mod tests {
    use super::occupancy;

    #[test]
    fn small_grids_fill_less_than_the_limit() {
        assert_eq!(occupancy(4, 256, 10_000, 132, 2048), (0.5, 0.5));
        assert_eq!(occupancy(4, 256, 132, 132, 2048), (0.5, 0.125));
        assert_eq!(occupancy(0, 256, 132, 132, 2048), (0.0, 0.0));
    }
}
