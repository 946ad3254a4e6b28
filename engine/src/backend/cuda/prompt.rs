//! Prompts: many tokens through the layers at a time.

use cust::memory::bytemuck;
use gpu_kernels::launch::{Call, DeviceSlice};

use super::CudaBackend;
use crate::Error;

const STATE_BYTES: u64 = size_of::<u32>() as u64;

impl CudaBackend {
    /// Takes the `count` tokens from position `start` on, which the device knows, through the layers in
    /// runs, as a body would one after the other; their logits are added to `logits` if there is one.
    /// Whether it did: a single token is left to the body, and some recipes have no such runs.
    ///
    /// # Errors
    /// [`Error::Machine`] if the device fails.
    pub(super) fn run_many(
        &mut self,
        start: usize,
        count: usize,
        mut logits: Option<&mut Vec<f32>>,
    ) -> Result<bool, Error> {
        let Some(most) = self.plan.many.as_ref().map(|many| many.tokens) else {
            return Ok(false);
        };
        if count < 2 {
            return Ok(false);
        }
        // Each run reads its position in a place of its own, so that none waits for the host.
        let starts: Vec<u32> = (start..start + count)
            .step_by(most)
            .map(|first| first as u32)
            .collect();
        self.set_position(start + count - 1)?;
        if let Some(many) = &self.plan.many {
            let places = DeviceSlice {
                bytes: starts.len() as u64 * STATE_BYTES,
                ..many.starts
            };
            self.memory.write(places, bytemuck::cast_slice(&starts))?;
        }
        for (i, &first) in starts.iter().enumerate() {
            let tokens = most.min(start + count - first as usize);
            let Some(many) = &self.plan.many else {
                break;
            };
            let state = DeviceSlice {
                address: many.starts.address + i as u64 * STATE_BYTES,
                bytes: STATE_BYTES,
            };
            self.queue(&many.calls(tokens, state)?)?;
            if let Some(logits) = &mut logits {
                for row in 0..tokens {
                    self.queue(&[many.output(row)?, self.plan.plain_logits.clone()])?;
                    let from = logits.len();
                    logits.resize(from + self.vocab, 0.0);
                    let to = bytemuck::cast_slice_mut(&mut logits[from..]);
                    self.memory.read(self.plan.logits, to)?;
                }
            } else if i + 1 == starts.len() {
                self.queue(&[many.output(tokens - 1)?])?;
            }
        }
        Ok(true)
    }

    fn queue(&self, calls: &[Call]) -> Result<(), Error> {
        // SAFETY: the plan took every address from `memory`, which outlives the work.
        calls
            .iter()
            .try_for_each(|call| unsafe { self.gpu.queue(call) })
    }
}
