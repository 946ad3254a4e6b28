//! Embedding, normalisation, rotation, cache append, activation, residual.

use half::f16;

use super::{Buffers, Case, CaseError, Device, Inputs, same_twice, within};
use crate::launch::DeviceSlice;
use std::ops::Range;

use crate::{
    add, embed, kv_append, relu2_glu, rescale, rmsnorm, rope, rope_kv_append, round_int8, swiglu,
};

/// One rounding per element and one approximate instruction.
const ROUNDING: f64 = 1e-6;
/// Nothing is rounded.
const EXACT: f64 = 0.0;

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (vocab, width, group, positions) in [
        (11, 576, 32, 0..1),
        (193, 160, 160, 5..6),
        (7, 1120, 128, 2..4),
        (1, 32, 32, 1..4),
    ] {
        let shape = format!("V={vocab} D={width} group={group} positions={positions:?}");
        cases.push(Case::new("embed_int8", shape, move |device| {
            embed(device, vocab, width, group, positions.clone())
        }));
    }
    for (vocab, width, positions) in [(11, 576, 0..1), (193, 160, 5..8), (1, 32, 1..2)] {
        let shape = format!("V={vocab} D={width} positions={positions:?}");
        cases.push(Case::new("embed_f16", shape, move |device| {
            embed_f16(device, vocab, width, positions.clone())
        }));
    }
    for (tokens, width) in [(1, 576), (3, 160), (1, 1120), (2, 4), (1, 5120)] {
        let shape = format!("T={tokens} D={width}");
        cases.push(Case::new("round_int8_f32", shape.clone(), move |device| {
            round_int8(device, tokens, width, false)
        }));
        let shape = shape + " levels";
        cases.push(Case::new("round_int8_f32", shape, move |device| {
            round_int8(device, tokens, width, true)
        }));
    }
    for (elems, rows, adds) in [
        (4, true, false),
        (576, false, true),
        (1120, false, false),
        (5124, true, true),
    ] {
        let shape = format!("elems={elems} rows={rows} adds={adds}");
        cases.push(Case::new("rescale_f32", shape, move |device| {
            rescale(device, elems, rows, adds)
        }));
    }
    for (tokens, width) in [(1, 576), (3, 160), (1, 1120), (2, 4), (1, 5120)] {
        let shape = format!("T={tokens} D={width}");
        cases.push(Case::new("rmsnorm_f32", shape, move |device| {
            rmsnorm(device, tokens, width, false)
        }));
    }
    cases.push(Case::new(
        "rmsnorm_f32",
        "T=3 D=576 in place".into(),
        |device| rmsnorm(device, 3, 576, true),
    ));
    for (heads, head_dim, position) in [
        (9, 64, 0),
        (3, 80, 37),
        (1, 96, 300),
        (7, 128, 1),
        (2, 34, 5),
        (1, 320, 3),
    ] {
        let shape = format!("heads={heads} Dh={head_dim} position={position}");
        cases.push(Case::new("rope_f32", shape, move |device| {
            rope(device, heads, head_dim, position)
        }));
    }
    for (kv_heads, head_dim, context, position) in [
        (3, 64, 40, 37),
        (1, 80, 1, 0),
        (2, 34, 9, 8),
        (5, 288, 7, 2),
    ] {
        let shape = format!("KV={kv_heads} Dh={head_dim} S={context} position={position}");
        cases.push(Case::new("kv_append_f16", shape, move |device| {
            kv_append(device, kv_heads, head_dim, context, position)
        }));
    }
    for (dims, greatest) in [
        ([3, 64, 40, 37], 3.0),
        ([2, 128, 7, 0], 100.0),
        ([1, 80, 5, 4], 1e-3),
        ([2, 96, 5, 4], 1e-6),
        ([1, 8, 3, 1], 1e-9),
    ] {
        let [kv_heads, head_dim, context, position] = dims;
        let shape =
            format!("KV={kv_heads} Dh={head_dim} S={context} position={position} to {greatest:e}");
        cases.push(Case::new("kv_append_v8", shape, move |device| {
            kv_append_v8(device, dims, greatest)
        }));
    }
    for (heads, kv_heads, head_dim, context, position) in [
        (9, 3, 64, 40, 37),
        (7, 1, 80, 3, 0),
        (4, 2, 34, 9, 8),
        (1, 1, 320, 5, 4),
    ] {
        let shape =
            format!("H={heads} KV={kv_heads} Dh={head_dim} S={context} position={position}");
        let shape_of = cpu_kernels::rope_kv_append::Shape {
            heads,
            kv_heads,
            head_dim,
            capacity: context,
        };
        cases.push(Case::new("rope_kv_append_f16", shape, move |device| {
            rope_kv_append(device, shape_of, position)
        }));
    }
    for elems in [1, 7, 193, 576, 1537] {
        let shape = format!("elems={elems}");
        cases.push(Case::new("swiglu_f32", shape.clone(), move |device| {
            swiglu(device, elems)
        }));
        cases.push(Case::new("relu2_glu_f32", shape.clone(), move |device| {
            relu2_glu(device, elems)
        }));
        cases.push(Case::new("residual_add_f32", shape, move |device| {
            add(device, elems)
        }));
    }
    cases
}

