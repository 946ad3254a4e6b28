//! The threads of the CPU backend.

use std::collections::HashSet;

use crate::Error;

/// A fixed number of threads that run one function together.
#[derive(Debug)]
pub(super) struct Team {
    /// None for a team of one: the caller's thread.
    pool: Option<rayon::ThreadPool>,
    threads: usize,
}

impl Team {
    /// Starts `threads` threads.
    pub(super) fn new(threads: usize) -> Result<Team, Error> {
        let pool = match threads {
            0 => return Err(Error::input("a team of 0 threads does nothing")),
            1 => None,
            _ => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .thread_name(|i| format!("edgellm-cpu-{i}"))
                    .build()
                    .map_err(Error::machine)?,
            ),
        };
        Ok(Team { pool, threads })
    }

    /// Threads in the team.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `f(thread)` once on every thread and returns when all have finished.
    pub(super) fn run(&self, f: impl Fn(usize) + Sync) {
        match &self.pool {
            None => f(0),
            Some(pool) => {
                pool.broadcast(|context| f(context.index()));
            }
        }
    }
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
    let allowed = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(physical_cores().map_or(allowed, |cores| cores.min(allowed)))
}

/// Cores as Linux counts them; none elsewhere.
fn physical_cores() -> Option<usize> {
    let mut cores = HashSet::new();
    for entry in std::fs::read_dir("/sys/devices/system/cpu").ok()?.flatten() {
        let siblings = entry.path().join("topology/thread_siblings_list");
        if let Ok(siblings) = std::fs::read_to_string(siblings) {
            cores.insert(siblings);
        }
    }
    Some(cores.len()).filter(|&cores| cores > 0)
}

/// Model name of the CPU as Linux gives it, else the architecture.
pub(super) fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let name = line
        .and_then(|line| line.split_once(':'))
        .map(|(_, name)| name.trim());
    name.unwrap_or(std::env::consts::ARCH).to_owned()
}
