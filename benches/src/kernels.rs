//! A run: check the kernels, time them, compare, record.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use engine::Error;
use engine::backend::cuda::device::Gpu;
use serde_json::{Value, json};

use crate::resources::{Inspector, Resources};
use crate::results::{self, Past};
use crate::rows::{self, Row};
use crate::select::{Selection, baseline};
use crate::time::Timing;
use crate::{check, table, time};

/// What a run is asked to do.
#[derive(Debug)]
pub struct Options {
    /// Which kernels and shapes.
    pub selection: Selection,
    /// A revision to compare with instead of the last recorded run.
    pub compare: Option<String>,
    /// Folder of the results files.
    pub results: PathBuf,
    /// Revision of the sources.
    pub revision: String,
}

/// One measured row.
struct Measured {
    kernel: &'static str,
    shape: String,
    bytes: u64,
    timing: Timing,
    read_us: f64,
    resources: Resources,
}

/// Checks and times what the options select in the tier of `gpu`; returns the recorded objects, or
/// `None` if a case failed, in which case nothing is timed.
///
/// # Errors
/// [`Error::Machine`] from the device or the results file, [`Error::Input`] for a selection that
/// leaves nothing or a revision that was never recorded.
pub fn run(gpu: &Arc<Gpu>, options: &Options) -> Result<Option<Vec<Value>>, Error> {
    let tier = format!("sm_{}", gpu.tier());
    let path = results::path(&options.results, gpu.name());
    let file = |error: std::io::Error| Error::machine(format!("{}: {error}", path.display()));
    let past = results::load(&path).map_err(file)?;
    if let Some(revision) = &options.compare
        && !past
            .iter()
            .any(|past| past.revision.starts_with(revision.as_str()))
    {
        return Err(Error::input(format!(
            "{} has no measurement of revision {revision}: check it out and run `cargo xtask bench` there",
            path.display()
        )));
    }
    let wanted = options.selection.rows()?;

    let outcomes = check::run(gpu, |case| {
        wanted.iter().any(|row| row.kernel == case.kernel)
    });
    let failed = outcomes.iter().filter(|outcome| outcome.result.is_err());
    if failed.clone().count() > 0 {
        check::report(&tier, &failed.cloned().collect::<Vec<_>>());
        println!("{tier}: not timed, because a kernel that is wrong has no speed");
        return Ok(None);
    }
    println!("{}, {tier}: {} cases pass", gpu.name(), outcomes.len());

    let measured = measure(gpu, &wanted)?;
    let copy = time::device_copy(gpu)?;
    print!(
        "{}",
        shown(&measured, &tier, &past, options.compare.as_deref())
    );
    println!(
        "a copy of {} MB moves {:.0} GB/s, read and written",
        time::ROTATE_BYTES / 1_000_000,
        copy.gb_per_second(2 * time::ROTATE_BYTES)
    );
    let date = results::today();
    let lines: Vec<Value> = measured
        .iter()
        .map(|row| record(row, &date, gpu.name(), &tier, &options.revision))
        .collect();
    results::append(&path, &lines).map_err(file)?;
    println!("{} results appended to {}", lines.len(), path.display());
    Ok(Some(lines))
}

/// Times each row and, once for each number of bytes, the kernel that only reads.
fn measure(gpu: &Arc<Gpu>, wanted: &[Row]) -> Result<Vec<Measured>, Error> {
    let inspector = Inspector::new(gpu)?;
    let mut reads: HashMap<u64, f64> = HashMap::new();
    let mut measured = Vec::new();
    for (number, row) in wanted.iter().enumerate() {
        eprintln!(
            "{}/{} {} {}",
            number + 1,
            wanted.len(),
            row.kernel,
            row.shape
        );
        let read_us = match reads.get(&row.bytes) {
            Some(us) => *us,
            None => {
                let (timing, _) = time::kernel(gpu, &rows::read(row.bytes, row.streams))?;
                reads.insert(row.bytes, timing.median_us);
                timing.median_us
            }
        };
        let (timing, call) = time::kernel(gpu, row)?;
        measured.push(Measured {
            kernel: row.kernel,
            shape: row.shape.clone(),
            bytes: row.bytes,
            timing,
            read_us,
            resources: inspector.resources(&call)?,
        });
    }
    Ok(measured)
}

