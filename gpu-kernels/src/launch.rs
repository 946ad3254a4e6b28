//! What it takes to run a kernel, checked on the host before anything reaches a device.
//!
//! Each kernel file has a typed `plan` beside the kernel that checks shapes and buffer lengths and
//! returns a [`Call`]. A `Call` runs unchanged on a GPU (`cuLaunchKernel`) and in the emulator:
//! arguments are 64-bit slots in parameter order, the low bytes holding the value.

use thiserror::Error;

/// A range of device memory (or of emulator memory).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSlice {
    /// Address; 0 for an absent optional operand.
    pub address: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl DeviceSlice {
    /// An absent optional operand: a null pointer on the device.
    pub const NONE: DeviceSlice = DeviceSlice { address: 0, bytes: 0 };
}

/// What a plan needs to know of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory a block may use without opting in, bytes.
    pub shared_bytes_per_block: u32,
    /// Compute capability times ten: 75, 80, 90.
    pub compute_capability: u32,
}

impl DeviceInfo {
    /// A T4: the smallest device supported; plans that fit it fit all.
    pub const T4: DeviceInfo =
        DeviceInfo { multiprocessors: 40, shared_bytes_per_block: 48 * 1024, compute_capability: 75 };
}

/// Grid, block and shared memory of one launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks (x, y, z).
    pub grid: [u32; 3],
    /// Threads a block (x, y, z).
    pub block: [u32; 3],
    /// Dynamic shared memory a block, bytes.
    pub shared_bytes: u32,
}

/// One kernel invocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Entry name in the PTX.
    pub kernel: &'static str,
    /// Launch dimensions.
    pub launch: Launch,
    /// Parameters, one 64-bit slot each.
    pub args: Vec<u64>,
}

/// A launch contract that does not hold.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ShapeError {
    /// A buffer is shorter than the shape needs.
    #[error("{kernel}: buffer `{buffer}` holds {have} bytes, the shape needs {need}")]
    ShortBuffer {
        /// Kernel.
        kernel: &'static str,
        /// Parameter name.
        buffer: &'static str,
        /// Bytes present.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
    /// A dimension that the kernel cannot take.
    #[error("{kernel}: {what} is {value}, {rule}")]
    Unsupported {
        /// Kernel.
        kernel: &'static str,
        /// Dimension name.
        what: &'static str,
        /// Value given.
        value: u64,
        /// What it has to be.
        rule: &'static str,
    },
}
