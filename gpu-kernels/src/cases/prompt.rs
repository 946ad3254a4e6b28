//! What a prompt runs besides its products: many tokens at once. Rows of a cache past the last token
//! are NaN: a kernel that lets them in, even with weight 0, fails.

use cpu_kernels::attention::AttentionShape;
use half::f16;

use super::{
    Buffers, Case, CaseError, Device, DeviceError, Inputs, compared, rows_of, same_twice,
    to_floats, within,
};
use crate::launch::DeviceSlice;
use crate::rope_kv_append::tokens::Strided;
use crate::{attention, rmsnorm, rope_kv_append};

/// A result becomes halves.
const ROUNDED_TO_HALF: f64 = 4e-4;
/// So do the weights of the values before.
const ROUNDED_WEIGHTS: f64 = 6e-4;
const EPS: f32 = 1e-5;

/// Query heads, kv heads, head width, capacity, position, tokens.
type Geometry = (usize, usize, usize, usize, usize, usize);

const ATTENTION: [Geometry; 14] = [
    (1, 1, 64, 1, 0, 1),
    (3, 1, 64, 70, 0, 65),
    (2, 2, 32, 200, 130, 17),
    (6, 2, 64, 150, 80, 70),
    (1, 1, 8, 64, 63, 1),
    (2, 1, 80, 90, 20, 68),
    (1, 1, 96, 129, 64, 65),
    (4, 2, 72, 12, 2, 9),
    (2, 2, 96, 64, 0, 64),
    (2, 1, 128, 66, 0, 66),
    (3, 3, 112, 200, 190, 3),
    (7, 1, 128, 140, 60, 15),
    (1, 1, 128, 130, 1, 128),
    (2, 1, 104, 20, 0, 19),
];

const WINDOWS: [(Geometry, usize); 5] = [
    ((2, 1, 64, 300, 0, 290), 100),
    ((3, 1, 64, 300, 150, 140), 16),
    ((2, 2, 96, 200, 100, 90), 1),
    ((2, 1, 128, 200, 0, 150), 64),
    ((1, 1, 80, 260, 190, 65), 129),
];

const LARGE: [Geometry; 5] = [
    (12, 2, 128, 2100, 0, 2000),
    (14, 2, 64, 700, 0, 513),
    (9, 3, 64, 1024, 500, 512),
    (4, 1, 80, 1000, 99, 301),
    (16, 2, 128, 9000, 8000, 900),
];

/// With norms of heads, with heads packed in tiles and biases.
const ROPE: [(Geometry, bool, bool); 6] = [
    ((9, 3, 64, 40, 7, 5), false, false),
    ((3, 1, 80, 9, 0, 9), true, true),
    ((2, 2, 34, 6, 5, 1), false, false),
    ((4, 2, 128, 30, 3, 2), true, false),
    ((5, 1, 64, 8, 3, 2), false, true),
    ((1, 1, 256, 8, 1, 3), true, true),
];

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = ATTENTION
        .map(|geometry| attention_case(geometry, None))
        .into();
    cases.extend(WINDOWS.map(|(geometry, window)| attention_case(geometry, Some(window))));
    for (geometry, norms, in_tiles) in ROPE {
        let mut shape = name(geometry);
        shape.push_str(if norms { " norms" } else { "" });
        shape.push_str(if in_tiles { " tiles, bias" } else { "" });
        cases.push(Case::new(
            "rope_kv_append_tokens_f16",
            shape.clone(),
            move |device| rope(device, geometry, norms, in_tiles, false),
        ));
        if geometry.2 % 4 == 0 && geometry.2 <= 128 {
            cases.push(Case::new(
                "rope_kv_append_tokens_v8",
                shape,
                move |device| rope(device, geometry, norms, in_tiles, true),
            ));
        }
    }
    cases.extend(
        [(1, 576), (3, 160), (2, 4), (2, 5120)].map(|(tokens, width)| {
            let shape = format!("T={tokens} D={width}");
            Case::new("rmsnorm_f16", shape, move |device| {
                norm(device, tokens, width)
            })
        }),
    );
    cases
}

pub fn large() -> Vec<Case> {
    LARGE.map(|geometry| attention_case(geometry, None)).into()
}

fn name((heads, kv_heads, head_dim, context, position, tokens): Geometry) -> String {
    format!("T={tokens} H={heads} KV={kv_heads} Dh={head_dim} S={context} position={position}")
}

fn attention_case(geometry: Geometry, window: Option<usize>) -> Case {
    let kernel = attention::prompt::entry(geometry.2);
    let mut shape = name(geometry);
    if let Some(window) = window {
        shape.push_str(&format!(" window={window}"));
    }
    Case::new(kernel, shape, move |device| {
        attend(device, geometry, window)
    })
}

