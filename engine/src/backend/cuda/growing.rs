//! Device memory at fixed addresses that comes as it is reached: addresses are reserved at first, pages
//! mapped to them later. Graphs and kernels see one buffer from the start.
//!
//! ```text
//! addresses   |strip 0            |strip 1            |strip 2            |
//! filled      |######             |######             |######             |
//! pages       [0  ][1  ][2  ][3  ][4  ][5  ][6  ][7  ][8  ][9  ][10 ][11 ]
//! mapped       0    1              4    5         7    8    9
//! ```
//!
//! A page is 2 MiB on every GPU so far. A strip has one more page than it fills, on average; strips
//! shorter than a page share theirs, so that a small cache takes all of its memory at once, and no more.

use std::ops::Range;

use cust::error::CudaError;
use cust::sys::{self, CUresult};

use super::device::failed;
use crate::Error;

/// Strips of rows in one range of addresses, filled from the front, all of them together.
#[derive(Debug)]
struct Layout {
    /// Offsets of the strips, bytes.
    starts: Vec<u64>,
    /// Of a strip.
    rows: u64,
    row_bytes: u64,
    page_bytes: u64,
}

impl Layout {
    /// Pages that the first `rows` rows from offset `start` on lie in.
    fn pages(&self, start: u64, rows: u64) -> Range<usize> {
        let end = start + rows * self.row_bytes;
        (start / self.page_bytes) as usize..end.div_ceil(self.page_bytes) as usize
    }

    /// Rows that every strip has room for where the pages of the first `rows` are mapped.
    fn reach(&self, rows: u64) -> u64 {
        let of_strip = |start: &u64| {
            let end = self.pages(*start, rows).end as u64 * self.page_bytes;
            (end - start) / self.row_bytes
        };
        let least = self.starts.iter().map(of_strip).min();
        least.unwrap_or(self.rows).min(self.rows)
    }
}

/// Pages of `wanted` that are not `mapped`, in runs.
fn missing(mapped: &[bool], wanted: Range<usize>) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for page in wanted.filter(|page| !mapped[*page]) {
        match runs.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    runs
}

/// A range of addresses and the memory behind it. It belongs to the context that is current when it is
/// made, which has to be current whenever it is used, and when it is dropped with no work under way.
#[derive(Debug)]
pub struct Growing {
    base: u64,
    reserved_bytes: usize,
    layout: Layout,
    mapped: Vec<bool>,
    /// Addresses and bytes of what was mapped in one piece.
    pieces: Vec<(u64, usize)>,
}

impl Growing {
    /// Reserves addresses for strips of `rows` rows that start at these offsets; the range ends with the
    /// last of them.
    ///
    /// # Errors
    /// [`Error::Machine`] if the driver refuses.
    pub fn reserve(starts: Vec<u64>, rows: usize, row_bytes: u64) -> Result<Growing, Error> {
        let mut page_bytes = 0;
        // SAFETY: a valid place for the answer, and a description of the memory.
        let asked = unsafe {
            sys::cuMemGetAllocationGranularity(
                &mut page_bytes,
                &properties(),
                sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM,
            )
        };
        check("asking for the size of a page of GPU memory", asked)?;
        let layout = Layout {
            starts,
            rows: rows as u64,
            row_bytes,
            page_bytes: page_bytes.max(1) as u64,
        };
        let last = layout.starts.last().copied().unwrap_or(0);
        let pages = layout.pages(last, layout.rows).end;
        let reserved_bytes = pages * layout.page_bytes as usize;
        let mut base = 0;
        // SAFETY: a valid place for the address.
        let reserved = unsafe { sys::cuMemAddressReserve(&mut base, reserved_bytes, 0, 0, 0) };
        check("reserving addresses of GPU memory", reserved)?;
        Ok(Growing {
            base,
            reserved_bytes,
            layout,
            mapped: vec![false; pages],
            pieces: Vec::new(),
        })
    }

