//! Rows of the INT4 product of a token on the matrix units: bare, fused, chosen tilings.

use engine::Error;
use gpu_kernels::launch::{Call, DeviceInfo, DeviceSlice};
use gpu_kernels::linear::gemv_int4_mma;

use crate::models::Product;

use super::{Operands, Row, floats, halves, noise, planned};

/// A product on the matrix units, with what surrounds it.
#[derive(Debug, Clone, Copy)]
pub struct Tiled {
    /// Dimensions and what becomes of the product.
    pub shape: gemv_int4_mma::Shape,
    /// Whether the format has minima.
    pub mins: bool,
    /// Whether there is a norm in front.
    pub norm: bool,
    /// Another tiling than the engine's choice.
    pub tiling: Option<gemv_int4_mma::Tiling>,
}

impl Tiled {
    /// The bare product of one token, scales only.
    pub fn plain(rows: usize, cols: usize, group: usize) -> Tiled {
        Tiled {
            shape: gemv_int4_mma::Shape::plain(rows, cols, group),
            mins: false,
            norm: false,
            tiling: None,
        }
    }
}

impl Tiled {
    /// A product of a decoder layer.
    pub fn of(product: &Product, group: usize, mins: bool) -> Tiled {
        let mut tiled = Tiled::plain(product.rows, product.cols, group);
        tiled.shape.epilogue = product.epilogue;
        tiled.shape.half_x = product.half_x;
        tiled.shape.half_y = product.half_y;
        tiled.norm = product.norm;
        tiled.mins = mins;
        tiled
    }

    /// Entry of the kernel.
    pub fn kernel(&self) -> &'static str {
        let shape = &self.shape;
        gemv_int4_mma::entry(shape.group, self.mins, shape.half_x)
    }
}

/// What a decoder layer of Qwen2.5-1.5B makes of the kernel.
pub(super) fn fused_int4() -> Vec<Row> {
    use gemv_int4_mma::Epilogue;
    let of = |n, k, norm, epilogue| {
        let mut product = Tiled::plain(n, k, 128);
        product.norm = norm;
        product.shape.epilogue = epilogue;
        gemv_int4_mma(&product)
    };
    let mut rows = vec![
        of(2048, 1536, true, Epilogue::Store),
        of(1536, 1536, false, Epilogue::Add),
        of(8960, 1536, true, Epilogue::SwiGlu),
        of(1536, 8960, false, Epilogue::Add),
    ];
    // What the engine runs: the gated activations are halves.
    for (n, k, epilogue) in [
        (8960, 1536, Epilogue::Store),
        (1536, 8960, Epilogue::Store),
        (1536, 8960, Epilogue::Add),
    ] {
        let mut product = Tiled::plain(n, k, 128);
        product.shape.epilogue = epilogue;
        product.shape.half_x = true;
        rows.push(gemv_int4_mma(&product));
    }
    // Every format.
    for (group, mins) in [
        (32, false),
        (32, true),
        (64, false),
        (64, true),
        (128, true),
    ] {
        let mut product = Tiled::plain(8960, 1536, group);
        product.mins = mins;
        rows.push(gemv_int4_mma(&product));
        let mut product = Tiled::plain(1536, 8960, group);
        product.mins = mins;
        product.shape.half_x = true;
        rows.push(gemv_int4_mma(&product));
    }
    rows
}

/// The product on the matrix units.
pub fn gemv_int4_mma(product: &Tiled) -> Row {
    use gemv_int4_mma::Epilogue;
    let product = *product;
    let Tiled {
        shape,
        mins,
        norm,
        tiling,
    } = product;
    let (rows, cols) = (shape.rows, shape.cols);
    let matrix_rows = match shape.epilogue {
        Epilogue::SwiGlu => 2 * rows,
        Epilogue::Store | Epilogue::Add => rows,
    };
    let groups = matrix_rows * cols.div_ceil(shape.group) * if mins { 2 } else { 1 };
    let elem = |half| if half { 2 } else { 4 };
    let vectors =
        rows * elem(shape.half_y) + cols * elem(shape.half_x) + if norm { 4 * cols } else { 0 };
    let mut text = format!("{rows} x {cols} group {}", shape.group);
    for (what, on) in [
        (" minima", mins),
        (" half", shape.half_x),
        (" norm", norm),
        (" add", shape.epilogue == Epilogue::Add),
        (" swiglu", shape.epilogue == Epilogue::SwiGlu),
    ] {
        text.push_str(if on { what } else { "" });
    }
    if let Some(tiling) = tiling {
        text.push_str(&format!(
            " tiling {}/{}/{}",
            tiling.split, tiling.teams, tiling.blocks
        ));
    }
    Row {
        kernel: product.kernel(),
        shape: text,
        bytes: (matrix_rows * cols / 2 + 2 * groups + vectors) as u64,
        streams: true,
        make: Box::new(move |device, memory| {
            let operands = tiled_operands(&product, memory)?;
            let tiling = tiling.unwrap_or_else(|| {
                let rule = || gemv_int4_mma::rule(device, &shape);
                let tuned = memory.tuned();
                tuned
                    .choose(product.kernel(), &shape.name(norm), rule)
                    .launch
            });
            planned(gemv_int4_mma::plan(device, &shape, &operands, Some(tiling)))
        }),
    }
}

/// Calls of the product in several tilings, all of the same operands.
///
/// # Errors
/// No memory, or a tiling that the kernel does not take.
pub fn gemv_int4_mma_in(
    product: &Tiled,
    tilings: &[gemv_int4_mma::Tiling],
    device: &DeviceInfo,
    memory: &mut dyn Operands,
) -> Result<Vec<Call>, Error> {
    let operands = tiled_operands(product, memory)?;
    tilings
        .iter()
        .map(|tiling| {
            planned(gemv_int4_mma::plan(
                device,
                &product.shape,
                &operands,
                Some(*tiling),
            ))
        })
        .collect()
}

fn tiled_operands(
    product: &Tiled,
    memory: &mut dyn Operands,
) -> Result<gemv_int4_mma::Operands, Error> {
    let gemv_int4_mma::Shape {
        rows,
        cols,
        group,
        epilogue,
        ..
    } = product.shape;
    // Whole tiles: 16 rows (of y 8, with SwiGLU) by 128 columns.
    let tile_outputs = match epilogue {
        gemv_int4_mma::Epilogue::SwiGlu => 8,
        gemv_int4_mma::Epilogue::Store | gemv_int4_mma::Epilogue::Add => 16,
    };
    let tiles = rows.div_ceil(tile_outputs) * cols.div_ceil(128);
    let groups = tiles * 16 * 128 / group;
    Ok(gemv_int4_mma::Operands {
        quants: noise(memory, tiles * 1024)?,
        scales: halves(memory, groups)?,
        mins: if product.mins {
            halves(memory, groups)?
        } else {
            DeviceSlice::NONE
        },
        zeros: false,
        bias: DeviceSlice::NONE,
        x: if product.shape.half_x {
            halves(memory, cols)?
        } else {
            floats(memory, cols)?
        },
        gain: if product.norm {
            floats(memory, cols)?
        } else {
            DeviceSlice::NONE
        },
        y: floats(memory, rows)?,
    })
}
