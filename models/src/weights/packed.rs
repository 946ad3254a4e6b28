//! Linear layers of packed checkpoints: several tensors, or one whose rows share what is behind them, make
//! one matrix. Nothing is rounded: levels, scales and zeros of AWQ and GPTQ become INT4 with zeros, BitNet's
//! two bits the ternary form.

use half::f16;

use super::{check_dims, fail};
use crate::Error;
use crate::file::{DType, Packing, Source, Tensor};
use crate::quant::int4::{CELL_BYTES, CELL_WEIGHTS};
use crate::quant::{Int4Matrix, TernaryMatrix, Weight, ternary};
use crate::recipe::{WeightKind, WeightRef};

/// Nibbles a 32-bit word.
const NIBBLES: usize = 8;
/// Output column of each nibble of an AWQ word.
const AWQ_ORDER: [usize; NIBBLES] = [0, 2, 4, 6, 1, 3, 5, 7];
/// Words that are unpacked side by side: a cache line of the file's rows.
const WORDS: usize = 16;
/// Zero of the symmetric form.
const MIDDLE: u8 = 8;

/// A packed layer whose tensors are there in the right shapes.
pub(super) enum Packed<'a> {
    Awq(Int4Parts<'a>),
    Gptq(Int4Parts<'a>, bool),
    /// Two bits a weight and the scale.
    Bits(&'a Tensor<'a>, f32),
    /// Floats that are rounded to ternary.
    Floats(&'a Tensor<'a>),
    /// Two bits a weight, the scale behind them: a GGUF file's I2_S.
    I2S(&'a Tensor<'a>),
}

/// The tensors of an AWQ or GPTQ layer.
pub(super) struct Int4Parts<'a> {
    levels: &'a Tensor<'a>,
    zeros: &'a Tensor<'a>,
    scales: &'a Tensor<'a>,
    /// Which group each column is in, where the file says so.
    groups: Option<&'a Tensor<'a>>,
    /// Weights that share a scale.
    group: usize,
}

/// The packed layer that `weight` is, and the names of its tensors; `None` for a plain tensor.
pub(super) fn find<'a>(
    source: &'a dyn Source,
    weight: &WeightRef,
) -> Result<Option<(Packed<'a>, Vec<String>)>, Error> {
    if weight.kind != WeightKind::Linear {
        return Ok(None);
    }
    let plain = source.tensor(&weight.name);
    if let Some(tensor) = plain
        && tensor.dtype == DType::I2_S
    {
        super::check_shape(tensor, weight)?;
        super::check_row_order(weight)?;
        return Ok(Some((Packed::I2S(tensor), vec![weight.name.clone()])));
    }
    let Some(packing) = source.packing() else {
        return Ok(None);
    };
    match (*packing, plain) {
        (Packing::Awq { group }, None) => {
            let (parts, names) = int4_parts(source, weight, group, true)?;
            Ok(Some((Packed::Awq(parts), names)))
        }
        (
            Packing::Gptq {
                group,
                zero_is_one_less,
                sorted,
            },
            None,
        ) => {
            let (parts, names) = int4_parts(source, weight, group, false)?;
            if sorted && parts.groups.is_none() {
                return Err(parts.levels.fail(
                    "has no g_idx beside it, which quantization_config.desc_act promises: whether its columns \
                     were sorted cannot be told; a checkpoint quantised with desc_act false needs none"
                        .to_owned(),
                ));
            }
            Ok(Some((Packed::Gptq(parts, zero_is_one_less), names)))
        }
        (Packing::BitNet { floats: true, .. }, Some(tensor)) if tensor.dtype.is_float() => {
            super::check_shape(tensor, weight)?;
            Ok(Some((Packed::Floats(tensor), vec![weight.name.clone()])))
        }
        (Packing::BitNet { scale_divides, .. }, Some(tensor)) if tensor.dtype == DType::U8 => {
            if !weight.rows.is_multiple_of(4) {
                return Err(fail(
                    weight,
                    format!("{} rows are not packed in fours", weight.rows),
                ));
            }
            check_dims(tensor, &[weight.cols, weight.rows / 4])?;
            let name = format!("{}_scale", weight.name);
            let scale = source.require_tensor(&name)?;
            check_dims(scale, &[1])?;
            let mut value = [0f32];
            scale.read_rows(0..1, &mut value)?;
            let factor = match scale_divides {
                true => 1.0 / value[0],
                false => value[0],
            };
            if !factor.is_finite() {
                return Err(scale.fail(format!("{} is no scale", value[0])));
            }
            let names = vec![weight.name.clone(), name];
            Ok(Some((Packed::Bits(tensor, factor), names)))
        }
        _ => Ok(None),
    }
}

