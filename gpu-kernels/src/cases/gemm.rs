//! The INT4 products of many tokens: formats, tiles of tokens, parts of K, what comes after.

use models::quant::{Int4Matrix, Int4Tiled};

use super::{
    Buffers, Case, CaseError, Device, Inputs, compared, rows_of, same_twice, to_floats, within_of,
};
use crate::launch::DeviceSlice;
use crate::linear::gemm_int4::{Operands, Shape, Tiling, entry, plan};
use crate::linear::gemv_int4_mma::Epilogue;

/// Weights become halves: half a unit in the eleventh bit, at random.
const ROUNDED_WEIGHTS: f64 = 5e-4;
/// And so does y.
const ROUNDED_Y: f64 = 7e-4;
/// Size of a result: weights of `Inputs` are about `1 / sqrt(K)` and activations about 1.
const TYPICAL: f64 = 1.0;

/// One product and what comes after it.
#[derive(Debug, Clone, Copy)]
struct Product {
    shape: Shape,
    mins: bool,
    zeros: bool,
    bias: bool,
    tiling: Tiling,
}

impl Product {
    fn new(shape: Shape, mins: bool, tokens: u32, parts: u32) -> Product {
        Product {
            shape,
            mins,
            zeros: false,
            bias: false,
            tiling: Tiling {
                rows: 128,
                tokens,
                parts,
            },
        }
    }

    /// By warpgroups, blocks of this many rows and tokens.
    fn by_warpgroups(shape: Shape, mins: bool, [rows, tokens]: [u32; 2], parts: u32) -> Product {
        let mut product = Product::new(shape, mins, tokens, parts);
        product.tiling.rows = rows;
        product
    }

    fn with_bias(self) -> Product {
        Product { bias: true, ..self }
    }

    /// Zeros in the place of minima.
    fn with_zeros(self) -> Product {
        Product {
            mins: true,
            zeros: true,
            ..self
        }
    }

    fn then(mut self, epilogue: Epilogue) -> Product {
        self.shape.epilogue = epilogue;
        self
    }

    fn to_halves(mut self) -> Product {
        self.shape.half_y = true;
        self
    }

    fn case(self) -> Case {
        let Shape {
            rows,
            cols,
            group,
            tokens,
            epilogue,
            half_y,
        } = self.shape;
        let mut shape = format!("T={tokens} N={rows} K={cols} group {group}");
        for (text, on) in [
            ("min", self.mins && !self.zeros),
            ("zeros", self.zeros),
            ("half y", half_y),
            ("bias", self.bias),
            ("add", epilogue == Epilogue::Add),
            ("swiglu", epilogue == Epilogue::SwiGlu),
        ] {
            if on {
                shape.push(' ');
                shape.push_str(text);
            }
        }
        shape.push_str(&format!(" parts {}", self.tiling.parts));
        Case::new(entry(&self.tiling, self.mins), shape, move |device| {
            run(device, self)
        })
    }
}

/// Rows, columns and tokens that fill no tile.
fn of(rows: usize, cols: usize, group: usize, tokens: usize) -> Shape {
    Shape::plain(rows, cols, group, tokens)
}

