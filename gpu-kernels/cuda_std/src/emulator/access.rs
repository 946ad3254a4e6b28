//! Memory accesses of a kernel under the emulator: what the host twins of the accessors call.
//!
//! Each checks the access and ends the launch with a fault, at the line of the kernel, if it is not
//! allowed; nothing is accessed then. Outside of a launch they panic.

use super::machine::{current, raise, with_run};
use super::memory::{Coherence, MEMORY, Value};
use super::order::ORDER;
use std::panic::Location;

/// `ld.global`: the value at `p`.
#[track_caller]
#[inline]
pub fn load_global<T: Value>(p: *const T) -> T {
    load(p, Coherence::Coherent)
}

/// `ld.global.nc`: the value at `p`, which this launch must not have written.
#[track_caller]
#[inline]
pub fn load_global_nc<T: Value>(p: *const T) -> T {
    load(p, Coherence::NonCoherent)
}

#[track_caller]
#[inline(always)]
fn load<T: Value>(p: *const T, coherence: Coherence) -> T {
    // The check that a launch runs comes first: outside of one there is nobody to report to.
    let block = current().resident_block;
    let loaded = MEMORY.with_borrow_mut(|memory| memory.load(p.addr() as u64, coherence));
    let ordered = ORDER.with_borrow_mut(|order| match order {
        Some(order) => order.load(block, p.addr() as u64, T::BYTES),
        None => Ok(()),
    });
    match loaded.and_then(|value| ordered.map(|()| value)) {
        Ok(value) => value,
        Err(problem) => raise(problem),
    }
}

/// `st.global`: stores at `p`.
#[track_caller]
#[inline]
pub fn store_global<T: Value>(p: *mut T, value: T) {
    let block = current().resident_block;
    let stored = MEMORY.with_borrow_mut(|memory| memory.store(p.addr() as u64, value));
    let ordered = ORDER.with_borrow_mut(|order| match order {
        Some(order) => order.store(block, p.addr() as u64, T::BYTES),
        None => Ok(()),
    });
    match stored.and(ordered) {
        Ok(()) => {}
        Err(problem) => raise(problem),
    }
}

/// `ld.shared`: the value at an address of the shared window.
#[track_caller]
#[inline]
pub fn load_shared<T: Value>(address: u32) -> T {
    let location = Location::caller();
    with_run(|run, current| {
        let value = run
            .shared(current)
            .load(address, current.rank as u16, location)
            .map_err(|problem| run.fault_of(current, Some(location), problem))?;
        run.touch_banks(current, location, address, T::BYTES as u32, false);
        Ok(value)
    })
}

/// `st.shared`: stores at an address of the shared window.
#[track_caller]
#[inline]
pub fn store_shared<T: Value>(address: u32, value: T) {
    let location = Location::caller();
    with_run(|run, current| {
        run.shared(current)
            .store(address, value, current.rank as u16, location)
            .map_err(|problem| run.fault_of(current, Some(location), problem))?;
        run.touch_banks(current, location, address, T::BYTES as u32, true);
        Ok(())
    });
}

/// `cp.async` of `T::BYTES` from `p` to an address of the shared window; zeros without `p`.
#[track_caller]
pub fn copy_async<T: Value + Default>(address: u32, p: Option<*const T>) {
    let location = Location::caller();
    let value = p.map_or_else(T::default, load_global);
    with_run(|run, current| {
        run.shared(current)
            .copy(address, value, current.rank as u16, location)
            .map_err(|problem| run.fault_of(current, Some(location), problem))?;
        run.touch_banks(current, location, address, T::BYTES as u32, true);
        Ok(())
    });
}

/// `cp.async.commit_group`
#[track_caller]
pub fn commit_copies() {
    with_run(|run, current| {
        run.shared(current).commit_copies(current.rank as u16);
        Ok(())
    });
}

/// `cp.async.wait_group` of all but the last `groups`.
#[track_caller]
pub fn wait_for_copies(groups: u32) {
    with_run(|run, current| {
        let rank = current.rank as u16;
        run.shared(current).wait_for_copies(rank, groups as usize);
        Ok(())
    });
}

/// `ldmatrix.x4.trans`: the calling lane's row of 16 bytes, one of eight of a matrix of 8 by 8
/// halves, for its parts of the four transposed matrices.
#[track_caller]
pub fn load_matrices_transposed(address: u32) -> [u32; 4] {
    super::instructions::transpose(load_shared(address))
}
