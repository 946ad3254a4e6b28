//! The machine code of assembled kernels, as NVIDIA's disassembler prints it.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Error, cache, child, ptxas};

/// An `nvdisasm` program. It needs no GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nvdisasm {
    /// Path of the program.
    pub path: PathBuf,
}

impl Nvdisasm {
    /// Looks where [`ptxas::Ptxas::find`] looks, and where [`crate::setup::install_nvdisasm`] puts
    /// it.
    pub fn find() -> Option<Nvdisasm> {
        let in_cache = cache::dir().map(|dir| crate::setup::nvdisasm_dir(&dir));
        let dirs = ptxas::installed_dirs().into_iter().chain(in_cache);
        ptxas::first_in("nvdisasm", dirs).map(|path| Nvdisasm { path })
    }

    /// The code of every kernel in a cubin (SASS), with the source lines that it names.
    ///
    /// # Errors
    /// [`Error::Tool`] with what `nvdisasm` says when it rejects the file.
    pub fn sass(&self, cubin: &Path) -> Result<String, Error> {
        child::stdout(
            Command::new(&self.path)
                .args(["--print-code", "--print-line-info"])
                .arg(cubin),
        )
    }
}
