//! Emulated shared memory of one block, and the detection of races on it.
//!
//! Two accesses of one word by different threads, at least one of them a store, have to be ordered:
//! by a block barrier (the block's *epoch* counts those), or, within a warp, by warp barriers that
//! lead from one lane to the other (each warp keeps vector clocks of its lanes for that).
//!
//! Bytes that an asynchronous copy brings belong to nobody until the thread that started it has waited
//! for it: then they count as stored by it.

use super::fault::{FaultKind, Problem, line};
use super::memory::Value;
use super::products::{Products, being_read};
use std::collections::VecDeque;
use std::ops::Range;
use std::panic::Location;

mod operand;

/// Address of the first byte: not 0, so that an address made from nothing is out of bounds.
pub const BASE: u32 = 1024;

const LANES: usize = 32;
const WORD: usize = 4;

/// The last access of a kind to a word. Epoch 0: none.
#[derive(Clone, Copy)]
struct Store {
    epoch: u32,
    time: u32,
    /// Fences of the block for products before it.
    fences: u32,
    rank: u16,
    location: Option<&'static Location<'static>>,
}

/// The loads of a word in an epoch.
#[derive(Clone, Copy)]
struct Loads {
    epoch: u32,
    /// Time of the latest one in `warp`.
    time: u32,
    /// Lanes of `warp` that loaded and are not ordered before one that loaded later.
    lanes: u32,
    warp: u16,
    /// A thread of another warp that loaded, if any.
    other: Option<u16>,
    location: Option<&'static Location<'static>>,
}

#[derive(Clone, Copy)]
struct Word {
    store: Store,
    loads: Loads,
    /// The thread whose copy to it is under way.
    copier: Option<u16>,
}

const UNTOUCHED: Word = Word {
    store: Store {
        epoch: 0,
        time: 0,
        fences: 0,
        rank: 0,
        location: None,
    },
    loads: Loads {
        epoch: 0,
        time: 0,
        lanes: 0,
        warp: 0,
        other: None,
        location: None,
    },
    copier: None,
};

/// A copy under way: the words that it brings.
struct Copy {
    words: Range<usize>,
    location: &'static Location<'static>,
}

/// The asynchronous copies of a thread.
#[derive(Default)]
struct Copies {
    /// Those of no group yet.
    open: Vec<Copy>,
    /// Groups, oldest first.
    groups: VecDeque<Vec<Copy>>,
}

/// How the lanes of a warp are ordered by its warp barriers.
#[derive(Clone)]
struct Clocks {
    /// Now; advances with each warp barrier.
    time: u32,
    /// `seen[a][b]`: accesses of lane b up to this time are ordered before what lane a does next.
    seen: [[u32; LANES]; LANES],
}

/// Shared memory of one block.
pub struct Shared {
    bytes: Vec<u8>,
    words: Vec<Word>,
    epoch: u32,
    clocks: Vec<Clocks>,
    /// By rank of the thread.
    copies: Vec<Copies>,
    products: Products,
    /// Fences for products so far, and by rank how many there were when the thread made its last.
    fences: u32,
    fenced: Vec<u32>,
    block: [u32; 3],
}

impl Shared {
    /// `bytes` of memory for a block of these dimensions.
    pub fn new(bytes: u32, block: [u32; 3]) -> Shared {
        let bytes = bytes as usize;
        let threads = block.iter().product::<u32>() as usize;
        let warps = if bytes == 0 {
            0
        } else {
            threads.div_ceil(LANES)
        };
        Shared {
            bytes: vec![0xcd; bytes],
            words: vec![UNTOUCHED; bytes.div_ceil(WORD)],
            epoch: 1,
            clocks: vec![
                Clocks {
                    time: 1,
                    seen: [[0; LANES]; LANES]
                };
                warps
            ],
            copies: (0..threads).map(|_| Copies::default()).collect(),
            products: Products::default(),
            fences: 0,
            fenced: vec![0; threads],
            block,
        }
    }

    /// As fresh, for the next block.
    pub fn reset(&mut self) {
        self.words.fill(UNTOUCHED);
        self.epoch = 1;
        for clocks in &mut self.clocks {
            *clocks = Clocks {
                time: 1,
                seen: [[0; LANES]; LANES],
            };
        }
        for copies in &mut self.copies {
            *copies = Copies::default();
        }
        self.products = Products::default();
        self.fences = 0;
        self.fenced.fill(0);
    }

    /// All threads of the block have met.
    pub fn sync_block(&mut self) {
        self.epoch += 1;
    }

