//! Rows of the kernels of float and BitNet models.

use gpu_kernels::launch::DeviceSlice;
use gpu_kernels::linear::gemv_f16;
use gpu_kernels::{embed, relu2_glu, rescale, round_int8};

use super::{Row, floats, halves, ints, planned};

/// The product of an F16 matrix, its look-up as a table, and what BitNet does between products.
pub(super) fn float_rows() -> Vec<Row> {
    vec![
        gemv_f16(1536, 1536),
        gemv_f16(8960, 1536),
        embed_f16(49_152, 576),
        relu2_glu_f32(6912),
        round_int8_f32(2560),
        rescale_f32(2560),
    ]
}

fn gemv_f16(rows: usize, cols: usize) -> Row {
    Row {
        kernel: "linear_gemv_f16",
        shape: format!("{rows} x {cols}"),
        bytes: (2 * rows * cols + 4 * (rows + cols)) as u64,
        streams: true,
        make: Box::new(move |device, memory| {
            let operands = gemv_f16::Operands {
                weights: halves(memory, rows * cols)?,
                bias: DeviceSlice::NONE,
                x: floats(memory, cols)?,
                y: memory.reserve(4 * rows as u64)?,
            };
            let shape = gemv_f16::Shape { rows, cols };
            planned(gemv_f16::plan(device, &shape, &operands))
        }),
    }
}

fn embed_f16(vocab: usize, width: usize) -> Row {
    Row {
        kernel: "embed_f16",
        shape: format!("{vocab} x {width}"),
        bytes: 6 * width as u64,
        streams: false,
        make: Box::new(move |device, memory| {
            let shape = embed::F16Shape {
                vocab,
                width,
                context: 1,
                tokens: 1,
            };
            let operands = embed::F16Operands {
                table: halves(memory, vocab * width)?,
                tokens: ints(memory, &[vocab as u32 / 2, 0])?,
                state: ints(memory, &[0])?,
                out: memory.reserve(4 * width as u64)?,
            };
            planned(embed::plan_f16(device, &shape, &operands))
        }),
    }
}

fn relu2_glu_f32(elems: usize) -> Row {
    Row {
        kernel: "relu2_glu_f32",
        shape: format!("{elems}"),
        bytes: 12 * elems as u64,
        streams: false,
        make: Box::new(move |device, memory| {
            let operands = relu2_glu::Operands {
                gate: floats(memory, elems)?,
                up: floats(memory, elems)?,
                out: memory.reserve(4 * elems as u64)?,
            };
            let shape = relu2_glu::Shape { elems };
            planned(relu2_glu::plan(device, &shape, &operands))
        }),
    }
}

fn round_int8_f32(width: usize) -> Row {
    Row {
        kernel: "round_int8_f32",
        shape: format!("{width}"),
        bytes: 8 * width as u64,
        streams: false,
        make: Box::new(move |device, memory| {
            let shape = round_int8::Shape { tokens: 1, width };
            let x = floats(memory, width)?;
            planned(round_int8::plan(device, &shape, x, DeviceSlice::NONE))
        }),
    }
}

fn rescale_f32(elems: usize) -> Row {
    Row {
        kernel: "rescale_f32",
        shape: format!("{elems}"),
        bytes: 16 * elems as u64,
        streams: false,
        make: Box::new(move |device, memory| {
            let operands = rescale::Operands {
                x: floats(memory, elems)?,
                scale: floats(memory, 1)?,
                row_scales: floats(memory, elems)?,
                y: floats(memory, elems)?,
            };
            let shape = rescale::Shape { elems, adds: true };
            planned(rescale::plan(device, &shape, &operands))
        }),
    }
}
