//! Random tensor data, block by block.

use half::{bf16, f16};

use crate::Error;
use crate::error::shown;
use crate::file::gguf::DType;

/// Blocks produced between two writes.
const BLOCKS_A_WRITE: u64 = 2048;
/// Standard deviation of a level drawn evenly from 0 to 15.
const NIBBLE_DEVIATION: f32 = 4.609_772;
/// Standard deviation of a level drawn evenly from -128 to 127.
const BYTE_DEVIATION: f32 = 73.900_38;
/// Standard deviation of a level drawn from -1, 0, 0 and 1.
const TERNARY_DEVIATION: f32 = std::f32::consts::FRAC_1_SQRT_2;
/// Standard deviation of a number drawn evenly from -1 to 1.
const UNIT_DEVIATION: f32 = 0.577_350_26;

/// Mean and standard deviation of random weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Spread {
    pub mean: f32,
    pub deviation: f32,
}

/// SplitMix64 (<https://doi.org/10.1145/2714064.2660195>).
struct Random(u64);

impl Random {
    /// A stream of its own for every tensor name and seed.
    fn new(seed: u64, name: &str) -> Self {
        // FNV-1a over the name spreads similar names far apart.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        let mut random = Random(seed);
        Random(hash ^ random.next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Evenly from -1 to 1, in steps of 2^-23, so exact in f32.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// A block scale: between three quarters and five quarters of `typical`.
    fn scale(&mut self, typical: f32) -> f16 {
        f16::from_f32(typical * (1.0 + 0.25 * self.unit()))
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        for chunk in out.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
        out
    }
}

/// Produces the bytes of a tensor of `elems` weights, handing them to `write` in pieces.
/// Quantised types take only the deviation: their mean is close to zero.
pub(super) fn fill_tensor(
    name: &str,
    dtype: DType,
    elems: u64,
    spread: Spread,
    seed: u64,
    write: &mut dyn FnMut(&[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let random = &mut Random::new(seed, name);
    let Spread { mean, deviation } = spread;
    let block: fn(&mut Random, f32, f32, &mut Vec<u8>) = match dtype {
        DType::F32 => |random, mean, deviation, out| {
            out.extend((mean + float(random, deviation)).to_le_bytes());
        },
        DType::F16 => |random, mean, deviation, out| {
            out.extend(f16::from_f32(mean + float(random, deviation)).to_le_bytes());
        },
        DType::BF16 => |random, mean, deviation, out| {
            out.extend(bf16::from_f32(mean + float(random, deviation)).to_le_bytes());
        },
        DType::Q4_0 => |random, _, deviation, out| {
            out.extend(random.scale(deviation / NIBBLE_DEVIATION).to_le_bytes());
            out.extend(random.bytes::<16>());
        },
        DType::Q4_1 => |random, _, deviation, out| {
            let scale = random.scale(deviation / NIBBLE_DEVIATION);
            out.extend(scale.to_le_bytes());
            out.extend(f16::from_f32(-7.5 * scale.to_f32()).to_le_bytes());
            out.extend(random.bytes::<16>());
        },
        DType::Q8_0 => |random, _, deviation, out| {
            out.extend(random.scale(deviation / BYTE_DEVIATION).to_le_bytes());
            out.extend(random.bytes::<32>());
        },
        DType::TQ2_0 => |random, _, deviation, out| {
            // Codes 0, 1 and 2: the sum of two bits.
            let bytes = random.bytes::<64>().into_iter().zip(random.bytes::<64>());
            out.extend(bytes.map(|(a, b)| (a & 0x55) + (b & 0x55)));
            out.extend(random.scale(deviation / TERNARY_DEVIATION).to_le_bytes());
        },
        other => {
            return Err(Error::Tensor {
                name: shown(name),
                reason: format!("random weights of type {} cannot be made", other.name()),
            });
        }
    };
    let mut left = elems / dtype.block_elems();
    let mut out = Vec::new();
    while left > 0 {
        let blocks = left.min(BLOCKS_A_WRITE);
        out.clear();
        for _ in 0..blocks {
            block(random, mean, deviation, &mut out);
        }
        write(&out)?;
        left -= blocks;
    }
    Ok(())
}

fn float(random: &mut Random, deviation: f32) -> f32 {
    random.unit() * (deviation / UNIT_DEVIATION)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_fixed_and_differ_by_name_and_seed() {
        let first = |seed, name| Random::new(seed, name).next();
        assert_eq!(first(1, "a"), first(1, "a"));
        assert_ne!(first(1, "a"), first(1, "b"));
        assert_ne!(first(1, "a"), first(2, "a"));
        // The published first outputs of SplitMix64 from state 0.
        let mut random = Random(0);
        assert_eq!(random.next(), 0xe220_a839_7b1d_cdaf);
        assert_eq!(random.next(), 0x6e78_9e6a_a1b9_65f4);
    }

    #[test]
    fn units_cover_the_interval() {
        let mut random = Random(7);
        let units: Vec<f32> = (0..4096).map(|_| random.unit()).collect();
        assert!(units.iter().all(|u| (-1.0..1.0).contains(u)));
        let square = units.iter().map(|u| u * u).sum::<f32>() / 4096.0;
        assert!((square.sqrt() - UNIT_DEVIATION).abs() < 0.02, "{square}");
    }
}
