//! Hardware counters of kernels, as Nsight Compute (`ncu`) reads them: what bounds a kernel that is
//! slower than a plain read of its bytes.
//!
//! `ncu` runs this program's `once`, which launches every selected row a single time, and replays
//! each launch with cold caches until all counters are read. The clocks are left alone. Its times are
//! those of a lone launch: compare them with each other, not with those of `kernels`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use engine::Error;
use engine::backend::cuda::device::{DeviceMemory, Gpu};
use engine::backend::cuda::plan::Memory;
use gpu_kernels::launch::DeviceSlice;
use gpu_kernels::linear::gemm_int4::needs_warpgroup_products;
use gpu_kernels::tuned::Tuned;

use crate::rows::{self, Operands, Row};
use crate::select::Selection;
use crate::table;

const TIME_NS: &str = "gpu__time_duration.sum";
const DRAM_PERCENT: &str = "dram__throughput.avg.pct_of_peak_sustained_elapsed";
const DRAM_READ: &str = "dram__bytes_read.sum";
const L2_HIT_PERCENT: &str = "lts__t_sector_hit_rate.pct";
const ISSUE_PERCENT: &str = "smsp__issue_active.avg.pct_of_peak_sustained_active";
const WARPS_PERCENT: &str = "sm__warps_active.avg.pct_of_peak_sustained_active";
const WARPS_LIMIT_PERCENT: &str = "sm__maximum_warps_per_active_cycle_pct";
const CONFLICTS: &str = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum";
const INSTRUCTIONS: &str = "smsp__inst_executed.sum";
const REGISTERS: &str = "launch__registers_per_thread";

/// Counters besides the stalls.
const COUNTERS: [&str; 10] = [
    TIME_NS,
    DRAM_PERCENT,
    DRAM_READ,
    L2_HIT_PERCENT,
    ISSUE_PERCENT,
    WARPS_PERCENT,
    WARPS_LIMIT_PERCENT,
    CONFLICTS,
    INSTRUCTIONS,
    REGISTERS,
];

/// Reasons for which a warp does not issue, as the counters are named.
const STALLS: [&str; 12] = [
    "long_scoreboard",
    "short_scoreboard",
    "wait",
    "barrier",
    "membar",
    "lg_throttle",
    "mio_throttle",
    "math_pipe_throttle",
    "dispatch_stall",
    "no_instruction",
    "not_selected",
    "imc_miss",
];

/// Stall reasons shown a row.
const SHOWN_STALLS: usize = 3;

/// Warps that stall for `reason`, an issued instruction.
fn stall(reason: &str) -> String {
    format!("smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio")
}

fn counters() -> Vec<String> {
    let plain = COUNTERS.iter().map(|&name| name.to_owned());
    plain.chain(STALLS.into_iter().map(stall)).collect()
}

/// The rows that are counted: those selected, and the kernel that only reads as many bytes.
fn selected(selection: &Selection) -> Result<Vec<Row>, Error> {
    let mut wanted = selection.rows()?;
    let mut bytes: Vec<u64> = wanted.iter().map(|row| row.bytes).collect();
    bytes.sort_unstable();
    bytes.dedup();
    wanted.extend(bytes.into_iter().map(|bytes| rows::read(bytes, true)));
    Ok(wanted)
}

/// Memory of one launch.
struct Once {
    gpu: Arc<Gpu>,
    memory: DeviceMemory,
}

impl Memory for Once {
    fn upload(&mut self, bytes: &[u8]) -> Result<DeviceSlice, Error> {
        self.memory.upload(bytes)
    }

    fn reserve(&mut self, bytes: u64) -> Result<DeviceSlice, Error> {
        self.memory.reserve(bytes)
    }
}

impl Operands for Once {
    fn activations(&mut self, bytes: &[u8]) -> Result<DeviceSlice, Error> {
        self.memory.upload(bytes)
    }

    fn tuned(&self) -> &Tuned {
        self.gpu.tuned()
    }
}

/// Launches every selected row a single time, in order: what a profiler is pointed at.
///
/// # Errors
/// [`Error::Machine`] from the device, [`Error::Input`] for a selection that leaves nothing.
pub fn once(gpu: &Arc<Gpu>, selection: &Selection) -> Result<(), Error> {
    for row in selected(selection)? {
        if !row.runs_on(&gpu.info()) {
            continue;
        }
        let mut memory = Once {
            gpu: Arc::clone(gpu),
            memory: DeviceMemory::new(gpu),
        };
        let call = (row.make)(&gpu.info(), &mut memory)?;
        // SAFETY: the call's memory is `memory`, which is dropped after the wait.
        unsafe { gpu.queue(&call) }?;
        gpu.synchronize()?;
        println!("{} {}", row.kernel, row.shape);
    }
    Ok(())
}

