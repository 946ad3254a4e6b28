//! `cargo xtask gpu`: packs what a machine with a GPU and without Rust needs to check and time this
//! project into one folder.
//!
//! ```text
//! dist/gpu/
//!   run.sh          joins and verifies the model, checks kernels and models in every tier, times both;
//!                   reads hardware counters
//!   bin/            edgellm, edgellm-bench, golden tests: release builds, stripped, packed by xz
//!   data/           what the golden tests read
//!   ptx/            the kernels of each tier, to read (the programs carry their own copy)
//!   revision        the commit that it was made of, recorded with the times
//!   model/          the model in parts, with SHA256SUMS of the parts and model.sha256 of the whole
//! ```
//!
//! With `--no-model` there are `run.sh`, `revision` and `bin/edgellm-bench` alone.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args as ClapArgs;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// What the pack's script does; kept as a file of its own so that it can be read and linted.
const RUN_SH: &str = include_str!("gpu_run.sh");

/// Packs binaries, tests, PTX and a model for a machine that has a GPU and no Rust.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Catalogue name or path of the model to pack [default: the catalogue's default].
    #[arg(long, conflicts_with = "synthetic")]
    model: Option<String>,
    /// Pack a random-weight model of this shape instead, for speed only.
    #[arg(long, value_name = "SHAPE")]
    synthetic: Option<String>,
    /// Pack neither model nor golden tests: a few MB, for work on kernels.
    #[arg(long, conflicts_with_all = ["model", "synthetic"])]
    no_model: bool,
    /// Folder to write; replaced if a pack is already there.
    #[arg(long, default_value = "dist/gpu")]
    out: PathBuf,
    /// Size of a model part in MB (10^6 bytes), 60 at most.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=60))]
    part_mb: u64,
}

/// Packs.
///
/// # Errors
/// Says which step failed: a build, a missing file, a model that is not there.
pub fn run(args: &Args) -> Result<(), Failure> {
    let root = crate::workspace_root();
    let out = root.join(&args.out);
    if args.no_model {
        println!("building edgellm-bench");
        let bench = program("benches", "edgellm-bench")?;
        start_over(&out)?;
        pack(&bench, &out)?;
    } else {
        whole(args, &root, &out)?;
    }
    fs::write(out.join("revision"), revision(&root))?;
    write_script(&out.join("run.sh"))?;
    summary(&out)?;
    Ok(())
}

/// Everything but the script and the revision.
fn whole(args: &Args, root: &Path, out: &Path) -> Result<(), Failure> {
    println!("building the programs and the golden tests");
    let programs = [
        program("engine", "edgellm")?,
        program("benches", "edgellm-bench")?,
    ];
    let tests = executables(&[
        "test",
        "--release",
        "--no-run",
        "-p",
        "engine",
        "--test",
        "golden*",
    ])?;
    // The messages also announce the programs that the tests start.
    let golden: Vec<_> = tests
        .into_iter()
        .filter(|test| test.target.starts_with("golden"))
        .collect();
    if golden.is_empty() {
        return Err("engine has no golden tests".into());
    }

    // Only now: an earlier pack stays whole while this one is being built.
    start_over(out)?;
    for folder in ["data", "ptx", "model"] {
        fs::create_dir_all(out.join(folder))?;
    }
    for program in programs.iter().chain(&golden) {
        pack(program, out)?;
    }
    copy_data(&root.join("engine/tests/golden"), &out.join("data"))?;
    let status = Command::new(&programs[1].path)
        .arg("ptx")
        .arg(out.join("ptx"))
        .status()
        .map_err(|error| format!("starting edgellm-bench: {error}"))?;
    if !status.success() {
        return Err("edgellm-bench ptx failed".into());
    }

    let model = match (&args.synthetic, &args.model) {
        (Some(shape), _) => synthetic(shape, out)?,
        (None, name) => crate::model::path_of(name.as_deref())?,
    };
    println!("packing {}", model.display());
    split(&model, &out.join("model"), args.part_mb * 1_000_000)?;
    if args.synthetic.is_some() {
        fs::remove_file(&model)?;
        // Tells the script that there are no golden texts for it.
        fs::write(out.join("model/random"), "")?;
    }
    Ok(())
}

/// Why a pack could not be made, in one line.
pub type Failure = Box<dyn std::error::Error>;

/// An executable that cargo built.
#[derive(Debug, PartialEq, Eq)]
struct Executable {
    target: String,
    path: PathBuf,
}

