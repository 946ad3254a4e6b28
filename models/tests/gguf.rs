//! The GGUF reader on good files, damaged files and hostile files.

mod common;

use common::{Raw, Stream, synthetic_bytes};
use models::file::Source;
use models::file::gguf::{DType, Gguf, Value, Writer};
use models::{arch, weights};

fn error(bytes: &[u8]) -> String {
    let message = Gguf::parse(bytes)
        .expect_err("the file is malformed")
        .to_string();
    assert!(
        !message.contains('\n') && message.len() < 400,
        "{message:?}"
    );
    message
}

#[test]
fn what_was_written_is_read_back() {
    let mut writer = Writer::new();
    writer
        .alignment(64)
        .string("a.text", "größe\n")
        .u32("a.u32", 7)
        .u64("a.u64", u64::MAX)
        .f32("a.f32", 0.1)
        .bool("a.bool", true)
        .strings("a.strings", &["x", "", "yz"])
        .i32s("a.i32s", &[-1, 2])
        .f32s("a.f32s", &[0.5, -2.0]);
    writer.tensor("first", &[32, 3], DType::Q4_1).unwrap();
    writer.tensor("second", &[5], DType::F32).unwrap();
    let mut data = writer.begin(Vec::new()).unwrap();
    data.write(&[1; 60]).unwrap();
    data.write(&[2; 7]).unwrap();
    data.write(&[3; 13]).unwrap();
    let bytes = data.finish().unwrap();

    let gguf = Gguf::parse(&bytes).unwrap();
    let m = &gguf.metadata;
    assert_eq!(gguf.version, 3);
    assert_eq!(m.string("a.text").unwrap(), "größe\n");
    assert_eq!(m.u64("a.u32").unwrap(), 7);
    assert_eq!(m.u64("a.u64").unwrap(), u64::MAX);
    assert_eq!(m.f64("a.f32").unwrap(), f64::from(0.1f32));
    assert_eq!(m.bool_opt("a.bool").unwrap(), Some(true));
    assert_eq!(
        m.strings("a.strings").unwrap().collect::<Vec<_>>(),
        ["x", "", "yz"]
    );
    assert_eq!(m.strings("a.strings").unwrap().len(), 3);
    assert_eq!(
        m.integers_opt("a.i32s")
            .unwrap()
            .unwrap()
            .collect::<Vec<_>>(),
        [-1, 2]
    );
    assert_eq!(
        m.floats_opt("a.f32s").unwrap().unwrap().collect::<Vec<_>>(),
        [0.5, -2.0]
    );
    assert_eq!(m.string_opt("absent").unwrap(), None);

    let first = gguf.tensor("first").unwrap();
    assert_eq!(
        (first.dims.as_slice(), first.dtype),
        ([32, 3].as_slice(), DType::Q4_1)
    );
    assert_eq!(first.data, [1; 60]);
    let second = gguf.tensor("second").unwrap();
    assert_eq!(
        (&second.data[..7], &second.data[7..]),
        ([2; 7].as_slice(), [3; 13].as_slice())
    );
    assert_eq!(
        second.data.as_ptr() as usize - first.data.as_ptr() as usize,
        64
    );
    assert!(gguf.tensor("third").is_none());
}

#[test]
fn getters_name_the_key_and_both_types() {
    let mut writer = Writer::new();
    writer
        .string("text", "7")
        .i32s("numbers", &[-1])
        .value("negative", &Value::I16(-3));
    let bytes = writer.begin(Vec::new()).unwrap().finish().unwrap();
    let gguf = Gguf::parse(&bytes).unwrap();
    let m = &gguf.metadata;
    let message = m.u64("text").unwrap_err().to_string();
    assert_eq!(
        message,
        "metadata key `text` is a string, expected an integer"
    );
    let message = m.strings("numbers").map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("elements are an i32"), "{message}");
    assert_eq!(
        m.u64("negative").unwrap_err().to_string(),
        "metadata key `negative`: -3 is negative"
    );
    assert_eq!(
        m.f64("gone").unwrap_err().to_string(),
        "metadata key `gone` is missing"
    );
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let mut writer = Writer::new();
    writer.tensor("t", &[32], DType::Q4_0).unwrap();
    assert!(writer.tensor("t", &[32], DType::Q4_0).is_err());
    assert!(writer.tensor("u", &[33], DType::Q4_0).is_err());
    assert!(writer.tensor("u", &[0], DType::F32).is_err());
    assert!(writer.tensor("u", &[1; 5], DType::F32).is_err());
    let mut data = writer.clone().begin(Vec::new()).unwrap();
    assert!(
        data.write(&[0; 19])
            .unwrap_err()
            .to_string()
            .contains("`t`")
    );
    data.write(&[0; 17]).unwrap();
    assert!(data.finish().unwrap_err().to_string().contains("17 of 18"));
    let mut data = writer.clone().begin(Vec::new()).unwrap();
    data.write(&[0; 18]).unwrap();
    assert!(data.write(&[0]).is_err());
    writer.u32("k", 1).u32("k", 2);
    assert!(
        writer
            .begin(Vec::new())
            .unwrap_err()
            .to_string()
            .contains("`k`")
    );
}

