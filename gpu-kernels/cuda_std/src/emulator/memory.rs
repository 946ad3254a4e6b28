//! Emulated global memory: buffers in an address space of their own, with a shadow byte per byte.
//!
//! An address holds, from the top: a tag of the OS thread that owns the buffer (12 bits), the
//! buffer's slot (20 bits), and 2^31 plus the offset (32 bits). Every buffer thus has 2 GiB of
//! nothing on either side: an index that runs off its end, or below its start, meets no other
//! buffer. Slots are not used twice: an address of a freed buffer stays invalid.

use super::fault::{Fault, FaultKind, Problem};
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

const SLOT_BITS: u32 = 20;
const OFFSET_BITS: u32 = 32;
const ORIGIN: u64 = 1 << (OFFSET_BITS - 1);
const MAX_BUFFER_BYTES: usize = ORIGIN as usize;

/// Accesses a thread may make before it has to reach a barrier, a warp operation or an atomic: a
/// thread that makes more loops over loads that no other thread gets a chance to change.
const ACCESSES_PER_TURN: u64 = 1 << 26;

/// A plain value of a width that one instruction loads or stores. Its alignment is its width.
pub trait Value: Copy {
    /// Width in bytes.
    const BYTES: usize;
    /// The value that `bytes` (of length `BYTES`) hold.
    fn read(bytes: &[u8]) -> Self;
    /// Puts the value into `bytes` (of length `BYTES`).
    fn write(self, bytes: &mut [u8]);
}

