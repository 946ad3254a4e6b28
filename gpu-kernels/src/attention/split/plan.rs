//! Grid, scratch memory and checks of a launch.

use super::combine::parts;
use super::layout::Layout;
use super::tile::tile_bytes;
use super::{HEADS, MAX_DEPTH, MAX_RING_BYTES, MAX_SPLITS, TILE, WARPS};
use crate::attention::{self, Operands, Shape};
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::tuned::Launches;

/// Grid and granularity of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Blocks a group of heads, at most 128.
    pub splits: u32,
    /// Tiles of 16 positions that a split has at least, unless there are no more. A few tiles are one
    /// split anyway.
    pub min_tiles: u32,
}

impl Tuning {
    /// A block a multiprocessor once the context is long, with a tile a warp; those of the heads wait
    /// beside them.
    pub fn of(device: &DeviceInfo, shape: &Shape) -> Tuning {
        let groups = u32::try_from(head_groups(shape)).unwrap_or(u32::MAX);
        let tuning = Tuning {
            splits: (device.multiprocessors / groups.max(1)).max(1),
            min_tiles: WARPS,
        };
        tuning.within(shape)
    }

    /// No more splits than the cache has work for, whatever cache they were found with.
    pub fn within(self, shape: &Shape) -> Tuning {
        let least = self.min_tiles.max(1).saturating_mul(TILE);
        let seen = shape.context.min(shape.window() as usize);
        let most = seen.div_ceil(least as usize).clamp(1, MAX_SPLITS as usize);
        Tuning {
            splits: self.splits.min(most as u32),
            ..self
        }
    }

    /// Bytes of [`Operands::partials`] that a launch needs.
    pub fn scratch_bytes(self, shape: &Shape) -> u64 {
        if self.splits == 1 {
            return 0;
        }
        // Each head's weighted sum, and its maximum and sum of weights for each part.
        let parts = parts(shape.head_dim.min(attention::MAX_HEAD_DIM) as u32);
        let floats =
            u64::from(self.splits * HEADS) * (shape.head_dim as u64 + 4 * u64::from(parts));
        (head_groups(shape) as u64).saturating_mul(floats * 4)
    }
}

impl Launches for Tuning {
    const NAMES: &'static [&'static str] = &["splits", "min_tiles"];

    fn numbers(&self) -> Vec<u32> {
        vec![self.splits, self.min_tiles]
    }

    fn of(numbers: &[u32]) -> Option<Tuning> {
        let &[splits, min_tiles] = numbers else {
            return None;
        };
        Some(Tuning { splits, min_tiles })
    }
}

/// The rule's launch, then every other: a block or two a multiprocessor, and the least work of a
/// split.
pub fn candidates(device: &DeviceInfo, shape: &Shape) -> Vec<Tuning> {
    let rule = Tuning::of(device, shape);
    let mut found = vec![rule];
    for splits in [rule.splits, rule.splits * 2] {
        for min_tiles in [1, 2, 4, 8] {
            let tuning = Tuning { splits, min_tiles };
            if (1..=MAX_SPLITS).contains(&splits) && !found.contains(&tuning) {
                found.push(tuning);
            }
        }
    }
    found
}

/// The shape as the table of tuned launches names it: the launch serves every position.
pub fn name(shape: &Shape) -> String {
    let &Shape {
        heads,
        kv_heads,
        head_dim,
        ..
    } = shape;
    format!("heads {heads}/{kv_heads} x {head_dim}")
}

/// Groups of up to 8 query heads that share a kv head.
fn head_groups(shape: &Shape) -> usize {
    let per_kv = shape.heads / shape.kv_heads.max(1);
    shape
        .kv_heads
        .saturating_mul(per_kv.div_ceil(HEADS as usize))
}

/// Whether the kernels here take the head width.
pub fn takes(shape: &Shape) -> bool {
    shape.head_dim.is_multiple_of(8) && (8..=attention::MAX_HEAD_DIM).contains(&shape.head_dim)
}

/// The kernel for a head width: the narrowest that takes it.
pub fn kernel(head_dim: usize) -> &'static str {
    match head_dim {
        0..=64 => "attention_split_f16_d64",
        65..=96 => "attention_split_f16_d96",
        97..=128 => "attention_split_f16_d128",
        _ => "attention_split_f16_d256",
    }
}