#[test]
fn version_2_is_read_like_version_3() {
    let mut bytes = synthetic_bytes("tiny");
    bytes[4..8].copy_from_slice(&2u32.to_le_bytes());
    let gguf = Gguf::parse(&bytes).unwrap();
    assert_eq!(gguf.version, 2);
    arch::recipe(&gguf).unwrap();
}

#[test]
fn wrong_magic_version_and_byte_order() {
    assert!(error(b"").contains("magic"));
    assert!(error(b"GG").contains("truncated"));
    assert!(error(b"PK\x03\x04 a zip file").contains(r"PK\x03\x04"));
    for version in [0, 1, 4, 77] {
        assert!(error(&Raw::head(version, 0, 0).0).contains(&format!("version {version} is not")));
    }
    let big = b"GGUF"
        .iter()
        .copied()
        .chain(3u32.to_be_bytes())
        .chain([0; 16])
        .collect::<Vec<_>>();
    assert!(error(&big).starts_with("big-endian GGUF file (version 3)"));
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    let bytes = synthetic_bytes("tiny");
    let gguf = Gguf::parse(&bytes).unwrap();
    let last = gguf.tensors.last().unwrap().data;
    // Up to the last byte of the last tensor: what follows is padding.
    let end = last.as_ptr() as usize - bytes.as_ptr() as usize + last.len();
    let mut stream = Stream(0x5eed);
    let random = (0..50).map(|_| stream.below(end as u64) as usize);
    // All of the header, too: its fields are the ones that lead elsewhere.
    for cut in random.chain(0..6000).chain([end - 1]) {
        error(&bytes[..cut]);
    }
    Gguf::parse(&bytes[..end]).unwrap();
}

#[test]
fn tensors_that_cannot_be_are_refused_by_name() {
    let f32_id = DType::F32.id();
    let one = |dims: &[u64], dtype, offset| {
        error(
            &Raw::head(3, 1, 0)
                .tensor("wild", dims, dtype, offset)
                .data(4096)
                .0,
        )
    };
    for (message, expect) in [
        (one(&[1 << 60], f32_id, 0), "past the end"),
        (one(&[1 << 62], f32_id, 0), "overflows"),
        (one(&[1 << 32, 1 << 32], f32_id, 0), "overflows"),
        (
            one(&[1 << 16, 1 << 16, 1 << 16, 1 << 16], DType::I8.id(), 0),
            "overflows",
        ),
        (one(&[u64::MAX], DType::I8.id(), 0), "past the end"),
        (one(&[16, 0], f32_id, 0), "dimension of zero"),
        (one(&[0], f32_id, 0), "dimension of zero"),
        (one(&[], f32_id, 0), "has 0 dimensions"),
        (one(&[1; 5], f32_id, 0), "has 5 dimensions"),
        (one(&[33, 2], DType::Q4_0.id(), 0), "whole Q4_0 blocks"),
        (one(&[16], 4, 0), "unknown type 4"),
        (one(&[16], u32::MAX, 0), "unknown type 4294967295"),
        (one(&[16], f32_id, 4096), "past the end"),
        (one(&[16], f32_id, 4064), "past the end"),
        (one(&[16], f32_id, u64::MAX - 31), "past the end"),
        (one(&[16], f32_id, 16), "not aligned to 32"),
    ] {
        assert!(
            message.starts_with("tensor `wild`") && message.contains(expect),
            "{message}"
        );
    }
    let good = Raw::head(3, 1, 0)
        .tensor("fine", &[16], f32_id, 4032)
        .data(4096)
        .0;
    assert_eq!(Gguf::parse(&good).unwrap().tensors[0].data.len(), 64);
    let twice = Raw::head(3, 2, 0)
        .tensor("t", &[1], f32_id, 0)
        .tensor("t", &[1], f32_id, 32);
    assert!(error(&twice.data(64).0).contains("`t`: named twice"));
}