/// What a run is asked to do.
#[derive(Debug)]
pub struct Options {
    /// Arguments of `once`: kernels, shapes and tier.
    pub arguments: Vec<String>,
    /// The profiler.
    pub ncu: PathBuf,
    /// Where the counters go, all of them, as CSV.
    pub csv: PathBuf,
}

/// Counts the selected rows and prints a table; all counters go to a CSV file.
///
/// # Errors
/// [`Error::Machine`] if the profiler cannot be started, fails, or counts something else.
pub fn run(selection: &Selection, options: &Options) -> Result<(), Error> {
    let mut rows = selected(selection)?;
    let program = std::env::current_exe()
        .map_err(|error| Error::machine(format!("cannot find this program: {error}")))?;
    let log = options.csv.with_extension("ncu");
    let output = Command::new(&options.ncu)
        .args(["--clock-control", "none", "--csv", "--page", "raw"])
        .args(["--print-units", "base", "--force-overwrite", "--log-file"])
        .arg(&log)
        .args(["--metrics", &counters().join(",")])
        .arg(&program)
        .arg("once")
        .args(&options.arguments)
        .output()
        .map_err(|error| {
            Error::machine(format!("cannot run {}: {error}", options.ncu.display()))
        })?;
    let text = fs::read_to_string(&log).unwrap_or_default();
    if !output.status.success() {
        return Err(Error::machine(format!(
            "{} failed:\n{}{}{text}",
            options.ncu.display(),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        )));
    }
    let launches = parse(&text).map_err(|reason| {
        Error::machine(format!("{} is no output of ncu: {reason}", log.display()))
    })?;
    let counted: Vec<&str> = launches
        .iter()
        .map(|launch| launch.kernel.as_str())
        .collect();
    // The launched tier may lack the kernels of a row.
    rows.retain(|row| !needs_warpgroup_products(row.kernel) || counted.contains(&row.kernel));
    let expected: Vec<&str> = rows.iter().map(|row| row.kernel).collect();
    if counted != expected {
        return Err(Error::machine(format!(
            "ncu counted {counted:?} where {expected:?} were launched"
        )));
    }
    print!("{}", shown(&rows, &launches));
    write(&options.csv, &csv(&rows, &launches))?;
    let _ = fs::remove_file(&log);
    println!("all counters are in {}", options.csv.display());
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text)
        .map_err(|error| Error::machine(format!("writing {}: {error}", path.display())))
}

/// One counted launch.
#[derive(Debug, PartialEq)]
struct Launch {
    kernel: String,
    grid: String,
    block: String,
    /// In the order of [`counters`]; `None` where this GPU has no such counter.
    values: Vec<Option<f64>>,
}

impl Launch {
    fn value(&self, name: &str) -> Option<f64> {
        let index = counters().iter().position(|known| known == name)?;
        self.values[index]
    }

    /// The stalls that weigh most, as `long_scoreboard 12.1`: warps that wait, an issued instruction.
    fn stalls(&self) -> String {
        let mut stalls: Vec<(f64, &str)> = STALLS
            .into_iter()
            .filter_map(|reason| Some((self.value(&stall(reason))?, reason)))
            .collect();
        stalls.sort_by(|a, b| b.0.total_cmp(&a.0));
        let shown = stalls.iter().take(SHOWN_STALLS);
        shown
            .map(|(warps, reason)| format!("{reason} {warps:.1}"))
            .collect::<Vec<_>>()
            .join(", ")
    }
}

/// The launches in what `ncu --csv --page raw` logs: a line of names, one of units, one a launch,
/// between lines that begin with `==`.
fn parse(log: &str) -> Result<Vec<Launch>, String> {
    let mut lines = log.lines().filter(|line| line.starts_with('"'));
    let header = cells(lines.next().ok_or("it has no table")?);
    let column = |name: &str| header.iter().position(|cell| cell == name);
    let required = |name: &str| column(name).ok_or_else(|| format!("it has no column `{name}`"));
    let (kernel, grid, block) = (
        required("Kernel Name")?,
        required("Grid Size")?,
        required("Block Size")?,
    );
    let values: Vec<Option<usize>> = counters().iter().map(|name| column(name)).collect();
    lines
        // The units: base units, as asked for.
        .skip(1)
        .map(|line| {
            let cells = cells(line);
            if cells.len() != header.len() {
                return Err(format!("`{line}` has not as many cells as the header"));
            }
            let number = |index: usize| cells[index].replace(',', "").parse().ok();
            Ok(Launch {
                kernel: cells[kernel].clone(),
                grid: cells[grid].clone(),
                block: cells[block].clone(),
                values: values.iter().map(|index| index.and_then(number)).collect(),
            })
        })
        .collect()
}

/// The cells of a line of CSV in which every cell is quoted.
fn cells(line: &str) -> Vec<String> {
    let line = line.trim().trim_start_matches('"').trim_end_matches('"');
    line.split("\",\"").map(str::to_owned).collect()
}

