//! Warp operations: shuffles, votes and the warp barrier, with their rules about lanes.

use super::fault::{FaultKind, Problem, line, same_line};
use super::mma::{self, Fragments};
use super::shared::lanes;
use std::panic::Location;

/// What the lanes of a warp do together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// `shfl.sync.bfly`
    Xor,
    /// `shfl.sync.down`
    Down,
    /// `shfl.sync.idx`
    Index,
    /// `vote.sync.ballot`
    Ballot,
    /// `bar.warp.sync`
    Barrier,
    /// `mma.sync`, of this many columns of A.
    Mma(mma::Depth),
    /// `wgmma.mma_async`, the warp's part of it, with this many columns
    /// and this descriptor of operand B.
    Product {
        /// Columns of B.
        columns: u32,
        /// Its descriptor.
        b: u64,
    },
    /// What `ldmatrix.x4.trans` does with the rows that it has loaded: row r of matrix m is that of
    /// lane `8m + r`; lane `4g + q` gets elements g of the rows 2q and 2q + 1 of each.
    Transpose,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Operation::Xor => "shfl.sync.bfly",
            Operation::Down => "shfl.sync.down",
            Operation::Index => "shfl.sync.idx",
            Operation::Ballot => "vote.sync.ballot",
            Operation::Barrier => "bar.warp.sync",
            Operation::Mma(_) => "mma.sync",
            Operation::Product { .. } => "wgmma.mma_async",
            Operation::Transpose => "ldmatrix",
        }
    }

    /// The kind of fault that a lane which does not take part is.
    pub fn fault(self) -> FaultKind {
        if self == Operation::Barrier {
            FaultKind::Barrier
        } else {
            FaultKind::Shuffle
        }
    }
}

/// A lane's part in an operation.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    pub operation: Operation,
    pub mask: u32,
    /// The register it gives; for a vote 0 or 1.
    pub value: u32,
    /// The register that names the source lane.
    pub operand: u32,
    pub location: &'static Location<'static>,
}

impl Request {
    /// Whether another lane's request is for the same operation at the same line.
    fn same(&self, other: &Request) -> bool {
        self.mask == other.mask
            && self.operation == other.operation
            && same_line(self.location, other.location)
    }

    #[cold]
    fn refused(&self, lane: usize, detail: String) -> LaneProblem {
        let problem = Problem::new(self.operation.fault(), detail);
        LaneProblem {
            lane,
            location: self.location,
            problem,
        }
    }
}

/// A problem of the lane that it concerns.
#[derive(Debug)]
pub struct LaneProblem {
    pub lane: usize,
    pub location: &'static Location<'static>,
    pub problem: Problem,
}

/// An operation that is complete.
#[derive(Debug, PartialEq, Eq)]
pub struct Completed {
    pub operation: Operation,
    /// The lanes that took part.
    pub lanes: u32,
    /// The result of each.
    pub results: [u32; 32],
    pub location: &'static Location<'static>,
}

/// The lanes of one warp.
#[derive(Debug, Clone)]
pub struct Warp {
    pending: [Option<Request>; 32],
    /// Lanes with a request pending.
    waiting: u32,
    /// Lanes that have returned, or that the block does not have.
    gone: u32,
    /// What each lane gave to its last `mma.sync`.
    fragments: [Fragments; 32],
    /// What each lane got from it.
    products: [[f32; 4]; 32],
    /// The row that each lane gave to its last `ldmatrix`.
    rows: [[u32; 4]; 32],
    /// What each lane got from it.
    turned: [[u32; 4]; 32],
    /// What each lane got from its last `wgmma`.
    wide: Vec<Vec<f64>>,
}

impl Warp {
    /// A warp with this many threads.
    pub fn new(threads: u32) -> Warp {
        let gone = if threads >= 32 {
            0
        } else {
            u32::MAX << threads
        };
        Warp {
            pending: [None; 32],
            waiting: 0,
            gone,
            fragments: [Fragments::default(); 32],
            products: [[0.0; 4]; 32],
            rows: [[0; 4]; 32],
            turned: [[0; 4]; 32],
            wide: Vec::new(),
        }
    }

    /// A lane's part of A for the `wgmma` that it is about to start.
    pub fn give_a(&mut self, lane: usize, a: [u32; 4]) {
        self.fragments[lane].a = a;
    }

    /// The lanes' parts of A.
    pub fn given_a(&self) -> [[u32; 4]; 32] {
        self.fragments.map(|fragments| fragments.a)
    }

    /// The lanes get their products of a `wgmma`.
    pub fn take_wide(&mut self, products: Vec<Vec<f64>>) {
        self.wide = products;
    }

    /// A lane's products of the last `wgmma`: they stay until every lane has reached the next.
    pub fn wide(&self, lane: usize) -> &[f64] {
        &self.wide[lane]
    }

    /// A lane's registers for the `mma.sync` that it is about to reach.
    pub fn give(&mut self, lane: usize, fragments: Fragments) {
        self.fragments[lane] = fragments;
    }