    /// The lanes of `mask` in `warp` have met.
    pub fn sync_warp(&mut self, warp: usize, mask: u32) {
        let Some(clocks) = self.clocks.get_mut(warp) else {
            return;
        };
        let mut joined = [0; LANES];
        for lane in lanes(mask) {
            for (joined, &seen) in joined.iter_mut().zip(&clocks.seen[lane]) {
                *joined = seen.max(*joined);
            }
        }
        for lane in lanes(mask) {
            joined[lane] = clocks.time;
        }
        for lane in lanes(mask) {
            clocks.seen[lane] = joined;
        }
        clocks.time += 1;
    }

    #[inline]
    fn range(&self, address: u32, bytes: usize, what: &str) -> Result<usize, Problem> {
        let offset = i64::from(address) - i64::from(BASE);
        if let Ok(start) = usize::try_from(offset)
            && start + bytes <= self.bytes.len()
        {
            if start.is_multiple_of(bytes) {
                return Ok(start);
            }
            return Err(Problem::new(
                FaultKind::Misaligned,
                format!(
                    "{what} of {bytes} bytes at byte {offset} of shared memory: not a multiple of {bytes}"
                ),
            ));
        }
        Err(Problem::new(
            FaultKind::OutOfBounds,
            format!(
                "{what} of {bytes} bytes at byte {offset} of {} bytes of shared memory",
                self.bytes.len()
            ),
        ))
    }

    /// `ld.shared` by the thread of this rank.
    #[inline]
    pub fn load<T: Value>(
        &mut self,
        address: u32,
        rank: u16,
        location: &'static Location<'static>,
    ) -> Result<T, Problem> {
        let start = self.range(address, T::BYTES, "load")?;
        for word in start / WORD..(start + T::BYTES).div_ceil(WORD) {
            self.mark_load(word, rank, location)?;
        }
        Ok(T::read(&self.bytes[start..start + T::BYTES]))
    }

    /// `st.shared` by the thread of this rank.
    #[inline]
    pub fn store<T: Value>(
        &mut self,
        address: u32,
        value: T,
        rank: u16,
        location: &'static Location<'static>,
    ) -> Result<(), Problem> {
        let start = self.range(address, T::BYTES, "store")?;
        if let Some(reading) = self.products.reading(address, T::BYTES) {
            return Err(being_read(address, reading));
        }
        for word in start / WORD..(start + T::BYTES).div_ceil(WORD) {
            self.mark_store(word, rank, location)?;
        }
        value.write(&mut self.bytes[start..start + T::BYTES]);
        Ok(())
    }

    /// `cp.async` by the thread of this rank: `value` is on its way.
    pub fn copy<T: Value>(
        &mut self,
        address: u32,
        value: T,
        rank: u16,
        location: &'static Location<'static>,
    ) -> Result<(), Problem> {
        // It may arrive right now, so it has to be ordered as a store is.
        self.store(address, value, rank, location)?;
        let start = (address - BASE) as usize;
        let words = start / WORD..(start + T::BYTES).div_ceil(WORD);
        for word in &mut self.words[words.clone()] {
            word.copier = Some(rank);
        }
        self.copies[usize::from(rank)]
            .open
            .push(Copy { words, location });
        Ok(())
    }

    /// `cp.async.commit_group` by the thread of this rank.
    pub fn commit_copies(&mut self, rank: u16) {
        let copies = &mut self.copies[usize::from(rank)];
        let group = std::mem::take(&mut copies.open);
        copies.groups.push_back(group);
    }

    /// `cp.async.wait_group`: all but the last `groups` groups of the thread have arrived.
    pub fn wait_for_copies(&mut self, rank: u16, groups: usize) {
        let time = self.time(rank);
        let copies = &mut self.copies[usize::from(rank)];
        let arrived = copies.groups.len().saturating_sub(groups);
        for copy in copies.groups.drain(..arrived).flatten() {
            for word in &mut self.words[copy.words] {
                word.copier = None;
                word.store = Store {
                    epoch: self.epoch,
                    time,
                    fences: self.fences,
                    rank,
                    location: Some(copy.location),
                };
            }
        }
    }

    /// Now, in the thread's warp.
    fn time(&self, rank: u16) -> u32 {
        self.clocks
            .get(usize::from(rank) / LANES)
            .map_or(0, |clocks| clocks.time)
    }

    /// Fails if a copy to the word is under way.
    #[inline]
    fn arrived(&self, index: usize, does: &str) -> Result<(), Problem> {
        match self.words[index].copier {
            None => Ok(()),
            Some(copier) => Err(self.under_way(index, does, copier)),
        }
    }

