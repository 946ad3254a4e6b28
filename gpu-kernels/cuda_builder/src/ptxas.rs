//! What `ptxas` says of each kernel: registers, shared memory, stack, spills.
//!
//! `ptxas` is the assembler that the driver carries inside; as a program it needs no GPU. A stack
//! frame or a spill means that values live in local memory, which is device memory: in a kernel that
//! is bound by bandwidth that is a defect.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fmt};

use crate::{Error, MENDING_COMMAND, NvvmArch, cache, child};

/// A `ptxas` program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ptxas {
    /// Path of the program.
    pub path: PathBuf,
}

/// Resources of one kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelFigures {
    /// Entry name.
    pub kernel: String,
    /// Registers a thread.
    pub registers: u32,
    /// Static shared memory a block, bytes.
    pub shared_bytes: u32,
    /// Stack frame a thread, bytes.
    pub stack_bytes: u32,
    /// Bytes written to local memory because registers ran out.
    pub spill_store_bytes: u32,
    /// Bytes read back.
    pub spill_load_bytes: u32,
    /// Whether `ptxas` has it wait after every `wgmma`, because it cannot keep their registers apart.
    pub serialized: bool,
}

impl KernelFigures {
    /// Whether values of this kernel live in local memory.
    pub fn uses_local_memory(&self) -> bool {
        self.stack_bytes != 0 || self.spill_store_bytes != 0 || self.spill_load_bytes != 0
    }
}

impl fmt::Display for KernelFigures {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{} registers, {} bytes shared, {} bytes stack, {}/{} bytes spilled",
            self.registers,
            self.shared_bytes,
            self.stack_bytes,
            self.spill_store_bytes,
            self.spill_load_bytes
        )
    }
}

impl Ptxas {
    /// Looks in `PATH`, in the CUDA installation that `CUDA_HOME` or `CUDA_PATH` names, in
    /// `/usr/local/cuda`, and where [`crate::setup::install_ptxas`] puts it.
    pub fn find() -> Option<Ptxas> {
        let in_cache = cache::dir().map(|dir| crate::setup::ptxas_dir(&dir));
        let path = first_in("ptxas", installed_dirs().into_iter().chain(in_cache))?;
        Some(Ptxas { path })
    }

    /// Assembles a PTX file for `arch` and returns the figures of every kernel in it.
    ///
    /// # Errors
    /// [`Error::Tool`] with what `ptxas` says when it rejects the file.
    pub fn figures(&self, ptx: &Path, arch: NvvmArch) -> Result<Vec<KernelFigures>, Error> {
        self.assemble(ptx, arch).map(|(_, figures)| figures)
    }

    /// Assembles a PTX file for `arch` into a cubin beside it, with the source lines where the PTX
    /// names them, and returns the figures of every kernel.
    ///
    /// # Errors
    /// [`Error::Tool`] with what `ptxas` says when it rejects the file.
    pub fn assemble(
        &self,
        ptx: &Path,
        arch: NvvmArch,
    ) -> Result<(PathBuf, Vec<KernelFigures>), Error> {
        let mut command = Command::new(&self.path);
        // Not /dev/null: a failing ptxas removes its output file, which root is able to do even there.
        let cubin = ptx.with_extension(format!("{arch}.cubin"));
        command
            .arg("-v")
            .arg("-lineinfo")
            .arg(format!("-arch={arch}"))
            .arg("-o")
            .arg(&cubin)
            .arg(ptx);
        let program = self.path.display().to_string();
        let output = command.output().map_err(|source| Error::Spawn {
            program: program.clone(),
            source,
        })?;
        // `ptxas` reports on stderr, and on stdout where a redirection was asked for.
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        if !output.status.success() {
            return Err(Error::Tool {
                program,
                output: child::last_lines(&text, 12),
            });
        }
        Ok((cubin, parse(&text)))
    }

