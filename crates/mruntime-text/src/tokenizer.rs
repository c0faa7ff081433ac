//! Text to token ids and back.

use std::borrow::Cow;

use mrt_format::{TOKENIZER, TokenizerSection};
use mruntime::Model;

#[cfg(feature = "json")]
use crate::json::JsonTokenizer;
use crate::{TextError, prepacked};

/// What becomes of special and other added tokens (`<|im_end|>`, `<tool_call>`) that stand in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// They become their token: for text that a chat template wrote.
    Parse,
    /// They are text like any other: for text that nobody vouches for.
    AsText,
}

/// A tokenizer with byte-level BPE, as every Qwen2 model has.
///
/// Most model files hold it prepacked: it is used where it lies, and making this value takes no time. What `mr-convert`
/// could not prepack is read from the file's tokenizer.json and run by the `tokenizers` library, if the feature `json`
/// is on. Both give the same tokens.
pub struct Tokenizer<'a>(Backend<'a>);

enum Backend<'a> {
    /// Content of a `tokenizer` section that [`TokenizerSection::new`] has accepted.
    Prepacked(Cow<'a, [u8]>),
    #[cfg(feature = "json")]
    Json(Box<JsonTokenizer>),
}

impl<'a> Tokenizer<'a> {
    /// The tokenizer of a model file.
    ///
    /// # Errors
    ///
    /// [`TextError::Model`] if its section is damaged; [`TextError::NoTokenizer`] if the file has none;
    /// [`TextError::NotPrepacked`] if it has a tokenizer.json only and the feature `json` is off; else as
    /// [`from_section`](Self::from_section) or `from_json`.
    pub fn from_model(model: &'a Model) -> Result<Tokenizer<'a>, TextError> {
        if let Some(content) = model.section(TOKENIZER)? {
            return Tokenizer::from_section(content);
        }
        match model.section("tokenizer.json")? {
            #[cfg(feature = "json")]
            Some(json) => Tokenizer::from_json(&json),
            #[cfg(not(feature = "json"))]
            Some(_) => Err(TextError::NotPrepacked),
            None => Err(TextError::NoTokenizer),
        }
    }

    /// A prepacked tokenizer: the content of a model file's section `tokenizer`, whose digest was checked.
    ///
    /// # Errors
    ///
    /// [`TextError::Prepacked`] if its header is not valid.
    pub fn from_section(content: impl Into<Cow<'a, [u8]>>) -> Result<Tokenizer<'a>, TextError> {
        let content = content.into();
        TokenizerSection::new(&content)?;
        Ok(Tokenizer(Backend::Prepacked(content)))
    }

    /// Reads the contents of a tokenizer.json.
    ///
    /// The `tokenizers` library panics on some broken ones. That becomes an error, here and in [`encode`](Self::encode),
    /// if the program is built with `panic = "unwind"`; with `"abort"` it ends the process. What the process's panic hook
    /// prints then can be kept back with [`silence_caught_panics`](crate::silence_caught_panics).
    ///
    /// # Errors
    ///
    /// [`TextError::Tokenizer`] if it is not a valid tokenizer.json, an id is 16,776,704 or more, its model is not BPE or
    /// its decoder not `ByteLevel`, or it has steps that can make a text longer without bound (normalisers other than
    /// Unicode's, lower case and stripping; `Metaspace`; `ByteLevel` twice).
    #[cfg(feature = "json")]
    pub fn from_json(json: &[u8]) -> Result<Tokenizer<'static>, TextError> {
        Ok(Tokenizer(Backend::Json(Box::new(JsonTokenizer::new(json)?))))
    }

    /// Whether it is used as it lies in the model file.
    pub fn is_prepacked(&self) -> bool {
        matches!(self.0, Backend::Prepacked(_))
    }

    /// Token ids of a text. Adds no beginning or end token.
    ///
    /// # Errors
    ///
    /// Of a prepacked tokenizer, none. Else [`TextError::Encode`] if more than 500,000 characters of white space stand
    /// together, or the library's own steps fail.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, TextError> {
        match &self.0 {
            Backend::Prepacked(content) => Ok(prepacked::encode(&section(content), text, special)),
            #[cfg(feature = "json")]
            Backend::Json(json) => json.encode(text, special),
        }
    }

