//! Shapes, operands and launches of `linear_gemv_int4_mma`.

mod heads;

use super::{
    FLAG_ACCUMULATE, FLAG_HALF_Y, FLAG_SWIGLU, FLAG_ZEROS, MAX_BLOCK_THREADS, TILE_COLS, TILE_ROWS,
    one,
};
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::tuned::Launches;
pub use heads::{Heads, HeadsOperands, entry_heads, plan_heads};

/// What becomes of the products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Epilogue {
    /// They are y.
    #[default]
    Store,
    /// They are added to y: the residual.
    Add,
    /// `y = silu(gate) up`, of tiles of 8 gate and 8 up rows.
    SwiGlu,
}

/// Dimensions of the product.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// N: rows of y. With [`Epilogue::SwiGlu`] the matrix has twice as many.
    pub rows: usize,
    /// K, a multiple of 32.
    pub cols: usize,
    /// Weights that share a scale: 32, 64 or 128; the last group of a row may be short.
    pub group: usize,
    /// What becomes of the products.
    pub epilogue: Epilogue,
    /// Added to the mean square of the norm in front, if there is one.
    pub eps: f32,
    /// x are halves. Not with a norm.
    pub half_x: bool,
    /// y are halves. Not where it is added to.
    pub half_y: bool,
}

impl Shape {
    /// Nothing before or after.
    pub fn plain(rows: usize, cols: usize, group: usize) -> Shape {
        Shape {
            rows,
            cols,
            group,
            epilogue: Epilogue::Store,
            eps: 0.0,
            half_x: false,
            half_y: false,
        }
    }

    /// The shape as the table of tuned launches names it; `norm`: whether there is one in front.
    /// Groups and minima are in the entry's name.
    pub fn name(&self, norm: bool) -> String {
        let mut name = format!("{}x{}", self.rows, self.cols);
        name.push_str(if norm { " norm" } else { "" });
        name.push_str(match self.epilogue {
            Epilogue::Store => "",
            Epilogue::Add => " add",
            Epilogue::SwiGlu => " swiglu",
        });
        name.push_str(if self.half_y { " to halves" } else { "" });
        name
    }

    /// Weights of the matrix.
    pub fn matrix_elems(&self) -> usize {
        let gated = self.epilogue == Epilogue::SwiGlu;
        self.rows * self.cols * if gated { 2 } else { 1 }
    }

    fn tile_outputs(&self) -> usize {
        match self.epilogue {
            Epilogue::SwiGlu => TILE_ROWS as usize / 2,
            Epilogue::Store | Epilogue::Add => TILE_ROWS as usize,
        }
    }

    pub(super) fn row_tiles(&self) -> usize {
        self.rows.div_ceil(self.tile_outputs())
    }

    pub(super) fn depth_tiles(&self) -> usize {
        self.cols.div_ceil(TILE_COLS as usize)
    }
}

/// Buffers of the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operands {
    /// Tiles of 1 KiB.
    pub quants: DeviceSlice,
    /// Scales of the tiles, f16.
    pub scales: DeviceSlice,
    /// Minima of the tiles, f16, or none: symmetric.
    pub mins: DeviceSlice,
    /// The minima are zeros: `w = scale (q - zero)`.
    pub zeros: bool,
    /// `(N,)` f32, or none. Not with [`Epilogue::SwiGlu`].
    pub bias: DeviceSlice,
    /// `(K,)` f32, or f16 with [`Shape::half_x`].
    pub x: DeviceSlice,
    /// `(K,)` f32: weights of an RMSNorm of x in front, or none: x as it is.
    pub gain: DeviceSlice,
    /// `(N,)` f32, or f16 with [`Shape::half_y`].
    pub y: DeviceSlice,
}

/// How the tiles are spread over warps and blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// Warps that share a row tile, each its part of K.
    pub split: u32,
    /// Row tiles that a block works on at a time.
    pub teams: u32,
    /// Blocks.
    pub blocks: u32,
}

impl Launches for Tiling {
    const NAMES: &'static [&'static str] = &["split", "teams", "blocks"];

    fn numbers(&self) -> Vec<u32> {
        vec![self.split, self.teams, self.blocks]
    }

    fn of(numbers: &[u32]) -> Option<Tiling> {
        let &[split, teams, blocks] = numbers else {
            return None;
        };
        Some(Tiling {
            split,
            teams,
            blocks,
        })
    }
}

