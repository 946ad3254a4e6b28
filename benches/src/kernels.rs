//! A run: check the kernels, time them, compare, record.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use engine::Error;
use engine::backend::Tier;
use engine::backend::cuda::device::Gpu;
use gpu_kernels::launch::Launch;
use serde_json::{Value, json};

use crate::peers::Peer;
use crate::ptx::{self, Ptx};
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
    /// Another revision to compare with.
    pub compare: Option<Compare>,
    /// Folder of the results files.
    pub results: PathBuf,
    /// Revision of the sources.
    pub revision: String,
}

/// A revision to compare with.
#[derive(Debug)]
pub struct Compare {
    /// Its name.
    pub revision: String,
    /// Its kernels, timed beside the present ones; without them, what was recorded of it.
    pub ptx: Option<Ptx>,
}

/// One measured row.
struct Measured {
    kernel: String,
    shape: String,
    bytes: u64,
    timing: Timing,
    read_us: f64,
    /// Of the same kernel of the revision that is compared with, in the same run.
    other_us: Option<f64>,
    /// Whether its operands were in part served from the L2.
    cached: bool,
    /// Grid and block; none for a peer.
    launch: Option<Launch>,
    resources: Option<Resources>,
}

/// Checks and times what the options select with the kernels of `ptx` that `gpu` has loaded, and
/// shows `peers` beside them; returns the recorded objects, or `None` if a case failed, in which
/// case nothing is timed.
///
/// # Errors
/// [`Error::Machine`] from the device or the results file, [`Error::Input`] for a selection that
/// leaves nothing or a revision that was never recorded.
pub fn run(
    gpu: &Arc<Gpu>,
    ptx: &Ptx,
    options: &Options,
    peers: &[Peer],
) -> Result<Option<Vec<Value>>, Error> {
    let tier = gpu.tier().to_string();
    let path = results::path(&options.results, gpu.name());
    let file = |error: std::io::Error| Error::machine(format!("{}: {error}", path.display()));
    let past = results::load(&path).map_err(file)?;
    if let Some(Compare {
        revision,
        ptx: None,
    }) = &options.compare
        && !past
            .iter()
            .any(|past| past.revision.starts_with(revision.as_str()))
    {
        return Err(Error::input(format!(
            "{} has no measurement of revision {revision}: `cargo xtask bench --compare` builds its kernels",
            path.display()
        )));
    }
    let mut wanted = options.selection.rows()?;
    wanted.retain(|row| row.runs_on(&gpu.info()));

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

    let text = ptx.text(gpu.tier())?;
    let other = match &options.compare {
        Some(Compare {
            revision,
            ptx: Some(ptx),
        }) => Other::open(gpu.tier(), text, ptx, revision, &wanted)?,
        _ => None,
    };
    let mut measured = measure(gpu, text, other.as_ref(), &wanted)?;
    let own = measured.len();
    beside(&mut measured, peers);
    let copy = time::device_copy(gpu)?;
    let compare = options.compare.as_ref().map(|with| with.revision.as_str());
    print!("{}", shown(&measured, &tier, &past, compare));
    for peer in peers {
        if let Err(reason) = &peer.us {
            println!("{} does not take {}: {reason}", peer.kernel, peer.shape);
        }
    }
    println!(
        "a copy of {} MB moves {:.0} GB/s, read and written",
        time::ROTATE_BYTES / 1_000_000,
        copy.gb_per_second(2 * time::ROTATE_BYTES)
    );
    let date = results::today();
    let lines: Vec<Value> = measured
        .iter()
        .enumerate()
        .map(|(number, row)| {
            // A peer is of no tier.
            let tier = if number < own { tier.as_str() } else { "-" };
            record(row, &date, gpu.name(), tier, &options.revision)
        })
        .collect();
    results::append(&path, &lines).map_err(file)?;
    println!("{} results appended to {}", lines.len(), path.display());
    Ok(Some(lines))
}

/// The kernels of another revision on the same device.
struct Other {
    gpu: Arc<Gpu>,
    /// Those that can be launched as the present ones are, and are right.
    kernels: Vec<&'static str>,
}

impl Other {
    /// Opens the device with the other revision's kernels and checks them in the present launches;
    /// says of each wanted kernel that cannot be compared why.
    fn open(
        tier: Tier,
        present: &str,
        ptx: &Ptx,
        revision: &str,
        wanted: &[Row],
    ) -> Result<Option<Other>, Error> {
        let text = ptx.text(tier)?;
        let Some(gpu) = ptx.open(tier)? else {
            return Ok(None);
        };
        let mut names: Vec<&'static str> = wanted.iter().map(|row| row.kernel).collect();
        names.sort_unstable();
        names.dedup();
        let mut kernels = Vec::new();
        for name in names {
            let there = ptx::parameters(text, name);
            let reason = if there.is_none() {
                Some("it has no such kernel".to_owned())
            } else if there != ptx::parameters(present, name) {
                Some("its parameters are others".to_owned())
            } else {
                let outcomes = check::run(&gpu, |case| case.kernel == name);
                let wrong = outcomes.iter().filter(|case| case.result.is_err()).count();
                (wrong > 0).then(|| format!("{wrong} cases fail in the present launch"))
            };
            match reason {
                Some(reason) => println!("{name} is not compared with {revision}: {reason}"),
                None => kernels.push(name),
            }
        }
        Ok(Some(Other { gpu, kernels }))
    }