    /// The text of token ids. Bytes that are not UTF-8 become U+FFFD; ids outside the vocabulary become nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            self.append_bytes(id, skip_special, &mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Appends the bytes of one token, which need not be whole characters.
    pub(crate) fn append_bytes(&self, id: u32, skip_special: bool, out: &mut Vec<u8>) {
        match &self.0 {
            Backend::Prepacked(content) => prepacked::append_bytes(&section(content), id, skip_special, out),
            #[cfg(feature = "json")]
            Backend::Json(json) => json.append_bytes(id, skip_special, out),
        }
    }

    /// One more than the highest id. A model's vocabulary is often larger: padded, without a meaning.
    pub fn vocab_size(&self) -> usize {
        match &self.0 {
            Backend::Prepacked(content) => section(content).token_count() as usize,
            #[cfg(feature = "json")]
            Backend::Json(json) => json.token_count() as usize,
        }
    }

    /// Id of a special or other added token, such as `<|im_end|>`.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        match &self.0 {
            Backend::Prepacked(content) => {
                let section = section(content);
                let mut added = section.added().iter().chain(section.normalized_added().iter());
                added.find(|token| token.text == text.as_bytes()).map(|token| token.id)
            }
            #[cfg(feature = "json")]
            Backend::Json(json) => json.token_id(text),
        }
    }

    /// Whether an id is a special token, one that `skip_special` leaves out of decoded text.
    pub fn is_special(&self, id: u32) -> bool {
        match &self.0 {
            Backend::Prepacked(content) => section(content).is_special(id),
            #[cfg(feature = "json")]
            Backend::Json(json) => json.is_special(id),
        }
    }
}

fn section(content: &[u8]) -> TokenizerSection<'_> {
    TokenizerSection::new(content).expect("from_section has accepted it")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn special_tokens_are_parsed_or_text() {
        for tokenizer in testing::tokenizers() {
            let end = tokenizer.token_id("<|end|>").unwrap();
            assert!(tokenizer.is_special(end));
            assert_eq!(tokenizer.encode("hi<|end|>", SpecialTokens::Parse).unwrap(), [testing::HI, end]);

            let ids = tokenizer.encode("hi<|end|>", SpecialTokens::AsText).unwrap();
            assert_eq!(ids[0], testing::HI);
            assert!(!ids.contains(&end));
            assert_eq!(tokenizer.decode(&ids, true), "hi<|end|>");
        }
    }

    #[test]
    fn decode_replaces_broken_utf8_and_ignores_unknown_ids() {
        for tokenizer in testing::tokenizers() {
            assert_eq!(tokenizer.vocab_size(), testing::VOCAB);
            assert_eq!(tokenizer.token_id("nothing"), None);
            let [a, b] = [testing::byte(0xC3), testing::byte(0xA9)];
            assert_eq!(tokenizer.decode(&[a, b, a, testing::HI, 9999], false), "é\u{FFFD}hi");
        }
    }

    #[test]
    fn an_added_token_outside_the_alphabet_is_plain_text() {
        for tokenizer in testing::tokenizers() {
            let id = tokenizer.token_id("<a b>").unwrap();
            assert!(!tokenizer.is_special(id));
            assert_eq!(tokenizer.decode(&[id], true), "<a b>");
        }
    }

    #[test]
    fn a_section_that_is_none_is_refused() {
        let error = Tokenizer::from_section(&b"no"[..]).err().unwrap().to_string();
        assert_eq!(error, "tokenizer: bytes is 2, must be at least 64; convert the model again");
    }
}
