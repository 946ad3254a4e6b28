//! Tensors of a model file -> the form that kernels read.
//!
//! | use | source | becomes |
//! |---|---|---|
//! | linear | F16, BF16, F32 | F16: kept, kept where f16 has the range, rounded to 11 bits |
//! | linear | Q4_0, Q4_1 | INT4 group 32, bit for bit |
//! | linear | Q4_K | INT4 group 32: levels kept, scale and minimum rounded to f16 |
//! | linear | Q8_0 | INT8 group 32, bit for bit |
//! | linear | Q5_0 | INT8 group 32, exact (levels -16 to 15) |
//! | linear | Q5_1, Q5_K, Q6_K | INT8 group 32, rounded |
//! | linear | TQ1_0, TQ2_0 | ternary group 256, exact |
//! | linear | I2_S | ternary, a scale a row, exact |
//! | linear | AWQ, GPTQ | INT4 with zeros, or symmetric where all zeros are 8; exact |
//! | linear | BitNet: packed, or floats to round | ternary, a scale a row |
//! | embedding, output | Q8_0 | INT8 group 32, bit for bit |
//! | embedding, output | Q4_0, Q5_0 | INT8 group 32, exact |
//! | embedding, output | F32, F16, BF16 | INT8, one scale a row, rounded; F16 where the linear layers are floats |
//! | embedding, output | Q4_1, Q5_1, Q4_K, Q5_K, Q6_K | INT8, one scale a row, rounded |
//! | vector | F32, F16, BF16 | f32, exact |
//!
//! What rounding costs: INT8 at most half a level, 1/254 of the largest weight of the group (an eighth of
//! a level of Q5_K's, a quarter of Q6_K's); Q4_K's scale and minimum 2^-12 of themselves, so a weight at
//! most 0.004 of the step between two levels, and 0.0003 of its group's minimum.
//!
//! Anything else is an error that names the tensor and its type. Everything here is a pure
//! function of the file, so several threads may decode tensors of one file at once.

mod packed;

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::Error;
use crate::error::shown;
use crate::file::container::{Container, Layout};
use crate::file::{DType, Source, Tensor};
use crate::quant::floats::{self, BLOCK, RowDecoder, SUPER_BLOCK, f16_at};
use crate::quant::int4::CELL_BYTES;
use crate::quant::{F16Matrix, Int4Matrix, Int8Matrix, TernaryMatrix, Weight, int8, ternary};
use crate::recipe::{RowOrder, WeightKind, WeightRef};

/// Q4_0: f16 scale, then a cell.
const Q4_0_BYTES: usize = 2 + CELL_BYTES;
/// Q4_1: f16 scale, f16 minimum, then a cell.
const Q4_1_BYTES: usize = 4 + CELL_BYTES;
/// Q5_0: f16 scale, fifth bits, then a cell.
const Q5_0_BYTES: usize = 6 + CELL_BYTES;
/// Q8_0: f16 scale, then the levels.
const Q8_0_BYTES: usize = 2 + BLOCK;

/// Decodes one tensor of a recipe.
///
/// # Errors
/// A tensor that is missing, has another shape than the recipe says or a type that its use cannot
/// take, a scale or value that is not finite.
pub fn decode(source: &dyn Source, weight: &WeightRef) -> Result<Weight, Error> {
    if let Some(container) = source.container() {
        check(source, weight)?;
        return container.weight(&weight.name);
    }
    if weight.kind == WeightKind::Vector {
        return decode_vector(source, weight).map(Weight::Vector);
    }
    let named = |error| match error {
        Error::Matrix { reason, .. } => fail(weight, reason),
        other => other,
    };
    if let Some((packed, _)) = packed::find(source, weight)? {
        return packed.decode(weight).map_err(named);
    }
    let rows = Rows::new(source, weight)?;
    use DType::*;
    match (weight.kind, rows.dtype) {
        (WeightKind::Linear | WeightKind::FloatTable, F32 | F16 | BF16) => {
            rows.floats().map(Weight::F16)
        }
        (WeightKind::Linear, Q4_0) => rows.q4_0().map(Weight::Int4),
        (WeightKind::Linear, Q4_1) => rows.q4_1().map(Weight::Int4),
        (WeightKind::Linear, Q4_K) => rows.q4_k().map(Weight::Int4),
        (WeightKind::Linear, Q5_1 | Q5_K | Q6_K) => rows.rounded(BLOCK).map(Weight::Int8),
        (WeightKind::Linear, TQ1_0) => rows.ternary::<54>(floats::tq1_0_codes).map(Weight::Ternary),
        (WeightKind::Linear, TQ2_0) => rows.ternary::<66>(floats::tq2_0_codes).map(Weight::Ternary),
        (_, Q8_0) => rows.q8_0().map(Weight::Int8),
        (_, Q5_0) => rows
            .int8_blocks::<Q5_0_BYTES>(floats::q5_0_levels)
            .map(Weight::Int8),
        (_, Q4_0) => rows.q4_0_widened().map(Weight::Int8),
        (_, F32 | F16 | BF16 | Q4_1 | Q5_1 | Q4_K | Q5_K | Q6_K) => {
            rows.rounded(weight.cols).map(Weight::Int8)
        }
        _ => Err(rows.unusable()),
    }
    .map_err(named)
}

