//! The emulator as a [`Device`].

use cuda_std::emulator::{self, Buffer};

use super::{Device, DeviceError};
use crate::launch::{Call, DeviceInfo, DeviceSlice};

/// Runs calls on the host, one coroutine per CUDA thread, and reports faults as errors. Belongs to
/// the OS thread that made it.
#[derive(Debug)]
pub struct EmulatorDevice {
    info: DeviceInfo,
    seed: Option<u64>,
    buffers: Vec<Buffer<u8>>,
}

impl EmulatorDevice {
    /// A device of `info`'s dimensions. With a seed, threads and blocks run in the random,
    /// repeatable order that it gives; in order without.
    pub fn new(info: DeviceInfo, seed: Option<u64>) -> EmulatorDevice {
        EmulatorDevice {
            info,
            seed,
            buffers: Vec::new(),
        }
    }

    fn keep(&mut self, buffer: Buffer<u8>) -> DeviceSlice {
        let slice = DeviceSlice {
            address: buffer.address(),
            bytes: buffer.bytes(),
        };
        self.buffers.push(buffer);
        slice
    }
}

impl Device for EmulatorDevice {
    fn info(&self) -> DeviceInfo {
        self.info
    }

    fn upload(&mut self, bytes: &[u8]) -> Result<DeviceSlice, DeviceError> {
        Ok(self.keep(Buffer::from_slice(bytes)))
    }

    fn uninit(&mut self, bytes: u64) -> Result<DeviceSlice, DeviceError> {
        let bytes = usize::try_from(bytes).map_err(|e| DeviceError(e.to_string()))?;
        Ok(self.keep(Buffer::uninit(bytes)))
    }

    fn download(&mut self, slice: DeviceSlice) -> Result<Vec<u8>, DeviceError> {
        let same = |b: &&Buffer<u8>| b.address() == slice.address && b.bytes() == slice.bytes;
        let buffer = self.buffers.iter().find(same);
        let buffer = buffer.ok_or_else(|| DeviceError(format!("no buffer {slice:?}")))?;
        buffer
            .to_vec()
            .map_err(|fault| DeviceError(fault.to_string()))
    }

    fn run(&mut self, call: &Call) -> Result<(), DeviceError> {
        let entry = crate::ENTRIES
            .iter()
            .find(|entry| entry.name == call.kernel);
        let entry = entry.ok_or_else(|| DeviceError(format!("no kernel `{}`", call.kernel)))?;
        let launch = emulator::Launch {
            grid: call.launch.grid,
            block: call.launch.block,
            shared_bytes: call.launch.shared_bytes,
            cooperative: call.blocks_meet || call.blocks_wait && self.seed.is_some(),
            seed: self.seed,
        };
        emulator::set_compute_capability(self.info.compute_capability);
        emulator::launch_entry(entry, &launch, &call.args)
            .map(|_report| ())
            .map_err(|fault| DeviceError(fault.to_string()))
    }
}
