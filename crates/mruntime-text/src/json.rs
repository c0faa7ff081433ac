//! A tokenizer.json, run by the `tokenizers` library.

use tokenizers::DecoderWrapper;
use tokenizers::tokenizer::{AddedVocabulary, Model, OffsetType, PreTokenizer};

use crate::{SpecialTokens, TextError};

/// The longest run of white space, in characters, that a text may hold.
///
/// The regex engine that splits texts into words remembers every character of a run, a million at most; past that it
/// stops without a word, and the rest of the text would get wrong tokens.
const MAX_WHITE_SPACE_RUN: usize = 500_000;

/// A Hugging Face tokenizer with byte-level BPE.
pub(crate) struct JsonTokenizer {
    pub(crate) library: tokenizers::Tokenizer,
    no_added_tokens: AddedVocabulary,
}

impl JsonTokenizer {
    pub(crate) fn new(json: &[u8]) -> Result<JsonTokenizer, TextError> {
        let library =
            without_panic(|| tokenizers::Tokenizer::from_bytes(json)).map_err(TextError::Tokenizer)?;
        if !matches!(library.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Err(TextError::Tokenizer(
                "the decoder is not ByteLevel: only byte-level BPE, the tokenizer of Qwen2 models, is supported"
                    .into(),
            ));
        }
        Ok(JsonTokenizer { library, no_added_tokens: AddedVocabulary::new() })
    }

    pub(crate) fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, TextError> {
        if text.split(|c: char| !c.is_whitespace()).any(|run| run.chars().nth(MAX_WHITE_SPACE_RUN).is_some())
        {
            let message = format!("more than {MAX_WHITE_SPACE_RUN} characters of white space stand together");
            return Err(TextError::Encode(message));
        }
        let added = match special {
            SpecialTokens::Parse => self.library.get_added_vocabulary(),
            SpecialTokens::AsText => &self.no_added_tokens,
        };
        // The library's own steps of encoding, spelled out to choose the added tokens for each text.
        let encoding = without_panic(|| {
            let mut pieces = added.extract_and_normalize(self.library.get_normalizer(), text);
            if let Some(pre_tokenizer) = self.library.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut pieces)?;
            }
            self.library.get_model().tokenize_in_pretokenized(&mut pieces, None)?;
            pieces.into_encoding(None, 0, OffsetType::None)
        });
        Ok(encoding.map_err(TextError::Encode)?.get_ids().to_vec())
    }

    pub(crate) fn append_bytes(&self, id: u32, skip_special: bool, out: &mut Vec<u8>) {
        if !(skip_special && self.is_special(id))
            && let Some(token) = self.library.id_to_token(id)
        {
            out.extend(token_bytes(&token));
        }
    }

    pub(crate) fn token_count(&self) -> u32 {
        self.library.get_vocab(true).values().max().map_or(0, |id| id + 1)
    }

    pub(crate) fn token_id(&self, text: &str) -> Option<u32> {
        self.library.get_added_vocabulary().get_vocab().get(text).copied()
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.library.get_added_vocabulary().get_added_tokens_decoder().get(&id).is_some_and(|t| t.special)
    }
}

/// Runs a part of the tokenizers library. It panics on some broken tokenizer.json files, at loading or at encoding.
fn without_panic<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => {
            Err("the tokenizers library panicked: tokenizer.json is broken or not a Qwen2 model's".to_owned())
        }
    }
}

/// The bytes of a token as tokenizer.json writes it: one for each character, or, if a character stands for none, as
/// in some added tokens, the text itself.
pub(crate) fn token_bytes(token: &str) -> Vec<u8> {
    alphabet_bytes(token).unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The bytes that the characters stand for; `None` if one of them stands for none.
pub(crate) fn alphabet_bytes(token: &str) -> Option<Vec<u8>> {
    token.chars().map(byte_of).collect()
}

/// The byte that a character of a byte-level token stands for.
///
/// GPT-2's alphabet: printable bytes of Latin-1 stand for themselves, the other 68 are U+0100 to U+0143 in order.
fn byte_of(c: char) -> Option<u8> {
    let code = c as u32;
    let byte = match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7F,
        0x143 => 0xAD,
        _ => return None,
    };
    Some(byte as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn every_byte_has_one_character() {
        let mut bytes: Vec<u8> = ('\0'..='\u{FFFF}').filter_map(byte_of).collect();
        bytes.sort();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn a_run_of_white_space_that_would_lose_text_is_refused() {
        let tokenizer = JsonTokenizer::new(testing::json(testing::JSON_TAIL).as_bytes()).unwrap();
        let run = " ".repeat(MAX_WHITE_SPACE_RUN);
        let ids = tokenizer.encode(&format!("{run}hi"), SpecialTokens::Parse).unwrap();
        assert_eq!(ids.last(), Some(&testing::HI));
        assert_eq!(
            tokenizer.encode(&format!("{run} hi"), SpecialTokens::Parse).unwrap_err().to_string(),
            "cannot tokenize the text: more than 500000 characters of white space stand together"
        );
    }

    #[test]
    fn what_is_not_byte_level_bpe_is_refused() {
        let error = |json: &str| JsonTokenizer::new(json.as_bytes()).err().unwrap().to_string();
        let (pre_tokenizer, _) = testing::JSON_TAIL.split_once('\n').unwrap();
        assert_eq!(
            error(&testing::json(&format!(r#"{pre_tokenizer} "decoder": {{"type": "Fuse"}}"#))),
            "tokenizer.json: the decoder is not ByteLevel: only byte-level BPE, the tokenizer of Qwen2 models, is supported"
        );
        for json in ["", "{}", "[1]", "{\"model\": 3}"] {
            assert!(error(json).starts_with("tokenizer.json: "), "{json}");
        }
    }

    #[test]
    fn a_panic_of_the_library_is_an_error() {
        let (_, decoder) = testing::JSON_TAIL.split_once('\n').unwrap();
        let json = format!(r#""pre_tokenizer": {{"type": "FixedLength", "length": 0}}, {decoder}"#);
        let tokenizer = JsonTokenizer::new(testing::json(&json).as_bytes()).unwrap();
        let error = tokenizer.encode("hi", SpecialTokens::Parse).unwrap_err().to_string();
        assert!(error.starts_with("cannot tokenize the text: the tokenizers library panicked"), "{error}");
    }
}
