//! The emulator: kernels run on the host, one coroutine per CUDA thread, and faults are reported
//! with kernel, block, thread and source line.
//!
//! [`Buffer`]s live in an address space of the emulator's own: an address is never dereferenced as
//! a host pointer, so an invalid access is reported and never performed. Buffers, addresses and
//! launches belong to the OS thread that made them.
//!
//! What is checked:
//!
//! | [`FaultKind`] | when |
//! |---|---|
//! | `OutOfBounds`, `Misaligned` | an access outside every live buffer or the block's shared memory, or not a multiple of its width |
//! | `Uninitialised` | a read of global or shared memory that nothing wrote |
//! | `Barrier` | a barrier that a thread of the block leaves out, or reaches at another source line |
//! | `Race` | two threads touch a shared word, at least one writing, with no barrier between |
//! | `Shuffle` | a shuffle, vote or `mma.sync` with a lane that does not take part, or a read from one |
//! | `AsyncProduct` | a store to what a `wgmma` may still read, its sums read before the wait, a fence left out, a warp of the warpgroup that does something else |
//! | `NonCoherentRead` | `ld.global.nc` of what this launch wrote |
//! | `MissingWait` | in a cooperative launch, an access of what another block stored, or a store where it loaded, not ordered by release and acquire |
//! | `Deadlock` | every thread that can run only polls, or one loads without end |
//! | `Panic` | the kernel panicked: an index out of range, an arithmetic overflow |
//!
//! Blocks run one after another; those of a cooperative launch run interleaved. A thread runs until
//! a barrier, a warp operation or an atomic. With a seed the order of threads and blocks is random
//! and repeatable.
//!
//! On demand it counts bank conflicts of shared memory by source line: [`count_conflicts`].
//!
//! What is not checked: races on global memory within a block and between blocks that do not run side by
//! side, and loops without end that touch no global memory. Memory here is sequentially consistent: an
//! order that is missing is found by `MissingWait`, not by a wrong value. Shuffles and votes order no memory, as on the device: between lanes
//! that exchange data through shared memory stands a `sync_warp` or a `sync_threads`.

pub mod access;
mod banks;
mod buffer;
mod fault;
pub(crate) mod instructions;
mod machine;
mod memory;
mod mma;
mod order;
mod products;
mod scheduler;
mod shared;
mod warp;
pub(crate) mod warpgroup;

pub use banks::{Conflicts, count_conflicts, take_conflicts};
pub use buffer::Buffer;
pub use fault::{Fault, FaultKind, Place};
pub use memory::Value;
pub use scheduler::{launch, launch_entry};

/// Most threads of a block.
pub const MAX_BLOCK_THREADS: u32 = 1024;

/// Most threads that a cooperative launch may have: each keeps a stack while all are resident.
pub const MAX_RESIDENT_THREADS: u64 = 16 * 1024;

/// Most dynamic shared memory of a block, bytes (227 KiB: sm_90 with opt-in).
pub const MAX_SHARED_BYTES: u32 = 227 * 1024;

std::thread_local! {
    static COMPUTE_CAPABILITY: std::cell::Cell<u32> = const { std::cell::Cell::new(90) };
}

/// The compute capability, times ten, that launches of this OS thread stand for: kernels whose
/// source has one form a tier ask for it where the device build asks `cfg!(target_feature)`.
pub fn compute_capability() -> u32 {
    COMPUTE_CAPABILITY.get()
}

/// Sets [`compute_capability`]; it starts as 90.
pub fn set_compute_capability(capability: u32) {
    COMPUTE_CAPABILITY.set(capability);
}

/// A kernel that can be launched by value: what `#[kernel]` makes beside the function.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Name of the kernel, the entry's name in the PTX.
    pub name: &'static str,
    /// Number of parameters.
    pub arity: usize,
    /// Runs one thread of the kernel with arguments from 64-bit slots, in parameter order.
    ///
    /// # Safety
    /// The obligations of the kernel itself; under the emulator its pointers are checked.
    pub call: unsafe fn(&[u64]),
}

