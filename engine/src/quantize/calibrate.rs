//! Quantises with a calibration text: all of it goes through the recipe together, one group of linear
//! layers after the other; a group is quantised for the inputs that it gets, then the text goes on
//! through the quantised weights. In memory: one layer's weights and one piece of the text; the buffers
//! that are read again later lie in a temporary file.

use std::sync::Arc;

use models::file::Source;
use models::file::container::StoredWeight;
use models::quant::{Int4Matrix, Weight};
use models::recipe::{Buffer, Recipe, Step, WeightId, WeightKind};
use models::weights::{self, FloatRows};
use rayon::prelude::*;

use super::flow::{self, Group, Maker};
use super::gram::Gram;
use super::spool::Spool;
use super::{Hooks, Method, Options, awq, gptq, uncalibrated};
use crate::Error;
use crate::backend::LoadedModel;
use crate::backend::cpu::CpuBackend;

/// The text and the weights, up to a step of the recipe.
struct Walk<'a> {
    source: &'a dyn Source,
    recipe: &'a Recipe,
    planned: &'a [StoredWeight],
    options: &'a Options,
    hooks: &'a Hooks<'a>,
    /// Weights made and not written yet.
    weights: Vec<Option<Weight>>,
    /// Weights written.
    written: usize,
    /// Token ids of the pieces of the text.
    sequences: Vec<Vec<u32>>,
    /// Values `(tokens, elems)` of the buffers that are live, a piece after the other.
    spool: Spool,
    /// Step that the text has reached.
    at: usize,
    /// Buffers in the spool.
    live: Vec<Buffer>,
}

/// Quantises the weights of `recipe` as `planned` and hands them to `write` in order.
///
/// # Errors
/// As [`super::quantize`].
pub fn quantize(
    source: &dyn Source,
    recipe: &Recipe,
    planned: &[StoredWeight],
    options: &Options,
    sequences: Vec<Vec<u32>>,
    hooks: &Hooks<'_>,
    write: &mut dyn FnMut(Weight) -> Result<(), Error>,
) -> Result<(), Error> {
    if sequences.is_empty() {
        return Err(Error::input("the calibration text is empty"));
    }
    let weights = recipe
        .weights
        .iter()
        .map(|reference| match reference.kind {
            WeightKind::Vector => weights::decode(source, reference).map(Some),
            _ => Ok(None),
        })
        .collect::<Result<_, _>>()?;
    let mut walk = Walk {
        source,
        recipe,
        planned,
        options,
        hooks,
        weights,
        written: 0,
        sequences,
        spool: Spool::new()?,
        at: 0,
        live: Vec::new(),
    };
    for step in &recipe.steps {
        if let Step::Embed { table, .. } = *step {
            walk.make(table)?;
        }
    }
    for group in flow::groups(&recipe.steps) {
        walk.advance(group.start)?;
        let maker = flow::maker(recipe, &group);
        // Nothing folds into what lies before a norm any more.
        if let Some(Maker::Gain(norm)) = maker {
            walk.write_before(norm, write)?;
        }
        walk.quantize(&group, maker)?;
    }
    for id in 0..recipe.weights.len() {
        if walk.weights[id].is_none() && id >= walk.written {
            walk.make(id)?;
        }
    }
    walk.write_before(recipe.weights.len(), write)
}

