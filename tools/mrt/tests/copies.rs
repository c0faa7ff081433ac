//! What is done with copies of a file: unpacking, comparing, repairing, signing.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;

use minisign::KeyPair;
use mr_convert::{NewFile, convert, sources};
use mrt_format::{CHUNK_BYTES, NewSection, Prologue, Qwen2Config, plan_file, qwen2_weights_layout, sha256};
use mruntime::Pool;
use mruntime::hf::Qwen2Dir;
use serde_json::Value;
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

/// A file with numbers in place of weights, and two sections.
fn model(cfg: &Qwen2Config, add: u32) -> Vec<u8> {
    let numbers = (0..qwen2_weights_layout(cfg).arena_bytes / 4).map(|i| i as u32 + add);
    let arena: Vec<u8> = numbers.flat_map(u32::to_le_bytes).collect();
    let digests: Vec<_> = arena.chunks(CHUNK_BYTES as usize).map(sha256).collect();
    let sections = [NewSection { name: "LICENSE", bytes: 7 }, NewSection { name: "empty", bytes: 0 }];
    let (mut file, _) = plan_file(cfg, &sections).unwrap().head(&[b"Be fair", b""], &digests);
    file.extend_from_slice(&arena);
    file
}

/// A folder in which files have short names.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    /// Runs `mrt` here; exit code, stdout, stderr.
    fn mrt(&self, args: &[&str]) -> (i32, String, String) {
        let output =
            Command::new(env!("CARGO_BIN_EXE_mrt")).args(args).current_dir(self.0.path()).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    /// Runs `mrt`, which must succeed.
    fn ok(&self, args: &[&str]) -> String {
        let (code, stdout, stderr) = self.mrt(args);
        assert_eq!((code, stderr.as_str()), (0, ""), "{args:?}: {stdout}");
        stdout
    }

    /// Runs `mrt`, which must fail with one line.
    fn fails(&self, args: &[&str]) -> String {
        let (code, _, stderr) = self.mrt(args);
        assert_eq!((code, stderr.lines().count()), (1, 1), "{args:?}: {stderr}");
        stderr
    }
}

fn convert_dir(dir: &Path, out: &Path, origin: Option<&str>) {
    let model = Qwen2Dir::open(dir).unwrap();
    let target = NewFile::create(out, sources(&model)).unwrap();
    convert(&model, &target, origin, &mut Pool::new(2).unwrap(), &AtomicBool::new(false)).unwrap();
    target.commit().unwrap();
}

fn tiny(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tiny").join(name)
}

#[test]
fn what_is_unpacked_converts_to_the_same_file() {
    for name in
        ["tied", "untied", "sharded3", "extremes", "gqa7_head_dim", "inter_odd", "vocab_odd", "store_f32"]
    {
        let folder = Folder::new();
        std::fs::create_dir(folder.path("source")).unwrap();
        for entry in std::fs::read_dir(tiny(name)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, folder.path("source").join(path.file_name().unwrap())).unwrap();
        }
        std::fs::write(folder.path("source/LICENSE"), "Be fair").unwrap();
        std::fs::write(folder.path("source/tokenizer_config.json"), r#"{"chat_template": "{{ x }}"}"#)
            .unwrap();
        convert_dir(&folder.path("source"), &folder.path("a.mrt"), Some("https://models.example/x"));
        let printed = folder.ok(&["unpack", "a.mrt", "dir"]);
        assert!(printed.contains("LICENSE") && printed.contains("model.safetensors"), "{printed}");
        for file in ["config.json", "generation_config.json", "LICENSE", "tokenizer_config.json"] {
            let source = std::fs::read(folder.path("source").join(file)).unwrap();
            assert!(std::fs::read(folder.path("dir").join(file)).unwrap() == source, "{name} {file}");
        }
        assert!(!folder.path("dir/chat_template.jinja").exists());
        convert_dir(&folder.path("dir"), &folder.path("b.mrt"), None);
        assert!(folder.read("a.mrt") == folder.read("b.mrt"), "{name}");
        assert!(
            folder
                .ok(&["diff", "a.mrt", "b.mrt"])
                .starts_with("the files are the same by their digests, root ")
        );
    }
}

