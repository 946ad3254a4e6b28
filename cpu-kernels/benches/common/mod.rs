//! What the measurements of the linear kernels share: material, and the clock.

use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use cpu_kernels::isa::Isa;
use cpu_kernels::levels::{self, Levels, Precision, token_words};
use cpu_kernels::linear::ternary::Form;
use cpu_kernels::linear::{self, Input, Packed, TILE_ROWS, lookup};
use cpu_kernels::team::{SharedSlice, split};
use models::quant::TernaryMatrix;

/// Bytes that the copies of a matrix take together.
pub const ROTATED_BYTES: usize = 192 << 20;

/// Numbers that look random and are the same in every run.
fn bits(i: usize) -> u32 {
    let x = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32) as u32
}

/// Between -1 and 1.
pub fn float(i: usize) -> f32 {
    (bits(i) >> 8) as f32 / (1 << 23) as f32 - 1.0
}

pub fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| bits(i) as u8).collect()
}

/// A ternary matrix, a scale a row.
pub fn ternary(rows: usize, cols: usize) -> TernaryMatrix {
    // Three codes of four: 3 is no ternary weight.
    let quants = bytes(rows * cols / 4)
        .into_iter()
        .map(|b| b & !(b >> 1 & b & 0x55));
    TernaryMatrix {
        rows,
        cols,
        group: cols,
        quants: quants.collect::<Vec<u8>>().into(),
        scales: vec![0.02; rows].into(),
    }
}

/// Activations of `tokens` tokens, and their levels.
pub struct Activations {
    pub x: Vec<f32>,
    words: Vec<f32>,
    /// What one token's products look up.
    tables: Option<Vec<f32>>,
    cols: usize,
    precision: Precision,
}

impl Activations {
    pub fn new(isa: Isa, tokens: usize, cols: usize, precision: Precision) -> Activations {
        let x: Vec<f32> = (0..tokens * cols).map(|i| 2.0 * float(i)).collect();
        let mut words = vec![0.0; tokens * token_words(cols)];
        for (token, x) in x.chunks_exact(cols).enumerate() {
            let words = SharedSlice::new(&mut words);
            // SAFETY: one thread.
            unsafe { levels::part(isa, precision, x, words, cols, token, 0..cols) };
        }
        let tables = (tokens == 1 && precision == Precision::Byte).then(|| {
            let mut tables = vec![0.0; lookup::table_words(cols)];
            lookup::tables(isa, Levels::new(&words, cols, precision), &mut tables);
            tables
        });
        Activations {
            x,
            words,
            tables,
            cols,
            precision,
        }
    }

    pub fn input(&self, w: &Packed) -> Input<'_> {
        match w.takes_levels() {
            true => {
                let levels = Levels::new(&self.words, self.cols, self.precision);
                Input::Levels(match &self.tables {
                    Some(tables) if w.form() == Some(Form::LookUp) => levels.with_tables(tables),
                    _ => levels,
                })
            }
            false => Input::Floats(&self.x),
        }
    }
}

/// Seconds of each call: `threads` threads share out the rows of each of `copies` in turn, `rounds` times.
pub fn time(
    isa: Isa,
    copies: &[Packed],
    x: &Activations,
    tokens: usize,
    threads: usize,
    rounds: usize,
) -> Vec<f64> {
    let n = copies[0].rows();
    let mut y = vec![0.0; tokens * n];
    let y = SharedSlice::new(&mut y);
    let barrier = Barrier::new(threads);
    let work = |thread: usize| {
        let mut seconds = Vec::new();
        for w in (0..rounds).flat_map(|_| copies) {
            barrier.wait();
            let start = Instant::now();
            let rows = split(n, TILE_ROWS, thread, threads);
            // SAFETY: the rows of threads are disjoint, and all have finished before the next call.
            unsafe { linear::part(isa, w, None, x.input(w), y, rows) };
            if threads > 1 {
                barrier.wait();
            }
            seconds.push(start.elapsed().as_secs_f64());
        }
        seconds
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads)
            .map(|thread| scope.spawn(move || work(thread)))
            .collect();
        let seconds = work(0);
        for other in others {
            other.join().expect("a kernel does not panic");
        }
        seconds
    })
}

/// Threads to measure with: powers of two below the cores, and all cores.
pub fn thread_counts() -> Vec<usize> {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let mut counts: Vec<usize> = std::iter::successors(Some(1), |n| Some(2 * n))
        .take_while(|&n| n < cores)
        .collect();
    counts.push(cores);
    counts
}

/// Model name of the CPU as Linux gives it, else the architecture.
pub fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or(std::env::consts::ARCH.to_owned(), |(_, name)| {
        name.trim().to_owned()
    })
}
