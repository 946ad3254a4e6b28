//! The container: what is written is what is read, in place, and nothing else passes for it.

use std::sync::Arc;

use bytes::Bytes;
use half::f16;
use models::file::Source;
use models::file::container::{ALIGNMENT, Container, Pack, StoredWeight, Writer};
use models::quant::int4_tiled::Order;
use models::quant::{
    F16Matrix, Int4Form, Int4Matrix, Int4Tiled, Int8Matrix, TernaryMatrix, Weight,
};
use proptest::prelude::*;

/// Bytes at a multiple of the alignment, as a map has them.
fn aligned(bytes: &[u8]) -> Bytes {
    struct Pages(Vec<u8>, usize, usize);
    impl AsRef<[u8]> for Pages {
        fn as_ref(&self) -> &[u8] {
            &self.0[self.1..self.1 + self.2]
        }
    }
    let mut pages = vec![0; bytes.len() + ALIGNMENT];
    let start = pages.as_ptr().align_offset(ALIGNMENT);
    pages[start..start + bytes.len()].copy_from_slice(bytes);
    Bytes::from_owner(Pages(pages, start, bytes.len()))
}

fn file(weights: &[(String, Weight)]) -> Vec<u8> {
    packed_file(weights, &[])
}

fn packed_file(weights: &[(String, Weight)], packs: &[Pack]) -> Vec<u8> {
    let mut writer = Writer::new();
    writer.text("note", "one\n\"two\"");
    for pack in packs {
        writer.pack(pack.clone());
    }
    for (name, weight) in weights {
        writer.weight(StoredWeight::of(name.clone(), weight));
    }
    let planned = writer.file_bytes().expect("a size");
    let mut data = writer.begin(Vec::new()).expect("a header");
    for (_, weight) in weights {
        data.write(weight.clone()).expect("written");
    }
    let bytes = data.finish().expect("all written");
    assert_eq!(bytes.len() as u64, planned);
    bytes
}

/// Deterministic floats of a seed.
fn floats(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state as f32 / u32::MAX as f32 - 0.5) * 0.2
        })
        .collect()
}

fn weight() -> impl Strategy<Value = Weight> {
    (1usize..9, 1usize..11, 0usize..10, any::<u32>()).prop_map(|(rows, blocks, kind, seed)| {
        let cols = 32 * blocks;
        let values = floats(rows * cols, seed);
        let group = 32 << (kind % 3);
        let form = match kind % 2 {
            0 => Int4Form::Symmetric,
            _ => Int4Form::Asymmetric,
        };
        match kind {
            0..6 => Weight::Int4(Int4Matrix::encode(rows, cols, group, form, &values).unwrap()),
            6 => Weight::Int8(Int8Matrix::encode(rows, cols, 32, &values).unwrap()),
            7 => {
                let halves: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
                Weight::F16(F16Matrix::new(rows, cols, halves).unwrap())
            }
            8 => {
                let cells: Vec<u8> = values[..rows * cols / 4]
                    .iter()
                    .map(|v| (v * 900.0) as u8)
                    .collect();
                let scales = values[..rows].to_vec();
                Weight::Ternary(TernaryMatrix::new(rows, cols, cols, cells, scales).unwrap())
            }
            _ => Weight::Vector(values),
        }
    })
}

/// A weight that shares tiles with no other by now.
fn in_rows(weight: &Weight) -> Weight {
    match weight {
        Weight::Int4Tiled(part) => Weight::Int4(part.in_rows()),
        other => other.clone(),
    }
}

