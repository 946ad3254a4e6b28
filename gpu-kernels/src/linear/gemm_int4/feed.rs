//! The copies that bring a block its stages.

use cuda_std::shared::Shared;

use super::block::{Args, COPY_BYTES, Stage, TILE_COLS, TILE_WORDS, Work, scale_bytes};
use crate::ptx;
use crate::unroll::unroll;

/// What a thread of a block of `THREADS` copies to each stage, and how far it has come. Activations of a
/// token are `ROW_BYTES` from those of the next.
#[derive(Clone, Copy)]
pub(super) struct Feed<const THREADS: u32, const ROW_BYTES: u32> {
    /// 16 bytes of a tile of the matrix; those of other row tiles are `words_step` words apart.
    words: *const u32,
    words_step: usize,
    row_tile: u32,
    /// 16 bytes of a token's activations; other tokens are `x_step` words apart.
    x: *const u32,
    x_step: usize,
    /// The first of the thread's tokens, of its block.
    token: u32,
    /// Eight columns of 16 in a stage, and where the first of the thread's tokens has them in its x.
    eight: u32,
    x_at: u32,
    /// 16 bytes of the scales, and their distance from tile to tile.
    pair: usize,
    pair_step: usize,
    pairs_there: bool,
    /// Tile along K of the activations that come next.
    tile: u32,
}

impl<const THREADS: u32, const ROW_BYTES: u32> Feed<THREADS, ROW_BYTES> {
    /// Row tiles a block: a warp each.
    const TILES: u32 = THREADS / 32;
    /// Row tiles that a block's threads copy 16 bytes each of at a time.
    const COPY_TILES: u32 = THREADS * 4 / TILE_WORDS;
    /// Tokens that a block's threads copy 16 bytes of at a time: eights, whose rows are exchanged alike.
    const COPY_TOKENS: u32 = THREADS / 16;

    /// For blocks of `tokens` tokens. `x_offset` says where eight columns of
    /// a token lie in the x of a stage.
    #[inline(always)]
    pub fn new(
        args: &Args,
        work: &Work,
        thread: u32,
        tokens: u32,
        x_offset: impl Fn(u32, u32) -> u32,
    ) -> Self {
        let (tile, _) = work.depth(args);
        let first_tile = work.row_block * Self::TILES;
        let row_tile = first_tile + thread / (TILE_WORDS / 4);
        let at = |row_tile: u32| (row_tile * args.depth_tiles + tile) as usize;
        let within = (thread % (TILE_WORDS / 4) * 4) as usize;
        let (eight, first) = (thread % 16, thread / 16);
        let token = work.token_tile * tokens + first;
        let column = tile * TILE_COLS + eight * 8;
        let pair_words = (scale_bytes(args.group_shift) / 4) as usize;
        // 16-byte copies of a tile's scales: a power of two, 2 to 8.
        let shift = 8 - args.group_shift;
        let pair_tile = first_tile + (thread >> shift);
        let pair_within = ((thread & ((1 << shift) - 1)) * 4) as usize;
        Feed {
            words: args
                .quants
                .wrapping_add(at(row_tile) * TILE_WORDS as usize + within),
            words_step: (Self::COPY_TILES * TILE_WORDS) as usize * args.depth_tiles as usize,
            row_tile,
            x: args
                .x
                .wrapping_add((token as usize * args.cols as usize + column as usize) / 2),
            x_step: (Self::COPY_TOKENS / 2) as usize * args.cols as usize,
            token,
            eight,
            x_at: x_offset(first, eight),
            pair: at(pair_tile) * pair_words + pair_within,
            pair_step: pair_words,
            pairs_there: pair_tile < args.row_tiles,
            tile,
        }
    }

    /// Starts the copies of the next stage, of `tokens` tokens, to `at`.
    ///
    /// # Safety
    /// All threads of the block call it; nobody reads what was there.
    #[inline(always)]
    pub unsafe fn bring(
        &mut self,
        args: &Args,
        stage: &Stage,
        tokens: u32,
        thread: u32,
        base: Shared,
        at: u32,
    ) {
        // SAFETY: by the caller's promise.
        unsafe {
            self.bring_weights(args, stage, thread, base, at);
            self.bring_x(args, stage, tokens, thread, base, at);
        }
    }

    /// Starts the copies of the next stage's tiles of the matrix, scales and minima, which no launch writes.
    ///
    /// # Safety
    /// As [`Feed::bring`].
    #[inline(always)]
    pub unsafe fn bring_weights(
        &mut self,
        args: &Args,
        stage: &Stage,
        thread: u32,
        base: Shared,
        at: u32,
    ) {
        let own = at + thread * COPY_BYTES;
        // SAFETY: what is outside of the matrix is not read.
        unsafe {
            let mut words = self.words;
            unroll!(I < 2 => {
                let skip = I as u32 * Self::COPY_TILES;
                if skip < Self::TILES {
                    if I > 0 {
                        words = words.wrapping_add(self.words_step);
                    }
                    let there = self.row_tile + skip < args.row_tiles;
                    let to = own + I as u32 * THREADS * COPY_BYTES;
                    ptx::cp_async_16_or_zero(there, base, to, words);
                }
            });
            if thread < Self::TILES << (8 - args.group_shift) {
                let scales = args.scales.wrapping_add(self.pair);
                ptx::cp_async_16_or_zero(self.pairs_there, base, own + stage.scales, scales);
                if !args.mins.is_null() {
                    let mins = args.mins.wrapping_add(self.pair);
                    ptx::cp_async_16_or_zero(self.pairs_there, base, own + stage.mins, mins);
                }
            }
        }
        self.words = self.words.wrapping_add(TILE_WORDS as usize);
        self.pair += self.pair_step;
    }

    /// Starts the copies of the next stage's activations.
    ///
    /// # Safety
    /// As [`Feed::bring`].
    #[inline(always)]
    pub unsafe fn bring_x(
        &mut self,
        args: &Args,
        stage: &Stage,
        tokens: u32,
        thread: u32,
        base: Shared,
        at: u32,
    ) {
        let in_row = self.tile * TILE_COLS + self.eight * 8 < args.cols;
        let first = thread / 16;
        let to = at + stage.x + self.x_at;
        let mut x = self.x;
        // SAFETY: what is outside of x is not read.
        unsafe {
            unroll!(I < 8 => {
                let skip = I as u32 * Self::COPY_TOKENS;
                // Known when the kernel is compiled, but for eight tokens.
                if skip + Self::COPY_TOKENS <= tokens || first < tokens && I == 0 {
                    if I > 0 {
                        x = x.wrapping_add(self.x_step);
                    }
                    let there = in_row && self.token + skip < args.tokens;
                    ptx::cp_async_16_or_zero(there, base, to + skip * ROW_BYTES, x);
                }
            });
        }
        self.x = self.x.wrapping_add((TILE_COLS / 2) as usize);
        self.tile += 1;
    }
}
