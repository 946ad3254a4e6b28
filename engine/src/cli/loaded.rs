//! A model file loaded for the commands that score texts.

use std::path::Path;
use std::sync::Arc;

use engine::Error;
use engine::backend::{Choice, LoadedModel, Selected, select};
use engine::tokenizer::Tokenizer;
use engine::weights::ModelFile;

use super::{ModelArgs, model_path};

/// A model in memory with its tokenizer.
#[derive(Debug)]
pub struct Loaded {
    /// Forward pass and weights.
    pub model: Arc<LoadedModel>,
    /// Text to ids.
    pub tokenizer: Tokenizer,
}

impl Loaded {
    /// Loads what `-m` means.
    ///
    /// # Errors
    /// [`Error::Input`] that names the file and what is wrong with it.
    pub fn open(model: Option<&Path>) -> Result<Self, Error> {
        let mapped = ModelFile::open(&model_path::resolve(model)?)?;
        let file = mapped.parse()?;
        let recipe = mapped.recipe(&file)?;
        let (tokenizer, model) = rayon::join(
            || mapped.tokenizer(&file, &recipe),
            || mapped.load(&file, recipe.clone()),
        );
        Ok(Self {
            tokenizer: tokenizer?,
            model: Arc::new(model?),
        })
    }

    /// V.
    pub fn vocab(&self) -> usize {
        self.model.recipe.config.vocab
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.model.recipe.config.name
    }

    /// A context of `tokens`, if the model was trained for as many.
    ///
    /// # Errors
    /// [`Error::Input`] if it was not.
    pub fn check_context(&self, tokens: usize) -> Result<usize, Error> {
        let trained = self.model.recipe.config.context;
        match tokens <= trained {
            true => Ok(tokens),
            false => Err(Error::Input(format!(
                "a context of {tokens} tokens is more than the {trained} that the model was trained for: set --context"
            ))),
        }
    }

    /// The backend that the flags ask for, with a cache of `context` tokens.
    ///
    /// # Errors
    /// As [`select`].
    pub fn backend(&self, args: &ModelArgs, context: usize) -> Result<Selected, Error> {
        select(
            Choice::from(args.backend),
            Arc::clone(&self.model),
            args.cache(context),
            args.tier.map(Into::into),
        )
    }
}
