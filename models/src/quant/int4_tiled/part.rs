//! One matrix among those that share tiles.

use std::sync::Arc;

use super::Int4Tiled;
use crate::quant::Int4Matrix;

/// A matrix in tiles that it may share with others.
#[derive(Debug, Clone, PartialEq)]
pub struct Int4Part {
    tiles: Arc<Int4Tiled>,
    member: usize,
}

impl Int4Part {
    /// Matrix `member` of `tiles`; `None` if there are fewer.
    pub fn new(tiles: Arc<Int4Tiled>, member: usize) -> Option<Int4Part> {
        (member < tiles.members.len()).then_some(Int4Part { tiles, member })
    }

    /// The tiles.
    pub fn tiles(&self) -> &Arc<Int4Tiled> {
        &self.tiles
    }

    /// The matrix's place among those of the tiles.
    pub fn member(&self) -> usize {
        self.member
    }

    /// N.
    pub fn rows(&self) -> usize {
        self.tiles.members[self.member]
    }

    /// The matrix by itself, as it was before it was packed.
    pub fn in_rows(&self) -> Int4Matrix {
        self.tiles.member(self.member)
    }

    /// Writes row `i` as floats to `out`, which holds as many as a row has.
    pub fn dequantize_row(&self, i: usize, out: &mut [f32]) {
        let row = self.tiles.place(self.member, i);
        self.tiles
            .copy_rows(std::iter::once(row))
            .dequantize_row(0, out);
    }

    /// The matrix's part of the bytes of its tiles, by its rows; the parts of all members add up to `bytes`.
    pub fn share(&self, bytes: u64) -> u64 {
        let members = &self.tiles.members;
        let upto = |member: usize| members[..member].iter().map(|n| *n as u128).sum::<u128>();
        let all = upto(members.len()).max(1);
        let of = |member| (u128::from(bytes) * upto(member) / all) as u64;
        of(self.member + 1) - of(self.member)
    }

    /// Bytes that reading the matrix moves: its share of the tiles, padding included.
    pub fn bytes(&self) -> u64 {
        self.share(self.tiles.bytes())
    }
}
