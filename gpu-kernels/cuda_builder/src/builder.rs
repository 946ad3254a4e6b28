//! The device build: a child cargo for each tier.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::{env, fs, thread};

use serde::Deserialize;

use crate::{CoreLibrary, DEVICE_TARGET, Error, NvvmArch, Toolchain, child, directives};

/// Builds one kernel crate into PTX.
///
/// The crate is compiled as an ordinary `lib`; its PTX is the assembly that rustc writes for it, so
/// functions of its dependencies take part only if they are generic or `#[inline]`.
#[derive(Debug, Clone)]
pub struct CudaBuilder {
    crate_dir: PathBuf,
    arch: NvvmArch,
    copy_to: Option<PathBuf>,
    target_dir: Option<PathBuf>,
    line_directives: bool,
}

/// What a build produced.
#[derive(Debug, Clone)]
pub struct BuildOutput {
    /// The PTX file.
    pub ptx: PathBuf,
    /// Its tier.
    pub arch: NvvmArch,
    /// The `core` that was used.
    pub core: CoreLibrary,
    /// Files of the workspace that went into the PTX: sources and manifests.
    pub sources: Vec<PathBuf>,
    /// What rustc warned of, as it prints it.
    pub warnings: String,
}

impl BuildOutput {
    /// Tells cargo, from a build script, to run it again when one of the sources changes.
    pub fn print_rerun_if_changed(&self) {
        for source in &self.sources {
            println!("cargo::rerun-if-changed={}", source.display());
        }
    }
}

impl CudaBuilder {
    /// A builder for the crate in `crate_dir`, for sm_75.
    pub fn new(crate_dir: impl AsRef<Path>) -> CudaBuilder {
        CudaBuilder {
            crate_dir: crate_dir.as_ref().to_owned(),
            arch: NvvmArch::Compute75,
            copy_to: None,
            target_dir: None,
            line_directives: false,
        }
    }

    /// Whether the PTX says which source line each instruction comes from. It is for reading: such
    /// a build belongs in a target folder of its own.
    #[must_use]
    pub fn line_directives(mut self, wanted: bool) -> CudaBuilder {
        self.line_directives = wanted;
        self
    }

    /// Sets the compute capability to compile for.
    #[must_use]
    pub fn arch(mut self, arch: NvvmArch) -> CudaBuilder {
        self.arch = arch;
        self
    }

    /// Copies the PTX to `path` after the build; the file is left untouched when it would not change.
    #[must_use]
    pub fn copy_to(mut self, path: impl AsRef<Path>) -> CudaBuilder {
        self.copy_to = Some(path.as_ref().to_owned());
        self
    }

    /// Sets the target folder of the child cargo. It must not be that of a cargo that is waiting for
    /// this build: they would wait for each other. The default is [`target_dir_of_build_script`], or
    /// `target/cuda` in the workspace outside of build scripts.
    #[must_use]
    pub fn target_dir(mut self, path: impl AsRef<Path>) -> CudaBuilder {
        self.target_dir = Some(path.as_ref().to_owned());
        self
    }

    /// Compiles the crate.
    ///
    /// # Errors
    /// [`Error::MissingCore`] when the toolchain lacks `core` for the device, [`Error::Compile`] with
    /// rustc's own messages, [`Error::UnresolvedFunctions`] when the PTX would not load.
    pub fn build(&self) -> Result<BuildOutput, Error> {
        // Set when the precompiled `core` did not do for one tier: it then does for none.
        static PRECOMPILED_UNFIT: AtomicBool = AtomicBool::new(false);
        let toolchain = Toolchain::find()?;
        let mut candidates = CoreLibrary::find_all(&toolchain).into_iter().peekable();
        while let Some(core) = candidates.next() {
            let is_last = candidates.peek().is_none();
            if PRECOMPILED_UNFIT.load(Relaxed) && !is_last {
                continue;
            }
            match self.build_with(&toolchain, core) {
                // The precompiled `core` panics through functions of its own; built from source it traps.
                Err(Error::UnresolvedFunctions { .. }) if !is_last => {
                    PRECOMPILED_UNFIT.store(true, Relaxed)
                }
                result => return result,
            }
        }
        Err(Error::MissingCore {
            sysroot: toolchain.sysroot,
        })
    }

