//! Tilings from the table of tuned launches: one for as many tokens as a run may have.

use super::super::gemv_int4_mma::Epilogue;
use super::{Shape, Tiling};
use crate::launch::DeviceInfo;
use crate::tuned::Tuned;

/// All entries, as the table names them: a tiling is a choice among them.
pub const FAMILY: &str = "linear_gemm_int4_*";

/// Numbers of tokens that the table has tilings for: each also for fewer, down to the one before it.
pub const TOKENS: [usize; 8] = [8, 16, 32, 64, 128, 256, 512, 1024];

/// A product as the table names it: `8960x1536 swiglu group 32 min, 512 tokens`.
pub fn name(shape: &Shape, mins: bool) -> String {
    let &Shape {
        rows,
        cols,
        group,
        tokens,
        ..
    } = shape;
    let then = match shape.epilogue {
        Epilogue::Store => "",
        Epilogue::Add => " add",
        Epilogue::SwiGlu => " swiglu",
    };
    let mins = if mins { " min" } else { "" };
    format!("{rows}x{cols}{then} group {group}{mins}, {tokens} tokens")
}

/// The table's tilings of a product, of [`TOKENS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tilings([Option<Tiling>; TOKENS.len()]);

impl Tilings {
    /// Those of `tuned` for the shape, whatever its tokens.
    pub fn of(tuned: &Tuned, shape: &Shape, mins: bool) -> Tilings {
        let named = |tokens| name(&Shape { tokens, ..*shape }, mins);
        Tilings(TOKENS.map(|tokens| tuned.found(FAMILY, &named(tokens))))
    }

    /// The tiling for the shape's tokens, or `None`: the rule's. A tiling of other tokens may leave more
    /// tiles to be shared than there is room for: it is passed over then.
    pub fn choose(&self, device: &DeviceInfo, shape: &Shape) -> Option<Tiling> {
        let at = TOKENS.iter().position(|most| shape.tokens <= *most)?;
        self.0[at].filter(|tiling| tiling.takes(device, shape))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::gemm_int4::{candidates, most_scratch_bytes, rule};
    use crate::tuned::{Launches, Row, Timed};

    fn row(shape: &Shape, tiling: &Tiling) -> Row {
        Row {
            gpu: "H100".into(),
            tier: 90,
            kernel: FAMILY.into(),
            shape: name(shape, false),
            revision: 0,
            launch: tiling.named(),
            timed: Timed::Launch,
            us: 1.0,
            rule_us: 1.0,
        }
    }

    #[test]
    fn a_row_serves_as_many_tokens_and_fewer() {
        let device = DeviceInfo::H100;
        let of = |tokens| Shape::plain(2048, 1536, 32, tokens);
        let tiling = Tiling {
            rows: 128,
            tokens: 64,
            parts: 3,
        };
        let tuned = Tuned::none().with(row(&of(256), &tiling));
        let tilings = Tilings::of(&tuned, &of(1), false);
        for (tokens, found) in [
            (128, None),
            (129, Some(tiling)),
            (256, Some(tiling)),
            (257, None),
            (4096, None),
        ] {
            assert_eq!(tilings.choose(&device, &of(tokens)), found, "{tokens}");
        }
        assert_eq!(Tilings::of(&tuned, &of(1), true), Tilings::default());
    }

    #[test]
    fn what_does_not_fit_is_left_to_the_rule() {
        let shape = Shape::plain(64, 256, 32, 8);
        for (rows, tokens, parts) in [(128, 8, 3), (128, 12, 1), (128, 128, 1), (128, 8, 0)] {
            let tiling = Tiling {
                rows,
                tokens,
                parts,
            };
            let tuned = Tuned::none().with(row(&shape, &tiling));
            let tilings = Tilings::of(&tuned, &shape, false);
            assert_eq!(tilings.choose(&DeviceInfo::T4, &shape), None, "{tiling:?}");
        }
    }

    #[test]
    fn candidates_begin_with_the_rule_and_fit() {
        for device in [DeviceInfo::T4, DeviceInfo::H100] {
            for tokens in TOKENS {
                let shape = Shape::plain(1536, 8960, 128, tokens);
                let found = candidates(&device, &shape);
                assert_eq!(found[0], rule(&device, &shape));
                assert!((2..=40).contains(&found.len()), "{tokens}: {found:?}");
                for tiling in &found {
                    assert!(tiling.takes(&device, &shape), "{tiling:?}");
                    let scratch = tiling.scratch_bytes(&device, &shape);
                    assert!(scratch <= most_scratch_bytes(&device), "{tiling:?}");
                    let same = found.iter().filter(|other| *other == tiling);
                    assert_eq!(same.count(), 1, "{tiling:?}");
                }
            }
        }
    }
}