fn embed(
    device: &mut dyn Device,
    vocab: usize,
    width: usize,
    group: usize,
    positions: Range<usize>,
) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(1);
    let table = inputs.int8(vocab, width, group);
    let context = positions.start + 3;
    let tokens: Vec<u32> = (0..=context)
        .map(|_| (inputs.u64() % vocab as u64) as u32)
        .collect();
    let got = same_twice(device, |device| {
        let ops = embed::Operands {
            quants: device.put_i8(&table.quants)?,
            scales: device.put_f16(&table.scales)?,
            tokens: device.put_u32(&tokens)?,
            state: device.put_u32(&[positions.start as u32])?,
            out: device.uninit((positions.len() * width) as u64 * 4)?,
        };
        let shape = embed::Shape {
            vocab,
            width,
            group,
            context,
            tokens: positions.len(),
        };
        device.run(&embed::plan(&device.info(), &shape, &ops)?)?;
        Ok(device.take_f32(ops.out)?)
    })?;
    let mut want = vec![0.0; positions.len() * width];
    cpu_kernels::embed::reference(&table, &tokens[positions], &mut want);
    within(&got, &want, EXACT)
}

fn rmsnorm(
    device: &mut dyn Device,
    tokens: usize,
    width: usize,
    in_place: bool,
) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(2);
    let x = inputs.floats(tokens * width, 3.0);
    let weight = inputs.floats(width, 1.0);
    let eps = 1e-5;
    let got = same_twice(device, |device| {
        let x = device.put_f32(&x)?;
        let ops = rmsnorm::Operands {
            x,
            weight: device.put_f32(&weight)?,
            out: if in_place { x } else { device.uninit(x.bytes)? },
        };
        let shape = rmsnorm::Shape { tokens, width, eps };
        device.run(&rmsnorm::plan(&device.info(), &shape, &ops)?)?;
        Ok(device.take_f32(ops.out)?)
    })?;
    let mut want = vec![0.0; x.len()];
    cpu_kernels::rmsnorm::reference(&x, &weight, eps, &mut want);
    within(&got, &want, EXACT)
}

fn rope(
    device: &mut dyn Device,
    heads: usize,
    head_dim: usize,
    position: usize,
) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(3);
    let x = inputs.floats(heads * head_dim, 1.0);
    let context = position + 2;
    let [cos, sin] = inputs.turns(context * (head_dim / 2));
    let got = same_twice(device, |device| {
        let ops = rope::Operands {
            x: device.put_f32(&x)?,
            cos: device.put_f32(&cos)?,
            sin: device.put_f32(&sin)?,
            state: device.put_u32(&[position as u32])?,
        };
        let shape = rope::Shape {
            heads,
            head_dim,
            context,
        };
        device.run(&rope::plan(&device.info(), &shape, &ops)?)?;
        Ok(device.take_f32(ops.x)?)
    })?;
    let mut want = x.clone();
    cpu_kernels::rope::reference(&mut want, heads, head_dim, &cos, &sin, position);
    within(&got, &want, ROUNDING)
}

