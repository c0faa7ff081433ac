//! What a conversion writes and prints.

mod common;

use std::path::Path;

use common::*;
use half::{bf16, f16};
use mrt_format::{
    CHAT_TEMPLATE, CONVERSION_REPORT, GENERATION, GenerationDefaults, ORIGIN, TOKEN_NAMES, TOKENIZER,
    qwen2_source_tensors, report_from_bytes, sha256,
};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use tempfile::tempdir;

const TINY: [&str; 12] = [
    "big_bias",
    "extremes",
    "gqa7_hd32",
    "gqa7_hd64",
    "gqa7_head_dim",
    "inter_odd",
    "sharded3",
    "store_f16",
    "store_f32",
    "tied",
    "untied",
    "vocab_odd",
];

#[test]
fn a_terminal_sees_how_far_it_is() {
    let dir = tempdir().unwrap();
    let mut command = mr_convert();
    command.arg(tiny("tied")).arg(dir.path().join("model.mrt")).env("TERM", "xterm");
    let mut terminal = rexpect::session::spawn_command(command, Some(60_000)).unwrap();
    for shown in ["packing ", "hashing ", "sha256: "] {
        terminal.exp_string(shown).unwrap();
    }
    terminal.exp_eof().unwrap();
}

#[test]
fn every_digest_of_every_tiny_model_is_right() {
    let dir = tempdir().unwrap();
    for name in TINY {
        let out = dir.path().join(name);
        let printed: Value = serde_json::from_str(&convert(&tiny(name), &out, &["--json"])).unwrap();
        let file = std::fs::read(&out).unwrap();
        let prologue = prologue(&file);
        assert_eq!(printed["sha256"], sha256(&file).to_string(), "{name}");
        assert_eq!(printed["root"], prologue.root().to_string());
        assert_eq!(printed["file_bytes"], file.len());
        assert_eq!(printed["arena_bytes"], arena(&file).len());
        for section in prologue.sections() {
            let content = &file[section.offset as usize..][..section.bytes as usize];
            prologue.check_section(&section.name, content).unwrap();
        }
        for i in 0..prologue.chunk_count() {
            let span = prologue.chunk(i);
            prologue.check_chunk(i, &arena(&file)[span.offset as usize..][..span.bytes as usize]).unwrap();
        }
        for (offset, bytes) in prologue.padding() {
            prologue.check_padding(offset, &file[offset as usize..][..bytes as usize]).unwrap();
        }
    }
    let mut expected = TINY.map(String::from);
    expected.sort();
    assert_eq!(names(dir.path()), expected, "nothing is left beside the files");
}

#[test]
fn the_bytes_depend_on_neither_threads_nor_shards() {
    let dir = tempdir().unwrap();
    let tensors = random_tensors(&SEVEN_CHUNKS);
    let [whole, sharded] = ["whole", "sharded"].map(|name| dir.path().join(name));
    for model in [&whole, &sharded] {
        std::fs::create_dir(model).unwrap();
        write_config(model, &SEVEN_CHUNKS);
    }
    write_safetensors(&whole.join("model.safetensors"), &tensors, Dtype::BF16);
    write_shards(&sharded, &tensors, 3);

    let out = dir.path().join("out.mrt");
    convert(&whole, &out, &["--threads", "1"]);
    let expected = std::fs::read(&out).unwrap();
    assert_eq!(prologue(&expected).chunk_count(), 7);
    for (model, threads) in [(&whole, "2"), (&whole, "8"), (&sharded, "1"), (&sharded, "8")] {
        convert(model, &out, &["--threads", threads]);
        assert!(std::fs::read(&out).unwrap() == expected, "{model:?} with {threads} threads");
    }
}

#[test]
fn the_arena_does_not_depend_on_how_the_same_values_are_stored() {
    let dir = tempdir().unwrap();
    let tensors = random_tensors(&SEVEN_CHUNKS);
    let arenas = [Dtype::BF16, Dtype::F32].map(|dtype| {
        write_config(dir.path(), &SEVEN_CHUNKS);
        write_safetensors(&dir.path().join("model.safetensors"), &tensors, dtype);
        let out = dir.path().join("out.mrt");
        convert(dir.path(), &out, &[]);
        arena(&std::fs::read(&out).unwrap()).to_vec()
    });
    assert!(arenas[0] == arenas[1]);
}

