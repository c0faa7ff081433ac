//! What hostile bytes meet, one function for each kind of input. `fuzz/` runs them under libFuzzer, `fuzz.rs` on the
//! stored corpus and its mutations. A function returns whatever the bytes are; a panic, an abort, a lot of memory or
//! time is a bug.

use std::cell::RefCell;
use std::path::Path;

use mrt_format::{
    CHUNK_BYTES, Digest, GenerationDefaults, HEADER_BYTES, Prologue, TokenizerSection, prologue_bytes,
    qwen2_source_count, qwen2_source_tensors, qwen2_weights_layout, report_from_bytes, report_to_bytes,
    sha256,
};
use mruntime::hf::{Qwen2Dir, qwen2_load_weights};
use mruntime::{Pool, Qwen2Config};
use mruntime_text::{
    ChatTemplate, SpecialTokenNames, SpecialTokens, StreamDecoder, Tokenizer, find_chat_template,
    prepack_tokenizer,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// What takes the bytes of one input.
pub type Target = fn(&[u8]);

/// The kinds of input, by the names of their folders in `fuzz/corpus`.
pub const TARGETS: [(&str, Target); 6] = [
    ("prologue", prologue),
    ("sections", sections),
    ("safetensors", safetensors),
    ("tokenizer", tokenizer),
    ("prepacked", prepacked),
    ("chat_template", chat_template),
];

/// Config of the prologues and sections of the corpus: the one of the layout fingerprint.
pub const CONFIG: Qwen2Config = Qwen2Config {
    hidden_size: 40,
    intermediate_size: 72,
    num_layers: 2,
    num_heads: 6,
    num_kv_heads: 2,
    head_dim: 6,
    vocab_size: 70,
    max_position_embeddings: 128,
    rms_norm_eps: 1e-6,
    rope_theta: 1e6,
    tie_word_embeddings: false,
};

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().expect("eight bytes"))
}

fn put_u64(bytes: &mut [u8], offset: usize, value: u64) {
    bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
}

/// Header, directory and chunk table: as they are, then with a root digest made anew, then with all that follows from
/// the config made anew too. Each opens a further part of the validation to the fuzzer.
pub fn prologue(data: &[u8]) {
    let _ = Prologue::parse(data, data.len() as u64);
    let mut bytes = data.to_vec();
    parse_with_root(&mut bytes);
    if bytes.len() >= HEADER_BYTES {
        make_consistent(&mut bytes);
        parse_with_root(&mut bytes);
    }
}

/// Parses with the file's length as the header states it, after making the root digest anew.
fn parse_with_root(bytes: &mut [u8]) {
    let actual = if bytes.len() >= HEADER_BYTES { u64_at(bytes, 32) } else { 0 };
    if let Ok(needed) = prologue_bytes(bytes, actual)
        && needed <= bytes.len()
    {
        bytes[160..192].fill(0);
        let root = sha256(&bytes[..needed]);
        bytes[160..192].copy_from_slice(&root.0);
    }
    if let Ok(prologue) = Prologue::parse(bytes, actual) {
        check_accepted(&prologue, actual);
    }
}

/// What holds of every prologue that is accepted.
fn check_accepted(prologue: &Prologue, actual: u64) {
    let arena = prologue.layout().arena_bytes;
    assert_eq!(prologue.config().validate(), Ok(()));
    assert_eq!(prologue.layout(), &qwen2_weights_layout(prologue.config()));
    assert_eq!((prologue.file_bytes(), prologue.arena_offset() + arena), (actual, actual));
    let mut end = HEADER_BYTES as u64;
    for section in prologue.sections() {
        assert!(section.offset >= end && section.offset.is_multiple_of(64));
        assert!(Path::new(&section.name).file_name().is_some_and(|name| name == section.name.as_str()));
        end = section.offset + section.bytes;
        let _ = prologue.check_section(&section.name, &[]);
    }
    let padding: u64 = prologue.padding().map(|(_, bytes)| bytes).sum();
    assert!(end <= prologue.arena_offset() && padding < prologue.arena_offset());
    let mut end = 0;
    for tensor in prologue.layout().tensors(prologue.config()) {
        assert_eq!(tensor.span.offset, end);
        end = tensor.span.end();
        assert!(tensor.name().len() <= 64);
    }
    assert_eq!(end, arena);
    assert_eq!((0..prologue.chunk_count()).map(|i| prologue.chunk(i).bytes).sum::<u64>(), arena);
}

