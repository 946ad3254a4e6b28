//! Tensors of a model file -> the form that kernels read.
//!
//! | use | source | becomes |
//! |---|---|---|
//! | linear | Q4_0, Q4_1 | INT4 group 32, bit for bit |
//! | linear | Q8_0 | INT8 group 32, bit for bit |
//! | embedding, output | Q8_0 | INT8 group 32, bit for bit |
//! | embedding, output | Q4_0 | INT8 group 32, exact (levels -8 to 7) |
//! | embedding, output | F32, F16, BF16, Q4_1, Q6_K | INT8, one scale a row, rounded |
//! | vector | F32, F16, BF16 | f32, exact |
//!
//! Anything else is an error that names the tensor and its type. Everything here is a pure
//! function of the file, so several threads may decode tensors of one file at once.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::Error;
use crate::error::shown;
use crate::file::gguf::{DType, Gguf, TensorInfo};
use crate::quant::int4::CELL_BYTES;
use crate::quant::{Int4Matrix, Int8Matrix, Weight, int8};
use crate::recipe::{RowOrder, WeightKind, WeightRef};

/// Weights a block of the Q4_0, Q4_1 and Q8_0 types.
const BLOCK: usize = 32;
/// Q4_0: f16 scale, then a cell.
const Q4_0_BYTES: usize = 2 + CELL_BYTES;
/// Q4_1: f16 scale, f16 minimum, then a cell.
const Q4_1_BYTES: usize = 4 + CELL_BYTES;
/// Q8_0: f16 scale, then the levels.
const Q8_0_BYTES: usize = 2 + BLOCK;
/// Weights a Q6_K block.
const Q6_K_BLOCK: usize = 256;
/// Q6_K: low nibbles, high bit pairs, i8 scales, f16 scale.
const Q6_K_BYTES: usize = 128 + 64 + 16 + 2;

/// Decodes one tensor of a recipe.
///
/// # Errors
/// A tensor that is missing, has another shape than the recipe says or a type that its use cannot
/// take, a scale or value that is not finite.
pub fn decode(gguf: &Gguf<'_>, weight: &WeightRef) -> Result<Weight, Error> {
    if weight.kind == WeightKind::Vector {
        return decode_vector(gguf, weight).map(Weight::Vector);
    }
    let rows = Rows::new(gguf, weight)?;
    match (weight.kind, rows.dtype) {
        (WeightKind::Linear, DType::Q4_0) => rows.q4_0().map(Weight::Int4),
        (WeightKind::Linear, DType::Q4_1) => rows.q4_1().map(Weight::Int4),
        (WeightKind::Linear | WeightKind::Embedding, DType::Q8_0) => rows.q8_0().map(Weight::Int8),
        (WeightKind::Embedding, DType::Q4_0) => rows.q4_0_widened().map(Weight::Int8),
        (WeightKind::Embedding, DType::F32) => rows.rounded(f32_row).map(Weight::Int8),
        (WeightKind::Embedding, DType::F16) => rows.rounded(f16_row).map(Weight::Int8),
        (WeightKind::Embedding, DType::BF16) => rows.rounded(bf16_row).map(Weight::Int8),
        (WeightKind::Embedding, DType::Q4_1) => rows.rounded(q4_1_row).map(Weight::Int8),
        (WeightKind::Embedding, DType::Q6_K) => rows.rounded(q6_k_row).map(Weight::Int8),
        _ => Err(rows.unusable()),
    }
    .map_err(|error| match error {
        Error::Matrix { reason, .. } => fail(weight, reason),
        other => other,
    })
}

/// Decodes a tensor of kind [`WeightKind::Vector`]: `(cols,)` floats.
///
/// # Errors
/// As [`decode`].
pub fn decode_vector(gguf: &Gguf<'_>, weight: &WeightRef) -> Result<Vec<f32>, Error> {
    let rows = Rows::new(gguf, weight)?;
    match rows.dtype {
        DType::F32 => rows.vector(f32_row),
        DType::F16 => rows.vector(f16_row),
        DType::BF16 => rows.vector(bf16_row),
        _ => Err(rows.unusable()),
    }
}

/// Checks that a tensor has the shape that a recipe expects: `[cols, rows]` for a matrix,
/// `[cols]` for a vector (whose `rows` is 1).
///
/// # Errors
/// Another shape, naming both.
pub fn check_shape(tensor: &TensorInfo<'_>, weight: &WeightRef) -> Result<(), Error> {
    let (rows, cols) = (weight.rows as u64, weight.cols as u64);
    let expected = match weight.kind {
        WeightKind::Vector if rows != 1 => {
            return Err(fail(weight, format!("a vector has one row, not {rows}")));
        }
        WeightKind::Vector => vec![cols],
        WeightKind::Embedding | WeightKind::Linear => vec![cols, rows],
    };
    // Trailing dimensions of 1 change nothing.
    let used = tensor
        .dims
        .iter()
        .rposition(|&d| d != 1)
        .map_or(1, |last| last + 1);
    let wanted = expected
        .iter()
        .rposition(|&d| d != 1)
        .map_or(1, |last| last + 1);
    if tensor.dims[..used] == expected[..wanted] {
        return Ok(());
    }
    Err(fail(
        weight,
        format!("has shape {:?}, expected {expected:?}", tensor.dims),
    ))
}

fn fail(weight: &WeightRef, reason: String) -> Error {
    Error::Tensor {
        name: shown(&weight.name),
        reason,
    }
}

