//! The threads of the CPU backend.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle, Thread};

use crate::Error;

/// A fixed number of threads that run one function together: the caller's and those that wait for it. A run
/// allocates nothing.
#[derive(Debug)]
pub(super) struct Team {
    workers: Vec<JoinHandle<()>>,
    shared: Arc<Shared>,
}

/// What a run shares out.
type Job<'a> = &'a (dyn Fn(usize) + Sync);

#[derive(Debug)]
struct Shared {
    /// Number of the run; workers wait for the next one.
    run: AtomicUsize,
    /// A [`Job`] on the stack of the caller, null when the team ends.
    job: AtomicPtr<Job<'static>>,
    /// Workers that have not finished the run.
    busy: AtomicUsize,
    panicked: AtomicBool,
    /// Who waits for `busy` to become 0; set at the start.
    caller: std::sync::Mutex<Option<Thread>>,
}

/// Turns to spin before a thread sleeps: about as long as waking it takes.
const SPINS: usize = 2_000;

/// Waits until `done`, at first without giving the core away; whoever makes it true unparks this thread.
fn wait(done: impl Fn() -> bool) {
    for _ in 0..SPINS {
        if done() {
            return;
        }
        std::hint::spin_loop();
    }
    while !done() {
        thread::park();
    }
}

impl Shared {
    fn work(&self, number: usize) {
        let mut seen = 0;
        loop {
            wait(|| self.run.load(Ordering::Acquire) != seen);
            seen += 1;
            let job = self.job.load(Ordering::Relaxed);
            if job.is_null() {
                return;
            }
            // SAFETY: the caller keeps the job until `busy` is 0.
            let run = || unsafe { (*job)(number) };
            if catch_unwind(AssertUnwindSafe(run)).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            // Taken before: after the last decrement the caller may be gone.
            let caller = self.caller();
            if self.busy.fetch_sub(1, Ordering::AcqRel) == 1
                && let Some(caller) = caller
            {
                caller.unpark();
            }
        }
    }

    fn caller(&self) -> Option<Thread> {
        let caller = self.caller.lock();
        caller
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    fn start(&self, job: *mut Job<'static>, workers: &[JoinHandle<()>]) {
        self.busy.store(workers.len(), Ordering::Relaxed);
        self.job.store(job, Ordering::Relaxed);
        self.run.fetch_add(1, Ordering::Release);
        for worker in workers {
            worker.thread().unpark();
        }
    }
}

/// Waits for the workers when dropped, also by a panic: they use what the caller's stack holds.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        wait(|| self.0.busy.load(Ordering::Acquire) == 0);
    }
}

impl Team {
    /// Starts a team of `threads`. Where it takes all cores that this process may use, each worker keeps to
    /// one of them; a smaller team is left to the system, as another one may want the same cores.
    pub(super) fn new(threads: usize) -> Result<Team, Error> {
        if threads == 0 {
            return Err(Error::input("a team of 0 threads does nothing"));
        }
        let mut team = Team {
            workers: Vec::with_capacity(threads - 1),
            shared: Arc::new(Shared {
                run: AtomicUsize::new(0),
                job: AtomicPtr::new(std::ptr::null_mut()),
                busy: AtomicUsize::new(0),
                panicked: AtomicBool::new(false),
                caller: std::sync::Mutex::new(None),
            }),
        };
        let cores = cores();
        let own = cores.filter(|cores| cores.len() == threads);
        for number in 1..threads {
            let shared = Arc::clone(&team.shared);
            let core = own.as_ref().map(|cores| cores[number]);
            let worker = thread::Builder::new()
                .name(format!("edgellm-cpu-{number}"))
                .spawn(move || {
                    if let Some(core) = core {
                        keep_to(core);
                    }
                    shared.work(number);
                });
            team.workers.push(worker.map_err(Error::machine)?);
        }
        Ok(team)
    }