/// Runs cargo with `arguments` and returns the executables that it built, from its JSON messages.
fn executables(arguments: &[&str]) -> Result<Vec<Executable>, Failure> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(arguments)
        .arg("--message-format=json-render-diagnostics")
        .current_dir(crate::workspace_root())
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("cargo {} failed", arguments.join(" ")).into());
    }
    Ok(String::from_utf8(output.stdout)?
        .lines()
        .filter_map(executable)
        .collect())
}

/// The executable that one JSON message of cargo announces, if it does.
fn executable(message: &str) -> Option<Executable> {
    let message: Value = serde_json::from_str(message).ok()?;
    if message["reason"] != "compiler-artifact" {
        return None;
    }
    Some(Executable {
        target: message["target"]["name"].as_str()?.to_owned(),
        path: message["executable"].as_str()?.into(),
    })
}

/// Builds a program of a package for release.
fn program(package: &str, name: &str) -> Result<Executable, Failure> {
    executables(&["build", "--release", "-p", package, "--bin", name])?
        .into_iter()
        .find(|program| program.target == name)
        .ok_or_else(|| format!("the build made no {name}").into())
}

/// Puts a program into `bin/` of a pack: stripped, and packed where there is `xz`.
fn pack(program: &Executable, out: &Path) -> Result<(), Failure> {
    let bin = out.join("bin");
    fs::create_dir_all(&bin)?;
    let path = bin.join(&program.target);
    strip(&program.path, &path)?;
    let packed = Command::new("xz")
        .args(["-6", "--force"])
        .arg(&path)
        .status();
    if !packed.is_ok_and(|status| status.success()) {
        println!(
            "{} is not packed: `xz` is not installed or failed",
            path.display()
        );
    }
    Ok(())
}

/// Copies a program without its symbols, or as it is where there is no `strip`.
fn strip(from: &Path, to: &Path) -> Result<(), Failure> {
    let stripped = Command::new("strip").arg("-o").arg(to).arg(from).status();
    if !stripped.is_ok_and(|status| status.success()) {
        println!(
            "{} keeps its symbols: `strip` is not installed or failed",
            to.display()
        );
        fs::copy(from, to)?;
    }
    Ok(())
}

/// Empties the folder of an earlier pack; refuses a folder that is something else.
fn start_over(out: &Path) -> Result<(), Failure> {
    if out.exists() {
        let is_pack = out.join("run.sh").is_file() || fs::read_dir(out)?.next().is_none();
        if !is_pack {
            return Err(format!("{} is not empty and not a pack", out.display()).into());
        }
        fs::remove_dir_all(out)?;
    }
    fs::create_dir_all(out)?;
    // First, so that a pack that failed half-way can be replaced.
    write_script(&out.join("run.sh"))
}

