//! The fuzz targets on stable Rust: every stored input, and mutations of them.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use mrt_format::{Counts, GenerationDefaults, ReportEntry};
use mrt_format::{Digest, NewSection, SourceDtype, plan_file, qwen2_source_tensors, report_to_bytes};
use mruntime_tests::fuzz::{CONFIG, DIR_FILES, TARGETS, valid_config_json, valid_safetensors};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

fn corpus(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

/// The stored inputs of a target.
fn stored(target: &str) -> Vec<Vec<u8>> {
    let mut files: Vec<_> =
        std::fs::read_dir(corpus(target)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 1, "{target}");
    files.into_iter().map(|path| std::fs::read(path).unwrap()).collect()
}

#[test]
fn stored_inputs() {
    for (name, target) in TARGETS {
        stored(name).iter().for_each(|input| target(input));
    }
}

#[derive(Clone, Debug)]
enum Change {
    Set(prop::sample::Index, u8),
    SetWord(prop::sample::Index, u64),
    Remove(prop::sample::Index, usize),
    Repeat(prop::sample::Index, usize),
    Cut(prop::sample::Index),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let len = bytes.len();
        let range = |at: &prop::sample::Index, n: usize| {
            let at = at.index(len);
            at..(at + n).min(len)
        };
        match self {
            Change::Set(at, value) => bytes[at.index(len)] = *value,
            Change::SetWord(at, value) => {
                let range = range(at, 8);
                let word = value.to_le_bytes();
                bytes[range.clone()].copy_from_slice(&word[..range.len()]);
            }
            Change::Remove(at, n) => drop(bytes.drain(range(at, *n))),
            Change::Repeat(at, n) => {
                let piece = bytes[range(at, *n)].to_vec();
                let at = at.index(len);
                bytes.splice(at..at, piece);
            }
            Change::Cut(at) => bytes.truncate(at.index(len)),
        }
    }
}

fn change() -> impl Strategy<Value = Change> {
    let at = any::<prop::sample::Index>;
    let word = prop_oneof![any::<u64>(), Just(0), Just(1), Just(u64::MAX), Just(1 << 31), Just(1 << 63)];
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, value)| Change::Set(at, value)),
        (at(), word).prop_map(|(at, value)| Change::SetWord(at, value)),
        (at(), 1..64usize).prop_map(|(at, n)| Change::Remove(at, n)),
        (at(), 1..64usize).prop_map(|(at, n)| Change::Repeat(at, n)),
        at().prop_map(Change::Cut),
    ]
}

#[test]
fn mutated_inputs() {
    for (name, target) in TARGETS {
        let inputs = stored(name);
        let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(300) });
        let strategy = (any::<prop::sample::Index>(), prop::collection::vec(change(), 1..5));
        let result = runner.run(&strategy, |(which, changes)| {
            let mut input = which.get(&inputs).clone();
            changes.iter().for_each(|change| change.apply(&mut input));
            target(&input);
            Ok(())
        });
        result.unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

