//! Token choice on the backend's side: argmax.

/// Index of the greatest logit. The lowest index wins a tie; NaN is never chosen, unless there is
/// nothing else, when the answer is 0.
pub fn reference(logits: &[f32]) -> u32 {
    let mut best: Option<(usize, f32)> = None;
    for (i, &value) in logits.iter().enumerate() {
        if !value.is_nan() && best.is_none_or(|(_, greatest)| value > greatest) {
            best = Some((i, value));
        }
    }
    best.map_or(0, |(i, _)| i as u32)
}
