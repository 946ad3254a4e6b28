//! The warp's matrix product at the depth that kernels count in, and bytes as its operands.

use cuda_std::warp;

use crate::ptx;

/// The even bytes of a word, signed, as halves, which hold them exactly: a byte lands in the mantissa
/// of 1024, and a packed subtraction takes `1024 + 128` off.
#[inline(always)]
pub(crate) fn even_bytes_to_f16x2(bytes: u32) -> u32 {
    /// Twice 1024 + 128: its exponent, and the bit that makes a signed byte an unsigned one.
    const OFFSET: u32 = 0x6480_6480;
    ptx::sub_f16x2(bytes & 0x00ff_00ff ^ OFFSET, OFFSET)
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_becomes_its_half() {
        let part =
            |halves: u32, high: bool| ptx::f16_to_f32((halves >> if high { 16 } else { 0 }) as u16);
        for q in i8::MIN..=i8::MAX {
            let word = u32::from_le_bytes([q as u8, 1, !q as u8, 255]);
            let [even, odd] = [word, word >> 8].map(even_bytes_to_f16x2);
            assert_eq!(part(even, false), f32::from(q));
            assert_eq!(part(even, true), f32::from(!q));
            assert_eq!(part(odd, false), 1.0);
            assert_eq!(part(odd, true), -1.0);
        }
    }
}
