//! `wgmma`: the products of a warpgroup, and what is under way of them.
//!
//! A product is computed when the last lane of a warp starts it. What it may read later on a device,
//! its operand B until the wait, counts as being read until then: a store there is a fault, and so is
//! asking for the sums. Of the registers only a missing
//! [`fence`](crate::warpgroup::fence) between groups is seen.

use super::fault::{FaultKind, Problem, line};
use super::shared::BASE;
use super::warp::Operation;
use half::f16;
use std::collections::VecDeque;
use std::panic::Location;

/// Rows of operand B: halves of a column that a product takes.
const DEPTH: usize = 16;

/// A misuse of a product.
pub fn misuse(detail: String) -> Problem {
    Problem::new(FaultKind::AsyncProduct, detail)
}

/// Operand B as its descriptor says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operand {
    /// Address of the first column's first byte, before parts of rows are exchanged.
    start: u32,
    eight_columns: u32,
    columns: u32,
}

impl Operand {
    /// Takes a descriptor apart.
    ///
    /// # Errors
    /// A layout other than the one that [`crate::warpgroup::Operand`] makes.
    pub fn new(descriptor: u64, columns: u32) -> Result<Operand, Problem> {
        let field = |shift: u32| (descriptor >> shift & 0x3fff) as u32 * 16;
        let [start, eight_columns] = [field(0), field(32)];
        let (offset, swizzle) = (descriptor >> 49 & 7, descriptor >> 62);
        if swizzle != 1 || offset != 0 || start % 1024 > 96 || !eight_columns.is_multiple_of(1024) {
            return Err(misuse(format!(
                "operand B with descriptor {descriptor:#018x}: only the swizzle of 128 bytes, aligned to 1024, is modelled"
            )));
        }
        Ok(Operand {
            start,
            eight_columns,
            columns,
        })
    }

    /// Addresses of the words of a column: two halves each.
    pub fn words(&self, column: u32) -> impl Iterator<Item = u32> {
        let row = self.start + column / 8 * self.eight_columns + column % 8 * 128;
        (0..DEPTH as u32 / 2).map(move |word| {
            let address = row + 4 * word;
            address ^ (address >> 7 & 7) << 4
        })
    }

    /// Whether any of the bytes is one of the operand's.
    pub fn meets(&self, address: u32, bytes: u32) -> bool {
        (address..address + bytes).step_by(4).any(|address| {
            let plain = address ^ (address >> 7 & 7) << 4;
            // 32 of the 128 bytes of each row.
            let Some(distance) = plain.checked_sub(self.start) else {
                return false;
            };
            let (eights, within) = (distance / self.eight_columns, distance % self.eight_columns);
            eights < self.columns / 8 && within < 1024 && within % 128 < 2 * DEPTH as u32
        })
    }
}

/// An operand that a warp's product may still be reading.
#[derive(Debug)]
pub struct Reading {
    pub rank: u16,
    pub operand: Operand,
    pub location: &'static Location<'static>,
    serial: u64,
}

/// A product that a thread has started and not waited for.
#[derive(Debug)]
struct Started {
    sums: u64,
    serial: u64,
}

/// The products of a thread.
#[derive(Debug, Default)]
struct Thread {
    /// Whether a fence stands before what comes next.
    fenced: bool,
    open: Vec<Started>,
    /// Groups, oldest first.
    groups: VecDeque<Vec<Started>>,
}

/// The products of a block that are under way.
#[derive(Debug, Default)]
pub struct Products {
    /// By rank; empty until there is a product.
    threads: Vec<Thread>,
    readings: Vec<Reading>,
    /// What each warpgroup has started, and how much of it each of its warps.
    groups: Vec<(Vec<Operation>, [usize; 4])>,
    serial: u64,
}

