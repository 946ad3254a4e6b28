//! Emulated device buffers as the host sees them.

use super::fault::Fault;
use super::memory::{MEMORY, Value, unwritten_element};
use std::marker::PhantomData;

/// A buffer of emulated global memory. Freed on drop; its address is never used again.
///
/// Belongs to the OS thread that made it. Its address is a multiple of 256, as `cuMemAlloc` gives.
#[derive(Debug)]
pub struct Buffer<T: Value> {
    slot: usize,
    len: usize,
    // Tied to its thread (`!Send`): the memory is thread-local.
    element: PhantomData<*mut T>,
}

impl<T: Value> Buffer<T> {
    /// A buffer that holds `values`.
    pub fn from_slice(values: &[T]) -> Buffer<T> {
        let slot = MEMORY.with_borrow_mut(|memory| memory.allocate(to_bytes(values), true));
        Buffer {
            slot,
            len: values.len(),
            element: PhantomData,
        }
    }

    /// A buffer of `len` elements that nothing has written.
    pub fn uninit(len: usize) -> Buffer<T> {
        // The bytes are never shown; a pattern that makes a mistake of the emulator visible.
        let bytes = vec![0xcd; len * T::BYTES];
        let slot = MEMORY.with_borrow_mut(|memory| memory.allocate(bytes, false));
        Buffer {
            slot,
            len,
            element: PhantomData,
        }
    }

    /// Address in the emulated memory, for an argument slot.
    pub fn address(&self) -> u64 {
        MEMORY.with_borrow(|memory| memory.address(self.slot))
    }

    /// The address as a kernel parameter. Not dereferenceable by the host.
    pub fn as_ptr(&self) -> *const T {
        std::ptr::without_provenance(self.address() as usize)
    }

    /// The address as a kernel parameter. Not dereferenceable by the host.
    pub fn as_mut_ptr(&self) -> *mut T {
        std::ptr::without_provenance_mut(self.address() as usize)
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        (self.len * T::BYTES) as u64
    }

    /// Writes `values` from element `start` on.
    ///
    /// # Panics
    /// If they do not fit.
    pub fn write(&self, start: usize, values: &[T]) {
        assert!(
            start
                .checked_add(values.len())
                .is_some_and(|end| end <= self.len),
            "{} elements from {start} on do not fit a buffer of {}",
            values.len(),
            self.len
        );
        MEMORY.with_borrow_mut(|memory| {
            memory.host_write(self.slot, start * T::BYTES, &to_bytes(values));
        });
    }

    /// The contents.
    ///
    /// # Errors
    /// If an element was never written.
    pub fn to_vec(&self) -> Result<Vec<T>, Fault> {
        MEMORY.with_borrow(|memory| match memory.first_unwritten(self.slot) {
            Some(byte) => Err(unwritten_element(byte / T::BYTES, self.len)),
            None => Ok(memory
                .host_bytes(self.slot)
                .chunks_exact(T::BYTES)
                .map(T::read)
                .collect()),
        })
    }
}

impl<T: Value> Drop for Buffer<T> {
    fn drop(&mut self) {
        // At the end of an OS thread its memory may be gone before the buffer is, and the buffer's
        // bytes with it.
        let _ = MEMORY.try_with(|memory| memory.borrow_mut().free(self.slot));
    }
}

fn to_bytes<T: Value>(values: &[T]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * T::BYTES];
    for (value, bytes) in values.iter().zip(bytes.chunks_exact_mut(T::BYTES)) {
        value.write(bytes);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::Buffer;
    use crate::emulator::FaultKind;

    #[test]
    fn reads_back_what_was_written() {
        let buffer = Buffer::from_slice(&[1.5f32, -2.0, 3.0]);
        buffer.write(1, &[7.0]);
        assert_eq!(buffer.to_vec().unwrap(), [1.5, 7.0, 3.0]);
        assert_eq!(buffer.bytes(), 12);
        assert_eq!(buffer.address() % 256, 0);
    }

    #[test]
    fn refuses_to_read_back_an_unwritten_element() {
        let buffer = Buffer::<u16>::uninit(3);
        buffer.write(0, &[1, 2]);
        let fault = buffer.to_vec().unwrap_err();
        assert_eq!(fault.kind, FaultKind::Uninitialised);
        assert!(
            fault.to_string().contains("nothing wrote element 2"),
            "{fault}"
        );
        buffer.write(2, &[3]);
        assert_eq!(buffer.to_vec().unwrap(), [1, 2, 3]);
    }

    #[test]
    fn addresses_are_not_used_twice() {
        let first = Buffer::<u32>::uninit(1).address();
        let second = Buffer::<u32>::uninit(1).address();
        assert_ne!(first, second);
    }
}
