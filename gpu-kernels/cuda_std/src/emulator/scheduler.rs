//! Runs a launch: a coroutine per thread, blocks one after another or, cooperatively, all at once.

use super::fault::{Fault, FaultKind, Problem};
use super::machine::{CURRENT, Current, RUN, Run};
use super::memory::MEMORY;
use super::order::{ORDER, Order};
use super::{Entry, Launch, MAX_BLOCK_THREADS, MAX_RESIDENT_THREADS, MAX_SHARED_BYTES, Report};
use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;

/// Stack of an emulated thread, bytes of address space: memory is only used as touched. Holds a
/// panic with its backtrace beside the kernel's own frames.
const STACK_BYTES: usize = 256 * 1024;

type Thread = Coroutine<(), (), (), DefaultStack>;

thread_local! {
    /// Stacks of threads that have returned, for the next ones.
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// Launches a kernel with its arguments in 64-bit slots.
///
/// # Errors
/// The first [`Fault`]; a launch that the device would refuse, or the wrong number of arguments.
pub fn launch_entry(entry: &Entry, launch: &Launch, args: &[u64]) -> Result<Report, Fault> {
    if args.len() != entry.arity {
        return Err(refused(
            entry.name,
            &format!(
                "it has {} parameters and was given {} arguments",
                entry.arity,
                args.len()
            ),
        ));
    }
    // SAFETY: the slots are as many as the parameters, and the kernel's memory accesses are checked
    // by the emulator.
    self::launch(entry.name, launch, || unsafe { (entry.call)(args) })
}

/// Launches `thread`, called once for each thread of the launch, as the kernel of that name.
///
/// # Errors
/// The first [`Fault`], or a launch that the device would refuse.
pub fn launch(name: &str, launch: &Launch, thread: impl Fn()) -> Result<Report, Fault> {
    check(name, launch)?;
    if CURRENT.get().is_some() {
        return Err(refused(
            name,
            "a kernel is running: kernels do not launch kernels",
        ));
    }
    MEMORY.with_borrow_mut(|memory| memory.begin_launch());
    RUN.set(Some(Run::new(name, *launch)));
    ORDER.set(
        launch
            .cooperative
            .then(|| Order::new(blocks(launch) as usize)),
    );
    let outcome = run_blocks(launch, &thread);
    CURRENT.set(None);
    ORDER.set(None);
    let run = RUN.take();
    let (loaded, stored) = MEMORY.with_borrow_mut(|memory| {
        memory.end_launch();
        (memory.bytes_loaded, memory.bytes_stored)
    });
    outcome.map_err(|fault| *fault)?;
    let report = run.map(|mut run| {
        if let Some(banks) = run.banks.take() {
            banks.end_launch();
        }
        run.report
    });
    let report = report.unwrap_or_default();
    Ok(Report {
        global_bytes_loaded: loaded,
        global_bytes_stored: stored,
        ..report
    })
}

fn check(name: &str, launch: &Launch) -> Result<(), Fault> {
    let [x, y, z] = launch.block;
    let threads = u64::from(x) * u64::from(y) * u64::from(z);
    if threads == 0 || threads > u64::from(MAX_BLOCK_THREADS) || z > 64 {
        return Err(refused(
            name,
            &format!(
                "a block of {x} x {y} x {z} threads; it may have 1 to {MAX_BLOCK_THREADS}, and 64 along z"
            ),
        ));
    }
    let [x, y, z] = launch.grid;
    if x == 0 || y == 0 || z == 0 || x > i32::MAX as u32 || y > 65535 || z > 65535 {
        return Err(refused(
            name,
            &format!("a grid of {x} x {y} x {z} blocks; it may have 1 to 2^31 - 1, 65535, 65535"),
        ));
    }
    if launch.shared_bytes > MAX_SHARED_BYTES {
        return Err(refused(
            name,
            &format!(
                "{} bytes of shared memory; a block may have {MAX_SHARED_BYTES}",
                launch.shared_bytes
            ),
        ));
    }
    let resident = blocks(launch).saturating_mul(threads);
    if launch.cooperative && resident > MAX_RESIDENT_THREADS {
        return Err(refused(
            name,
            &format!(
                "{resident} threads in a cooperative launch; the emulator holds {MAX_RESIDENT_THREADS}"
            ),
        ));
    }
    Ok(())
}

fn refused(name: &str, why: &str) -> Fault {
    Fault::without_place(FaultKind::InvalidLaunch, format!("kernel `{name}`: {why}"))
}

fn blocks(launch: &Launch) -> u64 {
    launch
        .grid
        .iter()
        .fold(1, |blocks: u64, &n| blocks.saturating_mul(u64::from(n)))
}

fn run_blocks(launch: &Launch, thread: &dyn Fn()) -> Result<(), Box<Fault>> {
    let mut random = launch.seed.map(Random);
    if launch.cooperative {
        let all: Vec<u64> = (0..blocks(launch)).collect();
        return run_resident(&all, thread, &mut random);
    }
    match &mut random {
        None => (0..blocks(launch)).try_for_each(|block| run_resident(&[block], thread, &mut None)),
        Some(order) => {
            let mut all: Vec<u64> = (0..blocks(launch)).collect();
            for i in (1..all.len()).rev() {
                all.swap(i, order.below(i + 1));
            }
            all.iter()
                .try_for_each(|&block| run_resident(&[block], thread, &mut random))
        }
    }
}

/// A thread that has run: its coroutine, and the handle by which it suspends.
struct Started {
    coroutine: Thread,
    yielder: Option<NonNull<Yielder<(), ()>>>,
}

/// Runs blocks that are resident together until all their threads have returned.
fn run_resident(
    blocks: &[u64],
    body: &dyn Fn(),
    random: &mut Option<Random>,
) -> Result<(), Box<Fault>> {
    with_run(|run| run.load_blocks(blocks));
    let mut threads: Vec<Option<Started>> = Vec::new();
    while let Some(current) = with_run(|run| next(run, random)) {
        let index = current.resident_thread as usize;
        if threads.len() <= index {
            threads.resize_with(index + 1, || None);
        }
        // A thread gets its stack when it first runs: a kernel without barriers needs only one.
        let slot = &mut threads[index];
        let started = match slot {
            Some(started) => started,
            None => slot.insert(start(body)?),
        };
        MEMORY.with_borrow_mut(|memory| memory.begin_turn());
        CURRENT.set(Some(Current {
            yielder: started.yielder,
            ..current
        }));
        match catch_unwind(AssertUnwindSafe(|| started.coroutine.resume(()))) {
            Ok(CoroutineResult::Yield(())) => {
                started.yielder = CURRENT.get().and_then(|current| current.yielder);
            }
            Ok(CoroutineResult::Return(())) => {
                if let Some(started) = threads[index].take() {
                    keep(started.coroutine.into_stack());
                }
                with_run(|run| run.leave(&current))?;
            }
            Err(payload) => return Err(fault_from(payload, &current)),
        }
    }
    with_run(|run| run.check_finished())
}

/// The next thread that can run, taken from the queue.
fn next(run: &mut Run, random: &mut Option<Random>) -> Option<Current> {
    let index = match random {
        None => run.ready.pop_front(),
        Some(_) if run.ready.is_empty() => None,
        Some(random) => {
            let index = random.below(run.ready.len());
            run.ready.swap_remove_front(index)
        }
    };
    index.map(|index| run.current(index))
}

fn with_run<T>(work: impl FnOnce(&mut Run) -> T) -> T {
    RUN.with_borrow_mut(|run| match run {
        Some(run) => work(run),
        None => unreachable!("the scheduler runs inside a launch"),
    })
}

/// Keeps the stack of a thread that has returned: as many as a block has threads.
fn keep(stack: DefaultStack) {
    STACKS.with_borrow_mut(|stacks| {
        if stacks.len() < MAX_BLOCK_THREADS as usize {
            stacks.push(stack);
        }
    });
}

fn start(body: &dyn Fn()) -> Result<Started, Box<Fault>> {
    let stack = match STACKS.with_borrow_mut(Vec::pop) {
        Some(stack) => stack,
        None => DefaultStack::new(STACK_BYTES).map_err(|error| {
            let detail = format!("no stack for another thread: {error}");
            Box::new(Fault::without_place(FaultKind::InvalidLaunch, detail))
        })?,
    };
    let run = move |yielder: &Yielder<(), ()>, ()| {
        let current = CURRENT.get();
        CURRENT.set(current.map(|current| Current {
            yielder: Some(NonNull::from(yielder)),
            ..current
        }));
        body();
    };
    // SAFETY: `body` outlives the coroutine: `run_resident` borrows it and drops every coroutine,
    // unwinding those that are suspended, before it returns.
    let coroutine = unsafe { Thread::with_stack_unchecked(stack, run) };
    Ok(Started {
        coroutine,
        yielder: None,
    })
}

/// The fault that a thread ended with: its own, or its panic.
fn fault_from(payload: Box<dyn Any + Send>, current: &Current) -> Box<Fault> {
    match payload.downcast::<Fault>() {
        Ok(fault) => fault,
        Err(payload) => {
            let message = payload
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| payload.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "no message".to_owned());
            let problem = Problem::new(FaultKind::Panic, message);
            with_run(|run| run.fault_of(current, None, problem))
        }
    }
}

/// A small generator of repeatable orders (splitmix64).
struct Random(u64);

impl Random {
    /// A number below `bound`. Slightly uneven for large bounds, which does not matter here.
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ bits >> 31) % bound as u64) as usize
    }
}