/// The same for values of 8 bits.
pub fn kernel_v8(head_dim: usize) -> &'static str {
    match head_dim {
        0..=64 => "attention_split_v8_d64",
        65..=96 => "attention_split_v8_d96",
        _ => "attention_split_v8_d128",
    }
}

/// The launch of the [`kernel`] or [`kernel_v8`] for the head width.
///
/// # Errors
/// Heads that kv heads do not divide, a head width that [`takes`] refuses, no window, a tuning out of range,
/// a short or misaligned buffer.
pub fn plan(
    device: &DeviceInfo,
    shape: &Shape,
    ops: &Operands,
    tuning: Tuning,
) -> Result<Call, ShapeError> {
    let &Shape {
        heads,
        kv_heads,
        head_dim,
        context,
        scale,
        window,
    } = shape;
    let of_8_bits = ops.v_scales != DeviceSlice::NONE;
    let name = if of_8_bits { kernel_v8 } else { kernel };
    let mut call = CallBuilder::new(name(head_dim));
    attention::require_heads(&call, shape)?;
    call.require(window != Some(0), "window", 0, "it must be above 0")?;
    call.require(
        takes(shape),
        "head_dim",
        head_dim,
        "it must be a multiple of 8",
    )?;
    call.require(
        head_dim <= 128 || !of_8_bits,
        "head_dim",
        head_dim,
        "with values of 8 bits it must be at most 128",
    )?;
    let splits = tuning.splits;
    call.require(
        (1..=MAX_SPLITS).contains(&splits),
        "splits",
        splits as usize,
        "it must be in 1..=128",
    )?;
    let within = (context as u64).saturating_mul(head_dim as u64) < 1 << 31;
    call.require(
        within,
        "context",
        context,
        "the elements of a head's cache must be below 2^31",
    )?;
    attention::tensors(&mut call, shape, ops, 16)?;
    if of_8_bits {
        let scales = tensor_bytes(&[kv_heads, context], 2);
        call.tensor("v_scales", ops.v_scales, scales, 2)?;
    }
    let scratch_bytes = tuning.scratch_bytes(shape);
    if scratch_bytes > 0 {
        call.tensor("partials", ops.partials, scratch_bytes, 16)?;
    } else {
        call.optional("partials", DeviceSlice::NONE, 0, 16)?;
    }
    let groups = call.dim("groups", head_groups(shape))?;
    let heads = call.dim("heads", heads)?;
    call.u32(heads / kv_heads as u32);
    let width = call.dim("head_dim", head_dim)?;
    call.dim("context", context)?;
    call.u32(shape.window());
    call.dim("min_tiles", tuning.min_tiles as usize)?;
    // The blocks of the heads, where there is anything to combine.
    let head_rows = if splits > 1 {
        heads.saturating_mul(parts(width)).div_ceil(splits)
    } else {
        0
    };
    let rows = u64::from(groups) + u64::from(head_rows);
    call.require(rows <= 65_535, "kv_heads", kv_heads, "too many heads")?;
    let (key_loads, value_loads) = (width.div_ceil(32), width.div_ceil(64));
    let (key_loads, value_loads) = match key_loads {
        0..=2 => (2, 1),
        3 => (3, 2),
        4 => (4, value_loads),
        _ => (8, 4),
    };
    let rows_a_block = HEADS.min(heads / kv_heads as u32);
    let tile = tile_bytes(key_loads, value_loads, if of_8_bits { 1 } else { 2 });
    let layout = |depth: u32| Layout::new(key_loads, value_loads, rows_a_block, depth * tile);
    // No ring where there are no asynchronous copies.
    let mut depth = 0;
    if device.compute_capability >= 80 {
        let fits = |depth: &u32| {
            depth * tile * WARPS <= MAX_RING_BYTES
                && layout(*depth).bytes() <= device.shared_bytes_per_block
        };
        depth = (1..=MAX_DEPTH).rev().find(fits).unwrap_or(1);
    }
    call.u32(depth);
    call.f32(scale * core::f32::consts::LOG2_E);
    if splits > 1 {
        call.blocks_wait();
    }
    call.waits();
    call.build(
        device,
        Launch {
            grid: [splits, rows as u32, 1],
            block: [WARPS * 32, 1, 1],
            shared_bytes: layout(depth).bytes(),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::DeviceSlice;

    const SHAPE: Shape = Shape {
        heads: 12,
        kv_heads: 2,
        head_dim: 128,
        context: 4096,
        scale: 0.088,
        window: None,
    };

    const H200: DeviceInfo = DeviceInfo {
        multiprocessors: 132,
        shared_bytes_per_block: 227 * 1024,
        compute_capability: 90,
        warpgroup_products: false,
    };

    fn operands() -> Operands {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 1 << 24,
        };
        Operands {
            q: slice,
            k_cache: slice,
            v_cache: slice,
            v_scales: DeviceSlice::NONE,
            state: slice,
            out: slice,
            partials: slice,
        }
    }

    #[test]
    fn splits_fill_the_device_and_leave_no_block_without_a_use() {
        let splits = |shape| Tuning::of(&H200, &shape).splits;
        assert_eq!(splits(SHAPE), 32);
        assert_eq!(
            splits(Shape {
                context: 131_072,
                ..SHAPE
            }),
            66
        );
        assert_eq!(
            splits(Shape {
                context: 1,
                ..SHAPE
            }),
            1
        );
        let found = Tuning {
            splits: 66,
            min_tiles: 2,
        };
        let at = |context| found.within(&Shape { context, ..SHAPE }).splits;
        assert_eq!([at(1), at(640), at(131_072)], [1, 20, 66]);
        let llama = Shape {
            heads: 32,
            kv_heads: 8,
            context: 131_072,
            ..SHAPE
        };
        assert_eq!(splits(llama), 16);
        let wide = Shape {
            heads: 64,
            kv_heads: 1,
            context: 131_072,
            ..SHAPE
        };
        assert_eq!(splits(wide), 16);
    }

    #[test]
    fn plan_picks_the_kernel_by_width_and_checks_its_scratch() {
        let planned = |shape, ops| plan(&H200, &shape, &ops, Tuning::of(&H200, &shape));
        let call = planned(SHAPE, operands()).unwrap();
        assert_eq!(call.kernel, "attention_split_f16_d128");
        // Two groups, and rows of blocks that hold four parts of 12 heads.
        assert_eq!(call.launch.grid, [32, 4, 1]);
        assert_eq!(call.args[6..14], [2, 12, 6, 128, 4096, 1 << 30, 8, 2]);
        let name = |head_dim| {
            planned(Shape { head_dim, ..SHAPE }, operands())
                .unwrap()
                .kernel
        };
        assert_eq!(name(64), "attention_split_f16_d64");
        assert_eq!(name(80), "attention_split_f16_d96");
        assert_eq!(name(256), "attention_split_f16_d256");
        assert!(
            planned(
                Shape {
                    head_dim: 34,
                    ..SHAPE
                },
                operands()
            )
            .is_err()
        );
        assert!(
            planned(
                Shape {
                    head_dim: 264,
                    ..SHAPE
                },
                operands()
            )
            .is_err()
        );
        let windowed = |window| Shape {
            window: Some(window),
            ..SHAPE
        };
        assert!(planned(windowed(0), operands()).is_err());
        let call = planned(windowed(300), operands()).unwrap();
        assert_eq!((call.launch.grid[0], call.args[11]), (3, 300));
        let of_8_bits = Operands {
            v_scales: operands().v_cache,
            ..operands()
        };
        let call = planned(SHAPE, of_8_bits).unwrap();
        assert_eq!(call.kernel, "attention_split_v8_d128");
        assert_eq!(call.args[7..9], [2, 12]);
        let wide = Shape {
            head_dim: 136,
            ..SHAPE
        };
        assert!(planned(wide, of_8_bits).is_err());
        let mut short = operands();
        short.partials.bytes = Tuning::of(&H200, &SHAPE).scratch_bytes(&SHAPE) - 1;
        assert!(planned(SHAPE, short).is_err());
        let none = Tuning {
            splits: 0,
            min_tiles: 8,
        };
        assert!(plan(&H200, &SHAPE, &operands(), none).is_err());
    }
}