/// Warps of a block that has little to do, where launches overlap.
const SMALL_BLOCK_WARPS: u32 = 12;

/// The tiling for a shape: a block a multiprocessor, all its warps with as many tiles in flight as
/// there is room for, where the matrix has that many.
pub fn rule(device: &DeviceInfo, shape: &Shape) -> Tiling {
    let warps = max_warps(device, shape);
    let depth = shape.depth_tiles().min(u32::MAX as usize) as u32;
    let row_tiles = shape.row_tiles().min(u32::MAX as usize) as u32;
    let mut blocks = row_tiles.clamp(1, device.multiprocessors.max(1));
    let tiles_per_block = row_tiles.div_ceil(blocks).max(1);
    // Enough warps for a row tile to be fetched at one go, and as many row tiles as that leaves.
    let split = depth.div_ceil(one::DEPTH).clamp(1, warps);
    let teams = (warps / split).min(tiles_per_block);
    // Warps that are left over shorten everybody's part; as few as do that.
    let split = (warps / teams).min(depth).max(1);
    let mut split = depth.div_ceil(depth.div_ceil(split)).max(1);
    // Where launches overlap, a smaller block leaves room for the next one's beside it: worth more than a
    // warp a tile where a tile or two is all that a warp has to do.
    let few = (SMALL_BLOCK_WARPS / teams).max(1);
    let short = teams == tiles_per_block && depth.div_ceil(split) <= 2;
    if device.compute_capability >= 90 && short && few < split {
        split = depth.div_ceil(depth.div_ceil(few));
    }
    // Where launches overlap, blocks of the next one fill idle multiprocessors two at a time: a block
    // without work keeps its place until the launch before has ended. Not worth it for short rows.
    if device.compute_capability >= 90 && split * one::DEPTH < depth {
        blocks = blocks.max(device.multiprocessors);
    }
    Tiling {
        split,
        teams,
        blocks,
    }
}

/// Warps a block at most on `device`.
pub fn max_warps(device: &DeviceInfo, shape: &Shape) -> u32 {
    let fits = |warps: &u32| {
        block_bytes(device, shape, true, *warps) <= u64::from(device.shared_bytes_per_block)
    };
    (1..=MAX_BLOCK_THREADS / 32).rev().find(fits).unwrap_or(1)
}

/// Shared memory of a block of `warps`.
fn block_bytes(device: &DeviceInfo, shape: &Shape, mins: bool, warps: u32) -> u64 {
    let group = shape.group as u32;
    // Past that no multiprocessor has room.
    let depth = shape.depth_tiles().min(1 << 16) as u32;
    let ring = if device.compute_capability >= 80 {
        warps * one::DEPTH * one::ring_tile_bytes(group, mins)
    } else {
        0
    };
    u64::from(one::Regions::new(depth, group, mins, warps).bytes + ring)
}

/// Entry of a format.
pub fn entry(group: usize, mins: bool, half_x: bool) -> &'static str {
    match (group, mins, half_x) {
        (32, false, false) => "linear_gemv_int4_mma_g32",
        (64, false, false) => "linear_gemv_int4_mma_g64",
        (_, false, false) => "linear_gemv_int4_mma_g128",
        (32, true, false) => "linear_gemv_int4_mma_g32_min",
        (64, true, false) => "linear_gemv_int4_mma_g64_min",
        (_, true, false) => "linear_gemv_int4_mma_g128_min",
        (32, false, true) => "linear_gemv_int4_mma_g32_half",
        (64, false, true) => "linear_gemv_int4_mma_g64_half",
        (_, false, true) => "linear_gemv_int4_mma_g128_half",
        (32, true, true) => "linear_gemv_int4_mma_g32_min_half",
        (64, true, true) => "linear_gemv_int4_mma_g64_min_half",
        (_, true, true) => "linear_gemv_int4_mma_g128_min_half",
    }
}

/// The launch of `linear_gemv_int4_mma_*`, with the tiling of [`rule`] or another.
///
/// # Errors
/// A K that is no multiple of 32, an unsupported group, a bias with
/// [`Epilogue::SwiGlu`], halves where only floats can be, a K or a tiling that a block has no room for,
/// a short or misaligned buffer.
pub fn plan(
    device: &DeviceInfo,
    shape: &Shape,
    ops: &Operands,
    tiling: Option<Tiling>,
) -> Result<Call, ShapeError> {
    planned(device, shape, ops, None, tiling)
}