/// Both whole caches are compared, so a write beside the row shows.
fn kv_append(
    device: &mut dyn Device,
    kv_heads: usize,
    head_dim: usize,
    context: usize,
    position: usize,
) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(4);
    let (k, v) = (
        inputs.floats(kv_heads * head_dim, 1.0),
        inputs.floats(kv_heads * head_dim, 1.0),
    );
    let elems = kv_heads * context * head_dim;
    let (k_cache, v_cache) = (inputs.halves(elems, 1.0), inputs.halves(elems, 1.0));
    let got = same_twice(device, |device| {
        let ops = kv_append::Operands {
            k: device.put_f32(&k)?,
            v: device.put_f32(&v)?,
            k_cache: device.put_f16(&k_cache)?,
            v_cache: device.put_f16(&v_cache)?,
            v_scales: DeviceSlice::NONE,
            state: device.put_u32(&[position as u32])?,
        };
        let shape = kv_append::Shape {
            kv_heads,
            head_dim,
            context,
        };
        device.run(&kv_append::plan(&device.info(), &shape, &ops)?)?;
        let mut caches = device.take_f16(ops.k_cache)?;
        caches.extend(device.take_f16(ops.v_cache)?);
        Ok(caches.into_iter().map(f16::to_f32).collect())
    })?;
    let (mut want, mut want_v) = (k_cache.clone(), v_cache.clone());
    cpu_kernels::kv_append::reference(&k, &mut want, kv_heads, context, head_dim, position);
    cpu_kernels::kv_append::reference(&v, &mut want_v, kv_heads, context, head_dim, position);
    want.extend(want_v);
    let want: Vec<f32> = want.into_iter().map(f16::to_f32).collect();
    within(&got, &want, EXACT)
}

/// As [`kv_append`], values of 8 bits and their scales. The greatest element is `greatest`.
fn kv_append_v8(
    device: &mut dyn Device,
    [kv_heads, head_dim, context, position]: [usize; 4],
    greatest: f32,
) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(4);
    let k = inputs.floats(kv_heads * head_dim, 1.0);
    let mut v = inputs.floats(kv_heads * head_dim, greatest / 3.0);
    v[kv_heads * head_dim / 2] = -greatest;
    let mut k_cache = inputs.halves(kv_heads * context * head_dim, 1.0);
    let mut v_scales = inputs.halves(kv_heads * context, 1.0);
    let mut v_cache: Vec<i8> = (0..k_cache.len()).map(|_| inputs.u64() as i8).collect();
    let shape = kv_append::Shape {
        kv_heads,
        head_dim,
        context,
    };
    let got = same_twice(device, |device| {
        let ops = kv_append::Operands {
            k: device.put_f32(&k)?,
            v: device.put_f32(&v)?,
            k_cache: device.put_f16(&k_cache)?,
            v_cache: device.put_i8(&v_cache)?,
            v_scales: device.put_f16(&v_scales)?,
            state: device.put_u32(&[position as u32])?,
        };
        device.run(&kv_append::plan(&device.info(), &shape, &ops)?)?;
        let mut all: Vec<f32> = [ops.k_cache, ops.v_scales]
            .into_iter()
            .map(|slice| device.take_f16(slice))
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .flatten()
            .map(f16::to_f32)
            .collect();
        let levels = device.download(ops.v_cache)?;
        all.extend(levels.into_iter().map(|byte| f32::from(byte as i8)));
        Ok(all)
    })?;
    cpu_kernels::kv_append::reference(&k, &mut k_cache, kv_heads, context, head_dim, position);
    cpu_kernels::kv_append::reference_int8(
        &v,
        &mut v_cache,
        &mut v_scales,
        kv_heads,
        context,
        head_dim,
        position,
    );
    let mut want: Vec<f32> = k_cache
        .iter()
        .chain(&v_scales)
        .map(|h| h.to_f32())
        .collect();
    want.extend(v_cache.iter().map(|&level| f32::from(level)));
    within(&got, &want, EXACT)
}

