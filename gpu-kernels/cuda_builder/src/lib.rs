//! Compiles a crate of GPU kernels to PTX with the stock Rust compiler.
//!
//! The public names are those of rust-cuda's `cuda_builder`; the code is written from scratch on top
//! of rustc's own `nvptx64-nvidia-cuda` target, so there is no custom code generator and no CUDA
//! toolkit to install. What a stock toolchain lacks is the `core` library for that target;
//! [`CoreLibrary::find`] looks for it and [`setup`] installs it.
//!
//! ```no_run
//! use cuda_builder::{CudaBuilder, NvvmArch};
//!
//! let output = CudaBuilder::new("../gpu-kernels").arch(NvvmArch::Compute75).build()?;
//! println!("{}", output.ptx.display());
//! # Ok::<(), cuda_builder::Error>(())
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`CudaBuilder`] | runs a child cargo for the device target and returns the PTX file |
//! | [`CoreLibrary`] | which `core` the device build uses |
//! | [`ptxas`] | registers, shared memory, stack and spills of each kernel |
//! | [`nvdisasm`] | the machine code of each kernel |
//! | [`setup`] | installs what is missing: `core`'s sources, `ptxas`, `nvdisasm` |

mod arch;
mod builder;
pub mod cache;
mod child;
mod core_library;
mod directives;
mod error;
pub mod nvdisasm;
pub mod ptxas;
pub mod setup;

pub use arch::{NvvmArch, TIERS};
pub use builder::{BuildOutput, CudaBuilder, entries, entry_text, target_dir_of_build_script};
pub use core_library::{CoreLibrary, Toolchain};
pub use error::Error;

/// The target triple of the device build.
pub const DEVICE_TARGET: &str = "nvptx64-nvidia-cuda";

/// The command that installs every missing piece of the tool chain.
pub const MENDING_COMMAND: &str = "cargo xtask setup";
