//! Shapes, operands and launches of `linear_gemm_int4`.

use super::super::gemv_int4_mma::Epilogue;
use super::block::{Stage, TILE_COLS, TILE_ROWS};
use super::{
    BY_WARPGROUPS, BY_WARPS, FLAG_ACCUMULATE, FLAG_HALF_Y, FLAG_SWIGLU, FLAG_ZEROS, Form,
    MAX_PARTS, warpgroup,
};
use crate::launch::{Call, CallBuilder, DeviceInfo, DeviceSlice, Launch, ShapeError, tensor_bytes};
use crate::tuned::Launches;

/// Tiles of y that may be split along K: each has a counter.
const MAX_SPLIT_TILES: usize = 1024;
/// Bytes of the counters, before the partial sums.
const COUNTER_BYTES: u64 = 4 * MAX_SPLIT_TILES as u64;

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

    fn row_tiles(&self) -> usize {
        self.rows.div_ceil(match self.epilogue {
            Epilogue::SwiGlu => TILE_ROWS as usize / 2,
            Epilogue::Store | Epilogue::Add => TILE_ROWS as usize,
        })
    }

    fn row_blocks(&self, block_rows: u32) -> usize {
        self.row_tiles()
            .div_ceil((block_rows / TILE_ROWS).max(1) as usize)
    }

    fn depth_tiles(&self) -> usize {
        self.cols.div_ceil(TILE_COLS as usize)
    }

    /// Tiles of the matrix.
    pub fn tiles(&self) -> usize {
        self.row_tiles().saturating_mul(self.depth_tiles())
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
    /// Rows of the matrix a tile: 128, or 256 where there are 128 tokens.
    pub rows: u32,
    /// Tokens a tile: 8, 16, 32 or 64; 128 with `wgmma`.
    pub tokens: u32,
    /// Blocks that share the work along K: of every tile, or, by warpgroups, of the tiles that are left when
    /// each multiprocessor has had as many as all can have.
    pub parts: u32,
}

impl Launches for Tiling {
    const NAMES: &'static [&'static str] = &["rows", "tokens", "parts"];

    fn numbers(&self) -> Vec<u32> {
        vec![self.rows, self.tokens, self.parts]
    }

    fn of(numbers: &[u32]) -> Option<Tiling> {
        let &[rows, tokens, parts] = numbers else {
            return None;
        };
        Some(Tiling {
            rows,
            tokens,
            parts,
        })
    }
}

impl Tiling {
    fn tiles(&self, shape: &Shape) -> usize {
        let token_tiles = shape.tokens.div_ceil(self.tokens.max(1) as usize);
        shape.row_blocks(self.rows).saturating_mul(token_tiles)
    }

    /// Tiles that a block has alone, and tiles that several share.
    fn whole_and_split(&self, device: &DeviceInfo, shape: &Shape) -> (usize, usize) {
        let tiles = self.tiles(shape);
        let left = match self.form() {
            _ if self.parts < 2 => 0,
            Some(form) if form.warpgroups => tiles % device.multiprocessors.max(1) as usize,
            _ => tiles,
        };
        (tiles - left, left)
    }

    /// Bytes of [`Operands::scratch`].
    pub fn scratch_bytes(&self, device: &DeviceInfo, shape: &Shape) -> u64 {
        let (_, split) = self.whole_and_split(device, shape);
        if split == 0 {
            return 0;
        }
        let tile = self.rows as usize * self.tokens as usize;
        let parts = self.parts as usize;
        COUNTER_BYTES.saturating_add(tensor_bytes(&[split, parts, tile], 4))
    }

    fn form(&self) -> Option<&'static Form> {
        let mut forms = BY_WARPS.iter().chain(BY_WARPGROUPS);
        forms.find(|form| (form.rows, form.tokens) == (self.rows, self.tokens))
    }
}

impl Form {
    fn tiling(&self, parts: u32) -> Tiling {
        Tiling {
            rows: self.rows,
            tokens: self.tokens,
            parts,
        }
    }

    /// Shared memory of a block. Where copies are not asynchronous, one stage is all.
    fn shared_bytes(&self, device: &DeviceInfo, group: usize, mins: bool) -> u32 {
        let shift = group.max(1).trailing_zeros();
        let stage = if self.warpgroups {
            warpgroup::stage(self.rows / TILE_ROWS, self.tokens, shift, mins)
        } else {
            Stage::new(self.rows / TILE_ROWS, self.tokens, shift, mins)
        };
        match device.compute_capability {
            80.. => self.stages * stage.bytes,
            _ => stage.bytes,
        }
    }

