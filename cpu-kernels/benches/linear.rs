//! The linear kernels on this machine: checked against their references, then timed for every number of
//! threads, beside what plain reading of memory and products from the first cache reach in the same run.
//! `cargo xtask bench --cpu` runs it and keeps the figures.
//!
//! Weights rotate through more memory than most last caches hold; of many calls the median and the least
//! count. Arguments: `--results FOLDER` appends JSON lines to the file of this CPU there, `--date` and
//! `--revision` go into them, `--isa NAME` takes another instruction set than the fastest, a word selects
//! matrices by name or shape.

use std::fs::OpenOptions;
use std::io::Write;
use std::process::exit;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use cpu_kernels::isa::Isa;
use cpu_kernels::levels::{self, Levels, Precision, token_words};
use cpu_kernels::linear::{self, Input, Packed, TILE_ROWS};
use cpu_kernels::read;
use cpu_kernels::team::{SharedSlice, split};
use half::f16;
use models::quant::{F16Matrix, Int4Matrix, Int8Matrix, TernaryMatrix, Weight};
use serde_json::json;

/// Bytes that the copies of a matrix take together.
const ROTATED_BYTES: usize = 192 << 20;
/// Times that all copies are gone through.
const ROUNDS: usize = 5;
/// Copies that a prompt goes through: it is bound by arithmetic.
const PROMPT_COPIES: usize = 4;

/// Numbers that look random and are the same in every run.
fn bits(i: usize) -> u32 {
    let x = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32) as u32
}

fn float(i: usize) -> f32 {
    (bits(i) >> 8) as f32 / (1 << 23) as f32 - 1.0
}

fn halves(len: usize, range: f32) -> Vec<f16> {
    (0..len).map(|i| f16::from_f32(range * float(i))).collect()
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|i| bits(i) as u8).collect()
}

fn int4(rows: usize, cols: usize, group: usize, mins: bool) -> Weight {
    let groups = rows * cols.div_ceil(group);
    Weight::Int4(Int4Matrix {
        rows,
        cols,
        group,
        quants: bytes(rows * cols / 2).into(),
        scales: halves(groups, 0.01).into(),
        mins: mins.then(|| halves(groups, 0.08).into()),
        zeros: false,
    })
}

fn int8(rows: usize, cols: usize) -> Weight {
    Weight::Int8(Int8Matrix {
        rows,
        cols,
        group: 32,
        quants: bytes(rows * cols).into_iter().map(|b| b as i8).collect(),
        scales: halves(rows * cols / 32, 0.001).into(),
    })
}

fn ternary(rows: usize, cols: usize) -> Weight {
    // Three codes of four: 3 is no ternary weight.
    let quants = bytes(rows * cols / 4)
        .into_iter()
        .map(|b| b & !(b >> 1 & b & 0x55));
    Weight::Ternary(TernaryMatrix {
        rows,
        cols,
        group: cols,
        quants: quants.collect::<Vec<u8>>().into(),
        scales: vec![0.02; rows].into(),
    })
}

fn half(rows: usize, cols: usize) -> Weight {
    Weight::F16(F16Matrix {
        rows,
        cols,
        values: halves(rows * cols, 0.1).into(),
    })
}

/// Activations of `tokens` tokens, and their levels.
struct Activations {
    x: Vec<f32>,
    words: Vec<f32>,
    cols: usize,
    precision: Precision,
}

impl Activations {
    fn new(isa: Isa, tokens: usize, cols: usize, precision: Precision) -> Activations {
        let x: Vec<f32> = (0..tokens * cols).map(|i| 2.0 * float(i)).collect();
        let mut words = vec![0.0; tokens * token_words(cols)];
        for (x, words) in x
            .chunks_exact(cols)
            .zip(words.chunks_exact_mut(token_words(cols)))
        {
            // SAFETY: one thread.
            unsafe { levels::part(isa, precision, x, SharedSlice::new(words), 0..cols) };
        }
        Activations {
            x,
            words,
            cols,
            precision,
        }
    }

    fn input(&self, w: &Packed) -> Input<'_> {
        match w.takes_levels() {
            true => Input::Levels(Levels::new(&self.words, self.cols, self.precision)),
            false => Input::Floats(&self.x),
        }
    }
}