impl Products {
    /// A name for sums that no other of the block has.
    pub fn name(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    /// The product that may be reading one of these bytes.
    #[inline]
    pub fn reading(&self, address: u32, bytes: usize) -> Option<&Reading> {
        let meets = |reading: &&Reading| reading.operand.meets(address, bytes as u32);
        self.readings.iter().find(meets)
    }

    fn thread(&mut self, rank: u16) -> &mut Thread {
        let rank = usize::from(rank);
        if self.threads.len() <= rank {
            self.threads.resize_with(rank + 1, Thread::default);
        }
        &mut self.threads[rank]
    }

    /// A thread reaches `wgmma.fence`.
    pub fn fence(&mut self, rank: u16) {
        self.thread(rank).fenced = true;
    }

    /// A thread starts a product that adds to these sums.
    pub fn start(
        &mut self,
        rank: u16,
        sums: u64,
        operand: Operand,
        location: &'static Location<'static>,
    ) -> Result<(), Problem> {
        self.serial += 1;
        let serial = self.serial;
        let thread = self.thread(rank);
        if !thread.fenced {
            return Err(misuse(
                "a product without `fence` since the last group".to_owned(),
            ));
        }
        thread.open.push(Started { sums, serial });
        // A warp reads once.
        if rank.is_multiple_of(32) {
            self.readings.push(Reading {
                rank,
                operand,
                location,
                serial,
            });
        }
        Ok(())
    }

    /// A warp has started a product: the next that its group has, all warps the same.
    pub fn agree(
        &mut self,
        warp: u32,
        block_warps: u32,
        product: Operation,
    ) -> Result<(), Problem> {
        let group = warp as usize / 4;
        if block_warps < 4 * (group as u32 + 1) {
            return Err(misuse("its warpgroup has fewer than four warps".to_owned()));
        }
        if self.groups.len() <= group {
            self.groups.resize_with(group + 1, Default::default);
        }
        let (started, counts) = &mut self.groups[group];
        let count = &mut counts[warp as usize % 4];
        match started.get(*count) {
            None => started.push(product),
            Some(other) if *other == product => {}
            Some(other) => {
                return Err(misuse(format!(
                    "{product:?}, where another warp of its warpgroup starts {other:?}"
                )));
            }
        }
        *count += 1;
        Ok(())
    }

    /// A warp whose group has started more than it, now that the block has ended.
    pub fn left_out(&self) -> Option<(u32, Problem)> {
        self.groups
            .iter()
            .enumerate()
            .find_map(|(group, (started, counts))| {
                let warp = counts.iter().position(|count| *count < started.len())?;
                let problem = misuse(format!(
                    "its warp has started {} products, its warpgroup {}",
                    counts[warp],
                    started.len()
                ));
                Some((4 * group as u32 + warp as u32, problem))
            })
    }

    pub fn commit(&mut self, rank: u16) {
        let thread = self.thread(rank);
        thread.fenced = false;
        let group = std::mem::take(&mut thread.open);
        thread.groups.push_back(group);
    }

    pub fn wait(&mut self, rank: u16, groups: usize) {
        let thread = self.thread(rank);
        let done = thread.groups.len().saturating_sub(groups);
        let done: Vec<u64> = thread
            .groups
            .drain(..done)
            .flatten()
            .map(|s| s.serial)
            .collect();
        self.readings
            .retain(|reading| !done.contains(&reading.serial));
    }

    /// Whether a product of the thread may still add to these sums.
    pub fn adds_to(&mut self, rank: u16, sums: u64) -> bool {
        let thread = self.thread(rank);
        let mut started = thread.open.iter().chain(thread.groups.iter().flatten());
        started.any(|started| started.sums == sums)
    }
}

/// `A B` of a warp's 16 rows: for each lane its values, as `warpgroup::Sums` orders them. `b` holds 16
/// halves for each column. In double precision: exact but for the last bits of a sum.
pub fn products(a: &[[u32; 4]; 32], b: &[[u16; DEPTH]]) -> Vec<Vec<f64>> {
    let value = |bits: u16| f16::from_bits(bits).to_f64();
    let mut rows = [[0.0f64; DEPTH]; 16];
    for (lane, a) in a.iter().enumerate() {
        let (g, q) = (lane / 4, lane % 4);
        for (i, &pair) in a.iter().enumerate() {
            let (row, k) = (g + 8 * (i % 2), 2 * q + 8 * (i / 2));
            rows[row][k] = value(pair as u16);
            rows[row][k + 1] = value((pair >> 16) as u16);
        }
    }
    let columns: Vec<[f64; DEPTH]> = b.iter().map(|column| column.map(value)).collect();
    let lane = |lane: usize| {
        let (g, q) = (lane / 4, lane % 4);
        let of = |i: usize| {
            let row = &rows[g + 8 * (i % 4 / 2)];
            let column = &columns[8 * (i / 4) + 2 * q + i % 2];
            row.iter().zip(column).map(|(a, b)| a * b).sum()
        };
        (0..columns.len() / 2).map(of).collect()
    };
    (0..32).map(lane).collect()
}

/// Why a store meets a product.
#[cold]
pub fn being_read(address: u32, reading: &Reading) -> Problem {
    misuse(format!(
        "stores to byte {} of shared memory while a product that warp {} started at {} may read it: it has not waited for it",
        address - BASE,
        reading.rank / 32,
        line(reading.location)
    ))
}
