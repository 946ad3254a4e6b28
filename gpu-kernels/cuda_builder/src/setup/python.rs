//! Fetches files out of Python packages, with the user's own pip configuration.
//!
//! Only `python3` is needed: where it comes without pip, as on a bare Debian or Ubuntu, pip is taken
//! from the distribution's package into the cache folder. Nothing is installed into any Python.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use super::{Progress, apt, run_watched, size_of_tree};
use crate::{Error, cache, child};

/// A release of a Python package.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Package<'a> {
    /// Name in the index.
    pub name: &'a str,
    /// Exact version.
    pub version: &'a str,
}

/// Downloads the wheel of a package into `dir` and returns its path. `dir` also holds pip's
/// temporary files, so its size tells how far the download is.
///
/// # Errors
/// There is no Python, no pip, no network, or no such release for this machine.
pub fn download(
    package: &Package<'_>,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<PathBuf, Error> {
    let Package { name, version } = package;
    let requirement = format!("{name}=={version}");
    let pip = Pip::find(progress)?;
    progress.step(&format!("{name} {version}"));
    let (wheels, temporary) = (dir.join("wheels"), dir.join("pip"));
    for folder in [&wheels, &temporary] {
        fs::create_dir_all(folder).map_err(Error::io("cannot create", folder))?;
    }
    let mut command = pip.command();
    command
        .args([
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--no-cache-dir",
            "--disable-pip-version-check",
        ])
        .args(["--progress-bar=off", "--no-input", "--dest"])
        .arg(&wheels)
        .arg(&requirement)
        .env("TMPDIR", &temporary)
        // pip's line with the size has to arrive before the download ends.
        .env("PYTHONUNBUFFERED", "1");
    let result = run_watched(&mut command, |so_far| {
        progress.bytes(size_of_tree(dir), announced_bytes(so_far))
    });
    result.map_err(|error| {
        let way_out = "check the network and pip's configuration, then run the command again";
        Error::Setup(format!(
            "cannot fetch the Python package {requirement}: {error}; {way_out}"
        ))
    })?;
    let mut files = wheels
        .read_dir()
        .map_err(Error::io("cannot read", &wheels))?
        .flatten();
    files
        .next()
        .map(|entry| entry.path())
        .ok_or_else(|| Error::Setup(format!("pip fetched no file for {requirement}")))
}

/// The size in pip's line `Downloading name-1.0.whl (92.9 MB)`, decimal units.
fn announced_bytes(output: &str) -> Option<u64> {
    let line = output
        .lines()
        .rev()
        .find(|line| line.trim_start().starts_with("Downloading "))?;
    let (number, unit) = line
        .rsplit_once('(')?
        .1
        .split_once(')')?
        .0
        .split_once(' ')?;
    let scale = match unit {
        "bytes" => 1.0,
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        _ => return None,
    };
    Some((number.parse::<f64>().ok()? * scale) as u64)
}

/// Writes one member of a wheel (a zip archive) to `to`.
///
/// # Errors
/// The wheel holds no such member, or the file cannot be written.
pub fn extract(wheel: &Path, member: &str, to: &Path) -> Result<(), Error> {
    const SCRIPT: &str = "\
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel, wheel.open(sys.argv[2]) as source, open(sys.argv[3], 'wb') as target:
    shutil.copyfileobj(source, target, 1 << 20)
";
    let mut command = Command::new(python());
    command.arg("-c").arg(SCRIPT).arg(wheel).arg(member).arg(to);
    child::stdout(&mut command).map(|_| ())
}

fn python() -> OsString {
    env::var_os("PYTHON").unwrap_or_else(|| "python3".into())
}

/// A way to call pip.
struct Pip {
    /// Folder to add to Python's module path, for a pip that is not installed.
    module_dir: Option<PathBuf>,
}

impl Pip {
    fn command(&self) -> Command {
        let mut command = Command::new(python());
        command.args(["-m", "pip"]);
        if let Some(dir) = &self.module_dir {
            command.env("PYTHONPATH", dir);
        }
        command
    }

    fn works(&self) -> Result<(), Error> {
        child::stdout(self.command().arg("--version")).map(|_| ())
    }

    fn find(progress: &dyn Progress) -> Result<Pip, Error> {
        let program = python();
        let program = program.to_string_lossy();
        if !child::exists(&program, "--version") {
            return Err(Error::Setup(format!(
                "{program} is not installed; run `apt-get install python3`"
            )));
        }
        let installed = Pip { module_dir: None };
        if installed.works().is_ok() {
            return Ok(installed);
        }
        let no_pip = |error: Error| {
            Error::Setup(format!(
                "{program} has no pip ({error}); run `apt-get install python3-pip`"
            ))
        };
        let module_dir = apt::fetch_pip(&cache::dir()?, progress).map_err(no_pip)?;
        let fetched = Pip {
            module_dir: Some(module_dir),
        };
        fetched.works().map_err(no_pip)?;
        Ok(fetched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_is_read_from_pips_output() {
        let output = "Collecting x==1\n  Downloading x-1-py3-none-any.whl (92.9 MB)\n";
        assert_eq!(announced_bytes(output), Some(92_900_000));
        assert_eq!(
            announced_bytes("  Downloading x.whl.metadata (1.7 kB)"),
            Some(1_700)
        );
        assert_eq!(announced_bytes("Collecting x"), None);
        assert_eq!(announced_bytes("Downloading x (a lot)"), None);
    }

    #[test]
    fn one_member_is_extracted() {
        let dir = tempfile::tempdir().unwrap();
        let wheel = dir.path().join("a.whl");
        let script = "import sys, zipfile\nwith zipfile.ZipFile(sys.argv[1], 'w') as z: z.writestr('p/f.bin', b'abc')\n";
        let status = Command::new(python())
            .arg("-c")
            .arg(script)
            .arg(&wheel)
            .status()
            .unwrap();
        assert!(status.success());
        let to = dir.path().join("f");
        extract(&wheel, "p/f.bin", &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"abc");
        let error = extract(&wheel, "p/g.bin", &to).unwrap_err().to_string();
        assert!(error.contains("p/g.bin"), "{error}");
    }
}
