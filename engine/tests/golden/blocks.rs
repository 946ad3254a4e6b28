//! Blocks of every packed GGUF type against the numbers that `golden/blocks.py` decodes from them by the format's
//! description: bit for bit as floats, and as weights of a linear layer as close as `models::weights` says.

use models::file::gguf::{DType, Gguf, Writer};
use models::file::{Source, Tensor};
use models::quant::Weight;
use models::recipe::{RowOrder, WeightKind, WeightRef};
use models::weights::decode;

use crate::support;

const ROWS: usize = 2;
const COLS: usize = 512;

/// The types, and what becomes of a linear layer: whether nothing is rounded.
const TYPES: [(DType, bool); 10] = [
    (DType::Q4_0, true),
    (DType::Q4_1, true),
    (DType::Q5_0, true),
    (DType::Q5_1, false),
    (DType::Q8_0, true),
    (DType::Q4_K, false),
    (DType::Q5_K, false),
    (DType::Q6_K, false),
    (DType::TQ1_0, true),
    (DType::TQ2_0, true),
];

/// A type whose scale lies behind all rows, so that none is read by itself.
const WHOLE: (DType, bool) = (DType::I2_S, true);

fn golden(dtype: DType) -> (Vec<u8>, Vec<f32>) {
    let name = format!("blocks/{}", dtype.name());
    let floats = support::floats(&format!("{name}.floats"));
    assert_eq!(floats.len(), ROWS * COLS);
    (support::data(&format!("{name}.blocks")), floats)
}

#[test]
fn every_type_is_read_bit_for_bit() {
    for (dtype, _) in TYPES {
        let (blocks, want) = golden(dtype);
        let tensor = Tensor {
            name: "t",
            dims: vec![COLS as u64, ROWS as u64],
            dtype,
            data: &blocks,
        };
        let mut all = vec![0f32; ROWS * COLS];
        tensor.read_rows(0..ROWS, &mut all).expect("floats");
        assert_eq!(all, want, "{dtype:?}");
        let mut second = vec![0f32; COLS];
        tensor.read_rows(1..2, &mut second).expect("floats");
        assert_eq!(second, want[COLS..], "{dtype:?}: rows by themselves");
    }
}

#[test]
fn linear_layers_lose_no_more_than_is_said() {
    for (dtype, exact) in TYPES.into_iter().chain([WHOLE]) {
        let (blocks, want) = golden(dtype);
        let mut writer = Writer::new();
        let dims = [COLS as u64, ROWS as u64];
        writer.tensor("t", &dims, dtype).expect("declared");
        let mut data = writer.begin(Vec::new()).expect("begun");
        data.write(&blocks).expect("written");
        let file = data.finish().expect("finished");
        let gguf = Gguf::parse(&file).expect("parsed");
        let weight = WeightRef {
            name: "t".to_owned(),
            rows: ROWS,
            cols: COLS,
            kind: WeightKind::Linear,
            row_order: RowOrder::AsStored,
        };
        let decoded = decode(&gguf as &dyn Source, &weight).expect("decoded");
        let mut row = vec![0f32; COLS];
        for (i, want) in want.chunks_exact(COLS).enumerate() {
            decoded.dequantize_row(i, &mut row);
            if exact {
                assert_eq!(row, want, "{dtype:?} row {i}");
                continue;
            }
            for (got, want) in row.chunks(32).zip(want.chunks(32)) {
                let least = want.iter().fold(f32::INFINITY, |m, w| m.min(*w));
                let most = want.iter().fold(f32::NEG_INFINITY, |m, w| m.max(*w));
                let largest = most.max(-least);
                let bound = match decoded {
                    // Scale and minimum, each by 2^-12 of itself; levels go up to 15.
                    Weight::Int4(_) => 2.0 * largest.max(most - least) / 4096.0,
                    // Half a level, and the rounding of the scale.
                    _ => largest / 254.0 * 1.13,
                };
                for (g, w) in got.iter().zip(want) {
                    assert!(
                        (g - w).abs() <= bound,
                        "{dtype:?}: {g} for {w}, bound {bound}"
                    );
                }
            }
        }
    }
}
