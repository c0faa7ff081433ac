//! The program as its users start it, on the tiny models.

#![forbid(unsafe_code)]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use mruntime::{Isa, Numerics};
use mruntime_tests::{Run, TinyModel, bits, logits, max_abs_difference, read_f32};
use serde_json::{Value, json};

/// Largest difference of a logit from transformers' on these models, FP16 keys and values on both sides: float32 in
/// another order, through layers of random weights.
const TOLERANCE: f32 = 5e-3;

fn mr_bench(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mr-bench")).args(args).output().unwrap()
}

/// What a program that succeeded wrote to stdout.
fn stdout(args: &[&str]) -> String {
    let output = mr_bench(args);
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&stdout(args)).unwrap()
}

/// The one line that tells the error of a program that failed.
fn error(args: &[&str]) -> String {
    let output = mr_bench(args);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.starts_with("error: ") && stderr.lines().count() == 1, "{stderr}");
    stderr
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn logits_are_those_of_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let (ids, out) = (dir.path().join("ids.json"), dir.path().join("out.bin"));
    for model in TinyModel::all() {
        let mut golden = read_f32(&model.dir.join("golden_logits_kv16.bin"));
        for prompt in &model.prompts {
            let positions = prompt.positions();
            let rest = golden.split_off(positions.len() * model.vocab);
            fs::write(&ids, json!(prompt.ids).to_string()).unwrap();
            let args =
                ["logits", "--model-dir", text(&model.dir), "--tokens", text(&ids), "--out", text(&out)];
            stdout(&[&args[..], &["--all"]].concat());
            let all = read_f32(&out);
            assert_eq!(all.len(), prompt.ids.len() * model.vocab);
            for (row, &position) in golden.chunks(model.vocab).zip(&positions) {
                let difference = max_abs_difference(row, &all[position * model.vocab..][..model.vocab]);
                assert!(difference < TOLERANCE, "{} position {position}: {difference}", model.name());
            }
            golden = rest;
        }
        assert!(golden.is_empty());
    }
}

#[test]
fn logits_have_the_same_bits_however_they_are_computed() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let model = TinyModel::named("gqa7_hd32");
    let tokens: Vec<u32> = (0..50).map(|i| i * 7 % model.vocab as u32).collect();
    fs::write(file("ids.json"), json!(tokens).to_string()).unwrap();
    model.convert(Path::new(&file("model.mrt")), 1);
    let (cfg, weights) = model.load();
    let expected = bits(&logits(&cfg, weights.bytes(), &tokens, Run::usual()));
    let last = &expected[expected.len() - model.vocab..];

    let (from_file, from_dir) = (["-m", &file("model.mrt")], ["--model-dir", text(&model.dir)]);
    let out = file("out.bin");
    let rest = ["--tokens", &file("ids.json"), "--out", &out];
    for args in [
        &[&from_file[..], &rest, &["--all"]].concat()[..],
        &[&from_file[..], &rest].concat(),
        &[&from_file[..], &rest, &["--all", "--batch", "7", "--threads", "3"]].concat(),
        &[&from_file[..], &rest, &["--batch", "1", "--isa", "portable"]].concat(),
        &[&from_dir[..], &rest].concat(),
    ] {
        let result = json(&[&["logits"], args, &["--json"]].concat());
        let all = args.contains(&"--all");
        assert_eq!(bits(&read_f32(Path::new(&out))), if all { &expected } else { last }, "{args:?}");
        assert_eq!(result["tokens"], 50);
        assert_eq!(result["positions"], if all { 50 } else { 1 });
        assert_eq!(result["vocab_size"], model.vocab);
        let isa = if args.contains(&"portable") { Isa::PORTABLE } else { Isa::detect() };
        assert_eq!(result["isa"], isa.name());
        assert_has_origin(&result);
    }
}

/// Whatever is printed for machines says where and when it was made.
fn assert_has_origin(result: &Value) {
    assert!(result["machine"]["cores"].as_u64() > Some(0), "{result}");
    assert_eq!(result["version"], env!("CARGO_PKG_VERSION"));
    assert!(result["date"].as_str().is_some_and(|date| date.ends_with('Z')), "{result}");
    assert!(result.get("commit").is_some(), "{result}");
}