/// Writes the sizes and offsets that the config and the lengths of the sections make.
fn make_consistent(bytes: &mut [u8]) {
    let cfg = Qwen2Config {
        hidden_size: u32_at(bytes, 68),
        intermediate_size: u32_at(bytes, 72),
        num_layers: u32_at(bytes, 76),
        num_heads: u32_at(bytes, 80),
        num_kv_heads: u32_at(bytes, 84),
        head_dim: u32_at(bytes, 88),
        vocab_size: u32_at(bytes, 92),
        max_position_embeddings: u32_at(bytes, 96),
        rms_norm_eps: f64::from_bits(u64_at(bytes, 104)),
        rope_theta: f64::from_bits(u64_at(bytes, 112)),
        tie_word_embeddings: u32_at(bytes, 100) & 1 != 0,
    };
    if cfg.validate().is_err() {
        return;
    }
    let layout = qwen2_weights_layout(&cfg);
    let sections = u32_at(bytes, 56).min(64) as usize;
    let table = HEADER_BYTES + 96 * sections;
    let mut end = table as u64 + size_of::<Digest>() as u64 * layout.arena_bytes.div_ceil(CHUNK_BYTES);
    let whole_entries = table.min(bytes.len() - (bytes.len() - HEADER_BYTES) % 96);
    for entry in (HEADER_BYTES..whole_entries).step_by(96) {
        let fixed = match &bytes[entry..entry + 20] {
            b"tensor_table\0\0\0\0\0\0\0\0" => Some(96 * layout.tensors(&cfg).count() as u64),
            b"conversion_report\0\0\0" => Some(32 * qwen2_source_count(&cfg) as u64),
            b"generation\0\0\0\0\0\0\0\0\0\0" => Some(128),
            _ => None,
        };
        if let Some(fixed) = fixed {
            put_u64(bytes, entry + 48, fixed);
        }
        let offset = end.next_multiple_of(64);
        end = offset.saturating_add(u64_at(bytes, entry + 48)).min(1 << 60);
        put_u64(bytes, entry + 40, offset);
    }
    let arena_offset = end.next_multiple_of(2 << 20);
    put_u64(bytes, 40, arena_offset);
    put_u64(bytes, 48, layout.arena_bytes);
    put_u64(bytes, 32, arena_offset + layout.arena_bytes);
}

/// The sections with a binary form, which are read after their digest has been checked; the first byte chooses.
pub fn sections(data: &[u8]) {
    let Some((kind, content)) = data.split_first() else { return };
    match kind % 2 {
        0 => {
            if let Ok(defaults) = GenerationDefaults::from_bytes(&CONFIG, content) {
                assert_eq!(defaults.to_bytes(&CONFIG).as_deref(), Ok(content));
            }
        }
        _ => {
            if let Ok(report) = report_from_bytes(&CONFIG, content) {
                assert_eq!(report_to_bytes(&report), content);
            }
        }
    }
}

/// Config of the directories that [`safetensors`] opens.
const DIR_CONFIG: Qwen2Config = Qwen2Config {
    hidden_size: 8,
    intermediate_size: 6,
    num_layers: 1,
    num_heads: 2,
    num_kv_heads: 1,
    head_dim: 4,
    vocab_size: 5,
    max_position_embeddings: 16,
    rms_norm_eps: 1e-6,
    rope_theta: 1e4,
    tie_word_embeddings: true,
};

/// A safetensors file that fits `DIR_CONFIG`.
pub fn valid_safetensors() -> Vec<u8> {
    let (mut header, mut data) = (json!({}), Vec::new());
    for tensor in qwen2_source_tensors(&DIR_CONFIG) {
        let start = data.len();
        data.extend((0..tensor.elements()).flat_map(|i| (0x3c00 + i as u16 % 100).to_le_bytes()));
        header[tensor.name] =
            json!({"dtype": "F16", "shape": tensor.shape, "data_offsets": [start, data.len()]});
    }
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

/// A config.json that says `DIR_CONFIG`.
pub fn valid_config_json() -> Vec<u8> {
    let cfg = &DIR_CONFIG;
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size, "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads, "num_key_value_heads": cfg.num_kv_heads,
        "vocab_size": cfg.vocab_size, "max_position_embeddings": cfg.max_position_embeddings,
        "rope_theta": cfg.rope_theta, "tie_word_embeddings": cfg.tie_word_embeddings,
    });
    config.to_string().into_bytes()
}

/// The files of a model directory that [`safetensors`] replaces by the input, by its first byte.
pub const DIR_FILES: [&str; 4] =
    ["model.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"];