/// Grid, block and shared memory of a launch, and how it is scheduled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Blocks (x, y, z).
    pub grid: [u32; 3],
    /// Threads a block (x, y, z), x fastest.
    pub block: [u32; 3],
    /// Dynamic shared memory a block, bytes.
    pub shared_bytes: u32,
    /// All blocks resident at once, as a grid barrier needs it.
    pub cooperative: bool,
    /// Random, repeatable order of blocks and threads; in order without.
    pub seed: Option<u64>,
}

impl Launch {
    /// A plain launch in order, without shared memory.
    pub const fn new(grid: [u32; 3], block: [u32; 3]) -> Launch {
        Launch {
            grid,
            block,
            shared_bytes: 0,
            cooperative: false,
            seed: None,
        }
    }

    /// A plain launch of `blocks` blocks of `threads` threads.
    pub const fn linear(blocks: u32, threads: u32) -> Launch {
        Launch::new([blocks, 1, 1], [threads, 1, 1])
    }

    /// With that much dynamic shared memory a block.
    pub const fn with_shared_bytes(self, shared_bytes: u32) -> Launch {
        Launch {
            shared_bytes,
            ..self
        }
    }

    /// As a cooperative launch.
    pub const fn as_cooperative(self) -> Launch {
        Launch {
            cooperative: true,
            ..self
        }
    }

    /// In the random order that `seed` gives.
    pub const fn with_seed(self, seed: u64) -> Launch {
        Launch {
            seed: Some(seed),
            ..self
        }
    }
}

/// What a launch did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Report {
    /// Threads run, all blocks together.
    pub threads: u64,
    /// Block barriers completed, all blocks together.
    pub barriers: u64,
    /// Warp operations (shuffles, votes, warp barriers) completed.
    pub warp_operations: u64,
    /// Bytes loaded from global memory, as the threads asked for them (no caches).
    pub global_bytes_loaded: u64,
    /// Bytes stored to global memory.
    pub global_bytes_stored: u64,
}

/// A type that a kernel takes as a parameter: how it lies in a 64-bit slot.
pub trait KernelParam: Sized {
    /// The value from the low bytes of the slot.
    fn from_slot(slot: u64) -> Self;
    /// The slot that holds the value; the bytes above it are zero.
    fn to_slot(self) -> u64;
}

macro_rules! integer_param {
    ($($ty:ty as $unsigned:ty),*) => {$(
        impl KernelParam for $ty {
            fn from_slot(slot: u64) -> $ty {
                slot as $ty
            }
            fn to_slot(self) -> u64 {
                u64::from(self as $unsigned)
            }
        }
    )*};
}

integer_param!(
    u8 as u8, i8 as u8, u16 as u16, i16 as u16, u32 as u32, i32 as u32, u64 as u64, i64 as u64
);

impl KernelParam for f32 {
    fn from_slot(slot: u64) -> f32 {
        f32::from_bits(slot as u32)
    }
    fn to_slot(self) -> u64 {
        u64::from(self.to_bits())
    }
}

// Emulated addresses are numbers: no host object lies behind them, so there is no provenance.
impl<T> KernelParam for *const T {
    fn from_slot(slot: u64) -> *const T {
        std::ptr::without_provenance(slot as usize)
    }
    fn to_slot(self) -> u64 {
        self.addr() as u64
    }
}

impl<T> KernelParam for *mut T {
    fn from_slot(slot: u64) -> *mut T {
        std::ptr::without_provenance_mut(slot as usize)
    }
    fn to_slot(self) -> u64 {
        self.addr() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::KernelParam;

    #[test]
    fn slots_hold_the_low_bytes() {
        assert_eq!(i32::from_slot(0xdead_beef_ffff_ffff), -1);
        assert_eq!((-1i32).to_slot(), 0xffff_ffff);
        assert_eq!(f32::from_slot((-2.5f32).to_slot()), -2.5);
        assert_eq!(u64::from_slot(u64::MAX.to_slot()), u64::MAX);
        assert_eq!(<*const f32>::from_slot(0x1234).to_slot(), 0x1234);
    }
}