    /// Whether a block of the device has room for it, whatever the format.
    fn runs_on(&self, device: &DeviceInfo) -> bool {
        self.shared_bytes(device, 32, true) <= device.shared_bytes_per_block
            && (device.warpgroup_products || !self.warpgroups)
    }
}

/// The entry of a tiling, the first if there is no such form.
pub fn entry(tiling: &Tiling, mins: bool) -> &'static str {
    let form = tiling.form().unwrap_or(&BY_WARPS[0]);
    form.entries[usize::from(mins)]
}

/// Whether only tiers with `wgmma` have the kernel.
pub fn needs_warpgroup_products(kernel: &str) -> bool {
    let mut entries = BY_WARPGROUPS.iter().flat_map(|form| form.entries);
    entries.any(|entry| entry == kernel)
}

/// The forms that a device has room for, whatever the format: narrowest first.
fn forms(device: &DeviceInfo) -> impl Iterator<Item = &'static Form> {
    let all = BY_WARPS.iter().chain(BY_WARPGROUPS);
    all.filter(|form| form.runs_on(device))
}

/// The tiling for a shape: up to 64 tokens the narrowest tile that takes all of them, beyond that by
/// warpgroups what is done first, or else the widest tile; parts by what the busiest multiprocessor then
/// has to do.
pub fn rule(device: &DeviceInfo, shape: &Shape) -> Tiling {
    let quickest = |form: &Form| {
        let most = shape.depth_tiles().clamp(1, MAX_PARTS as usize) as u32;
        let takes = |tiling: &Tiling| tiling.takes(device, shape);
        let tilings = (1..=most).map(|parts| form.tiling(parts)).filter(takes);
        let of = |tiling: Tiling| (form.cost(device, &tiling, shape), tiling);
        tilings.map(of).min_by_key(|(cost, _)| *cost)
    };
    let many = shape.tokens > 64;
    let by_warpgroups = forms(device).filter(|form| many && form.warpgroups);
    if let Some((_, tiling)) = by_warpgroups
        .filter_map(quickest)
        .min_by_key(|(cost, _)| *cost)
    {
        return tiling;
    }
    // Two tiles of 32 rather than one of 64.
    let fits = |form: &&Form| {
        form.tokens as usize >= shape.tokens || form.tokens == 32 && shape.tokens <= 64
    };
    let by_warps = || forms(device).filter(|form| !form.warpgroups);
    let form = by_warps()
        .find(fits)
        .or_else(|| by_warps().last())
        .unwrap_or(&BY_WARPS[0]);
    quickest(form).map_or(form.tiling(1), |(_, tiling)| tiling)
}

impl Form {
    /// What the busiest multiprocessor has to do; units of forms by warps and by warpgroups differ.
    fn cost(&self, device: &DeviceInfo, tiling: &Tiling, shape: &Shape) -> u64 {
        let depth = shape.depth_tiles().min(u32::MAX as usize) as u64;
        let parts = u64::from(tiling.parts);
        let multiprocessors = u64::from(device.multiprocessors.max(1));
        let (whole, split) = tiling.whole_and_split(device, shape);
        let waves = |blocks: u64| blocks.div_ceil(multiprocessors);
        if self.warpgroups {
            // Hundredths of a microsecond on an H100 (2026-11-24): a stage, the start and the end of a block,
            // and the sums of its parts.
            let [stage, ends, sums, part] = match self.rows {
                128 => [93, 325, 100, 50],
                _ => [158, 345, 600, 0],
            };
            let shared = stage * depth.div_ceil(parts) + ends + sums + part * parts;
            let blocks = waves(split as u64 * parts);
            return waves(whole as u64) * (stage * depth + ends) + blocks * shared;
        }
        // Stages of a block, and about two for its start and its sums.
        let block = 10 * depth / parts + 20;
        // A block by itself takes as long as 1.4 that share a multiprocessor.
        match waves((tiling.tiles(shape).min(u32::MAX as usize) as u64).saturating_mul(parts)) {
            0 | 1 => 14 * block,
            waves => waves * 10 * block,
        }
    }
}

