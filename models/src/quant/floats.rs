//! Rows of every element type -> floats. One decoder a type, exact in f32 for floats; for block types
//! the products that GGML defines, in its order of operations.
//!
//! ```text
//! Q4_0   f16 d            | 16 B nibbles              w = d (q - 8)
//! Q4_1   f16 d | f16 m    | 16 B nibbles              w = d q + m
//! Q5_0   f16 d            | u32 fifth bits | 16 B     w = d (q - 16)
//! Q5_1   f16 d | f16 m    | u32 fifth bits | 16 B     w = d q + m
//! Q8_0   f16 d            | 32 x i8                   w = d q
//! Q4_K   f16 d | f16 dmin | 12 B: 8 x (6-bit scale, 6-bit min) | 128 B nibbles        w = d s q - dmin m
//! Q5_K   as Q4_K          | 32 B fifth bits | 128 B nibbles
//! Q6_K   128 B nibbles | 64 B bit pairs | 16 x i8 scale | f16 d                       w = d s (q - 32)
//! TQ1_0  48 B of 5 digits, 4 B of 4 digits | f16 d    w = d (q - 1)
//! TQ2_0  64 B of 4 bit pairs | f16 d                  w = d (q - 1)
//! ```

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::file::DType;

/// Weights a block of the types without a K in their name.
pub const BLOCK: usize = 32;
/// Weights a block of the K types and the ternary ones.
pub const SUPER_BLOCK: usize = 256;
/// Bytes of a cell of nibbles: byte `j` holds weights `j` and `16 + j`.
const CELL: usize = 16;

/// Decodes whole rows.
pub type RowDecoder = fn(&[u8], &mut [f32]);

/// The decoder of a type, `None` for one whose values are no floats or whose layout is not known here.
pub fn row_decoder(dtype: DType) -> Option<RowDecoder> {
    Some(match dtype {
        DType::F32 => f32_row,
        DType::F16 => f16_row,
        DType::BF16 => bf16_row,
        DType::Q4_0 => q4_0_row,
        DType::Q4_1 => q4_1_row,
        DType::Q5_0 => q5_0_row,
        DType::Q5_1 => q5_1_row,
        DType::Q8_0 => q8_0_row,
        DType::Q4_K => q4_k_row,
        DType::Q5_K => q5_k_row,
        DType::Q6_K => q6_k_row,
        DType::TQ1_0 => tq1_0_row,
        DType::TQ2_0 => tq2_0_row,
        _ => return None,
    })
}

/// The half at byte `at` of a block.
pub(crate) fn f16_at<const N: usize>(block: &[u8; N], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

fn f32_row(src: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(src.as_chunks::<4>().0) {
        *out = f32::from_le_bytes(*bytes);
    }
}

fn f16_row(src: &[u8], out: &mut [f32]) {
    // In pieces, so that the copy that aligns the halves stays in cache and off the heap.
    let mut halves = [f16::ZERO; 256];
    for (out, bytes) in out.chunks_mut(256).zip(src.chunks(512)) {
        let halves = &mut halves[..out.len()];
        for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *half = f16::from_le_bytes(*bytes);
        }
        halves.convert_to_f32_slice(out);
    }
}

fn bf16_row(src: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(src.as_chunks::<2>().0) {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    }
}

/// Blocks of `BYTES` of `BLOCK` weights each.
fn blocks<'a, const BYTES: usize, const WEIGHTS: usize>(
    src: &'a [u8],
    out: &'a mut [f32],
) -> impl Iterator<Item = (&'a [u8; BYTES], &'a mut [f32; WEIGHTS])> {
    let blocks = src.as_chunks::<BYTES>().0.iter();
    blocks.zip(out.as_chunks_mut::<WEIGHTS>().0.iter_mut())
}

/// Levels of a cell through `value`.
fn cell(bytes: &[u8], out: &mut [f32], value: impl Fn(u8, usize) -> f32) {
    let (low, high) = out.split_at_mut(CELL);
    for (j, ((byte, low), high)) in bytes.iter().zip(low).zip(high).enumerate() {
        *low = value(byte & 15, j);
        *high = value(byte >> 4, j + CELL);
    }
}

fn q4_0_row(src: &[u8], out: &mut [f32]) {
    for (block, out) in blocks::<18, BLOCK>(src, out) {
        let scale = f16_at(block, 0).to_f32();
        cell(&block[2..], out, |q, _| scale * (f32::from(q) - 8.0));
    }
}