#[test]
fn bad_tokens_are_named_and_leave_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (ids, out) = (dir.path().join("ids.json"), dir.path().join("out.bin"));
    let model = TinyModel::named("tied");
    let logits = |out: &Path| {
        let args = ["logits", "--model-dir", text(&model.dir), "--tokens", text(&ids), "--out", text(out)];
        error(&args)
    };
    fs::write(&out, "old").unwrap();
    for (content, expected) in [
        ("[1, 2", "not a JSON array"),
        ("[1, -2]", "not a JSON array"),
        ("[1, 2.5]", "not a JSON array"),
        ("{}", "not a JSON array"),
        ("[]", "no token ids"),
        ("[1, 320]", "id 320 at index 1 is outside the vocabulary of 320 tokens"),
        (&json!(vec![0; 513]).to_string(), "513"),
    ] {
        fs::write(&ids, content).unwrap();
        let error = logits(&out);
        assert!(error.contains(expected), "{error}");
    }
    fs::remove_file(&ids).unwrap();
    assert!(logits(&out).contains("ids.json: "));
    fs::write(&ids, "[1]").unwrap();
    let missing = dir.path().join("missing/out.bin");
    assert!(logits(&missing).contains("missing/out.bin: cannot be written"));
    assert!(logits(dir.path()).contains("is a directory; name the file to write"));
    assert!(logits(&ids).contains("ids.json: is read to make the new file"));
    assert_eq!(fs::read(&ids).unwrap(), b"[1]");
    assert_eq!(fs::read(&out).unwrap(), b"old");
    let mut names: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["ids.json", "out.bin"]);
}

/// Mean of `-ln softmax(logits)[next token]` over the predictions of each window, the plain way.
fn naive_mean_nll(model: &TinyModel, tokens: &[u32], window: usize) -> (f64, usize) {
    let (cfg, weights) = model.load();
    let mut losses = Vec::new();
    for window in tokens.chunks(window).filter(|window| window.len() > 1) {
        let logits = logits(&cfg, weights.bytes(), window, Run::REFERENCE);
        for (row, &next) in logits.chunks(model.vocab).zip(&window[1..]) {
            let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
            losses.push(-(f64::from(row[next as usize]).exp() / sum).ln());
        }
    }
    (losses.iter().sum::<f64>() / losses.len() as f64, losses.len())
}

#[test]
fn perplexity_is_that_of_a_naive_computation() {
    let dir = tempfile::tempdir().unwrap();
    let ids = dir.path().join("ids.json");
    let model = TinyModel::named("vocab_odd");
    let tokens: Vec<u32> = (0..200).map(|i| i * i % model.vocab as u32).collect();
    fs::write(&ids, json!(tokens).to_string()).unwrap();
    let args = ["perplexity", "--model-dir", text(&model.dir), "--tokens", text(&ids), "--json"];
    // All in one window; the last window shorter than the others; a last window of one token, which predicts nothing.
    for window in [512, 64, 199] {
        let (mean, predictions) = naive_mean_nll(&model, &tokens, window);
        let window = window.to_string();
        let default = window == "512";
        for more in [&["--batch", "128"], &["--batch", "3"], &["--threads", "1"]] {
            let window = if default { &[][..] } else { &["--ctx", &window] };
            let result = json(&[&args[..], more, window].concat());
            let nll = result["mean_nll"].as_f64().unwrap();
            assert!((nll - mean).abs() < 1e-9, "{nll} {mean}");
            assert!((result["perplexity"].as_f64().unwrap() - mean.exp()).abs() < 1e-9 * mean.exp());
            assert_eq!((&result["tokens"], &result["predictions"]), (&json!(200), &json!(predictions)));
            assert_has_origin(&result);
        }
    }
    let last = mr_bench(&args[..args.len() - 1]);
    let text = String::from_utf8(last.stdout).unwrap();
    assert!(text.contains("perplexity ") && text.contains("windows of 512"), "{text}");
    assert!(text.starts_with("machine   ") && text.contains("exact numerics"), "{text}");
}