/// A Hugging Face directory of which one file is the input: opening it and packing its weights.
pub fn safetensors(data: &[u8]) {
    thread_local! {
        static DIR: RefCell<Option<(TempDir, Pool)>> = const { RefCell::new(None) };
    }
    let Some((kind, content)) = data.split_first() else { return };
    let changed = DIR_FILES[usize::from(*kind) % DIR_FILES.len()];
    DIR.with_borrow_mut(|state| {
        let (dir, pool) = state.get_or_insert_with(|| {
            (tempfile::tempdir().expect("a folder"), Pool::new(1).expect("one thread"))
        });
        let index: Value = qwen2_source_tensors(&DIR_CONFIG)
            .into_iter()
            .map(|tensor| (tensor.name, Value::from("shard.safetensors")))
            .collect::<serde_json::Map<_, _>>()
            .into();
        let index = json!({ "weight_map": index }).to_string().into_bytes();
        let sharded = changed == DIR_FILES[1];
        let weights = if sharded { "shard.safetensors" } else { DIR_FILES[0] };
        let mut files = vec![(weights, valid_safetensors()), (DIR_FILES[2], valid_config_json())];
        if sharded {
            files.push((DIR_FILES[1], index));
        }
        for (name, valid) in files.into_iter().filter(|(name, _)| *name != changed) {
            std::fs::write(dir.path().join(name), valid).expect("a file");
        }
        std::fs::write(dir.path().join(changed), content).expect("a file");
        if let Ok(model) = Qwen2Dir::open(dir.path())
            && let Ok(arena) = qwen2_load_weights(&model, pool)
        {
            assert_eq!(arena.bytes().len() as u64, qwen2_weights_layout(&model.config).arena_bytes);
        }
        for name in DIR_FILES.iter().chain(&["shard.safetensors"]) {
            let _ = std::fs::remove_file(dir.path().join(name));
        }
    });
}

/// A tokenizer.json; what follows a zero byte is a text to encode with it.
pub fn tokenizer(data: &[u8]) {
    let (json, text) = split_at_zero(data);
    let text = String::from_utf8_lossy(text);
    if let Ok(tokenizer) = Tokenizer::from_json(json) {
        use_tokenizer(&tokenizer, &text);
    }
    if let Ok(section) = prepack_tokenizer(json) {
        use_tokenizer(&Tokenizer::from_section(section).expect("what is written can be read"), &text);
    }
}

/// The content of a `tokenizer` section; its last 32 bytes are a text to encode with it, too.
pub fn prepacked(data: &[u8]) {
    let Ok(tokenizer) = Tokenizer::from_section(data.to_vec()) else { return };
    let text = String::from_utf8_lossy(&data[data.len().saturating_sub(32)..]);
    use_tokenizer(&tokenizer, &text);
    let ids: Vec<u32> =
        data.chunks(4).take(64).map(|bytes| bytes.iter().fold(0, |id, &b| id << 3 ^ u32::from(b))).collect();
    let _ = tokenizer.decode(&ids, true);
    let _ = TokenizerSection::new(data).map(|section| section.check());
}

fn use_tokenizer(tokenizer: &Tokenizer, text: &str) {
    for text in ["Hello, world! 12 <|im_end|>\n", "e\u{301}  a\u{327}\u{301} it's \u{1112}\u{1161}", text] {
        for special in [SpecialTokens::Parse, SpecialTokens::AsText] {
            let Ok(ids) = tokenizer.encode(text, special) else { continue };
            let _ = tokenizer.decode(&ids, true);
            let mut stream = StreamDecoder::new(tokenizer, false);
            let mut streamed = String::new();
            for &id in &ids {
                streamed.push_str(stream.push(id));
            }
            assert_eq!(streamed + stream.finish(), tokenizer.decode(&ids, false));
        }
    }
}

/// A chat template; what follows a zero byte is a list of messages, or a tokenizer_config.json.
pub fn chat_template(data: &[u8]) {
    let (source, rest) = split_at_zero(data);
    let _ = find_chat_template(None, Some(rest));
    let names = SpecialTokenNames::from_tokenizer_config(rest).unwrap_or_default();
    let Ok(template) = ChatTemplate::new(&String::from_utf8_lossy(source), &names) else { return };
    let messages: Vec<Value> = serde_json::from_slice(rest).unwrap_or_else(|_| {
        let message = |role, content| json!({"role": role, "content": content});
        vec![
            message("system", "Be brief."),
            message("user", "Hi"),
            message("assistant", "Yes?"),
            message("user", "<b>"),
        ]
    });
    let tools = [json!({"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2.5, null]}}})];
    let _ = template.render(&messages, None, true);
    let _ = template.render(&messages, Some(&tools), false);
}

fn split_at_zero(data: &[u8]) -> (&[u8], &[u8]) {
    let mut parts = data.splitn(2, |&byte| byte == 0);
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
}
