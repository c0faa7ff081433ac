//! What a file carries besides the weights.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use mr_cli::say;
use mrt_format::{
    CHAT_TEMPLATE, CONVERSION_REPORT, Digest, GENERATION, NewSection, ORIGIN, ReportEntry, TOKEN_NAMES,
    TOKENIZER, report_file_name, report_from_bytes,
};
use mruntime::hf::{HfError, Qwen2Dir};
use mruntime_text::{SpecialTokenNames, TextError, Tokenizer, find_chat_template, prepack_tokenizer};
use serde_json::Value;

use crate::ConvertError;

/// How a file holds its tokenizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerKind {
    /// Not at all.
    None,
    /// Ready for use, and as tokenizer.json.
    Prepacked,
    /// As tokenizer.json only, for this reason.
    Json(String),
}

/// Names and contents, in the order in which they are written.
pub struct Sections {
    list: Vec<(String, Vec<u8>)>,
    /// How the tokenizer is stored.
    pub tokenizer: TokenizerKind,
}

impl Sections {
    /// Everything but the conversion report, which is known last and has `report_bytes` bytes.
    pub fn collect(
        model: &Qwen2Dir,
        origin: Option<&str>,
        report_bytes: usize,
    ) -> Result<Self, ConvertError> {
        let mut list = vec![
            (CONVERSION_REPORT.to_owned(), vec![0; report_bytes]),
            (GENERATION.to_owned(), model.generation.to_bytes(&model.config)?),
        ];
        let template =
            find_chat_template(model.file("chat_template.jinja"), model.file("tokenizer_config.json"))
                .map_err(|error| ConvertError::Template { dir: model.path.clone(), error })?;
        list.extend(template.map(|text| (CHAT_TEMPLATE.to_owned(), text.into_bytes())));
        let names =
            model.file("tokenizer_config.json").map(SpecialTokenNames::from_tokenizer_config).transpose();
        let names = names.map_err(|error| ConvertError::Template { dir: model.path.clone(), error })?;
        list.extend(names.and_then(|names| names.to_section()).map(|bytes| (TOKEN_NAMES.to_owned(), bytes)));
        let tokenizer = match model.file("tokenizer.json") {
            None => TokenizerKind::None,
            Some(json) => {
                let (section, kind) = tokenizer(model, json)?;
                list.extend(section.map(|bytes| (TOKENIZER.to_owned(), bytes)));
                kind
            }
        };
        let origin = match origin {
            Some(line) => origin_line(line),
            None => unpacked_origin(model)?,
        };
        let origin = with_licence(origin, model.licence.as_deref());
        list.extend((!origin.is_empty()).then(|| (ORIGIN.to_owned(), origin.into_bytes())));
        list.extend(model.files.iter().map(|file| (file.name.clone(), file.bytes.clone())));
        Ok(Sections { list, tokenizer })
    }

    /// Names and lengths.
    pub fn planned(&self) -> Vec<NewSection<'_>> {
        self.list.iter().map(|(name, bytes)| NewSection { name, bytes: bytes.len() as u64 }).collect()
    }

    /// Puts the conversion report into its place.
    pub fn set_report(&mut self, bytes: Vec<u8>) {
        self.list[0].1 = bytes;
    }

    /// Contents, in order.
    pub fn contents(&self) -> Vec<&[u8]> {
        self.list.iter().map(|(_, bytes)| bytes.as_slice()).collect()
    }
}

