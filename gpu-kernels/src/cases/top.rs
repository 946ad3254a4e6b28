//! The 64 greatest logits, with and without a penalty for tokens that were seen.

use models::quant::Int8Matrix;

use super::logits::{Dims, MATRIX_SUMS, TYPICAL, copy_row, set_scales, shape};
use super::sample::equal;
use super::{Buffers, Case, CaseError, Device, Inputs, same_twice, within_of};
use crate::launch::DeviceSlice;
use crate::logits::{self, Operands, Top};
use crate::sample::{CANDIDATES_BYTES, MAX_CANDIDATES, Settings};

const PENALTY: f32 = 1.3;

/// Fewer rows than candidates, than blocks, and several rounds of a block.
const SMALL: [Dims; 8] = [
    (1, 576, 576),
    (7, 576, 32),
    (63, 64, 32),
    (193, 160, 64),
    (1001, 96, 96),
    (5300, 32, 32),
    (5300, 64, 64),
    (11_003, 32, 32),
];

const LARGE: [Dims; 3] = [(49_152, 576, 32), (151_936, 896, 896), (151_936, 1536, 32)];

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = SMALL.map(|dims| case("", dims, |_| ())).into();
    // More equal ones than there is room for: they are taken one by one.
    cases.push(case(" all equal", (5400, 32, 32), |w| {
        for row in 1..w.rows {
            copy_row(w, 0, row);
        }
    }));
    cases.push(case(" ties", (700, 64, 64), |w| {
        for row in 0..200 {
            copy_row(w, 699, 3 * row);
        }
    }));
    cases.push(case(" NaN", (300, 64, 32), |w| {
        for row in (0..300).filter(|row| row % 5 != 0) {
            set_scales(w, row, half::f16::NAN);
        }
    }));
    cases.push(case(" all NaN", (100, 64, 64), |w| {
        for row in 0..100 {
            set_scales(w, row, half::f16::NAN);
        }
    }));
    cases
}

pub fn large() -> Vec<Case> {
    LARGE.map(|dims| case("", dims, |_| ())).into()
}

fn case(what: &str, dims: Dims, change: fn(&mut Int8Matrix)) -> Case {
    let (vocab, width, group) = dims;
    let name = format!("V={vocab} D={width} group={group}{what}");
    Case::new(logits::top_kernel(&shape(dims)), name, move |device| {
        let mut inputs = Inputs::new(9);
        let mut w = inputs.int8(vocab, width, group);
        change(&mut w);
        let x = inputs.floats(width, 1.0);
        // A third of the tokens; without them nothing is penalised.
        let seen: Vec<u32> = (0..vocab.div_ceil(32))
            .map(|_| (inputs.u64() & inputs.u64()) as u32 | 1)
            .collect();
        run(device, &w, &x, None)?;
        run(device, &w, &x, Some(&seen))
    })
}

fn run(
    device: &mut dyn Device,
    w: &Int8Matrix,
    x: &[f32],
    seen: Option<&[u32]>,
) -> Result<f64, CaseError> {
    let info = device.info();
    let settings = Settings {
        temperature: 0.8,
        top_k: 40,
        top_p: 0.9,
        min_p: 0.0,
        repetition_penalty: PENALTY,
        seed: 5,
    };
    let got = same_twice(device, |device| {
        let ops = Operands {
            quants: device.put_i8(&w.quants)?,
            scales: device.put_f16(&w.scales)?,
            x: device.put_f32(x)?,
            logits: device.uninit(w.rows as u64 * 4)?,
            scratch: device.upload(&vec![0; logits::scratch_bytes(&info) as usize])?,
        };
        let mut top = Top {
            candidates: device.uninit(CANDIDATES_BYTES)?,
            seen: DeviceSlice::NONE,
            settings: DeviceSlice::NONE,
        };
        if let Some(seen) = seen {
            top.seen = device.put_u32(seen)?;
            top.settings = device.put_u32(&settings.words())?;
        }
        let call = logits::plan_top(&info, &shape((w.rows, w.cols, w.group)), &ops, &top)?;
        device.run(&call)?;
        // As a graph runs it again: the counter has to be back at zero.
        device.run(&call)?;
        let got = device.take_f32(ops.logits)?;
        let mut want = cpu_kernels::sample::top_k(&got, MAX_CANDIDATES);
        want.resize(MAX_CANDIDATES, (f32::NEG_INFINITY, u32::MAX));
        let words = device.take_u32(top.candidates)?;
        for (pair, (value, id)) in words.chunks_exact(2).zip(want) {
            equal("candidate", pair[1], id)?;
            equal("bits of a candidate", pair[0], value.to_bits())?;
        }
        Ok(got)
    })?;
    let mut want = vec![0.0; w.rows];
    cpu_kernels::logits::reference(w, None, x, &mut want);
    if let Some(seen) = seen {
        cpu_kernels::sample::penalise(&mut want, seen, PENALTY);
    }
    // Where the reference has NaN the result has to have it too.
    let numbers: Vec<(f32, f32)> = got
        .iter()
        .zip(&want)
        .filter(|(got, want)| !(got.is_nan() && want.is_nan()))
        .map(|(got, want)| (*got, *want))
        .collect();
    let (got, want): (Vec<f32>, Vec<f32>) = numbers.into_iter().unzip();
    within_of(&got, &want, TYPICAL, MATRIX_SUMS)
}
