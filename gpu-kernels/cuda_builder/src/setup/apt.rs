//! Fetches packages of a Debian-like distribution into the cache, without root and without touching
//! the system's package state: apt gets lists, archive cache and sources of its own, made from the
//! mirrors and keys that the system is configured with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Progress, Scratch, run_watched, size_of_tree};
use crate::{Error, child};

/// Suites of Debian that are tried for a `rust-src` of the toolchain's version, besides the
/// backports of the system's own release. 1.95.0 is in `trixie-backports`.
const DEBIAN_SUITES: [&str; 3] = ["trixie-backports", "testing", "unstable"];

/// Fetches the `rust-src` package whose version is `release` and returns the folder that holds
/// `library/`.
pub(super) fn fetch_rust_src(
    release: &str,
    cache: &Path,
    progress: &dyn Progress,
) -> Result<PathBuf, Error> {
    let unpacked = cache.join(format!("rust-src-{release}"));
    let sources = unpacked.join(format!("usr/src/rustc-{release}"));
    if sources.join("library/Cargo.lock").is_file() {
        return Ok(sources);
    }
    need_apt()?;
    let system = os_release(&fs::read_to_string("/etc/os-release").unwrap_or_default());
    if system.id != "debian" {
        return Err(Error::Setup(format!(
            "only Debian's is known to match, and this is {}",
            system.name()
        )));
    }
    let mirror = debian_mirror(&system_sources()).ok_or_else(|| {
        Error::Setup("no Debian mirror among the system's package sources".into())
    })?;

    let mut suites: Vec<String> = DEBIAN_SUITES.map(str::to_owned).into();
    suites.push(format!("{}-backports", system.codename));
    let scratch = Scratch::new(cache.join("apt.part"))?;
    let mut reasons = Vec::new();
    for suite in &suites {
        progress.step(&format!("package lists of {suite}"));
        let apt = Apt::with_source(scratch.path(), &mirror.for_suite(suite))?;
        let result = apt.update(progress).and_then(|()| apt.versions("rust-src"));
        let version = match result {
            Ok(versions) => versions
                .into_iter()
                .find(|version| is_version_of(version, release)),
            Err(error) => {
                reasons.push(format!("{suite}: {error}"));
                continue;
            }
        };
        let Some(version) = version else {
            reasons.push(format!("{suite} has no rust-src {release}"));
            continue;
        };
        progress.step(&format!("rust-src {version} from {suite}"));
        let package = apt.download(&format!("rust-src={version}"), progress)?;
        progress.step("unpacking the library's sources");
        // The package also holds the compiler's sources, ten times the size.
        let staged = scratch.path().join("unpacked");
        unpack(
            &package,
            &staged,
            Some(&format!("./usr/src/rustc-{release}/library")),
        )?;
        replace_dir(&staged, &unpacked)?;
        return Ok(sources);
    }
    Err(Error::Setup(reasons.join(", ")))
}

/// Fetches the distribution's `python3-pip` and returns the folder to put on Python's module path.
pub(super) fn fetch_pip(cache: &Path, progress: &dyn Progress) -> Result<PathBuf, Error> {
    let modules = "usr/lib/python3/dist-packages";
    let unpacked = fetch(
        "python3-pip",
        &format!("{modules}/pip"),
        None,
        cache,
        progress,
    )?;
    Ok(unpacked.join(modules))
}

/// Fetches the file `member` of the distribution's package `package` and returns its path.
pub(super) fn fetch_member(
    package: &str,
    member: &str,
    cache: &Path,
    progress: &dyn Progress,
) -> Result<PathBuf, Error> {
    let only = format!("./{member}");
    Ok(fetch(package, member, Some(&only), cache, progress)?.join(member))
}

/// Unpacks a package of the distribution, or `only` one file of it, into a folder of the cache, if `proof` is
/// not there already. Returns the folder.
fn fetch(
    package: &str,
    proof: &str,
    only: Option<&str>,
    cache: &Path,
    progress: &dyn Progress,
) -> Result<PathBuf, Error> {
    let unpacked = cache.join(package);
    if unpacked.join(proof).exists() {
        return Ok(unpacked);
    }
    need_apt()?;
    // Not the lock of the cache folder: the caller may hold that one.
    let _lock = super::lock(&cache.join(format!("{package}.lock")))?;
    let scratch = Scratch::new(cache.join(format!("{package}.part")))?;
    progress.step("package lists");
    let apt = Apt::with_system_sources(scratch.path())?;
    apt.update(progress)?;
    progress.step(package);
    let archive = apt.download(package, progress)?;
    let staged = scratch.path().join("unpacked");
    unpack(&archive, &staged, only)?;
    replace_dir(&staged, &unpacked)?;
    Ok(unpacked)
}

