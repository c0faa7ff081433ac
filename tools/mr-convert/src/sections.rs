//! What a file carries besides the weights.

use mrt_format::{CHAT_TEMPLATE, CONVERSION_REPORT, GENERATION, NewSection, ORIGIN};
use mruntime::hf::Qwen2Dir;
use mruntime_text::find_chat_template;

use crate::ConvertError;

/// Names and contents, in the order in which they are written.
pub struct Sections {
    list: Vec<(String, Vec<u8>)>,
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
        list.extend(
            origin_text(origin, model.licence.as_deref()).map(|text| (ORIGIN.to_owned(), text.into_bytes())),
        );
        list.extend(model.files.iter().map(|file| (file.name.clone(), file.bytes.clone())));
        Ok(Sections { list })
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