#[test]
fn metadata_that_cannot_be_is_refused_by_key() {
    let entry = |raw: fn(Raw) -> Raw| error(&raw(Raw::head(3, 0, 1).string("key")).0);
    for (message, expect) in [
        (entry(|r| r.u32(13)), "unknown metadata value type 13"),
        (entry(|r| r.u32(7).bytes(&[2])), "a bool is 0 or 1, not 2"),
        (entry(|r| r.u32(8).u64(u64::MAX)), "truncated"),
        (entry(|r| r.u32(8).u64(2).bytes(&[0xc3, 0x28])), "not UTF-8"),
        (entry(|r| r.u32(9).u32(4).u64(u64::MAX)), "truncated"),
        (
            entry(|r| r.u32(9).u32(8).u64(1 << 61).bytes(&[0; 64])),
            "truncated",
        ),
        (
            entry(|r| r.u32(9).u32(9).u64(1 << 40).bytes(&[0; 64])),
            "truncated",
        ),
        (
            entry(|r| r.u32(9).u32(99).u64(0)),
            "unknown metadata value type 99",
        ),
        (
            entry(|r| {
                (0..6)
                    .fold(r.u32(9), |r, _| r.u32(9).u64(1))
                    .bytes(&[0; 64])
            }),
            "nested",
        ),
    ] {
        assert!(
            message.contains("`key`") && message.contains(expect),
            "{message}"
        );
    }
    let empty = Raw::head(3, 0, 1).string("").u32(0).bytes(&[1]);
    assert!(error(&empty.0).contains("1 to 65535 bytes"));
    let twice = Raw::head(3, 0, 2)
        .string("k")
        .u32(0)
        .bytes(&[1])
        .string("k")
        .u32(0)
        .bytes(&[1]);
    assert!(error(&twice.0).contains("`k`: given twice"));
    for bad in [0u32, 12] {
        let raw = Raw::head(3, 0, 1)
            .string("general.alignment")
            .u32(4)
            .u32(bad);
        assert!(error(&raw.0).contains("multiple of 8"));
    }
    // Names reach messages escaped and shortened.
    let long = Raw::head(3, 0, 1).string(&"n\n".repeat(5000)).u32(99);
    assert!(error(&long.0).contains("n\\nn\\n"));
}

#[test]
fn nested_arrays_are_read() {
    let raw = Raw::head(3, 0, 1).string("key").u32(9).u32(9).u64(2);
    let raw = raw
        .u32(8)
        .u64(1)
        .string("a")
        .u32(2)
        .u64(2)
        .bytes(&[1, 0, 2, 0]);
    let gguf = Gguf::parse(&raw.0).unwrap();
    let inner: Vec<_> = gguf
        .metadata
        .array_opt("key")
        .unwrap()
        .unwrap()
        .iter()
        .collect();
    let [Value::Array(texts), Value::Array(numbers)] = inner.as_slice() else {
        panic!("{inner:?}");
    };
    assert_eq!(texts.iter().collect::<Vec<_>>(), [Value::String("a")]);
    assert_eq!(
        numbers.iter().collect::<Vec<_>>(),
        [Value::U16(1), Value::U16(2)]
    );
}

/// Reads a file as far as it goes.
fn read_all(bytes: &[u8]) -> Result<(), models::Error> {
    let gguf = Gguf::parse(bytes)?;
    let recipe = arch::recipe(&gguf)?;
    for weight in &recipe.weights {
        weights::decode(&gguf, weight)?;
    }
    Ok(())
}

#[test]
fn damaged_bytes_never_panic() {
    let good = synthetic_bytes("tiny-qwen2");
    read_all(&good).unwrap();
    let header =
        Gguf::parse(&good).unwrap().tensors[0].data.as_ptr() as usize - good.as_ptr() as usize;
    let mut stream = Stream(0xdead_beef);
    let mut refused = 0;
    for _ in 0..3000 {
        let mut bytes = good.clone();
        for _ in 0..1 + stream.below(3) {
            let at = stream.below(header as u64) as usize;
            bytes[at] = match stream.below(3) {
                0 => stream.below(256) as u8,
                1 => bytes[at] ^ 1 << stream.below(8),
                _ => 0xff,
            };
        }
        if let Err(error) = read_all(&bytes) {
            let message = error.to_string();
            assert!(
                !message.contains('\n') && !message.is_empty(),
                "{message:?}"
            );
            refused += 1;
        }
    }
    // Damage to texts passes; damage to counts, types and shapes must not.
    assert!((300..3000).contains(&refused), "{refused} of 3000 refused");
}
