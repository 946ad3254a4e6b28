//! Rows of what a prompt runs: products of many tokens, attention, rope, norm.

use engine::Error;
use gpu_kernels::launch::{Call, DeviceInfo, DeviceSlice};
use gpu_kernels::linear::gemm_int4;
use gpu_kernels::rope_kv_append::tokens::Strided;
use gpu_kernels::{attention, kv_values, rmsnorm, rope_kv_append};

use super::{Operands, Row, floats, halves, ints, noise, planned, value_bytes, value_cache};

/// Tokens of a product.
const TOKENS: [usize; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048];

pub(super) fn prompt_rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for (n, k) in [(4096, 4096), (14_336, 4096), (8960, 1536), (1536, 8960)] {
        for tokens in TOKENS {
            let shape = gemm_int4::Shape::plain(n, k, 128, tokens);
            rows.extend(products(&shape, false));
        }
    }
    for (tokens, mins) in [(8, false), (128, true), (512, false), (512, true)] {
        rows.extend(products(
            &gemm_int4::Shape::plain(8960, 1536, 32, tokens),
            mins,
        ));
    }
    for (dims, tokens, position) in [
        ([12, 2, 128], 512, 0),
        ([12, 2, 128], 4096, 0),
        ([12, 2, 128], 1024, 3072),
        ([14, 2, 64], 512, 0),
        ([14, 2, 64], 4096, 0),
        ([32, 8, 96], 512, 0),
    ] {
        rows.push(attention_prompt(dims, tokens, position));
    }
    rows.push(rope_tokens([12, 2, 128], 512, false));
    rows.push(rope_tokens([12, 2, 128], 512, true));
    rows.push(values_f16(2, 128, 4096));
    rows.push(norm_f16(512, 1536));
    rows
}

/// A product by warps, and one by warpgroups where that is the rule.
fn products(shape: &gemm_int4::Shape, mins: bool) -> Vec<Row> {
    let rule = |warpgroup_products| {
        let device = DeviceInfo {
            warpgroup_products,
            ..DeviceInfo::H100
        };
        gemm_int4::rule(&device, shape)
    };
    let mut rows = vec![product(shape, mins, rule(false), false)];
    if rule(true) != rule(false) {
        rows.push(product(shape, mins, rule(true), true));
    }
    rows
}

/// A product in a tiling for an H100, or, by warps, in that of the device.
fn product(
    shape: &gemm_int4::Shape,
    mins: bool,
    tiling: gemm_int4::Tiling,
    by_warpgroups: bool,
) -> Row {
    let gemm_int4::Shape {
        rows,
        cols,
        group,
        tokens,
        ..
    } = *shape;
    let shape = *shape;
    Row {
        kernel: gemm_int4::entry(&tiling, mins),
        shape: format!(
            "{rows} x {cols} group {group}{}, {tokens} tokens",
            if mins { " min" } else { "" }
        ),
        bytes: product_bytes(&shape, mins),
        streams: true,
        make: Box::new(move |device, memory| {
            let by_warps = DeviceInfo {
                warpgroup_products: false,
                ..*device
            };
            let tiling = if by_warpgroups {
                tiling
            } else {
                gemm_int4::rule(&by_warps, &shape)
            };
            let operands = operands(&shape, mins, device, memory)?;
            planned(gemm_int4::plan(device, &shape, &operands, Some(tiling)))
        }),
    }
}

/// The product in each of the tilings, over the same operands.
///
/// # Errors
/// As [`super::Make`].
pub fn products_in(
    shape: &gemm_int4::Shape,
    mins: bool,
    tilings: &[gemm_int4::Tiling],
    device: &DeviceInfo,
    memory: &mut dyn Operands,
) -> Result<Vec<Call>, Error> {
    let operands = operands(shape, mins, device, memory)?;
    let plan = |tiling| planned(gemm_int4::plan(device, shape, &operands, Some(tiling)));
    tilings.iter().copied().map(plan).collect()
}

fn operands(
    shape: &gemm_int4::Shape,
    mins: bool,
    device: &DeviceInfo,
    memory: &mut dyn Operands,
) -> Result<gemm_int4::Operands, Error> {
    let &gemm_int4::Shape {
        rows, cols, tokens, ..
    } = shape;
    let groups = shape.tiles() * 16 * 128 / shape.group;
    let scratch = gemm_int4::most_scratch_bytes(device);
    Ok(gemm_int4::Operands {
        quants: noise(memory, shape.tiles() * 1024)?,
        scales: halves(memory, groups)?,
        mins: if mins {
            halves(memory, groups)?
        } else {
            DeviceSlice::NONE
        },
        zeros: false,
        bias: DeviceSlice::NONE,
        x: halves(memory, tokens * cols)?,
        y: floats(memory, tokens * rows)?,
        scratch: memory.activations(&vec![0; scratch as usize])?,
    })
}

/// Bytes that the product moves.
pub fn product_bytes(shape: &gemm_int4::Shape, mins: bool) -> u64 {
    let &gemm_int4::Shape {
        rows, cols, tokens, ..
    } = shape;
    let values = shape.tiles() * 16 * 128 / shape.group * if mins { 2 } else { 1 };
    (shape.tiles() * 1024 + 2 * values + tokens * (2 * cols + 4 * rows)) as u64
}

