//! What the GPU's read kernel, the floor of every measurement, is checked by.

/// The exclusive-or of all words.
pub fn reference(words: &[u32]) -> u32 {
    words.iter().fold(0, |sum, word| sum ^ word)
}
