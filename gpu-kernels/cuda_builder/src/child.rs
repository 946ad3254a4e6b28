//! Child processes, and the environment they get.

use std::ffi::OsString;
use std::process::{Command, Stdio};
use std::{env, io};

use crate::Error;

/// The rustc that cargo uses.
pub(crate) fn rustc() -> Command {
    Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
}

/// A cargo that shares nothing with the cargo around it but the toolchain, the registry set-up and
/// the job server.
///
/// The surrounding build may have been given flags (`RUSTFLAGS`), wrappers (clippy and sccache set
/// `RUSTC_*WRAPPER`) or a profile; none is meant for the device build, and each would make its
/// fingerprint differ from one caller to the next.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os() {
        if is_build_setting(&name) {
            command.env_remove(name);
        }
    }
    // Empty values also override what a user's cargo configuration says.
    command
        .env("RUSTC_WRAPPER", "")
        .env("RUSTC_WORKSPACE_WRAPPER", "");
    command
}

fn is_build_setting(name: &OsString) -> bool {
    let Some(name) = name.to_str() else {
        return false;
    };
    const KEPT: [&str; 2] = ["CARGO_HOME", "CARGO_MAKEFLAGS"];
    const KEPT_PREFIXES: [&str; 5] = [
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTR",
        "CARGO_SOURCE_",
        "CARGO_TERM_",
    ];
    const SET_BY_CARGO: [&str; 10] = [
        "RUSTFLAGS",
        "RUSTDOCFLAGS",
        "RUSTC_BOOTSTRAP",
        "TARGET",
        "HOST",
        "OUT_DIR",
        "OPT_LEVEL",
        "PROFILE",
        "DEBUG",
        "NUM_JOBS",
    ];
    let of_cargo = name.starts_with("CARGO_")
        && !KEPT.contains(&name)
        && !KEPT_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    of_cargo || SET_BY_CARGO.contains(&name) || name.starts_with("DEP_")
}

/// Runs a command and returns its standard output.
pub(crate) fn stdout(command: &mut Command) -> Result<String, Error> {
    let program = describe(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::Spawn {
            program: program.clone(),
            source,
        })?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        return Err(Error::Tool {
            program,
            output: last_lines(&String::from_utf8_lossy(&text), 6),
        });
    }
    String::from_utf8(output.stdout).map_err(|_| Error::Tool {
        program: program.clone(),
        output: "its output is not UTF-8".into(),
    })
}

/// The program and its first argument, enough to recognise the call in a message.
pub(crate) fn describe(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(
        command
            .get_args()
            .take(1)
            .map(|word| word.to_string_lossy().into_owned()),
    );
    words.join(" ")
}

/// The last lines of a tool's output, the part that says what went wrong.
pub(crate) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Whether a program of that name can be started.
pub(crate) fn exists(program: &str, probe: &str) -> bool {
    let status = Command::new(program)
        .arg(probe)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    !matches!(status, Err(error) if error.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn build_settings_are_dropped_and_the_registry_kept() {
        for name in [
            "RUSTFLAGS",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_TARGET_DIR",
            "CARGO_CFG_UNIX",
            "DEP_Z_ROOT",
        ] {
            assert!(is_build_setting(&name.into()), "{name}");
        }
        for name in [
            "PATH",
            "HOME",
            "CARGO_HOME",
            "CARGO_MAKEFLAGS",
            "CARGO_REGISTRIES_X_INDEX",
            "RUSTUP_TOOLCHAIN",
        ] {
            assert!(!is_build_setting(&name.into()), "{name}");
        }
    }

    #[test]
    fn a_failing_tool_shows_what_it_said() {
        let error = stdout(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).unwrap_err();
        assert!(error.to_string().contains("broken"), "{error}");
        assert!(matches!(
            stdout(&mut Command::new("/nonexistent/tool")),
            Err(Error::Spawn { .. })
        ));
    }

    #[test]
    fn last_lines_keep_the_end() {
        assert_eq!(last_lines("a\n\nb\nc\n", 2), "b\nc");
        assert_eq!(last_lines("", 2), "");
    }
}