/// Queries and both whole caches are compared. A key's element is rounded to a half after a turn
/// that is good to a few units of single precision: the next half over is half a unit off.
fn rope_kv_append(
    device: &mut dyn Device,
    shape: cpu_kernels::rope_kv_append::Shape,
    position: usize,
) -> Result<f64, CaseError> {
    const ROUNDED_TO_HALF: f64 = 1e-4;
    let cpu_kernels::rope_kv_append::Shape {
        heads,
        kv_heads,
        head_dim,
        capacity: context,
    } = shape;
    let mut inputs = Inputs::new(7);
    let mut q = inputs.floats(heads * head_dim, 1.0);
    let (k, v) = (
        inputs.floats(kv_heads * head_dim, 1.0),
        inputs.floats(kv_heads * head_dim, 1.0),
    );
    let elems = kv_heads * context * head_dim;
    let (mut k_cache, mut v_cache) = (inputs.halves(elems, 1.0), inputs.halves(elems, 1.0));
    let [cos, sin] = inputs.turns(context * (head_dim / 2));
    let got = same_twice(device, |device| {
        let ops = rope_kv_append::Operands {
            q: device.put_f32(&q)?,
            k: device.put_f32(&k)?,
            v: device.put_f32(&v)?,
            cos: device.put_f32(&cos)?,
            sin: device.put_f32(&sin)?,
            k_cache: device.put_f16(&k_cache)?,
            v_cache: device.put_f16(&v_cache)?,
            v_scales: DeviceSlice::NONE,
            state: device.put_u32(&[position as u32])?,
        };
        let shape = rope_kv_append::Shape {
            heads,
            kv_heads,
            head_dim,
            context,
        };
        device.run(&rope_kv_append::plan(&device.info(), &shape, &ops)?)?;
        let mut all = device.take_f32(ops.q)?;
        for cache in [ops.k_cache, ops.v_cache] {
            all.extend(device.take_f16(cache)?.into_iter().map(f16::to_f32));
        }
        Ok(all)
    })?;
    cpu_kernels::rope_kv_append::reference(
        shape,
        &mut q,
        [&k, &v],
        [&cos, &sin],
        [&mut k_cache, &mut v_cache],
        position,
    );
    within(&got[..q.len()], &q, ROUNDING)?;
    for cache in [k_cache, v_cache] {
        q.extend(cache.into_iter().map(f16::to_f32));
    }
    within(&got, &q, ROUNDED_TO_HALF)
}

fn swiglu(device: &mut dyn Device, elems: usize) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(5);
    let (gate, up) = (inputs.floats(elems, 5.0), inputs.floats(elems, 1.0));
    let got = same_twice(device, |device| {
        let ops = swiglu::Operands {
            gate: device.put_f32(&gate)?,
            up: device.put_f32(&up)?,
            out: device.uninit(elems as u64 * 4)?,
        };
        device.run(&swiglu::plan(
            &device.info(),
            &swiglu::Shape { elems },
            &ops,
        )?)?;
        Ok(device.take_f32(ops.out)?)
    })?;
    let mut want = vec![0.0; elems];
    cpu_kernels::swiglu::reference(&gate, &up, &mut want);
    within(&got, &want, ROUNDING)
}

fn relu2_glu(device: &mut dyn Device, elems: usize) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(5);
    let (gate, up) = (inputs.floats(elems, 5.0), inputs.floats(elems, 1.0));
    let got = same_twice(device, |device| {
        let ops = relu2_glu::Operands {
            gate: device.put_f32(&gate)?,
            up: device.put_f32(&up)?,
            out: device.uninit(elems as u64 * 4)?,
        };
        device.run(&relu2_glu::plan(
            &device.info(),
            &relu2_glu::Shape { elems },
            &ops,
        )?)?;
        Ok(device.take_f32(ops.out)?)
    })?;
    let mut want = vec![0.0; elems];
    cpu_kernels::relu2_glu::reference(&gate, &up, &mut want);
    within(&got, &want, ROUNDING)
}