/// Writes the gzip-compressed file `member` of the distribution's package `package` to `to`,
/// uncompressed. `dir` takes temporary files.
///
/// # Errors
/// The system is not Debian-like, there is no network, or no such package or member.
pub fn fetch_compressed(
    package: &str,
    member: &str,
    to: &Path,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<(), Error> {
    need_apt()?;
    progress.step("package lists");
    let apt = Apt::with_system_sources(dir)?;
    apt.update(progress)?;
    progress.step(package);
    let archive = apt.download(package, progress)?;
    let unpacked = dir.join("unpacked");
    unpack(&archive, &unpacked, Some(&format!("./{member}")))?;
    let target = fs::File::create(to).map_err(Error::io("cannot create", to))?;
    let mut gzip = Command::new("gzip");
    gzip.args(["--decompress", "--stdout"])
        .arg(unpacked.join(member))
        .stdout(target);
    child::stdout(&mut gzip).map(|_| ())
}

fn need_apt() -> Result<(), Error> {
    if child::exists("apt-get", "--version") && child::exists("dpkg-deb", "--version") {
        Ok(())
    } else {
        Err(Error::Setup("this system has no apt-get".into()))
    }
}

/// Whether a Debian version is one of upstream release `release`: `1.95.0+dfsg1-2~bpo13+1`.
fn is_version_of(version: &str, release: &str) -> bool {
    version
        .strip_prefix(release)
        .is_some_and(|rest| rest.starts_with(['+', '-', '~']))
}

fn replace_dir(from: &Path, to: &Path) -> Result<(), Error> {
    if to.exists() {
        fs::remove_dir_all(to).map_err(Error::io("cannot remove", to))?;
    }
    fs::rename(from, to).map_err(Error::io("cannot create", to))
}

/// Unpacks a package, or the one folder `only` of it, into `to`.
fn unpack(package: &Path, to: &Path, only: Option<&str>) -> Result<(), Error> {
    fs::create_dir_all(to).map_err(Error::io("cannot create", to))?;
    let mut dpkg = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(package)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|source| Error::Spawn {
            program: "dpkg-deb".into(),
            source,
        })?;
    let archive = dpkg.stdout.take().expect("stdout is piped");
    let output = Command::new("tar")
        .args(["--extract", "--no-same-owner", "--directory"])
        .arg(to)
        .args(only)
        .stdin(archive)
        .output()
        .map_err(|source| Error::Spawn {
            program: "tar".into(),
            source,
        })?;
    let status = dpkg
        .wait()
        .map_err(Error::io("cannot wait for", "dpkg-deb"))?;
    if !output.status.success() || !status.success() {
        let output = child::last_lines(&String::from_utf8_lossy(&output.stderr), 4);
        return Err(Error::Tool {
            program: format!("unpacking {}", package.display()),
            output,
        });
    }
    Ok(())
}

/// apt with private state.
struct Apt {
    dir: PathBuf,
    options: Vec<String>,
}

impl Apt {
    /// apt that sees one source only, given as a deb822 stanza.
    fn with_source(dir: &Path, stanza: &str) -> Result<Apt, Error> {
        let mut apt = Apt::with_system_sources(dir)?;
        let parts = dir.join("sources");
        fs::create_dir_all(&parts).map_err(Error::io("cannot create", &parts))?;
        let file = parts.join("edgellm.sources");
        fs::write(&file, stanza).map_err(Error::io("cannot write", &file))?;
        apt.options.push("Dir::Etc::sourcelist=/dev/null".into());
        apt.options
            .push(format!("Dir::Etc::sourceparts={}", parts.display()));
        Ok(apt)
    }

