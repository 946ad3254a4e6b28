//! Where `core` for the device target comes from.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::{DEVICE_TARGET, Error, child};

/// The Rust toolchain that builds the kernels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toolchain {
    /// `rustc --print sysroot`.
    pub sysroot: PathBuf,
    /// Release number, `1.95.0`.
    pub release: String,
}

impl Toolchain {
    /// Asks rustc.
    ///
    /// # Errors
    /// rustc cannot be started or prints something else than expected.
    pub fn find() -> Result<Toolchain, Error> {
        let sysroot = child::stdout(child::rustc().args(["--print", "sysroot"]))?;
        let version = child::stdout(child::rustc().arg("-vV"))?;
        let release = release_of(&version).ok_or_else(|| Error::Tool {
            program: "rustc -vV".into(),
            output: format!("no release line in `{}`", version.trim()),
        })?;
        Ok(Toolchain {
            sysroot: PathBuf::from(sysroot.trim_end()),
            release: release.to_owned(),
        })
    }

    /// Where the precompiled `core` of the device target lies when it is installed.
    pub fn precompiled_dir(&self) -> PathBuf {
        self.sysroot
            .join("lib/rustlib")
            .join(DEVICE_TARGET)
            .join("lib")
    }

    /// Where cargo looks for the standard library's sources; `library/` lies inside.
    pub fn source_dir(&self) -> PathBuf {
        self.sysroot.join("lib/rustlib/src/rust")
    }
}

/// The `release:` field of `rustc -vV`.
fn release_of(version: &str) -> Option<&str> {
    version
        .lines()
        .find_map(|line| line.strip_prefix("release: "))
        .map(str::trim)
}

/// A `core` library that the device build can use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CoreLibrary {
    /// `rustup target add nvptx64-nvidia-cuda`: nothing to build.
    Precompiled(PathBuf),
    /// The library's sources, from `rustup component add rust-src` or from a distribution's package:
    /// built along with the kernels.
    Source(PathBuf),
}

impl CoreLibrary {
    /// Every `core` that is in place, the preferred one first.
    pub fn find_all(toolchain: &Toolchain) -> Vec<CoreLibrary> {
        let mut found = Vec::new();
        let precompiled = toolchain.precompiled_dir();
        if holds_rlib_of_core(&precompiled) {
            found.push(CoreLibrary::Precompiled(precompiled));
        }
        let library = toolchain.source_dir().join("library");
        // The lock file is what cargo reads first; without it `-Zbuild-std` gives up.
        if library.join("Cargo.lock").is_file() && library.join("core/Cargo.toml").is_file() {
            // The resolved path says which package the sources come from.
            found.push(CoreLibrary::Source(
                library.canonicalize().unwrap_or(library),
            ));
        }
        found
    }

    /// The `core` that a build uses.
    ///
    /// # Errors
    /// [`Error::MissingCore`] when there is none.
    pub fn find(toolchain: &Toolchain) -> Result<CoreLibrary, Error> {
        CoreLibrary::find_all(toolchain)
            .into_iter()
            .next()
            .ok_or_else(|| Error::MissingCore {
                sysroot: toolchain.sysroot.clone(),
            })
    }
}

impl fmt::Display for CoreLibrary {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CoreLibrary::Precompiled(path) => {
                write!(formatter, "precompiled, in {}", path.display())
            }
            CoreLibrary::Source(path) => {
                write!(formatter, "built from the sources in {}", path.display())
            }
        }
    }
}

fn holds_rlib_of_core(dir: &Path) -> bool {
    let Ok(entries) = dir.read_dir() else {
        return false;
    };
    entries.flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with("libcore-") && name.ends_with(".rlib")
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn toolchain(dir: &Path) -> Toolchain {
        Toolchain {
            sysroot: dir.to_owned(),
            release: "1.95.0".into(),
        }
    }

    #[test]
    fn release_is_read_from_verbose_version() {
        assert_eq!(
            release_of("rustc 1.95.0 (abc)\nbinary: rustc\nrelease: 1.95.0\n"),
            Some("1.95.0")
        );
        assert_eq!(release_of("gcc 12"), None);
    }

    #[test]
    fn order_is_precompiled_then_source() {
        let dir = tempfile::tempdir().unwrap();
        let toolchain = toolchain(dir.path());
        assert!(matches!(
            CoreLibrary::find(&toolchain),
            Err(Error::MissingCore { .. })
        ));

        let library = toolchain.source_dir().join("library");
        fs::create_dir_all(library.join("core")).unwrap();
        fs::write(library.join("core/Cargo.toml"), "").unwrap();
        // Sources without their lock file are of no use to cargo.
        assert!(CoreLibrary::find(&toolchain).is_err());
        fs::write(library.join("Cargo.lock"), "").unwrap();
        assert!(matches!(
            CoreLibrary::find(&toolchain),
            Ok(CoreLibrary::Source(_))
        ));

        fs::create_dir_all(toolchain.precompiled_dir()).unwrap();
        assert!(matches!(
            CoreLibrary::find(&toolchain),
            Ok(CoreLibrary::Source(_))
        ));
        fs::write(toolchain.precompiled_dir().join("libcore-0123.rlib"), "").unwrap();
        assert!(matches!(
            CoreLibrary::find(&toolchain),
            Ok(CoreLibrary::Precompiled(_))
        ));
        assert_eq!(CoreLibrary::find_all(&toolchain).len(), 2);
    }

    #[test]
    fn a_dangling_link_is_no_source() {
        let dir = tempfile::tempdir().unwrap();
        let toolchain = toolchain(dir.path());
        fs::create_dir_all(toolchain.source_dir().parent().unwrap()).unwrap();
        std::os::unix::fs::symlink("/nonexistent/rustc", toolchain.source_dir()).unwrap();
        assert!(CoreLibrary::find(&toolchain).is_err());
    }

    #[test]
    fn the_error_names_one_command() {
        let error = Error::MissingCore {
            sysroot: "/s".into(),
        }
        .to_string();
        assert_eq!(error.matches("cargo ").count(), 1, "{error}");
        assert!(error.contains("`cargo xtask setup`"), "{error}");
    }
}