fn int4_parts<'a>(
    source: &'a dyn Source,
    weight: &WeightRef,
    group: Option<usize>,
    awq: bool,
) -> Result<(Int4Parts<'a>, Vec<String>), Error> {
    let (rows, cols) = (weight.rows, weight.cols);
    let stem = weight.name.strip_suffix(".weight").unwrap_or(&weight.name);
    let mut names = Vec::new();
    let mut part = |suffix: &str| {
        let name = format!("{stem}.{suffix}");
        let tensor = source.tensor(&name);
        names.extend(tensor.map(|_| name.clone()));
        (name, tensor)
    };
    let (levels_name, levels) = part("qweight");
    let (zeros_name, zeros) = part("qzeros");
    let (scales_name, scales) = part("scales");
    let (_, groups) = part("g_idx");
    let need = |name: String, tensor: Option<&'a Tensor<'a>>| {
        tensor.ok_or(Error::MissingTensor {
            name: crate::error::shown(&name),
        })
    };
    let parts = Int4Parts {
        levels: need(levels_name, levels)?,
        zeros: need(zeros_name, zeros)?,
        scales: need(scales_name, scales)?,
        groups,
        group: group.unwrap_or(cols),
    };
    if !rows.is_multiple_of(NIBBLES) || !cols.is_multiple_of(CELL_WEIGHTS) {
        return Err(parts.levels.fail(format!(
            "({rows}, {cols}) is no multiple of ({NIBBLES}, {CELL_WEIGHTS})"
        )));
    }
    let count = cols.div_ceil(parts.group);
    match awq {
        true => check_dims(parts.levels, &[rows / NIBBLES, cols])?,
        false => check_dims(parts.levels, &[rows, cols / NIBBLES])?,
    }
    check_dims(parts.zeros, &[rows / NIBBLES, count])?;
    check_dims(parts.scales, &[rows, count])?;
    for tensor in [Some(parts.levels), Some(parts.zeros), parts.groups] {
        if let Some(tensor) = tensor
            && tensor.dtype != DType::I32
        {
            return Err(tensor.fail(format!("has type {}, expected I32", tensor.dtype.name())));
        }
    }
    if !parts.scales.dtype.is_float() {
        let dtype = parts.scales.dtype.name();
        return Err(parts.scales.fail(format!("has type {dtype}, expected F16")));
    }
    if let Some(groups) = parts.groups {
        check_dims(groups, &[cols])?;
        parts.check_order(groups)?;
    }
    Ok((parts, names))
}

impl Packed<'_> {
    pub(super) fn decode(&self, weight: &WeightRef) -> Result<Weight, Error> {
        let (rows, cols) = (weight.rows, weight.cols);
        match self {
            Packed::Awq(parts) => parts.matrix(
                rows,
                cols,
                |k, word, levels| {
                    for (i, n) in AWQ_ORDER.into_iter().enumerate() {
                        levels[n * cols + k] = nibble(word, i);
                    }
                },
                true,
                |stored| stored,
            ),
            Packed::Gptq(parts, one_less) => parts.matrix(
                rows,
                cols,
                |k, word, levels| {
                    for i in 0..NIBBLES {
                        levels[NIBBLES * k + i] = nibble(word, i);
                    }
                },
                false,
                // Zero 0 is stored as 15, what subtracting one in four bits makes of it.
                |stored| stored.wrapping_add(u8::from(*one_less)) & 15,
            ),
            Packed::Bits(tensor, scale) => bits(tensor, rows, cols, *scale),
            Packed::Floats(tensor) => round_to_ternary(tensor, rows, cols),
            Packed::I2S(tensor) => i2_s(tensor, weight),
        }
    }
}

/// Level `i` of a word.
fn nibble(word: u32, i: usize) -> u8 {
    (word >> (4 * i) & 15) as u8
}

