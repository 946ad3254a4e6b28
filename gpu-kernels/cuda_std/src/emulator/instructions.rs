//! Host twins of the device's `ptx` module: same names, run by the emulator.

use super::access;
use super::machine::{current, raise, suspend, with_run};
use super::memory::MEMORY;
use super::mma::{Depth, Fragments};
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

#[track_caller]
pub fn atom_add_relaxed_gpu(p: *mut u32, value: u32) -> u32 {
    poll();
    match MEMORY.with_borrow_mut(|memory| memory.add(p.addr() as u64, value)) {
        Ok(before) => before,
        Err(problem) => raise(problem),
    }
}

#[track_caller]
pub fn red_add_release_gpu(p: *mut u32, value: u32) {
    atom_add_relaxed_gpu(p, value);
}

#[track_caller]
pub fn ld_acquire_gpu(p: *const u32) -> u32 {
    atom_add_relaxed_gpu(p.cast_mut(), 0)
}

#[track_caller]
pub fn ld_relaxed_gpu_v4(p: *const u32) -> [u32; 4] {
    poll();
    access::load_global(p.cast())
}

#[track_caller]
pub fn st_relaxed_gpu_v4(p: *mut u32, value: [u32; 4]) {
    access::store_global(p.cast(), value);
}

/// The emulator's memory is sequentially consistent: nothing is left to order.
#[track_caller]
#[inline]
pub fn fence_acq_rel_gpu() {
    current();
}
