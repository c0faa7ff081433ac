//! A tokenizer.json, run by the `tokenizers` library.

use std::cell::Cell;

use mrt_format::MAX_TOKENS;
use serde::Deserialize;
use tokenizers::tokenizer::{AddedVocabulary, Model, OffsetType, PreTokenizer};
use tokenizers::{DecoderWrapper, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper};

use crate::template::MAX_MESSAGE_CHARS;
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
    token_count: u32,
}

impl JsonTokenizer {
    pub(crate) fn new(json: &[u8]) -> Result<JsonTokenizer, TextError> {
        // Before all else: the library normalises added tokens when it reads them.
        check_steps(json)?;
        let library =
            without_panic(|| tokenizers::Tokenizer::from_bytes(json)).map_err(TextError::Tokenizer)?;
        if !matches!(library.get_model(), ModelWrapper::BPE(_)) {
            return Err(unsupported("the model is not BPE"));
        }
        if !matches!(library.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Err(unsupported("the decoder is not ByteLevel"));
        }
        let highest = library.get_vocab(true).into_values().max();
        if let Some(id) = highest
            && id >= MAX_TOKENS
        {
            let message = format!("a token has id {id}, but ids must be below {MAX_TOKENS}; it is damaged");
            return Err(TextError::Tokenizer(message));
        }
        let token_count = highest.map_or(0, |id| id + 1);
        Ok(JsonTokenizer { library, no_added_tokens: AddedVocabulary::new(), token_count })
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
        self.token_count
    }

    pub(crate) fn token_id(&self, text: &str) -> Option<u32> {
        self.library.get_added_vocabulary().get_vocab().get(text).copied()
    }

    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.library.get_added_vocabulary().get_added_tokens_decoder().get(&id).is_some_and(|t| t.special)
    }
}

/// What a text goes through before it is tokenised, as the library understands it.
#[derive(Deserialize)]
struct Steps {
    #[serde(default)]
    normalizer: Option<NormalizerWrapper>,
    #[serde(default)]
    pre_tokenizer: Option<PreTokenizerWrapper>,
}

/// Refuses steps whose repetition makes a short text so long that there is no memory for it, which ends the process.
fn check_steps(json: &[u8]) -> Result<(), TextError> {
    let steps = without_panic(|| Ok(serde_json::from_slice::<Steps>(json)?)).map_err(TextError::Tokenizer)?;
    let message = if !steps.normalizer.is_none_or(|step| is_bounded(&step)) {
        "the normalizer has a step that can make a text longer and longer"
    } else if steps.pre_tokenizer.is_some_and(|step| expansions(&step) > 1) {
        "the pre_tokenizer has a step that can make a text longer and longer"
    } else {
        return Ok(());
    };
    Err(unsupported(message))
}

/// Whether a text becomes no more than some times as long, however often the step is repeated.
fn is_bounded(step: &NormalizerWrapper) -> bool {
    use NormalizerWrapper::{Lowercase, NFC, NFD, NFKC, NFKD, Sequence, StripAccents, StripNormalizer};
    match step {
        NFC(_) | NFD(_) | NFKC(_) | NFKD(_) | Lowercase(_) | StripNormalizer(_) | StripAccents(_) => true,
        Sequence(steps) => steps.as_ref().iter().all(is_bounded),
        _ => false,
    }
}

/// How often the text is made longer. Most steps only split it; `ByteLevel` writes two bytes for some, `Metaspace`
/// writes before every piece and splits there anew.
fn expansions(step: &PreTokenizerWrapper) -> usize {
    match step {
        PreTokenizerWrapper::ByteLevel(_) => 1,
        PreTokenizerWrapper::Metaspace(_) => 2,
        PreTokenizerWrapper::Sequence(steps) => steps.as_ref().iter().map(expansions).sum(),
        _ => 0,
    }
}

fn unsupported(what: &str) -> TextError {
    TextError::Tokenizer(format!("{what}: only byte-level BPE, the tokenizer of Qwen2 models, is supported"))
}

thread_local! {
    /// Whether a panic of this thread becomes an error.
    static CATCHING: Cell<bool> = const { Cell::new(false) };
}

/// Keeps panics of the `tokenizers` library, which become errors, from being printed, too.
///
/// For programs, once at their start: it puts a panic hook before the process's own, which is called for all other
/// panics. A library had better leave that to the program that uses it.
pub fn silence_caught_panics() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !CATCHING.get() {
            hook(panic);
        }
    }));
}