#[cfg(unix)]
#[test]
fn a_hub_snapshot_of_links_gives_the_same_bytes() {
    let dir = tempdir().unwrap();
    let [blobs, snapshot] = ["blobs", "snapshots"].map(|name| dir.path().join(name));
    std::fs::create_dir(&blobs).unwrap();
    std::fs::create_dir(&snapshot).unwrap();
    for (i, name) in names(&tiny("sharded3")).iter().enumerate() {
        std::fs::copy(tiny("sharded3").join(name), blobs.join(i.to_string())).unwrap();
        std::os::unix::fs::symlink(format!("../blobs/{i}"), snapshot.join(name)).unwrap();
    }
    let [a, b] = ["a.mrt", "b.mrt"].map(|name| dir.path().join(name));
    convert(&tiny("sharded3"), &a, &[]);
    convert(&snapshot, &b, &[]);
    assert!(std::fs::read(a).unwrap() == std::fs::read(b).unwrap());
}

/// Counts by the definition, on the values as safetensors holds them.
fn counts(tensor: &safetensors::tensor::TensorView) -> [u64; 3] {
    let data = tensor.data();
    let values: Vec<f32> = match tensor.dtype() {
        Dtype::BF16 => data.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::F16 => data.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::F32 => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        other => panic!("{other:?}"),
    };
    let mut counts = [0; 3];
    for value in values {
        let stored = f16::from_f32(value).to_f32();
        counts[if stored == value {
            0
        } else if stored != 0.0 {
            1
        } else {
            2
        }] += 1;
    }
    counts
}

#[test]
fn the_report_counts_what_became_of_each_value() {
    let dir = tempdir().unwrap();
    let (out, report_path) = (dir.path().join("out.mrt"), dir.path().join("report.json"));
    for name in ["extremes", "store_f16", "store_f32"] {
        let args = ["--json", "--report", report_path.to_str().unwrap()];
        let printed: Value = serde_json::from_str(&convert(&tiny(name), &out, &args)).unwrap();
        let report: Value = serde_json::from_slice(&std::fs::read(&report_path).unwrap()).unwrap();
        assert_eq!(report, printed);

        let file = std::fs::read(&out).unwrap();
        let prologue = prologue(&file);
        let section = prologue.section(CONVERSION_REPORT).unwrap();
        let section = &file[section.offset as usize..][..section.bytes as usize];
        let section = report_from_bytes(prologue.config(), section).unwrap();

        let source = std::fs::read(tiny(name).join("model.safetensors")).unwrap();
        let source = SafeTensors::deserialize(&source).unwrap();
        let mut total = [0; 3];
        let tensors = qwen2_source_tensors(prologue.config());
        assert_eq!(report["tensors"].as_array().unwrap().len(), tensors.len());
        for (i, tensor) in tensors.iter().enumerate() {
            let (view, entry) = (source.tensor(&tensor.name).unwrap(), &report["tensors"][i]);
            assert_eq!(entry["name"], tensor.name);
            assert_eq!(entry["dtype"], format!("{:?}", view.dtype()));
            let expected = counts(&view);
            assert_eq!(["exact", "rounded", "flushed"].map(|key| entry[key].as_u64().unwrap()), expected);
            let kept = section[i].counts;
            assert_eq!([kept.exact, kept.rounded, kept.flushed], expected);
            total = [0, 1, 2].map(|j| total[j] + expected[j]);
        }
        assert_eq!(["exact", "rounded", "flushed"].map(|key| report[key].as_u64().unwrap()), total);
        assert!(name != "extremes" || total.iter().all(|&n| n > 100), "{total:?}");
    }
}

