//! Rows of attention.

use engine::Error;
use gpu_kernels::attention;
use gpu_kernels::launch::{Call, DeviceInfo, DeviceSlice};

use super::{Operands, Row, floats, halves, noise, planned};

/// Everything that is timed of it.
pub fn all() -> Vec<Row> {
    let mut rows = Vec::new();
    // SmolLM2-135M, Qwen2.5-0.5B, 1.5B and 3B, Llama 8B.
    for (heads, kv_heads, head_dim) in [
        (9, 3, 64),
        (14, 2, 64),
        (12, 2, 128),
        (16, 2, 128),
        (32, 8, 128),
    ] {
        for tokens in [1, 128, 512, 1024, 4096, 16_384] {
            rows.push(attention_split(heads, kv_heads, head_dim, tokens));
        }
    }
    for tokens in [65_536, 131_072] {
        rows.push(attention_split(12, 2, 128, tokens));
    }
    for tokens in [512, 4096, 16_384, 131_072] {
        rows.push(attention_split_v8(12, 2, 128, tokens));
    }
    rows.push(attention_split_v8(16, 2, 128, 16_384));
    rows.push(attention_split_v8(14, 2, 64, 4096));
    rows.push(attention_split_v8(32, 32, 80, 4096));
    // Widths of other models, and the kernel for widths that the split one does not take.
    rows.push(attention_split(32, 32, 80, 4096));
    rows.push(attention_split(32, 32, 96, 4096));
    rows.push(attention_split(8, 4, 256, 4096));
    rows.push(attention_block_a_head(12, 2, 128, 1024));
    rows
}

/// Attention of one token over `context` cached ones, itself included.
pub fn attention_over(heads: usize, kv_heads: usize, head_dim: usize, context: usize) -> Vec<Row> {
    vec![
        attention_block_a_head(heads, kv_heads, head_dim, context),
        attention_split(heads, kv_heads, head_dim, context),
    ]
}

/// Attention over a full cache of `tokens`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attended {
    /// H, KV, Dh.
    pub dims: [usize; 3],
    /// Positions in the cache.
    pub tokens: usize,
    /// Whether the values are of 8 bits.
    pub of_8_bits: bool,
}

impl Attended {
    /// Its shape, with room for just these positions.
    pub fn shape(&self) -> attention::Shape {
        let [heads, kv_heads, head_dim] = self.dims;
        attention::Shape {
            heads,
            kv_heads,
            head_dim,
            context: self.tokens,
            scale: 1.0 / (head_dim as f32).sqrt(),
            window: None,
        }
    }

    /// Entry name.
    pub fn kernel(&self) -> &'static str {
        let kernel = if self.of_8_bits {
            attention::split::kernel_v8
        } else {
            attention::split::kernel
        };
        kernel(self.dims[2])
    }

    /// Bytes of keys, values, queries and results. What the splits leave for each other is not among
    /// them: it is the kernel's choice.
    pub fn bytes(&self) -> u64 {
        let [heads, kv_heads, head_dim] = self.dims;
        let a_token = if self.of_8_bits {
            3 * head_dim + 2
        } else {
            4 * head_dim
        };
        (kv_heads * self.tokens * a_token + 8 * heads * head_dim) as u64
    }

    /// The calls of these launches, over the same operands.
    ///
    /// # Errors
    /// As [`super::Make`].
    pub fn calls(
        &self,
        tunings: &[attention::split::Tuning],
        device: &DeviceInfo,
        memory: &mut dyn Operands,
    ) -> Result<Vec<Call>, Error> {
        let (shape, operands) = self.operands(tunings, memory)?;
        tunings
            .iter()
            .map(|&tuning| planned(attention::plan(device, &shape, &operands, tuning)))
            .collect()
    }

    fn operands(
        &self,
        tunings: &[attention::split::Tuning],
        memory: &mut dyn Operands,
    ) -> Result<(attention::Shape, attention::Operands), Error> {
        let shape = self.shape();
        let [heads, kv_heads, head_dim] = self.dims;
        let cache = kv_heads * self.tokens * head_dim;
        let scratch = tunings
            .iter()
            .map(|&tuning| attention::scratch_bytes(&shape, tuning) as usize)
            .max()
            .unwrap_or(0);
        let operands = attention::Operands {
            q: floats(memory, heads * head_dim)?,
            k_cache: halves(memory, cache)?,
            v_cache: if self.of_8_bits {
                noise(memory, cache)?
            } else {
                halves(memory, cache)?
            },
            v_scales: if self.of_8_bits {
                halves(memory, kv_heads * self.tokens)?
            } else {
                DeviceSlice::NONE
            },
            // A step's layers share them, so they sit in L2.
            state: memory.activations(&(self.tokens as u32 - 1).to_le_bytes())?,
            out: memory.activations(&vec![0; 4 * heads * head_dim])?,
            partials: match scratch {
                0 => DeviceSlice::NONE,
                bytes => {
                    memory.activations(&attention::UNWRITTEN.to_le_bytes().repeat(bytes / 4))?
                }
            },
        };
        Ok((shape, operands))
    }

    fn shown(&self) -> String {
        let name = attention::split::name(&self.shape());
        format!("{name}, {} tokens", self.tokens)
    }

    fn row(self) -> Row {
        Row {
            kernel: self.kernel(),
            shape: self.shown(),
            bytes: self.bytes(),
            streams: true,
            make: Box::new(move |device, memory| {
                let shape = self.shape();
                let chosen = attention::choose(device, memory.tuned(), &shape, self.of_8_bits);
                let mut calls = self.calls(&[chosen.launch], device, memory)?;
                Ok(calls.remove(0))
            }),
        }
    }
}

fn attention_split(heads: usize, kv_heads: usize, head_dim: usize, tokens: usize) -> Row {
    let attended = Attended {
        dims: [heads, kv_heads, head_dim],
        tokens,
        of_8_bits: false,
    };
    attended.row()
}

/// Keys f16, values of 8 bits.
fn attention_split_v8(heads: usize, kv_heads: usize, head_dim: usize, tokens: usize) -> Row {
    let attended = Attended {
        dims: [heads, kv_heads, head_dim],
        tokens,
        of_8_bits: true,
    };
    attended.row()
}

fn attention_block_a_head(heads: usize, kv_heads: usize, head_dim: usize, tokens: usize) -> Row {
    let attended = Attended {
        dims: [heads, kv_heads, head_dim],
        tokens,
        of_8_bits: false,
    };
    Row {
        kernel: "attention_decode_f16",
        shape: attended.shown(),
        bytes: attended.bytes(),
        streams: true,
        make: Box::new(move |device, memory| {
            let (shape, operands) = attended.operands(&[], memory)?;
            planned(attention::block_a_head::plan(device, &shape, &operands))
        }),
    }
}
