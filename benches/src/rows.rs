//! What is timed: a kernel at a shape, with the bytes that it has to move at least.

use std::sync::LazyLock;

use engine::Error;
use engine::backend::cuda::plan::Memory;
use gpu_kernels::launch::{Call, DeviceInfo, DeviceSlice, ShapeError};
use gpu_kernels::tuned::Tuned;
use gpu_kernels::variant::{Choice, INT4_GEMV, VariantId};
use gpu_kernels::{
    add, embed, kv_append, linear, logits, read as read_kernel, rmsnorm, rope, rope_kv_append,
    sample, swiglu,
};
use half::f16;

use crate::select::SEVEN;

pub use attention::attention_over;
use choice::{logits_top, sample_topk};
use float::float_rows;
use heads::heads_rows;
use prompt::prompt_rows;
use tiled::fused_int4;
pub use tiled::{Tiled, gemv_int4_mma, gemv_int4_mma_in};

pub mod attention;
mod choice;
mod float;
mod heads;
pub mod prompt;
mod tiled;

/// Allocates a kernel's operands and plans the call.
pub type Make = Box<dyn Fn(&DeviceInfo, &mut dyn Operands) -> Result<Call, Error>>;

/// Where a row's operands come from.
pub trait Operands: Memory {
    /// A buffer of activations: rotating copies of a row share it, as it sits in L2 in a real step.
    ///
    /// # Errors
    /// As [`Memory::upload`].
    fn activations(&mut self, bytes: &[u8]) -> Result<DeviceSlice, Error>;

    /// The launches that the engine would take.
    fn tuned(&self) -> &Tuned;
}

/// One measurement to take.
pub struct Row {
    /// Kernel entry name.
    pub kernel: &'static str,
    /// Shape, as `rows x cols` and what else matters.
    pub shape: String,
    /// Bytes that one launch has to read and write at least.
    pub bytes: u64,
    /// Whether it streams weights or a cache from memory, rather than activations from L2.
    pub streams: bool,
    /// Operands and call.
    pub make: Make,
}

impl Row {
    /// Whether a device of these dimensions has the kernel.
    pub fn runs_on(&self, device: &DeviceInfo) -> bool {
        device.warpgroup_products || !linear::gemm_int4::needs_warpgroup_products(self.kernel)
    }
}

/// Everything that is timed: the matrices of the models from 135M to 8B, then the rest of a step.
pub fn all() -> Vec<Row> {
    let mut rows = Vec::new();
    // SmolLM2-135M: q/o, k/v, gate/up, down. Group 32 with minima, as its file has.
    for (n, k) in [(576, 576), (192, 576), (1536, 576), (576, 1536)] {
        rows.extend(gemv_int4(n, k, 32, true));
    }
    for (n, k) in SEVEN {
        rows.extend(gemv_int4(n, k, 128, false));
    }
    rows.extend(fused_int4());
    rows.extend(heads_rows());
    rows.extend(prompt_rows());
    rows.extend(float_rows());
    for (n, k) in [(1536, 1536), (8960, 1536), (1536, 8960)] {
        rows.push(gemv_int8(n, k, 32));
    }
    // SmolLM2-135M, Qwen2.5-0.5B, 1.5B, 3B and 7B, Llama-3.2-1B: a scale a row, and groups.
    for (vocab, width) in [
        (49_152, 576),
        (151_936, 896),
        (151_936, 1536),
        (151_936, 2048),
        (152_064, 3584),
        (128_256, 2048),
    ] {
        rows.push(logits_int8(vocab, width, width));
        rows.push(logits_int8(vocab, width, 32));
    }
    for width in [896, 1536, 2048] {
        rows.push(logits_top(151_936, width, 32));
    }
    rows.push(logits_top(151_936, 1536, 1536));
    rows.push(sample_topk(151_936));
    rows.extend(attention::all());
    for (vocab, width) in [(49_152, 576), (151_936, 1536)] {
        rows.push(embed_int8(vocab, width));
        rows.push(rmsnorm_f32(width));
        rows.push(add_f32(width));
        rows.push(argmax_f32(vocab));
    }
    rows.push(rope_f32(9, 64));
    rows.push(rope_f32(12, 128));
    rows.push(kv_append(3, 64, false));
    rows.push(kv_append(2, 128, false));
    rows.push(kv_append(2, 128, true));
    rows.push(rope_kv_append(9, 3, 64, false));
    rows.push(rope_kv_append(12, 2, 128, false));
    rows.push(rope_kv_append(12, 2, 128, true));
    rows.push(swiglu_f32(1536));
    rows.push(swiglu_f32(8960));
    rows.push(advance());
    rows.push(read(7_138_304, true));
    rows
}

