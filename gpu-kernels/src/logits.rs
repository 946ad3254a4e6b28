//! Logits of one token and the greedy choice among them: `logits[v] = sum_d scale q[v, d] x[d]` over
//! the INT8 output matrix, the embedding table when tied, and `tokens[position + 1] = argmax`; or the
//! 64 greatest logits for a sampler, in [`top`], after a penalty for tokens that were seen.
//!
//! Shapes: quants `(V, D)` i8, scales `(V, ceil(D/group))` f16, x `(D,)`, logits `(V,)`.
//!
//! ```text
//! warp w of the grid -> rows 8w .. 8w + 8, then 8 times the grid's warps further, ...
//! span of 256        -> two sets of 128 columns, each two chunks of 64: 4 loads of 16 bytes a lane
//! lane (g, t)        -> g = lane / 4, t = lane % 4: row g, columns 16t .. +16 of each chunk
//! end of a row       -> the four lanes of g add up; each keeps its best
//! end of a block     -> lanes, then warps compare; one candidate a block
//! end of all         -> the last block compares the candidates, or selects the 64 greatest
//! ```
//!
//! The product is `mma.m16n8k16` with bytes turned into halves, which hold them exactly: a byte
//! lands in the mantissa of 1024, a packed subtraction takes `1024 + 128` off. x is given as the sum
//! of two halves, which keeps 22 bits; products are exact and sums single precision. A product's 16
//! rows are the 8 of the warp twice: rows 0..8 hold the first set's columns, 8..16 the second's.
//! Its 8 columns are x four times over, in high and low parts, zero but in one group of 32 of one
//! set: so one product gives the sums of four groups apart, and lane t finds that of group t % 2 of
//! set t / 2, ready for its scale.
//!
//! A lane has four spans in flight, across the ends of rows: nothing waits where a row ends. The
//! grid is two blocks a multiprocessor, all resident, so x is staged no more often.
//!
//! Bytes moved: `V D` quants, `2 V ceil(D/group)` scales, `4 D` of x a block from L2. Shared memory
//! holds x in the lanes' order; lanes whose operand is zero all read one place, four words past the
//! others' banks: no conflicts.

use cuda_std::shared::Shared;
use cuda_std::{kernel, shared, thread, warp};

use crate::arrive::last_to_arrive;
use crate::linear::groups_per_row;
use crate::product::{even_bytes_to_f16x2, mma_k16};
use crate::ptx;
use crate::sample::draw::setting;
use crate::sample::{BEST_BYTES, Best};
use crate::unroll::unroll;

#[cfg(not(target_arch = "nvptx64"))]
mod plan;
mod top;

#[cfg(not(target_arch = "nvptx64"))]
pub use plan::{Greedy, Operands, Shape, Top, kernel, plan, plan_top, scratch_bytes, top_kernel};

/// Warps a block.
const WARPS: u32 = 8;
/// Rows a warp has at a time.
const ROWS: u32 = 8;
/// Columns that a warp takes at a time.
const SPAN: u32 = 256;
/// Columns of a set.
const SET: u32 = 128;
/// Columns of a chunk: 16 a lane.
const CHUNK: u32 = 64;
/// Spans in flight.
const STAGES: usize = 4;
const _: () = assert!(STAGES == 4, "they are unrolled");
/// Bytes of shared memory that a chunk of x takes in both sets: two halves a column.
const CHUNK_BYTES: u32 = 2 * CHUNK * 4;

/// Where things lie in shared memory, in bytes: x, zeros, the warps' candidates, a flag.
#[derive(Clone, Copy)]
struct Layout {
    x_bytes: u32,
}

impl Layout {
    #[inline(always)]
    fn new(width: u32) -> Layout {
        Layout {
            x_bytes: width.div_ceil(SPAN) * SPAN * 4,
        }
    }

    /// Four columns from `4 quad` on: the operands of one word of weights, 8 bytes.
    #[inline(always)]
    fn x(quad: u32, part: u32) -> u32 {
        let (word, t) = (quad % 4, quad / 4 % 4);
        let (chunk, set) = (quad / 16 % 2, quad / 32 % 2);
        let span = quad / 64;
        (span * 2 + chunk) * CHUNK_BYTES + set * (CHUNK_BYTES / 2) + t * 64 + part * 32 + word * 8
    }

    /// 32 bytes of zeros, in the banks that lanes with an operand leave free.
    #[inline(always)]
    fn zeros(self) -> u32 {
        self.x_bytes + 16
    }

