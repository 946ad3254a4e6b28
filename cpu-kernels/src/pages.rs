//! Memory for weights. A token reads all of them once, so what decides is how fast the core walks through memory:
//! with pages of 4 KB its prefetching stops at the end of each and an address is translated anew; with pages of
//! 2 MB one thread of a Xeon read 1.3 to 1.6 times as fast. Linux gives them where it is asked to
//! (`/sys/kernel/mm/transparent_hugepage/enabled` is `madvise` or `always`); elsewhere nothing changes.
//!
//! Matrices lie one behind the other in slabs, so that no page is left half empty for each of them.

use std::alloc::{Layout, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Bytes of a line.
pub const LINE_BYTES: usize = 64;
/// Bytes of a large page.
const PAGE_BYTES: usize = 2 << 20;
/// Bytes of a slab; more, if one matrix takes more. At its end a page may be left half empty: few of them.
const SLAB_BYTES: usize = 64 * PAGE_BYTES;

/// 64 bytes, where vector loads want them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Line(pub [u8; LINE_BYTES]);

/// Memory that is handed out from its start to its end, and given back when nobody holds a part of it.
struct Slab {
    start: NonNull<u8>,
    layout: Layout,
    /// Bytes that are handed out.
    used: Mutex<usize>,
}

// SAFETY: the memory belongs to the slab, and parts that are handed out do not overlap.
unsafe impl Send for Slab {}
// SAFETY: as above; what is left is behind the lock.
unsafe impl Sync for Slab {}

impl Slab {
    /// Zeros; memory that the system has not given out yet where it can be asked for that.
    fn new(bytes: usize) -> Slab {
        let bytes = bytes.next_multiple_of(PAGE_BYTES);
        let layout =
            Layout::from_size_align(bytes, PAGE_BYTES).expect("weights fit the address space");
        let start = zeros(layout).unwrap_or_else(|| handle_alloc_error(layout));
        ask_for_large_pages(start, bytes);
        Slab {
            start,
            layout,
            used: Mutex::new(0),
        }
    }

    /// Where the next `bytes` begin, if there is room for them.
    fn take(&self, bytes: usize) -> Option<NonNull<u8>> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let start = *used;
        let end = start
            .checked_add(bytes)
            .filter(|end| *end <= self.layout.size())?;
        *used = end;
        // SAFETY: inside the slab.
        Some(unsafe { self.start.add(start) })
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: made by `zeros` with this layout, and nobody holds a part of it.
        unsafe { give_back(self.start, self.layout) };
    }
}

/// Zeros that take memory where they are written: a page that holds weights at last is touched once. None if
/// there is no memory.
#[cfg(target_os = "linux")]
fn zeros(layout: Layout) -> Option<NonNull<u8>> {
    use std::ptr::null_mut;
    let (len, align) = (layout.size(), layout.align());
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let all = len.checked_add(align)?;
    // SAFETY: a new map; what lies in front of and behind the aligned part is given back, nothing else has it.
    unsafe {
        let map = libc::mmap(null_mut(), all, protection, flags, -1, 0);
        if map == libc::MAP_FAILED {
            return None;
        }
        let map = map.cast::<u8>();
        let before = map.align_offset(align);
        if before > 0 {
            libc::munmap(map.cast(), before);
        }
        let start = map.add(before);
        if align > before {
            libc::munmap(start.add(len).cast(), align - before);
        }
        NonNull::new(start)
    }
}

/// # Safety
/// What [`zeros`] gave for this layout, and nobody uses any more.
#[cfg(target_os = "linux")]
unsafe fn give_back(start: NonNull<u8>, layout: Layout) {
    // SAFETY: the caller's contract.
    unsafe { libc::munmap(start.as_ptr().cast(), layout.size()) };
}

#[cfg(not(target_os = "linux"))]
fn zeros(layout: Layout) -> Option<NonNull<u8>> {
    // SAFETY: not of size 0.
    NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })
}

