//! What the quantiser's file carries beside the weights: tokenizer, chat template, where it came from.

use models::file::container::Container;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::{ModelFile, Parsed};
use crate::Error;
use crate::quantize::Texts;
use crate::tokenizer::{Specials, Tokenizer};

/// A `tokenizer.json`.
const TOKENIZER_KEY: &str = "tokenizer.json";
/// [`Specials`], JSON.
const SPECIALS_KEY: &str = "edgellm.specials";
/// A Jinja program.
const TEMPLATE_KEY: &str = "chat_template";
/// [`Origin`], JSON.
const ORIGIN_KEY: &str = "edgellm.source";

/// The model that a file was made from.
#[derive(Debug, Serialize)]
struct Origin {
    name: String,
    bytes: u64,
    /// Of the weight files, one after the other.
    sha256: String,
}

/// The tokenizer of a file.
///
/// # Errors
/// [`Error::Input`] if the file has none or it is none.
pub(super) fn tokenizer(container: &Container<'_>, vocab: usize) -> Result<Tokenizer, Error> {
    let json = container.text(TOKENIZER_KEY).ok_or_else(|| {
        Error::input(format!(
            "{TOKENIZER_KEY} is missing: quantise the source again"
        ))
    })?;
    let specials: Specials = container.json(SPECIALS_KEY)?;
    Tokenizer::from_json(json, &specials, vocab)
}

/// The chat template of a file, if it has one.
pub(super) fn chat_template<'c>(container: &'c Container<'_>) -> Option<&'c str> {
    container.text(TEMPLATE_KEY)
}

impl ModelFile {
    /// The texts that a container of this model carries. Reads the whole model once, for its hash.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file and the field at fault.
    pub fn container_texts(
        &self,
        file: &Parsed<'_>,
        tokenizer: &Tokenizer,
    ) -> Result<Box<Texts<'static>>, Error> {
        let mut hash = Sha256::new();
        let mut bytes = 0;
        for map in self.maps() {
            // In pieces, so that the model does not fill the memory of this process.
            for piece in map.chunks(64 << 20) {
                hash.update(piece);
                self.release();
            }
            bytes += map.len() as u64;
        }
        let origin = Origin {
            name: self
                .path()
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default(),
            bytes,
            sha256: hash
                .finalize()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        };
        let mut texts = vec![
            (TOKENIZER_KEY, tokenizer.to_json()?),
            (
                SPECIALS_KEY,
                serde_json::to_string(&tokenizer.specials()).map_err(Error::machine)?,
            ),
            (
                ORIGIN_KEY,
                serde_json::to_string(&origin).map_err(Error::machine)?,
            ),
        ];
        if let Some(template) = self.template(file)? {
            texts.push((TEMPLATE_KEY, template.to_owned()));
        }
        Ok(texts.into())
    }
}