    #[inline(always)]
    fn candidate(self, warp: u32) -> u32 {
        self.x_bytes + 64 + warp * BEST_BYTES
    }

    #[inline(always)]
    fn flag(self) -> u32 {
        self.candidate(WARPS)
    }

    #[cfg(not(target_arch = "nvptx64"))]
    fn bytes(self) -> u32 {
        self.flag() + 4
    }
}

/// Turns x into halves in the order of the lanes, zeros past its end.
///
/// # Safety
/// All threads call it; `x` holds `width` floats; the caller puts a barrier before the first use.
#[inline(always)]
unsafe fn stage(x: *const f32, width: u32, smem: Shared, layout: Layout) {
    let mut quad = thread::thread_idx_x();
    while quad < layout.x_bytes / 16 {
        let mut v = [0.0; 4];
        if quad * 4 < width {
            // SAFETY: widths are multiples of 4.
            v = unsafe { ptx::ld_global_v4_f32(x.wrapping_add((quad * 4) as usize)) };
        }
        // A word's even bytes come first, then the odd ones.
        let high = [
            ptx::f32x2_to_f16x2(v[0], v[2]),
            ptx::f32x2_to_f16x2(v[1], v[3]),
        ];
        let rest = |v: f32, half: u32| v - ptx::f16_to_f32(half as u16);
        let low = [
            ptx::f32x2_to_f16x2(rest(v[0], high[0]), rest(v[2], high[0] >> 16)),
            ptx::f32x2_to_f16x2(rest(v[1], high[1]), rest(v[3], high[1] >> 16)),
        ];
        // SAFETY: the quad's places in the room for x.
        unsafe {
            ptx::st_shared_u32(smem, Layout::x(quad, 0), high[0]);
            ptx::st_shared_u32(smem, Layout::x(quad, 0) + 4, high[1]);
            ptx::st_shared_u32(smem, Layout::x(quad, 1), low[0]);
            ptx::st_shared_u32(smem, Layout::x(quad, 1) + 4, low[1]);
        }
        quad += WARPS * 32;
    }
    if thread::thread_idx_x() < 8 {
        // SAFETY: the zeros are 8 words.
        unsafe { ptx::st_shared_u32(smem, layout.zeros() + thread::thread_idx_x() * 4, 0) };
    }
}

/// The matrix, and where the lane stands in it.
#[derive(Clone, Copy)]
struct Matrix {
    quants: *const i8,
    scales: *const u16,
    rows: u32,
    cols: u32,
    group_shift: u32,
    /// Groups of a row.
    groups: u32,
    /// The lane's place.
    g: u32,
    t: u32,
}

/// A lane's share of a span: `words[set][chunk]`, and for each chunk the scale of the group whose
/// sum the lane gets, or the scale of the row. They stay as loaded: converting them waits for the
/// load.
#[derive(Clone, Copy)]
struct Stage {
    words: [[[u32; 4]; 2]; 2],
    scales: [u16; 2],
}

impl Matrix {
    /// The lane's row of an item, or the last there is.
    #[inline(always)]
    fn row(&self, item: u32) -> usize {
        (item * ROWS + self.g).min(self.rows - 1) as usize
    }

    /// What is past the end of a row is replaced by its last columns: x is 0 there.
    ///
    /// # Safety
    /// The buffers are as `plan` checked them.
    #[inline(always)]
    unsafe fn span<const BY_ROW: bool>(&self, item: u32, span: u32) -> Stage {
        let row = self.row(item);
        let quants = self.quants.wrapping_add(row * self.cols as usize);
        let mut stage = Stage {
            words: [[[0; 4]; 2]; 2],
            scales: [0; 2],
        };
        // SAFETY: row, column and group are clamped; rows are multiples of 16 bytes.
        unsafe {
            unroll!(S < 2 => {
                unroll!(C < 2 => {
                    let first = span * SPAN + S as u32 * SET + C as u32 * CHUNK + self.t * 16;
                    let col = first.min(self.cols - 16) as usize;
                    stage.words[S][C] = ptx::ld_global_nc_v4_u32(quants.wrapping_add(col).cast());
                });
            });
            if BY_ROW {
                stage.scales[0] = ptx::ld_global_nc_u16(self.scales.wrapping_add(row));
            } else {
                let scales = self.scales.wrapping_add(row * self.groups as usize);
                let (set, half) = (self.t / 2, self.t % 2);
                unroll!(C < 2 => {
                    let col = span * SPAN + set * SET + C as u32 * CHUNK + half * 32;
                    let group = (col >> self.group_shift).min(self.groups - 1) as usize;
                    stage.scales[C] = ptx::ld_global_nc_u16(scales.wrapping_add(group));
                });
            }
        }
        stage
    }
}

