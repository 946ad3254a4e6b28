//! Attention over caches of several lengths. Rows past the position are NaN: a kernel that lets
//! them in, even with weight 0, fails.

use cpu_kernels::attention::AttentionShape;
use half::f16;

use super::{Buffers, Case, CaseError, Device, Inputs, same_twice, within};
use crate::attention::split::{self, Tuning};
use crate::attention::{self, UNWRITTEN, block_a_head};
use crate::launch::DeviceSlice;

/// Exponentials by an approximate instruction, sums of some hundred products.
const SOFTMAX: f64 = 3e-6;
/// The same with sums inside the matrix units, which cut off rather than round.
const MATRIX_SOFTMAX: f64 = 1e-5;

/// Query heads, kv heads, head width, capacity, position.
type Geometry = (usize, usize, usize, usize, usize);

const BLOCK_A_HEAD: [Geometry; 8] = [
    (9, 3, 64, 301, 0),
    (9, 3, 64, 301, 300),
    (4, 2, 32, 64, 31),
    (2, 2, 80, 40, 37),
    (2, 1, 96, 7, 6),
    (3, 1, 128, 40, 39),
    (2, 1, 34, 40, 37),
    (1, 1, 2, 3, 2),
];

const BLOCK_A_HEAD_WINDOWS: [(Geometry, usize); 3] = [
    ((4, 2, 64, 301, 300), 37),
    ((2, 1, 34, 40, 37), 1),
    ((2, 2, 128, 300, 20), 21),
];

/// Less than a tile, some splits, all there is, more than there is.
const WINDOWS: [(Geometry, usize); 6] = [
    ((4, 2, 64, 301, 300), 5),
    ((9, 3, 64, 301, 77), 1),
    ((2, 2, 128, 300, 20), 21),
    ((3, 1, 96, 700, 600), 512),
    ((6, 1, 128, 900, 899), 301),
    ((10, 2, 80, 290, 140), 300),
];

/// With the tuning of the device: one split up to 256 positions.
const SPLIT: [Geometry; 22] = [
    (9, 3, 64, 301, 0),
    (9, 3, 64, 301, 1),
    (9, 3, 64, 301, 37),
    (9, 3, 64, 301, 255),
    (9, 3, 64, 301, 256),
    (9, 3, 64, 301, 300),
    (4, 2, 32, 64, 31),
    (4, 2, 32, 64, 32),
    (1, 1, 8, 40, 37),
    (1, 1, 64, 700, 600),
    (14, 2, 64, 150, 149),
    (2, 2, 80, 40, 37),
    (10, 1, 80, 290, 280),
    (2, 1, 96, 7, 6),
    (24, 8, 96, 40, 16),
    (3, 1, 128, 40, 39),
    (9, 1, 128, 300, 280),
    (10, 2, 128, 290, 289),
    (4, 2, 112, 33, 31),
    (1, 1, 256, 40, 33),
    (6, 1, 256, 290, 280),
    (2, 1, 192, 5, 3),
];

/// As many splits as the tuning says, of a tile or more: with 3 splits some warps have several
/// tiles, with 19 each split is one.
const TUNED: [(Geometry, Tuning); 5] = [
    ((6, 2, 64, 450, 444), tuning(3, 1)),
    ((7, 1, 96, 600, 577), tuning(4, 2)),
    ((6, 1, 128, 300, 299), tuning(19, 1)),
    ((5, 1, 128, 530, 520), tuning(2, 1)),
    ((4, 1, 256, 300, 270), tuning(9, 1)),
];

const LARGE: [Geometry; 7] = [
    (9, 3, 64, 8192, 8191),
    (12, 2, 128, 4096, 4000),
    (32, 8, 64, 2100, 2049),
    (16, 2, 128, 20_000, 19_990),
    (14, 2, 64, 9000, 8999),
    (8, 2, 256, 3000, 2998),
    (12, 2, 128, 40_000, 39_999),
];

const fn tuning(splits: u32, min_tiles: u32) -> Tuning {
    Tuning { splits, min_tiles }
}

/// With values of 8 bits.
const V8: [Geometry; 10] = [
    (9, 3, 64, 301, 0),
    (9, 3, 64, 301, 37),
    (9, 3, 64, 301, 300),
    (1, 1, 8, 40, 37),
    (10, 1, 80, 290, 280),
    (2, 1, 96, 7, 6),
    (24, 8, 96, 40, 16),
    (10, 2, 128, 290, 289),
    (9, 1, 128, 300, 280),
    (4, 2, 112, 33, 31),
];

const V8_LARGE: [Geometry; 3] = [
    (12, 2, 128, 4096, 4000),
    (14, 2, 64, 9000, 8999),
    (32, 8, 128, 5001, 5000),
];

/// How to launch.
#[derive(Clone, Copy, PartialEq)]
enum How {
    BlockAHead,
    Split(Option<Tuning>),
    /// Values of 8 bits.
    V8,
}

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = BLOCK_A_HEAD
        .map(|geometry| case(geometry, How::BlockAHead, None))
        .into();
    for (geometry, window) in BLOCK_A_HEAD_WINDOWS {
        cases.push(case(geometry, How::BlockAHead, Some(window)));
    }
    cases.extend(SPLIT.map(|geometry| case(geometry, How::Split(None), None)));
    cases.extend(V8.map(|geometry| case(geometry, How::V8, None)));
    cases.extend(TUNED.map(|(geometry, tuning)| case(geometry, How::Split(Some(tuning)), None)));
    for (geometry, window) in WINDOWS {
        cases.push(case(geometry, How::Split(None), Some(window)));
        cases.push(case(geometry, How::V8, Some(window)));
    }
    let (geometry, tuning) = TUNED[0];
    cases.push(case(geometry, How::Split(Some(tuning)), Some(100)));
    cases
}

