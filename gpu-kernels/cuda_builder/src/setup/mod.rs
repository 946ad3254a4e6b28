//! Installs the pieces of the tool chain that a stock Rust installation lacks.
//!
//! Everything fetched is kept under [`crate::cache::dir`]; of the system nothing is changed but one
//! symbolic link in the Rust toolchain's own folder, where cargo looks for the library's sources.

pub mod aarch64;
mod apt;
pub mod python;

pub use apt::fetch_compressed;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::nvdisasm::Nvdisasm;
use crate::ptxas::Ptxas;
use crate::{CoreLibrary, DEVICE_TARGET, Error, Toolchain, cache, child};

/// The release of NVIDIA's compiler package that `ptxas` is taken from.
const NVCC_VERSION: &str = "13.5.37";

/// The release of NVIDIA's disassembler package: that of the same CUDA as [`NVCC_VERSION`].
const NVDISASM_VERSION: &str = "13.5.37";

/// How long one rustup call may take. It downloads a few megabytes when it works at all.
const RUSTUP_LIMIT: Duration = Duration::from_secs(180);

/// Receives what the set-up does, to show it.
pub trait Progress {
    /// A step begins, or its description changes.
    fn step(&self, what: &str);
    /// `done` of `total` bytes have arrived; the total is unknown at first.
    fn bytes(&self, done: u64, total: Option<u64>);
    /// A line that stays on the screen.
    fn note(&self, line: &str);
}

/// Shows nothing.
#[derive(Debug, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {
    fn step(&self, _: &str) {}
    fn bytes(&self, _: u64, _: Option<u64>) {}
    fn note(&self, _: &str) {}
}

/// Makes sure that a `core` for the device is in place, trying in this order: what is installed
/// already, `rustup target add`, `rustup component add rust-src`, the distribution's package of the
/// same version.
///
/// `from_source` asks for the sources even where a precompiled `core` is present.
///
/// # Errors
/// [`Error::Setup`] with the reason of each failed way and the command that mends it.
pub fn install_core(progress: &dyn Progress, from_source: bool) -> Result<CoreLibrary, Error> {
    let toolchain = Toolchain::find()?;
    let wanted = |core: &CoreLibrary| !from_source || matches!(core, CoreLibrary::Source(_));
    let present = || CoreLibrary::find_all(&toolchain).into_iter().find(wanted);
    if let Some(core) = present() {
        return Ok(core);
    }
    let _lock = lock(&cache::dir()?)?;
    // Another process may have installed it while this one waited.
    if let Some(core) = present() {
        return Ok(core);
    }
    // A link of an earlier set-up whose cache is gone is in everybody's way.
    remove_dangling_link(&toolchain.source_dir())?;

    let mut reasons = Vec::new();
    let ways: [(&str, &[&str]); 2] = [
        ("rustup target add", &["target", "add", DEVICE_TARGET]),
        ("rustup component add", &["component", "add", "rust-src"]),
    ];
    for (name, arguments) in &ways[usize::from(from_source)..] {
        let command_line = format!("rustup {}", arguments.join(" "));
        progress.step(&command_line);
        match rustup(arguments, RUSTUP_LIMIT) {
            Ok(()) => match present() {
                Some(core) => return Ok(core),
                None => reasons.push(format!(
                    "{name}: it succeeded, but not in {}",
                    toolchain.sysroot.display()
                )),
            },
            Err(reason) => {
                progress.note(&format!("`{command_line}` is no way here: {reason}"));
                reasons.push(format!("{name}: {reason}"));
            }
        }
    }
    let fetched = apt::fetch_rust_src(&toolchain.release, &cache::dir()?, progress);
    if let Err(error) = fetched.and_then(|sources| link(&sources, &toolchain.source_dir())) {
        reasons.push(format!("the distribution's rust-src: {error}"));
    }
    present().ok_or_else(|| {
        Error::Setup(format!(
            "no `core` library for GPU code could be installed ({}); install it with \
             `rustup component add rust-src`, or build without a GPU: `cargo build --no-default-features`",
            reasons.join("; ")
        ))
    })
}

/// Runs rustup and returns its complaint when it fails or takes longer than `limit`.
fn rustup(arguments: &[&str], limit: Duration) -> Result<(), String> {
    let mut rustup = Command::new("rustup")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot run rustup: {error}"))?;
    let stderr = rustup.stderr.take().expect("stderr is piped");
    let complaint = thread::spawn(move || std::io::read_to_string(stderr).unwrap_or_default());
    let start = Instant::now();
    let status = loop {
        match rustup.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if start.elapsed() > limit => {
                // Both fail only if it has ended meanwhile.
                let _ = rustup.kill();
                let _ = rustup.wait();
                return Err(format!("no answer within {} s", limit.as_secs()));
            }
            Ok(None) => thread::sleep(Duration::from_millis(50)),
            Err(error) => return Err(error.to_string()),
        }
    };
    if status.success() {
        return Ok(());
    }
    let complaint = complaint.join().unwrap_or_default();
    let line = complaint
        .lines()
        .find_map(|line| line.trim().strip_prefix("error: "))
        .unwrap_or("rustup failed")
        .to_owned();
    Err(line)
}

