//! Activation memory aligned to a cache line, so that no vector load crosses two.

use std::ops::{Deref, DerefMut};

const LINE_ELEMS: usize = 16;

#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE_ELEMS]);

/// A fixed number of f32, zero at first, that start at a multiple of 64 bytes.
#[derive(Debug, Clone)]
pub struct AlignedBuffer {
    lines: Vec<Line>,
    len: usize,
}

impl AlignedBuffer {
    /// `len` zeros.
    pub fn zeroed(len: usize) -> AlignedBuffer {
        AlignedBuffer {
            lines: vec![Line([0.0; LINE_ELEMS]); len.div_ceil(LINE_ELEMS)],
            len,
        }
    }
}

impl Deref for AlignedBuffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: the lines are `repr(C)` arrays of f32 without padding and hold at least `len`.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_at_a_line_and_has_its_length() {
        for len in [0, 1, 16, 17, 577] {
            let mut buffer = AlignedBuffer::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.as_ptr().cast::<u8>().align_offset(64) == 0);
            buffer.fill(1.5);
            assert!(buffer.iter().all(|&v| v == 1.5));
        }
    }
}
