//! Rows of the greatest logits and of the draw among them.

use gpu_kernels::launch::DeviceSlice;
use gpu_kernels::logits;
use gpu_kernels::sample::{self, CANDIDATES_BYTES, MAX_CANDIDATES, Settings};

use super::{Row, floats, halves, ints, noise, planned};

/// Among all candidates.
const SETTINGS: Settings = Settings {
    temperature: 0.8,
    top_k: 64,
    top_p: 0.95,
    min_p: 0.0,
    repetition_penalty: 1.1,
    seed: 1,
};

/// Logits with the 64 greatest, after a penalty for every second token.
pub fn logits_top(vocab: usize, width: usize, group: usize) -> Row {
    let groups = vocab * width.div_ceil(group);
    let shape = logits::Shape {
        vocab,
        width,
        group,
    };
    Row {
        kernel: logits::top_kernel(&shape),
        shape: format!("{vocab} x {width} group {group}"),
        bytes: (vocab * width + 2 * groups + 4 * (vocab + width) + vocab / 8) as u64,
        streams: true,
        make: Box::new(move |device, memory| {
            let operands = logits::Operands {
                quants: noise(memory, vocab * width)?,
                scales: halves(memory, groups)?,
                x: floats(memory, width)?,
                logits: memory.reserve(4 * vocab as u64)?,
                scratch: memory.activations(&vec![0; logits::scratch_bytes(device) as usize])?,
            };
            let top = logits::Top {
                candidates: memory.activations(&vec![0; CANDIDATES_BYTES as usize])?,
                seen: memory.activations(&vec![0x55; vocab.div_ceil(32) * 4])?,
                settings: memory.activations(&settings())?,
            };
            planned(logits::plan_top(device, &shape, &operands, &top))
        }),
    }
}

fn settings() -> Vec<u8> {
    let words = SETTINGS.words();
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A draw among 64 candidates.
pub fn sample_topk(vocab: usize) -> Row {
    Row {
        kernel: "sample_topk",
        shape: format!("{vocab}"),
        bytes: CANDIDATES_BYTES,
        streams: false,
        make: Box::new(move |device, memory| {
            let candidates = (0..MAX_CANDIDATES as u32).flat_map(|i| {
                let logit = 5.0 - 0.1 * i as f32;
                [logit.to_bits(), i]
            });
            let operands = sample::TopKOperands {
                candidates: ints(memory, &candidates.collect::<Vec<_>>())?,
                settings: memory.upload(&settings())?,
                seen: DeviceSlice::NONE,
                tokens: ints(memory, &[0, 0])?,
                state: ints(memory, &[0])?,
            };
            let shape = sample::TopKShape {
                vocab,
                context: 1,
                advance: false,
            };
            planned(sample::plan_topk(device, &shape, &operands))
        }),
    }
}
