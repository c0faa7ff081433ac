//! Against the Python libraries: `tokenizers` for tokens, transformers for chat templates.
//!
//! The tokenizers of SmolLM2 and Qwen2.5 are too large for the repository and are fetched by scripts in models/.

use std::path::{Path, PathBuf};

use mruntime_text::{
    ChatTemplate, SpecialTokenNames, SpecialTokens, StreamDecoder, Tokenizer, find_chat_template,
    prepack_tokenizer,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::Value;

const SMOLLM2: [&str; 3] = ["smollm2", "SmolLM2-135M-Instruct", "get_smollm2.py"];
const QWEN2_5: [&str; 3] = ["qwen25", "Qwen2.5-tokenizer", "get_qwen2_5_tokenizer.py"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn golden(name: &str) -> Value {
    let path = root().join("tests/goldens/text").join(name);
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap()
}

fn fetched([_, directory, script]: [&str; 3], file: &str) -> Vec<u8> {
    let path = root().join("models").join(directory).join(file);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}. Run models/{script} first.", path.display()))
}

/// Prepacked.
fn tokenizer(model: [&str; 3]) -> Tokenizer<'static> {
    Tokenizer::from_section(prepack_tokenizer(&fetched(model, "tokenizer.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn stream(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut decoder = StreamDecoder::new(tokenizer, skip_special);
    let mut text: String = ids.iter().map(|&id| decoder.push(id).to_owned()).collect();
    text.push_str(decoder.finish());
    text
}

fn check_tokens(model: [&str; 3]) {
    let from_json = Tokenizer::from_json(&fetched(model, "tokenizer.json")).unwrap();
    for tokenizer in [tokenizer(model), from_json] {
        check_tokens_of(&tokenizer, model);
    }
}

fn check_tokens_of(tokenizer: &Tokenizer, model: [&str; 3]) {
    let golden = golden(&format!("{}_tokens.json", model[0]));
    assert_eq!(tokenizer.vocab_size() as u64, golden["vocab_with_added"].as_u64().unwrap());
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 90);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let parsed = ids(&case["ids"]);
        assert_eq!(tokenizer.encode(text, SpecialTokens::Parse).unwrap(), parsed, "{text:?}");
        let plain = case.get("ids_plain").map_or(parsed.clone(), ids);
        assert_eq!(tokenizer.encode(text, SpecialTokens::AsText).unwrap(), plain, "{text:?} as text");

        let decoded = case["decoded"].as_str().unwrap();
        let without_special = case.get("decoded_skip_special").map_or(decoded, |t| t.as_str().unwrap());
        assert_eq!(tokenizer.decode(&parsed, false), decoded);
        assert_eq!(tokenizer.decode(&parsed, true), without_special);
        assert_eq!(stream(tokenizer, &parsed, false), decoded);
        assert_eq!(stream(tokenizer, &parsed, true), without_special);
    }
}

#[test]
fn smollm2_tokens() {
    check_tokens(SMOLLM2);
}

#[test]
fn qwen2_5_tokens() {
    check_tokens(QWEN2_5);
}

fn check_chat(model: [&str; 3]) {
    let tokenizer = tokenizer(model);
    let config = fetched(model, "tokenizer_config.json");
    let source = find_chat_template(None, Some(&config)).unwrap().unwrap();
    let names = SpecialTokenNames::from_tokenizer_config(&config).unwrap();
    let template = ChatTemplate::new(&source, &names).unwrap();
    let cases = golden(&format!("{}_chat.json", model[0]));
    assert!(cases.as_array().unwrap().len() >= 16);
    for case in cases.as_array().unwrap() {
        let messages = case["messages"].as_array().unwrap();
        let tools = case["tools"].as_array().map(Vec::as_slice);
        let text =
            template.render(messages, tools, case["add_generation_prompt"].as_bool().unwrap()).unwrap();
        assert_eq!(text, case["text"].as_str().unwrap());
        assert_eq!(tokenizer.encode(&text, SpecialTokens::Parse).unwrap(), ids(&case["ids"]));
    }
}

#[test]
fn smollm2_chat() {
    check_chat(SMOLLM2);
}

#[test]
fn qwen2_5_chat() {
    check_chat(QWEN2_5);
}

#[test]
fn what_templates_use() {
    let golden = golden("templates.json");
    let messages = golden["messages"].as_array().unwrap();
    let tools = golden["tools"].as_array().unwrap();
    let names = SpecialTokenNames::from_tokenizer_config(
        br#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}}"#,
    );
    let names = names.unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let tools = case["with_tools"].as_bool().unwrap().then_some(tools.as_slice());
        let text = ChatTemplate::new(case["template"].as_str().unwrap(), &names)
            .and_then(|template| template.render(messages, tools, true));
        match case["text"].as_str() {
            Some(expected) => assert_eq!(text.unwrap(), expected, "{}", case["name"]),
            None => assert!(text.is_err(), "{}: {text:?}", case["name"]),
        }
    }
}

/// Random ids, special and unknown ones among them: mostly not UTF-8.
fn check_streaming(model: [&str; 3]) {
    let tokenizer = tokenizer(model);
    let count = tokenizer.vocab_size() as u32;
    // Every single byte that the vocabulary has, so that characters are put together from pieces, too.
    let bytes: Vec<u32> =
        (0..count).filter(|&id| !tokenizer.is_special(id) && is_one_byte(&tokenizer, id)).collect();
    assert!(bytes.len() > 200, "{} tokens of one byte", bytes.len());
    let id = prop_oneof![0..count + 100, prop::sample::select(bytes)];
    let ids = prop::collection::vec(id, 0..60);
    TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(2000) })
        .run(&(ids, any::<bool>()), |(ids, skip_special)| {
            prop_assert_eq!(stream(&tokenizer, &ids, skip_special), tokenizer.decode(&ids, skip_special));
            Ok(())
        })
        .unwrap();
}

fn is_one_byte(tokenizer: &Tokenizer, id: u32) -> bool {
    let text = tokenizer.decode(&[id], false);
    text == "\u{FFFD}" || text.len() == 1
}

#[test]
fn smollm2_streams_as_it_decodes() {
    check_streaming(SMOLLM2);
}

#[test]
fn qwen2_5_streams_as_it_decodes() {
    check_streaming(QWEN2_5);
}
