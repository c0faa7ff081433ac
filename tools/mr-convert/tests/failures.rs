//! What stops a conversion: one line, exit code 1, nothing left behind, and the old target as it was.

mod common;

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime};

use common::*;
use half::bf16;
use mr_convert::{NewFile, sources};
use mruntime::Pool;
use mruntime::hf::Qwen2Dir;
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

/// Converts a changed copy of a tiny model over an old file and returns the one line that stopped it.
fn refused(name: &str, change: impl FnOnce(&Path)) -> String {
    let (model, out_dir) = (tempdir().unwrap(), tempdir().unwrap());
    copy_model(&tiny(name), model.path());
    change(model.path());
    let out = out_dir.path().join("out.mrt");
    std::fs::write(&out, "old").unwrap();
    let message = fails(model.path(), &out, &[]);
    assert_eq!(names(out_dir.path()), ["out.mrt"], "{message}");
    assert_eq!(std::fs::read(&out).unwrap(), b"old", "{message}");
    message
}

fn fails(model: &Path, out: &Path, args: &[&str]) -> String {
    let output = run(model, out, args);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let stderr = String::from_utf8(output.stderr).unwrap();
    let mut lines = stderr.lines().filter(|line| !line.starts_with("note: "));
    let error = lines.next().unwrap().strip_prefix("error: ").unwrap().to_owned();
    assert_eq!(lines.next(), None, "{stderr}");
    error
}

fn change_config(dir: &Path, key: &str, value: Value) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config[key] = value;
    std::fs::write(path, config.to_string()).unwrap();
}