#[test]
fn the_report_of_other_weights_is_not_taken() {
    let folder = Folder::new();
    convert_dir(&tiny("extremes"), &folder.path("a.mrt"), None);
    folder.ok(&["unpack", "a.mrt", "dir"]);
    let report = |file: &str| {
        let info: Value = serde_json::from_str(&folder.ok(&["info", "--json", file])).unwrap();
        info["conversion"].clone()
    };
    assert!(report("a.mrt")["rounded"].as_u64().unwrap() > 0);
    // All weights become 1.0, as if somebody had trained on.
    let mut weights = folder.read("dir/model.safetensors");
    let data = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    for value in weights[data..].as_chunks_mut().0 {
        *value = [0x00, 0x3c];
    }
    folder.write("dir/model.safetensors", &weights);
    convert_dir(&folder.path("dir"), &folder.path("b.mrt"), None);
    let report = report("b.mrt");
    assert_eq!((report["rounded"].as_u64(), report["flushed"].as_u64()), (Some(0), Some(0)), "{report}");
}

#[test]
fn a_directory_is_made_whole_or_not_at_all() {
    let folder = Folder::new();
    let mut bytes = model(&CFG, 0);
    folder.write("a.mrt", &bytes);
    folder.write("file", b"");
    std::fs::create_dir_all(folder.path("full/x")).unwrap();
    std::os::unix::fs::symlink("nowhere", folder.path("link")).unwrap();
    for dir in ["file", "full", "link"] {
        assert!(folder.fails(&["unpack", "a.mrt", dir]).contains("exists; name a new directory"));
    }
    assert!(folder.fails(&["unpack", "a.mrt", "no/where"]).contains("cannot be written: No such file"));
    *bytes.last_mut().unwrap() ^= 1;
    folder.write("bad.mrt", &bytes);
    assert!(folder.fails(&["unpack", "bad.mrt", "dir"]).contains("bad.mrt: is damaged"));
    let mut names: Vec<_> = std::fs::read_dir(folder.0.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["a.mrt", "bad.mrt", "file", "full", "link"]);
    folder.ok(&["unpack", "a.mrt", "dir"]);
    assert_eq!(folder.read("dir/LICENSE"), b"Be fair");
}

#[test]
fn differences_are_named() {
    let folder = Folder::new();
    let a = model(&CFG, 0);
    folder.write("a.mrt", &a);
    folder.write("b.mrt", &model(&CFG, 1));
    folder.write("c.mrt", &model(&Qwen2Config { num_layers: 1, vocab_size: 7, rope_theta: 5e5, ..CFG }, 0));
    assert!(
        folder.ok(&["diff", "a.mrt", "a.mrt"]).starts_with("the files are the same by their digests, root ")
    );

    let (code, text, _) = folder.mrt(&["diff", "a.mrt", "b.mrt"]);
    assert_eq!((code, text.lines().count()), (1, 14), "{text}");
    assert!(text.contains("tensor layers.0.attn_norm: "), "{text}");
    let (code, text, _) = folder.mrt(&["diff", "a.mrt", "c.mrt"]);
    assert_eq!(code, 1);
    for line in [
        "config num_layers: 2 -> 1",
        "config vocab_size: 100000 -> 7",
        "config rope_theta: 10000 -> 500000",
        "tensor layers.1.qkv: only in the first file",
        "tensor lm_head: 100000 x 64 -> 7 x 64",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
    }
    assert!(!text.contains("LICENSE") && !text.contains("layers.0.qkv"), "{text}");
    let (_, text, _) = folder.mrt(&["diff", "--json", "c.mrt", "a.mrt"]);
    let json: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["same"], false);
    let names: Vec<_> =
        json["differences"].as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"layers.1.down") && names.contains(&"tensor_table"), "{text}");
    let (code, _, message) = folder.mrt(&["diff", "a.mrt", "gone.mrt"]);
    assert_eq!((code, message.contains("gone.mrt: No such file")), (2, true), "{message}");
}

