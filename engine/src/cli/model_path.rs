//! Where fetched models and texts are.

use std::path::{Path, PathBuf};

use engine::Error;
use models::catalog::Catalog;
use models::hub_name::{self, HubName};

/// Folder of fetched models inside a checkout.
const CHECKOUT_FOLDER: &str = "models/files";
/// A file that only a checkout has.
const CHECKOUT_MARK: &str = "models/catalog.toml";

/// What `-m` means: a path, the name of a catalogue model, `hf:OWNER/REPO[:FILE]`, or without it the
/// catalogue's default model.
///
/// # Errors
/// [`Error::Input`] if a model that has to be fetched first is meant and is not there.
pub fn resolve(flag: Option<&Path>) -> Result<PathBuf, Error> {
    let catalog = Catalog::builtin()?;
    let path = match flag {
        None => Path::new(&catalog.default_model().name),
        Some(path) if path.exists() => return Ok(path.to_owned()),
        Some(path) => path,
    };
    let Some(name) = path.to_str() else {
        return Ok(path.to_owned());
    };
    let found = match (hub_name(name, &catalog)?, catalog.find(name)) {
        (Some(hub), _) => pulled(&hub, &folders()),
        (None, Ok(model)) => fetched(&model.file, &folders()),
        (None, Err(_)) => return Ok(path.to_owned()),
    };
    found.map_err(|looked_in| {
        Error::Input(format!(
            "the model {name} is not there ({looked_in}): fetch it with `edgellm pull {name}` or name a file or folder with -m"
        ))
    })
}

/// The repository that `name` means: `hf:…` or a catalogue name of one.
///
/// # Errors
/// [`Error::Input`] if it begins with `hf:` and names none.
pub fn hub_name(name: &str, catalog: &Catalog) -> Result<Option<HubName>, Error> {
    match catalog.repository(name) {
        Some(known) => Ok(Some(known.hub_name()?)),
        None if name.starts_with(hub_name::PREFIX) => Ok(Some(name.parse()?)),
        None => Ok(None),
    }
}

/// Folder of a repository inside a folder of fetched models.
pub fn repository_folder(name: &HubName) -> PathBuf {
    let revision = match &*name.revision {
        hub_name::DEFAULT_REVISION => String::new(),
        revision => format!("@{revision}"),
    };
    PathBuf::from(format!("{}{revision}", name.repo))
}

/// What was pulled of a repository: its file, or a folder with a configuration, or a GGUF file alone
/// in its folder.
fn pulled(name: &HubName, folders: &[PathBuf]) -> Result<PathBuf, String> {
    let place = repository_folder(name);
    if let Some(file) = &name.file {
        return fetched(&place.join(file).to_string_lossy(), folders);
    }
    let mut places = folders.iter().map(|folder| folder.join(&place));
    places
        .find_map(|place| match place.join("config.json").is_file() {
            true => Some(place),
            false => only_gguf(&place),
        })
        .ok_or_else(|| looked_in(folders))
}

fn only_gguf(folder: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let mut ggufs = entries.map(|entry| entry.path()).filter(|path| {
        path.extension()
            .is_some_and(|extension| extension == "gguf")
    });
    ggufs.next().filter(|_| ggufs.next().is_none())
}

/// The catalogue's default text.
///
/// # Errors
/// [`Error::Input`] if it has not been fetched.
pub fn default_text() -> Result<PathBuf, Error> {
    let catalog = Catalog::builtin()?;
    let text = catalog.default_text();
    fetched(&text.file, &folders()).map_err(|looked_in| {
        Error::Input(format!(
            "the text {name} is not there ({looked_in}): fetch it with `cargo xtask model fetch {name}` or name a file with --text",
            name = text.name,
        ))
    })
}

/// `file` in the first of `folders` that has it; where it was looked for if none has.
fn fetched(file: &str, folders: &[PathBuf]) -> Result<PathBuf, String> {
    let mut paths = folders.iter().map(|folder| folder.join(file));
    paths
        .find(|path| path.is_file())
        .ok_or_else(|| looked_in(folders))
}

fn looked_in(folders: &[PathBuf]) -> String {
    let folders = folders.iter().map(|folder| folder.display().to_string());
    format!("looked in {}", folders.collect::<Vec<_>>().join(", "))
}

/// Where fetched models go.
///
/// # Errors
/// [`Error::Machine`] if neither a checkout nor a home folder is known.
pub fn download_folder() -> Result<PathBuf, Error> {
    folders().into_iter().next().ok_or_else(|| {
        Error::machine("no folder for models: set HOME or XDG_CACHE_HOME, or give --into")
    })
}

/// Folders of fetched models: of the checkout around the current folder or around this program,
/// then of the user.
fn folders() -> Vec<PathBuf> {
    let around = [std::env::current_dir().ok(), std::env::current_exe().ok()];
    let checkout = around.iter().flatten().find_map(|start| {
        start
            .ancestors()
            .find(|folder| folder.join(CHECKOUT_MARK).is_file())
            .map(|root| root.join(CHECKOUT_FOLDER))
    });
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let cache = variable("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| variable("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .map(|cache| cache.join("edgellm/models"));
    checkout.into_iter().chain(cache).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_folder_that_has_the_file_wins() {
        let folder = tempfile::tempdir().expect("a folder");
        let folders: Vec<PathBuf> = ["a", "b"].map(|name| folder.path().join(name)).into();
        for folder in &folders {
            std::fs::create_dir(folder).expect("created");
        }
        let looked_in = fetched("m.gguf", &folders).expect_err("not there");
        assert!(
            looked_in.contains("/a, ") && looked_in.ends_with("/b"),
            "{looked_in}"
        );
        for folder in ["b", "a"].map(|name| folder.path().join(name)) {
            std::fs::write(folder.join("m.gguf"), b"x").expect("written");
            assert_eq!(
                fetched("m.gguf", &folders).expect("there"),
                folder.join("m.gguf")
            );
        }
    }

    #[test]
    fn pulled_repositories_are_found() {
        let folder = tempfile::tempdir().expect("a folder");
        let folders = [folder.path().to_owned()];
        let find = |name: &str| pulled(&name.parse().expect("a name"), &folders);
        let repo = folder.path().join("o/r");
        assert!(find("hf:o/r").is_err());
        std::fs::create_dir_all(&repo).expect("created");
        std::fs::write(repo.join("m.gguf"), b"x").expect("written");
        assert_eq!(find("hf:o/r").expect("alone"), repo.join("m.gguf"));
        assert_eq!(find("hf:o/r:m.gguf").expect("named"), repo.join("m.gguf"));
        assert!(find("hf:o/r@v1").is_err() && find("hf:o/r:n.gguf").is_err());
        std::fs::write(repo.join("n.gguf"), b"x").expect("written");
        assert!(find("hf:o/r").is_err(), "a choice");
        std::fs::write(repo.join("config.json"), b"{}").expect("written");
        assert_eq!(find("hf:o/r").expect("a folder"), repo);
    }

    #[test]
    fn a_path_that_is_no_catalogue_name_is_kept() {
        assert_eq!(
            resolve(Some(Path::new("no/such/file.gguf"))).expect("kept"),
            Path::new("no/such/file.gguf")
        );
    }
}
