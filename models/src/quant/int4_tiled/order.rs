//! Which row of which matrix lies where in tiles that several matrices share.

use serde::{Deserialize, Serialize};

use super::{FORMAT, HALF, TILE_ROWS};
use crate::Error;

/// The order of the rows of several matrices that read the same input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    /// One matrix after the other, row by row.
    Rows,
    /// Two matrices by eights: eight rows of the gate, the same eight of the up projection, and so on, so
    /// that both halves of a pair meet in one tile. Row `r` of tile `t` is gate row `8t + r` for `r < 8`
    /// and up row `8t + r - 8` from there on. Both are filled up to a multiple of eight rows.
    GateUp,
    /// One matrix after the other, head by head: eight rows of the head's first half, the same eight of its
    /// second, and so on, so that rows that are turned together meet in one tile. Row `r` of tile `t` of a
    /// head is row `8t + r` of the head for `r < 8` and row `head_dim / 2 + 8t + r - 8` from there on.
    Heads {
        /// Rows of a head, a multiple of 16.
        head_dim: usize,
    },
}

impl Order {
    /// Rows in tiles of matrices that have `members` rows.
    ///
    /// # Errors
    /// No matrix or one without rows; not two of the same rows where gate and up are meant; heads that do
    /// not fill tiles or that rows are not whole multiples of; counts that overflow.
    pub fn packed_rows(self, members: &[usize]) -> Result<usize, Error> {
        let fail = |reason: String| Error::Matrix {
            format: FORMAT,
            reason,
        };
        if members.is_empty() || members.contains(&0) {
            return Err(fail("no matrix, or one without rows".to_owned()));
        }
        let rows = match (self, members) {
            (Order::GateUp, &[gate, up]) if gate == up => {
                gate.div_ceil(HALF).checked_mul(TILE_ROWS)
            }
            (Order::GateUp, _) => {
                return Err(fail(format!("{members:?} rows are no gate and up")));
            }
            (Order::Rows | Order::Heads { .. }, _) => members
                .iter()
                .try_fold(0usize, |sum, n| sum.checked_add(*n)),
        };
        if let Order::Heads { head_dim } = self {
            let whole = |rows: &usize| head_dim > 0 && rows.is_multiple_of(head_dim);
            if !head_dim.is_multiple_of(TILE_ROWS) || !members.iter().all(whole) {
                return Err(fail(format!(
                    "heads of {head_dim} rows do not fill tiles of {TILE_ROWS}"
                )));
            }
        }
        rows.ok_or_else(|| fail(format!("{members:?} rows overflow")))
    }

    /// The row in tiles of row `row` of matrix `member`. Lengths are those that [`Order::packed_rows`] took.
    pub(super) fn place(self, members: &[usize], member: usize, row: usize) -> usize {
        let before = || members[..member].iter().sum::<usize>();
        match self {
            Order::Rows => before() + row,
            Order::GateUp => row / HALF * TILE_ROWS + member * HALF + row % HALF,
            Order::Heads { head_dim } => {
                let (head, of_head) = (row / head_dim, row % head_dim);
                let (second, pair) = (of_head / (head_dim / 2), of_head % (head_dim / 2));
                let of_tiles = pair / HALF * TILE_ROWS + second * HALF + pair % HALF;
                before() + head * head_dim + of_tiles
            }
        }
    }
}
