//! Order between the blocks of a cooperative launch: who has waited for whom.
//!
//! Each block has a vector clock. What it releases (a `red.release`, or an atomic after a fence) takes
//! its clock to the address; who acquires from there (a `ld.acquire`, or an atomic before a fence) joins
//! it to its own. An access of a word that another block has stored, or a store where another has loaded,
//! has to be ordered so: without, it is only by luck that the value was the right one, whatever order
//! the blocks ran in this time.
//!
//! Atomics themselves are ordered by nothing and need nothing: a word that is only stored and loaded by
//! them may tell by its own value whether it is there.
//!
//! A block counts as one: what its threads owe each other the block barrier says.

use std::cell::RefCell;
use std::collections::HashMap;

use super::fault::{FaultKind, Problem};

const WORD_BYTES: u64 = 4;

/// How much each block has seen of each.
type Clock = Vec<u32>;

/// The last plain accesses of a word.
#[derive(Clone, Copy, Default)]
struct Word {
    /// The block that stored, and its time.
    stored: Option<(u32, u32)>,
    /// A block that loaded since, and its time; the latest.
    loaded: Option<(u32, u32)>,
    /// Another one that did.
    loaded_too: Option<(u32, u32)>,
}

/// The clocks of a launch.
pub struct Order {
    clocks: Vec<Clock>,
    /// What a block's next atomic gives away: its clock at its last fence.
    fenced: Vec<Option<Clock>>,
    /// What a block has taken with atomics since its last fence.
    taken: Vec<Clock>,
    /// What was left at an address.
    left: HashMap<u64, Clock>,
    words: HashMap<u64, Word>,
}

/// What an atomic orders by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orders {
    /// Nothing, fences aside.
    Nothing,
    /// What was before it.
    Release,
    /// What comes after it.
    Acquire,
}

thread_local! {
    /// Of the running launch, if its blocks run side by side.
    pub static ORDER: RefCell<Option<Order>> = const { RefCell::new(None) };
}

fn join(to: &mut Clock, from: &Clock) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = (*to).max(*from);
    }
}

impl Order {
    /// Of a launch of `blocks` blocks, none of which has seen another.
    pub fn new(blocks: usize) -> Order {
        let clocks = (0..blocks).map(|block| {
            let mut clock = vec![0; blocks];
            clock[block] = 1;
            clock
        });
        Order {
            clocks: clocks.collect(),
            fenced: vec![None; blocks],
            taken: vec![vec![0; blocks]; blocks],
            left: HashMap::new(),
            words: HashMap::new(),
        }
    }

    /// Whether `block` has seen what another did at its time.
    fn has_seen(&self, block: u32, other: (u32, u32)) -> bool {
        other.0 == block || self.clocks[block as usize][other.0 as usize] >= other.1
    }

    /// The block's time.
    fn now(&self, block: u32) -> (u32, u32) {
        (block, self.clocks[block as usize][block as usize])
    }

    /// A plain load by a thread of `block`.
    pub fn load(&mut self, block: u32, address: u64, bytes: usize) -> Result<(), Problem> {
        let now = self.now(block);
        for word in words(address, bytes) {
            let mut state = self.words.get(&word).copied().unwrap_or_default();
            if let Some(stored) = state.stored
                && !self.has_seen(block, stored)
            {
                return Err(unordered("load", "stored", stored.0));
            }
            if state.loaded.is_some_and(|(other, _)| other != block) {
                state.loaded_too = state.loaded;
            }
            state.loaded = Some(now);
            self.words.insert(word, state);
        }
        Ok(())
    }

    /// A plain store by a thread of `block`.
    pub fn store(&mut self, block: u32, address: u64, bytes: usize) -> Result<(), Problem> {
        let now = self.now(block);
        for word in words(address, bytes) {
            let state = self.words.get(&word).copied().unwrap_or_default();
            let before = [
                (state.stored, "stored"),
                (state.loaded, "loaded"),
                (state.loaded_too, "loaded"),
            ];
            for (other, what) in before {
                if let Some(other) = other
                    && !self.has_seen(block, other)
                {
                    return Err(unordered("store", what, other.0));
                }
            }
            let stored = Some(now);
            self.words.insert(
                word,
                Word {
                    stored,
                    ..Word::default()
                },
            );
        }
        Ok(())
    }

    /// A store by an atomic: it waits for nobody, but who loads plainly has to wait for it.
    pub fn note_store(&mut self, block: u32, address: u64, bytes: usize) {
        let stored = Some(self.now(block));
        for word in words(address, bytes) {
            self.words.entry(word).or_default().stored = stored;
        }
    }

    /// An atomic by a thread of `block`.
    pub fn atomic(&mut self, block: u32, address: u64, orders: Orders) {
        let index = block as usize;
        if let Some(left) = self.left.get(&address) {
            join(&mut self.taken[index], left);
            if orders == Orders::Acquire {
                join(&mut self.clocks[index], left);
            }
        }
        let given = match orders {
            Orders::Release => Some(self.clocks[index].clone()),
            _ => self.fenced[index].clone(),
        };
        if let Some(given) = given {
            let left = self
                .left
                .entry(address)
                .or_insert_with(|| vec![0; given.len()]);
            join(left, &given);
        }
        if orders == Orders::Release {
            // What the block does from here on is not part of it.
            self.clocks[index][index] += 1;
        }
    }

    /// A fence by a thread of `block`.
    pub fn fence(&mut self, block: u32) {
        let index = block as usize;
        let taken = std::mem::replace(&mut self.taken[index], vec![0; self.clocks.len()]);
        join(&mut self.clocks[index], &taken);
        self.fenced[index] = Some(self.clocks[index].clone());
        self.clocks[index][index] += 1;
    }
}

fn words(address: u64, bytes: usize) -> impl Iterator<Item = u64> {
    address / WORD_BYTES..(address + bytes as u64).div_ceil(WORD_BYTES)
}

#[cold]
fn unordered(what: &str, did: &str, other: u32) -> Problem {
    Problem::new(
        FaultKind::MissingWait,
        format!(
            "{what} of a word that block {other} has {did}, with nothing that makes the one wait for the other"
        ),
    )
}
