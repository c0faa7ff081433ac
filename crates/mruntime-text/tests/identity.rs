//! The prepacked tokenizer gives the tokens of the `tokenizers` library, for every text.
//!
//! `cargo run --release --example identity` does the same for files of any size.

use std::path::Path;
use std::sync::LazyLock;

use mruntime_text::{SpecialTokens, StreamDecoder, Tokenizer, prepack_tokenizer};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

/// A tokenizer and what it is compared with.
struct Pair {
    prepacked: Tokenizer<'static>,
    library: Tokenizer<'static>,
}

impl Pair {
    fn new(json: &[u8]) -> Pair {
        let prepacked = Tokenizer::from_section(prepack_tokenizer(json).unwrap()).unwrap();
        Pair { prepacked, library: Tokenizer::from_json(json).unwrap() }
    }

    fn fetched(directory: &str, script: &str) -> Pair {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models").join(directory).join("tokenizer.json");
        let json = std::fs::read(&path);
        Pair::new(&json.unwrap_or_else(|e| panic!("{}: {e}. Run models/{script} first.", path.display())))
    }

    #[track_caller]
    fn check(&self, text: &str) {
        for special in [SpecialTokens::Parse, SpecialTokens::AsText] {
            let expected = self.library.encode(text, special).unwrap();
            let ids = self.prepacked.encode(text, special).unwrap();
            assert!(ids == expected, "{special:?}: {text:?}\n{ids:?}\n{expected:?}");
            for skip_special in [false, true] {
                let decoded = self.prepacked.decode(&ids, skip_special);
                assert_eq!(decoded, self.library.decode(&ids, skip_special));
                let mut stream = StreamDecoder::new(&self.prepacked, skip_special);
                let mut streamed: String = ids.iter().map(|&id| stream.push(id).to_owned()).collect();
                streamed.push_str(stream.finish());
                assert_eq!(streamed, decoded);
            }
        }
    }
}

static SMOLLM2: LazyLock<Pair> = LazyLock::new(|| Pair::fetched("SmolLM2-135M-Instruct", "get_smollm2.py"));
static QWEN2_5: LazyLock<Pair> =
    LazyLock::new(|| Pair::fetched("Qwen2.5-tokenizer", "get_qwen2_5_tokenizer.py"));

fn pairs() -> [&'static Pair; 2] {
    [&SMOLLM2, &QWEN2_5]
}

/// Every character, between others whose classes differ.
#[test]
fn all_characters() {
    let mut text = String::new();
    // Nothing is assigned in the planes in between and behind.
    let assigned = ('\0'..'\u{33480}').chain('\u{E0000}'..'\u{E0200}').chain('\u{10FFF0}'..=char::MAX);
    for c in assigned {
        text.extend([c, 'a', c, ' ', c, '1', c, '\n', c, c, '\'', c]);
        if text.len() > 100_000 || c == char::MAX {
            for pair in pairs() {
                pair.check(&text);
            }
            text.clear();
        }
    }
}

#[test]
fn long_runs() {
    let emoji = ["👨‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "e\u{301}", "e\u{327}\u{301}", "각", "각"];
    let ascii = ["a", " ", "\n", "\t", "\r\n", "1", "!", "=", "-", "aA", "ab1", " \n", "\u{A0}", "'s", "'"];
    for piece in ascii.into_iter().chain(emoji) {
        for count in [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 47, 48, 49, 50, 64, 100, 500, 5000] {
            let run = piece.repeat(count);
            for pair in pairs() {
                pair.check(&run);
                pair.check(&format!("x{run}y"));
                pair.check(&format!(" {run} 1"));
            }
        }
    }
}

/// Pieces that meet in ways that matter: white space, contractions, digits, marks, special tokens and parts of them.
fn piece() -> impl Strategy<Value = String> {
    let known: &'static [&'static str] = &[
        " ",
        "  ",
        "\n",
        "\r\n",
        "\r",
        "\t",
        "\u{A0}",
        "\u{3000}",
        "\u{2028}",
        "\u{85}",
        "'s",
        "'S",
        "'\u{17F}",
        "'ll",
        "'LL",
        "'re",
        "'",
        "\"",
        "don't",
        "the",
        " the",
        "The",
        "ing",
        "1",
        "12",
        "123",
        "٣",
        "½",
        "Ⅷ",
        "²",
        "_",
        "-",
        "--",
        "...",
        "://",
        "{",
        "}",
        "é",
        "e\u{301}",
        "\u{301}",
        "\u{327}",
        "Å",
        "\u{212B}",
        "ß",
        "ſ",
        "İ",
        "ǅ",
        "日本",
        "語",
        "한",
        "\u{1112}\u{1161}\u{11AB}",
        "नि",
        "क्षि",
        "\u{94D}",
        "ก็",
        "שָׁ",
        "ไทย",
        "Ελ",
        "дж",
        "😀",
        "👨‍👩‍👧",
        "🏳️‍🌈",
        "🇩🇪",
        "\u{FE0F}",
        "\u{200D}",
        "\u{200B}",
        "\u{FEFF}",
        "\u{FFFD}",
        "\u{1D15E}",
        "\u{2F800}",
        "\u{E0041}",
        "\0",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_",
        "start|>",
        "<",
        "|>",
        "<tool_call>",
        "</tool_call>",
        "<repo_name>",
        "<|fim_pad|>",
        "user\n",
        "fn main() {",
        "==",
        "\\",
        "/",
    ];
    prop_oneof![
        6 => select(known).prop_map(str::to_owned),
        1 => any::<char>().prop_map(String::from),
        1 => any::<String>(),
        1 => "[a-zA-Z]{1,12}",
        1 => " {1,70}",
        1 => "[0-9]{1,20}",
        1 => "\\s{1,6}",
        1 => "\\p{M}{1,6}",
    ]
}

