//! Rows of the INT4 product of q, k and v that turns and appends them.

use gpu_kernels::launch::DeviceSlice;
use gpu_kernels::linear::gemv_int4_mma::{Heads, HeadsOperands, Operands, Shape, plan_heads};

use super::{Row, floats, halves, ints, noise, planned};

/// Qwen2.5-1.5B in every format, and 3B.
pub(super) fn heads_rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for group in [32, 64, 128] {
        for mins in [false, true] {
            rows.push(heads_int4([12, 2, 128], 1536, group, mins));
        }
    }
    rows.push(heads_int4([16, 2, 128], 2048, 128, false));
    rows
}

fn heads_int4(
    [heads, kv_heads, head_dim]: [usize; 3],
    cols: usize,
    group: usize,
    mins: bool,
) -> Row {
    let of = Heads {
        heads,
        kv_heads,
        head_dim,
        context: 1,
    };
    let rows = (heads + 2 * kv_heads) * head_dim;
    let tiles = rows / 16 * cols.div_ceil(128);
    let scales = tiles * 16 * 128 / group;
    let minima = if mins { 2 * scales } else { 0 };
    let vectors = 4 * (2 * cols + rows + heads * head_dim + head_dim) + 4 * kv_heads * head_dim;
    Row {
        kernel: gpu_kernels::linear::gemv_int4_mma::entry_heads(group, mins),
        shape: format!(
            "{heads}/{kv_heads} x {head_dim}, {cols} group {group}{}",
            if mins { " minima" } else { "" }
        ),
        bytes: (tiles * 1024 + 2 * scales + minima + vectors) as u64,
        streams: true,
        make: Box::new(move |device, memory| {
            let operands = Operands {
                quants: noise(memory, tiles * 1024)?,
                scales: halves(memory, scales)?,
                mins: match mins {
                    true => halves(memory, scales)?,
                    false => DeviceSlice::NONE,
                },
                zeros: false,
                bias: floats(memory, rows)?,
                x: floats(memory, cols)?,
                gain: floats(memory, cols)?,
                y: floats(memory, heads * head_dim)?,
            };
            let of_heads = HeadsOperands {
                cos: floats(memory, head_dim / 2)?,
                sin: floats(memory, head_dim / 2)?,
                k_cache: halves(memory, kv_heads * head_dim)?,
                v_cache: halves(memory, kv_heads * head_dim)?,
                state: ints(memory, &[0])?,
            };
            let shape = Shape::plain(rows, cols, group);
            planned(plan_heads(device, &shape, &of, &operands, &of_heads, None))
        }),
    }
}