/// Runs a part of the tokenizers library. It panics on some broken tokenizer.json files, at loading or at encoding.
fn without_panic<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    CATCHING.set(true);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    CATCHING.set(false);
    match result {
        // It may quote the file.
        Ok(result) => result
            .map_err(|e| e.to_string().chars().filter(|c| !c.is_control()).take(MAX_MESSAGE_CHARS).collect()),
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
        let word_level = r#"{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true}}"#;
        assert_eq!(
            error(word_level),
            "tokenizer.json: the model is not BPE: only byte-level BPE, the tokenizer of Qwen2 models, is supported"
        );
        for json in ["", "{}", "[1]", "{\"model\": 3}"] {
            assert!(error(json).starts_with("tokenizer.json: "), "{json}");
        }
    }

    #[test]
    fn an_error_that_quotes_the_file_is_a_short_line() {
        let json = format!(r#"{{"version": "1\u001b[2J\n{}"}}"#, "x".repeat(1000));
        let error = JsonTokenizer::new(json.as_bytes()).err().unwrap().to_string();
        assert!(error.contains("version '1[2Jxxx") && error.len() < 600, "{error}");
    }

    #[test]
    fn ids_that_are_too_large_are_refused() {
        let json = testing::json(testing::JSON_TAIL);
        let error = |id: u32| {
            let json = json.replacen("\"hi\":256", &format!("\"hi\":{id}"), 1);
            JsonTokenizer::new(json.as_bytes()).err().unwrap().to_string()
        };
        for id in [16_776_704, 4_000_000_000, u32::MAX] {
            assert_eq!(
                error(id),
                format!("tokenizer.json: a token has id {id}, but ids must be below 16776704; it is damaged")
            );
        }
    }

    #[test]
    fn steps_that_can_make_a_text_long_are_refused() {
        let json = testing::json(testing::JSON_TAIL);
        let with_normalizer = |step: &str| {
            let json = json.replacen("\"normalizer\": null", &format!("\"normalizer\": {step}"), 1);
            // Added tokens are normalised when the library reads them.
            let json = json.replacen("\"normalized\": false", "\"normalized\": true", 1);
            JsonTokenizer::new(json.as_bytes()).map(drop).map_err(|e| e.to_string())
        };
        let sequence = |step: &str, count| {
            format!(r#"{{"type": "Sequence", "normalizers": [{}]}}"#, vec![step; count].join(","))
        };
        let replace = format!(
            r#"{{"type": "Replace", "pattern": {{"String": "e"}}, "content": "{}"}}"#,
            "e".repeat(100)
        );
        // Two types: the library takes the whole for a sequence.
        let disguised = sequence(&replace, 2).replacen(
            "\"type\"",
            "\"type\": \"NFC\", \"type\": \"Lowercase\", \"x\"",
            1,
        );
        for step in [
            &replace,
            &replace.replace("\"type\": \"Replace\", ", ""),
            &sequence(&replace, 2),
            &sequence(&sequence(&replace, 2), 1),
            &disguised,
            r#"{"type": "Prepend", "prepend": "x"}"#,
            r#"{"type": "ByteLevel"}"#,
        ] {
            let error = with_normalizer(step).unwrap_err();
            assert!(
                error.contains("the normalizer has a step that can make a text longer and longer"),
                "{error}"
            );
        }
        for step in ["NFC", "NFKC", "Lowercase", "StripAccents"] {
            let step = format!(r#"{{"type": "{step}"}}"#);
            assert_eq!(with_normalizer(&step), Ok(()));
            assert_eq!(with_normalizer(&sequence(&step, 3)), Ok(()));
        }
        assert_eq!(with_normalizer(&sequence("", 0)), Ok(()));

        let (pre_tokenizer, decoder) = testing::JSON_TAIL.split_once('\n').unwrap();
        let (_, byte_level) = pre_tokenizer.trim_end_matches(',').split_once(": ").unwrap();
        let metaspace =
            r#"{"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": true}"#;
        for steps in [[byte_level, byte_level], [metaspace, byte_level]] {
            let steps = steps.join(",");
            let json =
                format!(r#""pre_tokenizer": {{"type": "Sequence", "pretokenizers": [{steps}]}}, {decoder}"#);
            let error = JsonTokenizer::new(testing::json(&json).as_bytes()).err().unwrap().to_string();
            assert!(
                error.contains("the pre_tokenizer has a step that can make a text longer and longer"),
                "{error}"
            );
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