    /// Threads in the team.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `f(thread)` once on every thread and returns when all have finished.
    ///
    /// # Panics
    /// If it does on any of them.
    pub(super) fn run(&mut self, f: impl Fn(usize) + Sync) {
        if self.workers.is_empty() {
            return f(0);
        }
        let shared = &*self.shared;
        let caller = shared.caller();
        if caller.is_none_or(|caller| caller.id() != thread::current().id()) {
            let mut caller = shared.caller.lock();
            if let Ok(caller) = &mut caller {
                **caller = Some(thread::current());
            }
        }
        let mut job: Job<'_> = &f;
        let job: *mut Job<'_> = &mut job;
        {
            let finish = Finish(shared);
            shared.start(job.cast(), &self.workers);
            f(0);
            drop(finish);
        }
        assert!(
            !shared.panicked.load(Ordering::Relaxed),
            "another thread of the team panicked"
        );
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.start(std::ptr::null_mut(), &self.workers);
        for worker in self.workers.drain(..) {
            // A worker catches what its job throws.
            let _ = worker.join();
        }
    }
}

/// Keeps this thread on one core, where the system knows how to.
#[cfg(target_os = "linux")]
fn keep_to(core: usize) {
    // SAFETY: a set of bits, zero at first, and calls that only read and write it. That a core cannot be had
    // is harmless: the thread then runs anywhere.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set);
    }
}

#[cfg(not(target_os = "linux"))]
fn keep_to(_: usize) {}

/// The first hardware thread of each core that this process may use.
#[cfg(target_os = "linux")]
fn cores() -> Option<Vec<usize>> {
    // SAFETY: as in `keep_to`; 0 is this thread.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of_val(&set), &mut set) != 0 {
            return None;
        }
        set
    };
    let mut seen = HashSet::new();
    let mut cores = Vec::new();
    for cpu in 0..libc::CPU_SETSIZE as usize {
        // SAFETY: a bit of the set.
        if unsafe { libc::CPU_ISSET(cpu, &set) } && seen.insert(siblings(cpu)?) {
            cores.push(cpu);
        }
    }
    Some(cores)
}

#[cfg(not(target_os = "linux"))]
fn cores() -> Option<Vec<usize>> {
    None
}

/// The hardware threads that share a core with `cpu`, as Linux lists them.
fn siblings(cpu: usize) -> Option<String> {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
    std::fs::read_to_string(path).ok()
}

/// Threads that `RAYON_NUM_THREADS` asks for, else the cores that this process may use: two
/// hardware threads of a core share its arithmetic, a second one only adds waiting.
///
/// # Errors
/// [`Error::Input`] if the variable is not a number between 1 and 1024.
pub(super) fn default_threads() -> Result<usize, Error> {
    const VARIABLE: &str = "RAYON_NUM_THREADS";
    if let Ok(text) = std::env::var(VARIABLE) {
        return match text.trim().parse() {
            Ok(threads) if (1..=1024).contains(&threads) => Ok(threads),
            _ => Err(Error::input(format!(
                "{VARIABLE} is {text:?}, not a number between 1 and 1024"
            ))),
        };
    }
    let allowed = thread::available_parallelism().map_or(1, usize::from);
    Ok(cores().map_or(allowed, |cores| cores.len().clamp(1, allowed)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_runs_every_job_once() {
        for threads in [1, 2, 5] {
            let mut team = Team::new(threads).unwrap();
            let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..200 {
                team.run(|thread| {
                    counts[thread].fetch_add(1, Ordering::Relaxed);
                });
            }
            let counts: Vec<usize> = counts.into_iter().map(AtomicUsize::into_inner).collect();
            assert_eq!(counts, vec![200; threads]);
        }
        assert!(matches!(Team::new(0), Err(Error::Input(_))));
    }

    #[test]
    fn a_panic_reaches_the_caller_when_all_have_finished() {
        for guilty in [0, 1] {
            let mut team = Team::new(3).unwrap();
            let finished = AtomicUsize::new(0);
            let run = || {
                team.run(|thread| {
                    assert!(thread != guilty, "on purpose");
                    finished.fetch_add(1, Ordering::Relaxed);
                });
            };
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
            assert_eq!(finished.into_inner(), 2);
        }
    }
}