/// Fails unless the kernel is within the rounding of the levels of its reference.
fn check(isa: Isa, name: &str, weight: &Weight, packed: &Packed) {
    let (n, k) = weight.shape();
    let x = Activations::new(isa, 1, k, Precision::Word);
    let (mut y, mut expected) = (vec![0.0; n], vec![0.0; n]);
    // SAFETY: one thread.
    unsafe {
        linear::part(
            isa,
            packed,
            None,
            x.input(packed),
            SharedSlice::new(&mut y),
            0..n,
        )
    };
    match weight {
        Weight::Int4(w) => linear::int4::reference(w, None, &x.x, &mut expected),
        Weight::Int4Tiled(w) => linear::int4::reference(&w.in_rows(), None, &x.x, &mut expected),
        Weight::Int8(w) => linear::int8::reference(w, None, &x.x, &mut expected),
        Weight::Ternary(w) => linear::ternary::reference(w, None, &x.x, &mut expected),
        Weight::F16(w) => linear::float16::reference(w, None, &x.x, &mut expected),
        Weight::Vector(_) => unreachable!("a matrix"),
    }
    let squares = |f: &dyn Fn(usize) -> f32| (0..n).map(|i| f64::from(f(i)).powi(2)).sum::<f64>();
    let error = (squares(&|i| y[i] - expected[i]) / squares(&|i| expected[i])).sqrt();
    if error.is_nan() || error > 1e-4 {
        eprintln!("{name} {n}x{k}: relative error {error:.1e} against the reference, not timed");
        exit(1);
    }
}

/// Seconds of each call: `threads` threads share out the rows of each of `copies` in turn.
fn time(isa: Isa, copies: &[Packed], x: &Activations, tokens: usize, threads: usize) -> Vec<f64> {
    let n = copies[0].rows();
    let mut y = vec![0.0; tokens * n];
    let y = SharedSlice::new(&mut y);
    let barrier = Barrier::new(threads);
    let work = |thread: usize| {
        let mut seconds = Vec::new();
        for w in (0..ROUNDS).flat_map(|_| copies) {
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

/// Multiply-adds a second that the products reach on one thread when all operands lie in the first cache.
fn peak(isa: Isa) -> f64 {
    const CALLS: usize = 2_000;
    let (rows, cols, tokens) = (TILE_ROWS, 512, 6);
    let x = Activations::new(isa, tokens, cols, Precision::Byte);
    let mut y = vec![0.0; tokens * rows];
    let mut best = 0.0f64;
    for w in [
        int8(rows, cols),
        int4(rows, cols, 32, false),
        ternary(rows, cols),
    ] {
        let w = Packed::new(&w).expect("a matrix");
        for _ in 0..ROUNDS {
            let start = Instant::now();
            for _ in 0..CALLS {
                // SAFETY: one thread.
                unsafe {
                    linear::part(
                        isa,
                        &w,
                        None,
                        x.input(&w),
                        SharedSlice::new(&mut y),
                        0..rows,
                    )
                };
            }
            let products = (CALLS * rows * cols * tokens) as f64;
            best = best.max(products / start.elapsed().as_secs_f64());
        }
    }
    best
}

/// What the arguments ask for.
#[derive(Default)]
struct Options {
    results: Option<String>,
    date: String,
    revision: String,
    isa: Option<String>,
    filter: String,
}

fn options() -> Options {
    let mut options = Options::default();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--results" => options.results = arguments.next(),
            "--date" => options.date = arguments.next().unwrap_or_default(),
            "--revision" => options.revision = arguments.next().unwrap_or_default(),
            "--isa" => options.isa = arguments.next(),
            // What cargo adds.
            "--bench" => {}
            _ => options.filter = argument,
        }
    }
    options
}

fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or(std::env::consts::ARCH.to_owned(), |(_, name)| {
        name.trim().to_owned()
    })
}