    /// A lane's result of the last `mma.sync`: it stays until every lane has reached the next.
    pub fn product(&self, lane: usize) -> [f32; 4] {
        self.products[lane]
    }

    /// A lane's row for the `ldmatrix` that it is about to reach.
    pub fn give_row(&mut self, lane: usize, row: [u32; 4]) {
        self.rows[lane] = row;
    }

    /// A lane's result of the last `ldmatrix`: it stays until every lane has reached the next.
    pub fn turned(&self, lane: usize) -> [u32; 4] {
        self.turned[lane]
    }

    /// What a lane is waiting in.
    pub fn pending(&self, lane: usize) -> Option<&Request> {
        self.pending[lane].as_ref()
    }

    /// Whether the lane has returned or never was.
    pub fn is_gone(&self, lane: usize) -> bool {
        self.gone >> lane & 1 == 1
    }

    /// A lane reaches an operation; the operation if that completes it.
    pub fn arrive(
        &mut self,
        lane: usize,
        request: Request,
    ) -> Result<Option<Completed>, LaneProblem> {
        if request.mask >> lane & 1 == 0 {
            let detail = format!(
                "{} by lane {lane}, which is not in its mask {:#010x}",
                request.operation.name(),
                request.mask
            );
            return Err(request.refused(lane, detail));
        }
        self.pending[lane] = Some(request);
        self.waiting |= 1 << lane;
        self.complete(lane, &request)
    }

    /// A lane returns; the operation that this completes, if any.
    pub fn leave(&mut self, lane: usize) -> Result<Option<Completed>, LaneProblem> {
        self.gone |= 1 << lane;
        let waiting = lanes(self.waiting).find_map(|other| {
            let request = self.pending[other]?;
            (request.mask >> lane & 1 == 1).then_some((other, request))
        });
        match waiting {
            Some((other, request)) => self.complete(other, &request),
            None => Ok(None),
        }
    }

    /// The operation that `lane` waits in, if all lanes of its mask have reached it.
    fn complete(
        &mut self,
        lane: usize,
        request: &Request,
    ) -> Result<Option<Completed>, LaneProblem> {
        let taking_part = request.mask & !self.gone;
        if taking_part & !self.waiting != 0 {
            return Ok(None);
        }
        for other in lanes(taking_part) {
            match &self.pending[other] {
                Some(theirs) if theirs.same(request) => {}
                // They wait for this lane, and this lane for them.
                Some(theirs) if theirs.mask >> lane & 1 == 1 => {
                    let detail = format!(
                        "{} with mask {:#010x} by lane {lane}, while lane {other} waits for it in {} with mask {:#010x} at {}",
                        request.operation.name(),
                        request.mask,
                        theirs.operation.name(),
                        theirs.mask,
                        line(theirs.location)
                    );
                    return Err(request.refused(lane, detail));
                }
                _ => return Ok(None),
            }
        }
        if let Operation::Mma(_) | Operation::Product { .. } | Operation::Transpose =
            request.operation
            && taking_part != u32::MAX
        {
            let absent = lanes(!taking_part).next().unwrap_or(0);
            let name = request.operation.name();
            let detail = format!("{name} by lane {lane} without lane {absent}");
            return Err(request.refused(lane, detail));
        }
        match request.operation {
            Operation::Mma(depth) => self.products = mma::products(depth, &self.fragments),
            Operation::Transpose => self.turned = turned(&self.rows),
            _ => {}
        }
        let values = self
            .pending
            .map(|request| request.map_or(0, |request| request.value));
        let votes = lanes(taking_part)
            .filter(|&lane| values[lane] != 0)
            .fold(0, |votes, lane| votes | 1 << lane);
        let mut results = [0; 32];
        for lane in lanes(taking_part) {
            let Some(own) = &self.pending[lane] else {
                continue;
            };
            let operand = own.operand as usize & 31;
            let source = match own.operation {
                Operation::Xor => lane ^ operand,
                // Past the last lane the source is the lane itself.
                Operation::Down if lane + operand > 31 => lane,
                Operation::Down => lane + operand,
                Operation::Index => operand,
                Operation::Ballot
                | Operation::Barrier
                | Operation::Mma(_)
                | Operation::Product { .. }
                | Operation::Transpose => {
                    results[lane] = votes;
                    continue;
                }
            };
            if taking_part >> source & 1 == 0 {
                return Err(self.inactive_source(lane, source, own));
            }
            results[lane] = values[source];
        }
        for lane in lanes(taking_part) {
            self.pending[lane] = None;
        }
        self.waiting &= !taking_part;
        Ok(Some(Completed {
            operation: request.operation,
            lanes: taking_part,
            results,
            location: request.location,
        }))
    }

