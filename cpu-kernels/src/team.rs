//! What a team of threads needs to run one list of calls together: a fair split of the work, buffers
//! that all of them reach, and a way to wait for each other that costs less than waking a thread.

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

    /// Where it starts: for elements that are no range.
    pub fn as_mut_ptr(&self) -> *mut T {
        self.start
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

/// Turns to spin before giving the core away: a wait in a decode step is a few microseconds, and a
/// thread that the system has put aside must not be waited for with a core in hand.
const SPINS: usize = 2_000;

/// Counters of one phase, on a cache line of their own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Phase {
    taken: AtomicUsize,
    finished: AtomicUsize,
}

/// A list of phases that a team of threads goes through together. A phase is a number of shares;
/// whoever comes takes the next one, and all go on when the last share is finished. A thread that
/// the system runs late therefore holds nobody up: the others do its work, and it catches up through
/// phases that are finished already.
#[derive(Debug)]
pub struct Phases {
    phases: Vec<Phase>,
    poisoned: AtomicBool,
}

impl Phases {
    /// A list of `count` phases, none begun.
    pub fn new(count: usize) -> Phases {
        let phases = std::iter::repeat_with(Phase::default).take(count).collect();
        Phases {
            phases,
            poisoned: AtomicBool::new(false),
        }
    }

    /// Makes the list ready for another walk.
    pub fn restart(&mut self) {
        for phase in &mut self.phases {
            *phase = Phase::default();
        }
        self.poisoned = AtomicBool::new(false);
    }

    /// Runs `share(i)` for those `i` of `0..shares` that no other thread took, and returns when all
    /// are finished; what they wrote is then seen by this thread. Every thread of the team calls this
    /// for every phase in order, with the same number of shares.
    ///
    /// # Panics
    /// If `phase` is not in the list, or another thread panicked in it: its share never ends.
    pub fn run(&self, phase: usize, shares: usize, mut share: impl FnMut(usize)) {
        let Phase { taken, finished } = &self.phases[phase];
        // The load spares late threads the write.
        while taken.load(Ordering::Relaxed) < shares {
            let i = taken.fetch_add(1, Ordering::Relaxed);
            if i >= shares {
                break;
            }
            let guard = Guard(&self.poisoned);
            share(i);
            drop(guard);
            finished.fetch_add(1, Ordering::AcqRel);
        }
        let mut turns = 0;
        // The writes of all shares are released in one chain of additions.
        while finished.load(Ordering::Acquire) < shares {
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
}

/// Poisons the list when dropped by a panic.
struct Guard<'a>(&'a AtomicBool);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
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
    fn a_phase_sees_what_the_one_before_wrote() {
        const ROUNDS: usize = 300;
        const SHARES: usize = 5;
        let mut phases = Phases::new(2 * ROUNDS);
        for threads in [1, 2, 4] {
            let mut values = vec![0usize; SHARES];
            let shared = SharedSlice::new(&mut values);
            phases.restart();
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    let phases = &phases;
                    scope.spawn(move || {
                        for round in 0..ROUNDS {
                            phases.run(2 * round, SHARES, |i| {
                                // SAFETY: element `i` belongs to whoever took share `i`.
                                unsafe { shared.slice_mut(i..i + 1)[0] += i + 1 };
                            });
                            phases.run(2 * round + 1, 1, |_| {
                                // SAFETY: nobody writes in this phase.
                                let values = unsafe { shared.slice(0..SHARES) };
                                for (i, value) in values.iter().enumerate() {
                                    assert_eq!(*value, (i + 1) * (round + 1));
                                }
                            });
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn a_panic_frees_the_waiting() {
        let phases = Phases::new(1);
        std::thread::scope(|scope| {
            let team: Vec<_> = (0..2)
                .map(|_| scope.spawn(|| phases.run(0, 1, |_| panic!("on purpose"))))
                .collect();
            for thread in team {
                assert!(thread.join().is_err());
            }
        });
    }
}