/// Adds a chunk's products to `sums`.
///
/// # Safety
/// `x` is the lane's operand of the chunk in shared memory.
#[inline(always)]
unsafe fn add_chunk<const CHUNK: usize>(
    sums: [f32; 4],
    stage: &Stage,
    smem: Shared,
    x: u32,
) -> [f32; 4] {
    let mut sums = sums;
    unroll!(P < 2 => {
        // SAFETY: by the caller's promise.
        let x = unsafe { ptx::ld_shared_v4_f32(smem, x + 16 * P as u32) }.map(f32::to_bits);
        unroll!(W < 2 => {
            let word = 2 * P + W;
            let words = [stage.words[0][CHUNK][word], stage.words[1][CHUNK][word]];
            let a = [
                even_bytes_to_f16x2(words[0]),
                even_bytes_to_f16x2(words[1]),
                even_bytes_to_f16x2(words[0] >> 8),
                even_bytes_to_f16x2(words[1] >> 8),
            ];
            sums = mma_k16(a, [x[2 * W], x[2 * W + 1]], sums);
        });
    });
    sums
}

/// What makes tokens that were seen less likely.
#[derive(Clone, Copy)]
struct Penalty {
    /// A byte eight rows, or null.
    seen: *const u8,
    /// What positive logits and others are multiplied by.
    factors: [f32; 2],
}

impl Penalty {
    /// # Safety
    /// The settings are there if `seen` is.
    #[inline(always)]
    unsafe fn load(seen: *const u8, settings: *const u32) -> Penalty {
        let mut factors = [1.0; 2];
        if !seen.is_null() {
            // SAFETY: by the caller's promise.
            factors = unsafe {
                [setting::INVERSE_PENALTY, setting::PENALTY]
                    .map(|at| f32::from_bits(ptx::ld_global_u32(settings.wrapping_add(at))))
            };
        }
        Penalty { seen, factors }
    }

    /// Which of an item's rows were seen.
    ///
    /// # Safety
    /// The item is one of the product's.
    #[inline(always)]
    unsafe fn of_item(&self, item: u32, items: u32) -> u8 {
        if self.seen.is_null() || item >= items {
            return 0;
        }
        // SAFETY: by the caller's promise.
        unsafe { ptx::ld_global_u8(self.seen.wrapping_add(item as usize)) }
    }

    #[inline(always)]
    fn on(&self, logit: f32, seen: bool) -> f32 {
        let [positive, other] = self.factors;
        let factor = if logit > 0.0 { positive } else { other };
        if seen { logit * factor } else { logit }
    }
}

