//! Shapes, operands and launches of `linear_gemm_int4`.

use super::super::gemv_int4_mma::Epilogue;
use super::block::{Form, Stage, TILE_COLS, TILE_ROWS};
use super::{
    BLOCK_ROWS, BLOCK_THREADS, FLAG_ACCUMULATE, FLAG_HALF_Y, FLAG_SWIGLU, FLAG_ZEROS, FORMS,
};
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::tuned::Launches;

/// Every entry.
pub const ENTRIES: [&str; FORMS.len()] = {
    let mut names = [""; FORMS.len()];
    let mut i = 0;
    while i < FORMS.len() {
        names[i] = FORMS[i].1;
        i += 1;
    }
    names
};

/// Tiles of y that may be split along K: each has a counter.
const MAX_SPLIT_TILES: usize = 1024;
/// Bytes of the counters, before the partial sums.
const COUNTER_BYTES: u64 = 4 * MAX_SPLIT_TILES as u64;
/// Most parts of K.
const MAX_PARTS: u32 = 64;

/// Dimensions of the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// N: rows of y. With [`Epilogue::SwiGlu`] the matrix has twice as many.
    pub rows: usize,
    /// K, a multiple of 32.
    pub cols: usize,
    /// Weights that share a scale: 32, 64 or 128; the last group of a row may be short.
    pub group: usize,
    /// T.
    pub tokens: usize,
    /// What becomes of the products.
    pub epilogue: Epilogue,
    /// y are halves. Not where it is added to.
    pub half_y: bool,
}

impl Shape {
    /// Nothing after the product.
    pub fn plain(rows: usize, cols: usize, group: usize, tokens: usize) -> Shape {
        Shape {
            rows,
            cols,
            group,
            tokens,
            epilogue: Epilogue::Store,
            half_y: false,
        }
    }

    /// The shape as the table of tuned launches names it.
    pub fn name(&self) -> String {
        let Shape { rows, cols, .. } = self;
        format!("{rows}x{cols} {} tokens", self.tokens)
    }

    fn row_tiles(&self) -> usize {
        self.rows.div_ceil(match self.epilogue {
            Epilogue::SwiGlu => TILE_ROWS as usize / 2,
            Epilogue::Store | Epilogue::Add => TILE_ROWS as usize,
        })
    }

    fn row_blocks(&self) -> usize {
        self.row_tiles().div_ceil((BLOCK_ROWS / TILE_ROWS) as usize)
    }

    fn depth_tiles(&self) -> usize {
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
    /// `(T, K)` f16.
    pub x: DeviceSlice,
    /// `(T, N)` f32, or f16 with [`Shape::half_y`].
    pub y: DeviceSlice,
    /// [`scratch_bytes`], zeros before the first launch; every launch leaves what has to be zero so.
    /// Launches that do not overlap can share it. None where K is not split.
    pub scratch: DeviceSlice,
}

/// How y is cut into tiles, and K into parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// Tokens a tile: 8, 16, 32, 64 or 128.
    pub tokens: u32,
    /// Blocks that share the work along K.
    pub parts: u32,
}

impl Launches for Tiling {
    const NAMES: &'static [&'static str] = &["tokens", "parts"];

    fn numbers(&self) -> Vec<u32> {
        vec![self.tokens, self.parts]
    }

    fn of(numbers: &[u32]) -> Option<Tiling> {
        let &[tokens, parts] = numbers else {
            return None;
        };
        Some(Tiling { tokens, parts })
    }
}

impl Tiling {
    fn tiles(&self, shape: &Shape) -> usize {
        let token_tiles = shape.tokens.div_ceil(self.tokens.max(1) as usize);
        shape.row_blocks().saturating_mul(token_tiles)
    }

    /// Bytes of [`Operands::scratch`].
    pub fn scratch_bytes(&self, shape: &Shape) -> u64 {
        if self.parts < 2 {
            return 0;
        }
        let tile = (BLOCK_ROWS * self.tokens) as usize;
        let parts = self.parts as usize;
        COUNTER_BYTES.saturating_add(tensor_bytes(&[self.tiles(shape), parts, tile], 4))
    }
}