/// The INT4 and INT8 forms of an `(n, k)` matrix, every variant of each.
pub fn matrix(n: usize, k: usize, group: usize, mins: bool) -> Vec<Row> {
    let mut rows = gemv_int4(n, k, group, mins);
    rows.push(gemv_int8(n, k, group));
    rows
}

/// The output matrix of a model, INT8, one scale a row.
pub fn output_matrix(vocab: usize, width: usize) -> Row {
    logits_int8(vocab, width, width)
}

/// The kernel that reads `bytes`, rounded up to what it can load, and does nothing with them.
pub fn read(bytes: u64, streams: bool) -> Row {
    let bytes = bytes.next_multiple_of(16);
    Row {
        kernel: "read_bytes",
        shape: format!("{bytes} bytes"),
        bytes,
        streams,
        make: Box::new(move |device, memory| {
            let shape = read_kernel::Shape {
                bytes: bytes as usize,
            };
            let operands = read_kernel::Operands {
                data: noise(memory, bytes as usize)?,
                out: memory.reserve(4 * shape.out_words(device) as u64)?,
                // Hardly a thread of noise gives it.
                wanted: 0x9e37_79b9,
            };
            planned(read_kernel::plan(device, &shape, &operands))
        }),
    }
}

fn planned(call: Result<Call, ShapeError>) -> Result<Call, Error> {
    call.map_err(Error::input)
}

/// A buffer of pseudo-random bytes: all-zero data would draw less power than weights do.
fn noise(memory: &mut dyn Operands, bytes: usize) -> Result<DeviceSlice, Error> {
    // Made once, and repeated: no cache of a GPU holds a whole one.
    const BLOCK_BYTES: usize = 64 << 20;
    static BLOCK: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        while block.len() < BLOCK_BYTES {
            // xorshift64 (Marsaglia 2003, https://doi.org/10.18637/jss.v008.i14).
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            block.extend_from_slice(&state.to_le_bytes());
        }
        block
    });
    if let Some(start) = BLOCK.get(..bytes) {
        return memory.upload(start);
    }
    let mut data = BLOCK.repeat(bytes.div_ceil(BLOCK_BYTES));
    data.truncate(bytes);
    memory.upload(&data)
}

/// `(elems,)` f16, small and positive.
fn halves(memory: &mut dyn Operands, elems: usize) -> Result<DeviceSlice, Error> {
    memory.upload(&f16::from_f32(0.01).to_le_bytes().repeat(elems))
}

/// `(elems,)` f32 in (-1, 1): activations.
fn floats(memory: &mut dyn Operands, elems: usize) -> Result<DeviceSlice, Error> {
    let data: Vec<u8> = (0..elems)
        .flat_map(|i| ((i as f32 * 0.37).sin() * 0.9).to_le_bytes())
        .collect();
    memory.activations(&data)
}

fn ints(memory: &mut dyn Operands, values: &[u32]) -> Result<DeviceSlice, Error> {
    memory.upload(
        &values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<_>>(),
    )
}