/// Links `sources` (a folder that holds `library/`) to where cargo looks for it.
fn link(sources: &Path, link: &Path) -> Result<(), Error> {
    if let Some(parent) = link.parent() {
        fs::create_dir_all(parent).map_err(Error::io("cannot create", parent))?;
    }
    std::os::unix::fs::symlink(sources, link).map_err(Error::io("cannot create the link", link))
}

fn remove_dangling_link(path: &Path) -> Result<(), Error> {
    let is_link = path
        .symlink_metadata()
        .is_ok_and(|metadata| metadata.is_symlink());
    if is_link && !path.join("library/Cargo.lock").exists() {
        fs::remove_file(path).map_err(Error::io("cannot remove the stale link", path))?;
    }
    Ok(())
}

/// Where [`install_ptxas`] puts the program, inside the cache folder.
pub fn ptxas_dir(cache: &Path) -> PathBuf {
    cache.join(format!("ptxas-{NVCC_VERSION}"))
}

/// Where [`install_nvdisasm`] puts the program, inside the cache folder.
pub fn nvdisasm_dir(cache: &Path) -> PathBuf {
    cache.join(format!("nvdisasm-{NVDISASM_VERSION}"))
}

/// Finds `ptxas`, or fetches it.
///
/// # Errors
/// There is no package for this machine, or it cannot be fetched.
pub fn install_ptxas(progress: &dyn Progress) -> Result<Ptxas, Error> {
    if let Some(ptxas) = Ptxas::find() {
        return Ok(ptxas);
    }
    let package = python::Package {
        name: "nvidia-cuda-nvcc",
        version: NVCC_VERSION,
    };
    let path = install_program("ptxas", &package, &ptxas_dir(&cache::dir()?), progress)?;
    Ok(Ptxas { path })
}

/// Finds `nvdisasm`, or fetches it.
///
/// # Errors
/// There is no package for this machine, or it cannot be fetched.
pub fn install_nvdisasm(progress: &dyn Progress) -> Result<Nvdisasm, Error> {
    if let Some(nvdisasm) = Nvdisasm::find() {
        return Ok(nvdisasm);
    }
    let package = python::Package {
        name: "nvidia-cuda-nvdisasm",
        version: NVDISASM_VERSION,
    };
    let path = install_program(
        "nvdisasm",
        &package,
        &nvdisasm_dir(&cache::dir()?),
        progress,
    )?;
    Ok(Nvdisasm { path })
}

/// Takes a program out of one of NVIDIA's packages into `dir`; returns its path.
fn install_program(
    name: &str,
    package: &python::Package<'_>,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<PathBuf, Error> {
    let cache = cache::dir()?;
    let _lock = lock(&cache)?;
    let path = dir.join(name);
    if !path.is_file() {
        let scratch = Scratch::new(cache.join(format!("{name}.part")))?;
        let wheel = python::download(package, scratch.path(), progress)?;
        let fetched = scratch.path().join(name);
        python::extract(&wheel, &format!("nvidia/cu13/bin/{name}"), &fetched)?;
        make_executable(&fetched)?;
        fs::create_dir_all(dir).map_err(Error::io("cannot create", dir))?;
        fs::rename(&fetched, &path).map_err(Error::io("cannot create", &path))?;
    }
    Ok(path)
}

fn make_executable(path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .map_err(Error::io("cannot make executable", path))
}

