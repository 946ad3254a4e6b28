//! Where things lie, and how cargo is called.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, io};

use serde_json::Value;

use crate::Error;

/// The root of the checkout.
pub fn root() -> PathBuf {
    // Cargo sets the variable at run time too; a moved checkout keeps working until it is rebuilt.
    let manifest_dir =
        env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let xtask = PathBuf::from(manifest_dir);
    xtask.parent().unwrap_or(Path::new(".")).to_owned()
}

/// Cargo's target folder: the one that this program was built in.
pub fn target_dir() -> Result<PathBuf, Error> {
    let program = env::current_exe().map_err(Error::io("cannot find", "this program"))?;
    // <target>/debug/xtask
    program
        .ancestors()
        .nth(2)
        .map(Path::to_owned)
        .ok_or_else(|| Error::failed(format!("{} lies in no target folder", program.display())))
}

/// A cargo in the root of the workspace, without the variables that `cargo run` sets for xtask.
pub fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(arguments)
        .current_dir(root())
        .stdin(Stdio::null());
    for (name, _) in env::vars_os() {
        if describes_this_package(&name) {
            command.env_remove(name);
        }
    }
    command
}

fn describes_this_package(name: &OsString) -> bool {
    let name = name.to_string_lossy();
    name.starts_with("CARGO_PKG_")
        || name.starts_with("CARGO_MANIFEST_")
        || name == "CARGO_CRATE_NAME"
}

/// Runs cargo with its output on the terminal.
///
/// # Errors
/// It cannot be started or fails.
pub fn run_cargo(arguments: &[&str]) -> Result<(), Error> {
    let status = cargo(arguments)
        .status()
        .map_err(Error::io("cannot run", "cargo"))?;
    if status.success() {
        Ok(())
    } else {
        Err(Error::failed(format!(
            "`cargo {}` failed",
            arguments.join(" ")
        )))
    }
}

/// Builds a program and returns its path.
///
/// # Errors
/// The build fails, or makes no program of that name.
pub fn build_program(arguments: &[&str], name: &str) -> Result<PathBuf, Error> {
    let mut command = cargo(&["build", "--message-format=json-render-diagnostics"]);
    command.args(arguments).stdout(Stdio::piped());
    let output = command
        .spawn()
        .and_then(|child| child.wait_with_output())
        .map_err(Error::io("cannot run", "cargo"))?;
    if !output.status.success() {
        return Err(Error::failed(format!(
            "`cargo build {}` failed",
            arguments.join(" ")
        )));
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    messages
        .lines()
        .find_map(|line| executable(line, name))
        .ok_or_else(|| {
            Error::failed(format!(
                "`cargo build {}` made no `{name}`",
                arguments.join(" ")
            ))
        })
}

/// The path in cargo's message about the program `name`.
fn executable(message: &str, name: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(message).ok()?;
    let of_program = message["reason"] == "compiler-artifact" && message["target"]["name"] == name;
    of_program
        .then(|| message["executable"].as_str().map(PathBuf::from))
        .flatten()
}

/// Replaces this process by a command; returns only if that fails.
pub fn replace_by(command: &mut Command) -> io::Error {
    use std::os::unix::process::CommandExt;
    command.exec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_holds_the_workspace() {
        assert!(root().join("Cargo.lock").is_file());
        assert!(root().join("xtask/Cargo.toml").is_file());
    }

    #[test]
    fn the_program_is_found_in_cargos_messages() {
        let message = r#"{"reason":"compiler-artifact","target":{"name":"edgellm"},"executable":"/t/release/edgellm"}"#;
        assert_eq!(
            executable(message, "edgellm"),
            Some("/t/release/edgellm".into())
        );
        assert_eq!(executable(message, "other"), None);
        let library =
            r#"{"reason":"compiler-artifact","target":{"name":"edgellm"},"executable":null}"#;
        assert_eq!(executable(library, "edgellm"), None);
        assert_eq!(executable("Compiling", "edgellm"), None);
    }
}
