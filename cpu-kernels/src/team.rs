//! What a fixed team of threads needs to run one list of calls together: a fair split of the work,
//! buffers that all of them reach, and a barrier that costs less than waking a thread.

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Part `part` of `parts` of `0..len`, cut at multiples of `unit`: the parts are disjoint, cover
/// everything, and differ by at most one unit.
pub fn split(len: usize, unit: usize, part: usize, parts: usize) -> Range<usize> {
    let units = len.div_ceil(unit);
    let cut = |part: usize| (units * part / parts * unit).min(len);
    cut(part)..cut(part + 1)
}

/// A slice that several threads read and write at once, each its own elements.
#[derive(Debug, Clone, Copy)]
pub struct SharedSlice<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a [UnsafeCell<T>]>,
}

// SAFETY: access goes through unsafe methods whose callers keep the elements of threads apart.
unsafe impl<T: Send + Sync> Send for SharedSlice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    /// Shares `slice` for as long as it is borrowed.
    pub fn new(slice: &'a mut [T]) -> SharedSlice<'a, T> {
        SharedSlice {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            borrow: PhantomData,
        }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements of `range`, still shared.
    ///
    /// # Panics
    /// If `range` is outside the slice.
    pub fn part(&self, range: Range<usize>) -> SharedSlice<'a, T> {
        self.check(&range);
        SharedSlice {
            // No overflow: inside the borrowed slice.
            start: self.start.wrapping_add(range.start),
            len: range.len(),
            borrow: PhantomData,
        }
    }

    fn check(&self, range: &Range<usize>) {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "range outside the shared slice"
        );
    }

    /// The elements of `range`.
    ///
    /// # Panics
    /// If `range` is outside the slice.
    ///
    /// # Safety
    /// No thread writes these elements while the result lives.
    pub unsafe fn slice(&self, range: Range<usize>) -> &'a [T] {
        self.check(&range);
        // SAFETY: inside the borrowed slice; the caller excludes writers.
        unsafe { std::slice::from_raw_parts(self.start.add(range.start), range.len()) }
    }

    /// The elements of `range`, to write.
    ///
    /// # Panics
    /// If `range` is outside the slice.
    ///
    /// # Safety
    /// Nothing else reads or writes these elements while the result lives.
    pub unsafe fn slice_mut(&self, range: Range<usize>) -> &'a mut [T] {
        self.check(&range);
        // SAFETY: inside the borrowed slice; the caller excludes every other access.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// Turns to spin before giving the core away: a wait in a decode step is a microsecond or two, and
/// a thread that the system has put aside must not be waited for with a core in hand.
const SPINS: usize = 20_000;

/// Where the threads of a team wait for each other.
#[derive(Debug)]
pub struct Barrier {
    parts: usize,
    arrived: AtomicUsize,
    generation: AtomicUsize,
    poisoned: AtomicBool,
}

impl Barrier {
    /// A barrier of `parts` threads.
    pub fn new(parts: usize) -> Barrier {
        Barrier {
            parts,
            arrived: AtomicUsize::new(0),
            generation: AtomicUsize::new(0),
            poisoned: AtomicBool::new(false),
        }
    }

    /// Returns when all threads have come here; what each wrote before is then seen by all.
    ///
    /// # Panics
    /// If another thread of the team panicked: it will never come.
    pub fn wait(&self) {
        if self.parts == 1 {
            return;
        }
        // Read before arriving: the last to arrive changes it.
        let generation = self.generation.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.parts {
            self.arrived.store(0, Ordering::Relaxed);
            self.generation
                .store(generation.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut turns = 0;
        while self.generation.load(Ordering::Acquire) == generation {
            assert!(
                !self.poisoned.load(Ordering::Relaxed),
                "another thread of the team panicked"
            );
            if turns < SPINS {
                turns += 1;
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// Keeps the team from waiting for a thread that unwinds: hold the result while working.
    pub fn guard(&self) -> Guard<'_> {
        Guard(self)
    }
}

/// Poisons its barrier when dropped by a panic.
#[derive(Debug)]
pub struct Guard<'a>(&'a Barrier);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.poisoned.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_covers_everything_once() {
        for (len, unit, parts) in [(0, 4, 3), (1, 4, 3), (193, 4, 2), (576, 16, 5), (7, 1, 7)] {
            let mut next = 0;
            for part in 0..parts {
                let range = split(len, unit, part, parts);
                assert_eq!(range.start, next);
                assert!(range.end == len || range.end.is_multiple_of(unit));
                next = range.end;
            }
            assert_eq!(next, len);
        }
    }

    #[test]
    fn barrier_orders_writes_of_a_team() {
        let parts = 3;
        let barrier = Barrier::new(parts);
        let mut values = vec![0usize; parts];
        let shared = SharedSlice::new(&mut values);
        std::thread::scope(|scope| {
            for part in 0..parts {
                let barrier = &barrier;
                scope.spawn(move || {
                    for round in 1..200 {
                        // SAFETY: element `part` is this thread's until the barrier.
                        unsafe { shared.slice_mut(part..part + 1)[0] = round };
                        barrier.wait();
                        // SAFETY: nobody writes between the two barriers.
                        assert_eq!(unsafe { shared.slice(0..parts) }, [round; 3]);
                        barrier.wait();
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_frees_the_waiting() {
        let barrier = Barrier::new(2);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| barrier.wait());
            let failing = scope.spawn(|| {
                let _guard = barrier.guard();
                panic!("on purpose");
            });
            assert!(failing.join().is_err());
            assert!(waiting.join().is_err());
        });
    }
}