    /// As [`Ptxas::find`].
    ///
    /// # Errors
    /// [`Error::Setup`] that names the command which installs `ptxas`.
    pub fn require() -> Result<Ptxas, Error> {
        Ptxas::find()
            .ok_or_else(|| Error::Setup(format!("ptxas is not installed; run `{MENDING_COMMAND}`")))
    }
}

/// Folders in which CUDA's programs may be installed: `PATH`, then the CUDA installation.
pub(crate) fn installed_dirs() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let in_cuda = ["CUDA_HOME", "CUDA_PATH"]
        .iter()
        .filter_map(env::var_os)
        .map(|dir| PathBuf::from(dir).join("bin"))
        .chain([PathBuf::from("/usr/local/cuda/bin")]);
    env::split_paths(&path).chain(in_cuda).collect()
}

/// The program of that name in the first folder that has it.
pub(crate) fn first_in(program: &str, dirs: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    dirs.map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

/// Reads the report of `ptxas -v`.
fn parse(report: &str) -> Vec<KernelFigures> {
    let mut kernels: Vec<KernelFigures> = Vec::new();
    // `(C7515) … wgmma.mma_async instructions are serialized due to … in the function 'NAME' in line 1`,
    // before the kernel's own lines.
    let serialized: Vec<&str> = report
        .lines()
        .filter(|line| line.contains("instructions are serialized"))
        .filter_map(|line| line.split_once("in the function '")?.1.split('\'').next())
        .collect();
    for line in report.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            kernels.push(KernelFigures {
                serialized: serialized.contains(&&*kernel),
                kernel,
                ..KernelFigures::default()
            });
            continue;
        }
        let Some(kernel) = kernels.last_mut() else {
            continue;
        };
        if line.contains("bytes stack frame") {
            kernel.stack_bytes = number_before(line, "bytes stack frame");
            kernel.spill_store_bytes = number_before(line, "bytes spill stores");
            kernel.spill_load_bytes = number_before(line, "bytes spill loads");
        } else if line.contains(" registers") {
            kernel.registers = number_before(line, "registers");
            kernel.shared_bytes = number_before(line, "bytes smem");
        }
    }
    kernels
}

/// The number in front of `unit`; 0 when the line does not mention it.
fn number_before(line: &str, unit: &str) -> u32 {
    line.split_once(unit)
        .and_then(|(before, _)| before.split_whitespace().next_back())
        .and_then(|word| word.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const REPORT: &str = "\
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in the function 'spilling' in line 9
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'plain' for 'sm_75'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers, 392 bytes cmem[0]
ptxas info    : Compile time = 3.1 ms
ptxas info    : Compiling entry function 'spilling' for 'sm_75'
ptxas info    : Function properties for spilling
    128 bytes stack frame, 64 bytes spill stores, 72 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 128 bytes cumulative stack size, 4096 bytes smem
";

    #[test]
    fn report_is_read() {
        let kernels = parse(REPORT);
        assert_eq!(
            kernels,
            [
                KernelFigures {
                    kernel: "plain".into(),
                    registers: 24,
                    ..KernelFigures::default()
                },
                KernelFigures {
                    kernel: "spilling".into(),
                    registers: 255,
                    shared_bytes: 4096,
                    stack_bytes: 128,
                    spill_store_bytes: 64,
                    spill_load_bytes: 72,
                    serialized: true,
                },
            ]
        );
        assert!(!kernels[0].uses_local_memory());
        assert!(kernels[1].uses_local_memory());
        assert!(parse("ptxas fatal").is_empty());
    }

    #[test]
    fn the_first_folder_wins() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("a"), dir.path().join("b"));
        for folder in [&first, &second] {
            fs::create_dir(folder).unwrap();
        }
        let folders = || [first.clone(), second.clone()].into_iter();
        assert_eq!(first_in("ptxas", folders()), None);
        fs::write(second.join("ptxas"), "").unwrap();
        assert_eq!(first_in("ptxas", folders()), Some(second.join("ptxas")));
        fs::write(first.join("ptxas"), "").unwrap();
        assert_eq!(first_in("ptxas", folders()), Some(first.join("ptxas")));
    }
}
