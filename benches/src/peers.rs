//! Live baselines of other makers, timed in the same run: torch's INT4 product and cuBLAS in fp16,
//! where `python3` has torch.

use std::io::Write;
use std::process::{Command, Stdio};

use engine::Error;
use serde_json::{Value, json};

use crate::rows::Row;

const SCRIPT: &str = include_str!("../peers.py");

/// A peer's time at a matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Peer {
    /// `torch int4`, `cublas fp16`.
    pub kernel: String,
    /// Shape, as the rows of the matrix name it.
    pub shape: String,
    /// Median, 5th and 95th percentile, microseconds a launch, or why there is none.
    pub us: Result<[f64; 3], String>,
    /// Version of torch.
    pub version: String,
}

/// Rows, columns and group of an INT4 matrix, and the tokens that it is multiplied with.
type Product = (usize, usize, usize, usize);

/// A product with a bare INT4 matrix, as its rows name it: `1536 x 8960 group 128`, and `, 16 tokens` after
/// it where there are several.
fn matrix(row: &Row) -> Option<Product> {
    if !row.kernel.starts_with("linear_gem") || !row.kernel.contains("_int4") {
        return None;
    }
    let words: Vec<&str> = row
        .shape
        .split([' ', ','])
        .filter(|w| !w.is_empty())
        .collect();
    let (n, k, group, tokens) = match *words.as_slice() {
        [n, "x", k, "group", group] => (n, k, group, "1"),
        [n, "x", k, "group", group, tokens, "tokens"] if tokens != "1" => (n, k, group, tokens),
        _ => return None,
    };
    let [n, k, group, tokens] = [n, k, group, tokens].map(|number| number.parse().ok());
    Some((n?, k?, group?, tokens?))
}

/// The shape of a product as its rows name it.
fn shape((n, k, group, tokens): Product) -> String {
    match tokens {
        1 => format!("{n} x {k} group {group}"),
        _ => format!("{n} x {k} group {group}, {tokens} tokens"),
    }
}

/// The bare INT4 matrices among the rows.
fn matrices(rows: &[Row]) -> Vec<Product> {
    let mut found = Vec::new();
    for matrix in rows.iter().filter_map(matrix) {
        if !found.contains(&matrix) {
            found.push(matrix);
        }
    }
    found
}

/// Whether there is a python3 with a torch that sees a GPU, or why not.
fn available() -> Result<(), String> {
    let check =
        "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 'torch sees no GPU')";
    let output = Command::new("python3").args(["-c", check]).output();
    let output = output.map_err(|error| format!("python3 cannot be run: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(text
        .lines()
        .last()
        .unwrap_or("python3 has no torch")
        .to_owned())
}

/// Times the peers at every bare INT4 matrix of `rows`. Where they cannot be timed, says why and
/// returns none.
///
/// # Errors
/// [`Error::Machine`] if the script breaks off.
pub fn measure(rows: &[Row]) -> Result<Vec<Peer>, Error> {
    let matrices = matrices(rows);
    if matrices.is_empty() {
        return Ok(Vec::new());
    }
    if let Err(reason) = available() {
        println!("not measured: torch int4 and cuBLAS fp16 ({reason})");
        return Ok(Vec::new());
    }
    eprintln!("torch int4 and cuBLAS fp16 at {} matrices", matrices.len());
    let broken = |error: std::io::Error| Error::machine(format!("python3: {error}"));
    let mut python = Command::new("python3")
        .args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(broken)?;
    let shapes: Vec<Value> = matrices
        .iter()
        .map(|(n, k, group, tokens)| json!({"n": n, "k": k, "group": group, "tokens": tokens}))
        .collect();
    let mut stdin = python.stdin.take().expect("stdin is piped");
    stdin
        .write_all(Value::Array(shapes).to_string().as_bytes())
        .map_err(broken)?;
    drop(stdin);
    let output = python.wait_with_output().map_err(broken)?;
    if !output.status.success() {
        return Err(Error::machine(
            "peers.py failed: see above; --no-peers leaves it out",
        ));
    }
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| peer(line).ok_or_else(|| Error::machine(format!("peers.py printed `{line}`"))))
        .collect()
}

fn peer(line: &str) -> Option<Peer> {
    let value: Value = serde_json::from_str(line).ok()?;
    let number = |name: &str| value[name].as_u64().map(|number| number as usize);
    let us = |name: &str| value[name].as_f64().filter(|us| *us > 0.0);
    Some(Peer {
        kernel: value["kernel"].as_str()?.to_owned(),
        shape: shape((
            number("n")?,
            number("k")?,
            number("group")?,
            number("tokens")?,
        )),
        us: match value["error"].as_str() {
            Some(reason) => Err(reason.to_owned()),
            None => Ok([us("us_median")?, us("us_p5")?, us("us_p95")?]),
        },
        version: value["version"].as_str()?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::Selection;

    #[test]
    fn bare_matrices_have_peers_and_fused_ones_none() {
        let selection = Selection {
            kernel: "int4".into(),
            shape: Some((8960, 1536)),
            group: 128,
            ..Selection::default()
        };
        let rows = selection.rows().expect("rows");
        assert!(rows.len() > 3, "several forms");
        let matrices = matrices(&rows);
        assert!(matrices.contains(&(8960, 1536, 128, 1)));
        assert!(matrices.contains(&(8960, 1536, 128, 512)));
        assert!(matrices.iter().all(|(n, k, ..)| (*n, *k) == (8960, 1536)));
        for product in matrices {
            let named = |row: &Row| row.shape == shape(product);
            assert!(rows.iter().any(named), "{product:?}");
        }
    }

    #[test]
    fn times_and_refusals_are_read() {
        let line = r#"{"kernel": "torch int4", "version": "2.11", "n": 64, "k": 128, "group": 128, "tokens": 1, "us_median": 3.5, "us_p5": 3.4, "us_p95": 3.75}"#;
        let found = peer(line).expect("a peer");
        assert_eq!(found.shape, "64 x 128 group 128");
        assert_eq!(found.us, Ok([3.5, 3.4, 3.75]));
        let line = r#"{"kernel": "torch int4", "version": "2.11", "n": 7, "k": 128, "group": 128, "tokens": 16, "error": "no"}"#;
        let refused = peer(line).expect("a peer");
        assert_eq!(refused.us, Err("no".into()));
        assert_eq!(refused.shape, "7 x 128 group 128, 16 tokens");
        assert_eq!(peer("{}"), None);
        assert_eq!(peer("Traceback"), None);
    }
}