    fn build_with(&self, toolchain: &Toolchain, core: CoreLibrary) -> Result<BuildOutput, Error> {
        let target_dir = self
            .target_dir
            .clone()
            .or_else(target_dir_of_build_script)
            .unwrap_or_else(|| workspace_root(&self.crate_dir).join("target/cuda"));
        let mut run = self.run_cargo(&core, &target_dir)?;
        if !run.ptx.is_file() {
            // cargo judges by its fingerprints, which stay when only the assembly file is deleted.
            remove_fingerprints(&run.ptx)?;
            run = self.run_cargo(&core, &target_dir)?;
        }
        let text = fs::read_to_string(&run.ptx).map_err(Error::io("cannot read", &run.ptx))?;
        let functions = unresolved_functions(&text);
        if !functions.is_empty() {
            return Err(Error::UnresolvedFunctions {
                arch: self.arch,
                functions,
            });
        }
        let done = directives::apply(&text);
        if done != text {
            fs::write(&run.ptx, done.as_bytes()).map_err(Error::io("cannot write", &run.ptx))?;
        }
        let ptx = match &self.copy_to {
            Some(path) => {
                if fs::read_to_string(path).ok().as_deref() != Some(&*done) {
                    fs::write(path, done.as_bytes()).map_err(Error::io("cannot write", path))?;
                }
                path.clone()
            }
            None => run.ptx,
        };
        let sources = sources(&run.dep_info, &self.crate_dir, &toolchain.sysroot)?;
        Ok(BuildOutput {
            ptx,
            arch: self.arch,
            core,
            sources,
            warnings: run.warnings,
        })
    }

    fn command(&self, core: &CoreLibrary, target_dir: &Path) -> Command {
        let mut command = child::cargo();
        command
            .args(["rustc", "--lib", "--release", "--target", DEVICE_TARGET])
            .arg("--manifest-path")
            .arg(self.crate_dir.join("Cargo.toml"))
            .arg("--target-dir")
            .arg(target_dir)
            .arg(if colours() {
                "--message-format=json-diagnostic-rendered-ansi"
            } else {
                "--message-format=json"
            });
        // Flags that `core` must share with the kernels go to every crate. The tier goes to the kernel
        // crate alone, where all code is generated: `core` is then built once for all tiers.
        let mut shared = vec!["-Zunstable-options"];
        if matches!(core, CoreLibrary::Source(_)) {
            command.arg("-Zbuild-std=core");
            // A failed bounds check traps instead of calling a function without a body.
            shared.push("-Cpanic=immediate-abort");
        }
        command
            .args(["--", "--emit=asm", "-Ccodegen-units=1"])
            .arg(format!("-Ctarget-cpu={}", self.arch))
            .arg(format!("-Ctarget-feature=+ptx{}", self.arch.ptx_version()))
            // Neither this pass nor one of LLVM's at level 3 (call site splitting) knows that a
            // function with a barrier inside must not be copied into both branches of a condition:
            // lanes of one warp would then wait in two places, for ever. rustc does not mark
            // functions as convergent, only LLVM's barrier itself is.
            .arg("-Zmir-enable-passes=-JumpThreading")
            // Level 2 with the loops of level 3: an array in a loop that is left stays in memory.
            .arg("-Cllvm-args=-unroll-threshold=300")
            .env("CARGO_ENCODED_RUSTFLAGS", shared.join("\u{1f}"))
            // For this child only: the host crates stay on the stable language.
            .env("RUSTC_BOOTSTRAP", "1")
            // The workspace's release profile is made for the host. Its debug lines in particular
            // would mark the PTX `debug`, which switches the driver's optimiser off; directives
            // alone do not.
            .env(
                "CARGO_PROFILE_RELEASE_DEBUG",
                if self.line_directives {
                    "line-directives-only"
                } else {
                    "0"
                },
            )
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "2")
            .env("CARGO_PROFILE_RELEASE_OVERFLOW_CHECKS", "false")
            .env("CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS", "false")
            .env("CARGO_PROFILE_RELEASE_INCREMENTAL", "false");
        command
    }

    fn run_cargo(&self, core: &CoreLibrary, target_dir: &Path) -> Result<CargoRun, Error> {
        let mut command = self.command(core, target_dir);
        let program = child::describe(&command);
        let mut cargo = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| Error::Spawn {
                program: program.clone(),
                source,
            })?;
        let mut stderr = cargo.stderr.take().expect("stderr is piped");
        let stderr = thread::spawn(move || {
            let mut text = Vec::new();
            stderr
                .read_to_end(&mut text)
                .map(|_| String::from_utf8_lossy(&text).into_owned())
        });
        let stdout = BufReader::new(cargo.stdout.take().expect("stdout is piped"));

        let manifest = self.manifest()?;
        let mut messages = Messages::default();
        for line in stdout.lines() {
            messages.take(
                &line.map_err(Error::io("cannot read the output of", &program))?,
                &manifest,
            );
        }
        let status = cargo
            .wait()
            .map_err(Error::io("cannot wait for", &program))?;
        let stderr = stderr
            .join()
            .expect("reading a pipe does not panic")
            .unwrap_or_default();
        if !status.success() {
            // Errors that are not rustc's (resolver, network, disk) are on stderr alone.
            let text = if messages.errors.is_empty() {
                format!("{}\n", child::last_lines(&stderr, 20))
            } else {
                messages.errors
            };
            return Err(Error::Compile {
                arch: self.arch,
                messages: text,
            });
        }
        let (ptx, dep_info) = messages.artifact.ok_or_else(|| Error::Tool {
            program,
            output: format!("it reported no library for {}", manifest.display()),
        })?;
        Ok(CargoRun {
            ptx,
            dep_info,
            warnings: messages.warnings,
        })
    }

    fn manifest(&self) -> Result<PathBuf, Error> {
        let path = self.crate_dir.join("Cargo.toml");
        path.canonicalize().map_err(Error::io("cannot find", path))
    }
}