pub fn large() -> Vec<Case> {
    let mut cases: Vec<Case> = LARGE
        .map(|geometry| case(geometry, How::Split(None), None))
        .into();
    cases.extend(V8_LARGE.map(|geometry| case(geometry, How::V8, None)));
    cases.push(case((9, 3, 64, 8192, 8000), How::BlockAHead, None));
    for how in [How::Split(None), How::V8] {
        cases.push(case((12, 2, 128, 20_000, 19_990), how, Some(4096)));
    }
    cases
}

fn case(geometry: Geometry, how: How, window: Option<usize>) -> Case {
    let (heads, kv_heads, head_dim, context, position) = geometry;
    let mut shape =
        format!("H={heads} KV={kv_heads} Dh={head_dim} S={context} position={position}");
    let kernel = match how {
        How::BlockAHead => "attention_decode_f16",
        How::Split(tuning) => {
            if let Some(Tuning { splits, min_tiles }) = tuning {
                shape.push_str(&format!(" splits={splits} min_tiles={min_tiles}"));
            }
            split::kernel(head_dim)
        }
        How::V8 => split::kernel_v8(head_dim),
    };
    if let Some(window) = window {
        shape.push_str(&format!(" window={window}"));
    }
    Case::new(kernel, shape, move |device| {
        attention(device, geometry, how, window)
    })
}

fn attention(
    device: &mut dyn Device,
    (heads, kv_heads, head_dim, context, position): Geometry,
    how: How,
    window: Option<usize>,
) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(10);
    let q = inputs.floats(heads * head_dim, 2.0);
    let elems = kv_heads * context * head_dim;
    let mut k_cache = inputs.halves(elems, 1.0);
    let mut v_cache = inputs.halves(elems, 1.0);
    let oldest = (position + 1).saturating_sub(window.unwrap_or(usize::MAX));
    for cache in [&mut k_cache, &mut v_cache] {
        for head in cache.chunks_exact_mut(context * head_dim) {
            head[..oldest * head_dim].fill(f16::NAN);
            head[(position + 1) * head_dim..].fill(f16::NAN);
        }
    }
    let mut v_levels: Vec<i8> = (0..elems).map(|_| inputs.u64() as i8).collect();
    let mut v_scales = inputs.halves(kv_heads * context, 0.02);
    // Any byte is a number, so what is past the position or the window has a scale that is none.
    for scales in v_scales.chunks_exact_mut(context) {
        scales[..oldest].fill(f16::NAN);
        scales[position + 1..].fill(f16::NAN);
    }
    for head in v_levels.chunks_exact_mut(context * head_dim) {
        head[(position + 1) * head_dim..].fill(127);
    }
    let scale = 1.0 / (head_dim as f32).sqrt();
    let shape = attention::Shape {
        heads,
        kv_heads,
        head_dim,
        context,
        scale,
        window,
    };
    let info = device.info();
    let got = same_twice(device, |device| {
        let tuning = match how {
            How::BlockAHead => None,
            How::Split(Some(tuning)) => Some(tuning),
            How::Split(None) | How::V8 => Some(Tuning::of(&info, &shape)),
        };
        let words = tuning.map_or(0, |tuning| tuning.scratch_bytes(&shape) as usize / 4);
        let partials = if words > 0 {
            device.put_u32(&vec![UNWRITTEN; words])?
        } else {
            DeviceSlice::NONE
        };
        let ops = attention::Operands {
            q: device.put_f32(&q)?,
            k_cache: device.put_f16(&k_cache)?,
            v_cache: match how {
                How::V8 => device.put_i8(&v_levels)?,
                _ => device.put_f16(&v_cache)?,
            },
            v_scales: match how {
                How::V8 => device.put_f16(&v_scales)?,
                _ => DeviceSlice::NONE,
            },
            state: device.put_u32(&[position as u32])?,
            out: device.uninit(q.len() as u64 * 4)?,
            partials,
        };
        let call = match tuning {
            None => block_a_head::plan(&info, &shape, &ops)?,
            Some(tuning) => split::plan(&info, &shape, &ops, tuning)?,
        };
        device.run(&call)?;
        // As a graph runs it again: the marks have to be back.
        device.run(&call)?;
        if words > 0 {
            for word in device.take_u32(partials)? {
                super::sample::equal("mark", word, UNWRITTEN)?;
            }
        }
        Ok(device.take_f32(ops.out)?)
    })?;
    let reference = AttentionShape {
        heads,
        kv_heads,
        head_dim,
        capacity: context,
        position,
        scale,
        window,
    };
    let mut want = vec![0.0; q.len()];
    if how == How::V8 {
        cpu_kernels::attention::reference_int8(
            &q, &k_cache, &v_levels, &v_scales, &mut want, &reference,
        );
    } else {
        cpu_kernels::attention::reference(&q, &k_cache, &v_cache, &mut want, &reference);
    }
    let bound = match how {
        How::BlockAHead => SOFTMAX,
        How::Split(_) | How::V8 => MATRIX_SOFTMAX,
    };
    within(&got, &want, bound)
}