/// The stored rows of a tensor whose shape was checked, in the order that kernels expect.
struct Rows<'a> {
    weight: &'a WeightRef,
    dtype: DType,
    data: &'a [u8],
    row_bytes: usize,
}

impl<'a> Rows<'a> {
    fn new(gguf: &Gguf<'a>, weight: &'a WeightRef) -> Result<Self, Error> {
        let tensor = gguf.require_tensor(&weight.name)?;
        check_shape(tensor, weight)?;
        if let RowOrder::Interleaved { head_dim } = weight.row_order {
            let rows = if weight.kind == WeightKind::Vector {
                weight.cols
            } else {
                weight.rows
            };
            if head_dim == 0 || !head_dim.is_multiple_of(2) || !rows.is_multiple_of(head_dim) {
                return Err(fail(
                    weight,
                    format!("{rows} rows are not whole heads of {head_dim}"),
                ));
            }
        }
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
            WeightKind::Embedding => {
                "an embedding or output table: Q8_0, Q4_0, Q4_1, Q6_K, F16, BF16 and F32 can"
            }
            WeightKind::Linear => "a linear layer: Q4_0, Q4_1 and Q8_0 can",
            WeightKind::Vector => "a vector: F32, F16 and BF16 can",
        };
        fail(
            self.weight,
            format!("type {} cannot be used as {usable}", self.dtype.name()),
        )
    }

    /// The stored bytes of each row, in kernel order.
    fn iter(&self) -> impl Iterator<Item = &'a [u8]> {
        (0..self.weight.rows).map(|row| {
            let start = stored_row(self.weight.row_order, row) * self.row_bytes;
            &self.data[start..start + self.row_bytes]
        })
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

    /// INT8 with one scale a row, rounded from the float row that `read` gives.
    fn rounded(&self, mut read: impl FnMut(&[u8], &mut [f32])) -> Result<Int8Matrix, Error> {
        let (rows, cols) = (self.weight.rows, self.weight.cols);
        let mut quants = vec![0i8; self.elems()];
        let mut scales = Vec::with_capacity(rows);
        let mut row = vec![0f32; cols];
        for (src, levels) in self.iter().zip(quants.chunks_exact_mut(cols)) {
            read(src, &mut row);
            scales.push(int8::encode_group(&row, levels));
        }
        Int8Matrix::new(rows, cols, cols, quants, scales)
    }

    fn vector(&self, read: impl FnOnce(&[u8], &mut [f32])) -> Result<Vec<f32>, Error> {
        let mut stored = vec![0f32; self.weight.cols];
        read(self.data, &mut stored);
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

fn f16_at<const N: usize>(block: &[u8; N], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

fn f32_row(src: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(src.as_chunks::<4>().0) {
        *out = f32::from_le_bytes(*bytes);
    }
}

fn f16_row(src: &[u8], out: &mut [f32]) {
    // In pieces, so that the copy that aligns the halves stays in cache and off the heap.
    let mut halves = [f16::ZERO; 256];
    for (out, bytes) in out.chunks_mut(256).zip(src.chunks(512)) {
        let halves = &mut halves[..out.len()];
        for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *half = f16::from_le_bytes(*bytes);
        }
        halves.convert_to_f32_slice(out);
    }
}

fn bf16_row(src: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(src.as_chunks::<2>().0) {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    }
}

fn q4_1_row(src: &[u8], out: &mut [f32]) {
    let blocks = src.as_chunks::<Q4_1_BYTES>().0;
    for (block, out) in blocks.iter().zip(out.as_chunks_mut::<BLOCK>().0) {
        let (scale, min) = (f16_at(block, 0).to_f32(), f16_at(block, 2).to_f32());
        let (low, high) = out.split_at_mut(CELL_BYTES);
        for ((byte, low), high) in block[4..].iter().zip(low).zip(high) {
            *low = scale * f32::from(byte & 15) + min;
            *high = scale * f32::from(byte >> 4) + min;
        }
    }
}

/// Q6_K: two halves of 128 weights; in each, weight `32 q + l` takes its low nibble from byte
/// `32 (q % 2) + l` (high nibble of it for `q >= 2`), its top bits from bit pair `q` of byte `l`,
/// and the i8 scale `2 q + l / 16`.
fn q6_k_row(src: &[u8], out: &mut [f32]) {
    let blocks = src.as_chunks::<Q6_K_BYTES>().0;
    for (block, out) in blocks.iter().zip(out.as_chunks_mut::<Q6_K_BLOCK>().0) {
        let scale = f16_at(block, 208).to_f32();
        for (half, out) in out.chunks_exact_mut(128).enumerate() {
            let nibbles = &block[64 * half..64 * half + 64];
            let pairs = &block[128 + 32 * half..128 + 32 * half + 32];
            let scales = &block[192 + 8 * half..192 + 8 * half + 8];
            for (q, out) in out.chunks_exact_mut(32).enumerate() {
                for (l, out) in out.iter_mut().enumerate() {
                    let low = nibbles[32 * (q % 2) + l] >> (4 * (q / 2)) & 15;
                    let high = pairs[l] >> (2 * q) & 3;
                    let level = (low | high << 4) as i8 - 32;
                    let sub_scale = scales[2 * q + l / 16] as i8;
                    *out = scale * f32::from(sub_scale) * f32::from(level);
                }
            }
        }
    }
}
