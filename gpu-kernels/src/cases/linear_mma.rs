//! The INT4 products of a token on the matrix units: formats, what comes before and after.

use half::f16;
use models::quant::{Int4Matrix, Int4Tiled};

use super::{Buffers, Case, CaseError, Device, Inputs, same_twice, within_of};
use crate::launch::DeviceSlice;
use crate::linear::gemv_int4_mma::{Epilogue, Operands, Shape, Tiling, entry, plan};

/// Activations become halves on the way: half a unit in the eleventh bit.
const ROUNDED_X: f64 = 2e-3;
/// Activations that are halves already: what is left are the sums of `1024 + q`.
const EXACT_X: f64 = 3e-4;
/// Size of a result: weights of `Inputs` are about `1 / sqrt(K)` and activations about 1.
const TYPICAL: f64 = 1.0;
const EPS: f32 = 1e-6;

/// One product and what surrounds it.
#[derive(Debug, Clone, Copy)]
struct Product {
    rows: usize,
    cols: usize,
    group: usize,
    mins: bool,
    /// The minima are zeros.
    zeros: bool,
    bias: bool,
    norm: bool,
    epilogue: Epilogue,
    /// Activations that halves hold exactly.
    exact_x: bool,
    /// Halves in, halves out.
    half_x: bool,
    half_y: bool,
    /// Split, teams, blocks; the rule's if none.
    tiling: Option<[u32; 3]>,
}

impl Product {
    fn new(rows: usize, cols: usize, group: usize, mins: bool) -> Product {
        Product {
            rows,
            cols,
            group,
            mins,
            zeros: false,
            bias: false,
            norm: false,
            epilogue: Epilogue::Store,
            exact_x: true,
            half_x: false,
            half_y: false,
            tiling: None,
        }
    }

    fn with_bias(self) -> Product {
        Product { bias: true, ..self }
    }

    fn with_norm(self) -> Product {
        let exact_x = false;
        Product {
            norm: true,
            exact_x,
            ..self
        }
    }

    fn with_zeros(self) -> Product {
        let zeros = true;
        Product { zeros, ..self }
    }

    fn rounded(self) -> Product {
        let exact_x = false;
        Product { exact_x, ..self }
    }

    fn halves(self, half_x: bool, half_y: bool) -> Product {
        Product {
            half_x,
            half_y,
            ..self
        }
    }

    fn then(self, epilogue: Epilogue) -> Product {
        Product { epilogue, ..self }
    }

    fn tiled(self, split: u32, teams: u32, blocks: u32) -> Product {
        let tiling = Some([split, teams, blocks]);
        Product { tiling, ..self }
    }

    fn case(self) -> Case {
        let kernel = entry(self.group, self.mins, self.half_x);
        let mut shape = format!("N={} K={}", self.rows, self.cols);
        for (text, on) in [
            ("f32", !self.exact_x && !self.norm),
            ("zeros", self.zeros),
            ("norm", self.norm),
            ("half x", self.half_x),
            ("half y", self.half_y),
            ("bias", self.bias),
            ("add", self.epilogue == Epilogue::Add),
            ("swiglu", self.epilogue == Epilogue::SwiGlu),
        ] {
            if on {
                shape.push(' ');
                shape.push_str(text);
            }
        }
        if let Some([split, teams, blocks]) = self.tiling {
            shape.push_str(&format!(" tiling {split}/{teams}/{blocks}"));
        }
        Case::new(kernel, shape, move |device| run(device, self))
    }
}

pub fn cases() -> Vec<Case> {
    let mut products = Vec::new();
    for group in [32, 64, 128] {
        for mins in [false, true] {
            let of = |rows, cols| Product::new(rows, cols, group, mins);
            products.extend([
                // Short last groups and tiles, a single row, rows that fill no tile.
                of(1, 576),
                of(41, 160).with_bias(),
                of(193, 1120),
                of(41, 576).halves(true, false),
                of(7, 160).halves(true, false).with_bias(),
                of(193, 1120).halves(true, true).with_bias(),
            ]);
        }
    }
    for group in [32, 64, 128] {
        let of = |rows, cols| Product::new(rows, cols, group, true).with_zeros();
        products.extend([
            of(41, 576).with_bias(),
            of(41, 1120).halves(true, false),
            of(40, 160).then(Epilogue::SwiGlu).with_norm(),
        ]);
    }
    let plain = |rows, cols| Product::new(rows, cols, 64, true);
    products.extend([
        plain(193, 576).rounded(),
        // Several rounds of one block, a warp by itself, more warps than tiles along K.
        plain(193, 576).tiled(2, 3, 2),
        plain(200, 576).tiled(1, 4, 3),
        plain(40, 160).tiled(3, 1, 1),
        // Many tiles a warp.
        plain(17, 4640).tiled(4, 1, 2),
        // Chunks of x.
        plain(20, 24_576),
        // What comes before and after.
        plain(41, 576).with_norm(),
        plain(17, 4640).with_norm().tiled(2, 1, 2),
        plain(193, 576).then(Epilogue::Add),
        plain(193, 160).then(Epilogue::Add).with_bias(),
        plain(1, 160).then(Epilogue::SwiGlu),
        plain(193, 576).then(Epilogue::SwiGlu).tiled(2, 2, 3),
        plain(100, 576).then(Epilogue::SwiGlu).with_norm(),
        plain(100, 576)
            .then(Epilogue::SwiGlu)
            .with_norm()
            .halves(false, true),
        plain(193, 4640).then(Epilogue::Add).halves(true, false),
        // Blocks without work, several batches of x.
        plain(40, 160).tiled(2, 1, 5),
        plain(17, 4640).halves(true, false).tiled(1, 1, 3),
    ]);
    products.into_iter().map(Product::case).collect()
}