/// Shared memory of a block. Where copies are not asynchronous, one stage is all.
fn shared_bytes(device: &DeviceInfo, tokens: u32, under_way: u32, group: usize, mins: bool) -> u32 {
    let shift = group.max(1).trailing_zeros();
    let stages = if device.compute_capability >= 80 {
        under_way + 2
    } else {
        1
    };
    stages * Stage::new(tokens, shift, mins).bytes
}

fn form(tokens: u32) -> Option<&'static (u32, &'static str, Form, u32)> {
    FORMS.iter().find(|form| form.0 == tokens)
}

/// The entry for tiles of so many tokens, the widest if there is none.
pub fn entry(tokens: u32) -> &'static str {
    form(tokens).map_or(ENTRIES[FORMS.len() - 1], |form| form.1)
}

/// Widths that a block of the device has room for, whatever the format: narrowest first.
fn widths(device: &DeviceInfo) -> impl Iterator<Item = u32> {
    let most = device.shared_bytes_per_block;
    FORMS
        .iter()
        .filter(move |form| shared_bytes(device, form.0, form.3, 32, true) <= most)
        .map(|form| form.0)
}

/// The tiling for a shape: the narrowest tile that takes all tokens, or the widest; parts where tiles
/// leave multiprocessors idle.
pub fn rule(device: &DeviceInfo, shape: &Shape) -> Tiling {
    let fits = |tokens: &u32| *tokens as usize >= shape.tokens;
    let tokens = widths(device)
        .find(fits)
        .or_else(|| widths(device).last())
        .unwrap_or(FORMS[0].0);
    let whole = Tiling { tokens, parts: 1 };
    let tiles = whole.tiles(shape).clamp(1, u32::MAX as usize) as u32;
    let depth = shape.depth_tiles().min(u32::MAX as usize) as u32;
    let parts = (places(device, tokens) / tiles).clamp(1, depth.clamp(1, MAX_PARTS));
    Tiling { tokens, parts }
}

/// The rule's tiling, then every other that is worth a try.
pub fn candidates(device: &DeviceInfo, shape: &Shape) -> Vec<Tiling> {
    let mut found = vec![rule(device, shape)];
    for tokens in widths(device) {
        let whole = Tiling { tokens, parts: 1 };
        for parts in 1..=MAX_PARTS.min(shape.depth_tiles().max(1) as u32) {
            let tiling = Tiling { tokens, parts };
            let blocks = whole.tiles(shape) as u64 * u64::from(parts);
            let few = parts == 1 || blocks <= 4 * u64::from(device.multiprocessors);
            let narrow = u64::from(tokens) >= 2 * shape.tokens as u64;
            if few && !narrow && !found.contains(&tiling) {
                found.push(tiling);
            }
        }
    }
    found
}

/// As many bytes of [`Operands::scratch`] as the rule's tiling of any shape needs.
pub fn most_scratch_bytes(device: &DeviceInfo) -> u64 {
    // The rule splits K only as far as there are places for blocks.
    let sums = |tokens: u32| {
        let block = u64::from(BLOCK_ROWS * tokens) * 4;
        u64::from(places(device, tokens)) * block
    };
    COUNTER_BYTES + widths(device).map(sums).max().unwrap_or(0)
}

/// Blocks of this width that the rule wants at a time. Narrow ones wait for memory: two a
/// multiprocessor have more in flight.
fn places(device: &DeviceInfo, tokens: u32) -> u32 {
    device.multiprocessors * if tokens <= 64 { 2 } else { 1 }
}

