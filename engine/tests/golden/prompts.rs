//! Prompts of awkward lengths on the GPU: many tokens at once, in pieces and one by one they have to
//! lead where they lead on the CPU.

use std::sync::OnceLock;

use serde::Deserialize;

use crate::support::{self, Device};
use engine::backend::Tier;

/// Around what tiles and blocks of the kernels hold, and more than a run of many tokens.
const LENGTHS: [usize; 9] = [1, 2, 15, 16, 17, 511, 512, 513, 2000];
/// Below this distance of the two best logits rounding decides.
const CERTAIN: f32 = 0.05;
/// Of logits against the CPU's: largest difference over largest logit.
const MAX_DIFFERENCE: f64 = 0.01;

#[derive(Deserialize)]
struct Text {
    ids: Vec<u32>,
}

#[test]
fn cuda_sm_75() {
    support::on(Device::Cuda(Tier::SM_75), lead_where_they_lead_on_the_cpu);
}

#[test]
fn cuda_sm_80() {
    support::on(Device::Cuda(Tier::SM_80), lead_where_they_lead_on_the_cpu);
}

#[test]
fn cuda_sm_90() {
    support::on(Device::Cuda(Tier::SM_90), lead_where_they_lead_on_the_cpu);
}

#[test]
fn cuda_sm_90a() {
    support::on(Device::Cuda(Tier::SM_90A), lead_where_they_lead_on_the_cpu);
}

/// The golden text over and over.
fn prompt(length: usize) -> Vec<u32> {
    let text: Text = support::json("smollm2_logits.json");
    text.ids.iter().copied().cycle().take(length).collect()
}

/// The CPU's logits after each prompt.
fn expected() -> &'static [Vec<f32>] {
    static EXPECTED: OnceLock<Vec<Vec<f32>>> = OnceLock::new();
    EXPECTED.get_or_init(|| {
        let longest = LENGTHS.into_iter().max().unwrap_or(1);
        let model = &support::default_model().model;
        let mut backend = support::backend(Device::Cpu, model, longest);
        // One starts as the other does: only what it has more is computed.
        let ids = prompt(longest);
        LENGTHS
            .map(|length| {
                let from = backend.position();
                backend.prefill(&ids[from..length]).expect("prefill");
                backend.logits().expect("logits")
            })
            .into()
    })
}

/// The best token and how far it is ahead.
fn best(logits: &[f32]) -> (usize, f32) {
    let mut best = (0, f32::NEG_INFINITY);
    let mut second = f32::NEG_INFINITY;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            second = best.1;
            best = (id, logit);
        } else {
            second = second.max(logit);
        }
    }
    (best.0, best.1 - second)
}

fn lead_where_they_lead_on_the_cpu(device: Device) {
    let model = &support::default_model().model;
    let longest = LENGTHS.into_iter().max().unwrap_or(1);
    let mut backend = support::backend(device, model, longest);
    let mut certain = 0;
    for (length, want) in LENGTHS.into_iter().zip(expected()) {
        let ids = prompt(length);
        // At once; in two, the second on top of a cache; one by one.
        let cut = length / 3;
        let ways: [(&str, Vec<&[u32]>); 3] = [
            ("at once", vec![&ids[..]]),
            ("in two", vec![&ids[..cut], &ids[cut..]]),
            ("one by one", ids.chunks(1).collect()),
        ];
        for (way, pieces) in ways {
            backend.rewind(0);
            for piece in pieces.into_iter().filter(|piece| !piece.is_empty()) {
                backend.prefill(piece).expect("prefill");
            }
            let got = backend.logits().expect("logits");
            let (_, difference) = support::agreement(&got, want);
            println!("{length} tokens {way}: largest difference {difference:.5}");
            assert!(
                difference < MAX_DIFFERENCE,
                "{length} tokens {way}: logits differ by {difference} of the largest"
            );
            let (id, ahead) = best(want);
            if ahead >= CERTAIN {
                certain += 1;
                assert_eq!(best(&got).0, id, "{length} tokens {way}");
            }
        }
    }
    assert!(certain >= LENGTHS.len(), "{certain} certain choices");
}