fn attend(
    device: &mut dyn Device,
    (heads, kv_heads, head_dim, context, position, tokens): Geometry,
    window: Option<usize>,
) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(31);
    let q = inputs.halves(tokens * heads * head_dim, 2.0);
    let elems = kv_heads * context * head_dim;
    let mut k_cache = inputs.halves(elems, 1.0);
    let mut v_cache = inputs.halves(elems, 1.0);
    for cache in [&mut k_cache, &mut v_cache] {
        for head in cache.chunks_exact_mut(context * head_dim) {
            head[(position + tokens) * head_dim..].fill(f16::NAN);
        }
    }
    let scale = 1.0 / (head_dim as f32).sqrt();
    let got = same_twice(device, |device| {
        let shape = attention::Shape {
            heads,
            kv_heads,
            head_dim,
            context,
            scale,
            window,
        };
        let ops = attention::prompt::Operands {
            q: device.put_f16(&q)?,
            k_cache: device.put_f16(&k_cache)?,
            v_cache: device.put_f16(&v_cache)?,
            state: device.put_u32(&[position as u32])?,
            out: device.uninit(q.len() as u64 * 2)?,
        };
        let info = device.info();
        device.run(&attention::prompt::plan(&info, &shape, tokens, &ops)?)?;
        Ok(to_floats(device.take_f16(ops.out)?))
    })?;
    let (q, width) = (to_floats(q), heads * head_dim);
    let compared = compared(tokens);
    let mut want = vec![0.0; compared.len() * width];
    for (token, want) in compared.iter().zip(want.chunks_exact_mut(width)) {
        let reference = AttentionShape {
            heads,
            kv_heads,
            head_dim,
            capacity: context,
            position: position + token,
            scale,
            window,
        };
        let q = &q[token * width..][..width];
        cpu_kernels::attention::reference(q, &k_cache, &v_cache, want, &reference);
    }
    within(&rows_of(&got, width, &compared), &want, ROUNDED_WEIGHTS)
}

