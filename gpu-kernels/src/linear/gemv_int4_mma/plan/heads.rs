//! Shapes, operands and launches of `linear_gemv_int4_mma_*_heads`.

use super::{Epilogue, Operands, Shape, TILE_ROWS, Tiling, planned};
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, ShapeError, tensor_bytes};

/// Entry of q, k and v that are turned and appended.
pub fn entry_heads(group: usize, mins: bool) -> &'static str {
    match (group, mins) {
        (32, false) => "linear_gemv_int4_mma_g32_heads",
        (64, false) => "linear_gemv_int4_mma_g64_heads",
        (_, false) => "linear_gemv_int4_mma_g128_heads",
        (32, true) => "linear_gemv_int4_mma_g32_min_heads",
        (64, true) => "linear_gemv_int4_mma_g64_min_heads",
        (_, true) => "linear_gemv_int4_mma_g128_min_heads",
    }
}

/// Heads that a product of q, k and v makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// H: query heads.
    pub heads: usize,
    /// KV: key/value heads.
    pub kv_heads: usize,
    /// Dh: head width, a multiple of 16.
    pub head_dim: usize,
    /// S: positions of the cache, rows of the tables.
    pub context: usize,
}

/// What [`plan_heads`] takes besides [`Operands`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadsOperands {
    /// `(S, Dh/2)` f32.
    pub cos: DeviceSlice,
    /// `(S, Dh/2)` f32.
    pub sin: DeviceSlice,
    /// `(KV, S, Dh)` f16.
    pub k_cache: DeviceSlice,
    /// `(KV, S, Dh)` f16.
    pub v_cache: DeviceSlice,
    /// `(1,)` u32: the position, below S.
    pub state: DeviceSlice,
}

/// The launch of `linear_gemv_int4_mma_*_heads`: the product of q, k and v, whose rows
/// `Int4Tiled::pack_heads` has put in order; queries turned to [`Operands::y`], keys turned and
/// appended to the cache with the values.
///
/// # Errors
/// As [`plan`](super::plan); rows that are not those of the heads, a head width that is no multiple of
/// 16, anything but one token of floats and [`Epilogue::Store`].
pub fn plan_heads(
    device: &DeviceInfo,
    shape: &Shape,
    heads: &Heads,
    ops: &Operands,
    of_heads: &HeadsOperands,
    tiling: Option<Tiling>,
) -> Result<Call, ShapeError> {
    planned(device, shape, ops, Some((heads, of_heads)), tiling)
}

impl Heads {
    /// Checks that the product of `shape` makes the heads; rows of q.
    pub(super) fn query_rows(
        &self,
        call: &CallBuilder,
        shape: &Shape,
    ) -> Result<usize, ShapeError> {
        let plain = shape.epilogue == Epilogue::Store && !shape.half_x && !shape.half_y;
        call.require(plain, "rows", shape.rows, "heads are products of floats")?;
        call.require(
            self.head_dim.is_multiple_of(TILE_ROWS as usize),
            "head_dim",
            self.head_dim,
            "it must be a multiple of 16",
        )?;
        let in_all = self.kv_heads.saturating_mul(2).saturating_add(self.heads);
        call.require(
            self.kv_heads > 0 && in_all.saturating_mul(self.head_dim) == shape.rows,
            "rows",
            shape.rows,
            "they must be those of the heads",
        )?;
        Ok(self.heads * self.head_dim)
    }

    /// Adds what the entries `_heads` take after the others' parameters.
    pub(super) fn add(
        &self,
        call: &mut CallBuilder,
        ops: &HeadsOperands,
    ) -> Result<(), ShapeError> {
        let half = self.head_dim / 2;
        let table = tensor_bytes(&[self.context, half], 4);
        let cache = tensor_bytes(&[self.kv_heads, self.context, self.head_dim], 2);
        call.tensor("cos", ops.cos, table, 4)?;
        call.tensor("sin", ops.sin, table, 4)?;
        call.tensor("k_cache", ops.k_cache, cache, 2)?;
        call.tensor("v_cache", ops.v_cache, cache, 2)?;
        call.tensor("state", ops.state, 4, 4)?;
        call.dim("heads", self.heads)?;
        call.dim("kv_heads", self.kv_heads)?;
        call.dim("half", half)?;
        call.dim("context", self.context)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_have_to_be_the_rows() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 1 << 20,
        };
        let ops = Operands {
            quants: slice,
            scales: slice,
            mins: DeviceSlice::NONE,
            zeros: false,
            bias: slice,
            x: slice,
            gain: slice,
            y: slice,
        };
        let of_heads = HeadsOperands {
            cos: slice,
            sin: slice,
            k_cache: slice,
            v_cache: slice,
            state: slice,
        };
        let heads = Heads {
            heads: 4,
            kv_heads: 2,
            head_dim: 48,
            context: 8,
        };
        let shape = Shape::plain(8 * 48, 160, 64);
        let planned = |shape: Shape, heads: Heads, of_heads: HeadsOperands| {
            plan_heads(&DeviceInfo::T4, &shape, &heads, &ops, &of_heads, None)
        };
        let call = planned(shape, heads, of_heads).unwrap();
        assert_eq!(call.kernel, "linear_gemv_int4_mma_g64_heads");
        assert_eq!(call.args[18..], [4, 2, 24, 8]);
        let more = Shape { rows: 400, ..shape };
        assert!(planned(more, heads, of_heads).is_err());
        let halves = Shape {
            half_y: true,
            ..shape
        };
        assert!(planned(halves, heads, of_heads).is_err());
        let narrow = Heads {
            heads: 44,
            kv_heads: 2,
            head_dim: 8,
            ..heads
        };
        assert!(planned(shape, narrow, of_heads).is_err());
        let short = HeadsOperands {
            v_cache: DeviceSlice {
                bytes: 2 * 8 * 48 * 2 - 1,
                ..slice
            },
            ..of_heads
        };
        assert!(planned(shape, heads, short).is_err());
    }
}