fn gemv_int4(rows: usize, cols: usize, group: usize, with_mins: bool) -> Vec<Row> {
    let groups = rows * cols.div_ceil(group);
    let side = if with_mins { 2 } else { 1 };
    let bytes = rows * cols / 2 + 2 * groups * side + 4 * (rows + cols);
    let row = |name: &'static str, id: VariantId| Row {
        kernel: name,
        shape: format!(
            "{rows} x {cols} group {group}{}",
            if with_mins { " minima" } else { "" }
        ),
        bytes: bytes as u64,
        streams: true,
        make: Box::new(move |device, memory| {
            let shape = linear::gemv_int4::Shape { rows, cols, group };
            let operands = linear::gemv_int4::Operands {
                quants: noise(memory, rows * cols / 2)?,
                scales: halves(memory, groups)?,
                mins: if with_mins {
                    halves(memory, groups)?
                } else {
                    DeviceSlice::NONE
                },
                bias: DeviceSlice::NONE,
                x: floats(memory, cols)?,
                y: memory.reserve(4 * rows as u64)?,
            };
            planned(linear::gemv_int4::plan(
                device,
                &shape,
                &operands,
                Choice::Force(id),
            ))
        }),
    };
    let mut all: Vec<Row> = INT4_GEMV
        .iter()
        .map(|variant| row(variant.kernel, variant.id))
        .collect();
    all.push(gemv_int4_mma(&Tiled {
        mins: with_mins,
        ..Tiled::plain(rows, cols, group)
    }));
    all
}

fn gemv_int8(rows: usize, cols: usize, group: usize) -> Row {
    let groups = rows * cols.div_ceil(group);
    Row {
        kernel: "linear_gemv_int8_multirow",
        shape: format!("{rows} x {cols} group {group}"),
        bytes: (rows * cols + 2 * groups + 4 * (rows + cols)) as u64,
        streams: true,
        make: Box::new(move |device, memory| {
            let shape = linear::gemv_int8::Shape { rows, cols, group };
            let operands = linear::gemv_int8::Operands {
                quants: noise(memory, rows * cols)?,
                scales: halves(memory, groups)?,
                bias: DeviceSlice::NONE,
                x: floats(memory, cols)?,
                y: memory.reserve(4 * rows as u64)?,
            };
            planned(linear::gemv_int8::plan(device, &shape, &operands))
        }),
    }
}

fn logits_int8(vocab: usize, width: usize, group: usize) -> Row {
    let groups = vocab * width.div_ceil(group);
    let shape = logits::Shape {
        vocab,
        width,
        group,
    };
    Row {
        kernel: logits::kernel(&shape),
        shape: format!("{vocab} x {width} group {group}"),
        bytes: (vocab * width + 2 * groups + 4 * (vocab + width)) as u64,
        streams: true,
        make: Box::new(move |device, memory| {
            let operands = logits::Operands {
                quants: noise(memory, vocab * width)?,
                scales: halves(memory, groups)?,
                x: floats(memory, width)?,
                logits: memory.reserve(4 * vocab as u64)?,
                scratch: memory.activations(&vec![0; logits::scratch_bytes(device) as usize])?,
            };
            let greedy = logits::Greedy {
                context: 1,
                tokens: memory.activations(&[0; 8])?,
                state: memory.activations(&[0; 4])?,
                advance: false,
            };
            planned(logits::plan(device, &shape, &operands, Some(&greedy)))
        }),
    }
}

fn embed_int8(vocab: usize, width: usize) -> Row {
    let group = 32;
    let groups = width.div_ceil(group);
    Row {
        kernel: "embed_int8",
        shape: format!("{vocab} x {width} group {group}"),
        bytes: (width + 2 * groups + 4 * width) as u64,
        streams: false,
        make: Box::new(move |device, memory| {
            let shape = embed::Shape {
                vocab,
                width,
                group,
                context: 1,
                tokens: 1,
            };
            let operands = embed::Operands {
                quants: noise(memory, vocab * width)?,
                scales: halves(memory, vocab * groups)?,
                tokens: ints(memory, &[vocab as u32 / 2, 0])?,
                state: ints(memory, &[0])?,
                out: memory.reserve(4 * width as u64)?,
            };
            planned(embed::plan(device, &shape, &operands))
        }),
    }
}

