//! The one place that launches kernels: a loaded PTX module, and CUDA graphs of its launches.
//!
//! A [`Call`] holds its parameters as 64-bit slots; the driver wants a pointer to each, and reads as
//! many low bytes as the parameter has.

use std::collections::HashMap;
use std::ffi::{CStr, c_uint, c_void};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use cuda_driver::LaunchConfig;
use cust::error::CudaError;
use cust::module::Module;
use cust::stream::Stream;
use cust::sys;
use gpu_kernels::launch::Call;

use super::device::{Gpu, failed};
use crate::Error;

/// Dynamic shared memory that a kernel may be launched with without asking for it first, bytes.
const SHARED_BYTES_UNASKED: u32 = 48 * 1024;

/// Handle of a kernel. Valid while its module is loaded.
#[derive(Debug)]
struct Function {
    handle: sys::CUfunction,
    /// Dynamic shared memory that it may be launched with, bytes: it only grows, as a recorded graph
    /// may still need what was asked for.
    shared_bytes: AtomicU32,
}

// SAFETY: a CUfunction is a driver handle, not tied to a thread; the driver API is thread-safe.
unsafe impl Send for Function {}
// SAFETY: as above; the handle is only read.
unsafe impl Sync for Function {}

/// The kernels of one tier, compiled by the driver for the device at hand.
#[derive(Debug)]
pub struct Kernels {
    functions: HashMap<&'static str, Function>,
    /// Keeps the functions alive.
    _module: Module,
}

impl Kernels {
    /// Compiles `ptx` in the current context and looks up every kernel of `names`. All of them ask for
    /// the same share of a multiprocessor's memory as shared memory, `carve_out` percent of the most,
    /// if that is given.
    ///
    /// # Errors
    /// [`Error::Machine`] with the CUDA error's name and what the driver's compiler logged.
    pub(super) fn load(
        ptx: &str,
        names: impl IntoIterator<Item = &'static str>,
        carve_out: Option<i32>,
    ) -> Result<Kernels, Error> {
        let module = Module::from_ptx(ptx, &[]).map_err(|error| {
            let cause = failed("loading the GPU kernels", error);
            match jit_log(ptx) {
                Some(log) => Error::machine(format!("{cause}: {log}")),
                None => cause,
            }
        })?;
        let mut functions = HashMap::new();
        for name in names {
            let function = module
                .get_function(name)
                .map_err(|error| failed(&format!("looking up the kernel {name}"), error))?;
            if let Some(percent) = carve_out {
                let carve =
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
                // SAFETY: the function belongs to a loaded module.
                let set = unsafe { sys::cuFuncSetAttribute(function.to_raw(), carve, percent) };
                check(set, || format!("giving {name} its share of the cache"))?;
            }
            let function = Function {
                handle: function.to_raw(),
                shared_bytes: AtomicU32::new(SHARED_BYTES_UNASKED),
            };
            functions.insert(name, function);
        }
        Ok(Kernels {
            functions,
            _module: module,
        })
    }

    /// Queues `call` on `stream`; also while the stream is being captured.
    ///
    /// # Safety
    /// Every pointer in `call` must be the device memory that its plan checked, alive until the
    /// work is done, or until the last launch of a graph that captured it.
    ///
    /// # Errors
    /// [`Error::Machine`] with the kernel's name.
    pub(super) unsafe fn launch(&self, stream: &Stream, call: &Call) -> Result<(), Error> {
        let function = self.functions.get(call.kernel).ok_or_else(|| {
            Error::machine(format!("the GPU module has no kernel {}", call.kernel))
        })?;
        let bytes = call.launch.shared_bytes;
        if function.shared_bytes.fetch_max(bytes, Relaxed) < bytes {
            let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to a loaded module.
            let set =
                unsafe { sys::cuFuncSetAttribute(function.handle, most, bytes.cast_signed()) };
            check(set, || format!("giving {} its shared memory", call.kernel))?;
        }
        let mut slots = call.args.clone();
        let mut params: Vec<*mut c_void> = slots
            .iter_mut()
            .map(|slot| ptr::from_mut(slot).cast())
            .collect();
        let config = LaunchConfig {
            grid: call.launch.grid,
            block: call.launch.block,
            shared_bytes: call.launch.shared_bytes,
            stream: stream.as_inner(),
            dependent: call.dependent,
        };
        // SAFETY: the function belongs to a loaded module; `params` has a pointer to a live 64-bit
        // slot for each parameter, in order, and the driver copies the values before it returns;
        // the caller vouches for the memory behind them.
        let result = unsafe { cuda_driver::launch(function.handle, &config, params.as_mut_ptr()) };
        check(result, || format!("launching {}", call.kernel))
    }
}

