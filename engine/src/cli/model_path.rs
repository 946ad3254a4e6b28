//! Where model files are.

use std::path::{Path, PathBuf};

use engine::Error;
use models::catalog::{Catalog, Model};

/// Folder of fetched models inside a checkout.
const CHECKOUT_FOLDER: &str = "models/files";
/// A file that only a checkout has.
const CHECKOUT_MARK: &str = "models/catalog.toml";

/// The file that `-m` means: a path, the name of a catalogue model, or without it the catalogue's
/// default model.
///
/// # Errors
/// [`Error::Input`] if a catalogue model is meant and has not been fetched.
pub fn resolve(flag: Option<&Path>) -> Result<PathBuf, Error> {
    let catalog = Catalog::builtin()?;
    let model = match flag {
        None => catalog.default_model(),
        Some(path) if path.exists() => return Ok(path.to_owned()),
        Some(path) => match path.to_str().and_then(|name| catalog.find(name).ok()) {
            Some(model) => model,
            None => return Ok(path.to_owned()),
        },
    };
    fetched(model, &folders())
}

/// The file of a catalogue model in the first of `folders` that has it.
fn fetched(model: &Model, folders: &[PathBuf]) -> Result<PathBuf, Error> {
    folders
        .iter()
        .map(|folder| folder.join(&model.file))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            let looked_in: Vec<String> =
                folders.iter().map(|folder| folder.display().to_string()).collect();
            Error::Input(format!(
                "the model {} is not there (looked in {}): fetch it with `cargo xtask model fetch {}` or name a GGUF file with -m",
                model.name,
                looked_in.join(", "),
                model.name
            ))
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
        let catalog = Catalog::builtin().expect("valid");
        let model = catalog.default_model();
        let error = fetched(model, &folders).expect_err("not there");
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("cargo xtask model fetch"));
        std::fs::write(folders[1].join(&model.file), b"x").expect("written");
        assert_eq!(
            fetched(model, &folders).expect("there"),
            folders[1].join(&model.file)
        );
        std::fs::write(folders[0].join(&model.file), b"x").expect("written");
        assert_eq!(
            fetched(model, &folders).expect("there"),
            folders[0].join(&model.file)
        );
    }

    #[test]
    fn a_path_that_is_no_catalogue_name_is_kept() {
        assert_eq!(
            resolve(Some(Path::new("no/such/file.gguf"))).expect("kept"),
            Path::new("no/such/file.gguf")
        );
    }
}
