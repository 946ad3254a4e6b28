//! The running launch: its blocks, what each thread waits for, and which thread runs now.
//!
//! The kernel's side (`instructions`, `access`) and the scheduler's side meet here. A coroutine
//! never suspends while it holds a borrow of this state.

use super::banks::Banks;
use super::fault::{Fault, FaultKind, Place, Problem, line, same_line};
use super::memory::MEMORY;
use super::shared::{Shared, thread_index};
use super::warp::{Completed, LaneProblem, Operation, Request, Warp, never_arrives};
use super::{Launch, Report, products};
use corosensei::Yielder;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::panic::Location;

/// Polls of all threads together, per thread that can run, without any of them changing anything,
/// after which they are taken to wait for ever.
const IDLE_POLLS_PER_THREAD: u64 = 1000;

/// Polls in a row of one thread after which it is taken to wait for ever.
const POLLS_IN_A_ROW: u32 = 1 << 20;

/// The thread that runs now.
#[derive(Clone, Copy)]
pub struct Current {
    /// Index of the block in the grid.
    pub block: [u32; 3],
    /// Index of the thread in the block.
    pub thread: [u32; 3],
    pub block_dim: [u32; 3],
    pub grid_dim: [u32; 3],
    /// Index of the thread in the block, x fastest.
    pub rank: u32,
    /// Resident block, and thread among the resident ones.
    pub resident_block: u32,
    pub resident_thread: u32,
    pub yielder: Option<std::ptr::NonNull<Yielder<(), ()>>>,
}

thread_local! {
    /// The thread that runs now on this OS thread; none outside a launch.
    pub static CURRENT: Cell<Option<Current>> = const { Cell::new(None) };
    /// The launch that runs now on this OS thread.
    pub static RUN: RefCell<Option<Run>> = const { RefCell::new(None) };
}

/// What keeps a thread from running.
#[derive(Clone, Copy)]
enum Status {
    Ready,
    Barrier(&'static Location<'static>),
    WarpOperation,
    Returned,
}

struct Thread {
    status: Status,
    /// Result of the last warp operation.
    result: u32,
    polls: u32,
    resident_block: u32,
    rank: u32,
    index: [u32; 3],
}

struct Block {
    index: [u32; 3],
    shared: Shared,
    warps: Vec<Warp>,
    waiting: u32,
    returned: u32,
    /// Where the first thread waits in the block barrier.
    barrier: Option<(&'static Location<'static>, u32)>,
}

/// A launch: its resident blocks and its threads, block by block.
pub struct Run {
    kernel: String,
    launch: Launch,
    block_threads: u32,
    blocks: Vec<Block>,
    threads: Vec<Thread>,
    pub ready: VecDeque<u32>,
    /// Events that may let a polling thread go on: stores, barriers, returns.
    progress: u64,
    /// Progress and stores at the last poll, and polls since they changed.
    idle_since: (u64, u64),
    idle_polls: u64,
    /// Bank conflicts, where they are counted.
    pub banks: Option<Banks>,
    pub report: Report,
}

/// A fault of a thread that may not be the running one.
type ThreadResult<T> = Result<T, Box<Fault>>;

impl Run {
    pub fn new(kernel: &str, launch: Launch) -> Run {
        Run {
            kernel: kernel.to_owned(),
            launch,
            block_threads: launch.block.iter().product(),
            blocks: Vec::new(),
            threads: Vec::new(),
            ready: VecDeque::new(),
            progress: 0,
            idle_since: (0, 0),
            idle_polls: 0,
            banks: Banks::of(kernel),
            report: Report::default(),
        }
    }

