//! The models on this machine, and what was read of them: files, tokenizer, chat template, end tokens. Read
//! once for each revision of the files and shared. Blocks on the file system: call it where a thread may
//! block.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::cache::RevisionCache;
use super::{HubError, Listed, ModelFacts, ModelFiles, ModelFolder, ModelRoots, read_text_files};
use crate::error::Error;
use crate::ids::{ModelName, TokenizerHash};
use crate::output::{Format, Reasoning};
use crate::text::{ChatTemplate, TextError, TextFiles, Tokenizer, eos_token_ids};

/// A tokenizer takes tens of megabytes. Resident models hold theirs in addition.
const ASSETS_CACHED_MAX: usize = 16;

/// Facts are small; the longest page of a list has this many.
const FACTS_CACHED_MAX: usize = 1000;

/// The forms in which a model writes what is not text; None where it is not known, and stays text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModelForms {
    /// Tool calls.
    pub tools: Option<Format>,
    /// Reasoning.
    pub reasoning: Option<Reasoning>,
}

/// What a configuration says of a model's forms; unset is as its template shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FormSettings {
    /// Tool calls.
    pub tools: Option<FormChoice<Format>>,
    /// Reasoning.
    pub reasoning: Option<FormChoice<Reasoning>>,
}

/// A form that is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormChoice<T> {
    /// None: all is text.
    Off,
    /// This one.
    Is(T),
}

impl<T> FormChoice<T> {
    fn form(self) -> Option<T> {
        match self {
            Self::Off => None,
            Self::Is(form) => Some(form),
        }
    }
}

/// Everything the edge needs of a model.
#[derive(Debug)]
pub struct ModelAssets {
    /// Its files.
    pub files: Arc<ModelFiles>,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Messages to text, or why they cannot become text.
    pub chat_template: Result<ChatTemplate, TextError>,
    /// The tokens that end its output.
    pub eos_token_ids: Vec<u32>,
    /// The forms of reasoning and tool calls that its template shows.
    pub forms: ModelForms,
    /// Number of ids that are both the model's and the tokenizer's. Embeddings are often padded: their rows
    /// beyond the tokenizer are not tokens.
    pub vocabulary_size: u32,
    /// Says which tokenizer it is.
    pub tokenizer_hash: TokenizerHash,
}

/// The models under the configured roots, with the assets that were used last.
#[derive(Debug)]
pub struct ModelCatalog {
    roots: ModelRoots,
    forms: BTreeMap<ModelName, FormSettings>,
    assets: RevisionCache<Arc<ModelAssets>>,
    facts: RevisionCache<ModelFacts>,
}

impl ModelCatalog {
    /// Creates the catalog of the models under `roots`.
    #[must_use]
    pub fn new(roots: ModelRoots) -> Self {
        Self {
            roots,
            forms: BTreeMap::new(),
            assets: RevisionCache::new(ASSETS_CACHED_MAX),
            facts: RevisionCache::new(FACTS_CACHED_MAX),
        }
    }

    /// Changes the forms of some models from what their templates show.
    #[must_use]
    pub fn with_forms(self, forms: BTreeMap<ModelName, FormSettings>) -> Self {
        Self { forms, ..self }
    }

    /// Returns the assets of a model as its files are now.
    ///
    /// # Errors
    /// The model is unknown, or its files cannot be used.
    pub fn assets(&self, name: &ModelName) -> Result<Arc<ModelAssets>, Error> {
        let found = self.resolve(name)?;
        let known = self.assets.get(name, &found.revision);
        if let Some(known) = known.filter(|known| known.files.weights.check_unchanged().is_ok()) {
            return Ok(known);
        }
        let files = ModelFiles::read(&found).map_err(|error| found.error(error))?;
        self.facts.put(name.clone(), found.revision.clone(), files.facts.clone());
        let mut assets = ModelAssets::read(files)?;
        assets.forms = assets.forms.with(self.forms.get(name).copied().unwrap_or_default());
        let assets = Arc::new(assets);
        self.assets.put(name.clone(), found.revision, Arc::clone(&assets));
        Ok(assets)
    }

    /// Returns the facts of a model without making its tokenizer.
    ///
    /// # Errors
    /// Its files cannot be used.
    pub fn facts_of(&self, folder: &ModelFolder) -> Result<ModelFacts, Error> {
        let name = ModelName::from(folder.name.as_str());
        if let Some(known) = self.facts.get(&name, &folder.revision) {
            return Ok(known);
        }
        let facts = ModelFiles::read(folder).map_err(|error| folder.error(error))?.facts;
        self.facts.put(name, folder.revision.clone(), facts.clone());
        Ok(facts)
    }