/// The inputs that fuzzing starts with: `cargo test -p mruntime-tests --test fuzz -- --ignored`
#[test]
#[ignore = "writes the files that the other tests read"]
fn write_the_seeds() {
    let write = |target: &str, name: &str, bytes: &[u8]| {
        std::fs::create_dir_all(corpus(target)).unwrap();
        std::fs::write(corpus(target).join(name), bytes).unwrap();
    };
    for (name, sections) in [
        ("one-section", &[][..]),
        ("all-sections", &["generation", "conversion_report", "origin", "LICENSE", "chat_template"]),
    ] {
        let length = |name: &str| match name {
            "generation" => 128,
            "conversion_report" => 32 * qwen2_source_tensors(&CONFIG).len(),
            _ => 7,
        };
        let sections: Vec<_> =
            sections.iter().map(|name| NewSection { name, bytes: length(name) as u64 }).collect();
        let plan = plan_file(&CONFIG, &sections).unwrap();
        let contents: Vec<_> = sections.iter().map(|s| vec![1; s.bytes as usize]).collect();
        let contents: Vec<_> = contents.iter().map(Vec::as_slice).collect();
        let (mut head, _) = plan.head(&contents, &[Digest([5; 32])]);
        head.truncate(512 + 96 * (1 + sections.len()) + 32);
        write("prologue", name, &head);
    }

    let generation =
        GenerationDefaults { stop_tokens: vec![3, 69], bos_token: Some(1), ..Default::default() };
    write("sections", "generation", &[&[0], generation.to_bytes(&CONFIG).unwrap().as_slice()].concat());
    let entry = |elements| ReportEntry {
        dtype: SourceDtype::Bf16,
        counts: Counts { exact: elements - 3, rounded: 2, flushed: 1 },
    };
    let report: Vec<_> = qwen2_source_tensors(&CONFIG).iter().map(|t| entry(t.elements())).collect();
    write("sections", "report", &[&[1], report_to_bytes(&report).as_slice()].concat());

    let index =
        r#"{"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "shard.safetensors"}}"#;
    let generation = r#"{"do_sample": true, "temperature": 0.5, "top_k": 4, "eos_token_id": [1, 2]}"#;
    let files = [valid_safetensors(), index.into(), valid_config_json(), generation.into()];
    for (kind, (name, content)) in DIR_FILES.iter().zip(files).enumerate() {
        write("safetensors", name, &[&[kind as u8], content.as_slice()].concat());
    }

    let byte_level =
        r#"{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}"#;
    let vocab: Vec<_> = ('!'..='~').enumerate().map(|(id, c)| format!("{:?}:{id}", c.to_string())).collect();
    let tokenizer = format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{{"id":95,"content":"<|im_end|>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}}],"normalizer":{{"type":"NFC"}},"pre_tokenizer":{{"type":"Sequence","pretokenizers":[{{"type":"Split","pattern":{{"Regex":"(?i:'s|'t)|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|\\p{{N}}| ?[^\\s\\p{{L}}\\p{{N}}]+|\\s+(?!\\S)|\\s+"}},"behavior":"Isolated","invert":false}},{byte_level}]}},"post_processor":{byte_level},"decoder":{byte_level},"model":{{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":"","end_of_word_suffix":"","fuse_unk":false,"byte_fallback":false,"ignore_merges":false,"vocab":{{{},"he":94}},"merges":["h e"]}}}}"#,
        vocab.join(",").replace("\\'", "'")
    );
    mruntime_text::Tokenizer::from_json(tokenizer.as_bytes()).unwrap();
    let known = tokenizer
        .replace("(?i:'s|'t)|", "(?i:'s|'t|'re|'ve|'m|'ll|'d)|")
        .replace("+|\\\\s+(", "+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(");
    write("prepacked", "bpe", &mruntime_text::prepack_tokenizer(known.as_bytes()).unwrap());
    write("prepacked", "empty", b"");
    write("tokenizer", "bpe", &[tokenizer.as_bytes(), b"\0hehe  it's 12 \xff"].concat());
    write("tokenizer", "empty", b"{}");

    let tool = "{%- if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}";
    let chat = "{%- for m in messages -%}<|im_start|>{{ m.role + '\\n' + m['content'] }}<|im_end|>\n{% endfor -%}\
                {%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let names = r#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "x"}"#;
    write("chat_template", "chat", &[tool, chat, "\0", names].concat().into_bytes());
    let namespace = "{% set ns = namespace(n=messages|length - 1, seen=false) %}{% macro show(x, y='a') %}{{ x ~ y }}\
                     {% endmacro %}{% for m in messages[::-1] %}{% set i = ns.n - loop.index0 %}{% if m.role == 'user' \
                     and not ns.seen %}{% set ns.seen = true %}{% endif %}{{ show(m.content.split('</think>')[-1] | \
                     trim) }}{% generation %}{{ m.content.strip().replace('a', 'b') }}{% endgeneration %}{% break %}\
                     {% endfor %}{{ raise_exception('no') if ns.seen is false }}";
    let messages = r#"[{"role": "user", "content": "Hi", "tool_calls": [{"name": "f"}]}]"#;
    write("chat_template", "namespace", &[namespace, "\0", messages].concat().into_bytes());
}
