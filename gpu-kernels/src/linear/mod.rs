//! Linear layers, `y = W x + b`. One file a kernel family; here is what the families share: the
//! activations of a block staged in shared memory, and the group arithmetic of the formats.
//!
//! ```text
//! x in 16-byte chunks (4 floats); a block stages them 8 by 8, each eight rotated by its number:
//!
//!   chunk  0  1  2  3  4  5  6  7 |  8  9 10 11 12 13 14 15 | 16 17 ...
//!   slot   0  1  2  3  4  5  6  7 |  9 10 11 12 13 14 15  8 | 18 19 ...
//! ```
//!
//! A lane that owns an INT4 cell reads 8 chunks in a row, one that owns 16 INT8 weights reads 4.
//! Unrotated, the 8 lanes that a 16-byte shared load serves at once would ask for chunks 8 (or 4)
//! apart, all in the same banks. Rotated, any such 8 lanes hit 8 different bank groups, and so do
//! the threads that fill the slots.

pub mod gemm_int4;
pub mod gemv_f16;
pub mod gemv_int4;
pub mod gemv_int4_mma;
pub mod gemv_int8;

use cuda_std::shared::Shared;
use cuda_std::{thread, warp};

#[cfg(not(target_arch = "nvptx64"))]
use crate::launch::{CallBuilder, DeviceInfo, Launch, ShapeError};
use crate::ptx;

/// Floats a chunk of staged activations.
pub(crate) const CHUNK_ELEMS: u32 = 4;
/// Bytes a chunk.
pub(crate) const CHUNK_BYTES: u32 = 16;
/// Columns of x staged at a time: 16 KiB, so four blocks of eight warps fit an SM of 64 KiB.
pub(crate) const TILE_COLS: u32 = 4096;
const _: () = assert!(TILE_COLS.is_multiple_of(32 * 32));

/// Shift that turns a column into its group when a row has a single group.
#[cfg(not(target_arch = "nvptx64"))]
const SINGLE_GROUP_SHIFT: u32 = 31;

/// Warps a block of a multirow kernel, where the rows give every multiprocessor two blocks.
#[cfg(not(target_arch = "nvptx64"))]
const WARPS: u32 = 8;
/// Warps a block for fewer rows: smaller blocks spread over more multiprocessors.
#[cfg(not(target_arch = "nvptx64"))]
const WARPS_FEW_ROWS: u32 = 4;

/// The launch of a multirow kernel: `rows_per_warp` rows a warp, one staged tile a block.
#[cfg(not(target_arch = "nvptx64"))]
pub(crate) fn multirow_launch(
    device: &DeviceInfo,
    rows: u32,
    cols: u32,
    rows_per_warp: u32,
) -> Launch {
    let enough = rows.div_ceil(WARPS * rows_per_warp) >= 2 * device.multiprocessors;
    let warps = if enough { WARPS } else { WARPS_FEW_ROWS };
    let blocks = rows.div_ceil(warps * rows_per_warp);
    Launch::linear(blocks, warps * 32, cols.min(TILE_COLS) * 4)
}

/// Byte offset in shared memory of staged chunk `chunk`.
#[inline(always)]
pub(crate) fn chunk_offset_bytes(chunk: u32) -> u32 {
    ((chunk & !7) | ((chunk + (chunk >> 3)) & 7)) * CHUNK_BYTES
}

/// Groups of a row.
#[inline(always)]
pub(crate) fn groups_per_row(cols: u32, group_shift: u32) -> u32 {
    ((cols - 1) >> group_shift) + 1
}

/// Stages columns `first .. first + count` of `x`, by all threads of the block.
///
/// # Safety
/// `x` holds `first + count` floats and is 16-byte aligned, both numbers are multiples of 4,
/// shared memory holds `count` floats rounded up to 32, and the caller puts a barrier before any
/// read of what is staged and before it is staged over.
#[inline(always)]
pub(crate) unsafe fn stage_columns(x: *const f32, first: u32, count: u32, tile: Shared) {
    let chunks = count / CHUNK_ELEMS;
    let mut chunk = thread::thread_idx_x();
    while chunk < chunks {
        // SAFETY: the chunk lies in the columns that the caller vouches for, and its slot in the
        // same eight as the chunk itself.
        unsafe {
            let values =
                ptx::ld_global_v4_f32(x.wrapping_add((first + chunk * CHUNK_ELEMS) as usize));
            ptx::st_shared_v4_f32(tile, chunk_offset_bytes(chunk), values);
        }
        chunk += thread::block_dim_x();
    }
}