#[test]
fn a_text_is_tokenized_for_perplexity() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../mruntime_chat/tests/fixture/tokenizer.json");
    let dir = tempfile::tempdir().unwrap();
    let tiny = TinyModel::named("tied");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(tiny.dir.join(name), dir.path().join(name)).unwrap();
    }
    let (prose, ids) = (dir.path().join("text"), dir.path().join("ids.json"));
    fs::write(&prose, "the<|im_end|>é").unwrap();
    let perplexity = |option, path| {
        ["perplexity", "--model-dir", text(dir.path()), option, text(path), "--json"].map(str::to_owned)
    };
    let args = perplexity("-f", &prose);
    assert!(error(&args.each_ref().map(String::as_str)).contains("has no tokenizer.json"));
    fs::copy(fixture, dir.path().join("tokenizer.json")).unwrap();
    // "the" is one token, the special token too; é has two bytes.
    fs::write(&ids, "[257, 319, 195, 169]").unwrap();
    let from_ids = json(&perplexity("--tokens", &ids).each_ref().map(String::as_str));
    assert_eq!(json(&args.each_ref().map(String::as_str)), from_ids);
    assert_eq!(from_ids["predictions"], 3);

    fs::write(&prose, "a").unwrap();
    assert!(error(&args.each_ref().map(String::as_str)).contains("has 1 tokens"));
}

