//! A piece of a recipe over a whole text: what the quantiser calibrates with.

use models::recipe::Buffer;

use super::super::Backend;
use super::job::Logits;
use super::{CHUNK_TOKENS, CpuBackend};
use crate::Error;

impl CpuBackend {
    /// Runs the list over a text from an empty cache, for recipes that are a piece of a whole one:
    /// `inputs` are buffers `(tokens, elems)` that earlier pieces left, `outputs` the buffers to give
    /// back. `tokens` matter only to a piece that looks them up.
    ///
    /// # Errors
    /// As [`Backend::prefill`]; also an input of another length.
    pub fn forward(
        &mut self,
        tokens: &[u32],
        inputs: &[(Buffer, &[f32])],
        outputs: &[Buffer],
    ) -> Result<Vec<Vec<f32>>, Error> {
        self.rewind(0);
        self.check(tokens)?;
        let elems = |buffer: Buffer| self.recipe.elems(buffer);
        for (buffer, values) in inputs {
            if values.len() != tokens.len() * elems(*buffer) {
                return Err(Error::input(format!(
                    "{buffer:?} of {} tokens has {} values",
                    tokens.len(),
                    values.len()
                )));
            }
        }
        let mut left: Vec<Vec<f32>> = outputs
            .iter()
            .map(|buffer| Vec::with_capacity(tokens.len() * elems(*buffer)))
            .collect();
        for (i, chunk) in tokens.chunks(CHUNK_TOKENS).enumerate() {
            for (buffer, values) in inputs {
                let place = self.program.buffer(*buffer, chunk.len());
                let start = i * CHUNK_TOKENS * (place.len() / chunk.len());
                self.activations[place.clone()]
                    .copy_from_slice(&values[start..start + place.len()]);
            }
            self.run(chunk, Logits::Unwanted);
            for (buffer, out) in outputs.iter().zip(&mut left) {
                let place = self.program.buffer(*buffer, chunk.len());
                out.extend_from_slice(&self.activations[place]);
            }
        }
        Ok(left)
    }
}