/// Holds the set-up lock of a folder until dropped. The system releases it when the process ends,
/// however it ends.
///
/// # Errors
/// The folder cannot be created or written.
pub fn lock(dir: &Path) -> Result<File, Error> {
    fs::create_dir_all(dir).map_err(Error::io("cannot create", dir))?;
    let path = dir.join(".lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(Error::io("cannot open", &path))?;
    file.lock().map_err(Error::io("cannot lock", &path))?;
    Ok(file)
}

/// An empty folder for work in progress, removed when dropped. Its name is fixed: what a killed
/// process left behind is removed by the next one. Hold the [`lock`] of the folder around it.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Creates the folder, emptying it first.
    ///
    /// # Errors
    /// The folder cannot be created.
    pub fn new(path: PathBuf) -> Result<Scratch, Error> {
        if path.exists() {
            fs::remove_dir_all(&path).map_err(Error::io("cannot remove", &path))?;
        }
        fs::create_dir_all(&path).map_err(Error::io("cannot create", &path))?;
        Ok(Scratch(path))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing depends on it: the next `new` removes what stays.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs a command, calling `watch` every tenth of a second with what it has printed so far, and
/// returns its standard output.
pub(crate) fn run_watched(
    command: &mut Command,
    mut watch: impl FnMut(&str),
) -> Result<String, Error> {
    let program = child::describe(command);
    let mut running = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| Error::Spawn {
            program: program.clone(),
            source,
        })?;
    let stdout = collect(running.stdout.take().expect("stdout is piped"));
    let stderr = collect(running.stderr.take().expect("stderr is piped"));
    let status = loop {
        if let Some(status) = running
            .try_wait()
            .map_err(Error::io("cannot wait for", &program))?
        {
            break status;
        }
        let so_far =
            String::from_utf8_lossy(&stdout.0.lock().expect("no holder panics")).into_owned();
        watch(&so_far);
        thread::sleep(Duration::from_millis(100));
    };
    let text = |(collected, reader): Collected| {
        reader.join().expect("reading a pipe does not panic");
        String::from_utf8_lossy(&collected.lock().expect("no holder panics")).into_owned()
    };
    let (stdout, stderr) = (text(stdout), text(stderr));
    if status.success() {
        Ok(stdout)
    } else {
        let output = child::last_lines(
            if stderr.trim().is_empty() {
                &stdout
            } else {
                &stderr
            },
            6,
        );
        Err(Error::Tool { program, output })
    }
}

type Collected = (Arc<Mutex<Vec<u8>>>, JoinHandle<()>);

/// Collects what arrives on a pipe, readable while it grows.
fn collect(mut pipe: impl Read + Send + 'static) -> Collected {
    let collected = Arc::new(Mutex::new(Vec::new()));
    let shared = Arc::clone(&collected);
    let reader = thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(length @ 1..) = pipe.read(&mut chunk) {
            shared
                .lock()
                .expect("no holder panics")
                .extend_from_slice(&chunk[..length]);
        }
    });
    (collected, reader)
}

/// Bytes in all files under `dir`; what disappears meanwhile counts nothing.
pub(crate) fn size_of_tree(dir: &Path) -> u64 {
    let Ok(entries) = dir.read_dir() else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => size_of_tree(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_empty_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("work.part");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("left over"), "x").unwrap();
        let scratch = Scratch::new(path.clone()).unwrap();
        assert_eq!(scratch.path().read_dir().unwrap().count(), 0);
        drop(scratch);
        assert!(!path.exists());
    }

    #[test]
    fn a_second_process_waits_for_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).unwrap();
        let other = File::options()
            .write(true)
            .open(dir.path().join(".lock"))
            .unwrap();
        assert!(other.try_lock().is_err());
        drop(held);
        assert!(other.try_lock().is_ok());
    }

    #[test]
    fn links_are_made_and_stale_ones_removed() {
        let dir = tempfile::tempdir().unwrap();
        let sources = dir.path().join("sources");
        let at = dir.path().join("sysroot/lib/rustlib/src/rust");
        link(&sources, &at).unwrap();
        remove_dangling_link(&at).unwrap();
        assert!(
            at.symlink_metadata().is_err(),
            "a link to nothing is removed"
        );

        fs::create_dir_all(sources.join("library")).unwrap();
        fs::write(sources.join("library/Cargo.lock"), "").unwrap();
        link(&sources, &at).unwrap();
        remove_dangling_link(&at).unwrap();
        assert!(at.join("library/Cargo.lock").is_file(), "a good link stays");
    }

    #[test]
    fn tree_size_counts_nested_files() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        fs::write(dir.path().join("a/b"), [0; 10]).unwrap();
        fs::write(dir.path().join("c"), [0; 5]).unwrap();
        assert_eq!(size_of_tree(dir.path()), 15);
        assert_eq!(size_of_tree(&dir.path().join("gone")), 0);
    }

    #[test]
    fn a_watched_command_is_watched_and_its_complaint_kept() {
        // The command ends only once its first line was seen, so no clock decides the outcome.
        let dir = tempfile::tempdir().unwrap();
        let seen = dir.path().join("seen");
        let script = "echo begun; while [ ! -e seen ]; do sleep 0.05; done; echo done";
        let text = run_watched(
            Command::new("sh")
                .args(["-c", script])
                .current_dir(dir.path()),
            |so_far| {
                if so_far == "begun\n" {
                    fs::write(&seen, "").unwrap();
                }
            },
        )
        .unwrap();
        assert_eq!(text, "begun\ndone\n");
        let error = run_watched(
            Command::new("sh").args(["-c", "echo why >&2; exit 1"]),
            |_| {},
        )
        .unwrap_err();
        assert!(error.to_string().contains("why"), "{error}");
    }
}