/// The rule's tiling, then every other that is worth a try.
pub fn candidates(device: &DeviceInfo, shape: &Shape) -> Vec<Tiling> {
    let mut found = vec![rule(device, shape)];
    // Narrower tiles read the weights again and again, wider ones work for tokens that are not there.
    let suits = |form: &&Form| {
        let tokens = form.tokens as usize;
        tokens >= shape.tokens.min(32) && tokens < 2 * shape.tokens.max(8)
    };
    for form in forms(device).filter(suits) {
        let parts = 1..=MAX_PARTS.min(shape.depth_tiles().max(1) as u32);
        let tilings: Vec<_> = parts
            .map(|parts| form.tiling(parts))
            .filter(|tiling| tiling.takes(device, shape))
            .map(|tiling| (form.cost(device, &tiling, shape), tiling))
            .collect();
        let least = tilings.iter().map(|(cost, _)| *cost).min().unwrap_or(0);
        let near = tilings.iter().filter(|(cost, _)| 2 * cost <= 3 * least);
        found.extend(near.map(|(_, tiling)| *tiling));
    }
    let mut seen = Vec::new();
    found.retain(|tiling| {
        let new = !seen.contains(tiling);
        seen.push(*tiling);
        new
    });
    found
}

impl Tiling {
    /// Whether the device and the shape take it, and the blocks that share tiles are no more than
    /// [`most_scratch_bytes`] has room for.
    pub fn takes(&self, device: &DeviceInfo, shape: &Shape) -> bool {
        let depth = shape.depth_tiles().max(1);
        let parts = 1..=depth.min(MAX_PARTS as usize);
        if !self.form().is_some_and(|form| form.runs_on(device))
            || !parts.contains(&(self.parts as usize))
        {
            return false;
        }
        let (_, split) = self.whole_and_split(device, shape);
        let blocks = split.saturating_mul(self.parts as usize);
        let most = 4 * device.multiprocessors as usize;
        self.parts == 1
            || blocks <= most && self.scratch_bytes(device, shape) <= most_scratch_bytes(device)
    }
}