fn attention_prompt(
    [heads, kv_heads, head_dim]: [usize; 3],
    tokens: usize,
    position: usize,
) -> Row {
    let context = position + tokens;
    let elems = 2 * kv_heads * context * head_dim + 2 * tokens * heads * head_dim;
    Row {
        kernel: attention::prompt::entry(head_dim),
        shape: format!("heads {heads}/{kv_heads} x {head_dim}, {tokens} tokens after {position}"),
        bytes: 2 * elems as u64,
        streams: false,
        make: Box::new(move |device, memory| {
            let shape = attention::Shape {
                heads,
                kv_heads,
                head_dim,
                context,
                scale: 1.0 / (head_dim as f32).sqrt(),
                window: None,
            };
            let operands = attention::prompt::Operands {
                q: halves(memory, tokens * heads * head_dim)?,
                k_cache: halves(memory, kv_heads * context * head_dim)?,
                v_cache: halves(memory, kv_heads * context * head_dim)?,
                state: ints(memory, &[position as u32])?,
                out: memory.reserve((2 * tokens * heads * head_dim) as u64)?,
            };
            planned(attention::prompt::plan(device, &shape, tokens, &operands))
        }),
    }
}

fn rope_tokens([heads, kv_heads, head_dim]: [usize; 3], tokens: usize, of_8_bits: bool) -> Row {
    let stride = (heads + 2 * kv_heads) * head_dim;
    let halves = 2 * (heads + kv_heads) * head_dim;
    let a_token = 4 * stride + halves + kv_heads * value_bytes(head_dim, of_8_bits) + 4 * head_dim;
    Row {
        kernel: match of_8_bits {
            true => "rope_kv_append_tokens_v8",
            false => "rope_kv_append_tokens_f16",
        },
        shape: format!("heads {heads}/{kv_heads} x {head_dim}, {tokens} tokens"),
        bytes: (tokens * a_token) as u64,
        streams: false,
        make: Box::new(move |device, memory| {
            let all = floats(memory, tokens * stride)?;
            let part = |first: usize| Strided {
                slice: DeviceSlice {
                    address: all.address + 4 * first as u64,
                    bytes: all.bytes - 4 * first as u64,
                },
                stride,
            };
            let shape = rope_kv_append::Shape {
                heads,
                kv_heads,
                head_dim,
                context: tokens,
            };
            let (elems, heads_kept) = (tokens * kv_heads * head_dim, tokens * kv_heads);
            let [v_cache, v_scales] = value_cache(memory, elems, heads_kept, of_8_bits)?;
            let operands = rope_kv_append::tokens::Operands {
                q: part(0),
                k: part(heads * head_dim),
                v: part((heads + kv_heads) * head_dim),
                in_tiles: true,
                bias: floats(memory, stride)?,
                q_gain: DeviceSlice::NONE,
                k_gain: DeviceSlice::NONE,
                eps: 0.0,
                cos: floats(memory, tokens * head_dim / 2)?,
                sin: floats(memory, tokens * head_dim / 2)?,
                turned: memory.reserve((2 * tokens * heads * head_dim) as u64)?,
                k_cache: memory.reserve(2 * elems as u64)?,
                v_cache,
                v_scales,
                state: ints(memory, &[0])?,
            };
            planned(rope_kv_append::tokens::plan(
                device, &shape, tokens, &operands,
            ))
        }),
    }
}

fn values_f16(kv_heads: usize, head_dim: usize, tokens: usize) -> Row {
    let elems = kv_heads * tokens * head_dim;
    Row {
        kernel: "kv_values_f16",
        shape: format!("{kv_heads} x {head_dim}, {tokens} tokens"),
        bytes: (3 * elems + 2 * kv_heads * tokens) as u64,
        streams: false,
        make: Box::new(move |device, memory| {
            let shape = kv_values::Shape {
                kv_heads,
                head_dim,
                context: tokens,
            };
            let operands = kv_values::Operands {
                levels: noise(memory, elems)?,
                scales: halves(memory, kv_heads * tokens)?,
                state: ints(memory, &[0])?,
                values: memory.reserve(2 * elems as u64)?,
            };
            planned(kv_values::plan(device, &shape, tokens, &operands))
        }),
    }
}

fn norm_f16(tokens: usize, width: usize) -> Row {
    Row {
        kernel: "rmsnorm_f16",
        shape: format!("{tokens} x {width}"),
        bytes: (width * (6 * tokens + 4)) as u64,
        streams: false,
        make: Box::new(move |device, memory| {
            let shape = rmsnorm::Shape {
                tokens,
                width,
                eps: 1e-6,
            };
            let operands = rmsnorm::Operands {
                x: floats(memory, tokens * width)?,
                weight: floats(memory, width)?,
                out: memory.reserve((2 * tokens * width) as u64)?,
            };
            planned(rmsnorm::plan_f16(device, &shape, &operands))
        }),
    }
}