pub fn large() -> Vec<Case> {
    let of = |rows, cols, group, mins| Product::new(rows, cols, group, mins).rounded();
    let products = vec![
        of(1536, 1536, 128, false),
        of(1536, 1536, 32, true).with_bias().with_norm(),
        of(8960, 1536, 128, false),
        of(8960, 1536, 128, false)
            .with_norm()
            .then(Epilogue::SwiGlu),
        of(1536, 8960, 128, false),
        of(1536, 8960, 64, true).then(Epilogue::Add),
        Product::new(1536, 8960, 128, false)
            .then(Epilogue::Add)
            .halves(true, false),
        Product::new(4096, 14_336, 32, true).halves(true, true),
        of(4096, 4096, 128, false),
        of(4096, 14_336, 128, false),
        of(14_336, 4096, 128, false),
        of(1536, 576, 32, true),
        of(576, 1536, 32, true),
        of(49_152, 576, 32, true),
    ];
    products.into_iter().map(Product::case).collect()
}

/// The reference's y; `y` is what was there before.
fn reference(product: Product, w: &[Int4Matrix], bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    let of = |w: &Int4Matrix, bias: Option<&[f32]>| {
        let mut out = vec![0.0; product.rows];
        cpu_kernels::linear::int4::reference(w, bias, x, &mut out);
        out
    };
    let first = of(&w[0], bias);
    match product.epilogue {
        Epilogue::Store => y.copy_from_slice(&first),
        Epilogue::Add => y.iter_mut().zip(first).for_each(|(y, sum)| *y += sum),
        Epilogue::SwiGlu => cpu_kernels::swiglu::reference(&first, &of(&w[1], None), y),
    }
}

fn run(device: &mut dyn Device, product: Product) -> Result<f64, CaseError> {
    let Product {
        rows,
        cols,
        group,
        mins,
        ..
    } = product;
    let mut inputs = Inputs::new(17);
    let matrices = if product.epilogue == Epilogue::SwiGlu {
        2
    } else {
        1
    };
    let w: Vec<Int4Matrix> = (0..matrices)
        .map(|_| match product.zeros {
            true => inputs.int4_zeros(rows, cols, group),
            false => inputs.int4(rows, cols, group, mins),
        })
        .collect();
    let tiled = match &w[..] {
        [gate, up] => Int4Tiled::pack_gate_up(gate, up),
        _ => Int4Tiled::pack(&[&w[0]]),
    }
    .map_err(|error| super::DeviceError(error.to_string()))?;
    let bias = product.bias.then(|| inputs.floats(rows, 1.0));
    let gain = product.norm.then(|| inputs.floats(cols, 1.0));
    let mut x = inputs.floats(cols, 1.0);
    if product.exact_x {
        x.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32());
    }
    let before = inputs.floats(rows, 1.0);
    let got = same_twice(device, |device| {
        let ops = Operands {
            quants: device.put_u32(&tiled.quants)?,
            scales: device.put_f16(&tiled.scales)?,
            mins: match &tiled.mins {
                Some(mins) => device.put_f16(mins)?,
                None => DeviceSlice::NONE,
            },
            zeros: tiled.zeros,
            bias: optional(device, bias.as_deref())?,
            x: if product.half_x {
                let halves: Vec<f16> = x.iter().map(|x| f16::from_f32(*x)).collect();
                device.put_f16(&halves)?
            } else {
                device.put_f32(&x)?
            },
            gain: optional(device, gain.as_deref())?,
            y: if product.epilogue == Epilogue::Add {
                device.put_f32(&before)?
            } else {
                device.uninit(rows as u64 * if product.half_y { 2 } else { 4 })?
            },
        };
        let shape = Shape {
            rows,
            cols,
            group,
            epilogue: product.epilogue,
            eps: EPS,
            half_x: product.half_x,
            half_y: product.half_y,
        };
        let tiling = product.tiling.map(|[split, teams, blocks]| Tiling {
            split,
            teams,
            blocks,
        });
        device.run(&plan(&device.info(), &shape, &ops, tiling)?)?;
        if product.half_y {
            let halves = device.take_f16(ops.y)?;
            return Ok(halves.into_iter().map(f16::to_f32).collect());
        }
        Ok(device.take_f32(ops.y)?)
    })?;
    if let Some(gain) = &gain {
        let mut normed = vec![0.0; x.len()];
        cpu_kernels::rmsnorm::reference(&x, gain, EPS, &mut normed);
        x = normed;
    }
    let mut want = before;
    reference(product, &w, bias.as_deref(), &x, &mut want);
    let exact = product.exact_x && !product.half_y;
    let bound = if exact { EXACT_X } else { ROUNDED_X };
    within_of(&got, &want, TYPICAL, bound)
}

fn optional(device: &mut dyn Device, values: Option<&[f32]>) -> Result<DeviceSlice, CaseError> {
    Ok(match values {
        Some(values) => device.put_f32(values)?,
        None => DeviceSlice::NONE,
    })
}

#[cfg(test)]
mod tests {
    use super::super::EmulatorDevice;
    use crate::launch::DeviceInfo;

    /// The other emulator tests stand for a T4, which takes a product in two halves.
    #[test]
    fn every_case_with_whole_products() {
        let info = DeviceInfo {
            compute_capability: 80,
            multiprocessors: 108,
            ..DeviceInfo::T4
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
