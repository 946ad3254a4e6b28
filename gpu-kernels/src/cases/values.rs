//! Values of 8 bits in the cache: appended with turned keys, and as halves for a prompt.

use half::f16;

use super::{Buffers, Case, CaseError, Device, Inputs, same_twice, to_floats, within};
use crate::{kv_values, rope_kv_append};

/// A key is rounded to a half after a turn that is good to a few units of single precision.
const ROUNDED_TO_HALF: f64 = 1e-4;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (heads, kv_heads, head_dim, context, position) in [
        (9, 3, 64, 40, 37),
        (7, 1, 80, 3, 0),
        (4, 2, 20, 9, 8),
        (2, 2, 128, 5, 4),
    ] {
        let shape =
            format!("H={heads} KV={kv_heads} Dh={head_dim} S={context} position={position}");
        let shape_of = rope_kv_append::Shape {
            heads,
            kv_heads,
            head_dim,
            context,
        };
        cases.push(Case::new("rope_kv_append_v8", shape, move |device| {
            append(device, shape_of, position)
        }));
    }
    for (kv_heads, head_dim, context, position, tokens) in [
        (3, 64, 40, 7, 5),
        (1, 8, 1, 0, 1),
        (2, 96, 300, 0, 300),
        (4, 128, 700, 690, 9),
    ] {
        let shape =
            format!("T={tokens} KV={kv_heads} Dh={head_dim} S={context} position={position}");
        let shape_of = kv_values::Shape {
            kv_heads,
            head_dim,
            context,
        };
        cases.push(Case::new("kv_values_f16", shape, move |device| {
            convert(device, shape_of, position, tokens)
        }));
    }
    cases
}

fn levels(inputs: &mut Inputs, elems: usize) -> Vec<i8> {
    (0..elems).map(|_| inputs.u64() as i8).collect()
}

/// Queries and both whole caches are compared.
fn append(
    device: &mut dyn Device,
    shape: rope_kv_append::Shape,
    position: usize,
) -> Result<f64, CaseError> {
    let rope_kv_append::Shape {
        heads,
        kv_heads,
        head_dim,
        context,
    } = shape;
    let mut inputs = Inputs::new(8);
    let mut q = inputs.floats(heads * head_dim, 1.0);
    let mut k = inputs.floats(kv_heads * head_dim, 1.0);
    let v = inputs.floats(kv_heads * head_dim, 1.0);
    let elems = kv_heads * context * head_dim;
    let mut keys = inputs.halves(elems, 1.0);
    let (mut values, mut scales) = (
        levels(&mut inputs, elems),
        inputs.halves(kv_heads * context, 1.0),
    );
    let [cos, sin] = inputs.turns(context * (head_dim / 2));
    let got = same_twice(device, |device| {
        let ops = rope_kv_append::Operands {
            q: device.put_f32(&q)?,
            k: device.put_f32(&k)?,
            v: device.put_f32(&v)?,
            cos: device.put_f32(&cos)?,
            sin: device.put_f32(&sin)?,
            k_cache: device.put_f16(&keys)?,
            v_cache: device.put_i8(&values)?,
            v_scales: device.put_f16(&scales)?,
            state: device.put_u32(&[position as u32])?,
        };
        device.run(&rope_kv_append::plan(&device.info(), &shape, &ops)?)?;
        let mut all = device.take_f32(ops.q)?;
        all.extend(to_floats(device.take_f16(ops.k_cache)?));
        all.extend(to_floats(device.take_f16(ops.v_scales)?));
        let levels = device.download(ops.v_cache)?;
        all.extend(levels.into_iter().map(|byte| f32::from(byte as i8)));
        Ok(all)
    })?;
    let turn = cpu_kernels::rope::reference;
    turn(&mut q, heads, head_dim, &cos, &sin, position);
    turn(&mut k, kv_heads, head_dim, &cos, &sin, position);
    cpu_kernels::kv_append::reference(&k, &mut keys, kv_heads, context, head_dim, position);
    let append = cpu_kernels::kv_append::reference_int8;
    append(
        &v,
        &mut values,
        &mut scales,
        kv_heads,
        context,
        head_dim,
        position,
    );
    let mut want = q;
    want.extend(to_floats(keys));
    let error = within(&got[..want.len()], &want, ROUNDED_TO_HALF)?;
    let exact = &got[want.len()..];
    let mut want = to_floats(scales);
    want.extend(values.into_iter().map(f32::from));
    Ok(error.max(within(exact, &want, 0.0)?))
}

/// Rows past the last token have scales that are no numbers, and stay as they were.
fn convert(
    device: &mut dyn Device,
    shape: kv_values::Shape,
    position: usize,
    tokens: usize,
) -> Result<f64, CaseError> {
    let kv_values::Shape {
        kv_heads,
        head_dim,
        context,
    } = shape;
    let mut inputs = Inputs::new(9);
    let elems = kv_heads * context * head_dim;
    let levels = levels(&mut inputs, elems);
    let mut scales = inputs.halves(kv_heads * context, 1.0);
    for head in scales.chunks_exact_mut(context) {
        head[position + tokens..].fill(f16::NAN);
    }
    let mut want = inputs.halves(elems, 1.0);
    let got = same_twice(device, |device| {
        let ops = kv_values::Operands {
            levels: device.put_i8(&levels)?,
            scales: device.put_f16(&scales)?,
            state: device.put_u32(&[position as u32])?,
            values: device.put_f16(&want)?,
        };
        device.run(&kv_values::plan(&device.info(), &shape, tokens, &ops)?)?;
        Ok(to_floats(device.take_f16(ops.values)?))
    })?;
    let positions = position + tokens;
    cpu_kernels::kv_values::reference(&levels, &scales, &mut want, context, head_dim, positions);
    within(&got, &to_floats(want), 0.0)
}
