//! `cargo xtask`: the tasks of this workspace, one file each.

use std::path::PathBuf;
use std::process::exit;

use clap::{Parser, Subcommand};

mod bench;
mod check;
mod error;
mod gpu;
mod model;
mod progress;
mod ptx;
mod run;
mod setup;
mod test;
mod tune;
mod workspace;

pub use error::Error;

/// Tasks of this workspace. Each does the set-up that it needs by itself.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    after_help = "The two to know:\n  cargo xtask run -- \"Explain quantum computing:\"\n  cargo xtask test"
)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    Run(run::Args),
    Test(test::Args),
    Setup(setup::Args),
    Check(check::Args),
    Ptx(ptx::Args),
    Model(model::Args),
    Bench(bench::Args),
    Tune(tune::Args),
    Gpu(gpu::Args),
}

fn main() {
    let result = match Cli::parse().task {
        Task::Run(args) => run::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Setup(args) => setup::run(&args),
        Task::Check(args) => check::run(&args),
        Task::Ptx(args) => ptx::run(&args),
        Task::Model(args) => model::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Tune(args) => tune::run(&args),
        Task::Gpu(args) => setup::core()
            .and_then(|_| gpu::run(&args).map_err(|error| Error::failed(error.to_string()))),
    };
    if let Err(error) = result {
        eprintln!("error: {error}");
        exit(error.exit_code());
    }
}

/// The root of the checkout.
fn workspace_root() -> PathBuf {
    workspace::root()
}