/// The launch of `linear_gemm_int4_*`, with the tiling of [`rule`] or another.
///
/// # Errors
/// A K that is no multiple of 32, an unsupported group, a bias with [`Epilogue::SwiGlu`], halves that
/// are added to, a tiling that the kernels do not have, a short or misaligned buffer.
pub fn plan(
    device: &DeviceInfo,
    shape: &Shape,
    ops: &Operands,
    tiling: Option<Tiling>,
) -> Result<Call, ShapeError> {
    let &Shape {
        rows,
        cols,
        group,
        tokens,
        ..
    } = shape;
    let tiling = tiling.unwrap_or_else(|| rule(device, shape));
    let mut call = CallBuilder::new(entry(tiling.tokens));
    call.waits();
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
    let swiglu = shape.epilogue == Epilogue::SwiGlu;
    call.require(
        !swiglu || ops.bias == DeviceSlice::NONE,
        "bias",
        rows,
        "SwiGLU takes none",
    )?;
    let adds = shape.epilogue == Epilogue::Add;
    call.require(
        !shape.half_y || !adds,
        "half_y",
        tokens,
        "halves are not added to",
    )?;
    let Some((_, _, _, under_way)) = form(tiling.tokens) else {
        call.require(
            false,
            "tile",
            tiling.tokens as usize,
            "it must be 8, 16, 32, 64 or 128 tokens",
        )?;
        unreachable!("refused above");
    };
    let depth_tiles = shape.depth_tiles();
    let parts = tiling.parts as usize;
    call.require(
        (1..=depth_tiles.min(MAX_PARTS as usize)).contains(&parts),
        "parts",
        parts,
        "there must be a tile along K for each, and at most 64",
    )?;
    call.require(
        parts == 1 || tiling.tiles(shape) <= MAX_SPLIT_TILES,
        "tiles",
        tiling.tiles(shape),
        "they must be at most 1024 where K is split",
    )?;

    let mins = ops.mins != DeviceSlice::NONE;
    call.require(
        mins || !ops.zeros,
        "zeros",
        group,
        "they are in the place of minima, and there are none",
    )?;
    let tiles = shape.row_tiles().saturating_mul(depth_tiles);
    let per_tile = 2 * (TILE_ROWS * TILE_COLS) as usize / group;
    let scale_bytes = tensor_bytes(&[tiles, per_tile], 1);
    let tile_bytes = (TILE_ROWS * TILE_COLS / 2) as usize;
    let quant_bytes = tensor_bytes(&[tiles, tile_bytes], 1);
    call.tensor("quants", ops.quants, quant_bytes, 16)?;
    call.tensor("scales", ops.scales, scale_bytes, 16)?;
    call.optional("mins", ops.mins, scale_bytes, 16)?;
    call.optional("bias", ops.bias, tensor_bytes(&[rows], 4), 4)?;
    call.tensor("x", ops.x, tensor_bytes(&[tokens, cols], 2), 16)?;
    let y_elem = if shape.half_y { 2 } else { 4 };
    call.tensor("y", ops.y, tensor_bytes(&[tokens, rows], y_elem), y_elem)?;
    if parts > 1 {
        let need = tiling.scratch_bytes(shape);
        let counters = ops.scratch;
        let sums = DeviceSlice {
            address: counters.address + COUNTER_BYTES,
            bytes: counters.bytes.saturating_sub(COUNTER_BYTES),
        };
        call.tensor("scratch", sums, need - COUNTER_BYTES, 16)?;
        call.tensor("scratch", counters, need, 16)?;
    } else {
        call.optional("scratch", DeviceSlice::NONE, 0, 16)?;
        call.optional("scratch", DeviceSlice::NONE, 0, 16)?;
    }
    call.dim("rows", rows)?;
    call.dim("cols", cols)?;
    call.dim("tokens", tokens)?;
    call.dim("row_tiles", shape.row_tiles())?;
    call.dim("depth_tiles", depth_tiles)?;
    call.require(
        tiles < 1 << 31,
        "tiles",
        tiles,
        "they must be fewer than 2^31",
    )?;
    call.u32(group.trailing_zeros());
    let flags = match shape.epilogue {
        Epilogue::Store => 0,
        Epilogue::Add => FLAG_ACCUMULATE,
        Epilogue::SwiGlu => FLAG_SWIGLU,
    } | if ops.zeros { FLAG_ZEROS } else { 0 };
    call.u32(flags | if shape.half_y { FLAG_HALF_Y } else { 0 });
    let launch = Launch {
        grid: [
            tokens.div_ceil(tiling.tokens as usize) as u32,
            shape.row_blocks().min(u32::MAX as usize) as u32,
            tiling.parts,
        ],
        block: [BLOCK_THREADS, 1, 1],
        shared_bytes: shared_bytes(device, tiling.tokens, *under_way, group, mins),
    };
    call.build(device, launch)
}
