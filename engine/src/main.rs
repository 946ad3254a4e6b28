//! `edgellm`: flags in, text out.

mod cli;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    cli::report(cli::Cli::parse().execute())
}
