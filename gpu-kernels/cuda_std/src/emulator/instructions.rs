//! Host twins of the device's `ptx` module: same names, run by the emulator.

use super::fault::Problem;
use super::machine::{current, raise, suspend, with_run};
use super::memory::{Coherence, MEMORY, Memory, Value};
use super::mma::{Depth, Fragments};
use super::order::{ORDER, Orders};
use super::shared::BASE;
use super::warp::{Operation, Request};
use std::panic::Location;

macro_rules! special_register {
    ($($name:ident = $field:ident[$axis:literal];)*) => {$(
        #[track_caller]
        #[inline]
        pub fn $name() -> u32 {
            current().$field[$axis]
        }
    )*};
}

special_register! {
    thread_idx_x = thread[0];
    thread_idx_y = thread[1];
    thread_idx_z = thread[2];
    block_idx_x = block[0];
    block_idx_y = block[1];
    block_idx_z = block[2];
    block_dim_x = block_dim[0];
    block_dim_y = block_dim[1];
    block_dim_z = block_dim[2];
    grid_dim_x = grid_dim[0];
    grid_dim_y = grid_dim[1];
    grid_dim_z = grid_dim[2];
}

#[track_caller]
#[inline]
pub fn lane_id() -> u32 {
    current().rank % 32
}

#[track_caller]
pub fn dynamic_shared_base() -> u32 {
    current();
    BASE
}

#[track_caller]
pub fn barrier() {
    let location = Location::caller();
    with_run(|run, current| run.reach_barrier(current, location));
    suspend();
}

#[track_caller]
fn warp_operation(operation: Operation, mask: u32, value: u32, operand: u32) -> u32 {
    let request = Request {
        operation,
        mask,
        value,
        operand,
        location: Location::caller(),
    };
    with_run(|run, current| run.reach_warp_operation(current, request));
    suspend();
    with_run(|run, current| Ok(run.result(current)))
}

#[track_caller]
pub fn bar_warp_sync(mask: u32) {
    warp_operation(Operation::Barrier, mask, 0, 0);
}

#[track_caller]
pub fn shuffle_xor(mask: u32, value: u32, lane_mask: u32) -> u32 {
    warp_operation(Operation::Xor, mask, value, lane_mask)
}

#[track_caller]
pub fn shuffle_down(mask: u32, value: u32, delta: u32) -> u32 {
    warp_operation(Operation::Down, mask, value, delta)
}

#[track_caller]
pub fn shuffle_idx(mask: u32, value: u32, source: u32) -> u32 {
    warp_operation(Operation::Index, mask, value, source)
}

#[track_caller]
pub fn vote_ballot(mask: u32, predicate: bool) -> u32 {
    warp_operation(Operation::Ballot, mask, u32::from(predicate), 0)
}

#[track_caller]
fn mma(depth: Depth, fragments: Fragments) -> [f32; 4] {
    let request = Request {
        operation: Operation::Mma(depth),
        mask: u32::MAX,
        value: 0,
        operand: 0,
        location: Location::caller(),
    };
    with_run(|run, current| {
        run.warp(current)
            .give(current.rank as usize % 32, fragments);
        run.reach_warp_operation(current, request)
    });
    suspend();
    with_run(|run, current| Ok(run.warp(current).product(current.rank as usize % 32)))
}

#[track_caller]
pub fn mma_m16n8k16(a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
    mma(Depth::K16, Fragments { a, b, c })
}

#[track_caller]
pub fn mma_m16n8k8(a: [u32; 2], b: u32, c: [f32; 4]) -> [f32; 4] {
    let fragments = Fragments {
        a: [a[0], a[1], 0, 0],
        b: [b, 0],
        c,
    };
    mma(Depth::K8, fragments)
}

