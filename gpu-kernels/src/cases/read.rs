//! The kernel that only reads.

use cpu_kernels::read::reference;

use super::{Buffers, Case, CaseError, Device, inputs::Inputs};
use crate::read;

pub(super) fn cases() -> Vec<Case> {
    // One chunk; less than a warp; a tail of one step; a whole pass of every thread and a tail.
    [16, 16 * 31, 16 * 1025, 16 * (4 * 40 * 8 * 256 + 12_345)]
        .into_iter()
        .map(|bytes| {
            Case::new("read_bytes", format!("{bytes} bytes"), move |device| {
                run(device, bytes)
            })
        })
        .collect()
}

fn run(device: &mut dyn Device, bytes: usize) -> Result<f64, CaseError> {
    let mut inputs = Inputs::new(9);
    let data: Vec<u32> = (0..bytes / 4).map(|_| inputs.u64() as u32).collect();
    let shape = read::Shape { bytes };
    let info = device.info();
    let ops = read::Operands {
        data: device.put_u32(&data)?,
        out: device.uninit(4 * shape.out_words(&info) as u64)?,
    };
    device.run(&read::plan(&info, &shape, &ops)?)?;
    // The warps' results are folded on the host, as their words are.
    let got = reference(&device.take_u32(ops.out)?);
    let want = reference(&data);
    if got != want {
        return Err(CaseError::Unequal {
            what: "exclusive-or",
            got: got.into(),
            want: want.into(),
        });
    }
    Ok(0.0)
}
