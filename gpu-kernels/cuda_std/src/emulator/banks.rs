//! Bank conflicts of shared memory: how often the lanes of a warp wait for each other.
//!
//! Shared memory has 32 banks of 4 bytes: word w lies in bank w mod 32. In a pass (a *wavefront*)
//! each bank gives one word, to any number of lanes. A warp's access of up to 4 bytes a lane is made
//! at one go, of 8 bytes by half-warps, of 16 bytes by quarters; each takes as many passes as the
//! bank with the most different words needs, and what is above one is a conflict.
//!
//! Threads of the emulator do not run in step: the n-th access of a lane at a source line is taken
//! to be made together with the n-th of the others, as it is where they stay together.

use super::fault::same_line;
use super::shared::BASE;
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::panic::Location;

const LANES: usize = 32;
const BANKS: u32 = 32;
const WORD: u32 = 4;

/// The accesses of a kernel at one source line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflicts {
    /// Kernel name.
    pub kernel: String,
    /// Line of the kernel source.
    pub location: &'static Location<'static>,
    /// Bytes a lane.
    pub bytes: u32,
    /// Whether it stores.
    pub stores: bool,
    /// Accesses of warps.
    pub accesses: u64,
    /// Passes that they took besides those that they need.
    pub extra: u64,
    /// Most of these in one access.
    pub worst: u32,
}

thread_local! {
    /// What launches of this OS thread have counted; none while nothing is to be counted.
    static COUNTED: RefCell<Option<Vec<Conflicts>>> = const { RefCell::new(None) };
}

/// Has the launches of this OS thread count bank conflicts from now on.
pub fn count_conflicts() {
    COUNTED.set(Some(Vec::new()));
}

/// What was counted since [`count_conflicts`], most extra passes first; ends the counting.
pub fn take_conflicts() -> Vec<Conflicts> {
    let mut counted = COUNTED.take().unwrap_or_default();
    counted.sort_by_key(|line| std::cmp::Reverse(line.extra));
    counted
}

/// One access of a warp, as far as its lanes have made it.
#[derive(Clone)]
struct Access {
    addresses: [u32; LANES],
    mask: u32,
}

/// The accesses of a warp at one line that are not complete, and how many each lane has made.
struct Line {
    bytes: u32,
    stores: bool,
    made: [u64; LANES],
    /// Number of the first of `open`.
    first: u64,
    open: VecDeque<Access>,
}

/// Counts the accesses of a launch.
pub(super) struct Banks {
    kernel: String,
    /// By resident block, warp, address of the location, and bytes.
    lines: HashMap<(u32, u32, usize, u32), (&'static Location<'static>, Line)>,
    found: Vec<Conflicts>,
}

impl Banks {
    /// A counter for a launch of `kernel`, if there is to be one.
    pub fn of(kernel: &str) -> Option<Banks> {
        COUNTED
            .with_borrow(|counted| counted.is_some())
            .then(|| Banks {
                kernel: kernel.to_owned(),
                lines: HashMap::new(),
                found: Vec::new(),
            })
    }

    /// A lane of a warp of `lanes` accesses `bytes` at `address`.
    #[allow(clippy::too_many_arguments)] // They are what an access is.
    pub fn access(
        &mut self,
        block: u32,
        rank: u32,
        lanes: u32,
        location: &'static Location<'static>,
        address: u32,
        bytes: u32,
        stores: bool,
    ) {
        let (warp, lane) = (rank / LANES as u32, rank as usize % LANES);
        let key = (block, warp, std::ptr::from_ref(location).addr(), bytes);
        let (_, line) = self.lines.entry(key).or_insert_with(|| {
            let line = Line {
                bytes,
                stores,
                made: [0; LANES],
                first: 0,
                open: VecDeque::new(),
            };
            (location, line)
        });
        let number = line.made[lane];
        line.made[lane] += 1;
        // One that was closed as complete has had every lane: this lane's are all later.
        let index = (number - line.first) as usize;
        let untouched = Access {
            addresses: [0; LANES],
            mask: 0,
        };
        if line.open.len() <= index {
            line.open.resize(index + 1, untouched);
        }
        let access = &mut line.open[index];
        access.addresses[lane] = address;
        access.mask |= 1 << lane;
        let all = u32::MAX >> (LANES as u32 - lanes);
        while line.open.front().is_some_and(|access| access.mask == all) {
            if let Some(access) = line.open.pop_front() {
                line.first += 1;
                let extra = extra_passes(&access, bytes);
                count(&mut self.found, &self.kernel, location, line, extra);
            }
        }
    }