/// The lanes' rows of four matrices, 8 by 8 halves, turned: see `warp::Operation::Transpose`.
#[track_caller]
pub fn transpose(row: [u32; 4]) -> [u32; 4] {
    let request = Request {
        operation: Operation::Transpose,
        mask: u32::MAX,
        value: 0,
        operand: 0,
        location: Location::caller(),
    };
    with_run(|run, current| {
        run.warp(current).give_row(current.rank as usize % 32, row);
        run.reach_warp_operation(current, request)
    });
    suspend();
    with_run(|run, current| Ok(run.warp(current).turned(current.rank as usize % 32)))
}

/// Lets the others run first: the point at which threads meet in another order with another seed.
#[track_caller]
fn poll() {
    let location = Location::caller();
    with_run(|run, current| run.poll(current, location));
    suspend();
}

/// An atomic access of the 4-byte words of a `T`.
#[track_caller]
fn atomic<T: Value, R>(
    p: *const T,
    orders: Orders,
    access: impl FnOnce(&mut Memory, u64) -> Result<R, Problem>,
) -> R {
    let (block, address) = (current().resident_block, p.addr() as u64);
    let result = MEMORY.with_borrow_mut(|memory| access(memory, address));
    ORDER.with_borrow_mut(|order| {
        if let Some(order) = order {
            for word in (0..T::BYTES as u64).step_by(4) {
                order.atomic(block, address + word, orders);
            }
        }
    });
    match result {
        Ok(value) => value,
        Err(problem) => raise(problem),
    }
}

#[track_caller]
pub fn atom_add_relaxed_gpu(p: *mut u32, value: u32) -> u32 {
    poll();
    let add = |memory: &mut Memory, address| memory.add(address, value);
    atomic(p.cast_const(), Orders::Nothing, add)
}

#[track_caller]
pub fn red_add_release_gpu(p: *mut u32, value: u32) {
    poll();
    let add = |memory: &mut Memory, address| memory.add(address, value);
    atomic(p.cast_const(), Orders::Release, add);
}

#[track_caller]
pub fn ld_acquire_gpu(p: *const u32) -> u32 {
    poll();
    let load = |memory: &mut Memory, address| memory.load(address, Coherence::Coherent);
    atomic(p, Orders::Acquire, load)
}

#[track_caller]
fn load_relaxed<T: Value>(p: *const T) -> T {
    poll();
    let load = |memory: &mut Memory, address| memory.load(address, Coherence::Coherent);
    atomic(p, Orders::Nothing, load)
}

#[track_caller]
fn store_relaxed<T: Value>(p: *mut T, value: T) {
    let store = |memory: &mut Memory, address| memory.store(address, value);
    atomic(p.cast_const(), Orders::Nothing, store);
    let block = current().resident_block;
    ORDER.with_borrow_mut(|order| {
        if let Some(order) = order {
            order.note_store(block, p.addr() as u64, T::BYTES);
        }
    });
}

#[track_caller]
pub fn ld_relaxed_gpu_v4(p: *const u32) -> [u32; 4] {
    load_relaxed(p.cast())
}

#[track_caller]
pub fn st_relaxed_gpu_v4(p: *mut u32, value: [u32; 4]) {
    store_relaxed(p.cast(), value);
}

#[track_caller]
pub fn ld_relaxed_gpu_v2_u64(p: *const u64) -> [u64; 2] {
    load_relaxed(p.cast())
}

#[track_caller]
pub fn st_relaxed_gpu_u64(p: *mut u64, value: u64) {
    store_relaxed(p, value);
}

#[track_caller]
pub fn st_relaxed_gpu_u32(p: *mut u32, value: u32) {
    store_relaxed(p, value);
}

/// The emulator's memory is sequentially consistent: a fence only counts for what waits for what.
#[track_caller]
#[inline]
pub fn fence_acq_rel_gpu() {
    let block = current().resident_block;
    ORDER.with_borrow_mut(|order| {
        if let Some(order) = order {
            order.fence(block);
        }
    });
}