/// Queries, keys and values as they lie in one product, with a gap at the end.
fn rope(
    device: &mut dyn Device,
    (heads, kv_heads, head_dim, context, position, tokens): Geometry,
    norms: bool,
    in_tiles: bool,
    of_8_bits: bool,
) -> Result<f64, CaseError> {
    const GAP: usize = 3;
    let mut inputs = Inputs::new(32);
    let widths = [heads, kv_heads, kv_heads].map(|heads| heads * head_dim);
    let stride = widths.iter().sum::<usize>() + GAP;
    let product = inputs.floats(tokens * stride, 1.0);
    let bias = in_tiles.then(|| inputs.floats(stride - GAP, 1.0));
    let gains = norms.then(|| [0, 1].map(|_| inputs.floats(head_dim, 1.0)));
    let elems = kv_heads * context * head_dim;
    let (k_before, v_before) = (inputs.halves(elems, 1.0), inputs.halves(elems, 1.0));
    let mut levels: Vec<i8> = (0..elems).map(|_| inputs.u64() as i8).collect();
    let mut scales = inputs.halves(kv_heads * context, 1.0);
    let [cos, sin] = inputs.turns(context * (head_dim / 2));
    let got = same_twice(device, |device| {
        let all = device.put_f32(&product)?;
        let part = |first: usize| Strided {
            slice: DeviceSlice {
                address: all.address + 4 * first as u64,
                bytes: all.bytes - 4 * first as u64,
            },
            stride,
        };
        let mut gain = |i: usize| -> Result<DeviceSlice, DeviceError> {
            match &gains {
                Some(gains) => device.put_f32(&gains[i]),
                None => Ok(DeviceSlice::NONE),
            }
        };
        let (q_gain, k_gain) = (gain(0)?, gain(1)?);
        let ops = rope_kv_append::tokens::Operands {
            q: part(0),
            k: part(widths[0]),
            v: part(widths[0] + widths[1]),
            in_tiles,
            bias: match &bias {
                Some(bias) => device.put_f32(bias)?,
                None => DeviceSlice::NONE,
            },
            q_gain,
            k_gain,
            eps: EPS,
            cos: device.put_f32(&cos)?,
            sin: device.put_f32(&sin)?,
            turned: device.uninit((tokens * widths[0]) as u64 * 2)?,
            k_cache: device.put_f16(&k_before)?,
            v_cache: match of_8_bits {
                true => device.put_i8(&levels)?,
                false => device.put_f16(&v_before)?,
            },
            v_scales: match of_8_bits {
                true => device.put_f16(&scales)?,
                false => DeviceSlice::NONE,
            },
            state: device.put_u32(&[position as u32])?,
        };
        let shape = rope_kv_append::Shape {
            heads,
            kv_heads,
            head_dim,
            context,
        };
        let info = device.info();
        device.run(&rope_kv_append::tokens::plan(&info, &shape, tokens, &ops)?)?;
        let mut got = to_floats(device.take_f16(ops.turned)?);
        got.extend(to_floats(device.take_f16(ops.k_cache)?));
        if of_8_bits {
            got.extend(to_floats(device.take_f16(ops.v_scales)?));
            let levels = device.download(ops.v_cache)?;
            got.extend(levels.into_iter().map(|byte| f32::from(byte as i8)));
        } else {
            got.extend(to_floats(device.take_f16(ops.v_cache)?));
        }
        Ok(got)
    })?;

    let mut parts: [Vec<f32>; 3] = Default::default();
    for token in product.chunks_exact(stride) {
        let mut first = 0;
        for (part, width) in parts.iter_mut().zip(widths) {
            part.extend((first..first + width).map(|row| {
                let (head, i) = (row / head_dim, row % head_dim);
                let (second, i) = (i / (head_dim / 2), i % (head_dim / 2));
                match &bias {
                    Some(bias) => {
                        token[head * head_dim + i / 8 * 16 + second * 8 + i % 8] + bias[row]
                    }
                    None => token[row],
                }
            }));
            first += width;
        }
    }
    let [mut q, mut k, v] = parts;
    if let Some([q_gain, k_gain]) = &gains {
        for (x, gain) in [(&mut q, q_gain), (&mut k, k_gain)] {
            let before = x.clone();
            cpu_kernels::rmsnorm::reference(&before, gain, EPS, x);
        }
    }
    cpu_kernels::rope::reference(&mut q, heads, head_dim, &cos, &sin, position);
    cpu_kernels::rope::reference(&mut k, kv_heads, head_dim, &cos, &sin, position);
    let mut want = q;
    let appended = |values: &[f32], mut cache: Vec<f16>| {
        let (cache_of, at) = (&mut cache, position);
        cpu_kernels::kv_append::reference(values, cache_of, kv_heads, context, head_dim, at);
        to_floats(cache)
    };
    want.extend(appended(&k, k_before));
    if !of_8_bits {
        want.extend(appended(&v, v_before));
        return within(&got, &want, ROUNDED_TO_HALF);
    }
    let error = within(&got[..want.len()], &want, ROUNDED_TO_HALF)?;
    let (caches, at) = ((&mut levels, &mut scales), position);
    cpu_kernels::kv_append::reference_int8(&v, caches.0, caches.1, kv_heads, context, head_dim, at);
    let exact = &got[want.len()..];
    let mut want = to_floats(scales);
    want.extend(levels.into_iter().map(f32::from));
    Ok(error.max(within(exact, &want, 0.0)?))
}

fn norm(device: &mut dyn Device, tokens: usize, width: usize) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(2);
    let x = inputs.floats(tokens * width, 3.0);
    let weight = inputs.floats(width, 1.0);
    let got = same_twice(device, |device| {
        let ops = rmsnorm::Operands {
            x: device.put_f32(&x)?,
            weight: device.put_f32(&weight)?,
            out: device.uninit(x.len() as u64 * 2)?,
        };
        let shape = rmsnorm::Shape {
            tokens,
            width,
            eps: EPS,
        };
        device.run(&rmsnorm::plan_f16(&device.info(), &shape, &ops)?)?;
        Ok(to_floats(device.take_f16(ops.out)?))
    })?;
    let mut want = vec![0.0; x.len()];
    cpu_kernels::rmsnorm::reference(&x, &weight, EPS, &mut want);
    within(&got, &want, ROUNDED_TO_HALF)
}

#[cfg(test)]
mod tests {
    use super::super::EmulatorDevice;
    use crate::launch::DeviceInfo;

    #[test]
    fn every_case_with_whole_products() {
        let info = DeviceInfo {
            compute_capability: 80,
            warpgroup_products: false,
            multiprocessors: 108,
            shared_bytes_per_block: 163 * 1024,
        };
        for case in super::cases() {
            let mut device = EmulatorDevice::new(info, None);
            match (case.run)(&mut device) {
                Ok(error) => println!("{}: relative error {error:.1e}", case.name),
                Err(error) => panic!("{}: {error}", case.name),
            }
        }
    }
}
