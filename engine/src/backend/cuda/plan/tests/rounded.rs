//! Models whose activations are rounded to 8 bits, beside the CPU.

use super::*;
use crate::quality::{Prediction, Reference, score};

/// Norms, levels, their sums and the scales of ternary weights have the same bits on both sides. What is left is
/// the last bit of an attention, which hardly ever decides on which side of an edge a value is rounded: in models
/// of width 64 a single such value is a mean divergence of 2e-4.
#[test]
fn rounded_activations_agree_with_the_cpu() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/hf");
    let index = std::fs::read_to_string(folder.join("index.json")).expect("the index");
    let index: serde_json::Value = serde_json::from_str(&index).expect("JSON");
    for name in ["bitnet-autobitlinear", "bitnet-bitlinear", "bitnet-online"] {
        let file = ModelFile::open(&folder.join(name)).expect("a folder");
        let parsed = file.parse().expect("parsed");
        let recipe = file.recipe(&parsed).expect("a recipe");
        let model = file.load(&parsed, recipe).expect("loaded");
        let ids = index[name]["ids"].as_array().expect("ids");
        let ids: Vec<u32> = ids
            .iter()
            .map(|id| id.as_u64().expect("an id") as u32)
            .collect();
        let mut memory = Emulator::default();
        let (device, tuned) = (DeviceInfo::T4, Tuned::default());
        let plan = compile(&model, ids.len().into(), &device, &tuned, &mut memory).expect("a plan");
        let mut cpu = CpuBackend::new(Arc::new(model), ids.len()).expect("a CPU backend");
        let mut tokens = ids.clone();
        tokens.push(0);
        let mut divergences = Vec::new();
        for id in &ids {
            memory
                .buffer(plan.tokens)
                .write(0, bytemuck::cast_slice(&tokens));
            memory.run(&plan.full);
            let logits: Vec<f32> = typed(&memory.read(plan.logits));
            cpu.decode(*id).expect("decode");
            let want = cpu.logits().expect("logits");
            let [gpu, cpu] = [&logits, &want].map(|row| Prediction::new(row).expect("finite"));
            let compared = score(&gpu, 0, Some(Reference::Model(cpu))).compared;
            divergences.push(compared.expect("a reference").kl);
        }
        let mean = divergences.iter().sum::<f64>() / divergences.len() as f64;
        println!("{name}: mean KL {mean:.1e}");
        assert!(mean < 1e-6, "{name}: {divergences:?}");
    }
}