fn rmsnorm_f32(width: usize) -> Row {
    Row {
        kernel: "rmsnorm_f32",
        shape: format!("{width}"),
        bytes: 12 * width as u64,
        streams: false,
        make: Box::new(move |device, memory| {
            let shape = rmsnorm::Shape {
                tokens: 1,
                width,
                eps: 1e-6,
            };
            let operands = rmsnorm::Operands {
                x: floats(memory, width)?,
                weight: floats(memory, width)?,
                out: memory.reserve(4 * width as u64)?,
            };
            planned(rmsnorm::plan(device, &shape, &operands))
        }),
    }
}

fn rope_f32(heads: usize, head_dim: usize) -> Row {
    Row {
        kernel: "rope_f32",
        shape: format!("{heads} x {head_dim}"),
        bytes: (8 * heads * head_dim + 4 * head_dim) as u64,
        streams: false,
        make: Box::new(move |device, memory| {
            let shape = rope::Shape {
                heads,
                head_dim,
                context: 1,
            };
            let operands = rope::Operands {
                x: floats(memory, heads * head_dim)?,
                cos: floats(memory, head_dim / 2)?,
                sin: floats(memory, head_dim / 2)?,
                state: ints(memory, &[0])?,
            };
            planned(rope::plan(device, &shape, &operands))
        }),
    }
}

/// Room for the values of a cache and, where they are of 8 bits, for their scales: `heads` heads of all
/// positions together, `elems` elements.
fn value_cache(
    memory: &mut dyn Operands,
    elems: usize,
    heads: usize,
    of_8_bits: bool,
) -> Result<[DeviceSlice; 2], Error> {
    let elem_bytes = if of_8_bits { 1 } else { 2 };
    let values = memory.reserve((elem_bytes * elems) as u64)?;
    let scales = match of_8_bits {
        true => memory.reserve(2 * heads as u64)?,
        false => DeviceSlice::NONE,
    };
    Ok([values, scales])
}

/// Bytes of a head's new values, with their scale where they are of 8 bits.
fn value_bytes(head_dim: usize, of_8_bits: bool) -> usize {
    if of_8_bits {
        head_dim + 2
    } else {
        2 * head_dim
    }
}

fn kv_append(kv_heads: usize, head_dim: usize, of_8_bits: bool) -> Row {
    let elems = kv_heads * head_dim;
    Row {
        kernel: match of_8_bits {
            true => "kv_append_v8",
            false => "kv_append_f16",
        },
        shape: format!("{kv_heads} x {head_dim}"),
        bytes: (10 * elems + kv_heads * value_bytes(head_dim, of_8_bits)) as u64,
        streams: false,
        make: Box::new(move |device, memory| {
            let shape = kv_append::Shape {
                kv_heads,
                head_dim,
                context: 1,
            };
            let [v_cache, v_scales] = value_cache(memory, elems, kv_heads, of_8_bits)?;
            let operands = kv_append::Operands {
                k: floats(memory, elems)?,
                v: floats(memory, elems)?,
                k_cache: memory.reserve(2 * elems as u64)?,
                v_cache,
                v_scales,
                state: ints(memory, &[0])?,
            };
            planned(kv_append::plan(device, &shape, &operands))
        }),
    }
}

fn rope_kv_append(heads: usize, kv_heads: usize, head_dim: usize, of_8_bits: bool) -> Row {
    let (queries, elems) = (heads * head_dim, kv_heads * head_dim);
    let values = kv_heads * value_bytes(head_dim, of_8_bits);
    Row {
        kernel: match of_8_bits {
            true => "rope_kv_append_v8",
            false => "rope_kv_append_f16",
        },
        shape: format!("{heads}/{kv_heads} x {head_dim}"),
        bytes: (8 * queries + 10 * elems + values + 4 * head_dim) as u64,
        streams: false,
        make: Box::new(move |device, memory| {
            let shape = rope_kv_append::Shape {
                heads,
                kv_heads,
                head_dim,
                context: 1,
            };
            let [v_cache, v_scales] = value_cache(memory, elems, kv_heads, of_8_bits)?;
            let operands = rope_kv_append::Operands {
                q: floats(memory, queries)?,
                k: floats(memory, elems)?,
                v: floats(memory, elems)?,
                cos: floats(memory, head_dim / 2)?,
                sin: floats(memory, head_dim / 2)?,
                k_cache: memory.reserve(2 * elems as u64)?,
                v_cache,
                v_scales,
                state: ints(memory, &[0])?,
            };
            planned(rope_kv_append::plan(device, &shape, &operands))
        }),
    }
}