/// The words of a tensor of type I32.
fn words(tensor: &Tensor<'_>) -> impl Fn(usize) -> u32 {
    let words = tensor.data.as_chunks::<4>().0;
    |i| u32::from_le_bytes(words[i])
}

impl Int4Parts<'_> {
    /// Columns are in groups from left to right. Where they were sorted by activation instead (`desc_act`),
    /// neighbours share no scale and no INT4 kernel can read them.
    fn check_order(&self, groups: &Tensor<'_>) -> Result<(), Error> {
        let index = words(groups);
        match (0..groups.shape().1).find(|&k| index(k) as usize != k / self.group) {
            None => Ok(()),
            Some(k) => Err(groups.fail(format!(
                "column {k} is in group {}, not {}: checkpoints quantised in order of activation \
                 (desc_act) are not supported, one with desc_act false is",
                index(k),
                k / self.group
            ))),
        }
    }

    /// Unpacks all words by `unpack(row of words, word, levels)`. A file row of words runs over outputs;
    /// with `across` a word holds eight of them, else eight columns of one.
    fn matrix(
        &self,
        rows: usize,
        cols: usize,
        unpack: impl Fn(usize, u32, &mut [u8]),
        across: bool,
        zero_of: impl Fn(u8) -> u8,
    ) -> Result<Weight, Error> {
        let word = words(self.levels);
        let (outputs_a_word, file_rows) = match across {
            true => (NIBBLES, cols),
            false => (1, cols / NIBBLES),
        };
        let words_a_row = rows / outputs_a_word;
        let mut quants = vec![0u8; rows * cols / 2];
        let mut levels = vec![0u8; WORDS * outputs_a_word * cols];
        for first in (0..words_a_row).step_by(WORDS) {
            let count = WORDS.min(words_a_row - first);
            let levels = &mut levels[..count * outputs_a_word * cols];
            for row in 0..file_rows {
                let outputs = levels.chunks_exact_mut(outputs_a_word * cols);
                for (j, levels) in outputs.enumerate() {
                    unpack(row, word(row * words_a_row + first + j), levels);
                }
            }
            let cells = quants[first * outputs_a_word * cols / 2..].chunks_exact_mut(CELL_BYTES);
            for (levels, cell) in levels.as_chunks::<CELL_WEIGHTS>().0.iter().zip(cells) {
                for (j, byte) in cell.iter_mut().enumerate() {
                    *byte = levels[j] | levels[j + CELL_BYTES] << 4;
                }
            }
        }
        // A group that kernels have, that many times in one of the file.
        let unit = [128, 64, 32]
            .into_iter()
            .find(|unit| self.group.is_multiple_of(*unit))
            .ok_or_else(|| {
                self.levels
                    .fail(format!("groups of {} are not supported", self.group))
            })?;
        let units = cols.div_ceil(unit);
        let all_scales = self.scales()?;
        let zero = words(self.zeros);
        let order = match across {
            true => AWQ_ORDER,
            false => std::array::from_fn(|i| i),
        };
        let place_of: [usize; NIBBLES] =
            std::array::from_fn(|n| order.iter().position(|&o| o == n).unwrap_or(n));
        let (mut scales, mut zeros) = (Vec::new(), Vec::new());
        for n in 0..rows {
            for c in 0..units {
                let group = c * unit / self.group;
                let word = zero(group * (rows / NIBBLES) + n / NIBBLES);
                scales.push(all_scales[group * rows + n]);
                zeros.push(zero_of(nibble(word, place_of[n % NIBBLES])));
            }
        }
        let symmetric = zeros.iter().all(|&zero| zero == MIDDLE);
        let mins = (!symmetric).then(|| {
            let mins = zeros.iter().map(|&zero| f16::from_f32(f32::from(zero)));
            mins.collect()
        });
        let matrix = Int4Matrix::new(rows, cols, unit, quants, scales, mins)?;
        match symmetric {
            true => Ok(Weight::Int4(matrix)),
            false => matrix.with_zeros().map(Weight::Int4),
        }
    }

    /// `(groups, n)` scales, which have to be f16 numbers, in whatever float type they are stored.
    fn scales(&self) -> Result<Vec<f16>, Error> {
        let (groups, rows) = self.scales.shape();
        let mut floats = vec![0f32; groups * rows];
        self.scales.read_rows(0..groups, &mut floats)?;
        floats
            .into_iter()
            .enumerate()
            .map(|(i, scale)| match f16::from_f32(scale) {
                half if half.to_f32() == scale => Ok(half),
                _ => Err(self
                    .scales
                    .fail(format!("scale {i} is {scale}, which f16 does not hold"))),
            })
            .collect()
    }
}

