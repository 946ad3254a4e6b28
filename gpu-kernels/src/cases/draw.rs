//! Draws among candidates: the same tokens as the reference's, draw for draw.

use super::sample::equal;
use super::{Buffers, Case, CaseError, Device, Inputs};
use crate::launch::DeviceSlice;
use crate::sample::{self, MAX_CANDIDATES, Settings, TopKOperands, TopKShape};

const VOCAB: usize = 1000;
const CONTEXT: usize = 40;
const DRAWS: u32 = 30;

const PLAIN: Settings = Settings {
    temperature: 1.0,
    top_k: 64,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.1,
    seed: 0x1234_5678_9abc_def0,
};

/// What candidates there are.
#[derive(Clone, Copy)]
enum Among {
    /// So many, bell-shaped.
    Random(usize),
    /// All of one logit.
    Equal(usize, f32),
}

pub fn cases() -> Vec<Case> {
    let settings = |change: fn(&mut Settings)| {
        let mut settings = PLAIN;
        change(&mut settings);
        settings
    };
    [
        ("64 candidates", PLAIN, Among::Random(64)),
        ("one candidate", PLAIN, Among::Random(1)),
        ("33 candidates", PLAIN, Among::Random(33)),
        ("none", PLAIN, Among::Random(0)),
        ("top-k 40", settings(|s| s.top_k = 40), Among::Random(64)),
        ("top-k 2", settings(|s| s.top_k = 2), Among::Random(64)),
        ("top-p 0.9", settings(|s| s.top_p = 0.9), Among::Random(64)),
        (
            "top-p 0.01",
            settings(|s| s.top_p = 0.01),
            Among::Random(64),
        ),
        ("min-p 0.1", settings(|s| s.min_p = 0.1), Among::Random(64)),
        (
            "all cuts",
            settings(|s| (s.top_k, s.top_p, s.min_p) = (50, 0.95, 0.02)),
            Among::Random(64),
        ),
        ("hot", settings(|s| s.temperature = 5.0), Among::Random(64)),
        (
            "cold",
            settings(|s| s.temperature = 0.05),
            Among::Random(64),
        ),
        (
            "greedy",
            settings(|s| s.temperature = 0.0),
            Among::Random(64),
        ),
        ("equal", PLAIN, Among::Equal(64, 3.0)),
        ("-inf", PLAIN, Among::Equal(64, f32::NEG_INFINITY)),
        ("inf", PLAIN, Among::Equal(3, f32::INFINITY)),
    ]
    .map(|(what, settings, among)| {
        Case::new("sample_topk", what.to_owned(), move |device| {
            draws(device, &settings, among)
        })
    })
    .into()
}

/// A token at every position, each of which is then seen.
fn draws(device: &mut dyn Device, settings: &Settings, among: Among) -> Result<f64, CaseError> {
    let info = device.info();
    let mut inputs = Inputs::new(21);
    let logits = match among {
        Among::Random(count) => inputs.floats(count, 2.0),
        Among::Equal(count, logit) => vec![logit; count],
    };
    let ids = (0..logits.len()).map(|i| (i * 37 % VOCAB) as u32);
    let mut candidates: Vec<(f32, u32)> = logits.into_iter().zip(ids).collect();
    candidates.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut words: Vec<u32> = candidates
        .iter()
        .flat_map(|(logit, id)| [logit.to_bits(), *id])
        .collect();
    while words.len() < 2 * MAX_CANDIDATES {
        words.extend([f32::NEG_INFINITY.to_bits(), u32::MAX]);
    }
    let mut seen = vec![0; VOCAB.div_ceil(32)];
    let mut ops = TopKOperands {
        candidates: device.put_u32(&words)?,
        settings: device.put_u32(&settings.words())?,
        seen: device.put_u32(&seen)?,
        tokens: device.put_u32(&[900; CONTEXT + 1])?,
        state: device.put_u32(&[3])?,
    };
    let shape = TopKShape {
        vocab: VOCAB,
        context: CONTEXT,
        advance: true,
    };
    let call = sample::plan_topk(&info, &shape, &ops)?;
    for _ in 0..DRAWS {
        device.run(&call)?;
    }
    let reference = cpu_kernels::sample::Settings {
        temperature: settings.temperature,
        top_k: settings.top_k,
        top_p: settings.top_p,
        min_p: settings.min_p,
        repetition_penalty: settings.repetition_penalty,
        seed: settings.seed,
    };
    let mut want = [900; CONTEXT + 1];
    for position in 3..3 + DRAWS {
        let token = cpu_kernels::sample::choose(&candidates, &reference, position);
        want[position as usize + 1] = token;
        seen[token as usize / 32] |= 1 << (token % 32);
    }
    equal("position", device.take_u32(ops.state)?[0], 3 + DRAWS)?;
    for (got, want) in device.take_u32(ops.tokens)?.into_iter().zip(want) {
        equal("token", got, want)?;
    }
    for (got, want) in device.take_u32(ops.seen)?.into_iter().zip(seen) {
        equal("word of what was seen", got, want)?;
    }
    // Without a set of what was seen, and without a step.
    ops.seen = DeviceSlice::NONE;
    let shape = TopKShape {
        advance: false,
        ..shape
    };
    device.run(&sample::plan_topk(&info, &shape, &ops)?)?;
    let position = 3 + DRAWS;
    equal("position", device.take_u32(ops.state)?[0], position)?;
    let token = cpu_kernels::sample::choose(&candidates, &reference, position);
    let got = device.take_u32(ops.tokens)?[position as usize + 1];
    equal("token", got, token)?;
    Ok(0.0)
}
