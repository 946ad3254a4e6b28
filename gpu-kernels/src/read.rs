//! Reads bytes and does next to nothing with them: the floor that the other kernels are held to.
//!
//! Shapes: data `(chunks, 4)` u32, out `(warps of the grid,)` u32. Each warp stores the exclusive-or
//! of the words that it read, so that no read can be left out.
//!
//! ```text
//! thread t of the grid of T -> chunks t, t + T, t + 2T, … (16 bytes each), four loads in flight
//! ```
//!
//! Bytes moved: `16 chunks`, and 4 a warp. No shared memory.

use cuda_std::{kernel, thread, warp};

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::ptx;

/// Threads a block.
#[cfg(not(target_arch = "nvptx64"))]
const BLOCK: u32 = 256;
/// Blocks a multiprocessor: all of its threads on the larger GPUs.
#[cfg(not(target_arch = "nvptx64"))]
const BLOCKS_PER_MULTIPROCESSOR: u32 = 8;
/// Bytes of one load.
#[cfg(not(target_arch = "nvptx64"))]
const CHUNK_BYTES: usize = 16;

/// Dimensions of the read.
#[cfg(not(target_arch = "nvptx64"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Bytes to read, a multiple of 16.
    pub bytes: usize,
}

#[cfg(not(target_arch = "nvptx64"))]
impl Shape {
    /// Words of [`Operands::out`] on `device`: the warps of the grid.
    pub fn out_words(&self, device: &DeviceInfo) -> usize {
        (self.blocks(device) * (BLOCK / 32)) as usize
    }

    fn blocks(&self, device: &DeviceInfo) -> u32 {
        let chunks = self.bytes / CHUNK_BYTES;
        let most = device.multiprocessors * BLOCKS_PER_MULTIPROCESSOR;
        chunks.div_ceil(BLOCK as usize).min(most as usize) as u32
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
    call.build(device, Launch::linear(shape.blocks(device), BLOCK, 0))
}

/// `out[w]` = exclusive-or of what warp `w` reads.
///
/// # Safety
/// Launched as [`plan`] says.
#[kernel]
pub unsafe fn read_bytes(
    data: *const u32, // (chunks, 4)
    out: *mut u32,    // (warps of the grid)
    chunks: u32,
) {
    let step = thread::block_dim_x() * thread::grid_dim_x();
    let mut chunk = thread::index_1d();
    let mut sum = 0;
    // SAFETY: every chunk is below `chunks`, which the plan checked the buffer for. Sums do not wrap:
    // `chunks` is below 2^31, and so is what is left of it before a step is added.
    unsafe {
        while chunk < chunks && chunks - chunk > 3 * step {
            let a = load(data, chunk);
            let b = load(data, chunk + step);
            let c = load(data, chunk + 2 * step);
            let d = load(data, chunk + 3 * step);
            sum ^= fold(a) ^ fold(b) ^ fold(c) ^ fold(d);
            chunk += 4 * step;
        }
        while chunk < chunks {
            sum ^= fold(load(data, chunk));
            chunk += step;
        }
        let mut mask = 16;
        while mask > 0 {
            sum ^= warp::shuffle_xor_u32(warp::FULL_MASK, sum, mask);
            mask /= 2;
        }
        if warp::lane_id() == 0 {
            let index = thread::index_1d() / 32;
            ptx::st_global_u32(out.wrapping_add(index as usize), sum);
        }
    }
}

/// # Safety
/// `chunk` must be within `data`.
#[inline(always)]
unsafe fn load(data: *const u32, chunk: u32) -> [u32; 4] {
    // SAFETY: passed on to the caller.
    unsafe { ptx::ld_global_nc_v4_u32(data.wrapping_add(4 * chunk as usize)) }
}

#[inline(always)]
fn fold(words: [u32; 4]) -> u32 {
    words[0] ^ words[1] ^ words[2] ^ words[3]
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
        };
        let blocks =
            |bytes| plan(&DeviceInfo::T4, &Shape { bytes }, &ops).map(|c| c.launch.grid[0]);
        assert_eq!(blocks(16), Ok(1));
        assert_eq!(blocks(16 * 257), Ok(2));
        assert_eq!(blocks(1 << 30), Ok(320));
        assert!(blocks(20).is_err());
        assert!(blocks(0).is_err());
    }
}