/// Row `i` of the file holds rows `i`, `i + n/4`, `i + n/2` and `i + 3n/4` in its bit pairs.
fn bits(tensor: &Tensor<'_>, rows: usize, cols: usize, scale: f32) -> Result<Weight, Error> {
    let mut quants = vec![0u8; rows * cols / 4];
    let mut codes = vec![0u8; cols];
    for (n, cells) in quants.chunks_exact_mut(cols / 4).enumerate() {
        let (pair, row) = (n / (rows / 4), n % (rows / 4));
        let bytes = &tensor.data[row * cols..][..cols];
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code = byte >> (2 * pair) & 3;
        }
        ternary::pack(&codes, cells);
    }
    TernaryMatrix::new(rows, cols, cols, quants, vec![scale; rows]).map(Weight::Ternary)
}

/// 32 bytes hold 128 weights of a row: byte `j` those of columns `j`, `j + 32`, `j + 64` and `j + 96`, the first
/// in the upper bits, as value + 1. One f32 behind all of them multiplies the whole matrix. bitnet.cpp packs
/// otherwise when it is built for Arm, and its files do not tell; the published ones are of this order
/// (<https://github.com/microsoft/BitNet>).
fn i2_s(tensor: &Tensor<'_>, weight: &WeightRef) -> Result<Weight, Error> {
    let (rows, cols) = (weight.rows, weight.cols);
    let (packed, trailer) = tensor.data.split_at(rows * cols / 4);
    let scale = trailer
        .first_chunk()
        .map_or(f32::NAN, |b| f32::from_le_bytes(*b));
    let mut quants = vec![0u8; rows * cols / 4];
    let mut codes = vec![0u8; cols];
    for (n, cells) in quants.chunks_exact_mut(cols / 4).enumerate() {
        let row = super::stored_row(weight.row_order, n);
        let bytes = packed[row * cols / 4..][..cols / 4].as_chunks::<32>().0;
        for (bytes, codes) in bytes.iter().zip(codes.as_chunks_mut::<128>().0) {
            for (l, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                for (code, byte) in codes.iter_mut().zip(bytes) {
                    *code = byte >> (6 - 2 * l) & 3;
                }
            }
        }
        ternary::pack(&codes, cells);
    }
    TernaryMatrix::new(rows, cols, cols, quants, vec![scale; rows]).map(Weight::Ternary)
}

/// Weights rounded to -1, 0 and 1 times the mean of their magnitudes (BitNet b1.58,
/// <https://arxiv.org/abs/2402.17764>).
fn round_to_ternary(tensor: &Tensor<'_>, rows: usize, cols: usize) -> Result<Weight, Error> {
    const LEAST_MEAN: f32 = 1e-5;
    let mut row = vec![0f32; cols];
    let mut sum = 0f64;
    for n in 0..rows {
        tensor.read_rows(n..n + 1, &mut row)?;
        sum += row.iter().map(|w| f64::from(w.abs())).sum::<f64>();
    }
    let mean = (sum / (rows as f64 * cols as f64)) as f32;
    if !mean.is_finite() {
        return Err(tensor.fail("holds a value that is not finite".to_owned()));
    }
    let inverse = 1.0 / mean.max(LEAST_MEAN);
    let mut quants = vec![0u8; rows * cols / 4];
    let mut codes = vec![0u8; cols];
    for (n, cells) in quants.chunks_exact_mut(cols / 4).enumerate() {
        tensor.read_rows(n..n + 1, &mut row)?;
        for (code, w) in codes.iter_mut().zip(&row) {
            *code = ((w * inverse).round_ties_even().clamp(-1.0, 1.0) + 1.0) as u8;
        }
        ternary::pack(&codes, cells);
    }
    TernaryMatrix::new(rows, cols, cols, quants, vec![1.0 / inverse; rows]).map(Weight::Ternary)
}