pub fn cases() -> Vec<Case> {
    let mut products = Vec::new();
    for group in [32, 64, 128] {
        for mins in [false, true] {
            products.extend([
                Product::new(of(41, 160, group, 3), mins, 8, 1).with_bias(),
                Product::new(of(20, 576, group, 21), mins, 16, 2),
            ]);
        }
    }
    products.extend([
        Product::new(of(33, 288, 32, 7), true, 8, 1).with_zeros(),
        Product::new(of(48, 160, 128, 20), true, 32, 1).with_zeros(),
        Product::new(of(20, 160, 64, 70), true, 64, 1).with_zeros(),
        // A token, a row; blocks without a full tile; all the parts that there are.
        Product::new(of(1, 32, 32, 1), true, 8, 1),
        Product::new(of(150, 1120, 128, 8), false, 8, 9),
        Product::new(of(17, 1312, 64, 9), true, 8, 1),
        Product::new(of(130, 288, 64, 16), true, 16, 3).with_bias(),
        Product::new(of(41, 416, 32, 33), true, 32, 1).with_bias(),
        Product::new(of(136, 288, 128, 27), false, 32, 2),
        Product::new(of(9, 1120, 64, 5), true, 32, 1).then(Epilogue::Add),
        Product::new(of(70, 96, 32, 65), false, 64, 1).then(Epilogue::SwiGlu),
        Product::new(of(41, 576, 64, 40), true, 64, 4).then(Epilogue::Add),
        Product::new(of(20, 288, 128, 64), false, 64, 1).with_bias(),
        Product::new(of(30, 416, 64, 130), true, 64, 1).then(Epilogue::SwiGlu),
        Product::new(of(40, 288, 128, 120), false, 64, 2)
            .then(Epilogue::Add)
            .with_bias(),
        Product::new(of(17, 160, 32, 100), true, 64, 1).to_halves(),
        Product::new(of(13, 288, 128, 6), true, 8, 2)
            .then(Epilogue::SwiGlu)
            .to_halves(),
    ]);
    for tile in [[128, 128], [256, 128]] {
        let product = |shape, mins, parts| Product::by_warpgroups(shape, mins, tile, parts);
        products.extend([
            product(of(41, 160, 32, 3), false, 1).with_bias(),
            product(of(300, 160, 128, 130), false, 1).then(Epilogue::Add),
            product(of(70, 1120, 64, 90), false, 3).with_bias(),
            product(of(130, 96, 128, 200), false, 1)
                .then(Epilogue::SwiGlu)
                .to_halves(),
            product(of(1, 32, 128, 1), false, 1),
            // On few multiprocessors: whole tiles, and one or two that are split.
            product(of(700, 288, 128, 130), false, 2),
            product(of(41, 416, 64, 128), true, 2),
            product(of(20, 160, 32, 70), true, 1)
                .with_zeros()
                .to_halves(),
            product(of(270, 288, 128, 33), true, 1).with_bias(),
        ]);
    }
    products.into_iter().map(Product::case).collect()
}

pub fn large() -> Vec<Case> {
    let of = |rows, cols, tokens, tile, parts| {
        Product::new(Shape::plain(rows, cols, 128, tokens), false, tile, parts)
    };
    let by_warpgroups = |rows, cols, tokens, tile, parts| {
        let shape = Shape::plain(rows, cols, 128, tokens);
        Product::by_warpgroups(shape, false, tile, parts)
    };
    [
        by_warpgroups(4096, 4096, 128, [128, 128], 4),
        by_warpgroups(1536, 8960, 200, [256, 128], 10),
        by_warpgroups(8960, 1536, 513, [256, 128], 1)
            .then(Epilogue::SwiGlu)
            .to_halves(),
        by_warpgroups(2048, 1536, 1000, [128, 128], 2).with_bias(),
        by_warpgroups(1536, 1536, 300, [128, 128], 1).then(Epilogue::Add),
        of(1536, 8960, 8, 8, 11),
        of(2048, 1536, 16, 16, 6).with_bias(),
        of(8960, 1536, 30, 32, 1).then(Epilogue::SwiGlu).to_halves(),
        of(1536, 8960, 64, 64, 10).then(Epilogue::Add),
        of(4096, 4096, 128, 64, 4),
        of(2048, 1536, 513, 64, 1).with_bias(),
        of(1536, 1536, 300, 64, 2).then(Epilogue::Add),
    ]
    .into_iter()
    .map(Product::case)
    .collect()
}

