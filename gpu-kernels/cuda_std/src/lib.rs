//! The device standard library of the kernels, and the emulator behind the same names.
//!
//! A kernel crate is compiled twice from one source. For `nvptx64` every function here is one PTX
//! instruction or a handful; on the host the same function reports to the [`emulator`], which runs
//! one coroutine per CUDA thread and checks what a GPU would silently get wrong.
//!
//! | module | what |
//! |---|---|
//! | [`kernel`] | the attribute that makes an entry |
//! | [`thread`] | indices, dimensions, the block barrier |
//! | [`warp`] | shuffles, votes, warp reductions |
//! | [`warpgroup`] | asynchronous matrix products, sm_90a alone |
//! | [`shared`] | dynamic shared memory |
//! | [`atomic`] | the atomics used for synchronisation |
//! | [`grid`] | the grid barrier of cooperative launches |
//! | `emulator` | host only: buffers, launches, faults |
//!
//! The public names follow rust-cuda's crate of the same name where they cover the same thing; the
//! code is this project's own.

#![cfg_attr(target_arch = "nvptx64", no_std)]
#![cfg_attr(
    target_arch = "nvptx64",
    feature(asm_experimental_arch, link_llvm_intrinsics, stdarch_nvptx)
)]
// The intrinsics of `ptx.rs` are LLVM's: the compiler warns that the feature is internal to it.
#![cfg_attr(target_arch = "nvptx64", allow(internal_features))]

pub use cuda_std_macros::kernel;

pub mod atomic;
#[cfg(not(target_arch = "nvptx64"))]
pub mod emulator;
pub mod grid;
#[cfg(target_arch = "nvptx64")]
mod ptx;
pub mod shared;
pub mod thread;
pub mod warp;
pub mod warpgroup;

#[cfg(not(target_arch = "nvptx64"))]
use emulator::instructions as ptx;
