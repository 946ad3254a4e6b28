//! Where fetched models and texts are.

use std::path::{Path, PathBuf};

use engine::Error;
use models::catalog::Catalog;

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
    fetched(&model.file, &folders()).map_err(|looked_in| {
        Error::Input(format!(
            "the model {name} is not there ({looked_in}): fetch it with `cargo xtask model fetch {name}` or name a GGUF file with -m",
            name = model.name,
        ))
    })
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
    paths.find(|path| path.is_file()).ok_or_else(|| {
        let folders = folders.iter().map(|folder| folder.display().to_string());
        format!("looked in {}", folders.collect::<Vec<_>>().join(", "))
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
    fn a_path_that_is_no_catalogue_name_is_kept() {
        assert_eq!(
            resolve(Some(Path::new("no/such/file.gguf"))).expect("kept"),
            Path::new("no/such/file.gguf")
        );
    }
}