    /// First address.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Makes room for the first `rows` rows of every strip; those that there is room for then.
    ///
    /// # Errors
    /// [`Error::Machine`] if there is no memory left.
    pub fn grow(&mut self, rows: usize) -> Result<usize, Error> {
        let rows = (rows as u64).min(self.layout.rows);
        for strip in 0..self.layout.starts.len() {
            let wanted = self.layout.pages(self.layout.starts[strip], rows);
            for run in missing(&self.mapped, wanted) {
                self.map(run)?;
            }
        }
        Ok(self.layout.reach(rows) as usize)
    }

    fn map(&mut self, pages: Range<usize>) -> Result<(), Error> {
        let page_bytes = self.layout.page_bytes;
        let bytes = pages.len() * page_bytes as usize;
        let address = self.base + pages.start as u64 * page_bytes;
        let what = format!("adding {} MiB to the cache", bytes >> 20);
        let mut handle = 0;
        let access = sys::CUmemAccessDesc {
            location: properties().location,
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: the pages lie in the reserved range and nothing is mapped there. The memory lives as
        // long as it is mapped, so the handle is not needed any more.
        unsafe {
            check(
                &what,
                sys::cuMemCreate(&mut handle, bytes, &properties(), 0),
            )?;
            let mapped = sys::cuMemMap(address, bytes, 0, handle, 0);
            let released = sys::cuMemRelease(handle);
            check(&what, mapped)?;
            self.pieces.push((address, bytes));
            self.mapped[pages].fill(true);
            check(&what, released)?;
            check(&what, sys::cuMemSetAccess(address, bytes, &access, 1))
        }
    }
}

impl Drop for Growing {
    fn drop(&mut self) {
        // SAFETY: nothing uses the memory any more, and pieces are what was mapped. An error has nowhere
        // to go: the process keeps the memory then.
        unsafe {
            for (address, bytes) in self.pieces.drain(..) {
                sys::cuMemUnmap(address, bytes);
            }
            sys::cuMemAddressFree(self.base, self.reserved_bytes);
        }
    }
}

/// Memory of device 0 that stays there.
fn properties() -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: 0,
        },
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: Default::default(),
    }
}

fn check(what: &str, result: CUresult) -> Result<(), Error> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        // The driver crate remembers its name.
        _ => Err(failed(what, CudaError::UnknownError)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every row below what a layout says that it reaches lies in a page of those that it asked for, and
    /// a strip has at most one page more than its rows fill.
    #[test]
    fn rows_within_reach_lie_in_mapped_pages() {
        for (strips, rows, row_bytes, page_bytes) in
            [(3, 100, 24, 256), (2, 7, 16, 4096), (5, 333, 100, 1000)]
        {
            let strip_bytes = rows * row_bytes;
            let layout = Layout {
                starts: (0..strips).map(|i| i * strip_bytes).collect(),
                rows,
                row_bytes,
                page_bytes,
            };
            let end = layout.pages((strips - 1) * strip_bytes, rows).end;
            let mut mapped = vec![false; end];
            let mut reach = 0;
            for row in 0..rows {
                if row < reach {
                    continue;
                }
                for start in &layout.starts {
                    for run in missing(&mapped, layout.pages(*start, row + 1)) {
                        assert!(!run.is_empty() && mapped[run.clone()].iter().all(|m| !m));
                        mapped[run].fill(true);
                    }
                }
                reach = layout.reach(row + 1);
                assert!(reach > row);
                for start in &layout.starts {
                    let last = (start + reach * row_bytes - 1) / page_bytes;
                    let first = start / page_bytes;
                    assert!((first..=last).all(|page| mapped[page as usize]));
                }
                let taken = mapped.iter().filter(|m| **m).count() as u64;
                let filled = ((row + 1) * row_bytes).div_ceil(page_bytes);
                assert!(taken <= strips * (filled + 1));
            }
            assert!(mapped.iter().all(|m| *m), "all of it in the end");
            assert_eq!(layout.reach(rows), rows);
        }
    }

    #[test]
    fn missing_pages_come_in_runs() {
        let mapped = [false, false, true, false, true, true];
        assert_eq!(missing(&mapped, 0..6), [0..2, 3..4]);
        assert!(missing(&mapped, 4..6).is_empty());
    }
}