/// Writes `sum`, with the bias if there is one, as row `row` of `y`.
///
/// # Safety
/// `row` is a row of `y`, and of `bias` unless that is null.
#[inline(always)]
pub(crate) unsafe fn store_row(sum: f32, row: u32, bias: *const f32, y: *mut f32) {
    let row = row as usize;
    // SAFETY: by the caller's promise.
    unsafe {
        let bias = if bias.is_null() {
            0.0
        } else {
            ptx::ld_global_nc_f32(bias.wrapping_add(row))
        };
        ptx::st_global_f32(y.wrapping_add(row), sum + bias);
    }
}

/// Adds up both rows' sums over the warp and writes those of the rows `first_row`, `first_row + 1`
/// that are below `rows`. All lanes of the warp call it.
///
/// # Safety
/// `y`, and `bias` unless null, have `rows` rows.
#[inline(always)]
pub(crate) unsafe fn store_rows(
    sums: [f32; 2],
    first_row: u32,
    rows: u32,
    bias: *const f32,
    y: *mut f32,
) {
    let sums = [warp::reduce_sum_f32(sums[0]), warp::reduce_sum_f32(sums[1])];
    // Lane r writes row r.
    let lane = warp::lane_id();
    let row = first_row + lane;
    if lane < 2 && row < rows {
        let sum = if lane == 0 { sums[0] } else { sums[1] };
        // SAFETY: the row is below `rows`.
        unsafe { store_row(sum, row, bias, y) };
    }
}

/// Shift from a column to its INT8 group.
///
/// # Errors
/// A group that is neither a power of two from 32 on nor the whole row.
#[cfg(not(target_arch = "nvptx64"))]
pub(crate) fn int8_group_shift(
    call: &CallBuilder,
    group: usize,
    cols: usize,
) -> Result<u32, ShapeError> {
    if group >= cols && group > 0 {
        return Ok(SINGLE_GROUP_SHIFT);
    }
    let fits = group.is_power_of_two() && group >= 32;
    call.require(
        fits,
        "group",
        group,
        "it must be a power of two from 32 on, or the row",
    )?;
    Ok(group.trailing_zeros())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bank group (16 bytes of the 128 that shared memory serves at once) of a chunk's slot.
    fn bank_group(chunk: u32) -> u32 {
        chunk_offset_bytes(chunk) / CHUNK_BYTES % 8
    }

    fn all_differ(chunks: impl Iterator<Item = u32>) -> bool {
        let seen = chunks.fold(0u32, |seen, chunk| seen | 1 << bank_group(chunk));
        seen == 0xff
    }

    #[test]
    fn slots_are_a_permutation_within_each_eight() {
        for eight in 0..32 {
            let mut slots: Vec<u32> = (0..8)
                .map(|i| chunk_offset_bytes(eight * 8 + i) / CHUNK_BYTES)
                .collect();
            slots.sort_unstable();
            assert_eq!(slots, (eight * 8..eight * 8 + 8).collect::<Vec<_>>());
        }
    }

    #[test]
    fn eight_lanes_never_share_a_bank_group() {
        for first_lane in (0..32).step_by(8) {
            let lanes = first_lane..first_lane + 8;
            assert!(all_differ(lanes.clone()), "filling");
            for i in 0..8 {
                assert!(
                    all_differ(lanes.clone().map(|lane| lane * 8 + i)),
                    "INT4 chunk {i}"
                );
            }
            for i in 0..4 {
                assert!(
                    all_differ(lanes.clone().map(|lane| lane * 4 + i)),
                    "INT8 chunk {i}"
                );
            }
        }
    }

    #[test]
    fn short_last_groups_count() {
        assert_eq!(groups_per_row(576, 7), 5);
        assert_eq!(groups_per_row(576, 5), 18);
        assert_eq!(groups_per_row(576, SINGLE_GROUP_SHIFT), 1);
        assert_eq!(groups_per_row(32, 7), 1);
    }

    #[test]
    fn blocks_shrink_when_rows_are_few() {
        let t4 = DeviceInfo::T4;
        assert_eq!(
            multirow_launch(&t4, 193, 576, 2),
            Launch::linear(25, 128, 576 * 4)
        );
        assert_eq!(
            multirow_launch(&t4, 8960, 8960, 2),
            Launch::linear(560, 256, 16_384)
        );
    }

    #[test]
    fn int8_groups() {
        let call = CallBuilder::new("k");
        assert_eq!(int8_group_shift(&call, 32, 576), Ok(5));
        assert_eq!(int8_group_shift(&call, 576, 576), Ok(SINGLE_GROUP_SHIFT));
        assert!(int8_group_shift(&call, 96, 576).is_err());
        assert!(int8_group_shift(&call, 16, 576).is_err());
        assert!(int8_group_shift(&call, 0, 576).is_err());
    }
}