macro_rules! value {
    ($($ty:ty),*) => {$(
        impl Value for $ty {
            const BYTES: usize = size_of::<$ty>();
            #[inline(always)]
            fn read(bytes: &[u8]) -> $ty {
                let mut array = [0; size_of::<$ty>()];
                array.copy_from_slice(bytes);
                <$ty>::from_le_bytes(array)
            }
            #[inline(always)]
            fn write(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}

value!(u8, i8, u16, i16, u32, i32, u64, i64, f32);

impl<T: Value + Default, const N: usize> Value for [T; N] {
    const BYTES: usize = N * T::BYTES;
    #[inline(always)]
    fn read(bytes: &[u8]) -> [T; N] {
        let mut values = [T::default(); N];
        for (value, bytes) in values.iter_mut().zip(bytes.chunks_exact(T::BYTES)) {
            *value = T::read(bytes);
        }
        values
    }
    #[inline(always)]
    fn write(self, bytes: &mut [u8]) {
        for (value, bytes) in self.into_iter().zip(bytes.chunks_exact_mut(T::BYTES)) {
            value.write(bytes);
        }
    }
}

/// Shadow of a byte that nothing wrote.
const UNWRITTEN: u8 = 0;
/// Shadow of a byte written before this launch.
const WRITTEN: u8 = 1;
/// Shadow of a byte written by this launch.
const WRITTEN_NOW: u8 = 2;

/// One buffer.
struct Allocation {
    bytes: Vec<u8>,
    /// A state per byte; empty while every byte is `WRITTEN`.
    shadow: Vec<u8>,
    /// Range of bytes written by the running launch; empty if none.
    dirty: std::ops::Range<usize>,
}

/// How a load treats what the launch wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coherence {
    /// `ld.global`
    Coherent,
    /// `ld.global.nc`
    NonCoherent,
}

/// The buffers of an OS thread, and counts of the running launch.
pub struct Memory {
    tag: u64,
    allocations: Vec<Option<Box<Allocation>>>,
    /// Slots that the running launch wrote to.
    dirty: Vec<usize>,
    /// Loads and stores of this launch.
    accesses: u64,
    access_limit: u64,
    /// Stores of this launch: what a polling thread may be waiting for.
    pub stores: u64,
    pub bytes_loaded: u64,
    pub bytes_stored: u64,
}

thread_local! {
    /// This OS thread's global memory.
    pub static MEMORY: RefCell<Memory> = RefCell::new(Memory::new());
}

impl Memory {
    fn new() -> Memory {
        static NEXT_TAG: AtomicU64 = AtomicU64::new(0);
        let tags = (1 << (64 - OFFSET_BITS - SLOT_BITS)) - 1;
        Memory {
            tag: 1 + NEXT_TAG.fetch_add(1, Ordering::Relaxed) % tags,
            allocations: Vec::new(),
            dirty: Vec::new(),
            accesses: 0,
            access_limit: ACCESSES_PER_TURN,
            stores: 0,
            bytes_loaded: 0,
            bytes_stored: 0,
        }
    }

    /// A new buffer; its slot.
    pub fn allocate(&mut self, bytes: Vec<u8>, written: bool) -> usize {
        assert!(
            bytes.len() < MAX_BUFFER_BYTES,
            "an emulated buffer holds less than 2 GiB"
        );
        assert!(
            self.allocations.len() < 1 << SLOT_BITS,
            "2^20 emulated buffers in one thread"
        );
        let shadow = if written {
            Vec::new()
        } else {
            vec![UNWRITTEN; bytes.len()]
        };
        self.allocations.push(Some(Box::new(Allocation {
            bytes,
            shadow,
            dirty: 0..0,
        })));
        self.allocations.len() - 1
    }

    pub fn free(&mut self, slot: usize) {
        self.allocations[slot] = None;
    }

    pub fn address(&self, slot: usize) -> u64 {
        self.tag << (OFFSET_BITS + SLOT_BITS) | (slot as u64) << OFFSET_BITS | ORIGIN
    }

    /// The bytes of a whole buffer, for the host.
    pub fn host_bytes(&self, slot: usize) -> &[u8] {
        &self.allocation(slot).bytes
    }

    /// The first byte of a buffer that nothing wrote.
    pub fn first_unwritten(&self, slot: usize) -> Option<usize> {
        self.allocation(slot)
            .shadow
            .iter()
            .position(|&state| state == UNWRITTEN)
    }

    /// The host writes into a buffer.
    pub fn host_write(&mut self, slot: usize, offset: usize, bytes: &[u8]) {
        let allocation = self.allocations[slot]
            .as_mut()
            .expect("a `Buffer` keeps its allocation alive");
        allocation.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        if !allocation.shadow.is_empty() {
            allocation.shadow[offset..offset + bytes.len()].fill(WRITTEN);
        }
    }

    #[inline(always)]
    fn allocation(&self, slot: usize) -> &Allocation {
        self.allocations[slot]
            .as_ref()
            .expect("a `Buffer` keeps its allocation alive")
    }

    /// Resets the counts at the start of a launch.
    pub fn begin_launch(&mut self) {
        self.accesses = 0;
        self.access_limit = ACCESSES_PER_TURN;
        self.stores = 0;
        self.bytes_loaded = 0;
        self.bytes_stored = 0;
    }

    /// What the launch wrote is constant data for the next one.
    pub fn end_launch(&mut self) {
        for slot in self.dirty.drain(..) {
            if let Some(allocation) = &mut self.allocations[slot] {
                for state in &mut allocation.shadow[allocation.dirty.clone()] {
                    *state = (*state).min(WRITTEN);
                }
                allocation.dirty = 0..0;
            }
        }
    }

    /// A thread starts or goes on: it has its accesses again.
    #[inline]
    pub fn begin_turn(&mut self) {
        self.access_limit = self.accesses + ACCESSES_PER_TURN;
    }

    #[inline(always)]
    fn count(&mut self) -> Result<(), Problem> {
        self.accesses += 1;
        if self.accesses > self.access_limit {
            Err(endless())
        } else {
            Ok(())
        }
    }

    /// Slot and offset of an access of `bytes` bytes, if it lies in a live buffer and is aligned.
    #[inline(always)]
    fn find(&self, address: u64, bytes: usize, what: &str) -> Result<(usize, usize), Problem> {
        let slot = (address >> OFFSET_BITS & ((1 << SLOT_BITS) - 1)) as usize;
        if address >> (OFFSET_BITS + SLOT_BITS) == self.tag
            && let Some(Some(allocation)) = self.allocations.get(slot)
        {
            let offset = (address & ((1 << OFFSET_BITS) - 1)).wrapping_sub(ORIGIN) as usize;
            if offset
                .checked_add(bytes)
                .is_some_and(|end| end <= allocation.bytes.len())
                && offset.is_multiple_of(bytes)
            {
                return Ok((slot, offset));
            }
        }
        Err(self.describe(address, bytes, what))
    }

    #[cold]
    fn describe(&self, address: u64, bytes: usize, what: &str) -> Problem {
        let out = |detail| Problem::new(FaultKind::OutOfBounds, detail);
        if address < 1 << OFFSET_BITS {
            return out(format!(
                "{what} of {bytes} bytes at address {address:#x}: a null pointer"
            ));
        }
        let slot = (address >> OFFSET_BITS & ((1 << SLOT_BITS) - 1)) as usize;
        if address >> (OFFSET_BITS + SLOT_BITS) != self.tag || slot >= self.allocations.len() {
            return out(format!(
                "{what} of {bytes} bytes at address {address:#x}: no buffer of this thread is there"
            ));
        }
        let Some(allocation) = &self.allocations[slot] else {
            return out(format!(
                "{what} of {bytes} bytes in a buffer that has been freed"
            ));
        };
        let length = allocation.bytes.len();
        let offset = (address & ((1 << OFFSET_BITS) - 1)).cast_signed() - ORIGIN.cast_signed();
        if usize::try_from(offset).is_ok_and(|start| start + bytes <= length) {
            return Problem::new(
                FaultKind::Misaligned,
                format!(
                    "{what} of {bytes} bytes at byte {offset} of a buffer: not a multiple of {bytes}"
                ),
            );
        }
        out(format!(
            "{what} of {bytes} bytes at byte {offset} of a buffer of {length} bytes"
        ))
    }

    /// `ld.global`, `ld.global.nc`
    #[inline(always)]
    pub fn load<T: Value>(&mut self, address: u64, coherence: Coherence) -> Result<T, Problem> {
        self.count()?;
        let (slot, offset) = self.find(address, T::BYTES, "load")?;
        self.bytes_loaded += T::BYTES as u64;
        let allocation = self.allocation(slot);
        let range = offset..offset + T::BYTES;
        if !allocation.shadow.is_empty() {
            check_shadow(&allocation.shadow, range.clone(), coherence)?;
        }
        Ok(T::read(&allocation.bytes[range]))
    }

    /// `st.global`
    #[inline(always)]
    pub fn store<T: Value>(&mut self, address: u64, value: T) -> Result<(), Problem> {
        self.count()?;
        let (slot, offset) = self.find(address, T::BYTES, "store")?;
        self.stores += 1;
        self.bytes_stored += T::BYTES as u64;
        let Some(allocation) = &mut self.allocations[slot] else {
            unreachable!("`find` saw the allocation");
        };
        let range = offset..offset + T::BYTES;
        value.write(&mut allocation.bytes[range.clone()]);
        if allocation.shadow.is_empty() {
            allocation.shadow = vec![WRITTEN; allocation.bytes.len()];
        }
        allocation.shadow[range.clone()].fill(WRITTEN_NOW);
        if allocation.dirty.is_empty() {
            allocation.dirty = range;
            self.dirty.push(slot);
        } else {
            allocation.dirty.start = allocation.dirty.start.min(range.start);
            allocation.dirty.end = allocation.dirty.end.max(range.end);
        }
        Ok(())
    }

    /// `atom.global.add.u32`: the value before. Adding 0 counts as polling, not as a store.
    pub fn add(&mut self, address: u64, value: u32) -> Result<u32, Problem> {
        let before = self.load::<u32>(address, Coherence::Coherent)?;
        if value != 0 {
            self.store(address, before.wrapping_add(value))?;
        }
        Ok(before)
    }
}

#[inline(always)]
fn check_shadow(
    shadow: &[u8],
    range: std::ops::Range<usize>,
    coherence: Coherence,
) -> Result<(), Problem> {
    let states = &shadow[range.clone()];
    if states.contains(&UNWRITTEN) {
        return Err(unwritten(states, range.start));
    }
    if coherence == Coherence::NonCoherent && states.contains(&WRITTEN_NOW) {
        return Err(written_now(range.start, range.len()));
    }
    Ok(())
}

#[cold]
fn endless() -> Problem {
    Problem::new(
        FaultKind::Deadlock,
        format!("{ACCESSES_PER_TURN} accesses without a barrier or an atomic: an endless loop"),
    )
}

#[cold]
fn unwritten(states: &[u8], offset: usize) -> Problem {
    let first = offset
        + states
            .iter()
            .position(|&state| state == UNWRITTEN)
            .unwrap_or(0);
    Problem::new(
        FaultKind::Uninitialised,
        format!(
            "load of {} bytes at byte {offset} of a buffer: nothing wrote byte {first}",
            states.len()
        ),
    )
}

#[cold]
fn written_now(offset: usize, bytes: usize) -> Problem {
    Problem::new(
        FaultKind::NonCoherentRead,
        format!(
            "ld.global.nc of {bytes} bytes at byte {offset} of a buffer: this launch wrote them"
        ),
    )
}

/// The fault of a read-back that meets an element which nothing wrote.
pub fn unwritten_element(index: usize, len: usize) -> Fault {
    Fault::without_place(
        FaultKind::Uninitialised,
        format!("read-back of a buffer of {len} elements: nothing wrote element {index}"),
    )
}