    /// apt that sees the system's sources.
    fn with_system_sources(dir: &Path) -> Result<Apt, Error> {
        let (lists, archives) = (dir.join("lists"), dir.join("archives"));
        for folder in [&lists.join("partial"), &archives.join("partial")] {
            fs::create_dir_all(folder).map_err(Error::io("cannot create", folder))?;
        }
        let options = vec![
            format!("Dir::State::Lists={}", lists.display()),
            format!("Dir::Cache={}", dir.display()),
            format!("Dir::Cache::archives={}", archives.display()),
            "Acquire::Languages=none".into(),
            // Apt's unprivileged user may not enter a folder in someone's home.
            "APT::Sandbox::User=root".into(),
            // A release that is not there must be an error, not a remark.
            "APT::Update::Error-Mode=any".into(),
        ];
        Ok(Apt {
            dir: dir.to_owned(),
            options,
        })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for option in &self.options {
            command.arg("-o").arg(option);
        }
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .current_dir(&self.dir);
        command
    }

    fn update(&self, progress: &dyn Progress) -> Result<(), Error> {
        let mut command = self.command("apt-get");
        command.args(["-q", "update"]);
        run_watched(&mut command, |_| {
            progress.bytes(size_of_tree(&self.dir), None)
        })
        .map(|_| ())
    }

    /// Versions of a package in the lists.
    fn versions(&self, package: &str) -> Result<Vec<String>, Error> {
        let table = child::stdout(self.command("apt-cache").args(["madison", package]))?;
        Ok(madison_versions(&table))
    }

    /// Downloads `package` or `package=version` and returns the file.
    fn download(&self, package: &str, progress: &dyn Progress) -> Result<PathBuf, Error> {
        let before = size_of_tree(&self.dir);
        let mut command = self.command("apt-get");
        command.args(["-q", "download", package]);
        run_watched(&mut command, |_| {
            progress.bytes(size_of_tree(&self.dir).saturating_sub(before), None)
        })?;
        let files = self
            .dir
            .read_dir()
            .map_err(Error::io("cannot read", &self.dir))?;
        files
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .ok_or_else(|| Error::Setup(format!("apt-get downloaded no file for {package}")))
    }
}

/// The second column of `apt-cache madison`.
fn madison_versions(table: &str) -> Vec<String> {
    let mut versions: Vec<String> = table
        .lines()
        .filter_map(|line| line.split('|').nth(1))
        .map(|version| version.trim().to_owned())
        .collect();
    versions.dedup();
    versions
}

/// What `/etc/os-release` says.
#[derive(Debug, Default, PartialEq, Eq)]
struct OsRelease {
    id: String,
    codename: String,
}

impl OsRelease {
    fn name(&self) -> &str {
        if self.id.is_empty() {
            "an unknown system"
        } else {
            &self.id
        }
    }
}

fn os_release(text: &str) -> OsRelease {
    let value = |key: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        line.unwrap_or_default().trim_matches('"').to_owned()
    };
    OsRelease {
        id: value("ID"),
        codename: value("VERSION_CODENAME"),
    }
}

/// One package source of the system.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Source {
    uri: String,
    suites: Vec<String>,
    components: Vec<String>,
    /// The value of `Signed-By` as it stands: a path, fingerprints, or a key over several lines.
    signed_by: Option<String>,
}

impl Source {
    /// The stanza of another suite on the same mirror, trusted by the same key.
    fn for_suite(&self, suite: &str) -> String {
        let mut stanza = format!(
            "Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\n",
            self.uri
        );
        if let Some(signed_by) = &self.signed_by {
            stanza.push_str(&format!("Signed-By: {signed_by}\n"));
        }
        stanza
    }
}

/// The mirror of Debian's main archive: neither the security archive nor a vendor's repository.
fn debian_mirror(sources: &[Source]) -> Option<Source> {
    let main_archive = |source: &&Source| {
        source
            .components
            .iter()
            .any(|component| component == "main")
            && source
                .suites
                .iter()
                .any(|suite| !suite.contains("security") && !suite.contains('/'))
            && source.uri.trim_end_matches('/').ends_with("debian")
    };
    sources.iter().find(main_archive).cloned()
}

/// Every package source of the system.
fn system_sources() -> Vec<Source> {
    let dir = Path::new("/etc/apt");
    let mut files = vec![dir.join("sources.list")];
    if let Ok(entries) = dir.join("sources.list.d").read_dir() {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.sort();
    let mut sources = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => sources.extend(parse_deb822(&text)),
            Some("list") => sources.extend(text.lines().filter_map(parse_line)),
            _ => {}
        }
    }
    sources
}