struct CargoRun {
    ptx: PathBuf,
    dep_info: PathBuf,
    warnings: String,
}

/// The fields of cargo's JSON messages that matter here.
#[derive(Deserialize)]
struct Message {
    reason: String,
    manifest_path: Option<PathBuf>,
    #[serde(default)]
    filenames: Vec<PathBuf>,
    message: Option<Diagnostic>,
}

#[derive(Deserialize)]
struct Diagnostic {
    level: String,
    rendered: Option<String>,
    #[serde(default)]
    spans: Vec<serde::de::IgnoredAny>,
}

#[derive(Default)]
struct Messages {
    /// The kernel crate's assembly file and the dep-info file of its library.
    artifact: Option<(PathBuf, PathBuf)>,
    errors: String,
    warnings: String,
}

impl Messages {
    fn take(&mut self, line: &str, manifest: &Path) {
        // Lines that are not JSON are what a build script printed.
        let Ok(message) = serde_json::from_str::<Message>(line) else {
            return;
        };
        match message.reason.as_str() {
            "compiler-message" => {
                let Some(Diagnostic {
                    level,
                    rendered: Some(text),
                    spans,
                }) = message.message
                else {
                    return;
                };
                let of_workspace = message
                    .manifest_path
                    .as_deref()
                    .is_some_and(|path| !is_of_toolchain(path));
                if level.starts_with("error") {
                    self.errors.push_str(&text);
                } else if of_workspace && !spans.is_empty() {
                    // Warnings that point nowhere are about the flags that this builder passes.
                    self.warnings.push_str(&text);
                }
            }
            "compiler-artifact" if message.manifest_path.as_deref() == Some(manifest) => {
                self.artifact = artifact(&message.filenames).or(self.artifact.take());
            }
            _ => {}
        }
    }
}

fn is_of_toolchain(manifest: &Path) -> bool {
    manifest
        .components()
        .any(|part| part.as_os_str() == "rustlib")
}

/// From `…/release/libkernels.rlib` and `…/release/deps/libkernels-HASH.rmeta`, the assembly and the
/// dep-info file beside them.
fn artifact(filenames: &[PathBuf]) -> Option<(PathBuf, PathBuf)> {
    let with = |extension: &str| {
        filenames
            .iter()
            .find(|path| path.extension().is_some_and(|found| found == extension))
    };
    let metadata = with("rmeta")?;
    let stem = metadata.file_stem()?.to_str()?.strip_prefix("lib")?;
    Some((
        metadata.with_file_name(format!("{stem}.s")),
        with("rlib")?.with_extension("d"),
    ))
}