fn planned(
    device: &DeviceInfo,
    shape: &Shape,
    ops: &Operands,
    heads: Option<(&Heads, &HeadsOperands)>,
    tiling: Option<Tiling>,
) -> Result<Call, ShapeError> {
    let &Shape {
        rows, cols, group, ..
    } = shape;
    let mins = ops.mins != DeviceSlice::NONE;
    let mut call = CallBuilder::new(match heads {
        Some(_) => entry_heads(group, mins),
        None => entry(group, mins, shape.half_x),
    });
    call.require(
        cols.is_multiple_of(32),
        "cols",
        cols,
        "it must be a multiple of 32",
    )?;
    call.require(
        matches!(group, 32 | 64 | 128),
        "group",
        group,
        "it must be 32, 64 or 128",
    )?;
    call.require(
        mins || !ops.zeros,
        "zeros",
        group,
        "they are in the place of minima, and there are none",
    )?;
    let swiglu = shape.epilogue == Epilogue::SwiGlu;
    call.require(
        !swiglu || ops.bias == DeviceSlice::NONE,
        "bias",
        rows,
        "SwiGLU takes none",
    )?;
    call.require(
        !shape.half_x || ops.gain == DeviceSlice::NONE,
        "half_x",
        cols,
        "halves are not normed",
    )?;
    call.require(
        !shape.half_y || shape.epilogue != Epilogue::Add,
        "half_y",
        rows,
        "halves are not added to",
    )?;
    // Rows of y: with heads those of q.
    let y_rows = match heads {
        Some((of, _)) => of.query_rows(&call, shape)?,
        None => rows,
    };
    let tiling = tiling.unwrap_or_else(|| rule(device, shape));
    let warps = tiling.split.saturating_mul(tiling.teams);
    call.require(
        (1..=MAX_BLOCK_THREADS / 32).contains(&warps) && tiling.blocks > 0,
        "warps",
        warps as usize,
        "a block of this format has not as many",
    )?;

    let tiles = shape.row_tiles().saturating_mul(shape.depth_tiles());
    let per_tile = 2 * (TILE_ROWS * TILE_COLS) as usize / group.max(1);
    let scale_bytes = tensor_bytes(&[tiles, per_tile], 1);
    let tile_bytes = (TILE_ROWS * TILE_COLS / 2) as usize;
    call.tensor(
        "quants",
        ops.quants,
        tensor_bytes(&[tiles, tile_bytes], 1),
        16,
    )?;
    call.tensor("scales", ops.scales, scale_bytes, 16)?;
    call.optional("mins", ops.mins, scale_bytes, 16)?;
    call.optional("bias", ops.bias, tensor_bytes(&[rows], 4), 4)?;
    let elem_bytes = |half| if half { 2 } else { 4 };
    let x_bytes = tensor_bytes(&[cols], elem_bytes(shape.half_x));
    call.tensor("x", ops.x, x_bytes, 16)?;
    call.optional("gain", ops.gain, tensor_bytes(&[cols], 4), 16)?;
    let y_elem = elem_bytes(shape.half_y);
    let y_bytes = tensor_bytes(&[y_rows], y_elem);
    call.tensor("y", ops.y, y_bytes, y_elem)?;
    call.require(
        tiles < 1 << 31,
        "tiles",
        tiles,
        "they must be fewer than 2^31",
    )?;
    call.dim("rows", rows)?;
    call.dim("cols", cols)?;
    let flags = match shape.epilogue {
        Epilogue::Store => 0,
        Epilogue::Add => FLAG_ACCUMULATE,
        Epilogue::SwiGlu => FLAG_SWIGLU,
    } | if ops.zeros { FLAG_ZEROS } else { 0 };
    let bytes = block_bytes(device, shape, mins, warps);
    let launch = Launch {
        grid: [tiling.blocks, 1, 1],
        block: [32, tiling.split, tiling.teams],
        shared_bytes: bytes.min(u64::from(u32::MAX)) as u32,
    };
    call.dim("row_tiles", shape.row_tiles())?;
    call.dim("depth_tiles", shape.depth_tiles())?;
    call.f32(shape.eps);
    call.u32(flags | if shape.half_y { FLAG_HALF_Y } else { 0 });
    call.waits();
    if let Some((heads, ops)) = heads {
        heads.add(&mut call, ops)?;
    }
    call.build(device, launch)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOPPER: DeviceInfo = DeviceInfo {
        multiprocessors: 132,
        shared_bytes_per_block: 227 * 1024,
        compute_capability: 90,
        warpgroup_products: false,
    };

    fn of(rows: usize, cols: usize) -> [u32; 3] {
        let Tiling {
            split,
            teams,
            blocks,
        } = rule(&HOPPER, &Shape::plain(rows, cols, 128));
        [split, teams, blocks]
    }

    #[test]
    fn every_multiprocessor_has_its_share_in_flight() {
        assert_eq!(of(1536, 1536), [12, 1, 96]);
        assert_eq!(of(2048, 2048), [8, 1, 128]);
        assert_eq!(of(2560, 2048), [6, 2, 132]);
        assert_eq!(of(8960, 1536), [3, 5, 132]);
        assert_eq!(of(1536, 8960), [14, 1, 132]);
        assert_eq!(of(4096, 4096), [8, 2, 132]);
        assert_eq!(of(14_336, 4096), [8, 2, 132]);
        assert_eq!(of(4096, 14_336), [16, 1, 132]);
        assert_eq!(of(151_936, 1536), [3, 5, 132]);
        assert_eq!(of(1, 32), [1, 1, 1]);
    }

    #[test]
    fn a_block_is_never_too_large() {
        for (rows, cols) in [
            (1, 32),
            (17, 160),
            (896, 4864),
            (1 << 20, 64),
            (96, 1 << 20),
        ] {
            for device in [HOPPER, DeviceInfo::T4] {
                let tiling = rule(&device, &Shape::plain(rows, cols, 32));
                assert!((1..=16).contains(&(tiling.split * tiling.teams)));
                assert!(tiling.blocks >= 1);
            }
        }
    }

    fn operands() -> Operands {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 1 << 20,
        };
        Operands {
            quants: slice,
            scales: slice,
            mins: DeviceSlice::NONE,
            zeros: false,
            bias: DeviceSlice::NONE,
            x: slice,
            gain: DeviceSlice::NONE,
            y: slice,
        }
    }

    #[test]
    fn shapes_that_the_kernel_cannot_take_are_refused() {
        let good = Shape::plain(100, 1024, 64);
        let plan = |shape: Shape, ops: Operands| plan(&HOPPER, &shape, &ops, None);
        let call = plan(good, operands()).unwrap();
        assert_eq!(call.kernel, "linear_gemv_int4_mma_g64");
        assert!(plan(Shape { cols: 1000, ..good }, operands()).is_err());
        assert!(plan(Shape { group: 16, ..good }, operands()).is_err());
        assert!(plan(Shape { group: 0, ..good }, operands()).is_err());
        assert!(
            plan(
                Shape {
                    rows: usize::MAX,
                    ..good
                },
                operands()
            )
            .is_err()
        );
        let gated = Shape {
            epilogue: Epilogue::SwiGlu,
            ..good
        };
        let with_bias = Operands {
            bias: operands().x,
            ..operands()
        };
        assert!(plan(gated, operands()).is_ok());
        assert!(plan(gated, with_bias).is_err());
        let zeros = |mins| Operands {
            zeros: true,
            mins,
            ..operands()
        };
        assert!(plan(good, zeros(operands().scales)).is_ok());
        assert!(plan(good, zeros(DeviceSlice::NONE)).is_err());
        // 1024 x 1024 of INT4 with padding is half a mebibyte; a row tile more is too long.
        assert!(plan(Shape::plain(2048, 1024, 64), operands()).is_ok());
        assert!(plan(Shape::plain(2064, 1024, 64), operands()).is_err());
    }

    #[test]
    fn shared_memory_fits_at_the_limits() {
        let huge = DeviceSlice {
            address: 0x1000,
            bytes: 1 << 40,
        };
        let ops = Operands {
            quants: huge,
            scales: huge,
            mins: huge,
            x: huge,
            y: huge,
            ..operands()
        };
        for (rows, cols) in [(1536, 8960), (4096, 18_944), (64, 32)] {
            let shape = Shape::plain(rows, cols, 32);
            let call = plan(&DeviceInfo::T4, &shape, &ops, None).unwrap();
            assert!(call.launch.shared_bytes <= 64 * 1024, "{shape:?}");
        }
    }
}
