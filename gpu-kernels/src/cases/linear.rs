//! The matrix-vector products: INT4 in each variant, INT8, F16.

use super::{Buffers, Case, CaseError, Device, Inputs, same_twice, within_of};
use crate::launch::DeviceSlice;
use crate::linear::{gemv_f16, gemv_int4, gemv_int8};
use crate::variant::{Choice, INT4_GEMV, Variant};

/// Single-precision sums of some thousand products, in another order than the reference's.
const SUMS: f64 = 3e-6;
/// Size of a result: weights of `Inputs` are about `1 / sqrt(K)` and activations about 1.
const TYPICAL: f64 = 1.0;

/// Rows, columns, group, with mins, with bias.
type Int4Case = (usize, usize, usize, bool, bool);

/// The last one has rows enough for the larger blocks of `multirow` on every device.
const INT4: [Int4Case; 10] = [
    (1, 576, 128, true, false),
    (7, 576, 32, true, true),
    (193, 576, 64, false, true),
    (193, 160, 32, false, false),
    (7, 160, 128, true, true),
    (1, 1120, 64, false, false),
    (193, 1120, 128, true, false),
    (3, 32, 32, false, true),
    (5, 4640, 32, true, true),
    (2, 8960, 128, false, false),
];

/// Shapes of Qwen2.5-1.5B and SmolLM2-135M.
const INT4_LARGE: [Int4Case; 5] = [
    (1536, 1536, 128, true, true),
    (8960, 1536, 128, false, false),
    (1536, 8960, 128, true, false),
    (1536, 576, 32, true, false),
    (576, 1536, 32, true, false),
];

/// Rows, columns, group.
type Int8Case = (usize, usize, usize);

const INT8: [Int8Case; 7] = [
    (1, 576, 576),
    (7, 576, 32),
    (193, 576, 128),
    (193, 160, 64),
    (7, 1120, 1120),
    (3, 32, 32),
    (5, 4640, 128),
];

const INT8_LARGE: [Int8Case; 2] = [(49_152, 576, 32), (32_003, 1536, 1536)];

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = INT4_GEMV
        .iter()
        .flat_map(|variant| INT4.map(|case| int4_case(variant, case)))
        .collect();
    for variant in INT4_GEMV {
        cases.push(int4_case(variant, (1300, 64, 32, true, true)));
    }
    for case in INT8 {
        cases.push(int8_case(case, false));
    }
    cases.push(int8_case((193, 576, 32), true));
    for (rows, cols, bias) in [
        (1, 576, false),
        (7, 160, true),
        (193, 1120, false),
        (3, 32, true),
        (5, 4640, false),
    ] {
        let bias_text = if bias { " bias" } else { "" };
        let shape = format!("N={rows} K={cols}{bias_text}");
        cases.push(Case::new("linear_gemv_f16", shape, move |device| {
            float(device, rows, cols, bias)
        }));
    }
    cases
}

pub fn large() -> Vec<Case> {
    let mut cases: Vec<Case> = INT4_GEMV
        .iter()
        .flat_map(|variant| INT4_LARGE.map(|case| int4_case(variant, case)))
        .collect();
    for case in INT8_LARGE {
        cases.push(int8_case(case, false));
    }
    cases
}

fn int4_case(variant: &Variant, case: Int4Case) -> Case {
    let (rows, cols, group, mins, bias) = case;
    let mins_text = if mins { " mins" } else { "" };
    let bias_text = if bias { " bias" } else { "" };
    let shape = format!("N={rows} K={cols} group={group}{mins_text}{bias_text}");
    let choice = Choice::Force(variant.id);
    Case::new(variant.kernel, shape, move |device| {
        int4(device, case, choice)
    })
}

fn int8_case(case: Int8Case, bias: bool) -> Case {
    let (rows, cols, group) = case;
    let bias_text = if bias { " bias" } else { "" };
    let shape = format!("N={rows} K={cols} group={group}{bias_text}");
    Case::new("linear_gemv_int8_multirow", shape, move |device| {
        int8(device, case, bias)
    })
}

fn int4(
    device: &mut dyn Device,
    (rows, cols, group, mins, bias): Int4Case,
    choice: Choice,
) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(7);
    let w = inputs.int4(rows, cols, group, mins);
    let bias = bias.then(|| inputs.floats(rows, 1.0));
    let x = inputs.floats(cols, 1.0);
    let got = same_twice(device, |device| {
        let ops = gemv_int4::Operands {
            quants: device.upload(&w.quants)?,
            scales: device.put_f16(&w.scales)?,
            mins: match &w.mins {
                Some(mins) => device.put_f16(mins)?,
                None => DeviceSlice::NONE,
            },
            bias: optional_f32(device, bias.as_deref())?,
            x: device.put_f32(&x)?,
            y: device.uninit(rows as u64 * 4)?,
        };
        let shape = gemv_int4::Shape { rows, cols, group };
        device.run(&gemv_int4::plan(&device.info(), &shape, &ops, choice)?)?;
        Ok(device.take_f32(ops.y)?)
    })?;
    let mut want = vec![0.0; rows];
    cpu_kernels::linear::int4::reference(&w, bias.as_deref(), &x, &mut want);
    within_of(&got, &want, TYPICAL, SUMS)
}

fn optional_f32(device: &mut dyn Device, values: Option<&[f32]>) -> Result<DeviceSlice, CaseError> {
    Ok(match values {
        Some(values) => device.put_f32(values)?,
        None => DeviceSlice::NONE,
    })
}

fn int8(
    device: &mut dyn Device,
    (rows, cols, group): Int8Case,
    bias: bool,
) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(8);
    let w = inputs.int8(rows, cols, group);
    let bias = bias.then(|| inputs.floats(rows, 1.0));
    let x = inputs.floats(cols, 1.0);
    let got = same_twice(device, |device| {
        let ops = gemv_int8::Operands {
            quants: device.put_i8(&w.quants)?,
            scales: device.put_f16(&w.scales)?,
            bias: optional_f32(device, bias.as_deref())?,
            x: device.put_f32(&x)?,
            y: device.uninit(rows as u64 * 4)?,
        };
        let shape = gemv_int8::Shape { rows, cols, group };
        device.run(&gemv_int8::plan(&device.info(), &shape, &ops)?)?;
        Ok(device.take_f32(ops.y)?)
    })?;
    let mut want = vec![0.0; rows];
    cpu_kernels::linear::int8::reference(&w, bias.as_deref(), &x, &mut want);
    within_of(&got, &want, TYPICAL, SUMS)
}

fn float(device: &mut dyn Device, rows: usize, cols: usize, bias: bool) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(10);
    let w = inputs.f16(rows, cols);
    let bias = bias.then(|| inputs.floats(rows, 1.0));
    let x = inputs.floats(cols, 1.0);
    let got = same_twice(device, |device| {
        let ops = gemv_f16::Operands {
            weights: device.put_f16(&w.values)?,
            bias: optional_f32(device, bias.as_deref())?,
            x: device.put_f32(&x)?,
            y: device.uninit(rows as u64 * 4)?,
        };
        let shape = gemv_f16::Shape { rows, cols };
        device.run(&gemv_f16::plan(&device.info(), &shape, &ops)?)?;
        Ok(device.take_f32(ops.y)?)
    })?;
    let mut want = vec![0.0; rows];
    cpu_kernels::linear::float16::reference(&w, bias.as_deref(), &x, &mut want);
    within_of(&got, &want, TYPICAL, SUMS)
}
