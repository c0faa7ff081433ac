//! What a chat needs from tokenizer_config.json: the template and the names of special tokens.

use std::collections::BTreeMap;

use mrt_format::TOKEN_NAMES;
use serde_json::Value;

use crate::TextError;

/// The name of a list of tokens.
const ADDITIONAL: &str = "additional_special_tokens";

/// Special tokens by the names that templates know them by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokenNames {
    /// `bos_token`, `eos_token`, ... -> the token's text. Those that the model lacks are not in it.
    by_name: BTreeMap<String, String>,
    /// `additional_special_tokens`.
    pub(crate) additional: Vec<String>,
}

impl SpecialTokenNames {
    /// Reads them from the contents of a tokenizer_config.json: every `..._token` that is a string or an object with
    /// `content`.
    ///
    /// # Errors
    ///
    /// [`TextError::Config`] if it is not a JSON object.
    pub fn from_tokenizer_config(json: &[u8]) -> Result<SpecialTokenNames, TextError> {
        let config = parse_tokenizer_config(json)?;
        let by_name = config
            .iter()
            .filter(|(name, _)| name.ends_with("_token"))
            .filter_map(|(name, value)| Some((name.clone(), token_text(value)?)))
            .collect();
        let additional = match config.get(ADDITIONAL) {
            Some(Value::Array(tokens)) => tokens.iter().filter_map(token_text).collect(),
            _ => Vec::new(),
        };
        Ok(SpecialTokenNames { by_name, additional })
    }

    /// Reads them from the section `token_names` of a model file.
    ///
    /// # Errors
    ///
    /// [`TextError::Config`] if it is not what [`to_section`](Self::to_section) gives.
    pub fn from_section(content: &[u8]) -> Result<SpecialTokenNames, TextError> {
        let error = |message: &str| TextError::Config { file: TOKEN_NAMES, message: message.to_owned() };
        let mut names = SpecialTokenNames::default();
        let text = std::str::from_utf8(content).map_err(|_| error("it is not UTF-8"))?;
        let mut strings = text.split_terminator('\0');
        while let Some(name) = strings.next() {
            let text = strings.next().ok_or_else(|| error("the last name has no text"))?.to_owned();
            if name == ADDITIONAL {
                names.additional.push(text);
            } else {
                names.by_name.insert(name.to_owned(), text);
            }
        }
        Ok(names)
    }

    /// The content of the section `token_names`; `None` if there are no names, or one holds a zero byte.
    pub fn to_section(&self) -> Option<Vec<u8>> {
        let additional = self.additional.iter().map(|text| (ADDITIONAL, text.as_str()));
        let strings: Vec<_> = self.iter().chain(additional).flat_map(|(name, text)| [name, text]).collect();
        if strings.is_empty() || strings.iter().any(|text| text.contains('\0')) {
            return None;
        }
        Some(strings.iter().flat_map(|text| text.bytes().chain([0])).collect())
    }

    /// The text of a token by its name, such as `eos_token`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.by_name.get(name).map(String::as_str)
    }

    /// (name, text) of each.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.by_name.iter().map(|(name, text)| (name.as_str(), text.as_str()))
    }
}

/// Finds a model's chat template: chat_template.jinja if there is one, else `chat_template` of tokenizer_config.json,
/// which is a string or a list of `{name, template}`, of which the one named `default` is taken.
///
/// The arguments are the contents of the two files. `None` if the model has no template.
///
/// # Errors
///
/// [`TextError::Config`] if a file is not UTF-8 or not JSON, or the field is something else.
pub fn find_chat_template(
    chat_template_jinja: Option<&[u8]>,
    tokenizer_config: Option<&[u8]>,
) -> Result<Option<String>, TextError> {
    if let Some(bytes) = chat_template_jinja {
        let text = std::str::from_utf8(bytes)
            .map_err(|e| TextError::Config { file: "chat_template.jinja", message: e.to_string() })?;
        return Ok(Some(text.to_owned()));
    }
    let Some(json) = tokenizer_config else { return Ok(None) };
    match parse_tokenizer_config(json)?.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(templates)) => templates
            .iter()
            .find(|t| t["name"] == "default")
            .and_then(|t| t["template"].as_str())
            .map(|template| Some(template.to_owned()))
            .ok_or_else(|| config_error("chat_template is a list without a template named \"default\"")),
        Some(_) => Err(config_error("chat_template is neither a string nor a list of templates")),
    }
}