/// `…/release/deps/kernels-HASH.s` -> removes `…/release/.fingerprint/kernels-HASH`.
fn remove_fingerprints(ptx: &Path) -> Result<(), Error> {
    let Some((release, stem)) = ptx.parent().and_then(Path::parent).zip(ptx.file_stem()) else {
        return Ok(());
    };
    // The folder is named after the package, the file after the crate.
    let wanted = stem.to_string_lossy().replace('_', "-");
    let dir = release.join(".fingerprint");
    let entries = dir.read_dir().map_err(Error::io("cannot read", &dir))?;
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().replace('_', "-") == wanted {
            fs::remove_dir_all(entry.path()).map_err(Error::io("cannot remove", entry.path()))?;
        }
    }
    Ok(())
}

/// Whether the reader of the messages understands colours: the terminal itself, or a cargo that was
/// told to use them.
fn colours() -> bool {
    match env::var("CARGO_TERM_COLOR").as_deref() {
        Ok("always") => true,
        Ok("never") => false,
        _ => std::io::stderr().is_terminal(),
    }
}

/// `<target>/cuda` for the build script that is running: shared by all profiles, and never the folder
/// that the surrounding cargo has locked. `None` outside of a build script.
pub fn target_dir_of_build_script() -> Option<PathBuf> {
    target_dir_of(Path::new(&env::var_os("OUT_DIR")?))
}

/// `<target>/<profile>/build/<package>-<hash>/out` -> `<target>/cuda`.
fn target_dir_of(out_dir: &Path) -> Option<PathBuf> {
    let build = out_dir
        .ancestors()
        .find(|dir| dir.file_name() == Some(OsStr::new("build")))?;
    Some(build.parent()?.parent()?.join("cuda"))
}

/// The nearest folder above that holds a lock file; the crate itself where there is none.
fn workspace_root(crate_dir: &Path) -> &Path {
    crate_dir
        .ancestors()
        .find(|dir| dir.join("Cargo.lock").is_file())
        .unwrap_or(crate_dir)
}

/// Names that PTX declares and does not define.
fn unresolved_functions(ptx: &str) -> Vec<String> {
    let mut names = BTreeSet::new();
    let mut lines = ptx.lines();
    while let Some(line) = lines.next() {
        let Some(declaration) = line.trim_start().strip_prefix(".extern .func") else {
            continue;
        };
        // `.extern .func  (.param .b32 r) name` or the name on the following line.
        let mut rest = declaration.trim();
        if rest.starts_with('(') {
            rest = rest.split_once(')').map_or("", |(_, rest)| rest).trim();
        }
        if rest.is_empty() {
            rest = lines.next().unwrap_or_default().trim();
        }
        let name: String = rest
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '$' | '.'))
            .collect();
        names.insert(name);
    }
    names.into_iter().collect()
}

/// Names of the kernels in a PTX module, in order.
pub fn entries(ptx: &str) -> Vec<&str> {
    ptx.lines().filter_map(entry_name).collect()
}

fn entry_name(line: &str) -> Option<&str> {
    let rest = line.trim_start().strip_prefix(".visible .entry ")?;
    Some(rest.split(['(', ' ']).next().unwrap_or(rest))
}

/// The text of one kernel, from its `.entry` line to the closing brace.
pub fn entry_text<'a>(ptx: &'a str, name: &str) -> Option<&'a str> {
    let mut offset = 0;
    let mut start = None;
    for line in ptx.split_inclusive('\n') {
        if start.is_none() && entry_name(line) == Some(name) {
            start = Some(offset);
        }
        offset += line.len();
        // Braces of scopes inside the body are indented.
        if start.is_some() && line.starts_with('}') {
            return ptx.get(start?..offset);
        }
    }
    None
}