    #[cold]
    fn inactive_source(&self, lane: usize, source: usize, request: &Request) -> LaneProblem {
        let why = if request.mask >> source & 1 == 0 {
            format!("is not in the mask {:#010x}", request.mask)
        } else {
            "has returned or does not exist".to_owned()
        };
        let name = request.operation.name();
        request.refused(
            lane,
            format!("{name} by lane {lane} reads lane {source}, which {why}"),
        )
    }
}

/// Each lane's part of four transposed matrices.
fn turned(rows: &[[u32; 4]; 32]) -> [[u32; 4]; 32] {
    let element = |row: usize, i: usize| rows[row][i / 2] >> (16 * (i % 2)) & 0xffff;
    std::array::from_fn(|lane| {
        let (g, q) = (lane / 4, lane % 4);
        std::array::from_fn(|matrix| {
            let row = 8 * matrix + 2 * q;
            element(row, g) | element(row + 1, g) << 16
        })
    })
}

/// Why a waiting lane can never go on: a lane of its mask is blocked elsewhere.
pub fn never_arrives(request: &Request, lane: usize, missing: usize, elsewhere: &str) -> Problem {
    Problem::new(
        request.operation.fault(),
        format!(
            "{} with mask {:#010x} by lane {lane}: lane {missing} {elsewhere}",
            request.operation.name(),
            request.mask
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(operation: Operation, mask: u32, value: u32, operand: u32) -> Request {
        Request {
            operation,
            mask,
            value,
            operand,
            location: Location::caller(),
        }
    }

    /// All 32 lanes give their number plus 100.
    fn whole_warp(operation: Operation, operand: u32) -> [u32; 32] {
        let mut warp = Warp::new(32);
        for lane in 0..31 {
            let part = request(operation, u32::MAX, lane as u32 + 100, operand);
            assert_eq!(warp.arrive(lane, part).unwrap(), None);
        }
        let last = request(operation, u32::MAX, 131, operand);
        warp.arrive(31, last).unwrap().expect("complete").results
    }

    #[test]
    fn shuffles_read_the_documented_lane() {
        assert_eq!(whole_warp(Operation::Xor, 5)[8], 100 + (8 ^ 5));
        assert_eq!(
            whole_warp(Operation::Xor, 32)[8],
            108,
            "five bits of the lane mask count"
        );
        let down = whole_warp(Operation::Down, 4);
        assert_eq!(down[27], 131);
        assert_eq!(down[28], 128, "past lane 31 a lane keeps its own value");
        assert_eq!(
            whole_warp(Operation::Index, 33)[9],
            101,
            "five bits of the lane count"
        );
    }

    #[test]
    fn matrices_are_turned() {
        // Element i of row r of matrix m is 64 m + 8 r + i.
        let rows = std::array::from_fn(|lane| {
            std::array::from_fn(|word| {
                let first = 8 * lane as u32 + 2 * word as u32;
                first | (first + 1) << 16
            })
        });
        let turned = turned(&rows);
        for (lane, words) in turned.iter().enumerate() {
            let (g, q) = (lane as u32 / 4, lane as u32 % 4);
            for (matrix, word) in words.iter().enumerate() {
                let first = 64 * matrix as u32 + 16 * q + g;
                assert_eq!(*word, first | (first + 8) << 16);
            }
        }
    }

    #[test]
    fn a_ballot_leaves_out_lanes_that_are_gone() {
        let mut warp = Warp::new(3);
        for lane in 0..2 {
            let part = request(Operation::Ballot, u32::MAX, lane as u32, 0);
            assert_eq!(warp.arrive(lane, part).unwrap(), None);
        }
        let completed = warp.leave(2).unwrap().expect("the last lane returned");
        assert_eq!((completed.lanes, completed.results[0]), (0b11, 0b10));
    }

    #[test]
    fn reading_an_inactive_lane_is_refused() {
        let mut warp = Warp::new(32);
        warp.arrive(0, request(Operation::Xor, 0b11, 0, 2)).unwrap();
        let refused = warp
            .arrive(1, request(Operation::Xor, 0b11, 0, 2))
            .unwrap_err();
        assert_eq!(
            (refused.lane, refused.problem.kind),
            (0, FaultKind::Shuffle)
        );
        assert!(
            refused.problem.detail.contains("reads lane 2"),
            "{}",
            refused.problem.detail
        );
    }

    #[test]
    fn lanes_that_wait_for_each_other_agree() {
        let mut warp = Warp::new(32);
        warp.arrive(0, request(Operation::Xor, 0b11, 0, 1)).unwrap();
        let refused = warp
            .arrive(1, request(Operation::Down, 0b11, 0, 1))
            .unwrap_err();
        assert!(
            refused.problem.detail.contains("lane 0 waits"),
            "{}",
            refused.problem.detail
        );
        let outside = warp
            .arrive(4, request(Operation::Xor, 0b11, 0, 1))
            .unwrap_err();
        assert!(
            outside.problem.detail.contains("not in its mask"),
            "{}",
            outside.problem.detail
        );
    }
}