fn embed_f16(
    device: &mut dyn Device,
    vocab: usize,
    width: usize,
    positions: Range<usize>,
) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(1);
    let table = inputs.f16(vocab, width);
    let context = positions.start + 3;
    let tokens: Vec<u32> = (0..=context)
        .map(|_| (inputs.u64() % vocab as u64) as u32)
        .collect();
    let got = same_twice(device, |device| {
        let ops = embed::F16Operands {
            table: device.put_f16(&table.values)?,
            tokens: device.put_u32(&tokens)?,
            state: device.put_u32(&[positions.start as u32])?,
            out: device.uninit((positions.len() * width) as u64 * 4)?,
        };
        let shape = embed::F16Shape {
            vocab,
            width,
            context,
            tokens: positions.len(),
        };
        device.run(&embed::plan_f16(&device.info(), &shape, &ops)?)?;
        Ok(device.take_f32(ops.out)?)
    })?;
    let mut want = vec![0.0; positions.len() * width];
    cpu_kernels::embed::reference_f16(&table, &tokens[positions], &mut want);
    within(&got, &want, EXACT)
}

fn round_int8(
    device: &mut dyn Device,
    tokens: usize,
    width: usize,
    levels: bool,
) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(9);
    let mut x = inputs.floats(tokens * width, 30.0);
    let got = same_twice(device, |device| {
        let x = device.put_f32(&x)?;
        let scales = match levels {
            true => device.uninit(4 * tokens as u64)?,
            false => DeviceSlice::NONE,
        };
        let shape = round_int8::Shape { tokens, width };
        device.run(&round_int8::plan(&device.info(), &shape, x, scales)?)?;
        let mut all = device.take_f32(x)?;
        if levels {
            all.extend(device.take_f32(scales)?);
        }
        Ok(all)
    })?;
    match levels {
        true => {
            let scales = cpu_kernels::round_int8::reference_levels(&mut x, width);
            x.extend(scales);
        }
        false => cpu_kernels::round_int8::reference(&mut x, width),
    }
    within(&got, &x, EXACT)
}

fn rescale(
    device: &mut dyn Device,
    elems: usize,
    rows: bool,
    adds: bool,
) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(10);
    let (x, y) = (inputs.floats(elems, 3000.0), inputs.floats(elems, 10.0));
    let row_scales = rows.then(|| inputs.floats(elems, 2.0));
    let scale = 0.0371;
    let got = same_twice(device, |device| {
        let ops = rescale::Operands {
            x: device.put_f32(&x)?,
            scale: device.put_f32(&[scale])?,
            row_scales: match &row_scales {
                Some(rows) => device.put_f32(rows)?,
                None => DeviceSlice::NONE,
            },
            y: device.put_f32(&y)?,
        };
        let shape = rescale::Shape { elems, adds };
        device.run(&rescale::plan(&device.info(), &shape, &ops)?)?;
        Ok(device.take_f32(ops.y)?)
    })?;
    let mut want = y.clone();
    cpu_kernels::rescale::reference(&x, scale, row_scales.as_deref(), &mut want, adds);
    within(&got, &want, ROUNDING)
}

fn add(device: &mut dyn Device, elems: usize) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(6);
    let (x, y) = (inputs.floats(elems, 1.0), inputs.floats(elems, 10.0));
    let got = same_twice(device, |device| {
        let ops = add::Operands {
            x: device.put_f32(&x)?,
            y: device.put_f32(&y)?,
        };
        device.run(&add::plan(&device.info(), &add::Shape { elems }, &ops)?)?;
        Ok(device.take_f32(ops.y)?)
    })?;
    let mut want = y.clone();
    cpu_kernels::add::reference(&x, &mut want);
    within(&got, &want, EXACT)
}