    /// Makes these blocks, by linear index, the resident ones; all their threads can run.
    pub fn load_blocks(&mut self, indices: &[u64]) {
        let [grid_x, grid_y, _] = self.launch.grid.map(u64::from);
        if let Some(banks) = &mut self.banks {
            banks.end_blocks();
        }
        self.blocks.truncate(indices.len());
        for (resident, &index) in indices.iter().enumerate() {
            let index = [
                index % grid_x,
                index / grid_x % grid_y,
                index / (grid_x * grid_y),
            ]
            .map(|index| index as u32);
            let warps = (0..self.block_threads.div_ceil(32))
                .map(|warp| Warp::new(self.block_threads - warp * 32))
                .collect();
            match self.blocks.get_mut(resident) {
                Some(block) => {
                    block.index = index;
                    block.shared.reset();
                    block.warps = warps;
                    (block.waiting, block.returned, block.barrier) = (0, 0, None);
                }
                None => self.blocks.push(Block {
                    index,
                    shared: Shared::new(self.launch.shared_bytes, self.launch.block),
                    warps,
                    waiting: 0,
                    returned: 0,
                    barrier: None,
                }),
            }
        }
        let count = indices.len() as u32 * self.block_threads;
        if self.threads.len() != count as usize {
            let (threads, block) = (self.block_threads, self.launch.block);
            self.threads.clear();
            self.threads.extend((0..count).map(|thread| Thread {
                status: Status::Ready,
                result: 0,
                polls: 0,
                resident_block: thread / threads,
                rank: thread % threads,
                index: thread_index(thread % threads, block),
            }));
        }
        for thread in &mut self.threads {
            (thread.status, thread.polls) = (Status::Ready, 0);
        }
        self.ready.clear();
        self.ready.extend(0..count);
    }

    /// What a resident thread sees of itself.
    pub fn current(&self, resident_thread: u32) -> Current {
        let thread = &self.threads[resident_thread as usize];
        Current {
            block: self.blocks[thread.resident_block as usize].index,
            thread: thread.index,
            block_dim: self.launch.block,
            grid_dim: self.launch.grid,
            rank: thread.rank,
            resident_block: thread.resident_block,
            resident_thread,
            yielder: None,
        }
    }

    pub fn shared(&mut self, current: &Current) -> &mut Shared {
        &mut self.blocks[current.resident_block as usize].shared
    }

    /// The running thread has accessed shared memory.
    #[inline]
    pub fn touch_banks(
        &mut self,
        current: &Current,
        location: &'static Location<'static>,
        address: u32,
        bytes: u32,
        stores: bool,
    ) {
        if let Some(banks) = &mut self.banks {
            let lanes = (self.block_threads - current.rank / 32 * 32).min(32);
            let (block, rank) = (current.resident_block, current.rank);
            banks.access(block, rank, lanes, location, address, bytes, stores);
        }
    }

    pub fn result(&self, current: &Current) -> u32 {
        self.threads[current.resident_thread as usize].result
    }

    /// The fault of a thread of a resident block.
    fn fault(
        &self,
        block: usize,
        rank: u32,
        location: Option<&'static Location<'static>>,
        problem: Problem,
    ) -> Box<Fault> {
        Box::new(Fault {
            kind: problem.kind,
            place: Some(Place {
                kernel: self.kernel.clone(),
                block: self.blocks[block].index,
                thread: thread_index(rank, self.launch.block),
                location,
            }),
            detail: problem.detail,
        })
    }

    /// The fault of the running thread.
    pub fn fault_of(
        &self,
        current: &Current,
        location: Option<&'static Location<'static>>,
        problem: Problem,
    ) -> Box<Fault> {
        self.fault(
            current.resident_block as usize,
            current.rank,
            location,
            problem,
        )
    }

    fn lane_fault(&self, block: usize, warp: u32, problem: LaneProblem) -> Box<Fault> {
        let rank = warp * 32 + problem.lane as u32;
        self.fault(block, rank, Some(problem.location), problem.problem)
    }

    /// The running thread reaches the block barrier; it suspends afterwards.
    pub fn reach_barrier(
        &mut self,
        current: &Current,
        location: &'static Location<'static>,
    ) -> ThreadResult<()> {
        let index = current.resident_block as usize;
        let block = &mut self.blocks[index];
        let refuse = |detail| Problem::new(FaultKind::Barrier, detail);
        if block.returned > 0 {
            let detail = format!(
                "{} of the block's {} threads have returned without it",
                block.returned, self.block_threads
            );
            return Err(self.fault_of(current, Some(location), refuse(detail)));
        }
        match block.barrier {
            Some((other, rank)) if !same_line(other, location) => {
                let [x, y, z] = thread_index(rank, self.launch.block);
                let detail = format!(
                    "thread ({x}, {y}, {z}) waits in the barrier at {}: the block is divided",
                    line(other)
                );
                return Err(self.fault_of(current, Some(location), refuse(detail)));
            }
            Some(_) => {}
            None => block.barrier = Some((location, current.rank)),
        }
        block.waiting += 1;
        self.threads[current.resident_thread as usize].status = Status::Barrier(location);
        if block.waiting == self.block_threads {
            block.waiting = 0;
            block.barrier = None;
            block.shared.sync_block();
            self.report.barriers += 1;
            let first = current.resident_block * self.block_threads;
            for thread in first..first + self.block_threads {
                self.release(thread);
            }
        }
        Ok(())
    }

