//! The forms of ternary weights on this machine, timed for one token, by instruction set, shape and threads; the
//! fastest go into the table that the engine reads. `cargo xtask tune --cpu` runs it.
//!
//! Forms take turns, so that what else the machine does meets all of them; of many calls the median counts.
//! Arguments: `--table FILE`, `--isa NAME` for one instruction set only, `--shape NxK` for one matrix only.

mod common;

use std::path::Path;
use std::process::exit;

use common::{Activations, ROTATED_BYTES, cpu_name, ternary, thread_counts, time};
use cpu_kernels::isa::Isa;
use cpu_kernels::levels::Precision;
use cpu_kernels::linear::Packed;
use cpu_kernels::linear::ternary::Form;
use cpu_kernels::tuned::{self, Row};

/// The matrices of BitNet 2B-4T.
const SHAPES: [(usize, usize); 4] = [(640, 2560), (2560, 2560), (6912, 2560), (2560, 6912)];
/// Turns of each form.
const TURNS: usize = 7;
/// By how much a form has to beat the rule's.
const WORTH: f64 = 0.98;

/// What the arguments ask for.
struct Options {
    table: String,
    isas: Vec<Isa>,
    shapes: Vec<(usize, usize)>,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        table: String::new(),
        // What no CPU of today would choose is not measured.
        isas: Isa::available().into_iter().skip(1).collect(),
        shapes: SHAPES.to_vec(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--bench" {
            // What cargo adds.
            continue;
        }
        let value = arguments
            .next()
            .ok_or_else(|| format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--table" => options.table = value,
            "--isa" => options.isas = vec![Isa::named(&value)?],
            "--shape" => {
                let shape = value.split_once('x');
                let shape = shape.and_then(|(n, k)| Some((n.parse().ok()?, k.parse().ok()?)));
                let fits = |&(n, k): &(usize, usize)| n > 0 && k > 0 && k % 32 == 0;
                let shape = shape.filter(fits);
                options.shapes = vec![shape.ok_or_else(|| {
                    format!("{value} is no shape such as 2560x6912, K a multiple of 32")
                })?];
            }
            _ => return Err(format!("{argument} is unknown")),
        }
    }
    match options.table.is_empty() {
        true => Err("--table FILE is needed".to_owned()),
        false => Ok(options),
    }
}

/// The median of all calls of each form, microseconds.
fn medians(isa: Isa, (n, k): (usize, usize), forms: &[Form], threads: usize) -> Vec<f64> {
    let weight = ternary(n, k);
    let x = Activations::new(isa, 1, k, Precision::Byte);
    let copies: Vec<Vec<Packed>> = forms
        .iter()
        .map(|form| {
            let packed = Packed::ternary_as(weight.clone(), *form);
            let count = ROTATED_BYTES.div_ceil(n * packed.row_bytes());
            vec![packed; count]
        })
        .collect();
    let mut seconds = vec![Vec::new(); forms.len()];
    for _ in 0..TURNS {
        for (copies, seconds) in copies.iter().zip(&mut seconds) {
            seconds.extend(time(isa, copies, &x, 1, threads, 1));
        }
    }
    let median = |mut seconds: Vec<f64>| {
        seconds.sort_by(f64::total_cmp);
        1e6 * seconds[seconds.len() / 2]
    };
    seconds.into_iter().map(median).collect()
}

/// Times all that `options` asks for and keeps the table up to date.
fn run(options: &Options) -> Result<(), String> {
    let path = Path::new(&options.table);
    let mut table = match std::fs::read_to_string(path) {
        Ok(text) => tuned::rows(&text).map_err(|e| format!("{}: {e}", path.display()))?,
        Err(_) => tuned::checked_in(),
    };
    for &isa in &options.isas {
        let forms = tuned::candidates(isa);
        let rule = tuned::rule(isa);
        for &shape in &options.shapes {
            for threads in thread_counts() {
                let us = medians(isa, shape, forms, threads);
                let of_rule = forms.iter().zip(&us).find(|(form, _)| **form == rule);
                let rule_us = *of_rule.ok_or("the rule is no candidate")?.1;
                let (mut form, mut best) = (rule, rule_us);
                for (&other, &us) in forms.iter().zip(&us) {
                    if us < best && us < WORTH * rule_us {
                        (form, best) = (other, us);
                    }
                }
                let shape = format!("{}x{}", shape.0, shape.1);
                let all = forms.iter().zip(&us);
                let all: Vec<String> = all.map(|(form, us)| format!("{form} {us:.1}")).collect();
                println!(
                    "{isa:<12} {shape:>10} {threads:>3} threads: {} us -> {form}",
                    all.join(", ")
                );
                let row = Row {
                    cpu: cpu_name(),
                    isa: isa.name().to_owned(),
                    shape,
                    threads,
                    form,
                    us: best,
                    rule_us,
                };
                table.retain(|known| !row.replaces(known));
                table.push(row);
                // After each: an interrupted run keeps what it found.
                let part = path.with_extension("toml.part");
                std::fs::write(&part, tuned::text(&table))
                    .and_then(|()| std::fs::rename(&part, path))
                    .map_err(|error| format!("writing {}: {error}", path.display()))?;
            }
        }
    }
    Ok(())
}

fn main() {
    let options = options().unwrap_or_else(|why| {
        eprintln!("{why}");
        exit(2);
    });
    if let Err(why) = run(&options) {
        eprintln!("{why}");
        exit(1);
    }
}
