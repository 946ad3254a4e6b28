//! Opening `libcuda.so.1`, looking symbols up once, and translating result codes.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;

use cust_raw::CUresult;
use libloading::Library;

/// File that the driver package installs, on every Linux distribution.
const LIBRARY: &str = "libcuda.so.1";

/// Opened once and never closed: function addresses stay valid for the life of the process.
static DRIVER: OnceLock<Result<Library, String>> = OnceLock::new();

thread_local! {
    /// What the last failing driver call of this thread reported.
    static LAST_ERROR: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// One driver function, looked up at its first call.
pub(crate) struct Symbol {
    name: &'static str,
    address: OnceLock<Option<usize>>,
}

impl Symbol {
    pub(crate) const fn new(name: &'static str) -> Self {
        Self {
            name,
            address: OnceLock::new(),
        }
    }

    /// Address of the function, or the code that its caller should see.
    pub(crate) fn address(&self) -> Result<usize, CUresult> {
        let driver = driver().map_err(|reason| {
            remember(format!("CUDA_ERROR_NOT_INITIALIZED ({reason})"));
            CUresult::CUDA_ERROR_NOT_INITIALIZED
        })?;
        let address = *self.address.get_or_init(|| {
            // SAFETY: the symbol is only taken as an address here; the forwarder that calls it
            // gives it the type that the driver API documents for this name.
            let symbol = unsafe { driver.get::<*const c_void>(self.name) }.ok()?;
            // SAFETY: `driver` lives in a static and is never closed, so the address stays valid.
            let address = unsafe { symbol.into_raw() }.as_raw_ptr() as usize;
            (address != 0).then_some(address)
        });
        address.ok_or_else(|| {
            remember(format!(
                "CUDA_ERROR_NOT_FOUND (the installed driver has no {})",
                self.name
            ));
            CUresult::CUDA_ERROR_NOT_FOUND
        })
    }
}

fn driver() -> Result<&'static Library, &'static str> {
    let opened = DRIVER.get_or_init(|| {
        // SAFETY: loading the driver runs its initialisers, which it documents as safe to run in
        // any process.
        unsafe { Library::new(LIBRARY) }
            .map_err(|_| format!("no CUDA driver: {LIBRARY} is not installed"))
    });
    opened.as_ref().map_err(String::as_str)
}

/// Codes that the bindings know: the values of `CUresult`. A driver may be newer and return others.
const KNOWN: &[CUresult] = {
    use CUresult::*;
    &[
        CUDA_SUCCESS,
        CUDA_ERROR_INVALID_VALUE,
        CUDA_ERROR_OUT_OF_MEMORY,
        CUDA_ERROR_NOT_INITIALIZED,
        CUDA_ERROR_DEINITIALIZED,
        CUDA_ERROR_STUB_LIBRARY,
        CUDA_ERROR_NO_DEVICE,
        CUDA_ERROR_INVALID_DEVICE,
        CUDA_ERROR_DEVICE_NOT_LICENSED,
        CUDA_ERROR_INVALID_IMAGE,
        CUDA_ERROR_INVALID_CONTEXT,
        CUDA_ERROR_NO_BINARY_FOR_GPU,
        CUDA_ERROR_ECC_UNCORRECTABLE,
        CUDA_ERROR_UNSUPPORTED_LIMIT,
        CUDA_ERROR_INVALID_PTX,
        CUDA_ERROR_JIT_COMPILER_NOT_FOUND,
        CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
        CUDA_ERROR_INVALID_SOURCE,
        CUDA_ERROR_FILE_NOT_FOUND,
        CUDA_ERROR_OPERATING_SYSTEM,
        CUDA_ERROR_INVALID_HANDLE,
        CUDA_ERROR_ILLEGAL_STATE,
        CUDA_ERROR_NOT_FOUND,
        CUDA_ERROR_NOT_READY,
        CUDA_ERROR_ILLEGAL_ADDRESS,
        CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
        CUDA_ERROR_LAUNCH_TIMEOUT,
        CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE,
        CUDA_ERROR_CONTEXT_IS_DESTROYED,
        CUDA_ERROR_ASSERT,
        CUDA_ERROR_HARDWARE_STACK_ERROR,
        CUDA_ERROR_ILLEGAL_INSTRUCTION,
        CUDA_ERROR_MISALIGNED_ADDRESS,
        CUDA_ERROR_INVALID_ADDRESS_SPACE,
        CUDA_ERROR_INVALID_PC,
        CUDA_ERROR_LAUNCH_FAILED,
        CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE,
        CUDA_ERROR_NOT_PERMITTED,
        CUDA_ERROR_NOT_SUPPORTED,
        CUDA_ERROR_SYSTEM_NOT_READY,
        CUDA_ERROR_SYSTEM_DRIVER_MISMATCH,
        CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
        CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
        CUDA_ERROR_STREAM_CAPTURE_MERGE,
        CUDA_ERROR_STREAM_CAPTURE_UNMATCHED,
        CUDA_ERROR_STREAM_CAPTURE_UNJOINED,
        CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
        CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
        CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD,
        CUDA_ERROR_CAPTURED_EVENT,
        CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE,
        CUDA_ERROR_UNKNOWN,
    ]
};

/// Turns the driver's code into the bindings' enum: a value that the enum does not list becomes
/// `CUDA_ERROR_UNKNOWN` (reading it as the enum would be undefined), its real name is kept for
/// [`last_error`].
pub(crate) fn translate(code: c_uint) -> CUresult {
    if code == CUresult::CUDA_SUCCESS as c_uint {
        return CUresult::CUDA_SUCCESS;
    }
    // Not a failure: the answer of an event query.
    if code != CUresult::CUDA_ERROR_NOT_READY as c_uint {
        remember(error_name(code));
    }
    KNOWN
        .iter()
        .copied()
        .find(|known| *known as c_uint == code)
        .unwrap_or(CUresult::CUDA_ERROR_UNKNOWN)
}

/// The driver's own name of a code, which also covers codes newer than the bindings.
fn error_name(code: c_uint) -> String {
    type GetErrorName = unsafe extern "C" fn(c_uint, *mut *const c_char) -> c_uint;
    static SYMBOL: Symbol = Symbol::new("cuGetErrorName");
    let number = || format!("CUDA error {code}");
    let Ok(address) = SYMBOL.address() else {
        return number();
    };
    // SAFETY: the address is that of cuGetErrorName, whose C signature this is (an enum is passed
    // as an int of the same width).
    let get_error_name: GetErrorName = unsafe { std::mem::transmute(address) };
    let mut text: *const c_char = ptr::null();
    // SAFETY: `text` is a valid place for the result.
    if unsafe { get_error_name(code, &mut text) } != 0 || text.is_null() {
        return number();
    }
    // SAFETY: on success the driver returns a static NUL-terminated string.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}

fn remember(what: String) {
    LAST_ERROR.with(|last| *last.borrow_mut() = Some(what));
}

/// Name of the last driver error on this thread (`CUDA_ERROR_OUT_OF_MEMORY`), and forgets it.
/// `None` when no call failed since the last time. More precise than `cust`'s error, which folds
/// every code that it does not know into one.
pub fn last_error() -> Option<String> {
    LAST_ERROR.with(|last| last.borrow_mut().take())
}

/// Whether a CUDA driver with at least one device can be used here. Initialises the driver.
///
/// # Errors
/// One line that says why not: no driver installed, or what the driver answered.
pub fn driver_available() -> Result<(), String> {
    driver()?;
    let check = |what: &str, code: CUresult| {
        if code == CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        let name = last_error().unwrap_or_else(|| format!("{code:?}"));
        Err(format!(
            "the CUDA driver is installed, but {what} failed with {name}"
        ))
    };
    let mut devices: c_int = 0;
    // SAFETY: cuInit takes no pointers; flags must be 0.
    check("cuInit", unsafe { cust_raw::cuInit(0) })?;
    // SAFETY: `devices` is a valid place for the count.
    check("cuDeviceGetCount", unsafe {
        cust_raw::cuDeviceGetCount(&mut devices)
    })?;
    if devices == 0 {
        return Err("the CUDA driver is installed, but there is no CUDA device".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_translated() {
        assert_eq!(translate(0), CUresult::CUDA_SUCCESS);
        assert_eq!(translate(2), CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        assert!(last_error().is_some(), "a failure is remembered");
        assert_eq!(translate(600), CUresult::CUDA_ERROR_NOT_READY);
        assert_eq!(last_error(), None, "an unfinished event is no failure");
        assert_eq!(translate(123_456), CUresult::CUDA_ERROR_UNKNOWN);
        assert!(last_error().is_some());
    }

    #[test]
    fn a_missing_function_is_an_error_code() {
        let missing = Symbol::new("cuNoSuchFunctionAtAll");
        let code = missing.address().expect_err("no driver has this function");
        match driver() {
            Ok(_) => assert_eq!(code, CUresult::CUDA_ERROR_NOT_FOUND),
            Err(_) => assert_eq!(code, CUresult::CUDA_ERROR_NOT_INITIALIZED),
        }
        assert!(last_error().is_some());
    }
}