    #[cold]
    fn under_way(&self, index: usize, does: &str, copier: u16) -> Problem {
        let [x, y, z] = thread_index(u32::from(copier), self.block);
        Problem::new(
            FaultKind::AsyncCopy,
            format!(
                "{does} byte {} of shared memory while a copy that thread ({x}, {y}, {z}) started is under way: it has not waited for it",
                index * WORD
            ),
        )
    }

    /// Whether what `before` did at `time` of its warp is ordered before what `after` does now,
    /// both in this epoch.
    #[inline]
    fn ordered(&self, before: u16, time: u32, after: u16) -> bool {
        let (a, b) = (usize::from(before), usize::from(after));
        a == b
            || a / LANES == b / LANES && self.clocks[a / LANES].seen[b % LANES][a % LANES] >= time
    }

    #[inline]
    fn mark_load(
        &mut self,
        index: usize,
        rank: u16,
        location: &'static Location<'static>,
    ) -> Result<(), Problem> {
        self.arrived(index, "loads")?;
        let Word { store, loads, .. } = self.words[index];
        if store.epoch == 0 {
            return Err(Problem::new(
                FaultKind::Uninitialised,
                format!(
                    "load of byte {} of shared memory: nothing wrote it",
                    index * WORD
                ),
            ));
        }
        if store.epoch == self.epoch && !self.ordered(store.rank, store.time, rank) {
            return Err(self.race(index, "loads", store.rank, "stored", store.location));
        }
        let warp = rank / LANES as u16;
        let bit = 1 << (usize::from(rank) % LANES);
        let time = self.clocks[usize::from(warp)].time;
        let loads = if loads.epoch != self.epoch {
            Loads {
                epoch: self.epoch,
                time,
                lanes: bit,
                warp,
                other: None,
                location: Some(location),
            }
        } else if loads.warp != warp {
            Loads {
                other: Some(rank),
                ..loads
            }
        } else if loads.time == time {
            Loads {
                lanes: loads.lanes | bit,
                location: Some(location),
                ..loads
            }
        } else {
            // A lane ordered before this one need not be kept: whoever is ordered after this load
            // is ordered after that one too.
            let kept = lanes(loads.lanes)
                .filter(|&lane| !self.ordered(warp * LANES as u16 + lane as u16, loads.time, rank))
                .fold(0, |kept, lane| kept | 1 << lane);
            Loads {
                time,
                lanes: kept | bit,
                location: Some(location),
                ..loads
            }
        };
        self.words[index].loads = loads;
        Ok(())
    }

    #[inline]
    fn mark_store(
        &mut self,
        index: usize,
        rank: u16,
        location: &'static Location<'static>,
    ) -> Result<(), Problem> {
        self.arrived(index, "stores to")?;
        let Word { store, loads, .. } = self.words[index];
        if store.epoch == self.epoch && !self.ordered(store.rank, store.time, rank) {
            return Err(self.race(index, "stores", store.rank, "stored", store.location));
        }
        if loads.epoch == self.epoch {
            let other = loads
                .other
                .filter(|other| other / LANES as u16 != rank / LANES as u16);
            let reader = other.or_else(|| {
                lanes(loads.lanes)
                    .map(|lane| loads.warp * LANES as u16 + lane as u16)
                    .find(|&reader| !self.ordered(reader, loads.time, rank))
            });
            if let Some(reader) = reader {
                return Err(self.race(index, "stores", reader, "loaded", loads.location));
            }
        }
        let time = self.clocks[usize::from(rank) / LANES].time;
        self.words[index].store = Store {
            epoch: self.epoch,
            time,
            fences: self.fences,
            rank,
            location: Some(location),
        };
        Ok(())
    }

    #[cold]
    fn race(
        &self,
        index: usize,
        does: &str,
        other: u16,
        did: &str,
        location: Option<&'static Location<'static>>,
    ) -> Problem {
        let [x, y, z] = thread_index(u32::from(other), self.block);
        let line = location.map_or_else(String::new, |location| format!(" at {}", line(location)));
        Problem::new(
            FaultKind::Race,
            format!(
                "{does} byte {} of shared memory, which thread ({x}, {y}, {z}) {did}{line}, with no barrier between",
                index * WORD
            ),
        )
    }
}

/// The lanes of a mask, in order.
pub fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (lane < 32).then_some(lane as usize)
    })
}