#[test]
fn a_truncated_file_is_completed() {
    let folder = Folder::new();
    let good = model(&CFG, 0);
    folder.write("good.mrt", &good);
    let arena = good.len() - qwen2_weights_layout(&CFG).arena_bytes as usize;
    let chunk = CHUNK_BYTES as usize;
    for length in [0, 1, 511, 512, 700, 3000, arena, arena + chunk, arena + chunk + 1, good.len() - 1] {
        folder.write("a.mrt", &good[..length]);
        let printed = folder.ok(&["repair", "a.mrt", "--from", "good.mrt"]);
        assert!(
            printed.contains("a.mrt: fetched ") && printed.contains("a.mrt: is whole; root: "),
            "{printed}"
        );
        assert!(folder.read("a.mrt") == good, "{length}");
        assert_eq!(printed.contains("fetched chunk 0 "), length < arena + chunk, "{length}: {printed}");
    }
    std::fs::remove_file(folder.path("a.mrt")).unwrap();
    folder.ok(&["repair", "a.mrt", "--from", "good.mrt"]);
    assert!(folder.read("a.mrt") == good);
    let printed = folder.ok(&["repair", "a.mrt", "--from", "good.mrt"]);
    assert!(!printed.contains("fetched"), "{printed}");
    // Longer than it should be.
    folder.write("a.mrt", &[good.as_slice(), b"junk"].concat());
    folder.ok(&["repair", "a.mrt", "--from", "good.mrt"]);
    assert!(folder.read("a.mrt") == good);
}

#[test]
fn only_what_is_damaged_is_fetched_and_only_what_is_whole() {
    let folder = Folder::new();
    let good = model(&CFG, 0);
    let arena = good.len() - qwen2_weights_layout(&CFG).arena_bytes as usize;
    let chunk = CHUNK_BYTES as usize;
    let license = good.windows(7).position(|text| text == b"Be fair").unwrap();
    let damaged = |places: &[usize]| {
        let mut bytes = good.clone();
        places.iter().for_each(|&at| bytes[at] ^= 1);
        bytes
    };
    folder.write("a.mrt", &damaged(&[3, license, arena - 1, arena, arena + 2 * chunk]));
    folder.write("b.mrt", &damaged(&[arena + chunk]));
    let printed = folder.ok(&["repair", "a.mrt", "--from", "b.mrt"]);
    assert_eq!(printed.matches("fetched ").count(), 5, "{printed}");
    for piece in
        ["header, directory and chunk table", "section LICENSE", "padding", "chunk 0 of", "chunk 2 of"]
    {
        assert!(printed.contains(&format!("fetched {piece}")), "{printed}");
    }
    assert!(folder.read("a.mrt") == good);

    // Each copy has what the other lacks.
    folder.write("a.mrt", &damaged(&[arena + 2 * chunk]));
    folder.write("b.mrt", &damaged(&[3, arena + chunk, license]));
    folder.ok(&["repair", "b.mrt", "--from", "a.mrt"]);
    assert!(folder.read("b.mrt") == good);

    // What neither has stays missing, and no reader takes a file that was short for a whole one.
    folder.write("a.mrt", &damaged(&[arena + chunk])[..arena + 3 * chunk - 5]);
    folder.write("b.mrt", &damaged(&[arena + chunk]));
    let (code, printed, stderr) = folder.mrt(&["repair", "a.mrt", "--from", "b.mrt"]);
    assert_eq!(
        (code, stderr.as_str()),
        (1, "error: a.mrt: 1 pieces are missing still; repair it from another copy\n")
    );
    assert!(
        printed.contains("chunk 1 of the weights") && printed.contains("is in neither copy"),
        "{printed}"
    );
    let message = folder.fails(&["info", "a.mrt"]);
    let lengths =
        format!("a.mrt: the file has {} bytes but says that it has {};", good.len() + 1, good.len());
    assert!(message.contains(&lengths), "{message}");
    folder.write("b.mrt", &good);
    let printed = folder.ok(&["repair", "a.mrt", "--from", "b.mrt"]);
    assert_eq!(printed.matches("fetched chunk").count(), 1, "{printed}");
    assert!(folder.read("a.mrt") == good);

    // Nor one that had its length before its content, as some downloads make it.
    folder.write("a.mrt", &vec![0; good.len()]);
    folder.write("b.mrt", &damaged(&[arena + chunk]));
    let (code, _, _) = folder.mrt(&["repair", "a.mrt", "--from", "b.mrt"]);
    assert_eq!(code, 1);
    folder.fails(&["info", "a.mrt"]);
    folder.write("good.mrt", &good);
    folder.ok(&["repair", "a.mrt", "--from", "good.mrt"]);
    assert!(folder.read("a.mrt") == good);
}