#[test]
fn speed_measures_every_combination() {
    let model = TinyModel::named("untied");
    let args = [
        "speed",
        "--model-dir",
        text(&model.dir),
        "-p",
        "3,9",
        "-n",
        "2",
        "-d",
        "0,5",
        "-t",
        "1,2",
        "-r",
        "2",
    ];
    let result = json(&[&args[..], &["--json", "--batch", "4"]].concat());
    let (cfg, weights) = model.load();
    assert_eq!(result["weight_bytes"], weights.bytes().len());
    assert_eq!(result["batch"], 4);
    let tests = result["tests"].as_array().unwrap();
    let names: Vec<_> = tests.iter().map(|test| test["test"].as_str().unwrap()).collect();
    let once = ["pp3", "pp9", "tg2", "pp3@d5", "pp9@d5", "tg2@d5"];
    assert_eq!(names, [once, once].concat());
    for (i, test) in tests.iter().enumerate() {
        let number = |name: &str| test[name].as_f64().unwrap();
        let roofline = &test["roofline"];
        assert_eq!((&test["threads"], &roofline["threads"]), (&json!(1 + i / 6), &json!(1 + i / 6)));
        let seconds: Vec<f64> =
            test["seconds"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect();
        let median = (seconds[0] + seconds[1]) / 2.0;
        assert_eq!(seconds.len(), 2);
        let tokens = number("prompt_tokens") + number("generated_tokens");
        let rate = &test["tokens_per_second"];
        assert!((rate["median"].as_f64().unwrap() * median / tokens - 1.0).abs() < 1e-9);
        assert!(
            rate["min"].as_f64() <= rate["median"].as_f64()
                && rate["median"].as_f64() <= rate["max"].as_f64()
        );
        if names[i].starts_with("tg") {
            assert_eq!((&test["limit"], &test["unit"]), (&roofline["read_gb_s"]["median"], &json!("GB/s")));
        } else {
            let peaks = roofline["fma_gflop_s"].as_array().unwrap();
            let peak = peaks.iter().find(|peak| peak["isa"] == result["isa"]).unwrap();
            assert_eq!((&test["limit"], &test["unit"]), (&peak["median"], &json!("GFLOP/s")));
        }
        assert!((number("share") * number("limit") / number("rate") - 1.0).abs() < 1e-9);
    }
    assert!(!cfg.tie_word_embeddings);

    let csv = stdout(
        &[&args[..2], &[text(&model.dir)], &["-p", "3", "-n", "1", "-t", "1", "-r", "1", "--csv"]].concat(),
    );
    let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    let column = |name: &str| lines[0].iter().position(|column| *column == name).unwrap();
    assert_eq!(lines.len(), 3);
    assert!(lines.iter().all(|line| line.len() == lines[0].len()), "{csv}");
    assert_eq!([lines[1][column("test")], lines[2][column("test")]], ["pp3", "tg1"]);
    assert_eq!(lines[1][column("model")], "untied");
}

#[test]
fn prefill_has_threads_of_its_own() {
    let model = TinyModel::named("tied");
    let args = ["speed", "--model-dir", text(&model.dir), "-p", "3", "-n", "2", "-r", "1", "--json"];
    let result = json(&[&args[..], &["-t", "1", "--threads-batch", "2,1"]].concat());
    let tests = result["tests"].as_array().unwrap();
    let found: Vec<_> =
        tests.iter().map(|t| (t["test"].as_str().unwrap(), t["threads"].as_u64().unwrap())).collect();
    assert_eq!(found, [("pp3", 1), ("tg2", 1), ("pp3", 2)]);
}

#[test]
fn the_fast_lane_is_measured_against_its_own_peak() {
    if Numerics::fast(Isa::detect()).is_none() {
        return;
    }
    let model = TinyModel::named("tied");
    let args =
        ["speed", "--model-dir", text(&model.dir), "-p", "9", "-n", "0", "-r", "1", "-t", "1", "--profile"];
    let result = json(&[&args[..], &["--json", "--numerics", "fast"]].concat());
    let (test, peak) = (&result["tests"][0], &result["tests"][0]["roofline"]["fast_gflop_s"]);
    assert_eq!(peak["numerics"], result["numerics"]);
    assert_eq!(test["limit"], peak["median"]);
    assert!(test["share"].as_f64() > Some(0.0));
    let profile = test["profile"].as_array().unwrap();
    let down = profile.iter().find(|o| o["operation"] == "down").unwrap();
    assert!(down["limit_share"].as_f64() > Some(0.0), "{down}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_cold_start_is_the_sum_of_its_stages() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.mrt");
    TinyModel::named("tied").convert(&file, 1);
    let args = ["cold", "-m", text(&file), "-p", "3,9", "-r", "2", "-t", "2", "--shapes", "0.1b"];
    let result = json(&[&args[..], &["--drop-caches=file", "--json"]].concat());
    let measurements = result["measurements"].as_array().unwrap();
    let found: Vec<_> =
        measurements.iter().map(|m| (&m["model"], m["prompt"].as_u64().unwrap(), &m["cache"])).collect();
    let of = |cache| [0, 3, 9].map(|prompt| (json!("model.mrt"), prompt, json!(cache)));
    let expected = [&of("warm")[..], &of("file dropped"), &[(json!("0.1b"), 0, json!("warm"))]].concat();
    assert!(found.into_iter().eq(expected.iter().map(|(model, prompt, cache)| (model, *prompt, cache))));
    let before = ["exec_and_link", "thread_pool", "open_and_validate", "tokenizer", "arenas"];
    let after = ["prefill", "page_faults", "sampling"];
    for measurement in measurements {
        let dropped = measurement["cache"] != "warm";
        assert_eq!(measurement["read"].as_array().unwrap().len(), if dropped { 2 } else { 0 });
        let runs = measurement["runs"].as_array().unwrap();
        assert_eq!(runs.len(), 2);
        for run in runs {
            let number = |value: &Value| value.as_f64().unwrap();
            let sum = |names: &[&str]| names.iter().map(|name| number(&run["stages"][name])).sum::<f64>();
            let (ready, first_token) = (number(&run["ready"]), number(&run["first_token"]));
            assert!((ready - sum(&before)).abs() < 1e-6, "{run}");
            assert!((first_token - ready - sum(&after)).abs() < 1e-6, "{run}");
            assert_eq!(first_token > ready, measurement["prompt"] != 0);
            assert!(number(&run["memory"]["anonymous"]) > 0.0, "{run}");
        }
    }
    let table = stdout(&args);
    assert!(table.contains("| first token, ms ") && table.contains(" 0.1b |"), "{table}");
    assert!(error(&["cold", "-m", "missing.mrt"]).contains("missing.mrt"));
}

#[test]
fn each_line_is_a_turn() {
    let model = &TinyModel::all()[0];
    let turns = |lines: &str| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_mr-bench"))
            .args(["turns", "--model-dir", text(&model.dir), "--threads", "2"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let output = turns("3\n0\n256\n");
    assert!(output.status.success(), "{output:?}");
    let seconds: Vec<Vec<f64>> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(seconds.iter().map(Vec::len).eq([3, 0, 256]));
    assert!(seconds.iter().flatten().all(|&s| s > 0.0));
    for line in ["257", "-1", "x"] {
        let output = turns(line);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let message = format!("error: standard input: \"{line}\" is not a number of tokens up to 256\n");
        assert_eq!(String::from_utf8(output.stderr).unwrap(), message);
    }
}

#[test]
fn wrong_usage_is_told_apart() {
    for (args, expected) in [
        (&["speed"][..], "--model"),
        (&["speed", "-m", "a", "--model-dir", "b"], "--model-dir"),
        (&["speed", "--model-dir", "b", "--backing", "read"], "--backing"),
        (&["speed", "-m", "a", "--backing", "hope"], "map"),
        (&["speed", "-m", "a", "--isa", "mmx"], "portable"),
        (&["speed", "-m", "a", "-t", "0"], "from 1 to 1024"),
        (&["speed", "-m", "a", "-r", "0"], "from 1"),
        (&["logits", "-m", "a", "--tokens", "b"], "--out"),
        (&["logits", "-m", "a", "--tokens", "b", "--out", "c", "--batch", "0"], "from 1"),
        (&["perplexity", "-m", "a"], "--file"),
        (&["perplexity", "-m", "a", "-f", "b", "--tokens", "c"], "--tokens"),
        (&["perplexity", "-m", "a", "-f", "b", "--ctx", "1"], "--ctx"),
    ] {
        let output = mr_bench(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{args:?}: {stderr}");
    }
    let model = TinyModel::named("tied");
    assert!(
        error(&["speed", "--model-dir", text(&model.dir), "-p", "0", "-n", "0"])
            .contains("nothing to measure")
    );
    let deep = error(&["speed", "--model-dir", text(&model.dir), "-p", "12", "-d", "501"]);
    assert!(deep.contains("565") && deep.contains("512"), "{deep}");
}

#[test]
fn a_closed_pipe_ends_it_quietly() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_mr-bench"))
        .args(["roofline", "-t", "1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn every_operation_is_profiled_and_traced() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace.json");
    let model = TinyModel::named("untied");
    let (cfg, _) = model.load();
    let args = ["speed", "--model-dir", text(&model.dir), "-p", "5", "-n", "3", "-t", "2", "-r", "2"];
    let result = json(&[&args[..], &["--json", "--profile", "--trace", text(&trace)]].concat());
    let once = ["embed", "final_norm", "lm_head"];
    for (test, passes) in result["tests"].as_array().unwrap().iter().zip([1, 3]) {
        let profile = test["profile"].as_array().unwrap();
        assert_eq!(profile.len(), 11);
        for operation in profile {
            let name = operation["operation"].as_str().unwrap();
            let calls = if once.contains(&name) { 1 } else { cfg.num_layers } * passes * 2;
            assert_eq!(operation["calls"], calls, "{name}");
            assert!(operation["seconds"].as_f64().unwrap() > 0.0);
            let product = operation["flops"].as_f64().unwrap() > 0.0;
            assert_eq!(product, operation["limit"].is_string(), "{operation}");
        }
    }
    let trace: Value = serde_json::from_slice(&fs::read(&trace).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    // For each test its name, then each operation of each pass.
    assert_eq!(events.len(), 2 + (1 + 3) * (3 + 8 * cfg.num_layers as usize));
    for (before, after) in events.iter().zip(&events[1..]) {
        if before["ph"] == "X" && after["ph"] == "X" && before["pid"] == after["pid"] {
            let number = |event: &Value, name: &str| event[name].as_f64().unwrap();
            assert!(number(before, "ts") + number(before, "dur") <= number(after, "ts") + 1e-3);
        }
    }
    assert!(result["date"].is_string() && result["machine"]["huge_pages"].is_string());
    let table = stdout(&[&args[..], &["--profile"]].concat());
    assert!(table.contains("| gate_up ") && table.contains("| all "), "{table}");
}

#[test]
fn the_fast_lane_is_compared_with_the_exact_one() {
    let dir = tempfile::tempdir().unwrap();
    let ids = dir.path().join("ids.json");
    let model = TinyModel::named("gqa7_hd32");
    let tokens: Vec<u32> = (0..200).map(|i| i * i % model.vocab as u32).collect();
    fs::write(&ids, json!(tokens).to_string()).unwrap();
    let rest = ["--model-dir", text(&model.dir), "--tokens", text(&ids)];
    let quality = [&["quality"], &rest[..]].concat();
    assert!(error(&[&quality[..], &["--isa", "portable"]].concat()).contains("no fast lane"));
    if Numerics::fast(Isa::detect()).is_none() {
        return;
    }
    let result = json(&[&quality[..], &["--json"]].concat());
    let exact = json(&[&["perplexity"], &rest[..], &["--json"]].concat());
    let fast = json(&[&["perplexity"], &rest[..], &["--json", "--numerics", "fast"]].concat());
    assert_eq!(result["perplexity_exact"], exact["perplexity"]);
    assert_eq!(result["perplexity_fast"], fast["perplexity"]);
    let number = |name: &str| result[name].as_f64().unwrap();
    assert!(0.0 < number("kl_mean") && number("kl_mean") <= number("kl_max"), "{result}");
    assert!(number("top1_agreement") <= 1.0);
    assert!(stdout(&quality).contains("KL divergence, mean"));
}
