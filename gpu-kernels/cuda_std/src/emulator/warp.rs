//! Warp operations: shuffles, votes and the warp barrier, with their rules about lanes.

use super::fault::{FaultKind, Problem, line};
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
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Operation::Xor => "shfl.sync.bfly",
            Operation::Down => "shfl.sync.down",
            Operation::Index => "shfl.sync.idx",
            Operation::Ballot => "vote.sync.ballot",
            Operation::Barrier => "bar.warp.sync",
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
}

/// The lanes of one warp.
#[derive(Debug, Clone)]
pub struct Warp {
    pending: [Option<Request>; 32],
    /// Lanes that have returned, or that the block does not have.
    gone: u32,
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
            gone,
        }
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
        let refuse = |detail| {
            let problem = Problem::new(request.operation.fault(), detail);
            LaneProblem {
                lane,
                location: request.location,
                problem,
            }
        };
        let name = request.operation.name();
        if request.mask >> lane & 1 == 0 {
            return Err(refuse(format!(
                "{name} by lane {lane}, which is not in its mask {:#010x}",
                request.mask
            )));
        }
        for other in lanes(request.mask) {
            let Some(theirs) = &self.pending[other] else {
                continue;
            };
            let same = theirs.operation == request.operation
                && theirs.mask == request.mask
                && theirs.location == request.location;
            if theirs.mask >> lane & 1 == 1 && !same {
                return Err(refuse(format!(
                    "{name} with mask {:#010x} by lane {lane}, while lane {other} waits for it in {} with mask {:#010x} at {}",
                    request.mask,
                    theirs.operation.name(),
                    theirs.mask,
                    line(theirs.location)
                )));
            }
        }
        self.pending[lane] = Some(request);
        self.complete(&request)
    }

    /// A lane returns; the operation that this completes, if any.
    pub fn leave(&mut self, lane: usize) -> Result<Option<Completed>, LaneProblem> {
        self.gone |= 1 << lane;
        let waiting = self
            .pending
            .iter()
            .flatten()
            .find(|request| request.mask >> lane & 1 == 1);
        match waiting.copied() {
            Some(request) => self.complete(&request),
            None => Ok(None),
        }
    }

    fn complete(&mut self, request: &Request) -> Result<Option<Completed>, LaneProblem> {
        let taking_part = request.mask & !self.gone;
        let arrived = |lane: usize| {
            self.pending[lane].is_some_and(|theirs| {
                theirs.mask == request.mask && theirs.operation == request.operation
            })
        };
        if !lanes(taking_part).all(arrived) {
            return Ok(None);
        }
        let mut results = [0; 32];
        let votes = lanes(taking_part)
            .filter(|&lane| self.pending[lane].is_some_and(|request| request.value != 0))
            .fold(0, |votes, lane| votes | 1 << lane);
        for lane in lanes(taking_part) {
            let Some(own) = self.pending[lane] else {
                continue;
            };
            let operand = own.operand as usize & 31;
            let source = match own.operation {
                Operation::Xor => lane ^ operand,
                // Past the last lane the source is the lane itself.
                Operation::Down if lane + operand > 31 => lane,
                Operation::Down => lane + operand,
                Operation::Index => operand,
                Operation::Ballot | Operation::Barrier => {
                    results[lane] = votes;
                    continue;
                }
            };
            match self.pending[source].filter(|_| taking_part >> source & 1 == 1) {
                Some(theirs) => results[lane] = theirs.value,
                None => return Err(self.inactive_source(lane, source, &own)),
            }
        }
        for lane in lanes(taking_part) {
            self.pending[lane] = None;
        }
        Ok(Some(Completed {
            operation: request.operation,
            lanes: taking_part,
            results,
        }))
    }

    fn inactive_source(&self, lane: usize, source: usize, request: &Request) -> LaneProblem {
        let why = if request.mask >> source & 1 == 0 {
            format!("is not in the mask {:#010x}", request.mask)
        } else {
            "has returned or does not exist".to_owned()
        };
        let detail = format!(
            "{} by lane {lane} reads lane {source}, which {why}",
            request.operation.name()
        );
        LaneProblem {
            lane,
            location: request.location,
            problem: Problem::new(FaultKind::Shuffle, detail),
        }
    }
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
    fn lanes_that_wait_for_each_other_agree_on_the_mask() {
        let mut warp = Warp::new(32);
        warp.arrive(0, request(Operation::Xor, 0b11, 0, 1)).unwrap();
        let refused = warp
            .arrive(1, request(Operation::Xor, 0b111, 0, 1))
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