#[test]
fn what_is_no_copy_is_not_repaired() {
    let folder = Folder::new();
    let good = model(&CFG, 0);
    folder.write("good.mrt", &good);
    let gguf = [b"GGUF".as_slice(), &vec![7; good.len()]].concat();
    for other in [b"notes".as_slice(), &gguf] {
        folder.write("other", other);
        let message = folder.fails(&["repair", "other", "--from", "good.mrt"]);
        assert!(message.contains("other: has nothing of good.mrt; remove it, or name the file to repair"));
        assert!(folder.read("other") == other);
    }
    // Nor is another model, whether whole, with a damaged header, or the copy itself damaged.
    let root = Prologue::parse(&good, good.len() as u64).unwrap().root().to_string();
    let mut other = model(&CFG, 1);
    folder.write("other", &other);
    let message = folder.fails(&["repair", "other", "--root", &root, "--from", "good.mrt"]);
    assert!(message.contains("other: is another file: its root digest is "), "{message}");
    assert!(folder.read("other") == other);
    other[100] ^= 1;
    folder.write("other", &other);
    let message = folder.fails(&["repair", "other", "--from", "good.mrt"]);
    assert!(message.contains("other: has nothing of good.mrt"), "{message}");
    assert!(folder.read("other") == other);
    // A header of rubbish before the right weights is damage.
    let mut damaged = good.clone();
    damaged[..512].fill(7);
    folder.write("damaged.mrt", &damaged);
    folder.ok(&["repair", "damaged.mrt", "--from", "good.mrt"]);
    assert!(folder.read("damaged.mrt") == good);
    folder.fails(&["repair", "new.mrt", "--from", "gone.mrt"]);
    assert!(!folder.path("new.mrt").exists());
}

#[test]
fn a_verdict_does_not_depend_on_who_reads_it() {
    let folder = Folder::new();
    let mut bytes = model(&CFG, 0);
    folder.write("good.mrt", &bytes);
    *bytes.last_mut().unwrap() ^= 1;
    folder.write("bad.mrt", &bytes);
    for (args, code) in [("verify bad.mrt", 1), ("verify good.mrt", 0), ("diff good.mrt bad.mrt", 0)] {
        // Nobody reads the pipe any more when the program writes to it.
        let script = format!("(sleep 0.2; $MRT {args} 2>&-; echo $? >code) | true; cat code");
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).env("MRT", env!("CARGO_BIN_EXE_mrt")).current_dir(folder.0.path());
        let output = shell.output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{code}\n"), "{args}");
    }
}

#[test]
fn copies_of_other_files_are_refused() {
    let folder = Folder::new();
    let good = model(&CFG, 0);
    let root = Prologue::parse(&good, good.len() as u64).unwrap().root().to_string();
    let short = &good[..good.len() - 9];
    folder.write("a.mrt", short);
    folder.write("good.mrt", &good);
    folder.write("b.mrt", &model(&CFG, 1));
    let message = folder.fails(&["repair", "a.mrt", "--from", "b.mrt"]);
    assert!(message.contains("b.mrt: is a copy of another file: its root digest is "), "{message}");
    assert!(message.trim_end().ends_with(&format!("not {root}")), "{message}");
    assert!(folder.fails(&["repair", "a.mrt", "--from", "a.mrt"]).contains("is the file that --from names"));
    folder.write("empty.mrt", b"");
    let message = folder.fails(&["repair", "empty.mrt", "--root", &root, "--from", "b.mrt"]);
    assert!(message.contains("another file than expected: its root digest is"), "{message}");
    let message = folder.fails(&["repair", "none.mrt", "--from", "empty.mrt"]);
    assert!(message.contains("empty.mrt: "), "{message}");
    folder.write("begun.mrt", &good[..100]);
    let message = folder.fails(&["repair", "begun.mrt", "--from", "empty.mrt"]);
    assert!(message.contains("begun.mrt: has no whole header, and neither has the other copy"), "{message}");
    assert!(!folder.path("none.mrt").exists());
    assert!(folder.read("a.mrt") == short && folder.read("empty.mrt").is_empty());
    folder.ok(&["repair", "a.mrt", "--root", &root, "--from", "good.mrt"]);
    assert!(folder.read("a.mrt") == good);
}