/// As many bytes of [`Operands::scratch`] as the rule's tiling of any shape needs: for four blocks of 128
/// rows by 64 tokens a multiprocessor, or one of 256 by 128.
pub fn most_scratch_bytes(device: &DeviceInfo) -> u64 {
    COUNTER_BYTES + u64::from(device.multiprocessors) * 4 * (128 * 64 * 4)
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
    let mut call = CallBuilder::new(entry(&tiling, ops.mins != DeviceSlice::NONE));
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
    let form = tiling
        .form()
        .filter(|form| !form.warpgroups || device.warpgroup_products);
    let Some(form) = form else {
        call.require(
            false,
            "tile",
            tiling.tokens as usize,
            "it must be 128 rows by 8, 16, 32 or 64 tokens, or, with wgmma, 128 or 256 by 128",
        )?;
        unreachable!("refused above");
    };
    let depth_tiles = shape.depth_tiles();
    let parts = tiling.parts as usize;
    call.require(
        (1..=depth_tiles.min(MAX_PARTS as usize)).contains(&parts),
        "parts",
        parts,
        "there must be a tile along K for each, and at most 12",
    )?;
    let (whole, split) = tiling.whole_and_split(device, shape);
    if form.warpgroups && split > 0 {
        call.blocks_meet();
    }
    call.require(
        split <= MAX_SPLIT_TILES,
        "tiles",
        split,
        "they must be at most 1024 where K is split",
    )?;

    let mins = ops.mins != DeviceSlice::NONE;
    call.require(
        mins || !ops.zeros,
        "zeros",
        group,
        "they are in the place of minima, and there are none",
    )?;
    let tiles = shape.tiles();
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
    if split > 0 {
        let need = tiling.scratch_bytes(device, shape);
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
    call.u32(if form.warpgroups { whole as u32 } else { 0 });
    call.u32(tiling.parts);
    let blocks = whole.saturating_add(split.saturating_mul(parts));
    call.require(
        blocks < 1 << 31,
        "blocks",
        blocks,
        "they must be fewer than 2^31",
    )?;
    let launch = Launch {
        grid: if form.warpgroups {
            [blocks as u32, 1, 1]
        } else {
            [
                tokens.div_ceil(tiling.tokens as usize) as u32,
                shape.row_blocks(form.rows).min(u32::MAX as usize) as u32,
                tiling.parts,
            ]
        },
        block: [form.threads, 1, 1],
        shared_bytes: form.shared_bytes(device, group, mins),
    };
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

    #[test]
    fn the_rule_takes_what_was_fastest() {
        let of = |rows, cols, tokens| {
            let Tiling { tokens, parts, .. } =
                rule(&HOPPER, &Shape::plain(rows, cols, 128, tokens));
            [tokens, parts]
        };
        assert_eq!(of(1536, 8960, 8), [8, 11]);
        assert_eq!(of(4096, 4096, 16), [16, 8]);
        assert_eq!(of(4096, 4096, 64), [32, 4]);
        assert_eq!(of(1536, 8960, 64), [32, 11]);
        assert_eq!(of(4096, 4096, 128), [64, 4]);
        assert_eq!(of(1536, 8960, 512), [64, 4]);
        assert_eq!(of(2048, 1536, 512), [64, 2]);
        assert_eq!(of(17_920, 1536, 512), [64, 1]);
        assert_eq!(of(1, 32, 1), [8, 1]);
    }

    #[test]
    fn by_warpgroups_the_rule_takes_what_was_fastest() {
        let of = |rows, cols, tokens| {
            let shape = Shape::plain(rows, cols, 128, tokens);
            let tiling = rule(&DeviceInfo::H100, &shape);
            [tiling.rows, tiling.tokens, tiling.parts]
        };
        assert_eq!(of(4096, 4096, 64), [128, 32, 4]);
        assert_eq!(of(2048, 1536, 128), [128, 128, 4]);
        assert_eq!(of(4096, 4096, 128), [128, 128, 4]);
        assert_eq!(of(4096, 4096, 512), [128, 128, 1]);
        assert_eq!(of(2048, 1536, 512), [128, 128, 2]);
        assert_eq!(of(1536, 8960, 512), [256, 128, 5]);
        assert_eq!(of(17_920, 1536, 512), [256, 128, 6]);
        assert_eq!(of(4096, 4096, 2048), [256, 128, 1]);
    }

    #[test]
    fn every_tiling_of_the_rule_can_be_planned_with_the_scratch_of_all() {
        for device in [HOPPER, DeviceInfo::H100, DeviceInfo::T4] {
            let slice = |bytes| DeviceSlice {
                address: 0x1000,
                bytes,
            };
            let huge = slice(1 << 40);
            for (rows, cols) in [(1536, 8960), (17, 32), (4096, 14_336), (151_936, 896)] {
                for tokens in [1, 8, 33, 64, 65, 512, 4096] {
                    let ops = Operands {
                        quants: huge,
                        scales: huge,
                        mins: huge,
                        zeros: false,
                        bias: DeviceSlice::NONE,
                        x: huge,
                        y: huge,
                        scratch: slice(most_scratch_bytes(&device)),
                    };
                    let shape = Shape::plain(rows, cols, 32, tokens);
                    let call = plan(&device, &shape, &ops, None);
                    assert!(call.is_ok(), "{shape:?}: {call:?}");
                }
            }
        }
    }

    #[test]
    fn shapes_that_the_kernels_cannot_take_are_refused() {
        let slice = DeviceSlice {
            address: 0x1000,
            bytes: 1 << 20,
        };
        let ops = Operands {
            quants: slice,
            scales: slice,
            mins: DeviceSlice::NONE,
            zeros: false,
            bias: DeviceSlice::NONE,
            x: slice,
            y: slice,
            scratch: DeviceSlice::NONE,
        };
        let good = Shape::plain(64, 1024, 64, 9);
        let whole = Tiling {
            rows: 128,
            tokens: 16,
            parts: 1,
        };
        let plan = |shape: Shape, ops: Operands, tiling| plan(&HOPPER, &shape, &ops, Some(tiling));
        assert_eq!(
            plan(good, ops, whole).unwrap().kernel,
            "linear_gemm_int4_t16"
        );
        let refused = |shape: Shape| assert!(plan(shape, ops, whole).is_err(), "{shape:?}");
        refused(Shape { cols: 1000, ..good });
        refused(Shape { group: 16, ..good });
        refused(Shape { tokens: 0, ..good });
        refused(Shape {
            tokens: 1 << 20,
            ..good
        });
        let adds = Shape {
            epilogue: Epilogue::Add,
            half_y: true,
            ..good
        };
        refused(adds);
        // No scratch for the parts, more parts than tiles along K, a tile that is not there.
        let parts = |parts| Tiling { parts, ..whole };
        assert!(plan(good, ops, parts(2)).is_err());
        let with_scratch = Operands {
            scratch: slice,
            ..ops
        };
        assert!(plan(good, with_scratch, parts(2)).is_ok());
        assert!(plan(good, with_scratch, parts(9)).is_err());
        let tokens = |tokens| Tiling { tokens, ..whole };
        assert!(plan(good, ops, tokens(12)).is_err());
        let zeros = Operands { zeros: true, ..ops };
        assert!(plan(good, zeros, whole).is_err());
    }
}
