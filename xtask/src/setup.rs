//! `cargo xtask setup`: installs what a stock Rust installation lacks for the GPU kernels.

use clap::Args as ClapArgs;
use cuda_builder::setup::{Progress, install_core, install_nvdisasm, install_ptxas};
use cuda_builder::{CoreLibrary, Error as BuilderError};

use crate::progress::Shown;
use crate::{Error, ptx};

/// Installs what the GPU kernels need and builds them: the `core` library for nvptx64, `ptxas`, one
/// PTX per tier. Does nothing that is done already.
///
/// Fetched files are kept in the user's cache folder (`$XDG_CACHE_HOME/edgellm` or
/// `~/.cache/edgellm`). No GPU and no CUDA installation is needed.
#[derive(Debug, ClapArgs)]
pub struct Args {}

/// Runs the task.
pub fn run(_: &Args) -> Result<(), Error> {
    let core = kernels()?;
    println!("core     {core}");
    let progress = Shown::new();
    match install_ptxas(&progress) {
        Ok(ptxas) => println!("ptxas    {}", ptxas.path.display()),
        // Only the resource figures need it.
        Err(error) => println!("ptxas    missing, `cargo xtask ptx` will not work: {error}"),
    }
    match install_nvdisasm(&progress) {
        Ok(nvdisasm) => println!("nvdisasm {}", nvdisasm.path.display()),
        // Only the machine code needs it.
        Err(error) => println!("nvdisasm missing, `cargo xtask bench` shows no code: {error}"),
    }
    drop(progress);
    let tiers: Vec<String> = cuda_builder::TIERS
        .iter()
        .map(|arch| arch.to_string())
        .collect();
    println!("kernels  compiled for {}", tiers.join(", "));
    Ok(())
}

/// Makes sure that `core` is there and the kernels compile with it. Returns the `core` that they were
/// compiled with.
pub fn kernels() -> Result<CoreLibrary, Error> {
    let progress = Shown::new();
    let core = install_core(&progress, false)?;
    let outputs = match ptx::build_tiers(&progress) {
        // The precompiled `core` may keep panics out of line; built from source it does not.
        Err(Error::Builder(BuilderError::UnresolvedFunctions { .. }))
            if matches!(core, CoreLibrary::Precompiled(_)) =>
        {
            progress.note("these kernels need core's sources, the precompiled one does not do");
            install_core(&progress, true)?;
            ptx::build_tiers(&progress)?
        }
        result => result?,
    };
    Ok(outputs
        .into_iter()
        .next()
        .map_or(core, |output| output.core))
}

/// Makes sure that `core` is there, without building more than that takes; the build of the engine
/// does the rest.
pub fn core() -> Result<CoreLibrary, Error> {
    match install_core(&Shown::new(), false)? {
        // It may not do for the kernels, and only building them tells.
        CoreLibrary::Precompiled(_) => kernels(),
        source => Ok(source),
    }
}
