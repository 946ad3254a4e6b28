//! Plain reading of memory: the floor of what streams weights, and what the GPU's read kernel is checked by.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

/// The exclusive-or of all words.
pub fn reference(words: &[u32]) -> u32 {
    words.iter().fold(0, |sum, word| sum ^ word)
}

/// Words that all threads read together: 512 MiB.
const WORDS: usize = 64 << 20;
/// Times that they are read; the fastest counts.
const ROUNDS: usize = 5;

/// Bytes a second that `threads` threads read together, each its own part of memory; `None` if there is no
/// memory for it.
pub fn bytes_per_second(threads: usize) -> Option<f64> {
    let mut data: Vec<u64> = Vec::new();
    data.try_reserve_exact(WORDS).ok()?;
    // Not zero: pages of zeros may all be the same one.
    data.resize(WORDS, 0x0123_4567_89ab_cdef);
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        thread::scope(|scope| {
            for part in data.chunks(WORDS.div_ceil(threads)) {
                scope.spawn(move || black_box(exclusive_or(part)));
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
    }
    Some(size_of_val(data.as_slice()) as f64 / best)
}

/// In lanes, so that the loop waits for memory and not for itself.
fn exclusive_or(words: &[u64]) -> u64 {
    const LANES: usize = 32;
    let (chunks, rest) = words.as_chunks::<LANES>();
    let mut lanes = [0u64; LANES];
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane ^= word;
        }
    }
    lanes.iter().chain(rest).fold(0, |sum, word| sum ^ word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_counts() {
        let words: Vec<u64> = (0..100).map(|i| 1 << (i % 64)).collect();
        let want = words.iter().fold(0, |sum, word| sum ^ word);
        assert_eq!(exclusive_or(&words), want);
    }
}
