//! Encoding and decoding with a tokenizer that is used as it lies in the model file.

use std::borrow::Cow;

use mrt_format::{AddedTokens, CLASS_NFC_INERT, CLASS_SPACE, CLASS_WORD, Token, TokenizerSection};
use unicode_normalization_alignments::UnicodeNormalization;

use crate::SpecialTokens;
use crate::bpe::{MergeHeap, encode_word};
use crate::split::for_each_word;

/// The token ids of a text.
pub(crate) fn encode(tokenizer: &TokenizerSection, text: &str, special: SpecialTokens) -> Vec<u32> {
    let mut encoder =
        Encoder { tokenizer, heap: MergeHeap::default(), ids: Vec::with_capacity(text.len() / 3) };
    match special {
        SpecialTokens::Parse => encoder.parse(text),
        SpecialTokens::AsText => encoder.words(&to_nfc(tokenizer, text)),
    }
    encoder.ids
}

/// Appends the bytes of one token.
pub(crate) fn append_bytes(tokenizer: &TokenizerSection, id: u32, skip_special: bool, out: &mut Vec<u8>) {
    match tokenizer.token(id) {
        Some(Token::Text { special: true, .. }) if skip_special => {}
        Some(Token::Text { bytes, .. }) => out.extend_from_slice(bytes),
        _ => tokenizer.append_bytes(id, out),
    }
}

struct Encoder<'a> {
    tokenizer: &'a TokenizerSection<'a>,
    heap: MergeHeap,
    ids: Vec<u32>,
}

impl Encoder<'_> {
    /// A text whose added tokens become their ids. Some are looked for in the text as it is, the others in what is
    /// left, after normalisation.
    fn parse(&mut self, text: &str) {
        let tokenizer = self.tokenizer;
        for_each_part(tokenizer, tokenizer.added(), text, |part| match part {
            Part::Token(id) => self.ids.push(id),
            Part::Text(text) => {
                let text = to_nfc(tokenizer, text);
                for_each_part(tokenizer, tokenizer.normalized_added(), &text, |part| match part {
                    Part::Token(id) => self.ids.push(id),
                    Part::Text(text) => self.words(text),
                });
            }
        });
    }

    fn words(&mut self, text: &str) {
        let Encoder { tokenizer, heap, ids } = self;
        for_each_word(tokenizer, text, |word| encode_word(tokenizer, word.as_bytes(), heap, ids));
    }
}

enum Part<'a> {
    Token(u32),
    Text(&'a str),
}

/// Finds added tokens, leftmost first and the longest of those that begin there, and calls `part` with them and with
/// what is between them.
fn for_each_part(tokenizer: &TokenizerSection, added: AddedTokens, text: &str, mut part: impl FnMut(Part)) {
    let mut begins_token = [false; 256];
    for token in added.iter() {
        if let Some(&byte) = token.text.first() {
            begins_token[usize::from(byte)] = true;
        }
    }
    let has_class = |c: Option<char>, class: u8| c.is_some_and(|c| tokenizer.classes(c) & class != 0);
    let is_space = |c| has_class(Some(c), CLASS_SPACE);
    // Everything before `done` has been given out, everything before `from` been searched.
    let (mut done, mut from) = (0, 0);
    // Where white space ends that an earlier token took; up to there, it does for those that begin within.
    let mut spaces_end = 0;
    while let Some(at) = text.as_bytes()[from..].iter().position(|&byte| begins_token[usize::from(byte)]) {
        let mut start = from + at;
        let Some(token) = added.longest_prefix(&text.as_bytes()[start..]) else {
            from = start + 1;
            continue;
        };
        let mut end = start + token.text.len();
        // Only a damaged section has tokens that begin or end inside a character.
        let (Some(before), Some(behind)) = (text.get(..start), text.get(end..)) else {
            from = start + 1;
            continue;
        };
        from = end;
        if token.single_word
            && (has_class(before.chars().next_back(), CLASS_WORD)
                || has_class(behind.chars().next(), CLASS_WORD))
        {
            continue;
        }
        if token.lstrip {
            // An earlier token may have taken what is before it, and more.
            let before = text.get(done..start).unwrap_or_default();
            start = done + before.trim_end_matches(is_space).len();
        }
        if token.rstrip {
            if spaces_end < end {
                spaces_end = text.len() - behind.trim_start_matches(is_space).len();
            }
            end = spaces_end;
        }
        if done < start {
            part(Part::Text(&text[done..start]));
        }
        // As with the library, nothing is left of a token when earlier ones have taken all of it.
        if start < end {
            part(Part::Token(token.id));
        }
        done = end;
    }
    if done < text.len() {
        part(Part::Text(&text[done..]));
    }
}

/// The text in NFC, if the tokenizer wants that.
fn to_nfc<'a>(tokenizer: &TokenizerSection, text: &'a str) -> Cow<'a, str> {
    let is_inert = |c: char| tokenizer.classes(c) & CLASS_NFC_INERT != 0;
    if !tokenizer.nfc() || text.is_ascii() || text.chars().all(is_inert) {
        return Cow::Borrowed(text);
    }
    let mut normal = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(|c| !is_inert(c)) {
        // The inert character before may still be composed with what follows.
        let start = rest[..at].char_indices().next_back().map_or(0, |(i, _)| i);
        let end = rest[at..].find(is_inert).map_or(rest.len(), |i| at + i);
        normal.push_str(&rest[..start]);
        normal.extend(rest[start..end].nfc().map(|(c, _)| c));
        rest = &rest[end..];
    }
    normal.push_str(rest);
    Cow::Owned(normal)
}