fn q4_1_row(src: &[u8], out: &mut [f32]) {
    for (block, out) in blocks::<20, BLOCK>(src, out) {
        let (scale, min) = (f16_at(block, 0).to_f32(), f16_at(block, 2).to_f32());
        cell(&block[4..], out, |q, _| scale * f32::from(q) + min);
    }
}

/// The 5-bit level of weight `j` of a block, from its nibble and the word of fifth bits.
fn fifth_bit(nibble: u8, bits: u32, j: usize) -> u8 {
    nibble | ((bits >> j & 1) as u8) << 4
}

/// The word of fifth bits at byte `at`.
fn word_at<const N: usize>(block: &[u8; N], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Levels of a Q5_0 block, -16 to 15.
pub(crate) fn q5_0_levels(block: &[u8; 22], levels: &mut [i8; BLOCK]) {
    let bits = word_at(block, 2);
    let (low, high) = levels.split_at_mut(CELL);
    for (j, ((byte, low), high)) in block[6..].iter().zip(low).zip(high).enumerate() {
        *low = fifth_bit(byte & 15, bits, j) as i8 - 16;
        *high = fifth_bit(byte >> 4, bits, j + CELL) as i8 - 16;
    }
}

fn q5_0_row(src: &[u8], out: &mut [f32]) {
    for (block, out) in blocks::<22, BLOCK>(src, out) {
        let scale = f16_at(block, 0).to_f32();
        let mut levels = [0; BLOCK];
        q5_0_levels(block, &mut levels);
        for (out, level) in out.iter_mut().zip(levels) {
            *out = scale * f32::from(level);
        }
    }
}

fn q5_1_row(src: &[u8], out: &mut [f32]) {
    for (block, out) in blocks::<24, BLOCK>(src, out) {
        let (scale, min) = (f16_at(block, 0).to_f32(), f16_at(block, 2).to_f32());
        let bits = word_at(block, 4);
        cell(&block[8..], out, |q, j| {
            scale * f32::from(fifth_bit(q, bits, j)) + min
        });
    }
}

fn q8_0_row(src: &[u8], out: &mut [f32]) {
    for (block, out) in blocks::<34, BLOCK>(src, out) {
        let scale = f16_at(block, 0).to_f32();
        for (out, level) in out.iter_mut().zip(&block[2..]) {
            *out = scale * f32::from(*level as i8);
        }
    }
}

/// Scale and minimum of sub-block `j` (0 to 7) of a Q4_K or Q5_K block: six bits each in 12 bytes. The
/// first four scales and minima are the low six bits of bytes `j` and `4 + j`; of the others the low
/// nibbles share byte `4 + j`, and the two top bits lie above the first four.
fn sub_scale_and_min(packed: &[u8], j: usize) -> (u8, u8) {
    match j {
        0..4 => (packed[j] & 63, packed[j + 4] & 63),
        _ => (
            packed[j + 4] & 15 | packed[j - 4] >> 6 << 4,
            packed[j + 4] >> 4 | packed[j] >> 6 << 4,
        ),
    }
}

/// Scale and minimum `(d s, dmin m)` in f32 of each sub-block of 32 weights of a Q4_K or Q5_K block.
pub(crate) fn k_scales_and_mins<const N: usize>(block: &[u8; N]) -> [(f32, f32); 8] {
    let (scale, min) = (f16_at(block, 0).to_f32(), f16_at(block, 2).to_f32());
    std::array::from_fn(|j| {
        let (s, m) = sub_scale_and_min(&block[4..16], j);
        (scale * f32::from(s), min * f32::from(m))
    })
}

/// Level `l` of sub-block `j` of a Q4_K block: two sub-blocks share 32 bytes of nibbles.
pub(crate) fn q4_k_level(block: &[u8; 144], j: usize, l: usize) -> u8 {
    block[16 + 32 * (j / 2) + l] >> (4 * (j % 2)) & 15
}

fn q4_k_row(src: &[u8], out: &mut [f32]) {
    for (block, out) in blocks::<144, SUPER_BLOCK>(src, out) {
        let sub_blocks = k_scales_and_mins(block);
        for (j, (out, (scale, min))) in out.chunks_exact_mut(BLOCK).zip(sub_blocks).enumerate() {
            for (l, out) in out.iter_mut().enumerate() {
                *out = scale * f32::from(q4_k_level(block, j, l)) - min;
            }
        }
    }
}

fn q5_k_row(src: &[u8], out: &mut [f32]) {
    for (block, out) in blocks::<176, SUPER_BLOCK>(src, out) {
        let sub_blocks = k_scales_and_mins(block);
        let (fifth, nibbles) = block[16..].split_at(32);
        for (j, (out, (scale, min))) in out.chunks_exact_mut(BLOCK).zip(sub_blocks).enumerate() {
            let nibbles = &nibbles[32 * (j / 2)..];
            for (l, out) in out.iter_mut().enumerate() {
                let low = nibbles[l] >> (4 * (j % 2)) & 15;
                let level = low | (fifth[l] >> j & 1) << 4;
                *out = scale * f32::from(level) - min;
            }
        }
    }
}

/// Two halves of 128 weights; in each, weight `32 q + l` takes its low nibble from byte
/// `32 (q % 2) + l` (high nibble of it for `q >= 2`), its top bits from bit pair `q` of byte `l`,
/// and the i8 scale `2 q + l / 16`.
fn q6_k_row(src: &[u8], out: &mut [f32]) {
    for (block, out) in blocks::<210, SUPER_BLOCK>(src, out) {
        let scale = f16_at(block, 208).to_f32();
        for (half, out) in out.chunks_exact_mut(128).enumerate() {
            let nibbles = &block[64 * half..64 * half + 64];
            let pairs = &block[128 + 32 * half..128 + 32 * half + 32];
            let scales = &block[192 + 8 * half..192 + 8 * half + 8];
            for (q, out) in out.chunks_exact_mut(32).enumerate() {
                for (l, out) in out.iter_mut().enumerate() {
                    let low = nibbles[32 * (q % 2) + l] >> (4 * (q / 2)) & 15;
                    let high = pairs[l] >> (2 * q) & 3;
                    let level = (low | high << 4) as i8 - 32;
                    let sub_scale = scales[2 * q + l / 16] as i8;
                    *out = scale * f32::from(sub_scale) * f32::from(level);
                }
            }
        }
    }
}

/// Codes (weight + 1) of a TQ1_0 block. A byte holds the digits of a number in base 3 as a fraction of
/// 256: times a power of 3, modulo 256, it starts with the next digit. 32 bytes hold five digits of 160
/// weights, 16 bytes those of 80, four bytes four digits of the last 16; digit by digit, not byte by byte.
pub(crate) fn tq1_0_codes(block: &[u8; 54], codes: &mut [u8; SUPER_BLOCK]) {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    let mut codes = codes.iter_mut();
    for (bytes, digits) in [(&block[..32], 5), (&block[32..48], 5), (&block[48..52], 4)] {
        for power in &POWERS[..digits] {
            for (byte, code) in bytes.iter().zip(&mut codes) {
                let rest = byte.wrapping_mul(*power);
                *code = ((u16::from(rest) * 3) >> 8) as u8;
            }
        }
    }
}

/// Codes (weight + 1) of a TQ2_0 block: two halves of 128 weights in 32 bytes, bit pair `l` of byte `m`
/// being weight `32 l + m`.
pub(crate) fn tq2_0_codes(block: &[u8; 66], codes: &mut [u8; SUPER_BLOCK]) {
    for (bytes, codes) in block.chunks_exact(32).zip(codes.chunks_exact_mut(128)) {
        for (l, codes) in codes.chunks_exact_mut(32).enumerate() {
            for (byte, code) in bytes.iter().zip(codes) {
                *code = byte >> (2 * l) & 3;
            }
        }
    }
}

fn ternary(codes: &[u8; SUPER_BLOCK], scale: f16, out: &mut [f32; SUPER_BLOCK]) {
    let scale = scale.to_f32();
    for (out, code) in out.iter_mut().zip(codes) {
        *out = scale * (f32::from(*code) - 1.0);
    }
}

fn tq1_0_row(src: &[u8], out: &mut [f32]) {
    let mut codes = [0; SUPER_BLOCK];
    for (block, out) in blocks::<54, SUPER_BLOCK>(src, out) {
        tq1_0_codes(block, &mut codes);
        ternary(&codes, f16_at(block, 52), out);
    }
}

fn tq2_0_row(src: &[u8], out: &mut [f32]) {
    let mut codes = [0; SUPER_BLOCK];
    for (block, out) in blocks::<66, SUPER_BLOCK>(src, out) {
        tq2_0_codes(block, &mut codes);
        ternary(&codes, f16_at(block, 64), out);
    }
}
