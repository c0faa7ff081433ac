//! A small byte-level tokenizer for unit tests.

use crate::{Tokenizer, prepack_tokenizer};

/// Token ids: the 256 bytes, then "hi", then the added tokens `<|end|>` (special) and `<a b>`.
pub(crate) const VOCAB: usize = 259;
pub(crate) const HI: u32 = 256;

/// What follows the vocabulary in the JSON.
pub(crate) const JSON_TAIL: &str = r#""pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
    "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}"#;

/// The id of a byte's token.
pub(crate) fn byte(byte: u8) -> u32 {
    byte.into()
}

/// Prepacked.
pub(crate) fn tokenizer() -> Tokenizer<'static> {
    Tokenizer::from_section(prepack_tokenizer(json(JSON_TAIL).as_bytes()).unwrap()).unwrap()
}

/// Prepacked, and as JSON.
pub(crate) fn tokenizers() -> [Tokenizer<'static>; 2] {
    [tokenizer(), Tokenizer::from_json(json(JSON_TAIL).as_bytes()).unwrap()]
}

pub(crate) fn json(tail: &str) -> String {
    let alphabet = ('!'..='~').chain('¡'..='¬').chain('®'..='ÿ');
    let others = ('\u{100}'..='\u{143}').zip((0..=0x20).chain(0x7F..=0xA0).chain([0xAD]));
    let mut vocab: serde_json::Map<_, _> =
        alphabet.map(|c| (c, c as u32)).chain(others).map(|(c, id)| (c.to_string(), id.into())).collect();
    vocab.insert("hi".to_owned(), HI.into());
    format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
    "added_tokens": [
        {{"id": 257, "content": "<|end|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}},
        {{"id": 258, "content": "<a b>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": false}}],
    "model": {{"type": "BPE", "vocab": {}, "merges": [["h", "i"]]}}, {tail}}}"#,
        serde_json::Value::Object(vocab)
    )
}
