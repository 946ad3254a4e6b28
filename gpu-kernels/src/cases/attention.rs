//! Attention over caches of several lengths. Rows past the position are NaN: a kernel that lets
//! them in, even with weight 0, fails.

use cpu_kernels::attention::AttentionShape;
use half::f16;

use super::{Buffers, Case, CaseError, Device, Inputs, same_twice, within};
use crate::attention;

/// Exponentials by an approximate instruction, sums of some hundred products.
const SOFTMAX: f64 = 3e-6;

/// Query heads, kv heads, head width, capacity, position.
type Geometry = (usize, usize, usize, usize, usize);

const SMALL: [Geometry; 14] = [
    (9, 3, 64, 301, 0),
    (9, 3, 64, 301, 1),
    (9, 3, 64, 301, 37),
    (9, 3, 64, 301, 300),
    (4, 2, 32, 64, 31),
    (4, 2, 32, 64, 32),
    (2, 2, 80, 40, 37),
    (2, 1, 96, 7, 6),
    (3, 1, 128, 40, 39),
    (1, 1, 256, 40, 33),
    (2, 1, 192, 5, 3),
    (2, 1, 34, 40, 37),
    (1, 1, 2, 3, 2),
    (1, 1, 64, 700, 600),
];

const LARGE: [Geometry; 3] = [
    (9, 3, 64, 8192, 8191),
    (12, 2, 128, 4096, 4000),
    (32, 8, 64, 2100, 2049),
];

pub fn cases() -> Vec<Case> {
    SMALL.map(case).into()
}

pub fn large() -> Vec<Case> {
    LARGE.map(case).into()
}

fn case(geometry: Geometry) -> Case {
    let (heads, kv_heads, head_dim, context, position) = geometry;
    let shape = format!("H={heads} KV={kv_heads} Dh={head_dim} S={context} position={position}");
    Case::new("attention_decode_f16", shape, move |device| {
        attention(device, geometry)
    })
}

fn attention(
    device: &mut dyn Device,
    (heads, kv_heads, head_dim, context, position): Geometry,
) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(10);
    let q = inputs.floats(heads * head_dim, 2.0);
    let elems = kv_heads * context * head_dim;
    let mut k_cache = inputs.halves(elems, 1.0);
    let mut v_cache = inputs.halves(elems, 1.0);
    for cache in [&mut k_cache, &mut v_cache] {
        for head in cache.chunks_exact_mut(context * head_dim) {
            head[(position + 1) * head_dim..].fill(f16::NAN);
        }
    }
    let scale = 1.0 / (head_dim as f32).sqrt();
    let got = same_twice(device, |device| {
        let ops = attention::Operands {
            q: device.put_f32(&q)?,
            k_cache: device.put_f16(&k_cache)?,
            v_cache: device.put_f16(&v_cache)?,
            state: device.put_u32(&[position as u32])?,
            out: device.uninit(q.len() as u64 * 4)?,
        };
        let shape = attention::Shape {
            heads,
            kv_heads,
            head_dim,
            context,
            scale,
        };
        device.run(&attention::plan(&device.info(), &shape, &ops)?)?;
        Ok(device.take_f32(ops.out)?)
    })?;
    let shape = AttentionShape {
        heads,
        kv_heads,
        head_dim,
        capacity: context,
        position,
        scale,
    };
    let mut want = vec![0.0; q.len()];
    cpu_kernels::attention::reference(&q, &k_cache, &v_cache, &mut want, &shape);
    within(&got, &want, SOFTMAX)
}
