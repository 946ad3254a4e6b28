//! What the GPU has used, from NVML: `libnvidia-ml.so.1`, which comes with the driver.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};

use libloading::{Library, Symbol};

use crate::forward;

/// File that the driver package installs.
const LIBRARY: &str = "libnvidia-ml.so.1";
/// Bytes of a bus id as text, its zero included: `00000000:3B:00.0`.
const BUS_ID_BYTES: usize = 32;

/// The energy counter of a CUDA device.
#[derive(Debug)]
pub struct EnergyMeter {
    library: Library,
    /// `nvmlDevice_t`
    device: *mut c_void,
}

impl EnergyMeter {
    /// The meter of CUDA device 0; `None` where NVML or the counter is missing (before Volta, and on
    /// integrated GPUs).
    pub fn open() -> Option<EnergyMeter> {
        type GetBusId = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_uint;
        static GET_BUS_ID: forward::Symbol = forward::Symbol::new("cuDeviceGetPCIBusId");
        // SAFETY: the address is that of cuDeviceGetPCIBusId, whose C signature this is.
        let get_bus_id: GetBusId = unsafe { std::mem::transmute(GET_BUS_ID.address().ok()?) };
        let mut bus_id = [0 as c_char; BUS_ID_BYTES];
        // SAFETY: the driver writes at most the length that is passed. Device 0 is the first that
        // CUDA sees, which need not be the first that NVML sees.
        let code = unsafe { get_bus_id(bus_id.as_mut_ptr(), BUS_ID_BYTES as c_int, 0) };
        if code != 0 {
            return None;
        }
        // SAFETY: loading the library runs its initialisers, which it documents as safe in any
        // process.
        let library = unsafe { Library::new(LIBRARY) }.ok()?;
        let mut device: *mut c_void = std::ptr::null_mut();
        // SAFETY: both are NVML's functions of these names, with their C signatures; the bus id is
        // NUL-terminated and `device` a valid place for the handle.
        unsafe {
            let init: Symbol<'_, unsafe extern "C" fn() -> c_uint> =
                library.get("nvmlInit_v2").ok()?;
            type GetHandle = unsafe extern "C" fn(*const c_char, *mut *mut c_void) -> c_uint;
            let get: Symbol<'_, GetHandle> =
                library.get("nvmlDeviceGetHandleByPciBusId_v2").ok()?;
            if init() != 0 || get(bus_id.as_ptr(), &mut device) != 0 {
                return None;
            }
        }
        let meter = EnergyMeter { library, device };
        meter.joules().is_some().then_some(meter)
    }

    /// Joules used since the driver was loaded. The counter moves some ten times a second.
    pub fn joules(&self) -> Option<f64> {
        type Total = unsafe extern "C" fn(*mut c_void, *mut c_ulonglong) -> c_uint;
        let mut millijoules = 0;
        // SAFETY: NVML's function of this name, with its C signature; the handle is NVML's and the
        // result a valid place.
        let code = unsafe {
            let total: Symbol<'_, Total> = self
                .library
                .get("nvmlDeviceGetTotalEnergyConsumption")
                .ok()?;
            total(self.device, &mut millijoules)
        };
        (code == 0).then_some(millijoules as f64 / 1e3)
    }
}
