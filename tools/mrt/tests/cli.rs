//! `mrt` on good and damaged files.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::AtomicBool;

use mr_convert::{NewFile, convert, sources};
use mrt_format::{CHUNK_BYTES, NewSection, Qwen2Config, plan_file, qwen2_weights_layout, sha256};
use mruntime::Pool;
use mruntime::hf::Qwen2Dir;
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

/// A config whose arena has four chunks, most of them LM head.
const CFG: Qwen2Config = Qwen2Config {
    hidden_size: 64,
    intermediate_size: 96,
    num_layers: 2,
    num_heads: 4,
    num_kv_heads: 2,
    head_dim: 16,
    vocab_size: 100_000,
    max_position_embeddings: 128,
    rms_norm_eps: 1e-6,
    rope_theta: 1e4,
    tie_word_embeddings: true,
};

/// A file with numbers in place of weights, and the offset of its arena.
fn four_chunks() -> (Vec<u8>, usize) {
    let numbers = (0..qwen2_weights_layout(&CFG).arena_bytes / 4).map(|i| i as u32);
    let arena: Vec<u8> = numbers.flat_map(u32::to_le_bytes).collect();
    let digests: Vec<_> = arena.chunks(CHUNK_BYTES as usize).map(sha256).collect();
    let plan = plan_file(&CFG, &[NewSection { name: "LICENSE", bytes: 7 }]).unwrap();
    let (mut file, _) = plan.head(&[b"Be fair"], &digests);
    let start = file.len();
    file.extend_from_slice(&arena);
    (file, start)
}

