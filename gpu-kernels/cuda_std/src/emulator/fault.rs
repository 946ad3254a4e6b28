//! What the emulator reports.

use std::fmt;
use std::panic::Location;

/// The rule that was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// An access outside every live buffer, or outside the block's shared memory.
    OutOfBounds,
    /// An address that is not a multiple of the access width.
    Misaligned,
    /// A read of memory that nothing wrote.
    Uninitialised,
    /// A barrier that not all threads reach, or not at the same line.
    Barrier,
    /// Two threads touch a shared word, at least one writing, with no barrier between.
    Race,
    /// A shuffle or vote whose lanes do not all take part, or that reads from a lane that does not.
    Shuffle,
    /// An access of shared memory that an asynchronous copy is still writing.
    AsyncCopy,
    /// An asynchronous product without its fences, whose operand or sums are touched before the wait, or
    /// that not all warps of the warpgroup start.
    AsyncProduct,
    /// A non-coherent load of what this launch wrote.
    NonCoherentRead,
    /// Two blocks of a cooperative launch touch a global word, at least one writing, and neither has
    /// waited for the other.
    MissingWait,
    /// Nothing that can run makes progress.
    Deadlock,
    /// The kernel panicked.
    Panic,
    /// A launch that the device would refuse.
    InvalidLaunch,
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FaultKind::OutOfBounds => "out-of-bounds access",
            FaultKind::Misaligned => "misaligned access",
            FaultKind::Uninitialised => "uninitialised read",
            FaultKind::Barrier => "barrier not reached by all threads",
            FaultKind::Race => "shared memory race",
            FaultKind::Shuffle => "warp operation with an inactive lane",
            FaultKind::AsyncCopy => "access during an asynchronous copy",
            FaultKind::AsyncProduct => "wrong use of an asynchronous product",
            FaultKind::NonCoherentRead => "non-coherent read of written data",
            FaultKind::MissingWait => "missing wait between blocks",
            FaultKind::Deadlock => "deadlock",
            FaultKind::Panic => "panic in the kernel",
            FaultKind::InvalidLaunch => "invalid launch",
        })
    }
}

/// The thread and the source line that a fault happened at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Kernel name.
    pub kernel: String,
    /// Block index (x, y, z).
    pub block: [u32; 3],
    /// Thread index in the block (x, y, z).
    pub thread: [u32; 3],
    /// Line of the kernel source; none for a panic, whose line the panic message names.
    pub location: Option<&'static Location<'static>>,
}

/// A fault: the rule, where, and in what way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Fault {
    /// The rule that was broken.
    pub kind: FaultKind,
    /// Where; none when no thread was running (a launch refused, a buffer read back too early).
    pub place: Option<Place>,
    /// What exactly happened.
    pub detail: String,
}

impl Fault {
    /// A fault of no thread.
    pub(super) fn without_place(kind: FaultKind, detail: String) -> Fault {
        Fault {
            kind,
            place: None,
            detail,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            let [bx, by, bz] = place.block;
            let [tx, ty, tz] = place.thread;
            write!(
                f,
                "kernel `{}`, block ({bx}, {by}, {bz}), thread ({tx}, {ty}, {tz})",
                place.kernel
            )?;
            if let Some(location) = place.location {
                write!(
                    f,
                    ", {}:{}:{}",
                    location.file(),
                    location.line(),
                    location.column()
                )?;
            }
            f.write_str(": ")?;
        }
        write!(f, "{}: {}", self.kind, self.detail)
    }
}

/// A broken rule on its way to the thread that broke it.
#[derive(Debug)]
pub(super) struct Problem {
    pub kind: FaultKind,
    pub detail: String,
}

impl Problem {
    pub fn new(kind: FaultKind, detail: String) -> Problem {
        Problem { kind, detail }
    }
}

/// `file:line` of a location.
pub(super) fn line(location: &Location<'_>) -> String {
    format!("{}:{}", location.file(), location.line())
}

/// Whether two locations are the same; nearly always the same constant.
pub(super) fn same_line(a: &'static Location<'static>, b: &'static Location<'static>) -> bool {
    std::ptr::eq(a, b) || a == b
}