    /// Median of the row with this revision's kernel, in the launch of `present`.
    fn us(&self, present: &Gpu, row: &Row) -> Result<Option<f64>, Error> {
        if !self.kernels.contains(&row.kernel) {
            return Ok(None);
        }
        let (timing, _) = time::kernel_with(&self.gpu, present.tuned(), row)?;
        Ok(Some(timing.median_us))
    }
}

/// Times each row and, once for each number of bytes, the kernel that only reads.
fn measure(
    gpu: &Arc<Gpu>,
    ptx: &str,
    other: Option<&Other>,
    wanted: &[Row],
) -> Result<Vec<Measured>, Error> {
    let inspector = Inspector::new(gpu, ptx)?;
    let l2 = time::l2_bytes()?;
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
        // Before the other revision's context takes over.
        let resources = inspector.resources(&call)?;
        let other_us = other.map(|other| other.us(gpu, row)).transpose()?;
        measured.push(Measured {
            kernel: row.kernel.to_owned(),
            shape: row.shape.clone(),
            bytes: row.bytes,
            timing,
            read_us,
            other_us: other_us.flatten(),
            cached: row.streams && timing.copies as u64 * row.bytes < 3 * l2,
            launch: Some(call.launch),
            resources: Some(resources),
        });
    }
    Ok(measured)
}

/// Adds the peers' times at the matrices that were measured, held to the same bytes.
fn beside(measured: &mut Vec<Measured>, peers: &[Peer]) {
    for peer in peers {
        let Ok([median_us, p5_us, p95_us]) = peer.us else {
            continue;
        };
        let Some(of) = measured.iter().find(|row| row.shape == peer.shape) else {
            continue;
        };
        let timing = Timing {
            median_us,
            p5_us,
            p95_us,
            ..of.timing
        };
        measured.push(Measured {
            kernel: peer.kernel.clone(),
            shape: peer.shape.clone(),
            bytes: of.bytes,
            timing,
            read_us: of.read_us,
            other_us: None,
            cached: false,
            launch: None,
            resources: None,
        });
    }
}

