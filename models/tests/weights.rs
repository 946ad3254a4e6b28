//! Decoding tensors against values worked out by hand from the format's definition.

mod common;

use common::{Stream, Tensor, edited, synthetic_bytes};
use half::{bf16, f16};
use models::Error;
use models::file::gguf::{DType, Gguf, Writer};
use models::quant::{Int4Matrix, Int8Matrix, Weight};
use models::recipe::{RowOrder, WeightKind, WeightRef};
use models::weights::decode;

/// A file with the one tensor `t`.
fn file(dims: &[u64], dtype: DType, data: &[u8]) -> Vec<u8> {
    let mut writer = Writer::new();
    writer.tensor("t", dims, dtype).unwrap();
    let mut out = writer.begin(Vec::new()).unwrap();
    out.write(data).unwrap();
    out.finish().unwrap()
}

fn reference(rows: usize, cols: usize, kind: WeightKind) -> WeightRef {
    WeightRef {
        name: "t".to_owned(),
        rows,
        cols,
        kind,
        row_order: RowOrder::AsStored,
    }
}

fn decode_one(dtype: DType, data: &[u8], weight: &WeightRef) -> Result<Weight, Error> {
    let dims = match weight.kind {
        WeightKind::Vector => vec![weight.cols as u64],
        _ => vec![weight.cols as u64, weight.rows as u64],
    };
    let bytes = file(&dims, dtype, data);
    decode(&Gguf::parse(&bytes).unwrap(), weight)
}

fn int4(weight: Weight) -> Int4Matrix {
    let Weight::Int4(matrix) = weight else {
        panic!("{weight:?}")
    };
    matrix
}

fn int8(weight: Weight) -> Int8Matrix {
    let Weight::Int8(matrix) = weight else {
        panic!("{weight:?}")
    };
    matrix
}

/// Random blocks of `quant_bytes` bytes, each after `halves` small finite f16 numbers.
fn random_blocks(blocks: usize, halves: usize, quant_bytes: usize) -> Vec<u8> {
    let mut stream = Stream(0xb10c);
    let mut data = Vec::new();
    for _ in 0..blocks {
        for _ in 0..halves {
            data.extend(f16::from_f32(stream.below(2001) as f32 / 1000.0 - 1.0).to_le_bytes());
        }
        data.extend((0..quant_bytes).map(|_| stream.below(256) as u8));
    }
    data
}

fn half_at(data: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([data[at], data[at + 1]]).to_f32()
}

/// Nibble of weight `i` of a 32-weight cell.
fn nibble(cell: &[u8], i: usize) -> f32 {
    f32::from(if i < 16 {
        cell[i] & 15
    } else {
        cell[i - 16] >> 4
    })
}

#[test]
fn q4_0_and_q4_1_become_int4_without_loss() {
    let (rows, cols) = (3, 96);
    for (dtype, halves) in [(DType::Q4_0, 1), (DType::Q4_1, 2)] {
        let data = random_blocks(rows * cols / 32, halves, 16);
        let weight = reference(rows, cols, WeightKind::Linear);
        let matrix = int4(decode_one(dtype, &data, &weight).unwrap());
        assert_eq!(
            (matrix.group, matrix.mins.is_some()),
            (32, dtype == DType::Q4_1)
        );
        let block_bytes = 2 * halves + 16;
        let mut row = vec![0f32; cols];
        for r in 0..rows {
            matrix.dequantize_row(r, &mut row);
            for (c, got) in row.iter().enumerate() {
                let block = &data[(r * cols + c) / 32 * block_bytes..][..block_bytes];
                let q = nibble(&block[2 * halves..], c % 32);
                let want = match dtype {
                    DType::Q4_0 => half_at(block, 0) * (q - 8.0),
                    _ => half_at(block, 0) * q + half_at(block, 2),
                };
                assert_eq!(*got, want, "{dtype:?} ({r}, {c})");
            }
        }
        // Bit for bit: the parts put back together are the file's bytes.
        let again: Vec<u8> = (0..rows * cols / 32)
            .flat_map(|b| {
                let mut block = matrix.scales[b].to_le_bytes().to_vec();
                block.extend(matrix.mins.iter().flat_map(|mins| mins[b].to_le_bytes()));
                block.extend(&matrix.quants[16 * b..16 * (b + 1)]);
                block
            })
            .collect();
        assert_eq!(again, data);
    }
}