#[test]
fn signatures() {
    let folder = Folder::new();
    let good = model(&CFG, 0);
    folder.write("a.mrt", &good);
    folder.write("b.mrt", &model(&CFG, 1));
    let [ours, theirs] = ["ours", "theirs"].map(|name| {
        let pair = KeyPair::generate_unencrypted_keypair().unwrap();
        folder.write(&format!("{name}.pub"), pair.pk.to_box().unwrap().to_string().as_bytes());
        folder.write(&format!("{name}.key"), pair.sk.to_box(None).unwrap().to_string().as_bytes());
        pair.pk
    });
    let root = Prologue::parse(&good, good.len() as u64).unwrap().root().to_string();
    assert_eq!(
        folder.ok(&["sign", "a.mrt", "--key", "ours.key"]),
        format!("a.mrt.minisig: signs root {root}\n")
    );
    folder.ok(&["sign", "b.mrt", "--key", "ours.key", "--out", "b.sig"]);
    for input in ["a.mrt", "ours.key"] {
        let before = folder.read(input);
        let message = folder.fails(&["sign", "a.mrt", "--key", "ours.key", "--out", input]);
        assert!(message.contains("is read to make the new file"), "{message}");
        assert!(folder.read(input) == before);
    }
    let id =
        |key: &minisign::PublicKey| key.keynum().iter().rev().map(|b| format!("{b:02X}")).collect::<String>();

    for key in ["ours.pub", &ours.to_base64()] {
        let printed = folder.ok(&["verify", "a.mrt", "--key", key]);
        assert!(printed.ends_with(&format!("signed by key {}\n", id(&ours))), "{printed}");
    }
    let json: Value =
        serde_json::from_str(&folder.ok(&["verify", "a.mrt", "--key", "ours.pub", "--json"])).unwrap();
    assert_eq!(json["signed_by"], id(&ours));

    let message = folder.fails(&["verify", "a.mrt", "--key", "theirs.pub"]);
    let expected = format!("a.mrt.minisig: is by another key: {}, not {}", id(&ours), id(&theirs));
    assert_eq!(message, format!("error: {expected}\n"));
    let message = folder.fails(&["verify", "a.mrt", "--key", "ours.pub", "--signature", "b.sig"]);
    assert!(message.starts_with("error: b.sig: is a signature of another file: over root "), "{message}");
    assert!(message.ends_with(&format!(", not {root}\n")), "{message}");
    assert!(folder.fails(&["verify", "b.mrt", "--key", "ours.pub"]).contains("b.mrt.minisig: No such file"));
    assert!(folder.fails(&["verify", "a.mrt", "--key", "gone.pub"]).contains("gone.pub: No such file"));
    assert!(
        folder
            .fails(&["verify", "a.mrt", "--key", "a.mrt"])
            .contains("a.mrt: is no file of a key or signature")
    );
    assert!(
        folder
            .fails(&["sign", "a.mrt", "--key", "ours.pub"])
            .contains("ours.pub: is not a minisign secret key: ")
    );
    let locked = KeyPair::generate_encrypted_keypair(Some("secret".to_owned())).unwrap();
    folder.write("locked.key", locked.sk.to_box(None).unwrap().to_string().as_bytes());
    assert!(
        folder
            .fails(&["sign", "a.mrt", "--key", "locked.key"])
            .contains("locked.key: cannot ask for its password")
    );

    // Any changed character of the signature or of its signed comment.
    let signature = String::from_utf8(folder.read("a.mrt.minisig")).unwrap();
    let signed = signature.find('\n').unwrap() + 1;
    for at in (signed..signature.len() - 3).step_by(7) {
        let mut changed = signature.clone().into_bytes();
        changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
        folder.write("c.sig", &changed);
        folder.fails(&["verify", "a.mrt", "--key", "ours.pub", "--signature", "c.sig"]);
    }
    let (lines, _) = signature.trim_end().rsplit_once('\n').unwrap();
    for last in ["", "\n", "\nAAAA\n"] {
        folder.write("c.sig", format!("{lines}{last}").as_bytes());
        let message = folder.fails(&["verify", "a.mrt", "--key", "ours.pub", "--signature", "c.sig"]);
        assert!(message.contains("c.sig: is not a minisign signature: "), "{message}");
    }

    // A damaged file is neither signed nor taken for what its good root says.
    let mut bad = good;
    *bad.last_mut().unwrap() ^= 1;
    folder.write("a.mrt", &bad);
    assert!(folder.fails(&["verify", "a.mrt", "--key", "ours.pub"]).contains("a.mrt: is damaged"));
    assert!(folder.fails(&["sign", "a.mrt", "--key", "ours.key"]).contains("a.mrt: is damaged"));
}

