//! Text to token ids and back.

use tokenizers::DecoderWrapper;
use tokenizers::tokenizer::{AddedVocabulary, Model, OffsetType, PreTokenizer};

use crate::TextError;

/// What becomes of special and other added tokens (`<|im_end|>`, `<tool_call>`) that stand in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// They become their token: for text that a chat template wrote.
    Parse,
    /// They are text like any other: for text that nobody vouches for.
    AsText,
}

/// The longest run of white space, in characters, that a text may hold.
///
/// The regex engine that splits texts into words remembers every character of a run, a million at most; past that it
/// stops without a word, and the rest of the text would get wrong tokens.
const MAX_WHITE_SPACE_RUN: usize = 500_000;

/// A Hugging Face tokenizer with byte-level BPE, as every Qwen2 model has.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    no_added_tokens: AddedVocabulary,
}

impl Tokenizer {
    /// Reads the contents of a tokenizer.json.
    ///
    /// # Errors
    ///
    /// [`TextError::Tokenizer`] if it is not a valid tokenizer.json, or its decoder is not `ByteLevel`.
    pub fn from_json(json: &[u8]) -> Result<Tokenizer, TextError> {
        let inner =
            without_panic(|| tokenizers::Tokenizer::from_bytes(json)).map_err(TextError::Tokenizer)?;
        if !matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Err(TextError::Tokenizer(
                "the decoder is not ByteLevel: only byte-level BPE, the tokenizer of Qwen2 models, is supported"
                    .into(),
            ));
        }
        Ok(Tokenizer { inner, no_added_tokens: AddedVocabulary::new() })
    }

    /// Token ids of a text. Adds no beginning or end token.
    ///
    /// # Errors
    ///
    /// [`TextError::Encode`] if more than 500,000 characters of white space stand together, or the tokenizer's own
    /// steps fail.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>, TextError> {
        if text.split(|c: char| !c.is_whitespace()).any(|run| run.chars().nth(MAX_WHITE_SPACE_RUN).is_some())
        {
            let message = format!("more than {MAX_WHITE_SPACE_RUN} characters of white space stand together");
            return Err(TextError::Encode(message));
        }
        let added = match special {
            SpecialTokens::Parse => self.inner.get_added_vocabulary(),
            SpecialTokens::AsText => &self.no_added_tokens,
        };
        // The library's own steps of encoding, spelled out to choose the added tokens for each text.
        let encoding = without_panic(|| {
            let mut pieces = added.extract_and_normalize(self.inner.get_normalizer(), text);
            if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut pieces)?;
            }
            self.inner.get_model().tokenize_in_pretokenized(&mut pieces, None)?;
            pieces.into_encoding(None, 0, OffsetType::None)
        });
        Ok(encoding.map_err(TextError::Encode)?.get_ids().to_vec())
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
        if skip_special && self.is_special(id) {
            return;
        }
        let Some(token) = self.inner.id_to_token(id) else { return };
        let start = out.len();
        for c in token.chars() {
            match byte_of(c) {
                Some(byte) => out.push(byte),
                None => {
                    // An added token is plain text. Like the library, take it so if it cannot be anything else.
                    out.truncate(start);
                    out.extend_from_slice(token.as_bytes());
                    return;
                }
            }
        }
    }

    /// Number of tokens, added ones included. A model's vocabulary is often larger: padded, without a meaning.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Id of a token as tokenizer.json writes it, such as `<|im_end|>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether an id is a special token, one that `skip_special` leaves out of decoded text.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.get_added_vocabulary().get_added_tokens_decoder().get(&id).is_some_and(|t| t.special)
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
    fn special_tokens_are_parsed_or_text() {
        let tokenizer = testing::tokenizer();
        let end = tokenizer.token_id("<|end|>").unwrap();
        assert!(tokenizer.is_special(end));
        assert_eq!(tokenizer.encode("hi<|end|>", SpecialTokens::Parse).unwrap(), [testing::HI, end]);

        let ids = tokenizer.encode("hi<|end|>", SpecialTokens::AsText).unwrap();
        assert_eq!(ids[0], testing::HI);
        assert!(!ids.contains(&end));
        assert_eq!(tokenizer.decode(&ids, true), "hi<|end|>");
    }

    #[test]
    fn decode_replaces_broken_utf8_and_ignores_unknown_ids() {
        let tokenizer = testing::tokenizer();
        assert_eq!(tokenizer.vocab_size(), testing::VOCAB);
        assert_eq!(tokenizer.token_id("nothing"), None);
        let [a, b] = [testing::byte(0xC3), testing::byte(0xA9)];
        assert_eq!(tokenizer.decode(&[a, b, a, testing::HI, 9999], false), "é\u{FFFD}hi");
    }

    #[test]
    fn an_added_token_outside_the_alphabet_is_plain_text() {
        let tokenizer = testing::tokenizer();
        let id = tokenizer.token_id("<a b>").unwrap();
        assert!(!tokenizer.is_special(id));
        assert_eq!(tokenizer.decode(&[id], true), "<a b>");
    }

    #[test]
    fn a_run_of_white_space_that_would_lose_text_is_refused() {
        let tokenizer = testing::tokenizer();
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
        let error = |json: &str| Tokenizer::from_json(json.as_bytes()).err().unwrap().to_string();
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
        let tokenizer = Tokenizer::from_json(testing::json(&json).as_bytes()).unwrap();
        let error = tokenizer.encode("hi", SpecialTokens::Parse).unwrap_err().to_string();
        assert!(error.starts_with("cannot tokenize the text: the tokenizers library panicked"), "{error}");
    }
}
