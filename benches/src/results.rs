//! Results as JSON lines: one object a measurement, appended, never rewritten.
//!
//! | field | |
//! |---|---|
//! | `date`, `revision`, `gpu`, `tier` | when, of which sources (`+` for changed ones), where; `-` is the tier of what is not ours |
//! | `kernel`, `shape`, `bytes` | what, and the bytes that a launch has to move |
//! | `us_median`, `us_p5`, `us_p95` | microseconds a launch |
//! | `gb_per_second` | `bytes` by the median |
//! | `us_read` | median of the kernel that only reads as many bytes, in the same run |
//! | `us_other` | of the revision that was compared with, in the same run |
//! | `registers`, `shared_bytes`, `local_bytes` | as the driver compiled it |
//! | `occupancy`, `occupancy_limit` | share of the threads that the grid fills, that the kernel allows |
//! | `grid`, `block` | as it was launched |
//! | `launches`, `copies`, `samples` | of the graph, of its operands, of its runs |

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

/// `<folder>/<gpu>.jsonl`, with the device's name in lower case and dashes.
pub fn path(folder: &Path, gpu: &str) -> PathBuf {
    let slug: String = gpu
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("-")
        .to_ascii_lowercase();
    folder.join(format!("{slug}.jsonl"))
}

/// Appends `rows`, making the folder if there is none.
///
/// # Errors
/// Whatever the file system answers.
pub fn append(path: &Path, rows: &[Value]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut text = String::new();
    for row in rows {
        text.push_str(&row.to_string());
        text.push('\n');
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)?
        .write_all(text.as_bytes())
}

/// A measurement of an earlier run.
#[derive(Debug, Clone, PartialEq)]
pub struct Past {
    /// Revision of the sources; empty where none was recorded.
    pub revision: String,
    /// `sm_75` and so on.
    pub tier: String,
    /// Kernel.
    pub kernel: String,
    /// Shape.
    pub shape: String,
    /// Median, microseconds.
    pub us: f64,
}

/// Reads the measurements of a results file, oldest first; none where there is no file.
///
/// # Errors
/// The file cannot be read, or a line is no measurement: names the line.
pub fn load(path: &Path) -> io::Result<Vec<Past>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text?,
    };
    let lines = text.lines().enumerate();
    lines
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(number, line)| {
            past(line).ok_or_else(|| {
                let what = format!("line {} is no measurement", number + 1);
                io::Error::new(io::ErrorKind::InvalidData, what)
            })
        })
        .collect()
}

fn past(line: &str) -> Option<Past> {
    let row: Value = serde_json::from_str(line).ok()?;
    let text = |name: &str| row[name].as_str().map(str::to_owned);
    Some(Past {
        revision: text("revision").unwrap_or_default(),
        tier: text("tier")?,
        kernel: text("kernel")?,
        shape: text("shape")?,
        us: row["us_median"].as_f64().filter(|us| *us > 0.0)?,
    })
}

/// The newest measurement of a kernel at a shape, of the revision that begins with `revision`.
pub fn last<'a>(
    past: &'a [Past],
    revision: &str,
    tier: &str,
    kernel: &str,
    shape: &str,
) -> Option<&'a Past> {
    past.iter().rev().find(|past| {
        past.tier == tier
            && past.kernel == kernel
            && past.shape == shape
            && past.revision.starts_with(revision)
    })
}

/// Today in UTC, `YYYY-MM-DD`.
pub fn today() -> String {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let (year, month, day) = civil_from_days(seconds / 86_400);
    format!("{year:04}-{month:02}-{day:02}")
}

/// Days since 1970-01-01 as (year, month, day) of the Gregorian calendar.
fn civil_from_days(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [
        31,
        28 + u64::from(leap(year)),
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ];
    let mut month = 1;
    for length in lengths {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(civil_from_days(0), (1970, 1, 1));
        assert_eq!(civil_from_days(59), (1970, 3, 1));
        assert_eq!(civil_from_days(11_016), (2000, 2, 29));
        assert_eq!(civil_from_days(20_779), (2026, 11, 22));
    }

    /// Lines of two ages: the first has what was recorded before revisions were.
    const LINES: &str = concat!(
        r#"{"bytes":7138304,"copies":57,"date":"2026-11-23","gb_per_second":959.0,"gpu":"NVIDIA H200","kernel":"linear_gemv_int4_multirow","launches":171,"samples":15,"shape":"8960 x 1536 group 128","tier":"sm_90","us_max":7.5,"us_median":7.44,"us_min":7.4}"#,
        "\n\n",
        r#"{"bytes":7138304,"date":"2026-11-24","gpu":"NVIDIA H200","kernel":"linear_gemv_int4_multirow","revision":"20e476e0aa11","shape":"8960 x 1536 group 128","tier":"sm_90","us_median":5.0}"#,
        "\n",
    );

    #[test]
    fn measurements_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/gpu.jsonl");
        assert_eq!(load(&path).unwrap(), []);
        let rows: Vec<Value> = LINES
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        append(&path, &rows[..1]).unwrap();
        append(&path, &rows[1..]).unwrap();
        let found = load(&path).unwrap();
        assert_eq!(found.len(), 2);
        let at = |revision: &str, tier: &str| {
            let shape = "8960 x 1536 group 128";
            last(&found, revision, tier, "linear_gemv_int4_multirow", shape).map(|past| past.us)
        };
        assert_eq!(at("", "sm_90"), Some(5.0));
        assert_eq!(at("20e476e", "sm_90"), Some(5.0));
        assert_eq!(at("1823b04", "sm_90"), None);
        assert_eq!(at("", "sm_75"), None);
    }

    #[test]
    fn a_spoiled_line_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gpu.jsonl");
        fs::write(&path, format!("{LINES}{{\"kernel\": \"a\"}}\n")).unwrap();
        let error = load(&path).unwrap_err().to_string();
        assert_eq!(error, "line 4 is no measurement");
    }

    #[test]
    fn file_names() {
        let path = path(Path::new("results"), "NVIDIA H100 80GB HBM3");
        assert_eq!(path, Path::new("results/nvidia-h100-80gb-hbm3.jsonl"));
    }
}