/// Stanzas of `Key: value` lines, where a line that begins with a blank continues the value.
fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            sources.extend(source_of(&fields));
            fields.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((key, value)) = line.split_once(':') {
            fields.push((key.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    sources
}

fn source_of(fields: &[(String, String)]) -> Option<Source> {
    let field = |key: &str| {
        fields
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    };
    let words = |key: &str| {
        field(key)
            .unwrap_or_default()
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    if field("enabled") == Some("no") || !words("types").iter().any(|kind| kind == "deb") {
        return None;
    }
    Some(Source {
        uri: words("uris").into_iter().next()?,
        suites: words("suites"),
        components: words("components"),
        signed_by: field("signed-by").map(str::to_owned),
    })
}

/// The one-line form: `deb [signed-by=/path] URI SUITE COMPONENT…`.
fn parse_line(line: &str) -> Option<Source> {
    let rest = line.trim().strip_prefix("deb ")?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest
        .split('#')
        .next()?
        .split_whitespace()
        .map(str::to_owned);
    let signed_by = options
        .split_whitespace()
        .find_map(|option| option.strip_prefix("signed-by="))
        .map(str::to_owned);
    Some(Source {
        uri: words.next()?,
        suites: vec![words.next()?],
        components: words.collect(),
        signed_by,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
Types: deb
# a comment inside
URIs: http://mirror.test/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/k.gpg

Types: deb
URIs: http://mirror.test/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Types: deb-src
URIs: http://mirror.test/debian
Suites: bookworm
Components: main
";

    #[test]
    fn stanzas_are_read() {
        let sources = parse_deb822(DEB822);
        assert_eq!(sources.len(), 2, "deb-src is left out: {sources:?}");
        assert_eq!(sources[1].suites, ["bookworm", "bookworm-updates"]);
        assert_eq!(
            sources[1].signed_by.as_deref(),
            Some("\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc")
        );
        assert!(parse_deb822("Types: deb\nEnabled: no\nURIs: u\nSuites: s\n").is_empty());
        assert!(parse_deb822("Types: deb\n").is_empty(), "no URI");
    }

    #[test]
    fn lines_are_read() {
        let source = parse_line(
            "deb [arch=amd64 signed-by=/k.gpg] http://mirror.test/debian sid main # note",
        )
        .unwrap();
        assert_eq!(source.uri, "http://mirror.test/debian");
        assert_eq!(source.suites, ["sid"]);
        assert_eq!(source.components, ["main"]);
        assert_eq!(source.signed_by.as_deref(), Some("/k.gpg"));
        assert_eq!(parse_line("# deb http://mirror.test/debian sid main"), None);
        assert_eq!(
            parse_line("deb-src http://mirror.test/debian sid main"),
            None
        );
        assert_eq!(parse_line("deb [broken"), None);
    }

    #[test]
    fn the_main_archive_is_chosen_and_its_key_kept() {
        let mirror = debian_mirror(&parse_deb822(DEB822)).unwrap();
        assert_eq!(mirror.uri, "http://mirror.test/debian");
        let stanza = mirror.for_suite("trixie-backports");
        let parsed = parse_deb822(&stanza);
        assert_eq!(parsed[0].suites, ["trixie-backports"]);
        assert_eq!(parsed[0].signed_by, mirror.signed_by);

        let vendor = parse_line("deb http://vendor.test/node nodistro main").unwrap();
        assert_eq!(debian_mirror(&[vendor]), None);
    }

    #[test]
    fn versions_must_match_the_release() {
        let table = "  rust-src | 1.95.0+dfsg1-2~bpo13+1 | http://mirror.test/debian trixie-backports/main amd64 Packages\n";
        assert_eq!(madison_versions(table), ["1.95.0+dfsg1-2~bpo13+1"]);
        assert!(is_version_of("1.95.0+dfsg1-2~bpo13+1", "1.95.0"));
        assert!(is_version_of("1.95.0-1", "1.95.0"));
        assert!(!is_version_of("1.95.01-1", "1.95.0"));
        assert!(!is_version_of("1.94.1+dfsg1-1", "1.95.0"));
    }

    #[test]
    fn system_is_recognised() {
        let system = os_release("PRETTY_NAME=\"X\"\nID=debian\nVERSION_CODENAME=bookworm\n");
        assert_eq!(
            system,
            OsRelease {
                id: "debian".into(),
                codename: "bookworm".into()
            }
        );
        assert_eq!(os_release("").name(), "an unknown system");
    }
}