fn shown(rows: &[Row], launches: &[Launch]) -> String {
    let header = [
        "kernel",
        "shape",
        "stalls",
        "us",
        "dram %",
        "MB read",
        "/ bytes",
        "L2 hit %",
        "issue %",
        "warps %",
        "of",
        "conflicts",
        "regs",
    ];
    let cells: Vec<Vec<String>> = rows
        .iter()
        .zip(launches)
        .map(|(row, launch)| {
            let cell = |name: &str, scale: f64, digits: usize| match launch.value(name) {
                Some(value) => format!("{:.digits$}", value * scale),
                None => "-".to_owned(),
            };
            vec![
                row.kernel.to_owned(),
                row.shape.clone(),
                launch.stalls(),
                cell(TIME_NS, 1e-3, 2),
                cell(DRAM_PERCENT, 1.0, 1),
                cell(DRAM_READ, 1e-6, 2),
                cell(DRAM_READ, 1.0 / row.bytes as f64, 2),
                cell(L2_HIT_PERCENT, 1.0, 0),
                cell(ISSUE_PERCENT, 1.0, 1),
                cell(WARPS_PERCENT, 1.0, 1),
                cell(WARPS_LIMIT_PERCENT, 1.0, 0),
                cell(CONFLICTS, 1.0, 0),
                cell(REGISTERS, 1.0, 0),
            ]
        })
        .collect();
    format!(
        "{}us: one launch from cold caches; / bytes: read from memory by what the kernel has to move; \
         warps: active, of what the launch allows; stalls: warps that wait, an issued instruction\n",
        table::columns(&header, &cells, 3)
    )
}

fn csv(rows: &[Row], launches: &[Launch]) -> String {
    let mut text = format!("kernel,shape,bytes,grid,block,{}\n", counters().join(","));
    for (row, launch) in rows.iter().zip(launches) {
        let values: Vec<String> = launch
            .values
            .iter()
            .map(|value| value.map_or_else(String::new, |value| value.to_string()))
            .collect();
        text.push_str(&format!(
            "{},\"{}\",{},\"{}\",\"{}\",{}\n",
            row.kernel,
            row.shape,
            row.bytes,
            launch.grid,
            launch.block,
            values.join(",")
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As ncu 2025.3 logs, with fewer columns.
    fn log() -> String {
        let stalled = stall("long_scoreboard");
        let waiting = stall("wait");
        format!(
            "==PROF== Connected to process 7\n\
             \"ID\",\"Kernel Name\",\"Block Size\",\"Grid Size\",\"{TIME_NS}\",\"{DRAM_READ}\",\"{stalled}\",\"{waiting}\",\"{CONFLICTS}\"\n\
             \"\",\"\",\"\",\"\",\"ns\",\"byte\",\"inst\",\"inst\",\"\"\n\
             \"0\",\"swiglu_f32\",\"(256, 1, 1)\",\"(4, 1, 1)\",\"4,128\",\"7,138,304\",\"9.5\",\"1.25\",\"n/a\"\n\
             ==PROF== Disconnected\n"
        )
    }

    #[test]
    fn launches_are_read_from_the_log() {
        let launches = parse(&log()).expect("launches");
        assert_eq!(launches.len(), 1);
        let launch = &launches[0];
        assert_eq!(launch.kernel, "swiglu_f32");
        assert_eq!(launch.grid, "(4, 1, 1)");
        assert_eq!(launch.value(TIME_NS), Some(4128.0));
        assert_eq!(
            launch.value(CONFLICTS),
            None,
            "this GPU has no such counter"
        );
        assert_eq!(launch.value(ISSUE_PERCENT), None, "it was not in the log");
        assert_eq!(launch.stalls(), "long_scoreboard 9.5, wait 1.2");
        assert!(parse("==PROF== nothing\n").is_err());
        assert!(parse("\"ID\",\"Grid Size\"\n").is_err());
    }

    #[test]
    fn the_table_and_the_csv_name_the_row() {
        let launches = parse(&log()).expect("launches");
        let rows = [rows::read(7_138_304, true)];
        let text = shown(&rows, &launches);
        assert!(text.contains(" 4.13 "), "{text}");
        assert!(text.contains(" 1.00 "), "{text}");
        let text = csv(&rows, &launches);
        let line = text.lines().nth(1).expect("a row");
        assert!(line.starts_with("read_bytes,\"7138304 bytes\",7138304,\"(4, 1, 1)\","));
        assert_eq!(
            text.lines().next().map(|l| l.matches(',').count()),
            Some(5 + counters().len() - 1)
        );
    }

    #[test]
    fn every_row_has_its_read() {
        let selection = Selection {
            kernel: "rmsnorm_f32".into(),
            ..Selection::default()
        };
        let rows = selected(&selection).expect("rows");
        let kernels: Vec<&str> = rows.iter().map(|row| row.kernel).collect();
        assert_eq!(
            kernels,
            ["rmsnorm_f32", "rmsnorm_f32", "read_bytes", "read_bytes"]
        );
    }
}