/// The table of a run.
fn shown(measured: &[Measured], tier: &str, past: &[Past], compare: Option<&str>) -> String {
    let against = compare.map(|revision| format!("x {revision}"));
    let mut header = vec![
        "variant", "shape", "us", "p5", "p95", "GB/s", "/ read", "x base", "x last",
    ];
    header.extend(against.as_deref());
    header.extend(["regs", "shared", "local", "occupancy"]);
    let median = |kernel: &str, shape: &str| {
        measured
            .iter()
            .find(|row| row.kernel == kernel && row.shape == shape)
            .map(|row| row.timing.median_us)
    };
    // Rows of one shape stand together, peers last.
    let mut order: Vec<&Measured> = measured.iter().collect();
    let first = |shape: &str| measured.iter().position(|row| row.shape == shape);
    order.sort_by_key(|row| first(&row.shape));
    let cells: Vec<Vec<String>> = order
        .into_iter()
        .map(|row| {
            let timing = &row.timing;
            let faster = |us: Option<f64>| table::ratio(us.map(|us| us / timing.median_us));
            let family = match row.resources {
                Some(_) => baseline(&row.kernel),
                None => Some("linear_gemv_int4_baseline"),
            };
            let recorded = |revision: &str| {
                let found = results::last(past, revision, tier, &row.kernel, &row.shape);
                found.map(|past| past.us)
            };
            let mut cells = vec![
                row.kernel.to_owned(),
                format!("{}{}", row.shape, if row.cached { " *" } else { "" }),
                format!("{:.2}", timing.median_us),
                format!("{:.2}", timing.p5_us),
                format!("{:.2}", timing.p95_us),
                format!("{:.0}", timing.gb_per_second(row.bytes)),
                format!("{:.2}", timing.median_us / row.read_us),
                faster(family.and_then(|kernel| median(kernel, &row.shape))),
                faster(recorded("")),
            ];
            if let Some(revision) = compare {
                cells.push(faster(row.other_us.or_else(|| recorded(revision))));
            }
            cells.extend(match &row.resources {
                Some(resources) => [
                    resources.registers.to_string(),
                    resources.shared_bytes.to_string(),
                    resources.local_bytes.to_string(),
                    occupancy(resources),
                ],
                None => ["-", "-", "-", "-"].map(str::to_owned),
            });
            cells
        })
        .collect();
    let mut text = table::columns(&header, &cells, 2);
    text.push_str(
        "/ read: time by that of a kernel that only reads as many bytes; x: speed-up over the baseline, \
         the last recorded run",
    );
    if let Some(revision) = compare {
        text.push_str(&format!(", {revision}"));
    }
    text.push_str(
        "\nlocal: bytes of spills and indexed arrays a thread; occupancy: what the grid fills of what the \
         kernel allows, computed from the driver's blocks a multiprocessor\n",
    );
    if measured.iter().any(|row| row.cached) {
        text.push_str("*: the copies of its operands do not fill the L2 three times\n");
    }
    text
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
        "us_other": row.other_us,
        "registers": row.resources.map(|resources| resources.registers),
        "shared_bytes": row.resources.map(|resources| resources.shared_bytes),
        "local_bytes": row.resources.map(|resources| resources.local_bytes),
        "occupancy": row.resources.map(|resources| resources.occupancy),
        "occupancy_limit": row.resources.map(|resources| resources.occupancy_limit),
        "grid": row.launch.map(|launch| launch.grid),
        "block": row.launch.map(|launch| launch.block),
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

    fn row(kernel: &str, us: f64) -> Measured {
        Measured {
            kernel: kernel.into(),
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
            other_us: None,
            cached: false,
            launch: Some(Launch::linear(132, 256, 0)),
            resources: Some(Resources {
                registers: 64,
                shared_bytes: 8192,
                local_bytes: 0,
                occupancy_limit: 0.5,
                occupancy: 0.25,
            }),
        }
    }

    /// The cells of a line of the table, from the median on.
    fn from_us(line: &str) -> Vec<&str> {
        let (_, after) = line.split_once("group 128").expect("the shape");
        after.split_whitespace().collect()
    }

    #[test]
    fn a_table_compares_with_read_baseline_and_record() {
        let mut rows = vec![
            row("linear_gemv_int4_baseline", 16.0),
            row("linear_gemv_int4_multirow", 8.0),
        ];
        let line = record(&rows[1], "2026-11-23", "NVIDIA H200", "sm_90", "20e476e");
        assert_eq!(line["us_read"], 4.0);
        assert_eq!(line["grid"], json!([132, 1, 1]));
        let past = [Past {
            revision: line["revision"].as_str().expect("text").to_owned(),
            tier: "sm_90".into(),
            kernel: rows[1].kernel.clone(),
            shape: rows[1].shape.clone(),
            us: 12.0,
        }];
        let text = shown(&rows, "sm_90", &past, None);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            from_us(lines[2]),
            [
                "8.00", "7.90", "8.10", "892", "2.00", "2.00", "1.50", "64", "8192", "0", "25%",
                "of", "50%"
            ]
        );
        assert_eq!(from_us(lines[1])[6], "-", "it was never recorded");

        rows[1].other_us = Some(10.0);
        let text = shown(&rows, "sm_90", &past, Some("20e"));
        assert!(text.contains("x 20e"), "{text}");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(from_us(lines[2])[6..8], ["1.50", "1.25"], "in the same run");
        rows[1].other_us = None;
        let text = shown(&rows, "sm_90", &past, Some("20e"));
        let line = text.lines().nth(2).expect("a row");
        assert_eq!(from_us(line)[7], "1.50", "as recorded");
    }

    #[test]
    fn peers_stand_with_their_matrix() {
        let mut rows = vec![
            row("linear_gemv_int4_baseline", 16.0),
            Measured {
                shape: "1536 x 1536 group 128".into(),
                cached: true,
                ..row("linear_gemv_int4_baseline", 4.0)
            },
        ];
        let peer = |shape: &str, us| Peer {
            kernel: "torch int4".into(),
            shape: shape.into(),
            us,
            version: "2.11".into(),
        };
        let peers = [
            peer("8960 x 1536 group 128", Ok([8.0, 7.5, 8.5])),
            peer("8960 x 1537 group 128", Ok([8.0, 7.5, 8.5])),
            peer("1536 x 1536 group 128", Err("no".into())),
        ];
        beside(&mut rows, &peers);
        assert_eq!(rows.len(), 3);
        let text = shown(&rows, "sm_90", &[], None);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[2].starts_with("torch int4"), "{text}");
        assert_eq!(
            from_us(lines[2]),
            [
                "8.00", "7.50", "8.50", "892", "2.00", "2.00", "-", "-", "-", "-", "-"
            ]
        );
        assert!(lines[3].contains("group 128 *"), "{text}");
        assert!(text.contains("three times"), "{text}");
        assert_eq!(record(&rows[2], "", "", "-", "")["registers"], Value::Null);
    }
}
