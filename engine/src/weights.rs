//! Model files and folders: mapped into memory, then decoded tensor by tensor on all cores.

mod container;
mod folder;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use memmap2::{Mmap, UncheckedAdvice};
use models::file::Source;
use models::file::container::Container;
use models::file::gguf::Gguf;
use models::file::hugging_face::HuggingFace;
use models::recipe::Recipe;
use rayon::prelude::*;

use crate::Error;
use crate::backend::LoadedModel;
use crate::chat::ChatTemplate;
use crate::error::shown;
use crate::tokenizer::Tokenizer;
use folder::Folder;

/// Metadata key of the chat template in GGUF files.
const TEMPLATE_KEY: &str = "tokenizer.chat_template";

/// A model mapped into memory: a GGUF file, a file of the quantiser, or a folder as Hugging Face has it.
#[derive(Debug)]
pub struct ModelFile {
    path: PathBuf,
    content: Content,
}

/// A map that its users hold together.
#[derive(Debug, Clone)]
pub struct Pages(Arc<Mmap>);

impl Pages {
    /// As [`ModelFile::release`].
    pub fn release(&self) {
        release(&self.0);
    }
}

/// Lets go of the memory of a map's pages.
fn release(map: &Mmap) {
    // SAFETY: the map is read-only and of a file, so dropped pages come back as they were.
    // That this is only advice makes its failure harmless.
    let _ = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
}

impl AsRef<[u8]> for Pages {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

#[derive(Debug)]
enum Content {
    Gguf(Mmap),
    /// Shared with the matrices, which are used in place.
    Container(Bytes, Pages),
    Folder(Folder),
}

/// The table of contents of a model.
#[derive(Debug)]
pub enum Parsed<'a> {
    /// Of a GGUF file.
    Gguf(Gguf<'a>),
    /// Of a file of the quantiser.
    Container(Container<'a>),
    /// Of a folder.
    HuggingFace(HuggingFace<'a>),
}

impl Parsed<'_> {
    /// Configuration and tensors.
    pub fn source(&self) -> &dyn Source {
        match self {
            Parsed::Gguf(gguf) => gguf,
            Parsed::Container(container) => container,
            Parsed::HuggingFace(folder) => folder,
        }
    }
}

impl ModelFile {
    /// Maps the model at `path`: a GGUF file, a file of the quantiser, or a folder with `config.json`
    /// and safetensors files.
    ///
    /// # Errors
    /// [`Error::Input`] if it is missing, empty or cannot be read, or if a folder lacks a file.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let fail = |why: String| {
            Error::Input(format!(
                "cannot open model {}: {why}",
                shown(&path.display().to_string())
            ))
        };
        let is_folder = std::fs::metadata(path).is_ok_and(|metadata| metadata.is_dir());
        let content = match is_folder {
            true => Content::Folder(Folder::open(path).map_err(fail)?),
            false => {
                let map = map(path).map_err(fail)?;
                match Container::is_container(&map) {
                    true => {
                        let pages = Pages(Arc::new(map));
                        Content::Container(Bytes::from_owner(pages.clone()), pages)
                    }
                    false => Content::Gguf(map),
                }
            }
        };
        Ok(Self {
            path: path.to_owned(),
            content,
        })
    }

