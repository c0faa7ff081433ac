//! A model from a `.mrt` file or a Hugging Face directory, with the same view of both.

use std::path::PathBuf;

use clap::Args;
use mrt_format::{CHAT_TEMPLATE, GenerationDefaults, TOKEN_NAMES};
use mruntime::hf::{Qwen2Dir, qwen2_load_weights};
use mruntime::{Arena, Backing, Model, OpenOptions, Pool, Prefault, Qwen2Config, Qwen2Weights, Verify};
use mruntime_text::{ChatTemplate, SpecialTokenNames, TextError, Tokenizer, find_chat_template};

use crate::Result;
use crate::progress::spinner;

/// Which model.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub struct ModelSource {
    /// Model file
    #[arg(short, long, value_name = "FILE.mrt")]
    model: Option<PathBuf>,
    /// Hugging Face directory; its weights are packed into memory at every start
    #[arg(long, value_name = "DIR")]
    model_dir: Option<PathBuf>,
}

/// A model, ready to run.
pub struct LoadedModel {
    path: PathBuf,
    weights: Weights,
}

enum Weights {
    File(Model),
    Dir { dir: Qwen2Dir, arena: Arena },
}

/// A chat template with what it takes to compile it.
pub struct TemplateSource {
    /// The model that it is of, for messages.
    pub path: PathBuf,
    /// What is to be compiled.
    pub text: String,
    /// Special tokens by the names that it knows them by.
    pub names: SpecialTokenNames,
}

impl TemplateSource {
    /// The template, ready to render.
    ///
    /// # Errors
    /// When it is not valid.
    pub fn compile(&self) -> Result<ChatTemplate> {
        let template = ChatTemplate::new(&self.text, &self.names);
        template.map_err(|e| format!("{}: {e}", self.path.display()).into())
    }
}

impl ModelSource {
    /// The model file at `path`.
    pub fn file(path: PathBuf) -> ModelSource {
        ModelSource { model: Some(path), model_dir: None }
    }

    /// Opens the model. A directory has no options.
    ///
    /// # Errors
    /// What is wrong with the file or directory, with its path.
    pub fn open(&self, options: &OpenOptions, pool: &mut Pool) -> Result<LoadedModel> {
        let (path, weights) = match (&self.model, &self.model_dir) {
            (Some(path), _) => {
                let quick = options.verify == Verify::Header
                    && options.backing == Backing::Map
                    && options.prefault != Prefault::AtOpen;
                let _spinner = (!quick).then(|| spinner(format!("reading {}", path.display())));
                (path, Weights::File(Model::open(path, options, pool)?))
            }
            (None, Some(path)) => {
                let dir = Qwen2Dir::open(path)?;
                let _spinner = spinner(format!("packing the weights of {}", path.display()));
                let arena = qwen2_load_weights(&dir, pool)?;
                (path, Weights::Dir { dir, arena })
            }
            (None, None) => return Err("no model: give --model or --model-dir".into()),
        };
        Ok(LoadedModel { path: path.clone(), weights })
    }
}

impl LoadedModel {
    /// The name of the file or directory, without where it is.
    pub fn name(&self) -> String {
        let path = self.path.canonicalize();
        let name = path.as_deref().unwrap_or(&self.path).file_name();
        name.unwrap_or(self.path.as_os_str()).to_string_lossy().into_owned()
    }

    /// The files that it is read from, which no output may replace.
    pub fn paths(&self) -> Vec<PathBuf> {
        match &self.weights {
            Weights::File(_) => vec![self.path.clone()],
            Weights::Dir { dir, .. } => dir.paths().collect(),
        }
    }

    /// The model's shape and constants.
    pub fn config(&self) -> &Qwen2Config {
        match &self.weights {
            Weights::File(model) => model.config(),
            Weights::Dir { dir, .. } => &dir.config,
        }
    }

    /// The weight arena.
    pub fn arena(&self) -> &[u8] {
        match &self.weights {
            Weights::File(model) => model.arena(),
            Weights::Dir { arena, .. } => arena.bytes(),
        }
    }

    /// Where the weights live.
    pub fn backing(&self) -> &'static str {
        match &self.weights {
            Weights::File(model) if model.backing() == Some(Backing::Map) => "mapped",
            Weights::File(_) => "read",
            Weights::Dir { .. } => "packed",
        }
    }

    /// The weights in the arena.
    pub fn weights(&self) -> Qwen2Weights<'_> {
        Qwen2Weights::from_arena(self.config(), self.arena()).expect("an arena that was made for the config")
    }

    /// How the makers of the model want it sampled.
    ///
    /// # Errors
    /// When the file's section is damaged.
    pub fn generation(&self) -> Result<GenerationDefaults> {
        match &self.weights {
            Weights::File(model) => Ok(model.generation()?),
            Weights::Dir { dir, .. } => Ok(dir.generation.clone()),
        }
    }

    /// Whether there is a tokenizer.
    pub fn has_tokenizer(&self) -> bool {
        match &self.weights {
            Weights::File(model) => model.prologue().section("tokenizer.json").is_some(),
            Weights::Dir { dir, .. } => dir.file("tokenizer.json").is_some(),
        }
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// When the model has none, or a damaged one.
    pub fn tokenizer(&self) -> Result<Tokenizer<'_>> {
        let tokenizer = match &self.weights {
            Weights::File(model) => Tokenizer::from_model(model),
            Weights::Dir { dir, .. } => {
                dir.file("tokenizer.json").ok_or(TextError::NoTokenizer).and_then(Tokenizer::from_json)
            }
        };
        tokenizer.map_err(|e| match e {
            TextError::Model(error) => error.into(),
            _ => self.error(e),
        })
    }

    /// The chat template, not compiled yet; `None` if the model has none.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn chat_template(&self) -> Result<Option<TemplateSource>> {
        let (names, source) = match &self.weights {
            // Conversion makes both sections of their own, so that no JSON is read here.
            Weights::File(model) => {
                let names = model.section(TOKEN_NAMES)?;
                let names = names.map(|content| SpecialTokenNames::from_section(&content)).transpose();
                let template = model.section(CHAT_TEMPLATE)?;
                (names.map(Option::unwrap_or_default), find_chat_template(template.as_deref(), None))
            }
            Weights::Dir { dir, .. } => {
                let config = dir.file("tokenizer_config.json");
                let names = config.map(SpecialTokenNames::from_tokenizer_config).transpose();
                (
                    names.map(Option::unwrap_or_default),
                    find_chat_template(dir.file("chat_template.jinja"), config),
                )
            }
        };
        let (names, source) = (names.map_err(|e| self.error(e))?, source.map_err(|e| self.error(e))?);
        Ok(source.map(|text| TemplateSource { path: self.path.clone(), text, names }))
    }

    fn error(&self, problem: impl std::fmt::Display) -> Box<dyn std::error::Error> {
        format!("{}: {problem}", self.path.display()).into()
    }
}
