//! Reads bytes and does next to nothing with them: the floor that the other kernels are held to.
//!
//! Shapes: data `(chunks, 4)` u32, out `(threads of the grid,)` u32. A thread takes the exclusive-or
//! of the words that it reads, and stores it only if it is `wanted`: no read can be left out, and
//! almost none is followed by a write.
//!
//! ```text
//! block b, loads L in flight -> L pieces of a chunk a thread, next to each other; then those of block b + B
//! thread t of the block      -> chunk t of each piece (16 bytes)
//! ```
//!
//! Bytes moved: `16 chunks`. No shared memory.
//!
//! Two loads in flight where one pass of a full grid then does, four where it takes more: of 1, 2, 4
//! and 8 loads, blocks of 128 to 1024, 256 to 2048 threads a multiprocessor and two orders, this is
//! within 1% of the fastest from 1.2 to 30 MB (H100).

use cuda_std::{kernel, thread};

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::ptx;
use crate::unroll::unroll;

/// Threads a block.
#[cfg(not(target_arch = "nvptx64"))]
const BLOCK: u32 = 256;
/// Blocks a multiprocessor: all of its threads on the larger GPUs.
#[cfg(not(target_arch = "nvptx64"))]
const BLOCKS_PER_MULTIPROCESSOR: u32 = 8;
/// Bytes of one load.
#[cfg(not(target_arch = "nvptx64"))]
const CHUNK_BYTES: usize = 16;
/// Loads in flight where a pass of the grid reads everything.
const FEW_LOADS: u32 = 2;
/// Loads in flight elsewhere.
const MANY_LOADS: u32 = 4;

/// Dimensions of the read.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Bytes to read, a multiple of 16.
    pub bytes: usize,
}

#[cfg(not(target_arch = "nvptx64"))]
impl Shape {
    /// Words of [`Operands::out`] on `device`: the threads of the grid.
    pub fn out_words(&self, device: &DeviceInfo) -> usize {
        (self.grid(device).0 * BLOCK) as usize
    }

    /// Blocks, and loads in flight.
    fn grid(&self, device: &DeviceInfo) -> (u32, u32) {
        let chunks = self.bytes / CHUNK_BYTES;
        let most = device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR;
        let blocks = |loads| chunks.div_ceil((BLOCK * loads) as usize);
        match blocks(FEW_LOADS) <= most as usize {
            true => (blocks(FEW_LOADS) as u32, FEW_LOADS),
            false => (blocks(MANY_LOADS).min(most as usize) as u32, MANY_LOADS),
        }
    }

    /// The chunks that thread `index` of the grid on `device` reads.
    pub fn chunks_of(&self, device: &DeviceInfo, index: usize) -> Vec<usize> {
        let (blocks, loads) = self.grid(device);
        let (block, thread) = (index as u32 / BLOCK, index as u32 % BLOCK);
        let chunks = (self.bytes / CHUNK_BYTES) as u32;
        let passes = (first(block, thread, BLOCK, loads)..chunks)
            .step_by(first(blocks, 0, BLOCK, loads) as usize);
        passes
            .flat_map(|chunk| (0..loads).map(move |load| chunk + load * BLOCK))
            .filter(|chunk| *chunk < chunks)
            .map(|chunk| chunk as usize)
            .collect()
    }
}

/// Buffers of the read.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// `(bytes,)`.
    pub data: DeviceSlice,
    /// `(out_words,)` u32.
    pub out: DeviceSlice,
    /// The exclusive-or of a thread's words that is stored.
    pub wanted: u32,
}