/// The rows of a weight as floats, in the order that kernels expect.
#[derive(Debug)]
pub enum FloatRows<'a> {
    /// Read from the source's own type, as asked for.
    Source(SourceRows<'a>),
    /// Decoded first, because several tensors make up the weight.
    Decoded(Weight),
}

impl<'a> FloatRows<'a> {
    /// The rows of one weight of a recipe.
    ///
    /// # Errors
    /// As [`decode`]; types that only a kernel form is known of are decoded.
    pub fn new(source: &'a dyn Source, weight: &'a WeightRef) -> Result<Self, Error> {
        if source.container().is_some() || packed::find(source, weight)?.is_some() {
            return Ok(FloatRows::Decoded(match decode(source, weight)? {
                Weight::Int4Tiled(part) => Weight::Int4(part.in_rows()),
                other => other,
            }));
        }
        let rows = Rows::new(source, weight)?;
        let decode = rows.decoder()?;
        Ok(FloatRows::Source(SourceRows { rows, decode }))
    }

    /// Writes row `i` to `out`, which holds as many floats as a row has.
    pub fn read(&self, i: usize, out: &mut [f32]) {
        match self {
            FloatRows::Source(source) => (source.decode)(source.rows.row(i), out),
            FloatRows::Decoded(weight) => weight.dequantize_row(i, out),
        }
    }
}

/// Rows of a tensor and how to read them.
#[derive(Debug)]
pub struct SourceRows<'a> {
    rows: Rows<'a>,
    decode: RowDecoder,
}

/// Decodes a tensor of kind [`WeightKind::Vector`]: `(cols,)` floats.
///
/// # Errors
/// As [`decode`].
pub fn decode_vector(source: &dyn Source, weight: &WeightRef) -> Result<Vec<f32>, Error> {
    let rows = Rows::new(source, weight)?;
    match rows.dtype.is_float() {
        true => rows.vector(),
        false => Err(rows.unusable()),
    }
}

/// Checks that the source has what a weight is made of, in the shape that the recipe expects; gives the
/// names of the tensors.
///
/// # Errors
/// A tensor that is missing or has another shape, naming both.
pub fn check(source: &dyn Source, weight: &WeightRef) -> Result<Vec<String>, Error> {
    if let Some(container) = source.container() {
        return check_stored(container, weight);
    }
    if let Some((_, names)) = packed::find(source, weight)? {
        return Ok(names);
    }
    check_shape(source.require_tensor(&weight.name)?, weight)?;
    Ok(vec![weight.name.clone()])
}

/// Bytes of the source that a weight is made of, after [`check`]ing that they are there.
///
/// # Errors
/// As [`check`].
pub fn stored_bytes(source: &dyn Source, weight: &WeightRef) -> Result<u64, Error> {
    let parts = check(source, weight)?;
    if let Some(container) = source.container() {
        return container.stored_bytes(&weight.name);
    }
    let tensors = parts.iter().filter_map(|name| source.tensor(name));
    Ok(tensors.map(|tensor| tensor.data.len() as u64).sum())
}

/// [`check`] for a weight in kernel form.
fn check_stored(container: &Container<'_>, weight: &WeightRef) -> Result<Vec<String>, Error> {
    let parts = container.part_names(&weight.name)?;
    let stored = container.stored(&weight.name);
    let fits = stored.is_some_and(|stored| {
        (stored.rows, stored.cols) == (weight.rows, weight.cols)
            && (stored.layout == Layout::F32) == (weight.kind == WeightKind::Vector)
    });
    match fits {
        true => Ok(parts),
        false => Err(fail(
            weight,
            format!(
                "is no {:?} of {} rows and {} columns",
                weight.kind, weight.rows, weight.cols
            ),
        )),
    }
}

