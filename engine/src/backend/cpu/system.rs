//! What this CPU has and what the backend would use of it.

use cpu_kernels::isa::{Isa, OVERRIDE};
use cpu_kernels::tuned::Tuned;
use serde::Serialize;

use super::team;
use crate::Error;

/// The instruction set that [`OVERRIDE`] names, else the fastest, and why it is that one.
pub(super) fn chosen() -> Result<(Isa, String), Error> {
    let isa = Isa::from_environment().map_err(Error::Input)?;
    let why = match std::env::var_os(OVERRIDE) {
        Some(_) => format!("set by {OVERRIDE}"),
        None => "the fastest instruction set of this CPU".to_owned(),
    };
    Ok((isa, why))
}

/// The CPU as the backend sees it.
#[derive(Debug, Clone, Serialize)]
pub struct System {
    /// Model name.
    pub cpu: String,
    /// Threads of a team.
    pub threads: usize,
    /// Instruction sets that kernels are there for, slowest first.
    pub available: Vec<&'static str>,
    /// The one in use.
    pub used: &'static str,
    /// Why.
    pub reason: String,
    /// Operations and their instructions.
    pub operations: Vec<Operation>,
    /// Ternary matrices, `N x K`, and the form in which they meet a single token.
    pub ternary: Vec<Ternary>,
}

/// The form of ternary matrices of a shape.
#[derive(Debug, Clone, Serialize)]
pub struct Ternary {
    /// `2560x6912`, or what all others are called.
    pub shape: String,
    /// The form.
    pub form: &'static str,
    /// Why.
    pub reason: String,
}

/// What an operation is computed with.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Operation {
    /// Operations that are alike.
    pub operation: &'static str,
    /// Instructions.
    pub instructions: &'static str,
}

impl System {
    /// Looks at this CPU.
    ///
    /// # Errors
    /// [`Error::Input`] if the environment asks for what it has not.
    pub fn detect() -> Result<System, Error> {
        let (isa, reason) = chosen()?;
        let operations = isa.operations().into_iter();
        let (cpu, threads) = (cpu_name(), team::default_threads()?);
        let tuned = Tuned::load(&cpu, isa, threads).map_err(Error::Input)?;
        let ternary = tuned.choices().into_iter().map(|(shape, chosen)| Ternary {
            shape,
            form: chosen.form.name(),
            reason: chosen.why.to_string(),
        });
        Ok(System {
            cpu,
            threads,
            ternary: ternary.collect(),
            available: Isa::available().into_iter().map(Isa::name).collect(),
            used: isa.name(),
            reason,
            operations: operations
                .map(|(operation, instructions)| Operation {
                    operation,
                    instructions,
                })
                .collect(),
        })
    }
}

/// Model name of the CPU as Linux gives it, else the architecture.
pub(super) fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let name = line
        .and_then(|line| line.split_once(':'))
        .map(|(_, name)| name.trim());
    name.unwrap_or(std::env::consts::ARCH).to_owned()
}