/// A recorded sequence of launches, replayed with one driver call.
#[derive(Debug)]
pub struct Graph {
    exec: sys::CUgraphExec,
    gpu: Arc<Gpu>,
}

// SAFETY: a graph handle is not tied to a thread, and `&mut self` methods make its current context
// current first; the driver API is thread-safe.
unsafe impl Send for Graph {}

impl Graph {
    /// Records `calls` without running them.
    ///
    /// # Safety
    /// Every pointer in `calls` must be the device memory that its plan checked, alive as long as
    /// the graph is launched.
    ///
    /// # Errors
    /// [`Error::Machine`] if the driver refuses a launch or the graph.
    pub unsafe fn capture(gpu: &Arc<Gpu>, calls: &[Call]) -> Result<Graph, Error> {
        gpu.make_current()?;
        let stream = gpu.stream();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and not capturing.
        let begun = unsafe { sys::cuStreamBeginCapture_v2(stream.as_inner(), mode) };
        check(begun, || "starting to record a CUDA graph".to_owned())?;
        // SAFETY: passed on to the caller. During capture nothing runs.
        let recorded = calls.iter().try_for_each(|call| unsafe { gpu.queue(call) });
        let mut graph: sys::CUgraph = ptr::null_mut();
        // The capture has to be ended also after a failed launch, or the stream stays unusable.
        // SAFETY: the stream is capturing; `graph` is a valid place for the result.
        let ended = unsafe { sys::cuStreamEndCapture(stream.as_inner(), &mut graph) };
        let ended = check(ended, || "recording a CUDA graph".to_owned());
        if let Err(error) = recorded.and(ended) {
            if !graph.is_null() {
                // SAFETY: the graph was made above and is used by nothing else.
                unsafe { sys::cuGraphDestroy(graph) };
            }
            return Err(error);
        }
        let mut exec: sys::CUgraphExec = ptr::null_mut();
        // SAFETY: the graph is valid; no log buffer is passed, so none is written.
        let made = unsafe {
            sys::cuGraphInstantiate_v2(&mut exec, graph, ptr::null_mut(), ptr::null_mut(), 0)
        };
        // SAFETY: the executable graph is a copy; the template is used by nothing else.
        unsafe { sys::cuGraphDestroy(graph) };
        check(made, || "instantiating a CUDA graph".to_owned())?;
        Ok(Graph {
            exec,
            gpu: Arc::clone(gpu),
        })
    }

    /// Queues one run of the graph on the device's stream.
    ///
    /// # Errors
    /// [`Error::Machine`] if the driver refuses.
    pub fn launch(&self) -> Result<(), Error> {
        // SAFETY: the graph is alive, and `capture`'s caller keeps the memory behind it alive.
        let launched = unsafe { sys::cuGraphLaunch(self.exec, self.gpu.stream().as_inner()) };
        check(launched, || "launching a CUDA graph".to_owned())
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.gpu.make_current().is_ok() {
            // SAFETY: made in `capture`, destroyed once. The driver delays this until a running
            // launch has finished.
            unsafe { sys::cuGraphExecDestroy(self.exec) };
        }
    }
}

/// Turns a driver code into an error that says what was being done.
pub(super) fn check(code: sys::CUresult, what: impl FnOnce() -> String) -> Result<(), Error> {
    match code {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        // Only a stand-in where the driver crate has no name of its own for the failure.
        _ => Err(failed(&what(), CudaError::UnknownError)),
    }
}

/// What the driver's compiler has to say about a PTX that it refuses, on one line.
fn jit_log(ptx: &str) -> Option<String> {
    const LOG_BYTES: usize = 4096;
    let image: Vec<u8> = ptx.bytes().chain([0]).collect();
    let mut log = vec![0u8; LOG_BYTES];
    let mut options = [
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
    ];
    // The driver takes the size by value, in the pointer's place.
    let mut values: [*mut c_void; 2] = [
        log.as_mut_ptr().cast(),
        ptr::without_provenance_mut(LOG_BYTES),
    ];
    let mut module: sys::CUmodule = ptr::null_mut();
    // SAFETY: the image is NUL-terminated and alive; there are as many values as options; the log
    // buffer has the size that is passed, and outlives the call.
    let code = unsafe {
        sys::cuModuleLoadDataEx(
            &mut module,
            image.as_ptr().cast(),
            options.len() as c_uint,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    if code == sys::CUresult::CUDA_SUCCESS {
        // SAFETY: loaded just above and used by nothing.
        unsafe { sys::cuModuleUnload(module) };
        return None;
    }
    let text = CStr::from_bytes_until_nul(&log).ok()?.to_string_lossy();
    let line = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>();
    (!line.is_empty()).then(|| line.join("; "))
}
