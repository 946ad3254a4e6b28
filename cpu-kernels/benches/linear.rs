//! Speed of the linear kernels on one thread, by instruction set and number of tokens:
//! `cargo bench -p cpu-kernels`. Weights rotate through more memory than a cache holds; of many
//! short calls the shortest counts, so that other programs on the machine matter little. An argument
//! selects matrices by name: `cargo bench -p cpu-kernels --bench linear -- int8`.

use std::time::Instant;

use cpu_kernels::buffer::AlignedBuffer;
use cpu_kernels::isa::Isa;
use cpu_kernels::linear::{self, Matrix};
use cpu_kernels::team::SharedSlice;
use half::f16;
use models::quant::{Int4Matrix, Int8Matrix};

/// Bytes that the copies of a matrix take together: beyond the last cache.
const ROTATED_BYTES: usize = 96 << 20;
const ROUNDS: usize = 5;

fn bytes(len: usize) -> impl Iterator<Item = u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
}

fn int4(rows: usize, cols: usize, group: usize) -> Int4Matrix {
    let halves = |value| vec![f16::from_f32(value); rows * cols.div_ceil(group)];
    Int4Matrix {
        rows,
        cols,
        group,
        quants: bytes(rows * cols / 2).collect(),
        scales: halves(0.01).into(),
        mins: Some(halves(-0.08).into()),
        zeros: false,
    }
}

fn int8(rows: usize, cols: usize, group: usize) -> Int8Matrix {
    Int8Matrix {
        rows,
        cols,
        group,
        quants: bytes(rows * cols).map(|b| b as i8).collect(),
        scales: vec![f16::from_f32(0.001); rows * cols.div_ceil(group)].into(),
    }
}

fn measure<M: Matrix>(name: &str, make: impl Fn() -> M) {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    if filter.is_some_and(|filter| !name.contains(&filter)) {
        return;
    }
    let first = make();
    let (n, k, size) = (first.rows(), first.cols(), first.rows() * first.row_bytes());
    let copies: Vec<M> = (0..ROTATED_BYTES.div_ceil(size)).map(|_| make()).collect();
    for isa in Isa::available() {
        for tokens in [1, 32] {
            let mut x = AlignedBuffer::zeroed(tokens * k);
            x.iter_mut()
                .enumerate()
                .for_each(|(i, x)| *x = (i % 17) as f32 - 8.0);
            let mut y = AlignedBuffer::zeroed(tokens * n);
            let mut scratch = AlignedBuffer::zeroed(linear::scratch_elems(k));
            let mut shortest = f64::INFINITY;
            let calls = if tokens == 1 {
                copies.len()
            } else {
                copies.len().min(12)
            };
            for w in (0..ROUNDS).flat_map(|_| &copies[..calls]) {
                let start = Instant::now();
                let y = SharedSlice::new(&mut y);
                // SAFETY: one thread.
                unsafe { linear::part(isa, w, None, &x, y, 0..n, &mut scratch) };
                shortest = shortest.min(start.elapsed().as_secs_f64());
            }
            println!(
                "{name} {n:>6} x {k:<5} {isa:>7} t={tokens:<2} {:>9.1} us {:>6.2} GB/s {:>7.1} G multiply-adds/s",
                shortest * 1e6,
                size as f64 / shortest / 1e9,
                (n * k * tokens) as f64 / shortest / 1e9,
            );
        }
    }
}

fn main() {
    for (n, k) in [(576, 576), (1536, 576), (576, 1536), (1536, 8960)] {
        measure("int4 g32 ", || int4(n, k, 32));
    }
    measure("int4 g128", || int4(1536, 1536, 128));
    measure("int8 g32 ", || int8(8192, 576, 32));
    measure("int8 row ", || int8(8192, 576, 576));
}
