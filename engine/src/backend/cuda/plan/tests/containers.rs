//! Files of the quantiser: their tiles go to the device as they lie in the file.

use half::slice::HalfFloatSliceExt;

use super::*;
use crate::quantize::{self, Bits, Head};

/// A golden checkpoint as the quantiser writes it, mapped.
fn container(name: &str, group: usize, form: Int4Form, head: Head) -> LoadedModel {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/hf");
    let source = ModelFile::open(&folder.join(name)).expect("a folder");
    let parsed = source.parse().expect("parsed");
    let recipe = source.recipe(&parsed).expect("a recipe");
    let options = quantize::Options {
        bits: Bits::Four,
        group,
        form,
        method: quantize::Method::Rtn,
        head,
    };
    let hooks = quantize::Hooks {
        begin: &|_, _| (),
        interrupted: &|| false,
        release: &|| (),
    };
    let made = quantize::quantize(
        parsed.source(),
        &recipe,
        &options,
        &[],
        Vec::new(),
        &hooks,
        Vec::new(),
    );
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("made.edgellm");
    std::fs::write(&path, made.expect("quantised").1).expect("written");
    let file = ModelFile::open(&path).expect("a file");
    let parsed = file.parse().expect("parsed");
    let recipe = file.recipe(&parsed).expect("a recipe");
    file.load(&parsed, recipe).expect("loaded")
}

/// Where what was uploaded lay.
#[derive(Default)]
struct Watcher(Vec<std::ops::Range<*const u8>>, Counter);

impl Memory for Watcher {
    fn upload(&mut self, bytes: &[u8]) -> Result<DeviceSlice, Error> {
        self.0.push(bytes.as_ptr_range());
        self.1.upload(bytes)
    }

    fn reserve(&mut self, bytes: u64) -> Result<DeviceSlice, Error> {
        self.1.reserve(bytes)
    }
}

/// The quantiser packs what the plan fuses: every matrix goes to the device from where the file was mapped.
#[test]
fn tiles_of_a_container_are_uploaded_from_the_file() {
    use Int4Form::{Asymmetric, Symmetric};
    for (name, group, form, head) in [
        ("llama3-f16", 32, Symmetric, Head::Int8),
        ("llama-bf16", 64, Asymmetric, Head::Int8),
        ("qwen2-f32-shards", 128, Symmetric, Head::Int4),
        ("qwen2-f32-shards", 128, Asymmetric, Head::F16),
        ("qwen3-f32", 64, Symmetric, Head::Int8),
        ("bitnet-dense", 32, Symmetric, Head::Int8),
    ] {
        let model = container(name, group, form, head);
        let mut memory = Watcher::default();
        let tuned = Tuned::default();
        compile(&model, 12.into(), &DeviceInfo::T4, &tuned, &mut memory).expect("a plan");
        let mut matrices = 0;
        let mut in_place = |part: &[u8]| {
            matrices += 1;
            let part = part.as_ptr_range();
            assert!(memory.0.contains(&part), "{name}: a copy of a matrix");
        };
        for weight in &model.weights {
            match weight {
                Weight::Int4Tiled(part) => {
                    let tiles = part.tiles();
                    in_place(bytemuck::cast_slice(&tiles.quants));
                    in_place(bytemuck::cast_slice(tiles.scales.reinterpret_cast()));
                    if let Some(mins) = &tiles.mins {
                        in_place(bytemuck::cast_slice(mins.reinterpret_cast()));
                    }
                }
                Weight::Int8(matrix) => in_place(bytemuck::cast_slice(&matrix.quants)),
                Weight::F16(matrix) => {
                    in_place(bytemuck::cast_slice(matrix.values.reinterpret_cast()));
                }
                Weight::Vector(_) => {}
                Weight::Int4(_) | Weight::Ternary(_) => panic!("{name}: not as stored"),
            }
        }
        assert!(matrices > 2 * 2 * 7, "{name}: {matrices}");
    }
}

#[test]
fn containers_on_the_emulator() {
    use Int4Form::{Asymmetric, Symmetric};
    for (name, group, form, head) in [
        ("llama3-f16", 128, Asymmetric, Head::Int8),
        ("qwen2-f32-shards", 32, Symmetric, Head::Int4),
    ] {
        let model = container(name, group, form, head);
        emulated_logits_are_close(model, 2e-3);
    }
}
