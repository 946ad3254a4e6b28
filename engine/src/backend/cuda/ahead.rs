//! Chosen tokens on their way to the host, on a stream of their own: the device goes on with the next
//! token meanwhile.

use std::ptr;
use std::sync::Arc;

use cust::memory::{AsyncCopyDestination, LockedBuffer};
use cust::stream::{Stream, StreamFlags};
use cust::sys;
use gpu_kernels::launch::DeviceSlice;

use super::device::{DeviceMemory, Gpu, failed};
use super::launch::check;
use crate::Error;

/// Tokens that the device may be ahead of the host.
pub const AHEAD: usize = 4;
/// Places for tokens on their way: those ahead, and the one that the host waits for.
const PLACES: usize = AHEAD + 1;

/// A point in a stream, without a time. The driver binding's own gives a stream no way to wait for
/// it more than once.
#[derive(Debug)]
struct Event(sys::CUevent);

// SAFETY: an event handle is not tied to a thread; the driver API is thread-safe.
unsafe impl Send for Event {}

impl Event {
    fn new() -> Result<Event, Error> {
        let mut event = ptr::null_mut();
        let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: `event` is a valid place for the handle.
        let made = unsafe { sys::cuEventCreate(&mut event, flags) };
        check(made, || "making an event".to_owned())?;
        Ok(Event(event))
    }

    /// Puts it behind what is queued on `stream`.
    fn record(&self, stream: &Stream) -> Result<(), Error> {
        // SAFETY: both are alive.
        let recorded = unsafe { sys::cuEventRecord(self.0, stream.as_inner()) };
        check(recorded, || "recording an event".to_owned())
    }

    /// Lets what is queued on `stream` from now on wait for it.
    fn hold(&self, stream: &Stream) -> Result<(), Error> {
        // SAFETY: both are alive; no flags are defined.
        let holds = unsafe { sys::cuStreamWaitEvent(stream.as_inner(), self.0, 0) };
        check(holds, || "waiting for an event".to_owned())
    }

    /// Waits for it.
    fn wait(&self) -> Result<(), Error> {
        // SAFETY: the event is alive.
        let waited = unsafe { sys::cuEventSynchronize(self.0) };
        check(waited, || "work on the GPU".to_owned())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once; the driver keeps it while work refers to it.
        unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// Copies tokens to the host as they are chosen.
#[derive(Debug)]
pub struct TokenReader {
    stream: Stream,
    /// A place a token, by position modulo [`PLACES`]; memory that the driver copies to directly.
    places: Vec<LockedBuffer<u8>>,
    /// The token is there to be copied.
    chosen: Vec<Event>,
    /// It has been copied.
    copied: Vec<Event>,
    /// Last: its context is dropped after what lives in it.
    gpu: Arc<Gpu>,
}

impl TokenReader {
    /// A reader of tokens chosen on the stream of `gpu`.
    ///
    /// # Errors
    /// [`Error::Machine`] if the driver gives no stream, event or memory.
    pub fn new(gpu: &Arc<Gpu>) -> Result<TokenReader, Error> {
        gpu.make_current()?;
        let events = || {
            (0..PLACES)
                .map(|_| Event::new())
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(TokenReader {
            stream: Stream::new(StreamFlags::NON_BLOCKING, None)
                .map_err(|e| failed("creating a CUDA stream", e))?,
            places: (0..PLACES)
                .map(|_| LockedBuffer::new(&0u8, size_of::<u32>()))
                .collect::<Result<_, _>>()
                .map_err(|e| failed("allocating memory for the device to copy to", e))?,
            chosen: events()?,
            copied: events()?,
            gpu: Arc::clone(gpu),
        })
    }

    /// Queues the copy of `slot`, the token of `position`, behind what is queued on the device. At
    /// most [`AHEAD`] positions are queued beyond the one that is waited for next.
    ///
    /// # Errors
    /// [`Error::Machine`] if the driver refuses.
    pub fn queue(
        &mut self,
        memory: &DeviceMemory,
        slot: DeviceSlice,
        position: usize,
    ) -> Result<(), Error> {
        let at = position % PLACES;
        let source = memory.find(slot)?;
        self.chosen[at].record(self.gpu.stream())?;
        self.chosen[at].hold(&self.stream)?;
        // SAFETY: the place has the slot's four bytes, is read only after `copied`, and outlives the
        // copy: dropping the reader waits for the stream.
        unsafe { source.async_copy_to(&mut self.places[at][..], &self.stream) }
            .map_err(|e| failed("copying a token", e))?;
        self.copied[at].record(&self.stream)
    }

    /// The token of `position`, as soon as it is there.
    ///
    /// # Errors
    /// [`Error::Machine`] with what failed on the device.
    pub fn wait(&self, position: usize) -> Result<u32, Error> {
        let at = position % PLACES;
        self.copied[at].wait()?;
        // SAFETY: four bytes that the driver has written; it writes them again only once a later
        // copy is queued. Volatile, because the writer is not this program.
        let bytes = unsafe { ptr::read_volatile(self.places[at].as_ptr().cast::<[u8; 4]>()) };
        Ok(u32::from_le_bytes(bytes))
    }
}

impl Drop for TokenReader {
    fn drop(&mut self) {
        if self.gpu.make_current().is_ok() {
            // The places are freed next: nothing may be on its way to them.
            let _ = self.stream.synchronize();
        }
    }
}