    /// Where the model is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The parsed table of contents.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and the field at fault.
    pub fn parse(&self) -> Result<Parsed<'_>, Error> {
        match &self.content {
            Content::Gguf(map) => Gguf::parse(map).map(Parsed::Gguf),
            Content::Container(bytes, _) => Container::parse(bytes).map(Parsed::Container),
            Content::Folder(folder) => folder.parse().map(Parsed::HuggingFace),
        }
        .map_err(|e| self.fault(e))
    }

    /// The forward pass of the model; named after its file or folder if it names no model.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and the field or tensor at fault.
    pub fn recipe(&self, file: &Parsed<'_>) -> Result<Recipe, Error> {
        let mut recipe = models::arch::recipe(file.source()).map_err(|e| self.fault(e))?;
        if recipe.config.name.is_empty() {
            let name = match self.content {
                Content::Gguf(_) | Content::Container(..) => self.path.file_stem(),
                Content::Folder(_) => self.path.file_name(),
            };
            recipe.config.name = name
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
        }
        Ok(recipe)
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and the field at fault.
    pub fn tokenizer(&self, file: &Parsed<'_>, recipe: &Recipe) -> Result<Tokenizer, Error> {
        let vocab = recipe.config.vocab;
        match (file, &self.content) {
            (Parsed::Gguf(gguf), _) => Tokenizer::from_gguf(gguf, vocab),
            (Parsed::Container(container), _) => container::tokenizer(container, vocab),
            (_, Content::Folder(folder)) => folder.tokenizer(vocab),
            (_, Content::Gguf(_) | Content::Container(..)) => {
                Err(Error::input("parsed from another model"))
            }
        }
        .map_err(|e| self.fault(e))
    }

    /// The model's chat template, if it has one.
    ///
    /// # Errors
    /// [`Error::Input`] if it is not valid Jinja.
    pub fn chat_template(
        &self,
        file: &Parsed<'_>,
        tokenizer: &Tokenizer,
    ) -> Result<Option<ChatTemplate>, Error> {
        self.template(file)?
            .map(|source| ChatTemplate::new(source, &tokenizer.bos_text(), &tokenizer.eos_text()))
            .transpose()
    }

    /// The source of the chat template.
    fn template<'m>(&'m self, file: &'m Parsed<'_>) -> Result<Option<&'m str>, Error> {
        Ok(match (file, &self.content) {
            (Parsed::Gguf(gguf), _) => gguf.metadata.string_opt(TEMPLATE_KEY)?,
            (Parsed::Container(container), _) => container::chat_template(container),
            (_, Content::Folder(folder)) => folder.chat_template(),
            (_, Content::Gguf(_) | Content::Container(..)) => None,
        })
    }

    /// The maps of the files that hold weights.
    fn maps(&self) -> Vec<&Mmap> {
        match &self.content {
            Content::Gguf(map) => vec![map],
            Content::Container(_, pages) => vec![&pages.0],
            Content::Folder(folder) => folder.maps().collect(),
        }
    }

    /// Lets go of the memory of pages that were read; they are read again where they are used again.
    pub fn release(&self) {
        for map in self.maps() {
            release(map);
        }
    }

    /// [`ModelFile::release`] for the pages of one tensor, so that a model is not held twice while it loads. What a
    /// file of the quantiser holds is used in place.
    fn release_range(&self, data: &[u8]) {
        if matches!(self.content, Content::Container(..)) {
            return;
        }
        for map in self.maps() {
            let start = (data.as_ptr() as usize).wrapping_sub(map.as_ptr() as usize);
            if start < map.len() && data.len() <= map.len() - start {
                // SAFETY: as in `release`.
                let _ = unsafe {
                    map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, data.len())
                };
            }
        }
    }

    /// Decodes every tensor that `recipe` needs, on all cores of the current pool.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and the tensor at fault.
    pub fn load(&self, file: &Parsed<'_>, recipe: Recipe) -> Result<LoadedModel, Error> {
        let source = file.source();
        let weights = recipe
            .weights
            .par_iter()
            .map(|reference| {
                let weight = models::weights::decode(source, reference)?;
                for name in models::weights::check(source, reference)? {
                    if let Some(tensor) = source.tensor(&name) {
                        self.release_range(tensor.data);
                    }
                }
                Ok(weight)
            })
            .collect::<Result<_, _>>()
            .map_err(|e: models::Error| self.fault(e))?;
        let file = match &self.content {
            Content::Container(_, pages) => Some(pages.clone()),
            Content::Gguf(_) | Content::Folder(_) => None,
        };
        Ok(LoadedModel {
            recipe,
            weights,
            file,
        })
    }

    /// An error of this model's content.
    fn fault(&self, error: impl std::fmt::Display) -> Error {
        Error::Input(format!(
            "{}: {error}",
            shown(&self.path.display().to_string())
        ))
    }
}

/// Maps a regular file that is not empty.
fn map(path: &Path) -> Result<Mmap, String> {
    // Asked before opening: opening a pipe would wait for a writer.
    let metadata = std::fs::metadata(path).map_err(|e| e.to_string())?;
    if !metadata.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    if metadata.len() == 0 {
        return Err("it is empty".to_owned());
    }
    let file = File::open(path).map_err(|e| e.to_string())?;
    // SAFETY: the map is private and read-only. Model files are written once, under another
    // name, and renamed into place; a program that changes one in place while it is mapped
    // breaks its own model, and that is stated in the documentation of `-m`.
    unsafe { Mmap::map(&file) }.map_err(|e| e.to_string())
}