/// Thread index (x, y, z) of a rank.
pub fn thread_index(rank: u32, block: [u32; 3]) -> [u32; 3] {
    [
        rank % block[0],
        rank / block[0] % block[1],
        rank / (block[0] * block[1]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(threads: u32) -> Shared {
        Shared::new(64, [threads, 1, 1])
    }

    fn here() -> &'static Location<'static> {
        Location::caller()
    }

    fn race(result: Result<impl Sized, Problem>) {
        assert_eq!(result.err().expect("a race").kind, FaultKind::Race);
    }

    #[test]
    fn a_block_barrier_orders_everything() {
        let mut memory = memory(64);
        memory.store(BASE, 1u32, 0, here()).unwrap();
        race(memory.load::<u32>(BASE, 63, here()));
        memory.sync_block();
        for rank in 0..64 {
            assert_eq!(memory.load::<u32>(BASE, rank, here()).unwrap(), 1);
        }
        race(memory.store(BASE, 2u32, 0, here()));
        memory.sync_block();
        memory.store(BASE, 2u32, 0, here()).unwrap();
    }

    #[test]
    fn a_warp_barrier_orders_its_lanes_only() {
        let mut memory = memory(64);
        memory.store(BASE, 1u32, 3, here()).unwrap();
        memory.sync_warp(0, 0x0000_ffff);
        memory.load::<u32>(BASE, 4, here()).unwrap();
        race(memory.load::<u32>(BASE, 20, here()));
        race(memory.load::<u32>(BASE, 35, here()));
        // Lane 4 hands the order on to lane 20.
        memory.sync_warp(0, 1 << 4 | 1 << 20);
        memory.load::<u32>(BASE, 20, here()).unwrap();
        race(memory.store(BASE, 2u32, 5, here()));
        memory.sync_warp(0, u32::MAX);
        memory.store(BASE, 2u32, 5, here()).unwrap();
    }

    #[test]
    fn a_thread_is_ordered_with_itself() {
        let mut memory = memory(32);
        memory.store(BASE + 8, 1u32, 7, here()).unwrap();
        memory.load::<u32>(BASE + 8, 7, here()).unwrap();
        memory.store(BASE + 8, 2u32, 7, here()).unwrap();
        race(memory.store(BASE, [0.0f32; 4], 8, here()));
    }

    #[test]
    fn a_copy_is_there_once_its_thread_has_waited() {
        let mut memory = memory(64);
        let early = |result: Result<u32, Problem>| {
            assert_eq!(result.unwrap_err().kind, FaultKind::AsyncCopy);
        };
        for (i, value) in [7u32, 8, 9].into_iter().enumerate() {
            memory.copy(BASE + 4 * i as u32, value, 3, here()).unwrap();
            memory.commit_copies(3);
        }
        memory.wait_for_copies(3, 1);
        assert_eq!(memory.load::<u32>(BASE, 3, here()).unwrap(), 7);
        assert_eq!(memory.load::<u32>(BASE + 4, 3, here()).unwrap(), 8);
        early(memory.load(BASE + 8, 3, here()));
        // A barrier does not wait for copies, and other threads need one besides.
        memory.sync_block();
        early(memory.load(BASE + 8, 40, here()));
        assert_eq!(memory.load::<u32>(BASE, 40, here()).unwrap(), 7);
        memory.wait_for_copies(3, 0);
        race(memory.load::<u32>(BASE + 8, 40, here()));
        memory.sync_block();
        assert_eq!(memory.load::<u32>(BASE + 8, 40, here()).unwrap(), 9);
    }

    #[test]
    fn a_copy_must_not_meet_another_access() {
        let mut memory = memory(64);
        memory.copy(BASE, 1u32, 0, here()).unwrap();
        let stored = memory.store(BASE, 2u32, 0, here()).unwrap_err();
        assert_eq!(stored.kind, FaultKind::AsyncCopy);
        // Not in a group, so not waited for.
        memory.wait_for_copies(0, 0);
        assert!(memory.load::<u32>(BASE, 0, here()).is_err());
        memory.reset();
        memory.store(BASE, 1u32, 5, here()).unwrap();
        race(memory.copy(BASE, 2u32, 40, here()));
    }

    #[test]
    fn contents_do_not_outlive_the_block() {
        let mut memory = memory(32);
        memory.store(BASE, 1u32, 0, here()).unwrap();
        memory.reset();
        let problem = memory.load::<u32>(BASE, 0, here()).unwrap_err();
        assert_eq!(problem.kind, FaultKind::Uninitialised);
    }
}