/// The body: logits to their buffer if there is one; the best of the lane's rows. With `BY_ROW` a
/// row has one scale, which waits for its end.
///
/// # Safety
/// Launched as [`plan`] or [`plan_top`] says.
#[inline(always)]
unsafe fn logits_and_best<const BY_ROW: bool>(
    quants: *const i8,
    scales: *const u16,
    x: *const f32,
    logits: *mut f32,
    seen: *const u8,
    settings: *const u32,
    [vocab, width, group_shift]: [u32; 3],
) -> Best {
    let lane = warp::lane_id();
    let (g, t) = (lane / 4, lane % 4);
    let matrix = Matrix {
        quants,
        scales,
        rows: vocab,
        cols: width,
        group_shift,
        groups: if BY_ROW {
            1
        } else {
            groups_per_row(width, group_shift)
        },
        g,
        t,
    };
    let smem = shared::dynamic_shared_mem();
    let layout = Layout::new(width);
    let items = vocab.div_ceil(ROWS);
    let spans = width.div_ceil(SPAN);
    let stride = thread::grid_dim_x() * WARPS;

    let mut item = thread::index_1d() / warp::SIZE;
    let mut span = 0;
    let (mut next_item, mut next_span) = (item, 0);
    let mut best = Best::NONE;
    // SAFETY: items, spans and groups are clamped to the matrix; x is staged before the barrier.
    unsafe {
        let mut fetch = |stage: &mut Stage| {
            if next_item < items {
                *stage = matrix.span::<BY_ROW>(next_item, next_span);
                next_span += 1;
                if next_span == spans {
                    next_span = 0;
                    next_item += stride;
                }
            }
        };
        let mut stages = [Stage {
            words: [[[0; 4]; 2]; 2],
            scales: [0; 2],
        }; STAGES];
        unroll!(I < 4 => { fetch(&mut stages[I]); });
        // The matrix no launch writes; all else may be from the launch before.
        ptx::griddep_launch();
        ptx::griddep_wait();
        stage(x, width, smem, layout);
        let penalty = Penalty::load(seen, settings);
        let mut seen_rows = penalty.of_item(item, items);
        thread::sync_threads();

        // The lane's column of the second operand is g: part g % 2 of x in group (g / 2) % 2 of
        // each chunk of set g / 4. Its 16 columns of a chunk lie in group t / 2.
        let has_operand = g / 2 % 2 == t / 2;
        let x_first = if has_operand {
            g / 4 * (CHUNK_BYTES / 2) + t * 64 + g % 2 * 32
        } else {
            layout.zeros()
        };
        let x_step = if has_operand { CHUNK_BYTES } else { 0 };
        let mut x_offset = x_first;

        let mut total = 0.0f32;
        let mut products = [[0.0f32; 4]; 2];
        // Both results of a row and set: high and low parts. Rows 8..16 are the second set's.
        let both = |sums: [f32; 4]| {
            if t < 2 {
                sums[0] + sums[1]
            } else {
                sums[2] + sums[3]
            }
        };
        'items: loop {
            unroll!(I < 4 => {
                if item >= items {
                    break 'items;
                }
                if !BY_ROW {
                    products = [[0.0; 4]; 2];
                }
                products[0] = add_chunk::<0>(products[0], &stages[I], smem, x_offset);
                products[1] = add_chunk::<1>(products[1], &stages[I], smem, x_offset + x_step);
                let scales = stages[I].scales.map(ptx::f16_to_f32);
                if !BY_ROW {
                    total = ptx::fma(scales[0], both(products[0]), total);
                    total = ptx::fma(scales[1], both(products[1]), total);
                }
                fetch(&mut stages[I]);
                x_offset += 2 * x_step;
                span += 1;
                if span == spans {
                    if BY_ROW {
                        total = both(products[0]) + both(products[1]);
                        products = [[0.0; 4]; 2];
                    }
                    total += warp::shuffle_xor_f32(warp::FULL_MASK, total, 1);
                    total += warp::shuffle_xor_f32(warp::FULL_MASK, total, 2);
                    if BY_ROW {
                        total *= scales[0];
                    }
                    total = penalty.on(total, seen_rows >> g & 1 != 0);
                    let row = item * ROWS + g;
                    if row < vocab {
                        best = best.or(Best { value: total, index: row });
                        if t == 0 && !logits.is_null() {
                            ptx::st_global_f32(logits.wrapping_add(row as usize), total);
                        }
                    }
                    total = 0.0;
                    x_offset = x_first;
                    span = 0;
                    item += stride;
                    seen_rows = penalty.of_item(item, items);
                }
            });
        }
    }
    best
}

/// From the lanes' candidates to the token.
///
/// # Safety
/// All threads of all blocks call it; the buffers are as `plan` checked them.
#[inline(always)]
unsafe fn choose(
    best: Best,
    scratch: *mut u32,
    tokens: *mut u32,
    state: *mut u32,
    advance: u32,
    smem: Shared,
    layout: Layout,
) {
    let lane = warp::lane_id();
    let warp_id = warp::warp_id();
    let blocks = thread::grid_dim_x();
    let candidates = scratch.wrapping_add(4);
    // SAFETY: each warp and each block has its place; barriers and the arrival part writing from
    // reading.
    unsafe {
        best.of_warp().store(smem, layout.candidate(warp_id));
        thread::sync_threads();
        if warp_id == 0 {
            let best = Best::of_shared(smem, layout.candidate(lane.min(WARPS - 1))).of_warp();
            if lane == 0 {
                let to = candidates.wrapping_add(2 * thread::block_idx_x() as usize);
                ptx::st_global_u32(to, best.value.to_bits());
                ptx::st_global_u32(to.wrapping_add(1), best.index);
            }
        }
        if last_to_arrive(scratch, blocks, smem.offset_bytes(layout.flag())) && warp_id == 0 {
            let mut best = Best::NONE;
            let mut block = lane;
            while block < blocks {
                let from = candidates.wrapping_add(2 * block as usize);
                best = best.or(Best {
                    value: f32::from_bits(ptx::ld_global_u32(from)),
                    index: ptx::ld_global_u32(from.wrapping_add(1)),
                });
                block += warp::SIZE;
            }
            best = best.of_warp();
            if lane == 0 {
                let position = ptx::ld_global_u32(state);
                ptx::st_global_u32(tokens.wrapping_add(position as usize + 1), best.token());
                if advance != 0 {
                    ptx::st_global_u32(state, position + 1);
                }
            }
        }
    }
}