    /// Returns the Hugging Face cache, where downloads go.
    #[must_use]
    pub fn hf_cache(&self) -> Option<&Path> {
        self.roots.hf_cache()
    }

    /// Lists every model that looks as if it could be loaded, by name.
    #[must_use]
    pub fn list(&self) -> Listed {
        self.roots.list()
    }

    /// Says what is wrong with the model roots themselves.
    #[must_use]
    pub fn root_problems(&self) -> Vec<String> {
        self.roots.problems()
    }

    /// Says what is wrong with the model roots and the models in them, for the log.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let models = self.list().into_iter().filter_map(|(name, found)| {
            let checked = found.map_err(|error| error.into_error(&name.as_str().into()));
            checked.and_then(|folder| self.facts_of(&folder)).err().map(|error| error.to_string())
        });
        self.root_problems().into_iter().chain(models).collect()
    }

    /// Finds the folder of a model.
    ///
    /// # Errors
    /// The model is unknown.
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

impl ModelForms {
    fn with(self, settings: FormSettings) -> Self {
        Self {
            tools: settings.tools.map_or(self.tools, FormChoice::form),
            reasoning: settings.reasoning.map_or(self.reasoning, FormChoice::form),
        }
    }

    /// Returns those that a template shows.
    fn of(template: &ChatTemplate) -> Self {
        let source = template.source();
        Self { tools: Format::of_template(source), reasoning: Reasoning::of_template(source) }
    }
}

impl ModelAssets {
    /// Makes tokenizer and template of a model whose other files have been read.
    fn read(files: ModelFiles) -> Result<Self, Error> {
        let name = &files.name;
        let unusable = |error: TextError| unusable(name, &error);
        let text = read_text_files(&files.folder).map_err(|error| error.into_error(name))?;
        let tokenizer = Tokenizer::new(&text).map_err(unusable)?;
        // Raw prompts need none, so a damaged one is a fault of chat only.
        let chat_template = ChatTemplate::new(&text, &tokenizer);
        let end_of_turn = chat_template.as_ref().ok().and_then(ChatTemplate::end_of_turn);
        let generation_config = files.generation_config.as_ref();
        let mut eos_token_ids = eos_token_ids(&files.config, generation_config, &tokenizer, end_of_turn);
        let vocabulary_size = files.facts.vocabulary_size.min(tokenizer.vocabulary_size());
        if vocabulary_size == 0 {
            let why = "tokenizer.json has no tokens".to_owned();
            return Err(Error::ModelInvalid { model: files.name.clone(), why });
        }
        // An id beyond can never be drawn.
        eos_token_ids.retain(|id| *id < vocabulary_size);
        let forms = chat_template.as_ref().map_or_else(|_| ModelForms::default(), ModelForms::of);
        Ok(Self {
            files: Arc::new(files),
            forms,
            tokenizer,
            chat_template,
            eos_token_ids,
            vocabulary_size,
            tokenizer_hash: hash(&text),
        })
    }

    /// Makes assets of a model that is on no disk.
    #[cfg(test)]
    pub(crate) fn fake(name: &str) -> Self {
        let tokenizer = br#"{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel",
            "vocab": {"?": 0}, "unk_token": "?"}}"#;
        let text = TextFiles { tokenizer: Some(tokenizer.to_vec()), ..TextFiles::default() };
        Self {
            files: Arc::new(ModelFiles::fake(name)),
            tokenizer: Tokenizer::new(&text).unwrap(),
            chat_template: Err(TextError::NoTemplate),
            eos_token_ids: Vec::new(),
            forms: ModelForms::default(),
            vocabulary_size: 0,
            tokenizer_hash: hash(&text),
        }
    }
}

fn hash(text: &TextFiles) -> TokenizerHash {
    TokenizerHash(Sha256::digest(text.tokenizer.as_deref().unwrap_or_default()).into())
}

fn unusable(model: &ModelName, error: &TextError) -> Error {
    match error {
        TextError::Unsupported { .. } => {
            Error::ModelUnsupported { model: model.clone(), why: error.to_string() }
        }
        TextError::Invalid { .. }
        | TextError::NoTemplate
        | TextError::Encode(_)
        | TextError::TooLong { .. }
        | TextError::Render(_)
        | TextError::NotContinued
        | TextError::Role { .. }
        | TextError::Tools { .. }
        | TextError::Argument { .. }
        | TextError::FixedArgument(_) => Error::ModelInvalid { model: model.clone(), why: error.to_string() },
    }
}
