//! Device only: the instructions behind `thread`, `warp`, `shared` and `atomic`.
//!
//! Barriers, shuffles and votes go through LLVM's intrinsics rather than `asm!`: the intrinsics
//! are marked *convergent*, so LLVM never moves them into or out of divergent control flow nor
//! copies them into two branches. An `asm!` block carries no such mark.

use core::arch::asm;

pub use core::arch::nvptx::{
    _block_dim_x as block_dim_x, _block_dim_y as block_dim_y, _block_dim_z as block_dim_z,
    _block_idx_x as block_idx_x, _block_idx_y as block_idx_y, _block_idx_z as block_idx_z,
    _grid_dim_x as grid_dim_x, _grid_dim_y as grid_dim_y, _grid_dim_z as grid_dim_z,
    _syncthreads as barrier, _thread_idx_x as thread_idx_x, _thread_idx_y as thread_idx_y,
    _thread_idx_z as thread_idx_z,
};

unsafe extern "C" {
    /// `bar.warp.sync mask;`
    #[link_name = "llvm.nvvm.bar.warp.sync"]
    pub fn bar_warp_sync(mask: u32);
    /// `shfl.sync.bfly.b32`
    #[link_name = "llvm.nvvm.shfl.sync.bfly.i32"]
    fn shfl_sync_bfly(mask: u32, value: u32, lane_mask: u32, clamp: u32) -> u32;
    /// `shfl.sync.down.b32`
    #[link_name = "llvm.nvvm.shfl.sync.down.i32"]
    fn shfl_sync_down(mask: u32, value: u32, delta: u32, clamp: u32) -> u32;
    /// `shfl.sync.idx.b32`
    #[link_name = "llvm.nvvm.shfl.sync.idx.i32"]
    fn shfl_sync_idx(mask: u32, value: u32, lane: u32, clamp: u32) -> u32;
    /// `vote.sync.ballot.b32`
    #[link_name = "llvm.nvvm.vote.ballot.sync"]
    pub fn vote_ballot(mask: u32, predicate: bool) -> u32;
}

/// The `c` operand of a shuffle over the whole warp: segment mask 0, clamp value 31.
const WHOLE_WARP: u32 = 0x1f;

/// # Safety
/// As `warp::shuffle_xor_u32`.
#[inline(always)]
pub unsafe fn shuffle_xor(mask: u32, value: u32, lane_mask: u32) -> u32 {
    // SAFETY: the caller's obligations are the instruction's.
    unsafe { shfl_sync_bfly(mask, value, lane_mask, WHOLE_WARP) }
}

/// # Safety
/// As `warp::shuffle_down_u32`.
#[inline(always)]
pub unsafe fn shuffle_down(mask: u32, value: u32, delta: u32) -> u32 {
    // SAFETY: the caller's obligations are the instruction's.
    unsafe { shfl_sync_down(mask, value, delta, WHOLE_WARP) }
}

/// # Safety
/// As `warp::shuffle_idx_u32`.
#[inline(always)]
pub unsafe fn shuffle_idx(mask: u32, value: u32, lane: u32) -> u32 {
    // SAFETY: the caller's obligations are the instruction's.
    unsafe { shfl_sync_idx(mask, value, lane, WHOLE_WARP) }
}

/// `mma.sync` has no intrinsic that can be declared from Rust: its operands are LLVM vectors, which
/// the target's ABI refuses. The block has an effect, so LLVM keeps it where it is.
#[inline(always)]
pub fn mma_m16n8k16(a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = c;
    // SAFETY: registers only.
    unsafe {
        asm!("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{c0}, {c1}, {c2}, {c3}}}, \
              {{{a0}, {a1}, {a2}, {a3}}}, {{{b0}, {b1}}}, {{{c0}, {c1}, {c2}, {c3}}};",
            c0 = inout(reg32) c0, c1 = inout(reg32) c1, c2 = inout(reg32) c2, c3 = inout(reg32) c3,
            a0 = in(reg32) a[0], a1 = in(reg32) a[1], a2 = in(reg32) a[2], a3 = in(reg32) a[3],
            b0 = in(reg32) b[0], b1 = in(reg32) b[1], options(nomem, nostack));
    }
    [c0, c1, c2, c3]
}

/// As [`mma_m16n8k16`], of half the depth.
#[inline(always)]
pub fn mma_m16n8k8(a: [u32; 2], b: u32, c: [f32; 4]) -> [f32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = c;
    // SAFETY: registers only.
    unsafe {
        asm!("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {{{c0}, {c1}, {c2}, {c3}}}, \
              {{{a0}, {a1}}}, {{{b}}}, {{{c0}, {c1}, {c2}, {c3}}};",
            c0 = inout(reg32) c0, c1 = inout(reg32) c1, c2 = inout(reg32) c2, c3 = inout(reg32) c3,
            a0 = in(reg32) a[0], a1 = in(reg32) a[1], b = in(reg32) b, options(nomem, nostack));
    }
    [c0, c1, c2, c3]
}