fn write(bytes: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.mrt");
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn mrt(command: &str, file: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mrt")).arg(command).arg(file).args(args).output().unwrap()
}

/// Exit code, stdout and stderr, the file's path replaced by its name.
fn outcome(command: &str, file: &Path, args: &[&str]) -> (i32, String, String) {
    let output = mrt(command, file, args);
    let text = |bytes| String::from_utf8(bytes).unwrap().replace(file.to_str().unwrap(), "model.mrt");
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn json_of(command: &str, file: &Path, args: &[&str]) -> Value {
    let output = mrt(command, file, &[&["--json"], args].concat());
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_good_file_is_verified() {
    let (bytes, _) = four_chunks();
    let (_dir, path) = write(&bytes);
    let root = json_of("info", &path, &[])["root"].as_str().unwrap().to_owned();
    let expected = format!("model.mrt: all 2 sections and 4 chunks are as the digests say\nroot: {root}\n");
    for args in [&["--threads", "1"][..], &["--threads", "3"], &["--root", &root]] {
        assert_eq!(outcome("verify", &path, args), (0, expected.clone(), String::new()));
    }
    let expected =
        json!({"ok": true, "root": root, "signed_by": null, "sections": 2, "chunks": 4, "damage": []});
    assert_eq!(json_of("verify", &path, &[]), expected);
}

#[test]
fn every_damaged_part_is_named() {
    let (mut bytes, arena) = four_chunks();
    let (_dir, path) = write(&bytes);
    let section = json_of("info", &path, &[])["sections"][1].clone();
    assert_eq!(section["name"], "LICENSE");
    let license = section["offset"].as_u64().unwrap() as usize;
    bytes[license + 3] ^= 1;
    bytes[license + 7] ^= 1;
    bytes[arena] ^= 0x80;
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&path, &bytes).unwrap();

    let chunk = CHUNK_BYTES as usize;
    let (code, stdout, stderr) = outcome("verify", &path, &[]);
    assert_eq!(
        (code, stderr.as_str()),
        (1, "error: model.mrt: is damaged; get it again, or repair it from another copy (mrt repair)\n")
    );
    let lines: Vec<_> = stdout.lines().collect();
    assert_eq!(lines.len(), 4, "{stdout}");
    let end = license + 7;
    assert!(lines[0].contains(&format!("section LICENSE is damaged (bytes {license} to {end})")), "{stdout}");
    assert!(lines[1].contains(&format!("padding at byte {end} is not zero")), "{stdout}");
    let first = format!("chunk 0 of the weights is damaged (bytes {arena} to {})", arena + chunk);
    assert!(lines[2].contains(&first) && lines[2].contains("; it holds layers.0.attn_norm, layers.0.qkv, "));
    assert!(lines[2].ends_with(", final_norm, lm_head"), "{stdout}");
    let from = arena + 3 * chunk;
    assert!(
        lines[3].contains(&format!("chunk 3 of the weights is damaged (bytes {from} to {})", bytes.len()))
    );
    assert!(lines[3].ends_with("; it holds lm_head"), "{stdout}");

    let object = json_of("verify", &path, &[]);
    assert_eq!(object["ok"], false);
    assert_eq!(object["damage"][0]["section"], "LICENSE");
    assert_eq!(object["damage"][1]["bytes"], json!([end, end + 1]));
    assert_eq!(object["damage"][2]["chunk"], 0);
    assert_eq!(object["damage"][3]["tensors"], json!(["lm_head"]));
    assert_eq!(object["damage"][3]["bytes"], json!([from, bytes.len()]));
}

#[test]
fn a_flipped_bit_anywhere_is_found() {
    let (mut bytes, _) = four_chunks();
    let (_dir, path) = write(&bytes);
    let length = bytes.len();
    for offset in (0..length).step_by(length / 50).chain([length - 1]) {
        bytes[offset] ^= 1 << (offset % 8);
        std::fs::write(&path, &bytes).unwrap();
        let (code, _, stderr) = outcome("verify", &path, &[]);
        assert_eq!((code, stderr.lines().count()), (1, 1), "byte {offset}: {stderr}");
        assert!(stderr.starts_with("error: model.mrt: "), "{stderr}");
        bytes[offset] ^= 1 << (offset % 8);
    }
}

/// The files of `tests/vectors`, each of which breaks one rule of the format.
#[test]
fn every_invalid_vector_is_refused() {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors/files.json");
    let vectors: Value = serde_json::from_slice(&std::fs::read(vectors).unwrap()).unwrap();
    let made = |mut bytes: Vec<u8>, file: &Value| {
        bytes.resize(file["bytes"].as_u64().unwrap() as usize, 0);
        for piece in file["pieces"].as_array().unwrap() {
            let (at, digits) = (piece[0].as_u64().unwrap() as usize, piece[1].as_str().unwrap());
            for i in 0..digits.len() / 2 {
                bytes[at + i] = u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).unwrap();
            }
        }
        bytes
    };
    let valid = made(Vec::new(), &vectors["valid"]);
    let (_dir, path) = write(&valid);
    assert_eq!(outcome("verify", &path, &["--root", vectors["valid"]["root"].as_str().unwrap()]).0, 0);
    for file in vectors["invalid"].as_array().unwrap() {
        std::fs::write(&path, made(valid.clone(), file)).unwrap();
        let root = file["expected_root"].as_str().map(|root| ["--root", root]);
        let (code, _, stderr) = outcome("verify", &path, root.as_ref().map_or(&[], |args| args));
        assert_eq!((code, stderr.lines().count()), (1, 1), "{}: {stderr}", file["name"]);
    }
}

#[test]
fn what_is_no_model_file_is_refused_in_one_line() {
    let (bytes, _) = four_chunks();
    let (dir, path) = write(&bytes[..bytes.len() - 1]);
    for command in ["info", "verify"] {
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let (code, stdout, stderr) = outcome(command, &path, &[]);
        assert_eq!((code, stdout.as_str()), (1, ""));
        let expected = format!("error: model.mrt: truncated: {} of {} bytes", bytes.len() - 1, bytes.len());
        assert!(stderr.starts_with(&expected), "{stderr}");

        std::fs::write(&path, b"GGUF").unwrap();
        let (code, _, stderr) = outcome(command, &path, &[]);
        assert_eq!(
            (code, stderr.as_str()),
            (1, "error: model.mrt: not a .mrt file: it begins with \"GGUF\"\n")
        );

        let (code, _, stderr) = outcome(command, dir.path(), &[]);
        assert_eq!(code, 1);
        assert!(stderr.ends_with(": is not a regular file\n"), "{stderr}");

        let (code, _, stderr) = outcome(command, &dir.path().join("gone"), &[]);
        assert_eq!(code, 1);
        assert!(stderr.contains("No such file or directory"), "{stderr}");
    }
}

#[test]
fn another_root_is_refused() {
    let (bytes, _) = four_chunks();
    let (_dir, path) = write(&bytes);
    let (code, stdout, stderr) = outcome("verify", &path, &["--root", &"0".repeat(64)]);
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert!(
        stderr.starts_with("error: model.mrt: another file than expected: its root digest is "),
        "{stderr}"
    );
    let (code, _, stderr) = outcome("verify", &path, &["--root", "12ab"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("64 hexadecimal digits"), "{stderr}");
}

/// The tiny model `extremes`, converted.
fn converted() -> (TempDir, PathBuf) {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.mrt");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tiny/extremes");
    let model = Qwen2Dir::open(&source).unwrap();
    let target = NewFile::create(&path, sources(&model)).unwrap();
    let origin = Some("https://models.example/\u{1b}[31mred");
    convert(&model, &target, origin, &mut Pool::new(1).unwrap(), &AtomicBool::new(false)).unwrap();
    target.commit().unwrap();
    (dir, path)
}

#[test]
fn info_says_what_was_converted() {
    let (_dir, path) = converted();
    let info = json_of("info", &path, &["--tensors"]);
    assert_eq!(info["format"], "1.0");
    assert_eq!(info["parameters"], 88640);
    assert_eq!(info["config"]["hidden_size"], 64);
    assert_eq!(info["config"]["rms_norm_eps"], 1e-6);
    assert_eq!(info["config"]["tie_word_embeddings"], true);
    assert_eq!(info["arena"]["alignment"], 2 << 20);
    assert_eq!(info["arena"]["offset"].as_u64().unwrap() % (2 << 20), 0);
    assert_eq!(info["file_bytes"], std::fs::metadata(&path).unwrap().len());
    assert_eq!(info["generation"]["stop_tokens"], json!([319, 317]));
    assert_eq!(info["generation"]["top_p"], 1.0);
    assert_eq!(info["conversion"]["dtypes"], json!(["BF16"]));
    let counts = ["exact", "rounded", "flushed"].map(|key| info["conversion"][key].as_u64().unwrap());
    assert_eq!(counts.iter().sum::<u64>(), 88640);
    assert!(counts[1] > 0 && counts[2] > 0);
    assert_eq!(info["tensors"].as_array().unwrap().len(), 14);
    assert_eq!(info["tensors"][4]["name"], "layers.0.gate_up");
    assert_eq!(info["tensors"][4]["kind"], "pairs");
    assert_eq!(json_of("info", &path, &[])["tensors"], Value::Null);

    let (code, text, stderr) = outcome("info", &path, &["--tensors"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    let root = info["root"].as_str().unwrap();
    let converted =
        format!("from BF16: {} exact, {} rounded, {} flushed to zero", counts[0], counts[1], counts[2]);
    for expected in [
        root,
        &converted,
        "88640 parameters, 2 layers, tied embeddings",
        "4 query heads and 2 key-value heads of 16, RoPE base 1000000, RMSNorm epsilon 1e-6",
        "aligned to 2.0 MiB, in 1 chunks",
        "greedy (temperature 1, top-k 50, top-p 1, min-p 0, repetition penalty 1), stop tokens [319, 317]",
        "origin      origin: https://models.example/[31mred\n",
        "\ngeneration_config.json ",
        "\nlayers.1.down ",
    ] {
        assert!(text.contains(expected), "{expected:?} is not in\n{text}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_file_is_warmed_or_it_is_said_why_not() {
    let (bytes, start) = four_chunks();
    let (_dir, path) = write(&bytes);
    let output = mrt("warm", &path, &["--json"]);
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    let weights = (bytes.len() - start) as u64 >> 10;
    let huge = result["now"]["huge_kib"].as_u64().unwrap();
    assert_eq!(
        (&result["found"]["weights_kib"], &result["now"]["weights_kib"]),
        (&json!(weights), &json!(weights))
    );
    // Whether there are huge pages is for the file system to say.
    let (code, stderr) = (output.status.code(), String::from_utf8(output.stderr).unwrap());
    match huge >= weights / 2048 * 2048 / 10 * 9 {
        true => assert_eq!((code, stderr.as_str()), (Some(0), "")),
        false => assert!(code == Some(1) && stderr.contains("is in memory, but in small pages"), "{stderr}"),
    }
    assert!(std::fs::read(&path).unwrap() == bytes);
    let text = String::from_utf8(mrt("warm", &path, &[]).stdout).unwrap();
    assert!(text.contains(": found: ") && text.contains(": now: "), "{text}");

    let (_dir, path) = write(&bytes[..bytes.len() - 1]);
    let (code, stdout, stderr) = outcome("warm", &path, &[]);
    assert!(code == 1 && stdout.is_empty() && stderr.starts_with("error: model.mrt: truncated"), "{stderr}");
}