/// The table of a run.
fn shown(measured: &[Measured], tier: &str, past: &[Past], compare: Option<&str>) -> String {
    let against = match compare {
        Some(revision) => format!("x {revision}"),
        None => "x last".to_owned(),
    };
    let header = [
        "variant",
        "shape",
        "us",
        "p5",
        "p95",
        "GB/s",
        "/ read",
        "x base",
        &against,
        "regs",
        "shared",
        "local",
        "occupancy",
    ];
    let median = |kernel: &str, shape: &str| {
        measured
            .iter()
            .find(|row| row.kernel == kernel && row.shape == shape)
            .map(|row| row.timing.median_us)
    };
    let cells: Vec<Vec<String>> = measured
        .iter()
        .map(|row| {
            let timing = &row.timing;
            let base = baseline(row.kernel).and_then(|kernel| median(kernel, &row.shape));
            let last = results::last(
                past,
                compare.unwrap_or_default(),
                tier,
                row.kernel,
                &row.shape,
            );
            let resources = &row.resources;
            vec![
                row.kernel.to_owned(),
                row.shape.clone(),
                format!("{:.2}", timing.median_us),
                format!("{:.2}", timing.p5_us),
                format!("{:.2}", timing.p95_us),
                format!("{:.0}", timing.gb_per_second(row.bytes)),
                format!("{:.2}", timing.median_us / row.read_us),
                table::ratio(base.map(|base| base / timing.median_us)),
                table::ratio(last.map(|last| last.us / timing.median_us)),
                resources.registers.to_string(),
                resources.shared_bytes.to_string(),
                resources.local_bytes.to_string(),
                occupancy(resources),
            ]
        })
        .collect();
    format!(
        "{}/ read: time by that of a kernel that only reads as many bytes; x base, {against}: speed-up; \
         occupancy: what the grid fills of what the kernel allows\n",
        table::columns(&header, &cells, 2)
    )
}

fn occupancy(resources: &Resources) -> String {
    let percent = |share: f64| (100.0 * share).round();
    format!(
        "{}% of {}%",
        percent(resources.occupancy),
        percent(resources.occupancy_limit)
    )
}

fn record(row: &Measured, date: &str, gpu: &str, tier: &str, revision: &str) -> Value {
    let timing = &row.timing;
    json!({
        "date": date,
        "revision": revision,
        "gpu": gpu,
        "tier": tier,
        "kernel": row.kernel,
        "shape": row.shape,
        "bytes": row.bytes,
        "us_median": timing.median_us,
        "us_p5": timing.p5_us,
        "us_p95": timing.p95_us,
        "gb_per_second": timing.gb_per_second(row.bytes),
        "us_read": row.read_us,
        "registers": row.resources.registers,
        "shared_bytes": row.resources.shared_bytes,
        "local_bytes": row.resources.local_bytes,
        "occupancy": row.resources.occupancy,
        "occupancy_limit": row.resources.occupancy_limit,
        "launches": timing.launches,
        "copies": timing.copies,
        "samples": timing.samples,
    })
}

/// The revision of the checkout that the program runs in, with a `+` where files were changed;
/// `unknown` where there is no git or no checkout.
pub fn revision() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success().then_some(text)
    };
    let Some(revision) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".to_owned();
    };
    // Results are appended on every run: they are no change of what is measured.
    let changed = git(&[
        "status",
        "--porcelain",
        "--",
        ":/",
        ":(exclude,top)benches/results",
    ]);
    match changed {
        Some(text) if text.is_empty() => revision,
        _ => format!("{revision}+"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kernel: &'static str, us: f64) -> Measured {
        Measured {
            kernel,
            shape: "8960 x 1536 group 128".into(),
            bytes: 7_138_304,
            timing: Timing {
                median_us: us,
                p5_us: us - 0.1,
                p95_us: us + 0.1,
                launches: 171,
                copies: 57,
                samples: 41,
            },
            read_us: 4.0,
            resources: Resources {
                registers: 64,
                shared_bytes: 8192,
                local_bytes: 0,
                occupancy_limit: 0.5,
                occupancy: 0.25,
            },
        }
    }

    #[test]
    fn a_table_compares_with_read_baseline_and_record() {
        let rows = [
            row("linear_gemv_int4_baseline", 16.0),
            row("linear_gemv_int4_multirow", 8.0),
        ];
        let line = record(&rows[1], "2026-11-23", "NVIDIA H200", "sm_90", "20e476e");
        assert_eq!(line["us_read"], 4.0);
        let past = [Past {
            revision: line["revision"].as_str().expect("text").to_owned(),
            tier: "sm_90".into(),
            kernel: rows[1].kernel.into(),
            shape: rows[1].shape.clone(),
            us: 12.0,
        }];
        let text = shown(&rows, "sm_90", &past, None);
        let lines: Vec<&str> = text.lines().collect();
        let words: Vec<&str> = lines[2].split_whitespace().collect();
        let from_us = &words[words.len() - 13..];
        assert_eq!(
            from_us,
            [
                "8.00", "7.90", "8.10", "892", "2.00", "2.00", "1.50", "64", "8192", "0", "25%",
                "of", "50%"
            ]
        );
        let baseline: Vec<&str> = lines[1].split_whitespace().collect();
        assert_eq!(baseline[baseline.len() - 7], "-", "it was never recorded");
        assert!(shown(&rows, "sm_90", &past, Some("20e")).contains("x 20e"));
    }
}