    /// The resident blocks have returned: what is open stays as it is.
    pub fn end_blocks(&mut self) {
        for (location, line) in self.lines.values_mut() {
            for access in std::mem::take(&mut line.open) {
                if access.mask != 0 {
                    let extra = extra_passes(&access, line.bytes);
                    count(&mut self.found, &self.kernel, location, line, extra);
                }
            }
        }
        self.lines.clear();
    }

    /// Adds what the launch counted to what its OS thread has counted.
    pub fn end_launch(mut self) {
        self.end_blocks();
        COUNTED.with_borrow_mut(|counted| {
            let Some(counted) = counted else { return };
            for line in self.found {
                match counted.iter_mut().find(|known| same(known, &line)) {
                    Some(known) => {
                        known.accesses += line.accesses;
                        known.extra += line.extra;
                        known.worst = known.worst.max(line.worst);
                    }
                    None => counted.push(line),
                }
            }
        });
    }
}

fn same(a: &Conflicts, b: &Conflicts) -> bool {
    a.kernel == b.kernel
        && same_line(a.location, b.location)
        && (a.bytes, a.stores) == (b.bytes, b.stores)
}

fn count(
    found: &mut Vec<Conflicts>,
    kernel: &str,
    location: &'static Location<'static>,
    line: &Line,
    extra: u32,
) {
    let known = found.iter_mut().find(|known| {
        same_line(known.location, location)
            && (known.bytes, known.stores) == (line.bytes, line.stores)
    });
    match known {
        Some(known) => {
            known.accesses += 1;
            known.extra += u64::from(extra);
            known.worst = known.worst.max(extra);
        }
        None => found.push(Conflicts {
            kernel: kernel.to_owned(),
            location,
            bytes: line.bytes,
            stores: line.stores,
            accesses: 1,
            extra: extra.into(),
            worst: extra,
        }),
    }
}

/// Passes of an access above those that it needs: one for each part of the warp that goes at once.
fn extra_passes(access: &Access, bytes: u32) -> u32 {
    let words = bytes.div_ceil(WORD).max(1);
    let lanes_at_once = LANES / words as usize;
    let lanes: Vec<usize> = (0..LANES).collect();
    let parts = lanes.chunks(lanes_at_once);
    parts
        .map(|lanes| {
            let mut touched: Vec<u32> = lanes
                .iter()
                .filter(|&&lane| access.mask >> lane & 1 == 1)
                .flat_map(|&lane| {
                    let first = (access.addresses[lane] - BASE) / WORD;
                    first..first + words
                })
                .collect();
            touched.sort_unstable();
            touched.dedup();
            let mut in_bank = [0; BANKS as usize];
            for word in touched {
                in_bank[(word % BANKS) as usize] += 1;
            }
            let passes: u32 = in_bank.into_iter().max().unwrap_or(0);
            passes.saturating_sub(1)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extra(bytes: u32, mask: u32, address: impl Fn(u32) -> u32) -> u32 {
        let access = Access {
            addresses: std::array::from_fn(|lane| BASE + address(lane as u32)),
            mask,
        };
        extra_passes(&access, bytes)
    }

    #[test]
    fn passes_are_those_of_the_fullest_bank() {
        let all = u32::MAX;
        assert_eq!(extra(4, all, |lane| 4 * lane), 0, "a word a bank");
        assert_eq!(extra(4, all, |_| 64), 0, "one word for all");
        assert_eq!(extra(4, all, |lane| 8 * lane), 1, "two words a bank");
        assert_eq!(extra(4, all, |lane| 128 * lane), 31, "one bank");
        assert_eq!(extra(4, 0xff, |lane| 128 * lane), 7, "of eight lanes");
        assert_eq!(extra(2, all, |lane| 2 * lane), 0, "two lanes a word");
        assert_eq!(extra(4, all, |lane| 132 * lane), 0, "a padded column");
    }

    #[test]
    fn wide_accesses_go_in_parts() {
        let all = u32::MAX;
        assert_eq!(extra(8, all, |lane| 8 * lane), 0);
        assert_eq!(extra(16, all, |lane| 16 * lane), 0);
        // Each quarter of 8 lanes meets in 4 banks: 7 passes more for each.
        assert_eq!(extra(16, all, |lane| 128 * lane), 28);
        assert_eq!(extra(8, all, |lane| 128 * lane), 30);
    }
}