#[test]
fn q8_0_and_widened_q4_0_become_int8_without_loss() {
    let (rows, cols) = (2, 64);
    let data = random_blocks(rows * cols / 32, 1, 32);
    for kind in [WeightKind::Linear, WeightKind::Embedding] {
        let matrix = int8(decode_one(DType::Q8_0, &data, &reference(rows, cols, kind)).unwrap());
        assert_eq!(matrix.group, 32);
        for (i, level) in matrix.quants.iter().enumerate() {
            assert_eq!(*level, data[i / 32 * 34 + 2 + i % 32] as i8);
        }
        assert_eq!(matrix.scales[3].to_f32(), half_at(&data, 3 * 34));
    }

    let data = random_blocks(rows * cols / 32, 1, 16);
    let table = reference(rows, cols, WeightKind::Embedding);
    let wide = int8(decode_one(DType::Q4_0, &data, &table).unwrap());
    let narrow = int4(
        decode_one(
            DType::Q4_0,
            &data,
            &reference(rows, cols, WeightKind::Linear),
        )
        .unwrap(),
    );
    let (mut a, mut b) = (vec![0f32; cols], vec![0f32; cols]);
    for r in 0..rows {
        wide.dequantize_row(r, &mut a);
        narrow.dequantize_row(r, &mut b);
        assert_eq!(a, b);
    }
}

#[test]
fn float_tables_are_rounded_by_row() {
    let (rows, cols) = (3, 288);
    let values: Vec<f32> = (0..rows * cols)
        .map(|i| (i as f32 * 0.61).cos() * (1 + i / cols) as f32)
        .collect();
    let encode = |dtype| -> (Vec<u8>, Vec<f32>) {
        let halves = values.iter().map(|v| f16::from_f32(*v));
        let brains = values.iter().map(|v| bf16::from_f32(*v));
        match dtype {
            DType::F32 => (
                values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                values.clone(),
            ),
            DType::F16 => (
                halves.clone().flat_map(f16::to_le_bytes).collect(),
                halves.map(f16::to_f32).collect(),
            ),
            _ => (
                brains.clone().flat_map(bf16::to_le_bytes).collect(),
                brains.map(bf16::to_f32).collect(),
            ),
        }
    };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let (data, exact) = encode(dtype);
        let matrix =
            int8(decode_one(dtype, &data, &reference(rows, cols, WeightKind::Embedding)).unwrap());
        assert_eq!((matrix.group, matrix.scales.len()), (cols, rows));
        let mut row = vec![0f32; cols];
        for r in 0..rows {
            matrix.dequantize_row(r, &mut row);
            for (got, want) in row.iter().zip(&exact[r * cols..]) {
                assert!(
                    (got - want).abs() <= 0.57 * matrix.scales[r].to_f32(),
                    "{dtype:?} {got} {want}"
                );
            }
        }
    }
}

/// Weight `i` of a Q6_K block, straight from the layout in GGML's documentation of the k-quants.
fn q6_k(block: &[u8], i: usize) -> f32 {
    let (half, quarter, lane) = (i / 128, i % 128 / 32, i % 32);
    let byte = block[half * 64 + lane + if quarter % 2 == 1 { 32 } else { 0 }];
    let low = if quarter < 2 { byte & 15 } else { byte >> 4 };
    let high = block[128 + half * 32 + lane] >> (2 * quarter) & 3;
    let scale = block[192 + half * 8 + quarter * 2 + lane / 16] as i8;
    half_at(block, 208) * f32::from(scale) * (f32::from(low) + 16.0 * f32::from(high) - 32.0)
}

#[test]
fn q4_1_and_q6_k_tables_are_rounded_by_row() {
    let (rows, cols) = (2, 512);
    let mut q6 = random_blocks(rows * 2, 0, 210);
    for block in q6.chunks_exact_mut(210) {
        block[208..].copy_from_slice(&f16::from_f32(0.003).to_le_bytes());
    }
    let q41 = random_blocks(rows * cols / 32, 2, 16);
    let q41_weight = |i: usize| {
        let block = &q41[i / 32 * 20..][..20];
        half_at(block, 0) * nibble(&block[4..], i % 32) + half_at(block, 2)
    };
    let q6_weight = |i: usize| q6_k(&q6[i / 256 * 210..][..210], i % 256);
    let check = |dtype, data: &[u8], want: &dyn Fn(usize) -> f32| {
        let matrix =
            int8(decode_one(dtype, data, &reference(rows, cols, WeightKind::Embedding)).unwrap());
        let mut row = vec![0f32; cols];
        for r in 0..rows {
            matrix.dequantize_row(r, &mut row);
            for (c, got) in row.iter().enumerate() {
                let want = want(r * cols + c);
                assert!(
                    (got - want).abs() <= 0.57 * matrix.scales[r].to_f32(),
                    "{dtype:?} {got} {want}"
                );
            }
        }
    };
    check(DType::Q4_1, &q41, &q41_weight);
    check(DType::Q6_K, &q6, &q6_weight);
}

