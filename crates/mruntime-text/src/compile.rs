//! tokenizer.json to the `tokenizer` section of a model file, with the `tokenizers` library to read it and to compare
//! with.

use std::collections::HashMap;

use mrt_format::{
    AddedToken, CLASS_DIGIT, CLASS_LETTER, CLASS_NFC_INERT, CLASS_NUMBER, CLASS_SPACE, CLASS_WORD,
    DigitSplit, FormatError, Token, TokenizerParts, TokenizerSection, WordSplit, tokenizer_section,
};
use regex_syntax::hir::{Class, HirKind};
use serde_json::Value;
use unicode_normalization_alignments::char::canonical_combining_class;
use unicode_normalization_alignments::{IsNormalized, is_nfc_quick};

use crate::bpe::{MergeHeap, encode_word};
use crate::json::{JsonTokenizer, alphabet_bytes, token_bytes};
use crate::split::for_each_word;
use crate::{SpecialTokens, TextError, prepacked};

/// Prepacks a tokenizer.json: the content of the section `tokenizer`, which gives the same tokens as the `tokenizers`
/// library does.
///
/// # Errors
///
/// [`TextError::Tokenizer`] if the library does not accept it, [`TextError::CannotPrepack`] if it has a part that the
/// section cannot express; never an approximation.
pub fn prepack_tokenizer(json: &[u8]) -> Result<Vec<u8>, TextError> {
    let oracle = JsonTokenizer::new(json)?;
    let section = compile(&oracle).map_err(TextError::CannotPrepack)?;
    compare(&TokenizerSection::new(&section)?, &oracle).map_err(TextError::CannotPrepack)?;
    Ok(section)
}

/// A result, or what is not understood, in words.
type Understood<T> = Result<T, String>;

fn compile(oracle: &JsonTokenizer) -> Understood<Vec<u8>> {
    // As the library has understood it: with all defaults, and the merges as pairs.
    let json = serde_json::to_value(&oracle.library).map_err(|e| e.to_string())?;
    let nfc = normalizer(&json["normalizer"])?;
    let (digit_split, word_split) = pre_tokenizer(&json["pre_tokenizer"])?;
    let model = Bpe::new(&json["model"])?;

    let count = oracle.token_count();
    let special = |id| oracle.is_special(id);
    let texts: Vec<Vec<u8>> = (0..count)
        .map(|id| oracle.library.id_to_token(id).map(|token| token_bytes(&token)).unwrap_or_default())
        .collect();
    let token = |id: u32| match model.merges.get(&id) {
        Some(_) if special(id) => Err(format!("token {id} is special, and a merge makes it")),
        Some(&(left, right)) if left >= id || right >= id => {
            Err(format!("token {id} has a lower id than one that it is made of"))
        }
        Some(&(left, right)) => Ok(Token::Merge { left, right }),
        None => Ok(Token::Text { bytes: &texts[id as usize], special: special(id) }),
    };
    let tokens = (0..count).map(token).collect::<Understood<Vec<_>>>()?;

    let added: Vec<_> = oracle.library.get_added_vocabulary().get_added_tokens_decoder().iter().collect();
    let found_by: Vec<_> = added
        .iter()
        .map(|(id, token)| {
            let normalized = oracle.library.get_added_vocabulary().simple_id_to_token(**id);
            if token.normalized { normalized.unwrap_or_default() } else { token.content.clone() }
        })
        .collect();
    let added_tokens = |normalized: bool| -> Vec<AddedToken> {
        let both = added.iter().zip(&found_by).filter(|((_, token), _)| token.normalized == normalized);
        both.map(|((id, token), text)| AddedToken {
            id: **id,
            text: text.as_bytes(),
            lstrip: token.lstrip,
            rstrip: token.rstrip,
            single_word: token.single_word,
        })
        .collect()
    };

    let section = tokenizer_section(&TokenizerParts {
        nfc,
        word_split,
        digit_split,
        classes: &classes()?,
        byte_tokens: model.byte_tokens,
        tokens: &tokens,
        added: &added_tokens(false),
        normalized: &added_tokens(true),
    })
    .map_err(limit)?;
    let view = TokenizerSection::new(&section).map_err(|e| e.to_string())?;
    if model.ignore_merges {
        check_ignored_merges(&view, &model)?;
    }
    Ok(section)
}

/// What the section cannot hold, without the advice to those who read one.
fn limit(error: FormatError) -> String {
    match error {
        FormatError::BadTokenizer { field, value, expected } => {
            format!("{field} is {value}, must be {expected}")
        }
        other => other.to_string(),
    }
}