/// The tokenizer's section, if it can be prepacked, and how the file holds it.
fn tokenizer(model: &Qwen2Dir, json: &[u8]) -> Result<(Option<Vec<u8>>, TokenizerKind), HfError> {
    let refused = |reason: String| HfError::Invalid {
        path: model.path.join("tokenizer.json"),
        problem: format!(
            "{reason}; put the model's own in its place, or remove it and the file will take token ids, not text"
        ),
    };
    let unusable = |error| match error {
        TextError::Tokenizer(reason) => refused(reason),
        other => refused(other.to_string()),
    };
    let (section, kind) = match prepack_tokenizer(json) {
        Ok(section) => (Some(section), TokenizerKind::Prepacked),
        Err(reason @ TextError::CannotPrepack(_)) => (None, TokenizerKind::Json(reason.to_string())),
        Err(error) => return Err(unusable(error)),
    };
    let tokenizer = match &section {
        Some(section) => Tokenizer::from_section(section.as_slice()),
        None => Tokenizer::from_json(json),
    };
    let tokenizer = tokenizer.map_err(unusable)?;
    // Fewer are usual: the vocabulary is padded.
    let (ids, vocab_size) = (tokenizer.vocab_size(), model.config.vocab_size);
    if ids > vocab_size as usize {
        let highest = ids - 1;
        return Err(refused(format!(
            "has token ids up to {highest}, but vocab_size of config.json is {vocab_size}: it is another model's"
        )));
    }
    let missing = missing_tokens(model.file("tokenizer_config.json").unwrap_or(b"{}"), &tokenizer);
    if !missing.is_empty() {
        let listed: Vec<_> = missing.iter().take(LISTED).map(|token| format!("{token:?}")).collect();
        let more = match missing.len().saturating_sub(LISTED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        say(format_args!(
            "note: tokenizer_config.json has tokens that tokenizer.json lacks; here they are text like any other: {}{more}",
            listed.join(", ")
        ));
    }
    Ok((section, kind))
}

/// Tokens that a note names.
const LISTED: usize = 10;

/// The tokens that a tokenizer_config.json declares and the tokenizer does not look for in a text; transformers adds them
/// when it loads the two.
fn missing_tokens(config: &[u8], tokenizer: &Tokenizer) -> Vec<String> {
    let config: Value = serde_json::from_slice(config).unwrap_or_default();
    let numbered = config["added_tokens_decoder"].as_object().into_iter().flat_map(|tokens| tokens.values());
    let named = config.as_object().into_iter().flatten();
    let named = named.filter(|(name, _)| name.ends_with("_token")).map(|(_, token)| token);
    let listed = config["additional_special_tokens"].as_array().into_iter().flatten();
    let mut seen = HashSet::new();
    let texts = numbered.chain(named).chain(listed);
    let texts = texts.filter_map(|token| token.as_str().or_else(|| token["content"].as_str()));
    texts
        .filter(|&text| !text.is_empty() && seen.insert(text) && tokenizer.token_id(text).is_none())
        .map(str::to_owned)
        .collect()
}

/// The files that `model` is converted from, and reports of earlier conversions beside them: no output may replace them.
pub fn sources(model: &Qwen2Dir) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(&model.path).into_iter().flatten().flatten();
    let reports = entries
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(CONVERSION_REPORT.as_bytes()))
        .map(|entry| entry.path());
    model.paths().chain([model.path.join(ORIGIN)]).chain(reports)
}

/// The report of these weights' first conversion, if `mrt unpack` has left it in the directory: that they have become
/// FP16 is long past, and nothing changes any more.
pub fn first_report(model: &Qwen2Dir, arena: &Digest) -> Result<Option<Vec<ReportEntry>>, ConvertError> {
    let name = report_file_name(arena);
    let Some(bytes) = read(model, &name)? else { return Ok(None) };
    let report = report_from_bytes(&model.config, &bytes).map_err(|e| HfError::Invalid {
        path: model.path.join(&name),
        problem: format!("{e}; remove the file, or unpack the model again"),
    })?;
    Ok(Some(report))
}

/// What the file `origin` of a directory says, which `mrt unpack` has made.
fn unpacked_origin(model: &Qwen2Dir) -> Result<String, ConvertError> {
    let text = String::from_utf8(read(model, ORIGIN)?.unwrap_or_default()).map_err(|_| HfError::Invalid {
        path: model.path.join(ORIGIN),
        problem: "is not UTF-8; write where the model is from as text, or remove the file".into(),
    })?;
    Ok(if text.trim().is_empty() || text.ends_with('\n') { text } else { text + "\n" })
}

/// The file `name` of the directory.
fn read(model: &Qwen2Dir, name: &str) -> Result<Option<Vec<u8>>, ConvertError> {
    let path = model.path.join(name);
    let read = || -> io::Result<Option<Vec<u8>>> {
        if !path.is_file() {
            return Ok(None);
        }
        // One byte more than a section may have, so that a longer file is refused.
        let mut bytes = Vec::new();
        File::open(&path)?.take(mrt_format::MAX_SECTION_BYTES + 1).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    };
    read().map_err(|source| HfError::Io { path: path.clone(), source }.into())
}

/// A line `origin: text` for what the converting person says; empty if they say nothing.
fn origin_line(text: &str) -> String {
    let words: Vec<_> = text.split_whitespace().collect();
    if words.is_empty() { String::new() } else { format!("origin: {}\n", words.join(" ")) }
}

/// Lines of `key: value`: `origin`, and the licence if it does not say one.
fn with_licence(origin: String, licence: Option<&str>) -> String {
    let origin = if origin.trim().is_empty() { String::new() } else { origin };
    match licence {
        Some(id) if !origin.lines().any(|line| line.starts_with("license: ")) => {
            format!("{origin}license: {id}\n")
        }
        _ => origin,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origin_has_a_line_for_each_thing_known() {
        let origin = |text, licence| with_licence(origin_line(text), licence);
        assert_eq!(origin("", None), "");
        assert_eq!(origin(" \n", None), "");
        assert_eq!(origin("a\nlicense: mit", None), "origin: a license: mit\n");
        assert_eq!(origin(" https://a.example/b \n", None), "origin: https://a.example/b\n");
        assert_eq!(origin("here", Some("mit")), "origin: here\nlicense: mit\n");
        assert_eq!(with_licence("license: gpl\n".into(), Some("mit")), "license: gpl\n");
        assert_eq!(with_licence("\n".into(), Some("mit")), "license: mit\n");
    }
}
