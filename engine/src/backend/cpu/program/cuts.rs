//! Which elements a share of an operation touches.

use models::recipe::{Buffer, Step};

use super::Op;

/// How a step's work is cut into shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Cut {
    Tokens,
    Columns,
    Heads,
    /// Every share reads all of it.
    Whole,
}

/// What a step touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Buffer(Buffer),
    Levels(usize),
    Cache { layer: usize },
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Access {
    pub place: Place,
    pub cut: Cut,
    pub write: bool,
}

/// What an operation touches.
pub(super) fn accesses_of(op: &Op) -> Vec<Access> {
    let access = |place, cut, write| Access { place, cut, write };
    match op {
        Op::Round { src, levels, cut } => vec![
            access(Place::Buffer(*src), *cut, false),
            access(Place::Levels(*levels), *cut, true),
        ],
        Op::Step(step, None) => accesses(step),
        Op::Step(step, Some(levels)) => {
            let mut all = accesses(step);
            all.retain(|access| access.write);
            all.push(access(Place::Levels(*levels), Cut::Whole, false));
            all
        }
    }
}

pub(super) fn accesses(step: &Step) -> Vec<Access> {
    let read = |buffer: &Buffer, cut| Access {
        place: Place::Buffer(*buffer),
        cut,
        write: false,
    };
    let write = |buffer: &Buffer, cut| Access {
        place: Place::Buffer(*buffer),
        cut,
        write: true,
    };
    let cache = |layer: &usize, cut, write| Access {
        place: Place::Cache { layer: *layer },
        cut,
        write,
    };
    match step {
        Step::Embed { dst, .. } => vec![write(dst, Cut::Tokens)],
        Step::RmsNorm { src, dst, .. } => vec![read(src, Cut::Tokens), write(dst, Cut::Tokens)],
        Step::Linear { src, dst, .. } | Step::Logits { src, dst, .. } => {
            vec![read(src, Cut::Whole), write(dst, Cut::Columns)]
        }
        Step::Rope { buffer, .. } | Step::HeadNorm { buffer, .. } => {
            vec![write(buffer, Cut::Heads)]
        }
        Step::RoundToInt8 { buffer } => vec![write(buffer, Cut::Tokens)],
        Step::KvAppend { layer, key, value } => vec![
            read(key, Cut::Heads),
            read(value, Cut::Heads),
            cache(layer, Cut::Heads, true),
        ],
        Step::Attention {
            layer, query, dst, ..
        } => vec![
            read(query, Cut::Heads),
            cache(layer, Cut::Whole, false),
            write(dst, Cut::Heads),
        ],
        Step::SwiGlu { gate, up, dst } | Step::ReluSquaredGlu { gate, up, dst } => vec![
            read(gate, Cut::Columns),
            read(up, Cut::Columns),
            write(dst, Cut::Columns),
        ],
        Step::Add { src, dst } => vec![read(src, Cut::Columns), write(dst, Cut::Columns)],
    }
}