/// INT4 matrices that can share tiles, and how.
fn packed() -> impl Strategy<Value = (Order, Vec<Int4Matrix>)> {
    let shape = (1usize..5, 1usize..4, 1usize..11);
    (shape, 0usize..3, 0usize..3, 0usize..3, any::<u32>()).prop_map(
        |((heads, tiles, blocks), kind, group, form, seed)| {
            let head_dim = 16 * tiles;
            let (order, rows) = match kind {
                0 => (Order::Rows, vec![heads * 5, 3, tiles * 9]),
                1 => (Order::GateUp, vec![heads * 7; 2]),
                _ => (
                    Order::Heads { head_dim },
                    vec![heads * head_dim, head_dim, head_dim],
                ),
            };
            let cols = 32 * blocks;
            let matrix = |(i, rows): (usize, usize)| {
                let values = floats(rows * cols, seed.wrapping_add(i as u32));
                let int4 = match form {
                    0 => Int4Form::Symmetric,
                    _ => Int4Form::Asymmetric,
                };
                let matrix = Int4Matrix::encode(rows, cols, 32 << group, int4, &values).unwrap();
                if form < 2 {
                    return matrix;
                }
                let zeros = (0..matrix.scales.len()).map(|i| f16::from_f32((i % 17) as f32));
                let mins = Some(zeros.collect());
                Int4Matrix { mins, ..matrix }.with_zeros().unwrap()
            };
            (order, rows.into_iter().enumerate().map(matrix).collect())
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_quantised_and_written_is_what_is_read(
        weights in prop::collection::vec(weight(), 1..8),
    ) {
        let named: Vec<(String, Weight)> = weights
            .into_iter()
            .enumerate()
            .map(|(i, weight)| (format!("layer.{i}"), weight))
            .collect();
        let bytes = aligned(&file(&named));
        prop_assert!(Container::is_container(&bytes));
        let container = Container::parse(&bytes).expect("parsed");
        prop_assert_eq!(container.text("note"), Some("one\n\"two\""));
        prop_assert_eq!(container.weights().len(), named.len());
        let here = bytes.as_ptr_range();
        for (name, weight) in &named {
            let read = container.weight(name).expect("decoded");
            prop_assert_eq!(&in_rows(&read), weight);
            let start = match &read {
                Weight::Int4Tiled(part) => part.tiles().quants.as_ptr().cast(),
                Weight::Int8(m) => m.quants.as_ptr().cast(),
                Weight::Ternary(m) => m.quants.as_ptr(),
                Weight::F16(m) => m.values.as_ptr().cast(),
                _ => continue,
            };
            prop_assert!(here.contains(&start), "a matrix was copied");
            prop_assert_eq!(start.align_offset(ALIGNMENT), 0);
        }
        // A file made of what was read is the same file.
        let read: Vec<(String, Weight)> = named
            .iter()
            .map(|(name, _)| (name.clone(), container.weight(name).expect("decoded")))
            .collect();
        prop_assert!(file(&read) == bytes);
        // What the format's own library says of it.
        let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
        prop_assert!(tensors.len() >= named.len());
    }

    #[test]
    fn matrices_that_share_tiles_lie_as_a_gpu_reads_them_and_come_apart_exactly(
        (order, matrices) in packed(),
        vectors in prop::collection::vec(1usize..40, 4),
    ) {
        // Something else between them, before and behind.
        let mut named = Vec::new();
        for (i, len) in vectors.into_iter().enumerate() {
            named.push((format!("{i}.bias"), Weight::Vector(floats(len, 7))));
            if let Some(matrix) = matrices.get(i) {
                named.push((format!("{i}.weight"), Weight::Int4(matrix.clone())));
            }
        }
        let members = (0..matrices.len()).map(|i| format!("{i}.weight")).collect();
        let pack = Pack::new(order, members);
        let bytes = aligned(&packed_file(&named, std::slice::from_ref(&pack)));
        let container = Container::parse(&bytes).expect("parsed");
        let wanted = Int4Tiled::pack_as(order, &matrices.iter().collect::<Vec<_>>()).unwrap();
        let mut seen = Vec::new();
        let mut stored = 0;
        for (name, weight) in &named {
            let read = container.weight(name).expect("decoded");
            prop_assert_eq!(&in_rows(&read), weight);
            prop_assert_eq!(read.shape(), weight.shape());
            if let Weight::Int4Tiled(part) = read {
                prop_assert_eq!(part.member(), seen.len());
                prop_assert_eq!(&**part.tiles(), &wanted);
                stored += container.stored_bytes(name).expect("a size");
                seen.push(part);
            }
        }
        let tiles = seen[0].tiles();
        prop_assert_eq!(stored, tiles.bytes());
        prop_assert!(seen.iter().all(|part| Arc::ptr_eq(part.tiles(), tiles)));
        let parts = [
            (".quants", tiles.quants.as_ptr().cast::<u8>()),
            (".scales", tiles.scales.as_ptr().cast()),
            (".mins", tiles.mins.as_ref().map_or(std::ptr::null(), |m| m.as_ptr().cast())),
        ];
        for (suffix, start) in parts {
            let tensor = container.tensor(&format!("{}{suffix}", pack.name));
            prop_assert_eq!(tensor.map(|t| t.data.as_ptr()), (!start.is_null()).then_some(start));
            prop_assert_eq!(start.align_offset(ALIGNMENT), 0);
        }
    }
}

fn sample() -> Vec<(String, Weight)> {
    let int4 = Int4Matrix::encode(3, 96, 64, Int4Form::Asymmetric, &floats(288, 1)).unwrap();
    let int8 = Int8Matrix::encode(3, 96, 96, &floats(288, 2)).unwrap();
    vec![
        ("a".to_owned(), Weight::Int4(int4)),
        ("b".to_owned(), Weight::Int8(int8)),
        ("c".to_owned(), Weight::Vector(vec![1.0, 2.0])),
    ]
}

/// The message of a file that is refused on parsing or on decoding its first three weights.
fn refusal(bytes: &[u8]) -> Option<String> {
    let bytes = aligned(bytes);
    let container = match Container::parse(&bytes) {
        Ok(container) => container,
        Err(error) => return Some(error.to_string()),
    };
    ["a", "b", "c"]
        .iter()
        .find_map(|name| container.weight(name).err())
        .map(|error| error.to_string())
}

/// The sample file with `from` in its header replaced by `to`.
fn edited(from: &str, to: &str) -> Vec<u8> {
    let bytes = file(&sample());
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
    assert!(header.contains(from), "{from} is not in {header}");
    let mut header = header.trim_end().replace(from, to);
    while !(8 + header.len()).is_multiple_of(ALIGNMENT) {
        header.push(' ');
    }
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(&bytes[8 + length..]);
    out
}

#[test]
fn files_cut_short_are_refused() {
    let whole = file(&sample());
    assert_eq!(refusal(&whole), None);
    for length in [
        0,
        1,
        7,
        8,
        9,
        100,
        4095,
        4096,
        whole.len() - 4096,
        whole.len() - 1,
    ] {
        let message = refusal(&whole[..length]).expect("refused");
        assert!(!message.contains('\n'), "{message}");
    }
    let mut claims = whole;
    claims[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
    assert!(refusal(&claims).is_some());
}

#[test]
fn hostile_metadata_is_one_line_that_names_the_field() {
    for (from, to, expected) in [
        (r#""format":"edgellm""#, r#""format":"pt""#, "format"),
        (
            r#""edgellm.version":"2""#,
            r#""edgellm.version":"1""#,
            "version 1 is not supported, 2 is: quantise the source again",
        ),
        (
            r#""edgellm.version":"2""#,
            r#""edgellm.version":"3""#,
            "version 3 is not supported, 2 is: a newer edgellm",
        ),
        (
            r#""edgellm.version":"2""#,
            r#""edgellm.version":"x\ny""#,
            "edgellm.version",
        ),
        (
            r#""edgellm.weights""#,
            r#""edgellm.wights""#,
            "edgellm.weights",
        ),
        (r#"\"name\":\"b\""#, r#"\"name\":\"a\""#, "twice"),
        (r#"\"name\":\"b\""#, r#"\"name\":\"d\""#, "d.quants"),
        (
            r#"\"rows\":3"#,
            r#"\"rows\":18446744073709551615"#,
            "overflows",
        ),
        (r#"\"rows\":3"#, r#"\"rows\":4"#, "expected"),
        (r#"\"rows\":3"#, r#"\"rows\":-3"#, "edgellm.weights"),
        (r#"\"group\":64"#, r#"\"group\":0"#, "group is 0"),
        (r#"\"group\":64"#, r#"\"group\":65"#, "group is 65"),
        (r#"\"group\":96"#, r#"\"group\":100"#, "100"),
        (
            r#"\"form\":\"asymmetric\""#,
            r#"\"form\":\"other\""#,
            "other",
        ),
        (r#"\"format\":\"int4\""#, r#"\"format\":\"int5\""#, "int5"),
        (
            r#"\"form\":\"asymmetric\""#,
            r#"\"form\":\"symmetric\""#,
            "a.mins",
        ),
        (r#""a.mins""#, r#""a.minns""#, "a.mins"),
        (r#""edgellm.packs""#, r#""edgellm.pakcs""#, "edgellm.packs"),
        (
            r#"\"order\":\"rows\""#,
            r#"\"order\":\"gate_up\""#,
            "gate and up",
        ),
        (
            r#"\"order\":\"rows\""#,
            r#"\"order\":\"heads\""#,
            "head_dim",
        ),
        (
            r#"\"order\":\"rows\""#,
            r#"\"order\":\"heads\",\"head_dim\":0"#,
            "heads of 0",
        ),
        (r#"[\"a\"]"#, r#"[\"b\"]"#, "not INT4"),
        (r#"[\"a\"]"#, r#"[\"x\"]"#, "x"),
        (r#"[\"a\"]"#, r#"[\"a\",\"a\"]"#, "two packs"),
        (r#"[\"a\"]"#, r#"[]"#, "no matrix"),
        (
            r#"[{\"name\":\"a\",\"order\":\"rows\",\"members\":[\"a\"]}]"#,
            "[]",
            "in none of",
        ),
        (r#""dtype":"I8""#, r#""dtype":"U8""#, "b.quants"),
        (r#""padding.0""#, r#""adding.0""#, "adding.0"),
        (r#""shape":[1,1,256]"#, r#""shape":[256,1,1]"#, "a.quants"),
        (r#""shape":[1,1,256]"#, r#""shape":[1,1,257]"#, "needs 1028"),
        ("{", "[", "safetensors"),
    ] {
        let message = refusal(&edited(from, to)).unwrap_or_else(|| panic!("{from} -> {to}"));
        assert!(message.contains(expected), "{from} -> {to}: {message}");
        assert!(!message.contains('\n') && message.len() < 300, "{message}");
    }
}

#[test]
fn tensors_out_of_place_and_values_that_are_none_are_refused() {
    // One more space in the header: every tensor lies askew by a byte.
    let mut askew = edited("{", "{");
    let length = u64::from_le_bytes(askew[..8].try_into().unwrap());
    askew.insert(8 + length as usize, b' ');
    askew[..8].copy_from_slice(&(length + 1).to_le_bytes());
    let message = refusal(&askew).expect("refused");
    assert!(message.contains("multiple of 2"), "{message}");

    let whole = file(&sample());
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    // Pages of a: quants, scales, mins; of b: quants, scales; of c.
    for (page, bytes, expected) in [
        (1, f16::NAN.to_le_bytes().to_vec(), "scale 0 is NaN"),
        (2, f16::INFINITY.to_le_bytes().to_vec(), "minimum 0 is inf"),
        (
            4,
            f16::NEG_INFINITY.to_le_bytes().to_vec(),
            "scale 0 is -inf",
        ),
        (5, f32::NAN.to_le_bytes().to_vec(), "value 0 is NaN"),
    ] {
        let mut bad = whole.clone();
        let at = header + page * ALIGNMENT;
        bad[at..at + bytes.len()].copy_from_slice(&bytes);
        let message = refusal(&bad).expect("refused");
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn the_writer_keeps_to_what_was_declared() {
    let weights = sample();
    let declared = |names: [&str; 2]| {
        let mut writer = Writer::new();
        for name in names {
            writer.weight(StoredWeight::of(name.to_owned(), &weights[0].1));
        }
        writer
    };
    assert!(declared(["a", "a"]).begin(Vec::new()).is_err());
    for (order, members) in [
        (Order::Rows, &["a", "c"][..]),
        (Order::Rows, &["a", "a"]),
        (Order::GateUp, &["a"]),
        (Order::Heads { head_dim: 16 }, &["a", "b"]),
    ] {
        let members = members.iter().map(|name| (*name).to_owned()).collect();
        let mut writer = declared(["a", "b"]);
        writer.pack(Pack::new(order, members));
        assert!(writer.begin(Vec::new()).is_err(), "{order:?}");
    }
    let names = |members: &[&str]| {
        let members = members.iter().map(|name| (*name).to_owned()).collect();
        Pack::new(Order::Rows, members).name
    };
    let together = names(&["0.attn.q.weight", "0.attn.k.weight", "1.v.weight"]);
    assert_eq!(together, "0.attn.q+k+1.v.weight");
    assert_eq!(names(&["table"]), "table");
    let mut data = declared(["a", "b"]).begin(Vec::new()).unwrap();
    assert!(data.write(weights[1].1.clone()).is_err());
    data.write(weights[0].1.clone()).unwrap();
    assert!(data.finish().unwrap_err().to_string().contains("`b`"));
}
