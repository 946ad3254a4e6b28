//! Where things lie in shared memory.

use super::{HEADS, MAX_SPLITS, PART_CHUNKS, WARPS};

/// Where things lie in shared memory, in bytes: q as the lanes of the product take it, each warp's
/// maxima and sums of weights, then a part for each warp: its tiles, and once they are used up its
/// weighted sums. The block of a head has the splits' shares there instead, then its warps' sums.
#[derive(Clone, Copy)]
pub struct Layout {
    query_bytes: u32,
    /// Of a warp's part.
    warp_bytes: u32,
    /// Words of a head's row.
    stride: u32,
}

impl Layout {
    /// `rows`: heads of the block; `ring_bytes`: a warp's tiles.
    #[inline(always)]
    pub fn new(key_loads: u32, value_loads: u32, rows: u32, ring_bytes: u32) -> Layout {
        let stride = pass_elems(value_loads) + 8;
        Layout {
            query_bytes: key_loads * 2 * 32 * 16,
            warp_bytes: ring_bytes.max(rows * stride * 4),
            stride,
        }
    }

    /// Four words of a lane: the operand of step `step` of the scores.
    #[inline(always)]
    pub fn query(self, step: u32, lane: u32) -> u32 {
        (step * 32 + lane) * 16
    }

    #[inline(always)]
    pub fn maximum(self, warp: u32, row: u32) -> u32 {
        self.query_bytes + (warp * HEADS + row) * 4
    }

    #[inline(always)]
    pub fn weight(self, warp: u32, row: u32) -> u32 {
        self.maximum(WARPS + warp, row)
    }

    /// A warp's part.
    #[inline(always)]
    pub fn warp(self, warp: u32) -> u32 {
        self.maximum(2 * WARPS, 0) + warp * self.warp_bytes
    }

    /// Four elements from `4 chunk` on of a head, as counted within a pass.
    #[inline(always)]
    pub fn sum(self, warp: u32, row: u32, chunk: u32) -> u32 {
        let chunk = chunk ^ ((chunk >> 3) & 1);
        self.warp(warp) + (row * self.stride + chunk * 4) * 4
    }

    /// What a split's sum counts in the head's.
    #[inline(always)]
    pub fn share(self, split: u32) -> u32 {
        split * 4
    }

    /// A warp's sum of a chunk over its splits.
    #[inline(always)]
    pub fn part_sum(self, warp: u32, chunk: u32) -> u32 {
        self.share(MAX_SPLITS) + (warp * PART_CHUNKS + chunk) * 16
    }

    #[cfg(not(target_arch = "nvptx64"))]
    pub fn bytes(self) -> u32 {
        self.warp(WARPS).max(self.part_sum(WARPS, 0))
    }
}

/// Elements of a head that the warps of a block exchange at a time.
#[inline(always)]
pub const fn pass_elems(value_loads: u32) -> u32 {
    if value_loads < 2 { 64 } else { 128 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_regions_do_not_overlap_and_fit() {
        for (key_loads, value_loads, ring_bytes) in
            [(2, 1, 0), (3, 2, 512), (4, 2, 24_576), (8, 4, 0)]
        {
            for rows in 1..=HEADS {
                let layout = Layout::new(key_loads, value_loads, rows, ring_bytes);
                assert_eq!(
                    layout.query(key_loads * 2 - 1, 31) + 16,
                    layout.maximum(0, 0)
                );
                assert_eq!(
                    layout.maximum(WARPS - 1, HEADS - 1) + 4,
                    layout.weight(0, 0)
                );
                assert_eq!(layout.weight(WARPS - 1, HEADS - 1) + 4, layout.warp(0));
                let last_chunk = pass_elems(value_loads) / 4 - 1;
                let end = layout.sum(0, rows - 1, last_chunk) + 16;
                assert!(end <= layout.warp(1), "{end} of {}", layout.warp(1));
                assert!(layout.warp(0) + ring_bytes <= layout.warp(1));
                assert!(layout.part_sum(WARPS - 1, PART_CHUNKS - 1) + 16 <= layout.bytes());
            }
        }
    }

    #[test]
    fn chunks_of_a_row_are_a_permutation() {
        let layout = Layout::new(4, 2, 8, 8192);
        let mut places: Vec<u32> = (0..32).map(|chunk| layout.sum(3, 5, chunk)).collect();
        places.sort_unstable();
        assert!(places.windows(2).all(|pair| pair[1] == pair[0] + 16));
    }

    /// Stores of 8 lanes at a time (two heads, four t) and loads of 8 neighbours.
    #[test]
    fn eight_lanes_never_share_a_bank_group() {
        for value_loads in [1, 2] {
            let layout = Layout::new(4, value_loads, 8, 8192);
            let distinct = |offsets: Vec<u32>| {
                offsets
                    .iter()
                    .fold(0u32, |seen, o| seen | 1 << (o / 16 % 8))
                    == 0xff
            };
            for c in 0..4 {
                for block in 0..pass_elems(value_loads) / 64 {
                    let chunk = |t: u32| block * 16 + t * 4 + c;
                    let lanes = (2..4).flat_map(|g| (0..4).map(move |t| (g, t)));
                    assert!(distinct(
                        lanes.map(|(g, t)| layout.sum(1, g, chunk(t))).collect()
                    ));
                }
            }
            assert!(distinct(
                (8..16).map(|chunk| layout.sum(1, 2, chunk)).collect()
            ));
        }
    }
}
