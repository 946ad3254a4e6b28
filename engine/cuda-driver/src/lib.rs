//! The CUDA driver API, bound at first use.
//!
//! `cust` declares the `cu*` functions as `extern "C"` and asks the linker for `-lcuda`. This crate
//! defines them instead: each forwards through `dlopen`/`dlsym` to `libcuda.so.1` when it is first
//! called, and returns an error code when there is no driver. `-lcuda` itself is satisfied by an
//! empty linker script (`stub/lib64/libcuda.so`, found through `CUDA_LIBRARY_PATH`), so a binary
//! builds without a CUDA installation, has no `NEEDED libcuda.so.1`, and starts anywhere.
//!
//! Also here: [`launch`], newer than the bindings, and NVML's energy counter.
//!
//! Signatures and error codes: CUDA Driver API, <https://docs.nvidia.com/cuda/cuda-driver-api/>;
//! each forwarder's type is checked at compile time against the bindings in `cust_raw`.

mod energy;
mod forward;
mod launch;
mod symbols;

pub use energy::EnergyMeter;
pub use forward::{driver_available, last_error};
pub use launch::{LaunchConfig, launch};
