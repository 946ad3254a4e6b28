//! INT4 products of q, k and v that are turned and appended.

use half::f16;
use models::quant::{Int4Matrix, Int4Tiled};

use super::{Buffers, Case, CaseError, Device, Inputs, same_twice, within_of};
use crate::launch::DeviceSlice;
use crate::linear::gemv_int4_mma::{
    Heads, HeadsOperands, Operands, Shape, Tiling, entry_heads, plan_heads,
};

/// Activations become halves on the way, and what goes to the cache too.
const ROUNDED: f64 = 2e-3;
/// Size of a result: see `linear_mma`.
const TYPICAL: f64 = 1.0;
const EPS: f32 = 1e-6;
const POSITION: usize = 2;
const CONTEXT: usize = 4;

/// A product and its heads.
#[derive(Debug, Clone, Copy)]
struct Product {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    cols: usize,
    group: usize,
    mins: bool,
    bias: bool,
    norm: bool,
    /// Split, teams, blocks; the rule's if none.
    tiling: Option<[u32; 3]>,
}

impl Product {
    fn case(self) -> Case {
        let kernel = entry_heads(self.group, self.mins);
        let mut shape = format!(
            "heads={}/{} Dh={} K={}",
            self.heads, self.kv_heads, self.head_dim, self.cols
        );
        for (text, on) in [(" bias", self.bias), (" norm", self.norm)] {
            shape.push_str(if on { text } else { "" });
        }
        if let Some([split, teams, blocks]) = self.tiling {
            shape.push_str(&format!(" tiling {split}/{teams}/{blocks}"));
        }
        Case::new(kernel, shape, move |device| run(device, self))
    }
}

fn of(heads: [usize; 3], cols: usize, group: usize, mins: bool) -> Product {
    let [heads, kv_heads, head_dim] = heads;
    Product {
        heads,
        kv_heads,
        head_dim,
        cols,
        group,
        mins,
        bias: true,
        norm: true,
        tiling: None,
    }
}

pub fn cases() -> Vec<Case> {
    let mut products = Vec::new();
    for group in [32, 64, 128] {
        for mins in [false, true] {
            products.extend([
                of([3, 1, 64], 576, group, mins),
                of([2, 2, 48], 160, group, mins),
                Product {
                    bias: false,
                    norm: false,
                    ..of([1, 1, 16], 1120, group, mins)
                },
            ]);
        }
    }
    let tiled = |tiling| Product {
        tiling: Some(tiling),
        ..of([5, 1, 80], 576, 64, true)
    };
    products.extend([tiled([2, 3, 2]), tiled([1, 4, 3]), tiled([3, 1, 50])]);
    products.into_iter().map(Product::case).collect()
}

pub fn large() -> Vec<Case> {
    [
        of([12, 2, 128], 1536, 128, false),
        of([32, 8, 64], 2048, 32, true),
    ]
    .into_iter()
    .map(Product::case)
    .collect()
}

fn run(device: &mut dyn Device, product: Product) -> Result<f64, CaseError> {
    let Product {
        heads,
        kv_heads,
        head_dim,
        cols,
        group,
        mins,
        ..
    } = product;
    let mut inputs = Inputs::new(23);
    let counts = [heads, kv_heads, kv_heads].map(|heads| heads * head_dim);
    let w = counts.map(|rows| inputs.int4(rows, cols, group, mins));
    let matrices: Vec<&Int4Matrix> = w.iter().collect();
    let tiled = Int4Tiled::pack_heads(&matrices, head_dim)
        .map_err(|error| super::DeviceError(error.to_string()))?;
    let rows = counts.iter().sum();
    let bias = product.bias.then(|| inputs.floats(rows, 1.0));
    let gain = product.norm.then(|| inputs.floats(cols, 1.0));
    let mut x = inputs.floats(cols, 1.0);
    let angles = inputs.floats(CONTEXT * head_dim / 2, 2.0);
    let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
    let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
    let before = inputs.halves(kv_heads * CONTEXT * head_dim, 1.0);
    let got = same_twice(device, |device| {
        let optional = |device: &mut dyn Device, values: Option<&[f32]>| match values {
            Some(values) => device.put_f32(values),
            None => Ok(DeviceSlice::NONE),
        };
        let ops = Operands {
            quants: device.put_u32(&tiled.quants)?,
            scales: device.put_f16(&tiled.scales)?,
            mins: match &tiled.mins {
                Some(mins) => device.put_f16(mins)?,
                None => DeviceSlice::NONE,
            },
            zeros: tiled.zeros,
            bias: optional(device, bias.as_deref())?,
            x: device.put_f32(&x)?,
            gain: optional(device, gain.as_deref())?,
            y: device.uninit(4 * counts[0] as u64)?,
        };
        let of_heads = HeadsOperands {
            cos: device.put_f32(&cos)?,
            sin: device.put_f32(&sin)?,
            k_cache: device.put_f16(&before)?,
            v_cache: device.put_f16(&before)?,
            state: device.put_u32(&[POSITION as u32])?,
        };
        let shape = Shape {
            eps: EPS,
            ..Shape::plain(rows, cols, group)
        };
        let of = Heads {
            heads,
            kv_heads,
            head_dim,
            context: CONTEXT,
        };
        let tiling = product.tiling.map(|[split, teams, blocks]| Tiling {
            split,
            teams,
            blocks,
        });
        let info = device.info();
        device.run(&plan_heads(&info, &shape, &of, &ops, &of_heads, tiling)?)?;
        let mut all = device.take_f32(ops.y)?;
        for cache in [of_heads.k_cache, of_heads.v_cache] {
            all.extend(device.take_f16(cache)?.into_iter().map(f16::to_f32));
        }
        Ok(all)
    })?;
    if let Some(gain) = &gain {
        let mut normed = vec![0.0; x.len()];
        cpu_kernels::rmsnorm::reference(&x, gain, EPS, &mut normed);
        x = normed;
    }
    let mut first = 0;
    let [mut q, k, v] = [0, 1, 2].map(|i| {
        let mut y = vec![0.0; counts[i]];
        let bias = bias.as_ref().map(|b| &b[first..first + counts[i]]);
        first += counts[i];
        cpu_kernels::linear::int4::reference(&w[i], bias, &x, &mut y);
        y
    });
    let (mut keys, mut values) = (before.clone(), before);
    cpu_kernels::rope_kv_append::reference(
        cpu_kernels::rope_kv_append::Shape {
            heads,
            kv_heads,
            head_dim,
            capacity: CONTEXT,
        },
        &mut q,
        [&k, &v],
        [&cos, &sin],
        [&mut keys, &mut values],
        POSITION,
    );
    q.extend(keys.into_iter().chain(values).map(f16::to_f32));
    within_of(&got, &q, TYPICAL, ROUNDED)
}

#[cfg(test)]
mod tests {
    use super::super::EmulatorDevice;
    use crate::launch::DeviceInfo;

    #[test]
    fn every_case_with_whole_products() {
        let info = DeviceInfo {
            compute_capability: 80,
            ..DeviceInfo::T4
        };
        for case in super::cases() {
            let mut device = EmulatorDevice::new(info, Some(3));
            if let Err(error) = (case.run)(&mut device) {
                panic!("{}: {error}", case.name);
            }
        }
    }
}