fn swiglu_f32(elems: usize) -> Row {
    Row {
        kernel: "swiglu_f32",
        shape: format!("{elems}"),
        bytes: 12 * elems as u64,
        streams: false,
        make: Box::new(move |device, memory| {
            let operands = swiglu::Operands {
                gate: floats(memory, elems)?,
                up: floats(memory, elems)?,
                out: memory.reserve(4 * elems as u64)?,
            };
            planned(swiglu::plan(device, &swiglu::Shape { elems }, &operands))
        }),
    }
}

fn add_f32(elems: usize) -> Row {
    Row {
        kernel: "residual_add_f32",
        shape: format!("{elems}"),
        bytes: 12 * elems as u64,
        streams: false,
        make: Box::new(move |device, memory| {
            let operands = add::Operands {
                x: floats(memory, elems)?,
                y: floats(memory, elems)?,
            };
            planned(add::plan(device, &add::Shape { elems }, &operands))
        }),
    }
}

fn argmax_f32(vocab: usize) -> Row {
    Row {
        kernel: "argmax_f32",
        shape: format!("{vocab}"),
        bytes: 4 * vocab as u64 + 4,
        streams: false,
        make: Box::new(move |device, memory| {
            let shape = sample::ArgmaxShape { vocab, context: 1 };
            let operands = sample::ArgmaxOperands {
                logits: floats(memory, vocab)?,
                tokens: ints(memory, &[0, 0])?,
                state: ints(memory, &[0])?,
            };
            planned(sample::plan_argmax(device, &shape, &operands))
        }),
    }
}

fn advance() -> Row {
    Row {
        kernel: "advance_position",
        shape: "1".to_owned(),
        bytes: 8,
        streams: false,
        make: Box::new(move |device, memory| {
            planned(sample::plan_advance(device, ints(memory, &[0])?))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::backend::cuda::plan::Counter;

    impl Operands for Counter {
        fn activations(&mut self, bytes: &[u8]) -> Result<DeviceSlice, Error> {
            self.upload(bytes)
        }

        fn tuned(&self) -> &Tuned {
            static NONE: Tuned = Tuned::none();
            &NONE
        }
    }

    #[test]
    fn every_row_can_be_planned_and_every_kernel_has_one() {
        let rows = all();
        for row in &rows {
            let mut memory = Counter::default();
            let devices = [DeviceInfo::T4, DeviceInfo::H100];
            let device = devices.iter().find(|device| row.runs_on(device)).unwrap();
            let call = (row.make)(device, &mut memory)
                .unwrap_or_else(|error| panic!("{} {}: {error}", row.kernel, row.shape));
            assert_eq!(call.kernel, row.kernel);
            // What streams reads each operand once: the bytes are those of its buffers. The read
            // kernel's few results are not its purpose, and attention and products of many tokens
            // have scratch memory besides.
            let besides = row.kernel == "read_bytes"
                || row.kernel.starts_with("attention")
                || row.kernel.starts_with("linear_gemm");
            if row.streams && !besides {
                // Tiles fill up K to a multiple of 128.
                let tiled = row.kernel.starts_with("linear_gemv_int4_mma");
                let filling = if tiled { row.bytes / 8 } else { 0 };
                let scratch = if row.kernel.starts_with("logits") {
                    logits::scratch_bytes(&DeviceInfo::T4)
                } else {
                    0
                };
                let difference = memory.bytes.abs_diff(row.bytes);
                assert!(
                    difference <= 12 * Counter::ALIGN + filling + scratch,
                    "{} {}: {} bytes moved, {} in its buffers",
                    row.kernel,
                    row.shape,
                    row.bytes,
                    memory.bytes
                );
            }
        }
        for entry in gpu_kernels::ENTRIES {
            assert!(
                rows.iter().any(|row| row.kernel == entry.name),
                "{} has no row",
                entry.name
            );
        }
    }
}
