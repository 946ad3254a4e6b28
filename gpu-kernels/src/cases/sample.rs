//! Greedy choice, with ties, NaN and infinities, and the step to the next position.

use super::{Buffers, Case, CaseError, Device, Inputs};
use crate::sample::{self, ArgmaxOperands, ArgmaxShape};

/// A value put at an index of otherwise random logits.
type Plant = (usize, f32);

const ARGMAX: [(&str, usize, &[Plant]); 11] = [
    ("V=1", 1, &[]),
    ("V=7", 7, &[]),
    ("V=193", 193, &[]),
    ("V=4099", 4099, &[]),
    ("V=49155 last", 49_155, &[(49_154, 99.0)]),
    ("V=200003 first", 200_003, &[(0, 99.0)]),
    (
        "V=49155 tie across threads",
        49_155,
        &[(40_001, 99.0), (8001, 99.0), (8190, 99.0)],
    ),
    ("V=193 tie in a load", 193, &[(6, 99.0), (5, 99.0)]),
    (
        "V=1000 NaN beside the best",
        1000,
        &[(3, f32::NAN), (900, 99.0), (999, f32::NAN)],
    ),
    (
        "V=3 zeros of both signs",
        3,
        &[(0, -0.0), (1, 0.0), (2, 0.0)],
    ),
    (
        "V=5 one finite",
        5,
        &[
            (0, f32::NAN),
            (1, f32::NEG_INFINITY),
            (2, f32::NEG_INFINITY),
            (3, -1e38),
            (4, f32::NAN),
        ],
    ),
];

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = ARGMAX
        .iter()
        .map(|&(shape, vocab, plants)| {
            Case::new("argmax_f32", shape.into(), move |device| {
                let mut logits = Inputs::new(11).floats(vocab, 3.0);
                for &(index, value) in plants {
                    logits[index] = value;
                }
                argmax(device, &logits)
            })
        })
        .collect();
    for (name, value) in [("NaN", f32::NAN), ("-inf", f32::NEG_INFINITY)] {
        let shape = format!("V=1234 all {name}");
        cases.push(Case::new("argmax_f32", shape, move |device| {
            argmax(device, &[value; 1234])
        }));
    }
    for position in [0, 7, 192] {
        let shape = format!("position={position}");
        cases.push(Case::new("advance_position", shape, move |device| {
            advance(device, position)
        }));
    }
    cases
}

pub fn equal(what: &'static str, got: u32, want: u32) -> Result<(), CaseError> {
    if got == want {
        return Ok(());
    }
    Err(CaseError::Unequal {
        what,
        got: got.into(),
        want: want.into(),
    })
}

/// All other tokens have to stay as they were.
fn argmax(device: &mut dyn Device, logits: &[f32]) -> Result<f64, CaseError> {
    let (position, context) = (2u32, 5);
    let mut want = [900, 901, 902, 903, 904, 905u32];
    let ops = ArgmaxOperands {
        logits: device.put_f32(logits)?,
        tokens: device.put_u32(&want)?,
        state: device.put_u32(&[position])?,
    };
    let shape = ArgmaxShape {
        vocab: logits.len(),
        context,
    };
    device.run(&sample::plan_argmax(&device.info(), &shape, &ops)?)?;
    want[position as usize + 1] = cpu_kernels::sample::reference(logits);
    for (got, want) in device.take_u32(ops.tokens)?.into_iter().zip(want) {
        equal("token", got, want)?;
    }
    Ok(0.0)
}

fn advance(device: &mut dyn Device, position: u32) -> Result<f64, CaseError> {
    let state = device.put_u32(&[position])?;
    let call = sample::plan_advance(&device.info(), state)?;
    device.run(&call)?;
    device.run(&call)?;
    equal("position", device.take_u32(state)?[0], position + 2)?;
    Ok(0.0)
}
