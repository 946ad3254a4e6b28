//! The warp's matrix product at the depth that kernels count in.

use cuda_std::warp;

/// `A B + C` over 16 columns of A, as [`warp::mma_m16n8k16_f16`]: one instruction from capability
/// 8.0 on, two before. All 32 lanes call it.
#[inline(always)]
#[cfg_attr(not(target_arch = "nvptx64"), track_caller)]
pub(crate) fn mma_k16(a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
    if at_least_sm_80() {
        warp::mma_m16n8k16_f16(a, b, c)
    } else {
        let c = warp::mma_m16n8k8_f16([a[0], a[1]], b[0], c);
        warp::mma_m16n8k8_f16([a[2], a[3]], b[1], c)
    }
}

/// Whether there are products of depth 16 and asynchronous copies.
#[inline(always)]
pub(crate) fn at_least_sm_80() -> bool {
    #[cfg(target_arch = "nvptx64")]
    let wide = cfg!(target_feature = "sm_80");
    #[cfg(not(target_arch = "nvptx64"))]
    let wide = cuda_std::emulator::compute_capability() >= 80;
    wide
}
