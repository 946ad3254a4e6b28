//! How values flow through a recipe: which buffers a step reads and writes, which of them matter
//! later, which weights share an input and what makes that input.

use models::recipe::{Buffer, Recipe, Step, WeightId};

/// Linear layers that follow each other and read one buffer.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// First step.
    pub start: usize,
    /// Step after the last.
    pub end: usize,
    /// Their input.
    pub src: Buffer,
    /// Their matrices.
    pub weights: Vec<WeightId>,
}

/// What can take a factor of each of a group's inputs upon itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Maker {
    /// The gain of a norm: one number an input.
    Gain(WeightId),
    /// Rows of a linear layer, and its bias. `heads` of the output read each head of `head_dim` rows.
    Rows {
        /// Matrix.
        weight: WeightId,
        /// Bias.
        bias: Option<WeightId>,
        /// How often a head of rows is repeated among the inputs; 1 where rows and inputs are the same.
        repeats: usize,
        /// Rows of a head.
        head_dim: usize,
    },
}

impl Maker {
    /// Number of `maker` that makes input `input`.
    pub fn of_input(&self, input: usize) -> usize {
        match *self {
            Maker::Gain(_) => input,
            Maker::Rows {
                repeats, head_dim, ..
            } => input / head_dim / repeats * head_dim + input % head_dim,
        }
    }
}

/// Buffers that a step reads, and those that it writes.
fn touched(step: &Step) -> (Vec<Buffer>, Vec<Buffer>) {
    match *step {
        Step::Embed { dst, .. } => (vec![], vec![dst]),
        Step::RmsNorm { src, dst, .. }
        | Step::Linear { src, dst, .. }
        | Step::Logits { src, dst, .. } => (vec![src], vec![dst]),
        Step::HeadNorm { buffer, .. }
        | Step::RoundToInt8 { buffer }
        | Step::Rope { buffer, .. } => (vec![buffer], vec![buffer]),
        Step::KvAppend { key, value, .. } => (vec![key, value], vec![]),
        Step::Attention { query, dst, .. } => (vec![query], vec![dst]),
        Step::SwiGlu { gate, up, dst } | Step::ReluSquaredGlu { gate, up, dst } => {
            (vec![gate, up], vec![dst])
        }
        Step::Add { src, dst } => (vec![src, dst], vec![dst]),
    }
}

/// Buffers whose values before step `at` a later step reads.
pub fn live(steps: &[Step], at: usize) -> Vec<Buffer> {
    let read_first = |buffer: Buffer| {
        steps[at..].iter().find_map(|step| {
            let (reads, writes) = touched(step);
            match (reads.contains(&buffer), writes.contains(&buffer)) {
                (true, _) => Some(true),
                (false, true) => Some(false),
                (false, false) => None,
            }
        })
    };
    Buffer::ALL
        .into_iter()
        .filter(|&buffer| read_first(buffer) == Some(true))
        .collect()
}

/// The groups of a recipe, in order.
pub fn groups(steps: &[Step]) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (i, step) in steps.iter().enumerate() {
        let Step::Linear { weight, src, .. } = *step else {
            continue;
        };
        match groups.last_mut() {
            Some(last) if last.end == i && last.src == src => {
                last.end = i + 1;
                last.weights.push(weight);
            }
            _ => groups.push(Group {
                start: i,
                end: i + 1,
                src,
                weights: vec![weight],
            }),
        }
    }
    groups
}

/// The last of the first `end` steps that writes `buffer`.
fn writer(steps: &[Step], end: usize, buffer: Buffer) -> Option<usize> {
    steps[..end]
        .iter()
        .rposition(|step| touched(step).1.contains(&buffer))
}

/// What makes the inputs of a group, if it can take factors and nothing else would notice.
pub fn maker(recipe: &Recipe, group: &Group) -> Option<Maker> {
    let steps = &recipe.steps;
    if live(steps, group.end).contains(&group.src) {
        return None;
    }
    let made = writer(steps, group.start, group.src)?;
    let rows = |end: usize, buffer: Buffer, repeats: usize, head_dim: usize| match steps
        [writer(steps, end, buffer)?]
    {
        Step::Linear { weight, bias, .. } => Some(Maker::Rows {
            weight,
            bias,
            repeats,
            head_dim,
        }),
        _ => None,
    };
    let config = &recipe.config;
    match steps[made] {
        Step::RmsNorm { weight, .. } => Some(Maker::Gain(weight)),
        Step::Attention { layer, .. } => {
            let appended = steps[..made].iter().rposition(
                |step| matches!(step, Step::KvAppend { layer: of, .. } if *of == layer),
            )?;
            let Step::KvAppend { value, .. } = steps[appended] else {
                return None;
            };
            rows(
                appended,
                value,
                config.heads / config.kv_heads,
                config.head_dim,
            )
        }
        // Linear in `up`, whatever the gate goes through.
        Step::SwiGlu { up, .. } | Step::ReluSquaredGlu { up, .. } => {
            rows(made, up, 1, recipe.elems(up))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use models::file::gguf::Gguf;
    use models::synthetic;

    use super::*;

    #[test]
    fn a_layer_has_four_groups_and_each_has_a_maker() {
        let shape = synthetic::shape("tiny-qwen2").expect("known");
        let bytes = synthetic::to_vec(shape, &synthetic::Options::default()).expect("made");
        let recipe = models::arch::recipe(&Gguf::parse(&bytes).expect("parsed")).expect("a recipe");
        let name = |id: WeightId| recipe.weights[id].name.as_str();
        let groups = groups(&recipe.steps);
        assert_eq!(groups.len(), 4 * shape.layers);
        let expected = [
            (
                3,
                vec![Buffer::Residual, Buffer::Normed],
                "blk.1.attn_norm.weight",
            ),
            (
                1,
                vec![Buffer::Residual, Buffer::Attended],
                "blk.1.attn_v.weight",
            ),
            (
                2,
                vec![Buffer::Residual, Buffer::Normed],
                "blk.1.ffn_norm.weight",
            ),
            (
                1,
                vec![Buffer::Residual, Buffer::Gated],
                "blk.1.ffn_up.weight",
            ),
        ];
        for (group, (matrices, buffers, maker_name)) in groups[4..].iter().zip(expected) {
            assert_eq!(group.weights.len(), matrices);
            assert_eq!(live(&recipe.steps, group.start), buffers);
            let made_by = match maker(&recipe, group).expect("a maker") {
                Maker::Gain(weight) => weight,
                Maker::Rows { weight, bias, .. } => {
                    assert_eq!(bias.is_some(), maker_name.contains("attn_v"));
                    weight
                }
            };
            assert_eq!(name(made_by), maker_name);
        }
        // 4 heads of 16 read 2 heads: inputs 16..32 and 0..16 are made by the same rows.
        let values = maker(&recipe, &groups[5]).expect("a maker");
        let rows: Vec<usize> = [0, 17, 33, 63]
            .iter()
            .map(|&i| values.of_input(i))
            .collect();
        assert_eq!(rows, [0, 1, 17, 31]);
    }
}