/// Checks that a tensor has the shape that a recipe expects: `[cols, rows]` for a matrix,
/// `[cols]` for a vector (whose `rows` is 1).
fn check_shape(tensor: &Tensor<'_>, weight: &WeightRef) -> Result<(), Error> {
    match weight.kind {
        WeightKind::Vector if weight.rows != 1 => Err(fail(
            weight,
            format!("a vector has one row, not {}", weight.rows),
        )),
        WeightKind::Vector => check_dims(tensor, &[weight.cols]),
        _ => check_dims(tensor, &[weight.cols, weight.rows]),
    }
}

/// Checks that rows which have to move are whole heads.
fn check_row_order(weight: &WeightRef) -> Result<(), Error> {
    let RowOrder::Interleaved { head_dim } = weight.row_order else {
        return Ok(());
    };
    let rows = match weight.kind {
        WeightKind::Vector => weight.cols,
        _ => weight.rows,
    };
    match head_dim != 0 && head_dim.is_multiple_of(2) && rows.is_multiple_of(head_dim) {
        true => Ok(()),
        false => Err(fail(
            weight,
            format!("{rows} rows are not whole heads of {head_dim}"),
        )),
    }
}

/// Checks the dimensions of a tensor, fastest first.
fn check_dims(tensor: &Tensor<'_>, expected: &[usize]) -> Result<(), Error> {
    let expected: Vec<u64> = expected.iter().map(|&d| d as u64).collect();
    // Trailing dimensions of 1 change nothing.
    fn used(dims: &[u64]) -> &[u64] {
        &dims[..dims
            .iter()
            .rposition(|&d| d != 1)
            .map_or(1, |last| last + 1)]
    }
    if used(&tensor.dims) == used(&expected) {
        return Ok(());
    }
    Err(tensor.fail(format!(
        "has shape {:?}, expected {expected:?}",
        tensor.dims
    )))
}

fn fail(weight: &WeightRef, reason: String) -> Error {
    Error::Tensor {
        name: shown(&weight.name),
        reason,
    }
}

/// The stored rows of a tensor whose shape was checked, in the order that kernels expect.
#[derive(Debug)]
struct Rows<'a> {
    weight: &'a WeightRef,
    dtype: DType,
    data: &'a [u8],
    row_bytes: usize,
}

impl<'a> Rows<'a> {
    fn new(source: &'a dyn Source, weight: &'a WeightRef) -> Result<Self, Error> {
        let tensor = source.require_tensor(&weight.name)?;
        check_shape(tensor, weight)?;
        check_row_order(weight)?;
        // No division by zero: no dimension of a parsed tensor is zero.
        let row_bytes = tensor.data.len() / weight.rows;
        Ok(Rows {
            weight,
            dtype: tensor.dtype,
            data: tensor.data,
            row_bytes,
        })
    }

    /// The error of a type that the tensor's use cannot take.
    fn unusable(&self) -> Error {
        let usable = match self.weight.kind {
            WeightKind::Embedding | WeightKind::FloatTable => {
                "an embedding or output table: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K can"
            }
            WeightKind::Linear => {
                "a linear layer: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, TQ1_0, TQ2_0 and I2_S can"
            }
            WeightKind::Vector => "a vector: F32, F16 and BF16 can",
        };
        fail(
            self.weight,
            format!("type {} cannot be used as {usable}", self.dtype.name()),
        )
    }

    /// Floats of one stored row.
    fn decoder(&self) -> Result<RowDecoder, Error> {
        floats::row_decoder(self.dtype).ok_or_else(|| self.unusable())
    }