impl Walk<'_> {
    fn check_interrupt(&self) -> Result<(), Error> {
        match (self.hooks.interrupted)() {
            true => Err(Error::machine("interrupted")),
            false => Ok(()),
        }
    }

    /// Makes a weight that calibration has no say in.
    fn make(&mut self, id: WeightId) -> Result<(), Error> {
        let (reference, stored) = (&self.recipe.weights[id], &self.planned[id]);
        let weight = uncalibrated(
            self.source,
            reference,
            stored,
            self.options.method,
            self.hooks,
        )?;
        self.weights[id] = Some(weight);
        Ok(())
    }

    /// Writes all weights before `id`.
    fn write_before(
        &mut self,
        id: WeightId,
        write: &mut dyn FnMut(Weight) -> Result<(), Error>,
    ) -> Result<(), Error> {
        while self.written < id {
            match self.weights[self.written].take() {
                Some(weight) => write(weight)?,
                None => {
                    let name = &self.planned[self.written].name;
                    return Err(Error::machine(format!(
                        "tensor `{name}` is read by no step in order"
                    )));
                }
            }
            self.written += 1;
        }
        Ok(())
    }

    /// Takes the text through the steps before `to`.
    fn advance(&mut self, to: usize) -> Result<(), Error> {
        let steps = self.recipe.steps[self.at..to]
            .iter()
            .cloned()
            .map(in_layer_0)
            .collect();
        let mut recipe = Recipe {
            steps,
            ..self.recipe.clone()
        };
        recipe.config.layers = 1;
        let live = flow::live(&self.recipe.steps, to);
        let absent = || Weight::Vector(Vec::new());
        let weights = self
            .weights
            .iter_mut()
            .map(|w| w.take().unwrap_or_else(absent))
            .collect();
        let model = Arc::new(LoadedModel::new(recipe, weights));
        let longest = self.sequences.iter().map(Vec::len).max().unwrap_or(0);
        let mut backend = CpuBackend::new(Arc::clone(&model), longest)?;
        let mut spool = Spool::new()?;
        for (piece, tokens) in self.sequences.iter().enumerate() {
            self.check_interrupt()?;
            let values = (0..self.live.len())
                .map(|place| self.spool.read(piece, place))
                .collect::<Result<Vec<_>, _>>()?;
            let values = values.iter().map(Vec::as_slice);
            let inputs: Vec<(Buffer, &[f32])> = self.live.iter().copied().zip(values).collect();
            spool.push(&backend.forward(tokens, &inputs, &live)?)?;
        }
        self.spool = spool;
        drop(backend);
        let model = Arc::into_inner(model).ok_or_else(|| Error::machine("the model is in use"))?;
        for (place, weight) in self.weights.iter_mut().zip(model.weights) {
            *place = Some(weight).filter(|weight| weight.shape().1 > 0);
        }
        (self.at, self.live) = (to, live);
        Ok(())
    }

    /// Place of a buffer among the live ones.
    fn place(&self, buffer: Buffer) -> Result<usize, Error> {
        let place = self.live.iter().position(|&live| live == buffer);
        place.ok_or_else(|| Error::machine(format!("{buffer:?} is not live before it is read")))
    }

    /// Quantises the matrices of a group.
    fn quantize(&mut self, group: &Group, maker: Option<Maker>) -> Result<(), Error> {
        let src = self.place(group.src)?;
        let mut gram = Gram::new(self.recipe.elems(group.src));
        for piece in 0..self.sequences.len() {
            self.check_interrupt()?;
            gram.add(&self.spool.read(piece, src)?);
        }
        let mut floats: Vec<Vec<f32>> = group
            .weights
            .iter()
            .map(|&id| self.floats(id))
            .collect::<Result<_, _>>()?;
        if self.options.method == Method::Awq
            && let Some(maker) = maker
        {
            self.scale(&mut floats, &mut gram, maker, src)?;
        }
        let (size, form) = (self.options.group, self.options.form);
        let importance = gram.mean_squares();
        let feedback = match self.options.method {
            Method::Gptq => Some(gptq::Feedback::new(gram)?),
            Method::Awq | Method::Mse | Method::Rtn => None,
        };
        for (&id, floats) in group.weights.iter().zip(floats) {
            self.check_interrupt()?;
            let stored = &self.planned[id];
            (self.hooks.begin)(&stored.name, floats.len());
            let matrix = match &feedback {
                Some(feedback) => gptq::encode(&floats, feedback, size, form),
                None => awq::encode(&floats, &importance, size, form),
            };
            let matrix =
                matrix.map_err(|e| Error::input(format!("tensor `{}`: {e}", stored.name)))?;
            self.weights[id] = Some(Weight::Int4(matrix));
        }
        Ok(())
    }

    /// All of a matrix `(n, k)`.
    fn floats(&self, id: WeightId) -> Result<Vec<f32>, Error> {
        let reference = &self.recipe.weights[id];
        let rows = FloatRows::new(self.source, reference)?;
        let mut floats = vec![0.0; reference.rows * reference.cols];
        floats
            .par_chunks_mut(reference.cols)
            .enumerate()
            .for_each(|(i, row)| rows.read(i, row));
        (self.hooks.release)();
        match floats.iter().position(|w| !w.is_finite()) {
            None => Ok(floats),
            Some(i) => Err(Error::input(format!(
                "tensor `{}`: row {}, column {} is {}",
                self.planned[id].name,
                i / reference.cols,
                i % reference.cols,
                floats[i]
            ))),
        }
    }

    /// Multiplies columns and divides their inputs, in the text and in what makes them.
    fn scale(
        &mut self,
        floats: &mut [Vec<f32>],
        gram: &mut Gram,
        maker: Maker,
        src: usize,
    ) -> Result<(), Error> {
        let k = gram.cols();
        let ties: Vec<usize> = (0..k).map(|input| maker.of_input(input)).collect();
        let matrices: Vec<&[f32]> = floats.iter().map(Vec::as_slice).collect();
        let (size, form) = (self.options.group, self.options.form);
        let scales = awq::column_scales(&matrices, gram, &ties, size, form);
        for row in floats.iter_mut().flat_map(|all| all.chunks_exact_mut(k)) {
            row.iter_mut()
                .zip(&scales)
                .for_each(|(w, scale)| *w *= scale);
        }
        gram.divide(&scales);
        for piece in 0..self.sequences.len() {
            let mut values = self.spool.read(piece, src)?;
            for row in values.chunks_exact_mut(k) {
                row.iter_mut()
                    .zip(&scales)
                    .for_each(|(x, scale)| *x /= scale);
            }
            self.spool.replace(piece, src, &values)?;
        }
        let mut divisors = vec![1.0; ties.iter().max().map_or(0, |last| last + 1)];
        for (&maker, &scale) in ties.iter().zip(&scales) {
            divisors[maker] = scale;
        }
        let (matrix, vector) = match maker {
            Maker::Gain(gain) => (None, Some(gain)),
            Maker::Rows { weight, bias, .. } => (Some(weight), bias),
        };
        if let Some(Weight::Vector(values)) = vector.and_then(|id| self.weights[id].as_mut()) {
            values
                .iter_mut()
                .zip(&divisors)
                .for_each(|(v, divisor)| *v /= divisor);
        }
        if let Some(Weight::Int4(matrix)) = matrix.and_then(|id| self.weights[id].as_mut()) {
            divide_rows(matrix, &divisors);
        }
        Ok(())
    }
}

/// Divides each row by a number: its scales and minima do.
fn divide_rows(matrix: &mut Int4Matrix, divisors: &[f32]) {
    let groups = matrix.groups_per_row();
    let parts = [Some(&mut matrix.scales), matrix.mins.as_mut()];
    for part in parts.into_iter().flatten() {
        for (row, divisor) in part.to_mut().chunks_exact_mut(groups).zip(divisors) {
            for value in row {
                *value = half::f16::from_f32(value.to_f32() / divisor);
            }
        }
    }
}

/// The step in a model that has one layer's cache only.
fn in_layer_0(mut step: Step) -> Step {
    if let Step::KvAppend { layer, .. } | Step::Attention { layer, .. } = &mut step {
        *layer = 0;
    }
    step
}