fn parse_tokenizer_config(json: &[u8]) -> Result<serde_json::Map<String, Value>, TextError> {
    serde_json::from_slice(json).map_err(config_error)
}

fn config_error(message: impl ToString) -> TextError {
    TextError::Config { file: "tokenizer_config.json", message: message.to_string() }
}

/// A token is written as its text, or as an object that has the text in `content`.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(config: &str) -> Result<Option<String>, String> {
        find_chat_template(None, Some(config.as_bytes())).map_err(|e| e.to_string())
    }

    #[test]
    fn the_template_of_the_config() {
        assert_eq!(template("{}"), Ok(None));
        assert_eq!(template(r#"{"chat_template": null}"#), Ok(None));
        assert_eq!(template(r#"{"chat_template": "a"}"#), Ok(Some("a".to_owned())));
        let list =
            r#"{"chat_template": [{"name": "rag", "template": "b"}, {"name": "default", "template": "a"}]}"#;
        assert_eq!(template(list), Ok(Some("a".to_owned())));
        assert_eq!(
            template(r#"{"chat_template": [{"name": "rag", "template": "b"}]}"#).unwrap_err(),
            "tokenizer_config.json: chat_template is a list without a template named \"default\""
        );
        assert_eq!(
            template(r#"{"chat_template": 1}"#).unwrap_err(),
            "tokenizer_config.json: chat_template is neither a string nor a list of templates"
        );
        assert!(template("{").unwrap_err().starts_with("tokenizer_config.json: EOF"));
    }

    #[test]
    fn the_template_file_comes_first() {
        let config = br#"{"chat_template": "config"}"#;
        assert_eq!(find_chat_template(Some(b"file"), Some(config)).unwrap().as_deref(), Some("file"));
        assert_eq!(find_chat_template(None, None).unwrap(), None);
        assert!(
            find_chat_template(Some(b"\xFF"), None)
                .unwrap_err()
                .to_string()
                .starts_with("chat_template.jinja: ")
        );
    }

    #[test]
    fn special_tokens_are_strings_or_objects() {
        let names = SpecialTokenNames::from_tokenizer_config(
            br#"{"add_bos_token": true, "bos_token": null, "eos_token": {"content": "</s>", "special": true},
                "pad_token": "<pad>", "additional_special_tokens": ["<a>", {"content": "<b>"}]}"#,
        )
        .unwrap();
        assert_eq!(names.get("eos_token"), Some("</s>"));
        assert_eq!(names.get("pad_token"), Some("<pad>"));
        assert_eq!(names.get("bos_token"), None);
        assert_eq!(names.iter().count(), 2);
        assert_eq!(names.additional, ["<a>", "<b>"]);
        assert!(SpecialTokenNames::from_tokenizer_config(b"[]").is_err());
    }

    #[test]
    fn names_as_a_section() {
        let names = SpecialTokenNames::from_tokenizer_config(
            br#"{"eos_token": "</s>", "bos_token": "", "additional_special_tokens": ["<a>", "", "<b>"]}"#,
        )
        .unwrap();
        let section = names.to_section().unwrap();
        assert_eq!(
            section,
            b"bos_token\0\0eos_token\0</s>\0additional_special_tokens\0<a>\0additional_special_tokens\0\0additional_special_tokens\0<b>\0"
        );
        assert_eq!(SpecialTokenNames::from_section(&section).unwrap(), names);

        assert_eq!(SpecialTokenNames::default().to_section(), None);
        let zero = SpecialTokenNames::from_tokenizer_config(br#"{"eos_token": "\u0000"}"#).unwrap();
        assert_eq!(zero.to_section(), None);
        let error = |bytes: &[u8]| SpecialTokenNames::from_section(bytes).unwrap_err().to_string();
        assert_eq!(error(b"eos_token\0"), "token_names: the last name has no text");
        assert_eq!(error(b"\xff"), "token_names: it is not UTF-8");
    }
}
