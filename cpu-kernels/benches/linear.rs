//! The linear kernels on this machine: checked against their references, then timed for every number of
//! threads, beside what plain reading of memory and products from the first cache reach in the same run.
//! `cargo xtask bench --cpu` runs it and keeps the figures.
//!
//! Weights rotate through more memory than most last caches hold; of many calls the median and the least
//! count. Arguments: `--results FOLDER` appends JSON lines to the file of this CPU there, `--date` and
//! `--revision` go into them, `--isa NAME` takes another instruction set than the fastest, a word selects
//! matrices by name or shape.

mod common;

use std::fs::OpenOptions;
use std::io::Write;
use std::process::exit;
use std::time::Instant;

use common::{Activations, ROTATED_BYTES, bytes, cpu_name, float, ternary, thread_counts, time};
use cpu_kernels::isa::Isa;
use cpu_kernels::levels::Precision;
use cpu_kernels::linear::ternary::Form;
use cpu_kernels::linear::{self, Packed, TILE_ROWS};
use cpu_kernels::read;
use cpu_kernels::team::SharedSlice;
use half::f16;
use models::quant::{F16Matrix, Int4Matrix, Int8Matrix, Weight};
use serde_json::json;

/// Times that all copies are gone through.
const ROUNDS: usize = 5;
/// Copies that a prompt goes through: it is bound by arithmetic.
const PROMPT_COPIES: usize = 4;

fn halves(len: usize, range: f32) -> Vec<f16> {
    (0..len).map(|i| f16::from_f32(range * float(i))).collect()
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

fn half(rows: usize, cols: usize) -> Weight {
    Weight::F16(F16Matrix {
        rows,
        cols,
        values: halves(rows * cols, 0.1).into(),
    })
}

/// What one thread makes of one token.
fn product(isa: Isa, w: &Packed, x: &Activations) -> Vec<f32> {
    let mut y = vec![0.0; w.rows()];
    let shared = SharedSlice::new(&mut y);
    // SAFETY: one thread.
    unsafe { linear::part(isa, w, None, x.input(w), shared, 0..w.rows()) };
    y
}

/// Fails unless the kernel is within the rounding of the levels of its reference; a form of ternary weights
/// must equal the multiplied one to the bit.
fn check(isa: Isa, name: &str, weight: &Weight, packed: &Packed) {
    let (n, k) = weight.shape();
    let plain = Packed::new(weight.clone()).expect("a matrix");
    if packed.form() != plain.form() {
        let x = Activations::new(isa, 1, k, Precision::Byte);
        if product(isa, packed, &x) != product(isa, &plain, &x) {
            eprintln!("{name} {n}x{k}: not what multiplication gives, not timed");
            exit(1);
        }
    }
    let x = Activations::new(isa, 1, k, Precision::Word);
    let (y, mut expected) = (product(isa, &plain, &x), vec![0.0; n]);
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
        Weight::Ternary(ternary(rows, cols)),
    ] {
        let w = Packed::new(w).expect("a matrix");
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

/// A kernel, how its matrix is made, the form if it is ternary, N x K.
type Row = (
    &'static str,
    fn(usize, usize) -> Weight,
    Form,
    &'static [(usize, usize)],
);

/// Shapes of BitNet 2B-4T.
const TERNARY: &[(usize, usize)] = &[(2560, 2560), (6912, 2560), (2560, 6912)];

const ROWS: [Row; 8] = [
    (
        "linear_int4_g32_mins",
        |n, k| int4(n, k, 32, true),
        Form::Multiply,
        &[(576, 576), (1536, 576), (576, 1536)],
    ),
    (
        "linear_int4_g32",
        |n, k| int4(n, k, 32, false),
        Form::Multiply,
        &[(8960, 1536), (1536, 8960)],
    ),
    (
        "linear_int4_g128",
        |n, k| int4(n, k, 128, false),
        Form::Multiply,
        &[(8960, 1536)],
    ),
    (
        "linear_int8_g32",
        int8,
        Form::Multiply,
        &[(49_152, 576), (32_000, 1536)],
    ),
    ("linear_ternary", of_ternary, Form::Multiply, TERNARY),
    ("linear_ternary_lookup", of_ternary, Form::LookUp, TERNARY),
    ("linear_ternary_fives", of_ternary, Form::Fives, TERNARY),
    ("linear_f16", half, Form::Multiply, &[(8000, 2560)]),
];

fn of_ternary(rows: usize, cols: usize) -> Weight {
    Weight::Ternary(ternary(rows, cols))
}

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
    let counts = thread_counts();
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
    let all = ROWS.iter().flat_map(|(name, make, form, shapes)| {
        shapes.iter().map(move |shape| (name, make, form, shape))
    });
    for (&name, make, &form, &(n, k)) in all {
        let shape = format!("{n}x{k}");
        if !name.contains(&options.filter) && !shape.contains(&options.filter) {
            continue;
        }
        let weight = make(n, k);
        let (packed, precision) = match &weight {
            Weight::Ternary(w) => (Packed::ternary_as(w.clone(), form), Precision::Byte),
            _ => (
                Packed::new(weight.clone()).expect("a matrix"),
                Precision::Word,
            ),
        };
        check(isa, name, &weight, &packed);
        drop(weight);
        let size = n * packed.row_bytes();
        let copies = vec![packed; ROTATED_BYTES.div_ceil(size)];
        for tokens in [1, 64] {
            let x = Activations::new(isa, tokens, k, precision);
            let copies = if tokens == 1 {
                &copies[..]
            } else {
                &copies[..PROMPT_COPIES.min(copies.len())]
            };
            for (&threads, rate) in counts.iter().zip(&rates) {
                let mut seconds = time(isa, copies, &x, tokens, threads, ROUNDS);
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