    fn release(&mut self, thread: u32) {
        let state = &mut self.threads[thread as usize];
        state.status = Status::Ready;
        state.polls = 0;
        self.ready.push_back(thread);
        self.progress += 1;
    }

    /// The running thread reaches a warp operation; it suspends afterwards.
    pub fn reach_warp_operation(
        &mut self,
        current: &Current,
        request: Request,
    ) -> ThreadResult<()> {
        let (block, warp) = (current.resident_block as usize, current.rank / 32);
        self.threads[current.resident_thread as usize].status = Status::WarpOperation;
        let lane = current.rank as usize % 32;
        match self.blocks[block].warps[warp as usize].arrive(lane, request) {
            Ok(Some(completed)) => self.complete(block, warp, &completed)?,
            Ok(None) => {}
            Err(problem) => return Err(self.lane_fault(block, warp, problem)),
        }
        Ok(())
    }

    /// The running thread's warp.
    pub fn warp(&mut self, current: &Current) -> &mut Warp {
        &mut self.blocks[current.resident_block as usize].warps[current.rank as usize / 32]
    }

    fn complete(&mut self, block: usize, warp: u32, completed: &Completed) -> ThreadResult<()> {
        match completed.operation {
            Operation::Barrier => self.blocks[block]
                .shared
                .sync_warp(warp as usize, completed.lanes),
            Operation::Product { columns, b } => {
                let multiplied = self.multiply(block, warp, columns, b, completed);
                multiplied.map_err(|problem| {
                    self.fault(block, warp * 32, Some(completed.location), problem)
                })?;
            }
            _ => {}
        }
        self.report.warp_operations += 1;
        let first = block as u32 * self.block_threads + warp * 32;
        for lane in super::shared::lanes(completed.lanes) {
            let thread = first + lane as u32;
            self.threads[thread as usize].result = completed.results[lane];
            self.release(thread);
        }
        Ok(())
    }

    /// A warp has started its part of a warpgroup's product.
    fn multiply(
        &mut self,
        block: usize,
        warp: u32,
        columns: u32,
        b: u64,
        completed: &Completed,
    ) -> Result<(), Problem> {
        let Block { shared, warps, .. } = &mut self.blocks[block];
        let (rank, block_warps) = (warp as u16 * 32, warps.len() as u32);
        shared
            .products()
            .agree(warp, block_warps, completed.operation)?;
        let operand = products::Operand::new(b, columns)?;
        let b = shared.read_operand(&operand, columns, rank, completed.location)?;
        let warp = &mut warps[warp as usize];
        let products = products::products(&warp.given_a(), &b);
        warp.take_wide(products);
        Ok(())
    }

    /// The running thread has returned.
    pub fn leave(&mut self, current: &Current) -> ThreadResult<()> {
        let (index, warp) = (current.resident_block as usize, current.rank / 32);
        self.threads[current.resident_thread as usize].status = Status::Returned;
        self.progress += 1;
        self.report.threads += 1;
        let block = &mut self.blocks[index];
        block.returned += 1;
        if let Some((location, rank)) = block.barrier {
            let [x, y, z] = current.thread;
            let detail = format!("thread ({x}, {y}, {z}) has returned without it");
            let problem = Problem::new(FaultKind::Barrier, detail);
            return Err(self.fault(index, rank, Some(location), problem));
        }
        match block.warps[warp as usize].leave(current.rank as usize % 32) {
            Ok(Some(completed)) => self.complete(index, warp, &completed)?,
            Ok(None) => {}
            Err(problem) => return Err(self.lane_fault(index, warp, problem)),
        }
        let block = &mut self.blocks[index];
        if block.returned == self.block_threads
            && let Some((warp, problem)) = block.shared.products().left_out()
        {
            return Err(self.fault(index, warp * 32, None, problem));
        }
        Ok(())
    }

    /// The running thread polls; it suspends afterwards and can run again.
    pub fn poll(
        &mut self,
        current: &Current,
        location: &'static Location<'static>,
    ) -> ThreadResult<()> {
        let stores = MEMORY.with_borrow(|memory| memory.stores);
        if self.idle_since != (self.progress, stores) {
            self.idle_since = (self.progress, stores);
            self.idle_polls = 0;
        }
        self.idle_polls += 1;
        self.ready.push_back(current.resident_thread);
        let thread = &mut self.threads[current.resident_thread as usize];
        thread.polls += 1;
        if self.idle_polls > IDLE_POLLS_PER_THREAD * self.ready.len() as u64
            || thread.polls > POLLS_IN_A_ROW
        {
            return Err(self.fault_of(current, Some(location), self.polling()));
        }
        Ok(())
    }

