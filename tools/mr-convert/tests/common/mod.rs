//! Models to convert, and the program that converts them.

#![allow(dead_code, reason = "each test program uses a part of this")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use half::bf16;
use mrt_format::{Prologue, Qwen2Config, prologue_bytes, qwen2_source_tensors};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::json;

pub fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tiny").join(name)
}

/// A file of the small tokenizer that the tiny models can have.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../mruntime_chat/tests/fixture").join(name)
}

pub fn mr_convert() -> Command {
    Command::new(env!("CARGO_BIN_EXE_mr-convert"))
}

pub fn run(model: &Path, out: &Path, args: &[&str]) -> Output {
    mr_convert().arg(model).arg(out).args(args).output().unwrap()
}

/// Converts and returns what was printed.
pub fn convert(model: &Path, out: &Path, args: &[&str]) -> String {
    let output = run(model, out, args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{model:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// The prologue of a whole file.
pub fn prologue(file: &[u8]) -> Prologue {
    let length = prologue_bytes(file, file.len() as u64).unwrap();
    Prologue::parse(&file[..length], file.len() as u64).unwrap()
}

/// The bytes of the weight arena of a whole file.
pub fn arena(file: &[u8]) -> &[u8] {
    &file[prologue(file).arena_offset() as usize..]
}

/// A config whose arena has seven chunks of 4 MiB, the last one short, with tensors that lie across their borders.
pub const SEVEN_CHUNKS: Qwen2Config = Qwen2Config {
    hidden_size: 512,
    intermediate_size: 1024,
    num_layers: 2,
    num_heads: 8,
    num_kv_heads: 2,
    head_dim: 64,
    vocab_size: 16400,
    max_position_embeddings: 512,
    rms_norm_eps: 1e-6,
    rope_theta: 1e4,
    tie_word_embeddings: true,
};

/// Names, shapes and BF16 values of a random model; a tenth of the values is small enough to be rounded or flushed.
pub fn random_tensors(cfg: &Qwen2Config) -> Vec<(String, Vec<usize>, Vec<bf16>)> {
    let mut state = 1u64;
    let mut next = move || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let value = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        bf16::from_f32(if state.is_multiple_of(10) { value * 2f32.powi(-22) } else { value })
    };
    let tensors = qwen2_source_tensors(cfg).into_iter();
    tensors
        .map(|t| (t.name, t.shape.clone(), (0..t.shape.iter().product()).map(|_| next()).collect()))
        .collect()
}

/// Writes tensors as BF16 or F32, in one file.
pub fn write_safetensors(path: &Path, tensors: &[(String, Vec<usize>, Vec<bf16>)], dtype: Dtype) {
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, _, values)| match dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_f32().to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        })
        .collect();
    let views = tensors.iter().zip(&data);
    let views =
        views.map(|((name, shape, _), data)| (name, TensorView::new(dtype, shape.clone(), data).unwrap()));
    serialize_to_file(views, None, path).unwrap();
}

/// Writes tensors in `count` shards with their index.
pub fn write_shards(dir: &Path, tensors: &[(String, Vec<usize>, Vec<bf16>)], count: usize) {
    let mut map = BTreeMap::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(count)).enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        write_safetensors(&dir.join(&file), part, Dtype::BF16);
        map.extend(part.iter().map(|(name, _, _)| (name.clone(), file.clone())));
    }
    let index = json!({"metadata": {}, "weight_map": map});
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

pub fn write_config(dir: &Path, cfg: &Qwen2Config) {
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": cfg.hidden_size, "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers, "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim, "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_position_embeddings, "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope_theta, "tie_word_embeddings": cfg.tie_word_embeddings,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// Copies the files of a model directory.
pub fn copy_model(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "json" || e == "safetensors") {
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// The names in a directory, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
