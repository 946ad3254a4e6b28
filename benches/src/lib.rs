//! Checks every GPU kernel against its CPU reference on a real device, and only then times it.
//!
//! - [`ptx`]: the kernels that are run: the program's own, or files.
//! - [`check`]: runs `gpu_kernels::cases` on a CUDA device, in one tier.
//! - [`emulate`]: runs them on the emulator, without a GPU.
//! - [`models`], [`select`]: which kernels, shapes and variants a command line means.
//! - [`rows`]: what is timed: kernel, shape, bytes that it has to move.
//! - [`time`]: how it is timed: a CUDA graph over rotating copies of the operands.
//! - [`kernels`]: a whole run, from check to table; [`table`] lays it out.
//! - [`peers`]: what torch and cuBLAS take for the same matrices.
//! - [`counters`]: what Nsight Compute counts while a kernel runs once.
//! - [`tune`]: kernels in every launch worth a try, for the table that the engine reads.
//! - [`resources`]: registers, memory and occupancy, as the driver compiled a kernel.
//! - [`results`]: one JSON object a line, in `results/<gpu>.jsonl`.

pub mod check;
pub mod counters;
pub mod emulate;
pub mod kernels;
pub mod models;
pub mod peers;
pub mod ptx;
pub mod resources;
pub mod results;
pub mod rows;
pub mod select;
pub mod table;
pub mod time;
pub mod tune;
