//! Everything of a model but its weights: facts, tokenizer, chat template, end tokens. Read once for each
//! revision of the files; the edge keeps them and hands out copies, which are cheap. Blocks on the file
//! system: call it where a thread may wait.

use std::path::PathBuf;
use std::sync::Arc;

use super::kept::Kept;
use super::{HubError, ModelFacts, ModelFolder, ModelRoots};
use crate::error::Error;
use crate::ids::ModelName;
use crate::text::{ChatTemplate, TextError, Tokenizer, eos_token_ids};

/// A tokenizer takes tens of megabytes. Resident models keep theirs beside this.
const ASSETS_KEPT_MAX: usize = 16;

/// Small, and the longest page of a list has so many.
const FACTS_KEPT_MAX: usize = 1000;

/// What the edge needs of a model.
#[derive(Debug)]
pub struct ModelAssets {
    /// Its name.
    pub name: ModelName,
    /// Its folder.
    pub folder: PathBuf,
    /// Identifies its weights.
    pub revision: String,
    /// What its files say.
    pub facts: ModelFacts,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Messages to text.
    pub chat_template: Option<ChatTemplate>,
    /// The tokens that end its output.
    pub eos_token_ids: Vec<u32>,
}

/// The assets that were read last.
#[derive(Debug)]
pub struct AssetShelf {
    roots: ModelRoots,
    assets: Kept<Arc<ModelAssets>>,
    facts: Kept<ModelFacts>,
}

impl AssetShelf {
    /// For the models under `roots`.
    #[must_use]
    pub fn new(roots: ModelRoots) -> Self {
        Self { roots, assets: Kept::new(ASSETS_KEPT_MAX), facts: Kept::new(FACTS_KEPT_MAX) }
    }

    /// The assets of a model as its files are now.
    ///
    /// # Errors
    /// There is no such model, or its files cannot be used.
    pub fn assets(&self, name: &ModelName) -> Result<Arc<ModelAssets>, Error> {
        let found = self.resolve(name)?;
        if let Some(known) = self.assets.get(name, &found.revision) {
            return Ok(known);
        }
        let assets = Arc::new(read(name, &found, self.facts_of(&found)?)?);
        self.assets.put(name.clone(), found.revision, Arc::clone(&assets));
        Ok(assets)
    }

    /// What the files of a model say, without its tokenizer.
    ///
    /// # Errors
    /// Its files cannot be used.
    pub fn facts_of(&self, folder: &ModelFolder) -> Result<ModelFacts, Error> {
        let name = ModelName::from(folder.name.as_str());
        if let Some(known) = self.facts.get(&name, &folder.revision) {
            return Ok(known);
        }
        let facts = ModelFacts::read(&folder.path).map_err(|error| error.into_error(&name))?;
        self.facts.put(name, folder.revision.clone(), facts.clone());
        Ok(facts)
    }

    /// Every model that could be loaded, by name.
    #[must_use]
    pub fn list(&self) -> Vec<ModelFolder> {
        self.roots.list()
    }

    /// The folder of a model.
    ///
    /// # Errors
    /// There is no such model.
    pub fn resolve(&self, name: &ModelName) -> Result<ModelFolder, Error> {
        self.roots.resolve(name.as_str()).map_err(|error| {
            if matches!(error, HubError::NotFound { .. }) {
                self.assets.forget(name);
                self.facts.forget(name);
            }
            error.into_error(name)
        })
    }
}

fn read(name: &ModelName, folder: &ModelFolder, facts: ModelFacts) -> Result<ModelAssets, Error> {
    let unusable = |error: TextError| unusable(name, error);
    let tokenizer = Tokenizer::load(&folder.path).map_err(unusable)?;
    let chat_template = ChatTemplate::load(&folder.path, &tokenizer).map_err(unusable)?;
    let mut eos_token_ids = eos_token_ids(&folder.path, &tokenizer).map_err(unusable)?;
    // An id beyond the logits can never be chosen.
    eos_token_ids.retain(|id| *id < facts.vocabulary_size);
    Ok(ModelAssets {
        name: name.clone(),
        folder: folder.path.clone(),
        revision: folder.revision.clone(),
        facts,
        tokenizer,
        chat_template,
        eos_token_ids,
    })
}

/// For the caller: the file's name, not where it lies.
fn unusable(model: &ModelName, error: TextError) -> Error {
    let file = |path: PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let invalid = |why: String| Error::ModelInvalid { model: model.clone(), why };
    match error {
        TextError::Io { path, source } => invalid(format!("{}: {source}", file(path))),
        TextError::Json { path, source } => invalid(format!("{}: {source}", file(path))),
        TextError::Invalid { path, why } => invalid(format!("{}: {why}", file(path))),
        TextError::Unsupported { path, what } => Error::ModelUnsupported {
            model: model.clone(),
            why: format!("{}: {what} is not supported", file(path)),
        },
        TextError::Encode(why) | TextError::Render(why) => invalid(why),
    }
}
