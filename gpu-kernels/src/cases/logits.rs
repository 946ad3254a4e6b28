//! Logits and the greedy choice among them.

use models::quant::Int8Matrix;

use super::sample::equal;
use super::{Buffers, Case, CaseError, Device, Inputs, same_twice, within_of};
use crate::launch::DeviceSlice;
use crate::logits::{self, Greedy, Operands, Shape};

/// x as two halves keeps 22 bits; sums inside the matrix units, which cut off rather than round.
pub const MATRIX_SUMS: f64 = 1e-5;
/// Size of a result: weights of `Inputs` are about `1 / sqrt(D)` and activations about 1.
pub const TYPICAL: f64 = 1.0;
const CONTEXT: usize = 5;
const POSITION: u32 = 2;

/// Vocabulary, width, group.
pub type Dims = (usize, usize, usize);

/// Spans of 256 columns that end early, rows that fill no warp, several rounds of a block.
const SMALL: [Dims; 14] = [
    (1, 576, 576),
    (7, 576, 32),
    (193, 576, 128),
    (193, 160, 64),
    (7, 1120, 1120),
    (3, 32, 32),
    (5, 4640, 128),
    (5, 4640, 4640),
    (193, 896, 32),
    (66, 896, 896),
    (9, 1536, 1536),
    (5300, 32, 32),
    (5200, 64, 64),
    (77, 256, 256),
];

const LARGE: [Dims; 5] = [
    (49_152, 576, 32),
    (32_003, 1536, 1536),
    (40_001, 2048, 128),
    (50_003, 896, 32),
    (50_003, 896, 896),
];

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = SMALL.map(product).into();
    // Equal rows tie: the lowest of them wins, across lanes, warps and blocks.
    cases.push(choice("ties", (1001, 96, 32), |w| {
        for row in [903, 411, 67, 70] {
            copy_row(w, 1000, row);
        }
    }));
    cases.push(choice("ties", (700, 64, 64), |w| {
        for row in [690, 11, 12, 13] {
            copy_row(w, 699, row);
        }
    }));
    for group in [32, 64] {
        cases.push(choice("NaN beside the best", (300, 64, group), |w| {
            for row in [0, 298] {
                set_scales(w, row, half::f16::NAN);
            }
        }));
        cases.push(choice("all NaN", (100, 64, group), |w| {
            for row in 0..w.rows {
                set_scales(w, row, half::f16::NAN);
            }
        }));
    }
    cases
}

pub fn large() -> Vec<Case> {
    LARGE.map(product).into()
}

fn name(dims: Dims) -> (&'static str, String) {
    let (vocab, width, group) = dims;
    (
        logits::kernel(&shape(dims)),
        format!("V={vocab} D={width} group={group}"),
    )
}

pub fn shape((vocab, width, group): Dims) -> Shape {
    Shape {
        vocab,
        width,
        group,
    }
}

/// Logits against the reference, and the choice against that from the same logits.
fn product(dims: Dims) -> Case {
    let (kernel, shape) = name(dims);
    Case::new(kernel, shape, move |device| {
        let mut inputs = Inputs::new(9);
        let (vocab, width, group) = dims;
        let w = inputs.int8(vocab, width, group);
        let x = inputs.floats(width, 1.0);
        let got = same_twice(device, |device| run(device, &w, &x))?;
        let mut want = vec![0.0; vocab];
        cpu_kernels::logits::reference(&w, None, &x, &mut want);
        within_of(&got, &want, TYPICAL, MATRIX_SUMS)
    })
}

/// The choice among logits of which `change` has made some equal or NaN.
fn choice(what: &str, dims: Dims, change: fn(&mut Int8Matrix)) -> Case {
    let (kernel, shape) = name(dims);
    Case::new(kernel, format!("{shape} {what}"), move |device| {
        let mut inputs = Inputs::new(13);
        let (vocab, width, group) = dims;
        let mut w = inputs.int8(vocab, width, group);
        // The last row is the best before the change, as x is a multiple of it.
        let last = &w.quants[(vocab - 1) * width..];
        let x: Vec<f32> = last.iter().map(|&q| f32::from(q) / 64.0).collect();
        change(&mut w);
        run(device, &w, &x)?;
        Ok(0.0)
    })
}

pub fn copy_row(w: &mut Int8Matrix, from: usize, to: usize) {
    let (cols, groups) = (w.cols, w.cols.div_ceil(w.group));
    w.quants
        .copy_within(from * cols..(from + 1) * cols, to * cols);
    w.scales
        .copy_within(from * groups..(from + 1) * groups, to * groups);
}

pub fn set_scales(w: &mut Int8Matrix, row: usize, scale: half::f16) {
    let groups = w.cols.div_ceil(w.group);
    w.scales[row * groups..(row + 1) * groups].fill(scale);
}

/// Runs all forms of the kernel; returns the logits. The choice has to be that of the reference
/// from these logits, and the same where they are not written.
fn run(device: &mut dyn Device, w: &Int8Matrix, x: &[f32]) -> Result<Vec<f32>, CaseError> {
    let info = device.info();
    let shape = shape((w.rows, w.cols, w.group));
    let ops = Operands {
        quants: device.put_i8(&w.quants)?,
        scales: device.put_f16(&w.scales)?,
        x: device.put_f32(x)?,
        logits: device.uninit(w.rows as u64 * 4)?,
        scratch: device.upload(&vec![0; logits::scratch_bytes(&info) as usize])?,
    };
    device.run(&logits::plan(&info, &shape, &ops, None)?)?;
    let got = device.take_f32(ops.logits)?;
    let token = cpu_kernels::sample::reference(&got);
    for (logits, advance) in [(ops.logits, false), (DeviceSlice::NONE, true)] {
        let mut want = [900, 901, 902, 903, 904, 905u32];
        let greedy = Greedy {
            context: CONTEXT,
            tokens: device.put_u32(&want)?,
            state: device.put_u32(&[POSITION])?,
            advance,
        };
        let ops = Operands { logits, ..ops };
        device.run(&logits::plan(&info, &shape, &ops, Some(&greedy))?)?;
        want[POSITION as usize + 1] = token;
        for (got, want) in device.take_u32(greedy.tokens)?.into_iter().zip(want) {
            equal("token", got, want)?;
        }
        let position = POSITION + u32::from(advance);
        equal("position", device.take_u32(greedy.state)?[0], position)?;
    }
    Ok(got)
}