    /// The stored bytes of the row that is `row`-th in kernel order.
    fn row(&self, row: usize) -> &'a [u8] {
        let start = stored_row(self.weight.row_order, row) * self.row_bytes;
        &self.data[start..start + self.row_bytes]
    }

    /// The stored bytes of each row, in kernel order.
    fn iter(&self) -> impl Iterator<Item = &'a [u8]> {
        (0..self.weight.rows).map(|row| self.row(row))
    }

    /// Weights of the tensor; no more than a small multiple of its bytes in the file.
    fn elems(&self) -> usize {
        self.weight.rows * self.weight.cols
    }

    fn q4_0(&self) -> Result<Int4Matrix, Error> {
        let (rows, cols) = (self.weight.rows, self.weight.cols);
        let mut quants = vec![0u8; self.elems() / 2];
        let mut scales = Vec::with_capacity(self.elems() / BLOCK);
        for (src, dst) in self.iter().zip(quants.chunks_exact_mut(cols / 2)) {
            let (blocks, _) = src.as_chunks::<Q4_0_BYTES>();
            let (cells, _) = dst.as_chunks_mut::<CELL_BYTES>();
            scales.extend(blocks.iter().zip(cells).map(|(block, cell)| {
                cell.copy_from_slice(&block[2..]);
                f16_at(block, 0)
            }));
        }
        Int4Matrix::new(rows, cols, BLOCK, quants, scales, None)
    }

    fn q4_1(&self) -> Result<Int4Matrix, Error> {
        let (rows, cols) = (self.weight.rows, self.weight.cols);
        let mut quants = vec![0u8; self.elems() / 2];
        let mut scales = Vec::with_capacity(self.elems() / BLOCK);
        let mut mins = Vec::with_capacity(self.elems() / BLOCK);
        for (src, dst) in self.iter().zip(quants.chunks_exact_mut(cols / 2)) {
            let (blocks, _) = src.as_chunks::<Q4_1_BYTES>();
            let (cells, _) = dst.as_chunks_mut::<CELL_BYTES>();
            for (block, cell) in blocks.iter().zip(cells) {
                cell.copy_from_slice(&block[4..]);
            }
            scales.extend(blocks.iter().map(|block| f16_at(block, 0)));
            mins.extend(blocks.iter().map(|block| f16_at(block, 2)));
        }
        Int4Matrix::new(rows, cols, BLOCK, quants, scales, Some(mins))
    }

    /// Levels as they are; scale and minimum become f16, which the products of two scales do not fit.
    fn q4_k(&self) -> Result<Int4Matrix, Error> {
        let (rows, cols) = (self.weight.rows, self.weight.cols);
        let mut quants = vec![0u8; self.elems() / 2];
        let mut scales = Vec::with_capacity(self.elems() / BLOCK);
        let mut mins = Vec::with_capacity(self.elems() / BLOCK);
        for (src, dst) in self.iter().zip(quants.chunks_exact_mut(cols / 2)) {
            let (blocks, _) = src.as_chunks::<144>();
            for (block, cells) in blocks.iter().zip(dst.chunks_exact_mut(SUPER_BLOCK / 2)) {
                for (j, cell) in cells.chunks_exact_mut(CELL_BYTES).enumerate() {
                    for (l, byte) in cell.iter_mut().enumerate() {
                        let level = |l| floats::q4_k_level(block, j, l);
                        *byte = level(l) | level(l + CELL_BYTES) << 4;
                    }
                }
                let sub_blocks = floats::k_scales_and_mins(block);
                scales.extend(sub_blocks.map(|(scale, _)| f16::from_f32(scale)));
                mins.extend(sub_blocks.map(|(_, min)| f16::from_f32(-min)));
            }
        }
        Int4Matrix::new(rows, cols, BLOCK, quants, scales, Some(mins))
    }

    /// Ternary group 256 from blocks of `BYTES` that end with their scale.
    fn ternary<const BYTES: usize>(
        &self,
        codes_of: impl Fn(&[u8; BYTES], &mut [u8; SUPER_BLOCK]),
    ) -> Result<TernaryMatrix, Error> {
        let (rows, cols) = (self.weight.rows, self.weight.cols);
        let mut quants = vec![0u8; self.elems() / 4];
        let mut scales = Vec::with_capacity(self.elems() / SUPER_BLOCK);
        let mut codes = [0; SUPER_BLOCK];
        for (src, dst) in self.iter().zip(quants.chunks_exact_mut(cols / 4)) {
            let (blocks, _) = src.as_chunks::<BYTES>();
            for (block, cells) in blocks.iter().zip(dst.chunks_exact_mut(SUPER_BLOCK / 4)) {
                codes_of(block, &mut codes);
                ternary::pack(&codes, cells);
                scales.push(f16_at(block, BYTES - 2).to_f32());
            }
        }
        TernaryMatrix::new(rows, cols, SUPER_BLOCK, quants, scales)
    }

    /// F16, each value rounded to the nearest; one that is finite and too large is an error.
    fn floats(&self) -> Result<F16Matrix, Error> {
        let (rows, cols) = (self.weight.rows, self.weight.cols);
        let mut values = vec![f16::ZERO; self.elems()];
        let decode = self.decoder()?;
        let mut row = vec![0f32; cols];
        for (i, (src, out)) in self.iter().zip(values.chunks_exact_mut(cols)).enumerate() {
            decode(src, &mut row);
            out.convert_from_f32_slice(&row);
            if let Some(k) = out.iter().position(|v| !v.is_finite()) {
                let why = match row[k].is_finite() {
                    true => ", beyond the 65504 of F16",
                    false => "",
                };
                return Err(fail(
                    self.weight,
                    format!("value {k} of row {i} is {}{why}", row[k]),
                ));
            }
        }
        F16Matrix::new(rows, cols, values)
    }

    fn q8_0(&self) -> Result<Int8Matrix, Error> {
        self.int8_blocks::<Q8_0_BYTES>(|block, levels| {
            for (level, byte) in levels.iter_mut().zip(&block[2..]) {
                *level = *byte as i8;
            }
        })
    }

    fn q4_0_widened(&self) -> Result<Int8Matrix, Error> {
        self.int8_blocks::<Q4_0_BYTES>(|block, levels| {
            let (low, high) = levels.split_at_mut(CELL_BYTES);
            for ((byte, low), high) in block[2..].iter().zip(low).zip(high) {
                *low = (byte & 15) as i8 - 8;
                *high = (byte >> 4) as i8 - 8;
            }
        })
    }

    /// INT8 group 32 from blocks of `BYTES` that begin with their scale.
    fn int8_blocks<const BYTES: usize>(
        &self,
        unpack: impl Fn(&[u8; BYTES], &mut [i8; BLOCK]),
    ) -> Result<Int8Matrix, Error> {
        let (rows, cols) = (self.weight.rows, self.weight.cols);
        let mut quants = vec![0i8; self.elems()];
        let mut scales = Vec::with_capacity(self.elems() / BLOCK);
        for (src, dst) in self.iter().zip(quants.chunks_exact_mut(cols)) {
            let (blocks, _) = src.as_chunks::<BYTES>();
            let (levels, _) = dst.as_chunks_mut::<BLOCK>();
            scales.extend(blocks.iter().zip(levels).map(|(block, levels)| {
                unpack(block, levels);
                f16_at(block, 0)
            }));
        }
        Int8Matrix::new(rows, cols, BLOCK, quants, scales)
    }

    /// INT8 with a scale for each `group` of a row, rounded from the floats of the row.
    fn rounded(&self, group: usize) -> Result<Int8Matrix, Error> {
        let (rows, cols) = (self.weight.rows, self.weight.cols);
        let mut quants = vec![0i8; self.elems()];
        let mut scales = Vec::with_capacity(rows * cols.div_ceil(group));
        let decode = self.decoder()?;
        let mut row = vec![0f32; cols];
        for (src, levels) in self.iter().zip(quants.chunks_exact_mut(cols)) {
            decode(src, &mut row);
            let groups = row.chunks(group).zip(levels.chunks_mut(group));
            scales.extend(groups.map(|(row, levels)| int8::encode_group(row, levels)));
        }
        Int8Matrix::new(rows, cols, group, quants, scales)
    }

    fn vector(&self) -> Result<Vec<f32>, Error> {
        let mut stored = vec![0f32; self.weight.cols];
        self.decoder()?(self.data, &mut stored);
        if let Some(i) = stored.iter().position(|v| !v.is_finite()) {
            return Err(fail(self.weight, format!("value {i} is {}", stored[i])));
        }
        Ok(match self.weight.row_order {
            RowOrder::AsStored => stored,
            order => (0..stored.len())
                .map(|i| stored[stored_row(order, i)])
                .collect(),
        })
    }
}

/// Row of the file that holds row `row` of the kernel order.
fn stored_row(order: RowOrder, row: usize) -> usize {
    match order {
        RowOrder::AsStored => row,
        RowOrder::Interleaved { head_dim } => {
            let (head, r) = (row / head_dim, row % head_dim);
            let half = head_dim / 2;
            head * head_dim + 2 * (r % half) + r / half
        }
    }
}