/// Overwrites element `element` of a BF16 tensor of model.safetensors.
fn set_value(dir: &Path, tensor: &str, element: usize, value: f32) {
    let path = dir.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let (header, metadata): (usize, Metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let at = 8 + header + metadata.info(tensor).unwrap().data_offsets.0 + 2 * element;
    bytes[at..at + 2].copy_from_slice(&bf16::from_f32(value).to_le_bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn models_that_the_runtime_would_compute_wrongly() {
    for (key, value, expected) in [
        ("model_type", json!("llama"), "config.json: model_type is \"llama\""),
        ("use_sliding_window", json!(true), "config.json: use_sliding_window is true"),
        ("rope_scaling", json!({"type": "yarn", "factor": 4.0}), "config.json: rope_scaling."),
        ("quantization_config", json!({"bits": 4}), "config.json: quantization_config is"),
        ("hidden_size", Value::Null, "config.json: hidden_size is missing"),
        ("num_hidden_layers", json!(3), "tensor model.layers.2.input_layernorm.weight [64] is missing"),
        ("num_hidden_layers", json!(1), "has tensor \"model.layers.1.input_layernorm.weight\""),
        (
            "intermediate_size",
            json!(96),
            "gate_proj.weight has shape [112, 64]; config.json makes it [96, 64]",
        ),
        ("tie_word_embeddings", json!(false), "tensor lm_head.weight [320, 64] is missing"),
        ("vocab_size", json!(300), "bos_token_id has 317"),
    ] {
        let message = refused("tied", |dir| change_config(dir, key, value));
        assert!(message.contains(expected), "{message}");
    }
    let message = refused("tied", |dir| std::fs::remove_file(dir.join("config.json")).unwrap());
    assert!(message.contains("config.json: is missing"), "{message}");
}

#[test]
fn weights_that_are_not_whole() {
    let cut = |dir: &Path, name: &str| {
        let file = File::options().write(true).open(dir.join(name)).unwrap();
        file.set_len(file.metadata().unwrap().len() - 100).unwrap();
    };
    let message = refused("tied", |dir| cut(dir, "model.safetensors"));
    assert!(message.contains("model.safetensors: is truncated"), "{message}");
    let second = "model-00002-of-00003.safetensors";
    let message = refused("sharded3", |dir| cut(dir, second));
    assert!(message.contains("model-00002-of-00003.safetensors: is truncated"), "{message}");
    let message = refused("sharded3", |dir| std::fs::remove_file(dir.join(second)).unwrap());
    assert!(message.contains("model.safetensors.index.json: names the shard \"model-00002"), "{message}");
    let message = refused("tied", |dir| std::fs::remove_file(dir.join("model.safetensors")).unwrap());
    assert!(message.contains("has neither model.safetensors nor"), "{message}");
}

#[test]
fn tokenizers_that_do_not_belong_to_the_model() {
    let json = std::fs::read_to_string(fixture("tokenizer.json")).unwrap();
    let message =
        |json: &str| refused("tied", |dir| std::fs::write(dir.join("tokenizer.json"), json).unwrap());
    // Prepacked or not.
    for json in [json.clone(), json.replacen("\"add_prefix_space\":false", "\"add_prefix_space\":true", 1)] {
        let larger = json.replacen(":0,", ":320,", 1);
        assert!(larger != json);
        let error = message(&larger);
        assert!(
            error.ends_with(
                "tokenizer.json: has token ids up to 320, but vocab_size of config.json is 320: it is another model's; put the \
                 model's own in its place, or remove it and the file will take token ids, not text"
            ),
            "{error}"
        );
    }
    for (json, expected) in [
        ("{}", "tokenizer.json: "),
        ("{\"model\": {}}", "tokenizer.json: "),
        (
            &json.replacen(":0,", ":4000000000,", 1),
            "tokenizer.json: a token has id 4000000000, but ids must be below",
        ),
        (&json.replacen("\"BPE\"", "\"WordLevel\"", 1), "tokenizer.json: "),
        // The library panics.
        (
            &json.replacen(
                "\"normalizer\":null",
                "\"normalizer\":{\"type\":\"Precompiled\",\"precompiled_charsmap\":3}",
                1,
            ),
            "tokenizer.json: the tokenizers library panicked",
        ),
    ] {
        let error = message(json);
        assert!(error.contains(expected), "{error}");
        assert!(
            error.ends_with(
                "; put the model's own in its place, or remove it and the file will take token ids, not text"
            ),
            "{error}"
        );
        assert!(!error.contains("convert the model again"), "{error}");
    }
}

#[test]
fn values_that_fp16_cannot_hold() {
    const K: &str = "model.layers.1.self_attn.k_proj.weight";
    for (value, expected) in [
        (1e5, "model.layers.1.self_attn.k_proj.weight[3, 7] is 99840, beyond FP16's largest value 65504"),
        (-1e5, "model.layers.1.self_attn.k_proj.weight[3, 7] is -99840, beyond"),
        (
            f32::INFINITY,
            "model.layers.1.self_attn.k_proj.weight[3, 7] is inf; a weight must be a finite number",
        ),
        (f32::NAN, "model.layers.1.self_attn.k_proj.weight[3, 7] is NaN"),
    ] {
        let message = refused("tied", |dir| set_value(dir, K, 3 * 64 + 7, value));
        assert!(message.contains(expected), "{message}");
    }
    let message = refused("tied", |dir| set_value(dir, "model.layers.0.self_attn.v_proj.bias", 5, 7e4));
    assert!(message.contains("model.layers.0.self_attn.v_proj.bias[5] is 70144"), "{message}");
}

#[test]
fn the_first_bad_value_is_named_with_any_number_of_threads() {
    let dir = tempdir().unwrap();
    let mut tensors = random_tensors(&SEVEN_CHUNKS);
    for (name, _, values) in &mut tensors {
        if name.ends_with("down_proj.weight") || name.ends_with("embed_tokens.weight") {
            values.iter_mut().step_by(1000).for_each(|value| *value = bf16::INFINITY);
        }
    }
    write_config(dir.path(), &SEVEN_CHUNKS);
    write_safetensors(&dir.path().join("model.safetensors"), &tensors, Dtype::BF16);
    let out = dir.path().join("out.mrt");
    let message = fails(dir.path(), &out, &["--threads", "1"]);
    assert!(message.contains("model.layers.0.mlp.down_proj.weight["), "{message}");
    for _ in 0..5 {
        assert_eq!(fails(dir.path(), &out, &["--threads", "8"]), message);
    }
}

#[test]
fn weights_that_change_while_they_are_read() {
    let (model_dir, out_dir) = (tempdir().unwrap(), tempdir().unwrap());
    let out = out_dir.path().join("out.mrt");
    let weights = model_dir.path().join("model.safetensors");
    let whole = std::fs::read(tiny("tied").join("model.safetensors")).unwrap();
    let mut other = whole.clone();
    *other.last_mut().unwrap() ^= 1;
    for (changed, expected) in [
        (&other[..], "model.safetensors: changed while it was read"),
        (&whole[..whole.len() - 1], "model.safetensors: there is no byte 179943"),
        (&whole[..1000], "the file is shorter than it should be"),
    ] {
        copy_model(&tiny("tied"), model_dir.path());
        std::fs::write(&out, "old").unwrap();
        let model = Qwen2Dir::open(model_dir.path()).unwrap();
        let target = NewFile::create(&out, sources(&model)).unwrap();
        // In place, as a download that goes on would; time stamps may be coarse.
        std::fs::write(&weights, changed).unwrap();
        File::options().write(true).open(&weights).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        let mut pool = Pool::new(2).unwrap();
        let error = mr_convert::convert(&model, &target, None, &mut pool, &AtomicBool::new(false));
        drop(target);
        let message = error.unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
        assert_eq!(std::fs::read(&out).unwrap(), b"old");
        assert_eq!(names(out_dir.path()), ["out.mrt"]);
    }
}

#[test]
fn targets_that_cannot_be_written() {
    let dir = tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let message = fails(&tiny("tied"), &path("gone/out.mrt"), &[]);
    assert!(
        message.contains("gone/out.mrt: cannot be written to ") && message.contains("No such file"),
        "{message}"
    );
    let message = fails(&tiny("tied"), dir.path(), &[]);
    assert!(message.contains("is a directory; name the file to write"), "{message}");
    let message = fails(&tiny("tied"), &path("gone/"), &[]);
    assert!(message.contains("gone/: is the name of a directory; name the file to write"), "{message}");
    let report = path("gone/report.json");
    let message = fails(&tiny("tied"), &path("out.mrt"), &["--report", report.to_str().unwrap()]);
    assert!(message.contains("gone/report.json: cannot be written to "), "{message}");

    let report = dir.path().join(".").join("out.mrt");
    let message = fails(&tiny("tied"), &path("out.mrt"), &["--report", report.to_str().unwrap()]);
    assert!(message.contains("--report names the file to be converted to"), "{message}");

    copy_model(&tiny("tied"), &path("model"));
    for name in ["model.safetensors.index.json", "README.md", "origin", "conversion_report-12ab"] {
        std::fs::write(path("model").join(name), "{}").unwrap();
    }
    for name in names(&path("model")).into_iter().filter(|name| name != "golden.json") {
        let before = std::fs::read(path("model").join(&name)).unwrap();
        let message = fails(&path("model"), &path("model").join(&name), &[]);
        assert!(message.contains("is read to make the new file; name another one"), "{message}");
        assert!(std::fs::read(path("model").join(name)).unwrap() == before);
    }
    let message = fails(&path("nowhere"), &path("out.mrt"), &[]);
    assert!(message.contains("nowhere: No such file or directory"), "{message}");
    assert_eq!(names(dir.path()), ["model"]);
    assert_eq!(names(&path("model")).len(), 4 + 4, "the directory has what was put there");
}

#[cfg(target_os = "linux")]
#[test]
fn special_files_and_read_only_directories() {
    let dir = tempdir().unwrap();
    let message = fails(&tiny("tied"), Path::new("/dev/null"), &[]);
    assert!(message.contains("/dev/null: is not a regular file"), "{message}");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("nowhere/at/all", &link).unwrap();
    let message = fails(&tiny("tied"), &link, &[]);
    assert!(message.contains("is a link that leads nowhere"), "{message}");
    // Nobody, root included, creates files there: permission denied, or a read-only file system.
    let message = fails(&tiny("tied"), Path::new("/sys/out.mrt"), &[]);
    assert!(message.contains("/sys/out.mrt: cannot be written to /sys: "), "{message}");
}

/// Runs a shell script in which `$CONVERT` is the program and `$MODEL` a model.
#[cfg(target_os = "linux")]
fn shell(wrapper: &[&str], script: &str, dir: &Path) -> (i32, String) {
    let output = Command::new(wrapper[0])
        .args(&wrapper[1..])
        .args(["sh", "-c", script])
        .env("CONVERT", env!("CARGO_BIN_EXE_mr-convert"))
        .env("MODEL", tiny("tied"))
        .current_dir(dir)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap_or(-1), text)
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk() {
    // A file system of 256 KiB in a mount namespace of our own: as root, or as root of a user namespace.
    let namespaces: [&[&str]; 2] = [&["unshare", "--mount"], &["unshare", "--mount", "--map-root-user"]];
    let script = "mkdir disk && mount -t tmpfs -o size=256k none disk && echo old > disk/out.mrt && \
                  $CONVERT $MODEL disk/out.mrt 2>&1; echo code $?; cat disk/out.mrt; ls -A disk; rm -r disk 2>&-";
    let mut answers = namespaces.iter().map(|wrapper| shell(wrapper, script, tempdir().unwrap().path()).1);
    let Some(text) = answers.find(|text| text.contains("code ")) else {
        // A container may forbid it; then only `a_limit_on_the_size_of_files` tests what is alike.
        assert!(std::env::var_os("MRT_CI").is_none(), "no mount namespace can be had here");
        return;
    };
    assert!(
        text.contains("error: disk/out.mrt: cannot reserve the 2284800 bytes of the new file: No space"),
        "{text}"
    );
    assert!(text.ends_with("code 1\nold\nout.mrt\n"), "{text}");

    // No room for the report: the model is not replaced either.
    let script = "mkdir disk && mount -t tmpfs -o size=4k none disk && echo old > out.mrt && \
                  $CONVERT $MODEL out.mrt --report disk/report 2>&1; echo code $?; cat out.mrt; ls -A . disk; rm -r disk 2>&-";
    let mut answers = namespaces.iter().map(|wrapper| shell(wrapper, script, tempdir().unwrap().path()).1);
    let text = answers.find(|text| text.contains("code ")).unwrap();
    assert!(text.contains("error: disk/report: cannot be written: No space"), "{text}");
    assert!(text.ends_with("code 1\nold\n.:\ndisk\nout.mrt\n\ndisk:\n"), "{text}");
}

#[cfg(target_os = "linux")]
#[test]
fn messages_that_cannot_be_written() {
    let dir = tempdir().unwrap();
    let script = "$CONVERT $MODEL out.mrt >log 2>/dev/full; echo code $?; $CONVERT gone other.mrt 2>/dev/full; \
                  echo code $?; $CONVERT $MODEL out.mrt 2>&1 >/dev/full; echo code $?; ls -A";
    let (_, text) = shell(&["env"], script, dir.path());
    let full = "note: there is no tokenizer.json; the file will take token ids, not text\n\
                error: standard output: No space left on device (os error 28)\n";
    assert_eq!(text, format!("code 0\ncode 1\n{full}code 1\nlog\nout.mrt\n"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_limit_on_the_size_of_files() {
    let dir = tempdir().unwrap();
    let script = "echo old > out.mrt; ulimit -f 1000; $CONVERT $MODEL out.mrt 2>&1; echo code $?; \
                  cat out.mrt; ls -A";
    let (_, text) = shell(&["env"], script, dir.path());
    assert!(
        text.contains("error: out.mrt: cannot reserve the 2284800 bytes of the new file: File too large"),
        "{text}"
    );
    assert!(text.ends_with("code 1\nold\nout.mrt\n"), "{text}");
}

#[test]
fn wrong_usage_has_exit_code_2() {
    for args in [&["--threads", "0"][..], &["--threads", "1025"], &["--threads", "x"], &["--nonsense"]] {
        let output = run(&tiny("tied"), Path::new("out.mrt"), args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
    }
}

/// A model that takes some time to convert.
fn slow_model() -> TempDir {
    let dir = tempdir().unwrap();
    write_config(dir.path(), &SEVEN_CHUNKS);
    write_safetensors(&dir.path().join("model.safetensors"), &random_tensors(&SEVEN_CHUNKS), Dtype::BF16);
    dir
}

/// Starts a conversion over an old file, sends a signal after a pause and checks that the target is whole: old or
/// new. Returns what the program printed to stderr, and whether the target is new.
#[cfg(unix)]
fn stopped(model: &Path, pause: Duration, signal: &str, new: &[u8], out_dir: &Path) -> (String, bool) {
    let out = out_dir.join("out.mrt");
    std::fs::write(&out, "old").unwrap();
    let mut command = mr_convert();
    command.arg(model).arg(&out).args(["--threads", "1"]);
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(pause);
    // It may have ended, so that the signal finds nobody.
    Command::new("kill").args(["-s", signal, &child.id().to_string()]).output().unwrap();
    let output = child.wait_with_output().unwrap();
    let target = std::fs::read(&out).unwrap();
    let is_new = target == new;
    assert!(is_new || target == b"old", "a target of {} bytes", target.len());
    (String::from_utf8(output.stderr).unwrap(), is_new)
}

#[cfg(unix)]
#[test]
fn an_interrupted_conversion_leaves_nothing() {
    let (model, out_dir) = (slow_model(), tempdir().unwrap());
    let out = out_dir.path().join("out.mrt");
    convert(model.path(), &out, &[]);
    let new = std::fs::read(&out).unwrap();
    let mut interrupted = 0;
    for signal in ["INT", "TERM", "HUP"] {
        for millis in (0..100).step_by(4) {
            let pause = Duration::from_millis(millis);
            let (stderr, is_new) = stopped(model.path(), pause, signal, &new, out_dir.path());
            assert_eq!(names(out_dir.path()), ["out.mrt"], "{stderr}");
            let said = stderr.ends_with("error: interrupted; nothing was written\n");
            assert!(!said || !is_new);
            interrupted += usize::from(said);
        }
    }
    assert!(interrupted > 0, "no signal came while the conversion ran");
}

/// Numbers from 0 to 1, by Knuth's MMIX generator.
#[cfg(unix)]
fn random_fractions(mut state: u64) -> impl FnMut() -> f64 {
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(unix)]
#[test]
fn a_killed_conversion_leaves_the_old_target_or_the_new_one() {
    let (model, out_dir) = (slow_model(), tempdir().unwrap());
    let out = out_dir.path().join("out.mrt");
    let start = Instant::now();
    convert(model.path(), &out, &["--threads", "1"]);
    let took = start.elapsed();
    let new = std::fs::read(&out).unwrap();
    let seed = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("seed {seed}, {took:?}");
    let mut random = random_fractions(seed);
    let mut left = 0;
    for _ in 0..100 {
        // From the start of the program to somewhat after its end.
        let pause = took.mul_f64(1.2 * random());
        stopped(model.path(), pause, "KILL", &new, out_dir.path());
        // What a killed program leaves is under another name, and no reader takes it for a model.
        for name in names(out_dir.path()).into_iter().filter(|name| name != "out.mrt") {
            assert!(name.starts_with(".out.mrt.") && name.ends_with(".tmp"), "{name}");
            std::fs::remove_file(out_dir.path().join(name)).unwrap();
            left += 1;
        }
    }
    println!("{left} kills of 100 came while the file was written");
    assert!(left > 0, "no kill came while the conversion ran");
}