/// From the lanes' candidates to the greatest logits.
///
/// # Safety
/// All threads of all blocks call it; the buffers are as [`plan_top`] checked them.
#[inline(always)]
unsafe fn collect(
    best: Best,
    logits: *const f32,
    scratch: *mut u32,
    candidates: *mut u32,
    vocab: u32,
    smem: Shared,
    layout: Layout,
) {
    let blocks = thread::grid_dim_x();
    let bests = scratch.wrapping_add(4);
    // SAFETY: each warp has its place; the arrival parts writing from reading, and the barrier the
    // uses of shared memory.
    unsafe {
        let best = best.of_warp();
        if warp::lane_id() == 0 {
            let grid_warp = thread::index_1d() / warp::SIZE;
            best.leave(bests.wrapping_add(2 * grid_warp as usize));
        }
        if last_to_arrive(scratch, blocks, smem.offset_bytes(layout.flag())) {
            thread::sync_threads();
            let rows = top::Rows {
                logits,
                vocab,
                bests,
                blocks,
            };
            top::select(&rows, candidates, smem);
        }
    }
}

/// The kernels: with a scale a group, and with a scale a row.
macro_rules! kernels {
    ($($name:ident, $top:ident: $scales:literal, $by_row:literal;)*) => {$(
        #[doc = concat!("`logits = W x` and the greedy choice, with a scale a ", $scales, ".")]
        ///
        /// # Safety
        /// Launched as [`plan`] says, with a position below S.
        #[kernel]
        pub unsafe fn $name(
            quants: *const i8,  // (V, D) int8
            scales: *const u16, // (V, ceil(D/group)) f16
            x: *const f32,      // (D)
            logits: *mut f32,   // (V), or null
            scratch: *mut u32,  // counter, 3 words, (blocks, 2) candidates
            tokens: *mut u32,   // (S + 1), or null
            state: *mut u32,    // (1) position, or null
            vocab: u32,
            width: u32,
            group_shift: u32,
            advance: u32,
        ) {
            let dims = [vocab, width, group_shift];
            let none = core::ptr::null();
            // SAFETY: launched as `plan` says.
            unsafe {
                let best = logits_and_best::<$by_row>(
                    quants, scales, x, logits, none, none.cast(), dims,
                );
                if !tokens.is_null() {
                    let smem = shared::dynamic_shared_mem();
                    choose(best, scratch, tokens, state, advance, smem, Layout::new(width));
                }
            }
        }

        #[doc = concat!("`logits = W x` and the greatest of them, with a scale a ", $scales, ".")]
        ///
        /// # Safety
        /// Launched as [`plan_top`] says.
        #[kernel]
        pub unsafe fn $top(
            quants: *const i8,    // (V, D) int8
            scales: *const u16,   // (V, ceil(D/group)) f16
            x: *const f32,        // (D)
            logits: *mut f32,     // (V)
            scratch: *mut u32,    // counter, 3 words, (blocks, warps, 2) candidates
            candidates: *mut u32, // (64, 2)
            seen: *const u8,      // (ceil(V/32), 4) bits, or null
            settings: *const u32, // (8), or null
            vocab: u32,
            width: u32,
            group_shift: u32,
        ) {
            let dims = [vocab, width, group_shift];
            // SAFETY: launched as `plan_top` says.
            unsafe {
                let best = logits_and_best::<$by_row>(
                    quants, scales, x, logits, seen, settings, dims,
                );
                let smem = shared::dynamic_shared_mem();
                collect(best, logits, scratch, candidates, vocab, smem, Layout::new(width));
            }
        }
    )*};
}

kernels! {
    logits_int8, logits_int8_top: "group", false;
    logits_int8_by_row, logits_int8_by_row_top: "row", true;
}

#[cfg(test)]
mod tests;
