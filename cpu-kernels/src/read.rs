//! Plain reading of memory: the floor of what streams weights, and what the GPU's read kernel is checked by.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

use crate::isa::{Isa, per_isa};
use crate::pages::{LINE_BYTES, Line, Lines};

/// The exclusive-or of all words.
pub fn reference(words: &[u32]) -> u32 {
    words.iter().fold(0, |sum, word| sum ^ word)
}

/// How far ahead of a reader memory is asked for: the hardware by itself stops at the end of a page. Of 1, 2 and
/// 4 KB and into the first or second cache, this was fastest on a Xeon, for reading and for products.
#[cfg(target_arch = "x86_64")]
const AHEAD_BYTES: usize = 4096;

/// Asks for the line that lies 4 KB behind `at` and need not exist, into the second cache, where there is an
/// instruction for it.
#[inline(always)]
pub(crate) fn ahead(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch reads nothing and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD_BYTES).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Bytes that are gone through before any of them is read again.
const BYTES: usize = 512 << 20;
/// Bytes that all threads read together at a time, few milliseconds: the fastest time counts.
const WINDOW_BYTES: usize = 64 << 20;
/// Times that all bytes are read.
const ROUNDS: usize = 5;

/// Bytes a second that `threads` threads read together, each its own part of memory that lies as weights do, asked
/// for ahead as products do: what these cannot exceed. `None` if there is no memory for it.
pub fn bytes_per_second(threads: usize) -> Option<f64> {
    // Fails where lines end the process.
    Vec::<u8>::new().try_reserve_exact(BYTES).ok()?;
    let mut data = Lines::zeroed(BYTES / LINE_BYTES);
    // Not zero: pages of zeros may all be the same one.
    data.fill(Line([0xcd; LINE_BYTES]));
    let mut best = f64::INFINITY;
    let isa = Isa::selected();
    for window in (0..ROUNDS).flat_map(|_| data.chunks(WINDOW_BYTES / LINE_BYTES)) {
        let start = Instant::now();
        let mut parts = window.chunks(window.len().div_ceil(threads));
        let own = parts.next();
        thread::scope(|scope| {
            for part in parts {
                scope.spawn(move || black_box(exclusive_or(isa, part)));
            }
            black_box(own.map(|part| exclusive_or(isa, part)));
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    Some(WINDOW_BYTES as f64 / best)
}

per_isa!(
    /// The exclusive-or of all words.
    fn exclusive_or(lines: &[Line]) -> u64 = exclusive_or_body
);

/// In lanes, so that the loop waits for memory and not for itself.
#[inline(always)]
fn exclusive_or_body<const FMA: bool>(lines: &[Line]) -> u64 {
    const LANES: usize = 4;
    let mut sums = [[0u64; LINE_BYTES / 8]; LANES];
    let (blocks, rest) = lines.as_chunks::<LANES>();
    for block in blocks {
        for line in block {
            ahead(line.0.as_ptr());
        }
        for (sums, line) in sums.iter_mut().zip(block) {
            add(sums, line);
        }
    }
    for line in rest {
        add(&mut sums[0], line);
    }
    sums.iter().flatten().fold(0, |sum, word| sum ^ word)
}

#[inline(always)]
fn add(sums: &mut [u64; LINE_BYTES / 8], line: &Line) {
    for (sum, word) in sums.iter_mut().zip(line.0.as_chunks::<8>().0) {
        *sum ^= u64::from_ne_bytes(*word);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_counts() {
        let mut lines = Lines::zeroed(11);
        let mut want = 0;
        for (i, line) in lines.iter_mut().enumerate() {
            for (j, word) in line.0.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let value = 1u64 << ((8 * i + j) % 64);
                *word = value.to_ne_bytes();
                want ^= value;
            }
        }
        for isa in Isa::available() {
            assert_eq!(exclusive_or(isa, &lines), want, "{isa}");
        }
    }
}
