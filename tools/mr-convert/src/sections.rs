//! What a file carries besides the weights.

use std::fs::File;
use std::io::{self, Read};

use mrt_format::{
    CHAT_TEMPLATE, CONVERSION_REPORT, GENERATION, NewSection, ORIGIN, ReportEntry, SourceDtype, TOKEN_NAMES,
    TOKENIZER, TensorSource, qwen2_source_count, report_from_bytes,
};
use mruntime::hf::{HfError, Qwen2Dir};
use mruntime_text::{SpecialTokenNames, find_chat_template, prepack_tokenizer};

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
        let tokenizer = match model.file("tokenizer.json").map(prepack_tokenizer) {
            None => TokenizerKind::None,
            Some(Ok(bytes)) => {
                list.push((TOKENIZER.to_owned(), bytes));
                TokenizerKind::Prepacked
            }
            Some(Err(reason)) => TokenizerKind::Json(reason.to_string()),
        };
        let origin = match origin {
            None => unpacked(model, ORIGIN)?,
            Some(_) => None,
        }
        .or(origin_text(origin, model.licence.as_deref()).map(String::into_bytes));
        list.extend(origin.map(|text| (ORIGIN.to_owned(), text)));
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

/// The conversion report of a directory that `mrt unpack` has made, which is still that of the model's first
/// conversion: the second one, from FP16, changes nothing. `None` for other directories.
pub fn unpacked_report(model: &Qwen2Dir) -> Result<Option<Vec<ReportEntry>>, ConvertError> {
    let sources = qwen2_source_count(&model.config);
    if (0..sources).any(|index| model.weights.dtype(index) != SourceDtype::F16) {
        return Ok(None);
    }
    let Some(bytes) = unpacked(model, CONVERSION_REPORT)? else { return Ok(None) };
    let report = report_from_bytes(&model.config, &bytes).map_err(|e| HfError::Invalid {
        path: model.path.join(CONVERSION_REPORT),
        problem: format!("{e}; remove the file, or unpack the model again"),
    })?;
    Ok(Some(report))
}

/// The file `name` of a directory that `mrt unpack` has made.
fn unpacked(model: &Qwen2Dir, name: &str) -> Result<Option<Vec<u8>>, ConvertError> {
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

/// Lines of `key: value`: where the model is from, in the converting person's words, and its licence.
fn origin_text(origin: Option<&str>, licence: Option<&str>) -> Option<String> {
    let origin = origin.map(|text| text.split_whitespace().collect::<Vec<_>>().join(" "));
    let origin = origin.filter(|text| !text.is_empty()).map(|text| format!("origin: {text}\n"));
    let licence = licence.map(|id| format!("license: {id}\n"));
    let text = [origin, licence].into_iter().flatten().collect::<String>();
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origin_has_a_line_for_each_thing_known() {
        assert_eq!(origin_text(None, None), None);
        assert_eq!(origin_text(Some(" \n"), None), None);
        assert_eq!(origin_text(Some("a\nlicense: mit"), None).as_deref(), Some("origin: a license: mit\n"));
        assert_eq!(
            origin_text(Some(" https://a.example/b \n"), None).as_deref(),
            Some("origin: https://a.example/b\n")
        );
        assert_eq!(origin_text(Some("here"), Some("mit")).as_deref(), Some("origin: here\nlicense: mit\n"));
    }
}