/// The reference's y; `y` is what was there before.
fn reference(product: Product, w: &[Int4Matrix], bias: Option<&[f32]>, x: &[f32], y: &mut [f32]) {
    let of = |w: &Int4Matrix, bias: Option<&[f32]>| {
        let mut out = vec![0.0; y.len()];
        cpu_kernels::linear::int4::reference(w, bias, x, &mut out);
        out
    };
    let first = of(&w[0], bias);
    match product.shape.epilogue {
        Epilogue::Store => y.copy_from_slice(&first),
        Epilogue::Add => y.iter_mut().zip(first).for_each(|(y, sum)| *y += sum),
        Epilogue::SwiGlu => {
            let up = of(&w[1], None);
            cpu_kernels::swiglu::reference(&first, &up, y);
        }
    }
}

fn run(device: &mut dyn Device, product: Product) -> Result<f64, CaseError> {
    let Shape {
        rows,
        cols,
        group,
        tokens,
        epilogue,
        half_y,
    } = product.shape;
    let mut inputs = Inputs::new(23);
    let matrices = if epilogue == Epilogue::SwiGlu { 2 } else { 1 };
    let w: Vec<Int4Matrix> = (0..matrices)
        .map(|_| match product.zeros {
            true => inputs.int4_zeros(rows, cols, group),
            false => inputs.int4(rows, cols, group, product.mins),
        })
        .collect();
    let tiled = match &w[..] {
        [gate, up] => Int4Tiled::pack_gate_up(gate, up),
        _ => Int4Tiled::pack(&[&w[0]]),
    }
    .map_err(|error| super::DeviceError(error.to_string()))?;
    let bias = product.bias.then(|| inputs.floats(rows, 1.0));
    let halves = inputs.halves(tokens * cols, 1.0);
    let before = inputs.floats(tokens * rows, 1.0);
    let scratch_bytes = product.tiling.scratch_bytes(&device.info(), &product.shape) as usize;
    let got = same_twice(device, |device| {
        let ops = Operands {
            quants: device.put_u32(&tiled.quants)?,
            scales: device.put_f16(&tiled.scales)?,
            mins: match &tiled.mins {
                Some(mins) => device.put_f16(mins)?,
                None => DeviceSlice::NONE,
            },
            zeros: product.zeros,
            bias: match &bias {
                Some(bias) => device.put_f32(bias)?,
                None => DeviceSlice::NONE,
            },
            x: device.put_f16(&halves)?,
            y: if epilogue == Epilogue::Add {
                device.put_f32(&before)?
            } else {
                device.uninit((tokens * rows) as u64 * if half_y { 2 } else { 4 })?
            },
            scratch: match scratch_bytes {
                0 => DeviceSlice::NONE,
                bytes => device.upload(&vec![0; bytes])?,
            },
        };
        let call = plan(&device.info(), &product.shape, &ops, Some(product.tiling))?;
        device.run(&call)?;
        if half_y {
            return Ok(to_floats(device.take_f16(ops.y)?));
        }
        Ok(device.take_f32(ops.y)?)
    })?;
    let compared = compared(tokens);
    let x = to_floats(rows_of(&halves, cols, &compared));
    let mut want = rows_of(&before, rows, &compared);
    reference(product, &w, bias.as_deref(), &x, &mut want);
    let got = rows_of(&got, rows, &compared);
    let bound = if half_y { ROUNDED_Y } else { ROUNDED_WEIGHTS };
    within_of(&got, &want, TYPICAL, bound)
}

#[cfg(test)]
mod tests {
    use super::super::EmulatorDevice;
    use crate::launch::DeviceInfo;

    /// A device with the shared memory of its generation and products of the whole depth.
    #[test]
    fn every_case_with_whole_products() {
        let info = DeviceInfo {
            compute_capability: 80,
            warpgroup_products: false,
            multiprocessors: 108,
            shared_bytes_per_block: 163 * 1024,
        };
        let cases = super::cases().into_iter();
        for case in cases.filter(|case| case.runs_on(&info)) {
            let mut device = EmulatorDevice::new(info, None);
            match (case.run)(&mut device) {
                Ok(error) => println!("{}: relative error {error:.1e}", case.name),
                Err(error) => panic!("{}: {error}", case.name),
            }
        }
    }
}