#[test]
fn the_file_carries_what_stands_beside_the_weights() {
    let dir = tempdir().unwrap();
    copy_model(&tiny("tied"), dir.path());
    let tokenizer = std::fs::read_to_string(fixture("tokenizer.json")).unwrap();
    let side_files = [
        ("tokenizer.json", tokenizer.as_str()),
        ("tokenizer_config.json", "{\"chat_template\": \"{{ messages }}\"}"),
        ("LICENSE", "Do what you like."),
        ("NOTICE.txt", "By us."),
        ("vocab.json", "{}"),
    ];
    for (name, content) in side_files {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    std::fs::write(dir.path().join("README.md"), "---\nlicense: apache-2.0\n---\n# A model\n").unwrap();
    std::fs::write(dir.path().join("pytorch_model.bin"), "not taken").unwrap();
    let out = dir.path().join("out.mrt");
    convert(dir.path(), &out, &["--origin", "https://models.example/tied at 1234"]);

    let file = std::fs::read(&out).unwrap();
    let prologue = prologue(&file);
    let content = |name: &str| {
        let section = prologue.section(name).unwrap_or_else(|| panic!("no {name}"));
        &file[section.offset as usize..][..section.bytes as usize]
    };
    for (name, expected) in side_files {
        assert_eq!(content(name), expected.as_bytes(), "{name}");
    }
    for name in ["config.json", "generation_config.json"] {
        assert_eq!(content(name), std::fs::read(tiny("tied").join(name)).unwrap());
    }
    assert_eq!(content(CHAT_TEMPLATE), b"{{ messages }}");
    assert_eq!(content(ORIGIN), b"origin: https://models.example/tied at 1234\nlicense: apache-2.0\n");
    let generation = GenerationDefaults::from_bytes(prologue.config(), content(GENERATION)).unwrap();
    assert_eq!((generation.bos_token, generation.stop_tokens), (Some(317), vec![319, 317]));
    let sections: Vec<_> = prologue.sections().iter().map(|section| section.name.as_str()).collect();
    assert!(!sections.contains(&"README.md") && !sections.contains(&"pytorch_model.bin"));
}

#[test]
fn the_file_origin_of_a_directory_is_taken() {
    let dir = tempdir().unwrap();
    copy_model(&tiny("tied"), dir.path());
    let out = dir.path().join("out.mrt");
    let origin = |written: &[u8], readme: &str| {
        std::fs::write(dir.path().join("origin"), written).unwrap();
        std::fs::write(dir.path().join("README.md"), readme).unwrap();
        convert(dir.path(), &out, &[]);
        let file = std::fs::read(&out).unwrap();
        let section =
            prologue(&file).section(ORIGIN).map(|s| s.offset as usize..(s.offset + s.bytes) as usize);
        section.map(|range| String::from_utf8(file[range].to_vec()).unwrap())
    };
    let mit = "---\nlicense: mit\n---\n";
    assert_eq!(origin(b"origin: here", "").as_deref(), Some("origin: here\n"));
    assert_eq!(origin(b"origin: here\n", mit).as_deref(), Some("origin: here\nlicense: mit\n"));
    assert_eq!(origin(b"license: gpl\n", mit).as_deref(), Some("license: gpl\n"));
    assert_eq!(origin(b"", mit).as_deref(), Some("license: mit\n"));
    assert_eq!(origin(b"\n", ""), None);
    std::fs::write(dir.path().join("origin"), b"a\xff").unwrap();
    let stderr = String::from_utf8(run(dir.path(), &out, &[]).stderr).unwrap();
    assert!(stderr.contains("origin: is not UTF-8; write where the model is from as text"), "{stderr}");
}

#[test]
fn the_tokenizer_is_prepacked_or_the_reason_is_given() {
    let dir = tempdir().unwrap();
    copy_model(&tiny("tied"), dir.path());
    let json = std::fs::read_to_string(fixture("tokenizer.json")).unwrap();
    std::fs::copy(fixture("tokenizer_config.json"), dir.path().join("tokenizer_config.json")).unwrap();
    let out = dir.path().join("out.mrt");
    let has = |name: &str| prologue(&std::fs::read(&out).unwrap()).section(name).is_some();

    std::fs::write(dir.path().join("tokenizer.json"), &json).unwrap();
    let text = convert(dir.path(), &out, &[]);
    assert!(text.contains("\ntokenizer: prepacked\n"), "{text}");
    assert!(has(TOKENIZER) && has(TOKEN_NAMES) && has("tokenizer.json"));

    // Padding of the vocabulary has no tokens.
    let fewer = json.replacen("\"<|im_end|>\"", "\"<|endoftext|>\"", 1);
    std::fs::write(dir.path().join("tokenizer.json"), fewer).unwrap();
    convert(dir.path(), &out, &[]);
    assert!(has(TOKENIZER));

    let other = json.replacen("\"add_prefix_space\":false", "\"add_prefix_space\":true", 1);
    std::fs::write(dir.path().join("tokenizer.json"), other).unwrap();
    let text = convert(dir.path(), &out, &[]);
    let reason = "\ntokenizer: as JSON only; tokenizer.json cannot be prepacked: pre_tokenizer ";
    assert!(text.contains(reason), "{text}");
    assert!(!has(TOKENIZER) && has(TOKEN_NAMES) && has("tokenizer.json"));
}

#[test]
fn tokens_that_the_tokenizer_lacks_are_named() {
    let dir = tempdir().unwrap();
    copy_model(&tiny("tied"), dir.path());
    std::fs::copy(fixture("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let notes = |config: Value| {
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let output = run(dir.path(), &dir.path().join("out.mrt"), &[]);
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let config = json!({
        "eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}, "bos_token": null, "unk_token": "",
        "add_bos_token": true, "additional_special_tokens": ["<|im_start|>"],
        "added_tokens_decoder": {"319": {"content": "<|im_end|>"}},
    });
    assert_eq!(notes(config), "");
    let config = json!({
        "eos_token": "<eos\u{1b}>", "pad_token": {"content": "<pad>"}, "additional_special_tokens": ["<pad>", "<a>"],
        "added_tokens_decoder": {"319": {"content": "<|im_end|>"}, "320": {"content": "<b>"}},
    });
    assert_eq!(
        notes(config),
        "note: tokenizer_config.json has tokens that tokenizer.json lacks; here they are text like any other: \
         \"<b>\", \"<eos\\u{1b}>\", \"<pad>\", \"<a>\"\n"
    );
    let many: Vec<_> = (0..12).map(|i| format!("<{i}>")).collect();
    let note = notes(json!({"additional_special_tokens": many}));
    assert!(note.ends_with("\"<8>\", \"<9>\" and 2 more\n"), "{note}");
}

#[test]
fn the_summary_names_digests_and_inexact_tensors() {
    let dir = tempdir().unwrap();
    let out = dir.path().join("out.mrt");
    let text = convert(&tiny("extremes"), &out, &[]);
    let file = std::fs::read(&out).unwrap();
    assert!(text.contains(&format!("root:    {}\n", prologue(&file).root())), "{text}");
    assert!(text.contains(&format!("sha256:  {}\n", sha256(&file))), "{text}");
    assert!(text.contains("\n  model.layers.0.self_attn.q_proj.weight (BF16): "), "{text}");
    assert!(!text.contains("model.norm.weight"), "{text}");
    let text = convert(&tiny("store_f32"), &out, &[]);
    assert!(text.contains("\n  and 16 tensors with fewer such values\n"), "{text}");
}

#[test]
fn a_target_is_replaced_and_a_link_keeps_its_place() {
    let dir = tempdir().unwrap();
    let out = dir.path().join("out.mrt");
    std::fs::write(&out, "old").unwrap();
    convert(&tiny("tied"), &out, &[]);
    let expected = std::fs::read(&out).unwrap();
    assert!(expected.len() > 1 << 20);

    // A name without a directory is one in the current directory.
    let status =
        mr_convert().arg(tiny("tied")).arg("here.mrt").current_dir(dir.path()).output().unwrap().status;
    assert!(status.success());
    assert!(std::fs::read(dir.path().join("here.mrt")).unwrap() == expected);

    #[cfg(unix)]
    {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let disk = dir.path().join("big disk");
        std::fs::create_dir(&disk).unwrap();
        std::fs::write(disk.join("real.mrt"), "old").unwrap();
        let link = dir.path().join("link.mrt");
        symlink("big disk/real.mrt", &link).unwrap();
        convert(&tiny("tied"), &link, &[]);
        assert!(link.is_symlink());
        assert!(std::fs::read(disk.join("real.mrt")).unwrap() == expected);

        // As readable as any new file, not private as temporary ones are.
        std::fs::write(dir.path().join("new"), "").unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&out), mode(&dir.path().join("new")));
        // Nor more readable than the file that it replaces.
        std::fs::set_permissions(&out, PermissionsExt::from_mode(0o600)).unwrap();
        convert(&tiny("tied"), &out, &[]);
        assert_eq!(mode(&out) & 0o777, 0o600);
    }
}