fn write_script(path: &Path) -> Result<(), Failure> {
    fs::write(path, RUN_SH)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Copies a folder of test data, without the sources of the tests and of the data.
fn copy_data(from: &Path, to: &Path) -> Result<(), Failure> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).map_err(|e| format!("{}: {e}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let source = target
            .extension()
            .is_some_and(|extension| extension == "rs" || extension == "py");
        if entry.file_type()?.is_dir() {
            copy_data(&entry.path(), &target)?;
        } else if !source {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// The commit of the checkout, with a `+` where files were changed; `unknown` without git.
fn revision(root: &Path) -> String {
    let output = Command::new("git")
        .args([
            "describe",
            "--always",
            "--abbrev=12",
            "--dirty=+",
            "--exclude=*",
        ])
        .current_dir(root)
        .output();
    match output {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        _ => "unknown".to_owned(),
    }
}

/// Writes a random-weight model of the named shape into `folder`.
fn synthetic(shape: &str, folder: &Path) -> Result<PathBuf, Failure> {
    use models::synthetic;
    let shape = synthetic::shape(shape)?;
    let path = folder.join(format!("{}-random.gguf", shape.name));
    let file = io::BufWriter::new(File::create(&path)?);
    synthetic::write(shape, &synthetic::Options::default(), file)?.flush()?;
    Ok(path)
}

/// Splits `file` into `folder/part-00`, `part-01`, … of at most `part_bytes`, and writes the
/// checksums of the parts (`SHA256SUMS`) and of the whole (`model.sha256`), as `sha256sum -c` reads
/// them.
fn split(file: &Path, folder: &Path, part_bytes: u64) -> Result<(), Failure> {
    let name = file
        .file_name()
        .ok_or("the model has no file name")?
        .to_string_lossy();
    if name.contains(['\n', '\\', '\'']) {
        return Err(format!("{name:?} cannot be written into a checksum file").into());
    }
    let mut input =
        BufReader::new(File::open(file).map_err(|e| format!("{}: {e}", file.display()))?);
    let mut whole = Sha256::new();
    let mut sums = String::new();
    for number in 0.. {
        let part = format!("part-{number:02}");
        let path = folder.join(&part);
        let (bytes, sum) = copy_part(&mut input, &path, part_bytes, &mut whole)?;
        if bytes == 0 {
            fs::remove_file(&path)?;
            break;
        }
        sums.push_str(&format!("{sum}  {part}\n"));
    }
    fs::write(folder.join("SHA256SUMS"), sums)?;
    fs::write(
        folder.join("model.sha256"),
        format!("{}  {name}\n", hex(whole)),
    )?;
    Ok(())
}

/// Copies at most `limit` bytes into a new file at `path`; returns how many, and their SHA-256.
fn copy_part(
    input: &mut impl Read,
    path: &Path,
    limit: u64,
    whole: &mut Sha256,
) -> Result<(u64, String), Failure> {
    let mut output = File::create(path)?;
    let mut part = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut input = input.take(limit);
    let mut copied = 0;
    loop {
        let bytes = input.read(&mut buffer)?;
        if bytes == 0 {
            return Ok((copied, hex(part)));
        }
        let bytes = &buffer[..bytes];
        part.update(bytes);
        whole.update(bytes);
        output.write_all(bytes)?;
        copied += bytes.len() as u64;
    }
}

fn hex(digest: Sha256) -> String {
    digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Prints what was packed.
fn summary(out: &Path) -> Result<(), Failure> {
    for folder in ["bin", "data", "ptx", "model"] {
        if !out.join(folder).is_dir() {
            continue;
        }
        let bytes = tree_bytes(&out.join(folder))?;
        println!("{:>8.1} MB  {folder}", bytes as f64 / 1e6);
    }
    println!(
        "{} is ready: copy it to the machine and start run.sh there",
        out.display()
    );
    Ok(())
}

fn tree_bytes(folder: &Path) -> Result<u64, Failure> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        bytes += match entry.file_type()?.is_dir() {
            true => tree_bytes(&entry.path())?,
            false => entry.metadata()?.len(),
        };
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_join_to_the_whole_and_their_sums_are_right() {
        let folder = tempfile::tempdir().expect("a folder");
        let model = folder.path().join("model.gguf");
        let bytes: Vec<u8> = (0..2_500_001u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        fs::write(&model, &bytes).expect("written");
        let parts = folder.path().join("parts");
        fs::create_dir(&parts).expect("made");
        split(&model, &parts, 1_000_000).expect("split");

        let sums = fs::read_to_string(parts.join("SHA256SUMS")).expect("sums");
        let mut joined = Vec::new();
        let mut sizes = Vec::new();
        for line in sums.lines() {
            let (sum, name) = line.split_once("  ").expect("two columns");
            let part = fs::read(parts.join(name)).expect("a part");
            assert_eq!(hex(Sha256::new().chain_update(&part)), sum);
            sizes.push(part.len());
            joined.extend(part);
        }
        assert_eq!(sizes, [1_000_000, 1_000_000, 500_001]);
        assert!(joined == bytes, "the parts do not join to the whole");
        let whole = fs::read_to_string(parts.join("model.sha256")).expect("sum");
        assert_eq!(
            whole,
            format!("{}  model.gguf\n", hex(Sha256::new().chain_update(&bytes)))
        );
        // No part of zero bytes, also when the size is a multiple of the part's.
        assert!(!parts.join("part-03").exists());
    }

    #[test]
    fn a_folder_that_is_no_pack_is_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("thesis.txt"), "years of work").expect("written");
        assert!(start_over(folder.path()).is_err());
        assert!(folder.path().join("thesis.txt").is_file());
        let pack = folder.path().join("pack");
        start_over(&pack).expect("a new pack");
        fs::write(pack.join("old"), "").expect("written");
        start_over(&pack).expect("an old pack is replaced");
        assert!(!pack.join("old").exists());
    }

    #[test]
    fn executables_are_found_in_cargo_messages() {
        let line = r#"{"reason":"compiler-artifact","target":{"name":"golden"},"executable":"/t/golden-1"}"#;
        let found = Executable {
            target: "golden".into(),
            path: "/t/golden-1".into(),
        };
        assert_eq!(executable(line), Some(found));
        let library =
            r#"{"reason":"compiler-artifact","target":{"name":"models"},"executable":null}"#;
        assert_eq!(executable(library), None);
        assert_eq!(executable("warning: not json"), None);
    }
}
