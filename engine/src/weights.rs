//! Model files: mapped into memory, then decoded tensor by tensor on all cores.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use models::file::gguf::Gguf;
use models::recipe::Recipe;
use rayon::prelude::*;

use crate::Error;
use crate::backend::LoadedModel;
use crate::error::shown;
use crate::tokenizer::Tokenizer;

/// A model file mapped into memory.
#[derive(Debug)]
pub struct ModelFile {
    path: PathBuf,
    map: Mmap,
}

impl ModelFile {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// [`Error::Input`] if it is missing, a directory, empty or cannot be read.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let fail = |why: &dyn std::fmt::Display| {
            Error::Input(format!(
                "cannot open model {}: {why}",
                shown(&path.display().to_string())
            ))
        };
        // Asked before opening: opening a pipe would wait for a writer.
        let metadata = std::fs::metadata(path).map_err(|e| fail(&e))?;
        if metadata.is_dir() {
            return Err(fail(&"it is a directory, not a GGUF file"));
        }
        if !metadata.is_file() {
            return Err(fail(&"it is not a regular file"));
        }
        if metadata.len() == 0 {
            return Err(fail(&"it is empty"));
        }
        let file = File::open(path).map_err(|e| fail(&e))?;
        // SAFETY: the map is private and read-only. Model files are written once, under another
        // name, and renamed into place; a program that changes one in place while it is mapped
        // breaks its own model, and that is stated in the documentation of `-m`.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| fail(&e))?;
        Ok(Self {
            path: path.to_owned(),
            map,
        })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The parsed table of contents.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and the field at fault.
    pub fn parse(&self) -> Result<Gguf<'_>, Error> {
        Gguf::parse(&self.map).map_err(|e| self.fault(e))
    }

    /// The forward pass of the model in this file; named after the file if it names no model.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and the field or tensor at fault.
    pub fn recipe(&self, file: &Gguf<'_>) -> Result<Recipe, Error> {
        let mut recipe = models::arch::recipe(file).map_err(|e| self.fault(e))?;
        if recipe.config.name.is_empty() {
            recipe.config.name = self
                .path
                .file_stem()
                .map(|stem| stem.to_string_lossy().into_owned())
                .unwrap_or_default();
        }
        Ok(recipe)
    }

    /// The tokenizer in this file.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and the field at fault.
    pub fn tokenizer(&self, file: &Gguf<'_>, recipe: &Recipe) -> Result<Tokenizer, Error> {
        Tokenizer::from_gguf(file, recipe.config.vocab).map_err(|e| self.fault(e))
    }

    /// Decodes every tensor that `recipe` needs, on all cores of the current pool.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and the tensor at fault.
    pub fn load(&self, file: &Gguf<'_>, recipe: Recipe) -> Result<LoadedModel, Error> {
        let weights = recipe
            .weights
            .par_iter()
            .map(|reference| models::weights::decode(file, reference))
            .collect::<Result<_, _>>()
            .map_err(|e| self.fault(e))?;
        Ok(LoadedModel { recipe, weights })
    }

    /// An error of this file's content.
    fn fault(&self, error: impl std::fmt::Display) -> Error {
        Error::Input(format!(
            "{}: {error}",
            shown(&self.path.display().to_string())
        ))
    }
}