/// Leaves `// .maxntid N` in the PTX.
#[inline(always)]
pub fn remark_max_threads<const N: u32>() {
    // SAFETY: a remark.
    unsafe { asm!("// .maxntid {}", const N, options(nomem, nostack)) }
}

/// `%laneid`
#[inline(always)]
pub fn lane_id() -> u32 {
    let lane: u32;
    // SAFETY: reads a special register that is constant over the thread's life.
    unsafe { asm!("mov.u32 {}, %laneid;", out(reg32) lane, options(pure, nomem, nostack)) }
    lane
}

/// Address of the dynamic shared memory in the shared window. The symbol is declared by the kernel
/// crate: see `shared::dynamic_shared_mem`.
#[inline(always)]
pub fn dynamic_shared_base() -> u32 {
    let base: u32;
    // SAFETY: takes an address, touches no memory.
    unsafe { asm!("mov.u32 {}, dyn_smem;", out(reg32) base, options(pure, nomem, nostack)) }
    base
}

/// # Safety
/// `p` is a valid, aligned global address.
#[inline(always)]
pub unsafe fn atom_add_relaxed_gpu(p: *mut u32, value: u32) -> u32 {
    let old: u32;
    // SAFETY: the caller vouches for `p`; the block is a memory clobber.
    unsafe {
        asm!("atom.relaxed.gpu.global.add.u32 {}, [{}], {};",
            out(reg32) old, in(reg64) p, in(reg32) value, options(nostack));
    }
    old
}

/// # Safety
/// `p` is a valid, aligned global address.
#[inline(always)]
pub unsafe fn red_add_release_gpu(p: *mut u32, value: u32) {
    // SAFETY: the caller vouches for `p`; the block is a memory clobber.
    unsafe {
        asm!("red.release.gpu.global.add.u32 [{}], {};",
            in(reg64) p, in(reg32) value, options(nostack));
    }
}

/// # Safety
/// `p` is a valid, aligned global address.
#[inline(always)]
pub unsafe fn ld_acquire_gpu(p: *const u32) -> u32 {
    let value: u32;
    // SAFETY: the caller vouches for `p`; the block is a memory clobber, so nothing moves above it.
    unsafe {
        asm!("ld.acquire.gpu.global.u32 {}, [{}];",
            out(reg32) value, in(reg64) p, options(nostack));
    }
    value
}

/// # Safety
/// The 16 bytes at `p` are valid, aligned global memory.
#[inline(always)]
pub unsafe fn ld_relaxed_gpu_v4(p: *const u32) -> [u32; 4] {
    let (a, b, c, d);
    // SAFETY: the caller vouches for `p`; the block is a memory clobber, so a loop loads anew.
    unsafe {
        asm!("ld.relaxed.gpu.global.v4.u32 {{{}, {}, {}, {}}}, [{}];",
            out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg64) p,
            options(nostack));
    }
    [a, b, c, d]
}

/// # Safety
/// The 16 bytes at `p` are valid, aligned global memory.
#[inline(always)]
pub unsafe fn st_relaxed_gpu_v4(p: *mut u32, value: [u32; 4]) {
    // SAFETY: the caller vouches for `p`; the block is a memory clobber.
    unsafe {
        asm!("st.relaxed.gpu.global.v4.u32 [{}], {{{}, {}, {}, {}}};", in(reg64) p,
            in(reg32) value[0], in(reg32) value[1], in(reg32) value[2], in(reg32) value[3],
            options(nostack));
    }
}

/// # Safety
/// The 16 bytes at `p` are valid, aligned global memory.
#[inline(always)]
pub unsafe fn ld_relaxed_gpu_v2_u64(p: *const u64) -> [u64; 2] {
    let (a, b);
    // SAFETY: the caller vouches for `p`; the block is a memory clobber, so a loop loads anew.
    unsafe {
        asm!("ld.relaxed.gpu.global.v2.u64 {{{}, {}}}, [{}];",
            out(reg64) a, out(reg64) b, in(reg64) p, options(nostack));
    }
    [a, b]
}

/// # Safety
/// The 8 bytes at `p` are valid, aligned global memory.
#[inline(always)]
pub unsafe fn st_relaxed_gpu_u64(p: *mut u64, value: u64) {
    // SAFETY: the caller vouches for `p`; the block is a memory clobber.
    unsafe {
        asm!("st.relaxed.gpu.global.u64 [{}], {};", in(reg64) p, in(reg64) value,
            options(nostack));
    }
}

/// # Safety
/// The 4 bytes at `p` are valid, aligned global memory.
#[inline(always)]
pub unsafe fn st_relaxed_gpu_u32(p: *mut u32, value: u32) {
    // SAFETY: the caller vouches for `p`; the block is a memory clobber.
    unsafe {
        asm!("st.relaxed.gpu.global.u32 [{}], {};", in(reg64) p, in(reg32) value,
            options(nostack));
    }
}

/// `fence.acq_rel.gpu`
#[inline(always)]
pub fn fence_acq_rel_gpu() {
    // SAFETY: orders memory, touches none.
    unsafe { asm!("fence.acq_rel.gpu;", options(nostack)) }
}
