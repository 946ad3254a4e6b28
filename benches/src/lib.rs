//! Checks every GPU kernel against its CPU reference on a real device, and only then times it.
//!
//! - [`check`]: runs `gpu_kernels::cases` on a CUDA device, in one tier.
//! - [`emulate`]: runs them on the emulator, without a GPU.
//! - [`select`]: which kernels, shapes and variants a command line means.
//! - [`rows`]: what is timed: kernel, shape, bytes that it has to move.
//! - [`time`]: how it is timed: a CUDA graph over rotating copies of the operands.
//! - [`kernels`]: a whole run, from check to table; [`table`] lays it out.
//! - [`counters`]: what Nsight Compute counts while a kernel runs once.
//! - [`tilings`]: a matrix product in every way to spread it over warps and blocks.
//! - [`resources`]: registers, memory and occupancy, as the driver compiled a kernel.
//! - [`results`]: one JSON object a line, in `results/<gpu>.jsonl`.

pub mod check;
pub mod counters;
pub mod emulate;
pub mod kernels;
pub mod resources;
pub mod results;
pub mod rows;
pub mod select;
pub mod table;
pub mod tilings;
pub mod time;

use std::sync::Arc;

use engine::Error;
use engine::backend::cuda::device::{self, Gpu};

/// The device with the kernels of `tier`, or `None` when the device is older than the tier.
///
/// # Errors
/// Whatever else keeps the device from being opened.
pub fn open(tier: u32) -> Result<Option<Arc<Gpu>>, Error> {
    if tier > device::capability()? {
        return Ok(None);
    }
    Gpu::open(Some(tier)).map(Some)
}