/// The launch of `read_bytes`.
///
/// # Errors
/// No bytes or no multiple of 16, a short or misaligned buffer.
#[cfg(not(target_arch = "nvptx64"))]
pub fn plan(device: &DeviceInfo, shape: &Shape, ops: &Operands) -> Result<Call, ShapeError> {
    let mut call = CallBuilder::new("read_bytes");
    call.require(
        shape.bytes.is_multiple_of(CHUNK_BYTES),
        "bytes",
        shape.bytes,
        "it must be a multiple of 16",
    )?;
    call.tensor("data", ops.data, tensor_bytes(&[shape.bytes], 1), 16)?;
    let words = shape.out_words(device);
    call.tensor("out", ops.out, tensor_bytes(&[words], 4), 4)?;
    call.dim("chunks", shape.bytes / CHUNK_BYTES)?;
    call.u32(ops.wanted);
    let (blocks, loads) = shape.grid(device);
    call.u32(loads);
    call.build(device, Launch::linear(blocks, BLOCK, 0))
}

/// The first chunk of a thread.
#[inline(always)]
fn first(block: u32, thread: u32, block_threads: u32, loads: u32) -> u32 {
    block * block_threads * loads + thread
}

/// `out[t]` = exclusive-or of what thread `t` reads, if it is `wanted`.
///
/// # Safety
/// Launched as [`plan`] says.
#[kernel]
pub unsafe fn read_bytes(
    data: *const u32, // (chunks, 4)
    out: *mut u32,    // (threads of the grid)
    chunks: u32,
    wanted: u32,
    loads: u32, // FEW_LOADS or MANY_LOADS
) {
    // SAFETY: launched as `plan` says.
    unsafe {
        let sum = if loads == FEW_LOADS {
            read::<{ FEW_LOADS as usize }>(data, chunks)
        } else {
            read::<{ MANY_LOADS as usize }>(data, chunks)
        };
        if sum == wanted {
            ptx::st_global_u32(out.wrapping_add(thread::index_1d() as usize), sum);
        }
    }
}

/// Exclusive-or of the thread's words, `LOADS` loads in flight.
///
/// # Safety
/// `data` holds `chunks`, which are below 2^31.
#[inline(always)]
unsafe fn read<const LOADS: usize>(data: *const u32, chunks: u32) -> u32 {
    let (block, threads) = (thread::block_idx_x(), thread::block_dim_x());
    let mut chunk = first(block, thread::thread_idx_x(), threads, LOADS as u32);
    let step = first(thread::grid_dim_x(), 0, threads, LOADS as u32);
    let mut sum = 0;
    while chunk < chunks {
        let mut words = [[0; 4]; LOADS];
        unroll!(I < LOADS => {
            let at = chunk + I as u32 * threads;
            // SAFETY: what is loaded is below `chunks`. A grid's step is below 2^31: sums do not wrap.
            words[I] = unsafe {
                ptx::ld_global_nc_v4_u32_if(at < chunks, data.wrapping_add(4 * at as usize), [0; 4])
            };
        });
        unroll!(I < LOADS => {
            let [a, b, c, d] = words[I];
            sum ^= a ^ b ^ c ^ d;
        });
        chunk += step;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_is_capped_and_bytes_are_whole_chunks() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 1 << 30,
        };
        let ops = Operands {
            data: slice,
            out: slice,
            wanted: 1,
        };
        let blocks =
            |bytes| plan(&DeviceInfo::T4, &Shape { bytes }, &ops).map(|c| c.launch.grid[0]);
        assert_eq!(blocks(16), Ok(1));
        assert_eq!(blocks(16 * 513), Ok(2));
        assert_eq!(blocks(1 << 30), Ok(320));
        assert!(blocks(20).is_err());
        assert!(blocks(0).is_err());
    }

    #[test]
    fn every_chunk_has_one_thread() {
        for chunks in [1, 31, 1025, 2 * 320 * 256, 2 * 320 * 256 + 1, 400_000] {
            let shape = Shape { bytes: 16 * chunks };
            let mut readers = vec![0; chunks];
            for thread in 0..shape.out_words(&DeviceInfo::T4) {
                for chunk in shape.chunks_of(&DeviceInfo::T4, thread) {
                    readers[chunk] += 1;
                }
            }
            assert!(readers.iter().all(|&count| count == 1), "{chunks} chunks");
        }
    }
}