/// `minisign/` holds a key pair and a signature that minisign 0.11 made:
///
/// ```sh
/// minisign -G -W -p key.pub -s key.sec
/// echo "mrt root ROOT" > root && minisign -S -s key.sec -m root -x a.mrt.minisig -t "by minisign"
/// ```
#[test]
fn keys_and_signatures_of_minisign_itself() {
    let stored = |name: &str| {
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/minisign").join(name)).unwrap()
    };
    let folder = Folder::new();
    let good = model(&CFG, 0);
    folder.write("a.mrt", &good);
    folder.write("b.mrt", &model(&CFG, 1));
    for name in ["key.pub", "key.sec", "a.mrt.minisig"] {
        folder.write(name, &stored(name));
    }
    let printed = folder.ok(&["verify", "a.mrt", "--key", "key.pub"]);
    assert!(printed.ends_with("signed by key 3DBD088F41C6139D\n"), "{printed}");
    let message = folder.fails(&["verify", "b.mrt", "--key", "key.pub", "--signature", "a.mrt.minisig"]);
    assert!(message.contains("is not a valid signature by key 3DBD088F41C6139D over root"), "{message}");

    // A key without password has no checksum either. If it is damaged, nothing is written.
    folder.ok(&["sign", "a.mrt", "--key", "key.sec", "--out", "ours"]);
    folder.ok(&["verify", "a.mrt", "--key", "key.pub", "--signature", "ours"]);
    let key = String::from_utf8(stored("key.sec")).unwrap();
    for (right, wrong) in [("RWQAAEIy", "RWQAAEIz"), ("yT2/Zh5A", "yT2/Zh5B"), ("FK8wn5v", "FK8wn5w")] {
        assert!(key.contains(right));
        folder.write("damaged.sec", key.replace(right, wrong).as_bytes());
        let message = folder.fails(&["sign", "a.mrt", "--key", "damaged.sec"]);
        assert!(message.contains("damaged.sec: is not a minisign secret key: "), "{message}");
    }
    assert!(folder.read("a.mrt.minisig") == stored("a.mrt.minisig"));

    // And minisign, where it is installed, verifies what `mrt sign` wrote.
    let root = Prologue::parse(&good, good.len() as u64).unwrap().root().to_string();
    folder.write("root", format!("mrt root {root}\n").as_bytes());
    let args = ["-V", "-p", "key.pub", "-m", "root", "-x", "ours"];
    match Command::new("minisign").args(args).current_dir(folder.0.path()).output() {
        Ok(output) => assert!(output.status.success(), "{output:?}"),
        Err(e) => eprintln!("not tried with minisign: {e}"),
    }
}

#[test]
fn shells_and_man_know_the_commands() {
    let folder = Folder::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(folder.ok(&["--completions", shell]).contains("repair"), "{shell}");
    }
    folder.ok(&["--man-pages", "."]);
    let page = String::from_utf8(folder.read("mrt-repair.1")).unwrap();
    assert!(page.contains("another copy"), "{page}");
    assert_eq!(folder.mrt(&["--completions", "tcsh"]).0, 2);
}
