//! Host twins of the device's `warpgroup::ptx` module: same names, run by the emulator.

use super::machine::{suspend, with_run};
use super::products::{Operand, misuse};
use super::warp::{Operation, Request};
use std::panic::Location;

/// A name for sums that no other has.
#[track_caller]
pub fn new_sums() -> u64 {
    with_run(|run, current| Ok(run.shared(current).products().name()))
}

#[track_caller]
pub fn multiply_add<const N: usize>(values: &mut [f32; N], sums: u64, a: [u32; 4], b: u64) {
    let (location, columns) = (Location::caller(), 2 * N as u32);
    let request = Request {
        operation: Operation::Product { columns, b },
        mask: u32::MAX,
        value: 0,
        operand: 0,
        location,
    };
    with_run(|run, current| {
        let rank = current.rank as u16;
        let products = run.shared(current).products();
        Operand::new(b, columns)
            .and_then(|operand| products.start(rank, sums, operand, location))
            .map_err(|problem| run.fault_of(current, Some(location), problem))?;
        let lane = current.rank as usize % 32;
        run.warp(current).give_a(lane, a);
        run.reach_warp_operation(current, request)
    });
    suspend();
    with_run(|run, current| {
        let products = run.warp(current).wide(current.rank as usize % 32);
        for (value, product) in values.iter_mut().zip(products) {
            *value = (f64::from(*value) + product) as f32;
        }
        Ok(())
    });
}

#[track_caller]
pub fn values<const N: usize>(values: [f32; N], sums: u64) -> [f32; N] {
    let location = Location::caller();
    with_run(|run, current| {
        let rank = current.rank as u16;
        if run.shared(current).products().adds_to(rank, sums) {
            let problem = misuse("reads sums that a product may still add to".to_owned());
            return Err(run.fault_of(current, Some(location), problem));
        }
        Ok(())
    });
    values
}

#[track_caller]
pub fn fence() {
    with_run(|run, current| {
        run.shared(current).products().fence(current.rank as u16);
        Ok(())
    });
}

#[track_caller]
pub fn commit() {
    with_run(|run, current| {
        run.shared(current).products().commit(current.rank as u16);
        Ok(())
    });
}

#[track_caller]
pub fn wait<const GROUPS: u32>() {
    with_run(|run, current| {
        let rank = current.rank as u16;
        run.shared(current).products().wait(rank, GROUPS as usize);
        Ok(())
    });
}

#[track_caller]
pub fn fence_shared() {
    with_run(|run, current| {
        run.shared(current).fence_products(current.rank as u16);
        Ok(())
    });
}
