//! `cuLaunchKernelEx`: a launch with attributes, newer (CUDA 11.8) than the bindings.

use std::ffi::{c_uint, c_void};
use std::ptr;

use cust_raw::{CUfunction, CUresult, CUstream, cuLaunchKernel};

use crate::forward::{Symbol, translate};

/// Where and how a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub struct LaunchConfig {
    /// Blocks (x, y, z).
    pub grid: [u32; 3],
    /// Threads a block (x, y, z).
    pub block: [u32; 3],
    /// Dynamic shared memory a block, bytes.
    pub shared_bytes: u32,
    /// Stream, which may be recording a graph.
    pub stream: CUstream,
    /// Programmatic dependent launch: the kernel may start before the one before it on the stream
    /// has ended, and waits by `griddepcontrol.wait`. Only for kernels of sm_90 and up.
    pub dependent: bool,
}

/// `CUlaunchConfig` of `cuda.h`.
#[repr(C)]
struct Config {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: CUstream,
    attributes: *mut Attribute,
    attribute_count: c_uint,
}

/// `CUlaunchAttribute` of `cuda.h`: an id, padding, and a union of 64 bytes that is aligned to 8.
#[repr(C, align(8))]
struct Attribute {
    id: c_uint,
    _padding: [u8; 4],
    /// Of the union, the member `programmaticStreamSerializationAllowed`.
    value: c_uint,
    _rest: [u8; 60],
}

const _: () = assert!(size_of::<Config>() == 56 && size_of::<Attribute>() == 72);

/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`
const PROGRAMMATIC_STREAM_SERIALIZATION: c_uint = 6;

/// Launches `function`; also while its stream is recording.
///
/// # Safety
/// As the CUDA Driver API documents for `cuLaunchKernel`: a live function and stream, `params` with
/// a pointer to each parameter.
pub unsafe fn launch(
    function: CUfunction,
    config: &LaunchConfig,
    params: *mut *mut c_void,
) -> CUresult {
    let LaunchConfig {
        grid,
        block,
        shared_bytes,
        stream,
        dependent,
    } = *config;
    if !dependent {
        // SAFETY: by the caller's promise.
        return unsafe {
            cuLaunchKernel(
                function,
                grid[0],
                grid[1],
                grid[2],
                block[0],
                block[1],
                block[2],
                shared_bytes,
                stream,
                params,
                ptr::null_mut(),
            )
        };
    }
    type LaunchKernelEx = unsafe extern "C" fn(
        *const Config,
        CUfunction,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> c_uint;
    static SYMBOL: Symbol = Symbol::new("cuLaunchKernelEx");
    let address = match SYMBOL.address() {
        Ok(address) => address,
        Err(code) => return code,
    };
    // SAFETY: the address is that of cuLaunchKernelEx, whose C signature this is.
    let launch_kernel_ex: LaunchKernelEx = unsafe { std::mem::transmute(address) };
    let mut attribute = Attribute {
        id: PROGRAMMATIC_STREAM_SERIALIZATION,
        _padding: [0; 4],
        value: 1,
        _rest: [0; 60],
    };
    let config = Config {
        grid,
        block,
        shared_bytes,
        stream,
        attributes: &mut attribute,
        attribute_count: 1,
    };
    // SAFETY: by the caller's promise; the driver reads configuration and attribute before it
    // returns.
    translate(unsafe { launch_kernel_ex(&config, function, params, ptr::null_mut()) })
}
