//! `cargo xtask`: the tasks of this workspace.

use std::process::{Command, exit};

fn main() {
    let task = std::env::args().nth(1).unwrap_or_default();
    if task != "test" {
        eprintln!("usage: cargo xtask test");
        exit(2);
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    match Command::new(cargo).args(["test", "--workspace"]).status() {
        Ok(status) => exit(status.code().unwrap_or(1)),
        Err(error) => {
            eprintln!("cargo test: {error}");
            exit(1)
        }
    }
}