#[test]
fn random_texts() {
    TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(3000) })
        .run(&vec(piece(), 0..40), |pieces| {
            let text = pieces.concat();
            for pair in pairs() {
                pair.check(&text);
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn random_ids() {
    TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(1000) })
        .run(&(vec(0..152_000u32, 0..60), any::<bool>()), |(ids, skip_special)| {
            for pair in pairs() {
                let decoded = pair.prepacked.decode(&ids, skip_special);
                prop_assert_eq!(&decoded, &pair.library.decode(&ids, skip_special));
            }
            Ok(())
        })
        .unwrap();
}

/// Tokenizers whose vocabulary is the bytes and a few merges, with every kind of added token and pre-tokeniser.
#[test]
fn added_tokens_of_every_kind() {
    let flags = ["single_word", "lstrip", "rstrip", "normalized", "special"];
    let contents = ["<a>", "<a>b", "abc", " c", "é", "e\u{301}", "1", "\u{1112}\u{1161}"];
    let texts: Vec<String> = {
        let around = ["", " ", "  ", "a", "b", "\n", "1", "\u{301}", "_", "<a>"];
        let pair = |content| around.iter().map(move |before| (content, before));
        let whole = |(content, before): (&str, &&str)| {
            around.map(|behind| format!("x{before}{content}{behind}{content}{before}"))
        };
        contents.into_iter().flat_map(pair).flat_map(whole).collect()
    };
    let nfc = json!({"type": "NFC"});
    let normalizers = [Value::Null, nfc.clone(), json!({"type": "Sequence", "normalizers": [nfc]})];
    for (i, pre_tokenizer) in SPLITS.iter().enumerate() {
        for kinds in [0, 5, 10, 21, 31u32] {
            let added = contents.iter().zip(0..).map(|(content, n)| {
                let mut token = json!({"id": 300 + n, "content": content});
                // Neighbours differ in what they are.
                let kind = kinds ^ ((n * 11) % 32);
                for (bit, flag) in flags.iter().enumerate() {
                    token[flag] = (kind >> bit & 1 == 1).into();
                }
                token
            });
            let normalizer = &normalizers[i % normalizers.len()];
            let pair = Pair::new(small(normalizer, pre_tokenizer, added.collect()).to_string().as_bytes());
            for text in &texts {
                pair.check(text);
            }
        }
    }
}

/// Added tokens of white space, which take the white space around them or do not: all in the same way, for the library
/// panics on those that only take what is before them within what another one has taken.
#[test]
fn added_tokens_of_white_space() {
    let text = vec(select(&[" ", "  ", "\n", "\t", "a", "b", "<a>", "\u{3000}"]), 0..12)
        .prop_map(|pieces| pieces.concat());
    for kind in 0..8u32 {
        let is_set = |bit: u32| kind >> bit & 1 == 1;
        let added = [" ", "\n", "\t\n", "a ", "<a>"].iter().zip(0..).map(|(content, n)| {
            json!({
                "id": 300 + n, "content": content, "lstrip": is_set(0), "rstrip": is_set(1), "special": true,
                "normalized": n % 2 == 0, "single_word": is_set(2) && n > 2,
            })
        });
        let pair = Pair::new(small(&Value::Null, SPLITS[0], added.collect()).to_string().as_bytes());
        TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(200) })
            .run(&text, |text| {
                pair.check(&text);
                Ok(())
            })
            .unwrap();
    }
}

const SPLITS: [&str; 5] = [
    r#"{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}"#,
    r#"{"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false}, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}]}"#,
    r#"{"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}, "behavior": "Removed", "invert": true}, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}]}"#,
    r#"{"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]}"#,
    r#"{"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": false}, {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]}"#,
];

/// A tokenizer.json of the bytes from 33 on and a few merges; other bytes have no token.
fn small(normalizer: &Value, pre_tokenizer: &str, added: Vec<Value>) -> Value {
    let alphabet = ('!'..='~').chain('¡'..='¬').chain('®'..='ÿ').chain('\u{120}'..='\u{143}');
    let mut vocab: serde_json::Map<_, _> =
        alphabet.zip(0..).map(|(c, id)| (c.to_string(), id.into())).collect();
    let merges =
        [["a", "b"], ["Ġ", "a"], ["Ġ", "Ġ"], ["ĠĠ", "ĠĠ"], ["1", "1"], ["11", "1"], ["Ã", "©"], ["a", "a"]];
    for [left, right] in merges {
        vocab.insert(format!("{left}{right}"), vocab.len().into());
    }
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": serde_json::from_str::<Value>(pre_tokenizer).unwrap(), "post_processor": null,
        "decoder": byte_level, "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    })
}
