//! What asynchronous products read of shared memory.

use super::super::fault::Problem;
use super::super::memory::Value;
use super::super::products::{Operand, Products, misuse};
use super::{Shared, WORD, thread_index};
use std::panic::Location;

impl Shared {
    /// The asynchronous products of the block.
    pub fn products(&mut self) -> &mut Products {
        &mut self.products
    }

    /// `fence.proxy.async` by the thread of this rank: products may read what it has written.
    pub fn fence_products(&mut self, rank: u16) {
        self.fences += 1;
        self.fenced[usize::from(rank)] = self.fences;
    }

    /// What a product reads that the warp of the thread of this rank has started: 16 halves a column.
    pub fn read_operand(
        &mut self,
        operand: &Operand,
        columns: u32,
        rank: u16,
        location: &'static Location<'static>,
    ) -> Result<Vec<[u16; 16]>, Problem> {
        let mut halves = vec![[0; 16]; columns as usize];
        for (column, halves) in halves.iter_mut().enumerate() {
            for (i, address) in operand.words(column as u32).enumerate() {
                let start = self.range(address, WORD, "operand B")?;
                self.mark_load(start / WORD, rank, location)?;
                let store = self.words[start / WORD].store;
                if store.fences >= self.fenced[usize::from(store.rank)] {
                    let [x, y, z] = thread_index(u32::from(store.rank), self.block);
                    return Err(misuse(format!(
                        "reads byte {start} of shared memory, which thread ({x}, {y}, {z}) wrote with no `fence_shared` after it"
                    )));
                }
                let word = u32::read(&self.bytes[start..start + WORD]);
                halves[2 * i] = word as u16;
                halves[2 * i + 1] = (word >> 16) as u16;
            }
        }
        Ok(halves)
    }
}