    fn polling(&self) -> Problem {
        let polling = self.ready.len();
        let blocked = self
            .threads
            .iter()
            .filter(|thread| matches!(thread.status, Status::Barrier(_) | Status::WarpOperation))
            .count();
        let blocks: u64 = self.launch.grid.iter().map(|&n| u64::from(n)).product();
        let hint = if self.launch.cooperative || blocks == 1 {
            ""
        } else {
            "; the launch is not cooperative, so its blocks run one after another"
        };
        Problem::new(
            FaultKind::Deadlock,
            format!("{polling} threads poll and {blocked} wait, and nothing changes{hint}"),
        )
    }

    /// No thread can run: the fault if one has not returned.
    pub fn check_finished(&self) -> ThreadResult<()> {
        for (block_index, block) in self.blocks.iter().enumerate() {
            for rank in 0..self.block_threads {
                let (warp, lane) = (&block.warps[rank as usize / 32], rank as usize % 32);
                let Some(request) = warp.pending(lane) else {
                    continue;
                };
                let missing = super::shared::lanes(request.mask).find(|&other| {
                    !warp.is_gone(other)
                        && warp
                            .pending(other)
                            .is_none_or(|theirs| theirs.mask != request.mask)
                });
                let Some(missing) = missing else { continue };
                let thread =
                    block_index as u32 * self.block_threads + rank / 32 * 32 + missing as u32;
                let elsewhere = match (self.threads[thread as usize].status, warp.pending(missing))
                {
                    (Status::Barrier(location), _) => {
                        format!("waits in the block barrier at {}", line(location))
                    }
                    (_, Some(theirs)) => {
                        format!(
                            "waits in a warp operation with another mask at {}",
                            line(theirs.location)
                        )
                    }
                    _ => "never arrives".to_owned(),
                };
                let problem = never_arrives(request, lane, missing, &elsewhere);
                return Err(self.fault(block_index, rank, Some(request.location), problem));
            }
        }
        match self
            .threads
            .iter()
            .position(|thread| !matches!(thread.status, Status::Returned))
        {
            None => Ok(()),
            Some(thread) => {
                let thread = thread as u32;
                let problem = Problem::new(
                    FaultKind::Deadlock,
                    "no thread of the launch can run".to_owned(),
                );
                let (block, rank) = (thread / self.block_threads, thread % self.block_threads);
                Err(self.fault(block as usize, rank, None, problem))
            }
        }
    }
}

/// The thread that runs now.
///
/// # Panics
/// If none does: a device function was called outside of a launch.
#[track_caller]
#[inline(always)]
pub fn current() -> Current {
    match CURRENT.get() {
        Some(current) => current,
        None => outside(),
    }
}

#[cold]
#[track_caller]
fn outside() -> ! {
    panic!("a device instruction outside of an emulated launch")
}

/// Works on the running launch on behalf of the running thread; a fault ends the launch.
#[track_caller]
pub fn with_run<T>(work: impl FnOnce(&mut Run, &Current) -> ThreadResult<T>) -> T {
    let current = current();
    let result = RUN.with_borrow_mut(|run| match run {
        Some(run) => work(run, &current),
        None => unreachable!("a thread runs only inside a launch"),
    });
    match result {
        Ok(value) => value,
        // Unwinds the thread's stack up to the scheduler, past the panic hook.
        Err(fault) => std::panic::resume_unwind(fault),
    }
}

/// Ends the launch with a problem of the running thread at the caller's line.
#[cold]
#[track_caller]
pub fn raise(problem: Problem) -> ! {
    let location = Location::caller();
    let fault = with_run(|run, current| Ok(run.fault_of(current, Some(location), problem)));
    std::panic::resume_unwind(fault)
}

/// Gives the other threads their turn.
pub fn suspend() {
    let current = current();
    let Some(yielder) = current.yielder else {
        unreachable!("the scheduler sets the yielder of a running thread");
    };
    // SAFETY: the pointer is to the `Yielder` that the coroutine's body was called with; it lives
    // on the coroutine's own stack until the body returns, and this is the coroutine running.
    unsafe { yielder.as_ref() }.suspend(());
}