/// The files behind a build: from cargo's dep-info file, those of the workspace, plus the manifests
/// beside them.
fn sources(dep_info: &Path, crate_dir: &Path, sysroot: &Path) -> Result<Vec<PathBuf>, Error> {
    let text = fs::read_to_string(dep_info).map_err(Error::io("cannot read", dep_info))?;
    let mut found: BTreeSet<PathBuf> = dependencies(&text)
        .into_iter()
        .filter(|path| !path.starts_with(sysroot))
        .collect();
    let mut manifests: BTreeSet<PathBuf> = found
        .iter()
        .filter_map(|path| {
            path.ancestors()
                .map(|dir| dir.join("Cargo.toml"))
                .find(|path| path.is_file())
        })
        .collect();
    // The workspace's manifest holds lints and dependency versions.
    let crate_dir = crate_dir
        .canonicalize()
        .map_err(Error::io("cannot find", crate_dir))?;
    manifests.extend([workspace_root(&crate_dir).join("Cargo.toml")]);
    found.append(&mut manifests);
    Ok(found.into_iter().collect())
}

/// The prerequisites in a dep-info file: `target: a b\ c`, a backslash keeping a space.
fn dependencies(text: &str) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for line in text.lines() {
        let Some((_, list)) = line.split_once(": ") else {
            continue;
        };
        let mut path = String::new();
        let mut characters = list.chars();
        while let Some(character) = characters.next() {
            match character {
                '\\' => path.extend(characters.next()),
                ' ' => paths.push(PathBuf::from(std::mem::take(&mut path))),
                _ => path.push(character),
            }
        }
        paths.push(PathBuf::from(path));
    }
    paths.retain(|path| !path.as_os_str().is_empty());
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_dir_lies_beside_the_profiles() {
        let out = Path::new("/w/target/debug/build/engine-0a1b/out");
        assert_eq!(target_dir_of(out), Some("/w/target/cuda".into()));
        assert_eq!(target_dir_of(Path::new("/w")), None);
    }

    #[test]
    fn declared_functions_are_found() {
        let ptx = ".extern .func  (.param .b32 func_retval0) vprintf\n(\n\t.param .b64 p0\n)\n;\n\
                   .extern .func _ZN4core9panicking5panic17h0E\n(\n)\n.noreturn;\n\
                   .visible .entry add(\n)\n{\n\tret;\n}\n";
        assert_eq!(
            unresolved_functions(ptx),
            ["_ZN4core9panicking5panic17h0E", "vprintf"]
        );
        assert!(unresolved_functions(".visible .entry add(\n)\n{\n}\n").is_empty());
    }

    #[test]
    fn a_kernel_is_cut_out() {
        let ptx = "header\n.visible .entry a(\n)\n{\n\t{\n\t}\n\tret;\n}\n.visible .entry ab()\n{\n\tret;\n}\n";
        assert_eq!(entries(ptx), ["a", "ab"]);
        assert_eq!(
            entry_text(ptx, "a"),
            Some(".visible .entry a(\n)\n{\n\t{\n\t}\n\tret;\n}\n")
        );
        assert_eq!(
            entry_text(ptx, "ab"),
            Some(".visible .entry ab()\n{\n\tret;\n}\n")
        );
        assert_eq!(entry_text(ptx, "b"), None);
    }

    #[test]
    fn dep_info_paths_may_hold_spaces() {
        let paths = dependencies("/t/lib.rlib: /a/b\\ c.rs /d.rs\n/a/b\\ c.rs:\n");
        assert_eq!(paths, [PathBuf::from("/a/b c.rs"), PathBuf::from("/d.rs")]);
    }

    #[test]
    fn cargo_messages_give_artifact_and_errors() {
        let manifest = Path::new("/k/Cargo.toml");
        let mut messages = Messages::default();
        messages.take("not json", manifest);
        messages.take(
            r#"{"reason":"compiler-message","manifest_path":"/k/Cargo.toml","message":{"level":"error","rendered":"error: no\n"}}"#,
            manifest,
        );
        messages.take(
            r#"{"reason":"compiler-artifact","manifest_path":"/k/Cargo.toml","filenames":["/t/release/libk.rlib","/t/release/deps/libk-12.rmeta"]}"#,
            manifest,
        );
        messages.take(
            r#"{"reason":"compiler-artifact","manifest_path":"/other/Cargo.toml","filenames":["/t/libo.rlib"]}"#,
            manifest,
        );
        assert_eq!(messages.errors, "error: no\n");
        let expected = ("/t/release/deps/k-12.s".into(), "/t/release/libk.d".into());
        assert_eq!(messages.artifact, Some(expected));
    }
}