/// # Safety
/// What [`zeros`] gave for this layout, and nobody uses any more.
#[cfg(not(target_os = "linux"))]
unsafe fn give_back(start: NonNull<u8>, layout: Layout) {
    // SAFETY: the caller's contract.
    unsafe { std::alloc::dealloc(start.as_ptr(), layout) };
}

#[cfg(target_os = "linux")]
fn ask_for_large_pages(start: NonNull<u8>, bytes: usize) {
    // SAFETY: memory of this process, whose content it leaves alone. A refusal changes nothing.
    unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_large_pages(_: NonNull<u8>, _: usize) {}

/// Lines in a slab, zero at first.
pub struct Lines {
    start: NonNull<Line>,
    len: usize,
    /// None if there are no lines.
    slab: Option<Arc<Slab>>,
}

// SAFETY: it owns its part of the slab.
unsafe impl Send for Lines {}
// SAFETY: as above.
unsafe impl Sync for Lines {}

impl Lines {
    /// `len` zeros.
    pub fn zeroed(len: usize) -> Lines {
        static LAST: Mutex<Weak<Slab>> = Mutex::new(Weak::new());
        let bytes = len
            .checked_mul(LINE_BYTES)
            .expect("weights fit the address space");
        if len == 0 {
            return Lines {
                start: NonNull::dangling(),
                len,
                slab: None,
            };
        }
        let (slab, start) = {
            let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
            let room = last
                .upgrade()
                .and_then(|slab| Some((slab.take(bytes)?, slab)));
            match room {
                Some((start, slab)) => (slab, start),
                None => {
                    let slab = Arc::new(Slab::new(bytes.max(SLAB_BYTES)));
                    let start = slab.take(bytes).expect("a new slab has room");
                    *last = Arc::downgrade(&slab);
                    (slab, start)
                }
            }
        };
        Lines {
            start: start.cast(),
            len,
            slab: Some(slab),
        }
    }
}

impl Deref for Lines {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        // SAFETY: its part of the slab, which begins as zeros and starts at a multiple of 64 bytes.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [Line] {
        // SAFETY: as in `deref`, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Clone for Lines {
    fn clone(&self) -> Lines {
        let mut lines = Lines::zeroed(self.len);
        lines.copy_from_slice(self);
        lines
    }
}

impl PartialEq for Lines {
    fn eq(&self, other: &Lines) -> bool {
        **self == **other
    }
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slab = self.slab.as_ref().map_or(0, |slab| slab.layout.size());
        write!(f, "{} lines of a slab of {slab} bytes", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_zero_apart_and_outlive_each_other() {
        let lengths = [
            1,
            700,
            0,
            SLAB_BYTES / LINE_BYTES - 5,
            3 * PAGE_BYTES / LINE_BYTES,
            9,
        ];
        let mut parts: Vec<Lines> = lengths.iter().map(|&len| Lines::zeroed(len)).collect();
        for (i, part) in parts.iter_mut().enumerate() {
            assert_eq!(part.len(), lengths[i]);
            assert!(part.iter().all(|line| line.0 == [0; LINE_BYTES]));
            part.fill(Line([i as u8 + 1; LINE_BYTES]));
        }
        let first = parts[0].clone();
        drop(parts.remove(1));
        for (part, value) in parts.iter().zip([1, 3, 4, 5, 6]) {
            assert!(part.iter().all(|line| line.0 == [value; LINE_BYTES]));
            assert_eq!(part.as_ptr() as usize % LINE_BYTES, 0);
        }
        assert_eq!(first, parts[0]);
        assert_ne!(parts[0], parts[4]);
    }

    #[test]
    fn memory_that_was_used_is_zero_again() {
        for _ in 0..3 {
            let mut lines = Lines::zeroed(100);
            assert!(lines.iter().all(|line| line.0 == [0; LINE_BYTES]));
            lines.fill(Line([7; LINE_BYTES]));
        }
    }
}
