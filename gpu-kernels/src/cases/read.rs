//! The kernel that only reads.

use cpu_kernels::read::reference;

use super::{Buffers, Case, CaseError, Device, inputs::Inputs};
use crate::read;

/// What a thread's words are made to give.
const WANTED: u32 = 0x5eed_1234;

pub(super) fn cases() -> Vec<Case> {
    // One chunk; less than a warp; a tail; several passes of every thread and a tail.
    [16, 16 * 31, 16 * 1025, 16 * (4 * 40 * 8 * 256 + 12_345)]
        .into_iter()
        .map(|bytes| {
            Case::new("read_bytes", format!("{bytes} bytes"), move |device| {
                run(device, bytes)
            })
        })
        .collect()
}

/// Every thread that reads has words that give [`WANTED`], but every fifth: those that store are
/// those that read all of theirs and nothing else.
fn run(device: &mut dyn Device, bytes: usize) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(9);
    let mut data: Vec<u32> = (0..bytes / 4).map(|_| inputs.u64() as u32).collect();
    let shape = read::Shape { bytes };
    let info = device.info();
    let mut want = vec![0; shape.out_words(&info)];
    for (thread, want) in want.iter_mut().enumerate() {
        let chunks = shape.chunks_of(&info, thread);
        let Some(last) = chunks.last() else {
            continue;
        };
        let words: Vec<u32> = chunks
            .iter()
            .flat_map(|chunk| data[4 * chunk..4 * chunk + 4].to_vec())
            .collect();
        let wrong = u32::from(thread % 5 == 4);
        data[4 * last + thread % 4] ^= reference(&words) ^ WANTED ^ wrong;
        *want = if wrong == 0 { WANTED } else { 0 };
    }
    let ops = read::Operands {
        data: device.put_u32(&data)?,
        out: device.put_u32(&vec![0; want.len()])?,
        wanted: WANTED,
    };
    device.run(&read::plan(&info, &shape, &ops)?)?;
    let got = device.take_u32(ops.out)?;
    if let Some(thread) = (0..want.len()).find(|&thread| got[thread] != want[thread]) {
        return Err(CaseError::Unequal {
            what: "exclusive-or of a thread",
            got: got[thread].into(),
            want: want[thread].into(),
        });
    }
    Ok(0.0)
}