/// bitnet.cpp's type, from its description: 128 weights in 32 bytes, the first 32 in the upper bits, and the
/// scale of the matrix behind all of them.
#[test]
fn i2_s_is_ternary_with_the_scale_behind_the_rows() {
    const ROWS: usize = 4;
    const COLS: usize = 256;
    let value = |row: usize, column: usize| ((row * 7 + column * column / 3) % 3) as i8 - 1;
    let mut data = vec![0u8; ROWS * COLS / 4 + 32];
    for row in 0..ROWS {
        for column in 0..COLS {
            let byte = row * COLS / 4 + column / 128 * 32 + column % 32;
            data[byte] |= ((value(row, column) + 1) as u8) << (6 - 2 * (column % 128 / 32));
        }
    }
    let scale = 1.0f32 / 3.0;
    data[ROWS * COLS / 4..][..4].copy_from_slice(&scale.to_le_bytes());
    let mut weight = reference(ROWS, COLS, WeightKind::Linear);
    for (row_order, stored) in [
        (RowOrder::AsStored, [0, 1, 2, 3]),
        (RowOrder::Interleaved { head_dim: 4 }, [0, 2, 1, 3]),
    ] {
        weight.row_order = row_order;
        let decoded = decode_one(DType::I2_S, &data, &weight).unwrap();
        let mut row = vec![0f32; COLS];
        for (i, stored) in stored.into_iter().enumerate() {
            decoded.dequantize_row(i, &mut row);
            for (column, weight) in row.iter().enumerate() {
                assert_eq!(*weight, scale * f32::from(value(stored, column)));
            }
        }
    }
    weight.row_order = RowOrder::Interleaved { head_dim: 6 };
    assert!(decode_one(DType::I2_S, &data, &weight).is_err());
    weight.row_order = RowOrder::AsStored;
    data[ROWS * COLS / 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let error = decode_one(DType::I2_S, &data, &weight).unwrap_err();
    assert!(
        error.to_string().contains("`t`") && error.to_string().contains("NaN"),
        "{error}"
    );
    let table = reference(ROWS, COLS, WeightKind::Embedding);
    let error = decode_one(DType::I2_S, &data, &table).unwrap_err();
    assert!(error.to_string().contains("I2_S"), "{error}");
}

#[test]
fn interleaved_rows_move_to_half_split_order() {
    // Two heads of four rows; every level of stored row r is r.
    let (rows, cols) = (8, 32);
    let data: Vec<u8> = (0..rows as u8)
        .flat_map(|r| f16::ONE.to_le_bytes().into_iter().chain([r; 32]))
        .collect();
    let mut weight = reference(rows, cols, WeightKind::Linear);
    weight.row_order = RowOrder::Interleaved { head_dim: 4 };
    let matrix = int8(decode_one(DType::Q8_0, &data, &weight).unwrap());
    let order: Vec<i8> = (0..rows).map(|r| matrix.row_quants(r)[0]).collect();
    // Row 2i + s of a head moves to s * 2 + i.
    assert_eq!(order, [0, 2, 1, 3, 4, 6, 5, 7]);

    let mut bias = reference(1, rows, WeightKind::Vector);
    bias.row_order = weight.row_order;
    let data: Vec<u8> = (0..rows).flat_map(|r| (r as f32).to_le_bytes()).collect();
    let bias = decode_one(DType::F32, &data, &bias).unwrap();
    assert_eq!(
        bias,
        Weight::Vector(vec![0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0])
    );

    weight.row_order = RowOrder::Interleaved { head_dim: 6 };
    let data = random_blocks(8, 1, 32);
    let message = decode_one(DType::Q8_0, &data, &weight)
        .unwrap_err()
        .to_string();
    assert_eq!(message, "tensor `t`: 8 rows are not whole heads of 6");
}

#[test]
fn vectors_are_exact() {
    let values = [0.1f32, -3.0e-20, 65504.0, 1.0e30, 0.0];
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let weight = reference(1, 5, WeightKind::Vector);
    assert_eq!(
        decode_one(DType::F32, &bytes, &weight).unwrap(),
        Weight::Vector(values.to_vec())
    );
    let halves = [0.5f32, -65504.0, 6.0e-8].map(f16::from_f32);
    let bytes: Vec<u8> = halves.iter().flat_map(|v| v.to_le_bytes()).collect();
    let weight = reference(1, 3, WeightKind::Vector);
    let exact = Weight::Vector(halves.map(f16::to_f32).to_vec());
    assert_eq!(decode_one(DType::F16, &bytes, &weight).unwrap(), exact);
    let brains = [1.5f32, -1.0e30, 1.0e-30].map(bf16::from_f32);
    let bytes: Vec<u8> = brains.iter().flat_map(|v| v.to_le_bytes()).collect();
    let exact = Weight::Vector(brains.map(bf16::to_f32).to_vec());
    assert_eq!(decode_one(DType::BF16, &bytes, &weight).unwrap(), exact);
}

#[test]
fn unusable_tensors_are_refused_by_name_and_type() {
    let data = vec![0u8; 4096];
    for (kind, dtype, expect) in [
        (
            WeightKind::Linear,
            DType::Q3_K,
            "type Q3_K cannot be used as a linear layer",
        ),
        (
            WeightKind::Linear,
            DType::I32,
            "type I32 cannot be used as a linear layer",
        ),
        (
            WeightKind::Embedding,
            DType::IQ4_XS,
            "type IQ4_XS cannot be used as an embedding",
        ),
        (
            WeightKind::Vector,
            DType::Q8_0,
            "type Q8_0 cannot be used as a vector",
        ),
    ] {
        let weight = reference(1, 256, kind);
        let bytes = dtype.tensor_bytes(&[256]).unwrap() as usize;
        let message = decode_one(dtype, &data[..bytes], &weight)
            .unwrap_err()
            .to_string();
        assert!(
            message.starts_with("tensor `t`: ") && message.contains(expect),
            "{message}"
        );
    }
    let nan = [f32::NAN.to_le_bytes(), 1f32.to_le_bytes()].concat();
    let message = decode_one(DType::F32, &nan, &reference(1, 2, WeightKind::Vector)).unwrap_err();
    assert_eq!(message.to_string(), "tensor `t`: value 0 is NaN");
    for dtype in [DType::Q4_0, DType::Q4_1, DType::Q8_0] {
        let mut block = vec![0u8; dtype.block_bytes() as usize];
        block[..2].copy_from_slice(&f16::INFINITY.to_le_bytes());
        let weight = reference(1, 32, WeightKind::Linear);
        let message = decode_one(dtype, &block, &weight).unwrap_err().to_string();
        assert_eq!(message, "tensor `t`: scale 0 is inf");
    }
    let mut block = vec![0u8; 128];
    block[64..68].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let weight = reference(1, 32, WeightKind::Embedding);
    assert!(decode_one(DType::F32, &block, &weight).is_err());
    let weight = reference(1, 32, WeightKind::Linear);
    let message = decode_one(DType::F32, &block, &weight).unwrap_err();
    assert_eq!(message.to_string(), "tensor `t`: value 16 of row 0 is inf");
    block[64..68].copy_from_slice(&1e6f32.to_le_bytes());
    let message = decode_one(DType::F32, &block, &weight).unwrap_err();
    assert_eq!(
        message.to_string(),
        "tensor `t`: value 16 of row 0 is 1000000, beyond the 65504 of F16"
    );
}

#[test]
fn missing_tensors_and_wrong_shapes_are_refused() {
    let bytes = file(&[32, 2], DType::Q8_0, &[0; 68]);
    let gguf = Gguf::parse(&bytes).unwrap();
    let mut weight = reference(4, 32, WeightKind::Linear);
    let message = decode(&gguf, &weight).unwrap_err().to_string();
    assert_eq!(message, "tensor `t`: has shape [32, 2], expected [32, 4]");
    weight.name = "u".to_owned();
    assert_eq!(
        decode(&gguf, &weight).unwrap_err().to_string(),
        "tensor `u` is missing"
    );
}

#[test]
fn tables_of_synthetic_models_decode_in_every_type() {
    let bytes = synthetic_bytes("tiny");
    let gguf = Gguf::parse(&bytes).unwrap();
    let table = models::arch::recipe(&gguf).unwrap().weights[0].clone();
    assert_eq!(table.kind, WeightKind::Embedding);
    for embedding in [
        DType::Q8_0,
        DType::Q4_0,
        DType::Q4_1,
        DType::F16,
        DType::BF16,
        DType::F32,
    ] {
        let shape = models::synthetic::shape("tiny").unwrap();
        let options = models::synthetic::Options {
            embedding,
            ..Default::default()
        };
        let bytes = models::synthetic::to_vec(shape, &options).unwrap();
        let matrix = int8(decode(&Gguf::parse(&bytes).unwrap(), &table).unwrap());
        let mut row = vec![0f32; 64];
        let squares: f32 = (0..320)
            .map(|r| {
                matrix.dequantize_row(r, &mut row);
                row.iter().map(|w| w * w).sum::<f32>()
            })
            .sum();
        let deviation = (squares / (320.0 * 64.0)).sqrt();
        assert!(
            (0.25..0.35).contains(&deviation),
            "{embedding:?}: {deviation}"
        );
    }
    // A flat row has no scale to speak of and stays zero.
    let zeroed = edited(
        &bytes,
        |_| {},
        |tensors: &mut Vec<Tensor>| tensors[0].data.fill(0),
    );
    let matrix = int8(decode(&Gguf::parse(&zeroed).unwrap(), &table).unwrap());
    assert!(matrix.scales.iter().all(|s| *s == f16::ZERO));
}
