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
    pub const NONE: DeviceSlice = DeviceSlice {
        address: 0,
        bytes: 0,
    };
}

/// What a plan needs to know of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory a block may use, bytes: past 48 KiB the launch opts in.
    pub shared_bytes_per_block: u32,
    /// Compute capability times ten: 75, 80, 90.
    pub compute_capability: u32,
    /// Whether there is `wgmma`: capability 9.0 alone, with the kernels of `sm_90a`.
    pub warpgroup_products: bool,
}

impl DeviceInfo {
    /// A T4: the smallest device supported; plans that fit it fit all.
    pub const T4: DeviceInfo = DeviceInfo {
        multiprocessors: 40,
        shared_bytes_per_block: 64 * 1024,
        compute_capability: 75,
        warpgroup_products: false,
    };

    /// An H100 with the kernels of its own tier.
    pub const H100: DeviceInfo = DeviceInfo {
        multiprocessors: 132,
        shared_bytes_per_block: 227 * 1024,
        compute_capability: 90,
        warpgroup_products: true,
    };
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

impl Launch {
    /// A one-dimensional launch.
    pub const fn linear(blocks: u32, threads: u32, shared_bytes: u32) -> Launch {
        Launch {
            grid: [blocks, 1, 1],
            block: [threads, 1, 1],
            shared_bytes,
        }
    }
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
    /// Whether blocks wait for blocks of a lower index. A GPU starts blocks in the order of their
    /// index, so this needs nothing of it; an emulator that runs them in another order has to run
    /// them side by side.
    pub blocks_wait: bool,
    /// Whether blocks wait for some that follow them, too: each for a few next to it, which a GPU has
    /// started or starts as soon as blocks before them end. An emulator has to run all of them side by side.
    pub blocks_meet: bool,
    /// The launch may start before the one before it has ended (programmatic dependent launch): the
    /// kernel waits by itself.
    pub dependent: bool,
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
    /// A buffer does not start where the kernel's widest load may start.
    #[error("{kernel}: buffer `{buffer}` starts at {address:#x}, not a multiple of {align}")]
    Misaligned {
        /// Kernel.
        kernel: &'static str,
        /// Parameter name.
        buffer: &'static str,
        /// Address given.
        address: u64,
        /// Alignment needed, bytes.
        align: u64,
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

/// Bytes of a dense tensor. Saturates, so an absurd shape becomes a [`ShapeError::ShortBuffer`].
pub fn tensor_bytes(dims: &[usize], elem_bytes: u64) -> u64 {
    dims.iter()
        .fold(elem_bytes, |bytes, &d| bytes.saturating_mul(d as u64))
}

/// Collects the parameters of a call in the kernel's order and checks each as it is added.
#[derive(Debug)]
pub struct CallBuilder {
    kernel: &'static str,
    args: Vec<u64>,
    blocks_wait: bool,
    blocks_meet: bool,
    waits: bool,
}

impl CallBuilder {
    /// Starts a call of the kernel with this entry name.
    pub fn new(kernel: &'static str) -> CallBuilder {
        CallBuilder {
            kernel,
            args: Vec::with_capacity(12),
            blocks_wait: false,
            blocks_meet: false,
            waits: false,
        }
    }

    /// Says that the kernel calls `ptx::griddep_wait` before it touches what other launches write,
    /// so that it may be started early where the device can do that.
    pub fn waits(&mut self) {
        self.waits = true;
    }

    /// Fails with [`ShapeError::Unsupported`] unless `holds`.
    pub fn require(
        &self,
        holds: bool,
        what: &'static str,
        value: usize,
        rule: &'static str,
    ) -> Result<(), ShapeError> {
        if holds {
            return Ok(());
        }
        Err(ShapeError::Unsupported {
            kernel: self.kernel,
            what,
            value: value as u64,
            rule,
        })
    }

    /// Adds a pointer to at least `need` bytes, aligned to `align`.
    pub fn tensor(
        &mut self,
        buffer: &'static str,
        slice: DeviceSlice,
        need: u64,
        align: u64,
    ) -> Result<(), ShapeError> {
        let kernel = self.kernel;
        if slice.address == 0 || slice.bytes < need {
            let have = if slice.address == 0 { 0 } else { slice.bytes };
            return Err(ShapeError::ShortBuffer {
                kernel,
                buffer,
                have,
                need,
            });
        }
        if !slice.address.is_multiple_of(align) {
            return Err(ShapeError::Misaligned {
                kernel,
                buffer,
                address: slice.address,
                align,
            });
        }
        self.args.push(slice.address);
        Ok(())
    }

    /// Adds a pointer that may be [`DeviceSlice::NONE`], a null pointer on the device.
    pub fn optional(
        &mut self,
        buffer: &'static str,
        slice: DeviceSlice,
        need: u64,
        align: u64,
    ) -> Result<(), ShapeError> {
        if slice == DeviceSlice::NONE {
            self.args.push(0);
            return Ok(());
        }
        self.tensor(buffer, slice, need, align)
    }

    /// Adds a dimension, which must be positive and fit 31 bits: kernels index with `u32` and a
    /// step past the end must not wrap.
    pub fn dim(&mut self, what: &'static str, value: usize) -> Result<u32, ShapeError> {
        let fits = value > 0 && value <= i32::MAX as usize;
        self.require(fits, what, value, "it must be in 1..2^31")?;
        self.args.push(value as u64);
        Ok(value as u32)
    }

    /// Adds a number that is already known to be in range.
    pub fn u32(&mut self, value: u32) {
        self.args.push(u64::from(value));
    }

    /// Adds a float.
    pub fn f32(&mut self, value: f32) {
        self.args.push(u64::from(value.to_bits()));
    }

    /// Blocks of the call wait for blocks of a lower index.
    pub fn blocks_wait(&mut self) {
        self.blocks_wait = true;
    }

    /// Blocks of the call wait for each other, each for a few of the next lower and higher indices.
    pub fn blocks_meet(&mut self) {
        self.blocks_meet = true;
    }

    /// The finished call, if the device can launch it.
    pub fn build(self, device: &DeviceInfo, launch: Launch) -> Result<Call, ShapeError> {
        let threads: u32 = launch.block.iter().product();
        self.require(
            threads <= 1024,
            "block",
            threads as usize,
            "a block has at most 1024 threads",
        )?;
        let [_, y, z] = launch.grid;
        self.require(
            y.max(z) <= 65_535,
            "grid",
            y.max(z) as usize,
            "y and z are at most 65535",
        )?;
        let shared = launch.shared_bytes;
        self.require(
            shared <= device.shared_bytes_per_block,
            "shared memory",
            shared as usize,
            "it must fit a block's shared memory",
        )?;
        Ok(Call {
            kernel: self.kernel,
            launch,
            args: self.args,
            blocks_wait: self.blocks_wait,
            blocks_meet: self.blocks_meet,
            dependent: self.waits && device.compute_capability >= 90,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const X: DeviceSlice = DeviceSlice {
        address: 0x1000,
        bytes: 64,
    };

    #[test]
    fn a_short_buffer_is_named() {
        let error = CallBuilder::new("k").tensor("x", X, 65, 16).unwrap_err();
        assert_eq!(
            error.to_string(),
            "k: buffer `x` holds 64 bytes, the shape needs 65"
        );
        assert!(
            CallBuilder::new("k")
                .tensor("x", DeviceSlice::NONE, 0, 1)
                .is_err()
        );
    }

    #[test]
    fn a_misaligned_buffer_is_named() {
        let x = DeviceSlice {
            address: 0x1008,
            bytes: 64,
        };
        let error = CallBuilder::new("k").tensor("x", x, 64, 16).unwrap_err();
        assert_eq!(
            error.to_string(),
            "k: buffer `x` starts at 0x1008, not a multiple of 16"
        );
    }

    #[test]
    fn absurd_shapes_saturate() {
        assert_eq!(tensor_bytes(&[usize::MAX, 3], 4), u64::MAX);
        assert_eq!(tensor_bytes(&[3, 5], 2), 30);
    }

    #[test]
    fn dimensions_are_positive_and_fit() {
        assert!(CallBuilder::new("k").dim("rows", 0).is_err());
        assert!(CallBuilder::new("k").dim("rows", 1 << 31).is_err());
        assert_eq!(CallBuilder::new("k").dim("rows", 7), Ok(7));
    }

    #[test]
    fn slots_keep_the_order() {
        let mut call = CallBuilder::new("k");
        call.tensor("x", X, 64, 16).unwrap();
        call.optional("bias", DeviceSlice::NONE, 64, 16).unwrap();
        call.dim("rows", 7).unwrap();
        call.f32(1.0);
        let call = call
            .build(&DeviceInfo::T4, Launch::linear(1, 32, 0))
            .unwrap();
        assert_eq!(call.args, [0x1000, 0, 7, 0x3f80_0000]);
    }

    #[test]
    fn only_a_device_that_can_starts_a_waiting_kernel_early() {
        let dependent = |waits: bool, compute_capability| {
            let mut call = CallBuilder::new("k");
            if waits {
                call.waits();
            }
            let device = DeviceInfo {
                compute_capability,
                ..DeviceInfo::T4
            };
            let call = call.build(&device, Launch::linear(1, 32, 0)).unwrap();
            call.dependent
        };
        assert!(dependent(true, 90));
        assert!(!dependent(true, 80));
        assert!(!dependent(false, 90));
    }

    #[test]
    fn shared_memory_must_fit() {
        let call = CallBuilder::new("k");
        assert!(
            call.build(&DeviceInfo::T4, Launch::linear(1, 32, 65_537))
                .is_err()
        );
    }
}