/// A kernel, its matrix, and how its activations are rounded.
type Row = (&'static str, fn() -> Weight, Precision);

const ROWS: [Row; 12] = [
    (
        "linear_int4_g32_mins",
        || int4(576, 576, 32, true),
        Precision::Word,
    ),
    (
        "linear_int4_g32_mins",
        || int4(1536, 576, 32, true),
        Precision::Word,
    ),
    (
        "linear_int4_g32_mins",
        || int4(576, 1536, 32, true),
        Precision::Word,
    ),
    (
        "linear_int4_g32",
        || int4(8960, 1536, 32, false),
        Precision::Word,
    ),
    (
        "linear_int4_g32",
        || int4(1536, 8960, 32, false),
        Precision::Word,
    ),
    (
        "linear_int4_g128",
        || int4(8960, 1536, 128, false),
        Precision::Word,
    ),
    ("linear_int8_g32", || int8(49_152, 576), Precision::Word),
    ("linear_int8_g32", || int8(32_000, 1536), Precision::Word),
    ("linear_ternary", || ternary(2560, 2560), Precision::Byte),
    ("linear_ternary", || ternary(6912, 2560), Precision::Byte),
    ("linear_ternary", || ternary(2560, 6912), Precision::Byte),
    ("linear_f16", || half(8000, 2560), Precision::Word),
];

fn main() {
    let options = options();
    let isa = match &options.isa {
        Some(name) => Isa::named(name),
        None => Isa::from_environment(),
    };
    let isa = isa.unwrap_or_else(|why| {
        eprintln!("{why}");
        exit(2);
    });
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let mut counts: Vec<usize> = std::iter::successors(Some(1), |n| Some(2 * n))
        .take_while(|&n| n < cores)
        .collect();
    counts.push(cores);
    let peak = peak(isa);
    let rates: Vec<f64> = counts
        .iter()
        .map(|&threads| read::bytes_per_second(threads).expect("memory to read"))
        .collect();
    println!(
        "{}, {isa}; products from the first cache {:.0} G/s a thread",
        cpu_name(),
        peak / 1e9
    );
    for (threads, rate) in counts.iter().zip(&rates) {
        println!("{threads} threads read {:.1} GB/s", rate / 1e9);
    }
    println!(
        "{:<22}{:>12}{:>4}{:>4}{:>11}{:>11}{:>8}{:>7}{:>8}{:>7}",
        "kernel", "N x K", "t", "thr", "median us", "least us", "GB/s", "read", "Gmac/s", "peak"
    );
    let mut lines = String::new();
    for (name, make, precision) in ROWS {
        let weight = make();
        let (n, k) = weight.shape();
        let shape = format!("{n}x{k}");
        if !name.contains(&options.filter) && !shape.contains(&options.filter) {
            continue;
        }
        let packed = Packed::new(&weight).expect("a matrix");
        check(isa, name, &weight, &packed);
        drop(weight);
        let size = n * packed.row_bytes();
        let copies = vec![packed; ROTATED_BYTES.div_ceil(size)];
        for tokens in [1, 48] {
            let x = Activations::new(isa, tokens, k, precision);
            let copies = if tokens == 1 {
                &copies[..]
            } else {
                &copies[..PROMPT_COPIES.min(copies.len())]
            };
            for (&threads, rate) in counts.iter().zip(&rates) {
                let mut seconds = time(isa, copies, &x, tokens, threads);
                seconds.sort_by(f64::total_cmp);
                let (median, least) = (seconds[seconds.len() / 2], seconds[0]);
                let bytes_per_second = size as f64 / median;
                let products = (n * k * tokens) as f64 / median;
                println!(
                    "{name:<22}{shape:>12}{tokens:>4}{threads:>4}{:>11.1}{:>11.1}{:>8.1}{:>6.0}%{:>8.1}{:>6.0}%",
                    median * 1e6,
                    least * 1e6,
                    bytes_per_second / 1e9,
                    100.0 * bytes_per_second / rate,
                    products / 1e9,
                    100.0 * products / (peak * threads as f64),
                );
                let row = json!({
                    "date": options.date, "revision": options.revision, "cpu": cpu_name(), "tier": isa.name(),
                    "kernel": name, "shape": shape, "tokens": tokens, "threads": threads, "bytes": size,
                    "us_median": median * 1e6, "us_least": least * 1e6,
                    "gb_per_second": bytes_per_second / 1e9, "read_gb_per_second": rate / 1e9,
                    "gmac_per_second": products / 1e9, "peak_gmac_per_second": peak * threads as f64 / 1e9,
                });
                lines += &format!("{row}\n");
            }
        }
    }
    if let Some(folder) = options.results {
        let name = cpu_name().to_ascii_lowercase();
        let parts = name.split(|c: char| !c.is_ascii_alphanumeric());
        let parts: Vec<&str> = parts.filter(|part| !part.is_empty()).collect();
        let path = format!("{folder}/{}.jsonl", parts.join("-"));
        let file = OpenOptions::new().create(true).append(true).open(&path);
        if let Err(why) = file.and_then(|mut file| file.write_all(lines.as_bytes())) {
            eprintln!("cannot append to {path}: {why}");
            exit(1);
        }
        println!("appended to {path}");
    }
}