/// Whether the normaliser is NFC; the other one that is known is none.
fn normalizer(json: &Value) -> Understood<bool> {
    match (json["type"].as_str(), json["normalizers"].as_array()) {
        (None, _) if json.is_null() => Ok(false),
        (Some("NFC"), _) => Ok(true),
        (Some("Sequence"), Some(steps)) if steps.is_empty() => Ok(false),
        (Some("Sequence"), Some(steps)) if steps.len() == 1 => normalizer(&steps[0]),
        _ => Err(format!("normalizer {}", brief(json))),
    }
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Digits may be set apart; then words are split by one of the known expressions; then each byte becomes a character.
fn pre_tokenizer(json: &Value) -> Understood<(DigitSplit, WordSplit)> {
    let steps = match json["pretokenizers"].as_array() {
        Some(steps) if json["type"] == "Sequence" => steps.as_slice(),
        _ => std::slice::from_ref(json),
    };
    let (digit_split, steps) = match steps {
        [digits, rest @ ..] if digits["type"] == "Digits" => match digits["individual_digits"].as_bool() {
            Some(true) => (DigitSplit::Each, rest),
            _ => (DigitSplit::Runs, rest),
        },
        _ => (DigitSplit::None, steps),
    };
    let byte_level = |step: &Value, regex: bool| {
        step["type"] == "ByteLevel" && step["add_prefix_space"] == false && step["use_regex"] == regex
    };
    match steps {
        [step] if byte_level(step, true) => Ok((digit_split, WordSplit::Gpt2)),
        [split, step] if split["type"] == "Split" && byte_level(step, false) => {
            // All characters are part of a match, so nothing is removed.
            let whole_matches = split["behavior"] == "Isolated" && split["invert"] == false
                || split["behavior"] == "Removed" && split["invert"] == true;
            match split["pattern"]["Regex"].as_str() {
                Some(GPT2) if whole_matches => Ok((digit_split, WordSplit::Gpt2)),
                Some(QWEN2) if whole_matches => Ok((digit_split, WordSplit::Qwen2)),
                Some(LLAMA3) if whole_matches => Ok((digit_split, WordSplit::Llama3)),
                _ => Err(format!("pre_tokenizer step {}", brief(split))),
            }
        }
        _ => Err(format!("pre_tokenizer {}", brief(json))),
    }
}

/// The model's vocabulary and merges.
struct Bpe {
    vocabulary: HashMap<String, u32>,
    byte_tokens: [Option<u32>; 256],
    /// Token to the two that it is made of.
    merges: HashMap<u32, (u32, u32)>,
    ignore_merges: bool,
}

impl Bpe {
    fn new(json: &Value) -> Understood<Bpe> {
        if json["type"] != "BPE" {
            return Err(format!("model {}", json["type"]));
        }
        if !json["dropout"].is_null() && json["dropout"] != 0.0 {
            return Err(format!("dropout {}", json["dropout"]));
        }
        for affix in ["continuing_subword_prefix", "end_of_word_suffix"] {
            if !json[affix].as_str().unwrap_or_default().is_empty() {
                return Err(format!("{affix} {}", json[affix]));
            }
        }
        let vocabulary: HashMap<String, u32> =
            serde_json::from_value(json["vocab"].clone()).map_err(|e| e.to_string())?;
        let mut byte_tokens = [None; 256];
        for (token, &id) in &vocabulary {
            if let Some([byte]) = alphabet_bytes(token).as_deref() {
                byte_tokens[usize::from(*byte)] = Some(id);
            }
        }
        let replaces_unknown = !json["unk_token"].is_null() || json["byte_fallback"] == true;
        if replaces_unknown && byte_tokens.contains(&None) {
            return Err("not every byte has a token, and others become one that stands for them".to_owned());
        }

        let pairs: Vec<(String, String)> =
            serde_json::from_value(json["merges"].clone()).map_err(|e| e.to_string())?;
        let mut merges = HashMap::new();
        let mut before = None;
        for (left, right) in pairs {
            let whole = format!("{left}{right}");
            let id = |token: &str| vocabulary.get(token).copied().ok_or(format!("no token {token:?}"));
            let (made, left, right) = (id(&whole)?, id(&left)?, id(&right)?);
            if alphabet_bytes(&whole).is_none() {
                return Err(format!("a merge makes {whole:?}, which is not of bytes"));
            }
            // The order of ids is that of the merges, so that ids alone tell which merge comes first.
            if before >= Some(made) {
                return Err(match merges.contains_key(&made) {
                    true => format!("several merges make {whole:?}"),
                    false => format!("the ids are not in the order of the merges at {whole:?}"),
                });
            }
            before = Some(made);
            merges.insert(made, (left, right));
        }
        let ignore_merges = json["ignore_merges"] == true;
        Ok(Bpe { vocabulary, byte_tokens, merges, ignore_merges })
    }
}

/// With `ignore_merges` a word that is in the vocabulary becomes its token without merging. That is the same if merging
/// makes that token of it.
fn check_ignored_merges(tokenizer: &TokenizerSection, model: &Bpe) -> Understood<()> {
    let mut heap = MergeHeap::default();
    let mut ids = Vec::new();
    for (token, &id) in &model.vocabulary {
        let Some(Ok(text)) = alphabet_bytes(token).map(String::from_utf8) else { continue };
        let mut words = 0;
        for_each_word(tokenizer, &text, |_| words += 1);
        ids.clear();
        encode_word(tokenizer, text.as_bytes(), &mut heap, &mut ids);
        if words == 1 && ids != [id] {
            return Err(format!("ignore_merges makes one token of {text:?}, merging does not"));
        }
    }
    Ok(())
}

/// The classes of all code points: those that the `tokenizers` library goes by.
fn classes() -> Understood<Vec<u8>> {
    let mut classes = vec![0; 0x11_0000];
    for (pattern, class) in
        [(r"\p{L}", CLASS_LETTER), (r"\p{N}", CLASS_NUMBER), (r"\s", CLASS_SPACE), (r"\w", CLASS_WORD)]
    {
        let parsed = regex_syntax::parse(pattern).map_err(|e| e.to_string())?;
        let HirKind::Class(Class::Unicode(set)) = parsed.kind() else {
            return Err(format!("{pattern} is not a class of characters"));
        };
        for range in set.ranges() {
            classes[range.start() as usize..=range.end() as usize].iter_mut().for_each(|c| *c |= class);
        }
    }
    for c in '\0'..=char::MAX {
        if c.is_numeric() {
            classes[c as usize] |= CLASS_DIGIT;
        }
        if canonical_combining_class(c) == 0 && is_nfc_quick(std::iter::once(c)) == IsNormalized::Yes {
            classes[c as usize] |= CLASS_NFC_INERT;
        }
    }
    Ok(classes)
}

/// Compares the section with the library: the bytes of every token, and the tokens of texts that hold every token, every
/// added token as text, and nearly every character.
fn compare(tokenizer: &TokenizerSection, oracle: &JsonTokenizer) -> Understood<()> {
    let mut all = String::new();
    for id in 0..tokenizer.token_count() {
        let (mut bytes, mut expected) = (Vec::new(), Vec::new());
        prepacked::append_bytes(tokenizer, id, false, &mut bytes);
        oracle.append_bytes(id, false, &mut expected);
        if bytes != expected {
            return Err(format!("token {id} differs from the library's"));
        }
        all.push_str(&String::from_utf8_lossy(&bytes));
    }
    // Assigned characters end well before the planes of private use.
    all.extend('\0'..'\u{40000}');
    let mut rest = all.as_str();
    while !rest.is_empty() {
        let (text, behind) = rest.split_at(rest.ceil_char_boundary(rest.len().min(4096)));
        compare_text(tokenizer, oracle, text, SpecialTokens::Parse)?;
        rest = behind;
    }
    let added = tokenizer.added().iter().chain(tokenizer.normalized_added().iter());
    let added: Vec<_> = added.flat_map(|token| token.text).copied().collect();
    compare_text(tokenizer, oracle, &String::from_utf8_lossy(&added), SpecialTokens::AsText)
}

fn compare_text(
    tokenizer: &TokenizerSection,
    oracle: &JsonTokenizer,
    text: &str,
    special: SpecialTokens,
) -> Understood<()> {
    let expected = oracle.encode(text, special).map_err(|e| e.to_string())?;
    match prepacked::encode(tokenizer, text, special) == expected {
        true => Ok(()),
        false => Err(format!("tokens differ from the library's in {text:?}")),
    }
}

/// A short text of some JSON, for messages.
fn brief(json: &Value) -> String {
    // JSON leaves some control characters as they are.
    let text = json.to_string().replace(char::is_control, "?");
    match text.char_indices().nth(120) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn a_token_that_the_section_cannot_hold_is_the_reason() {
        let long = "x".repeat(256);
        let json = testing::json(testing::JSON_TAIL).replacen("<a b>", &long, 1);
        assert_eq!(
            prepack_tokenizer(json.as_bytes()).unwrap_err().to_string(),
            "tokenizer.json cannot be prepacked: a token's text is 256, must be at most 255 bytes"
        );
    }
}
