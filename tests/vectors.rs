//! Small files, valid and not, each with the step of the validation that refuses it. `vectors/files.json` holds them for
//! readers in any language; `scripts/read_mrt.py` is one.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mrt_format::{
    CONVERSION_REPORT, Counts, Digest, GENERATION, GenerationDefaults, NewSection, PackScratch, ReportEntry,
    SourceDtype, TOKENIZER, TensorSource, TokenizerSection, pack_arena_range, plan_file, prologue_bytes,
    qwen2_source_count, qwen2_source_tensors, qwen2_weights_layout, report_from_bytes, report_to_bytes,
    sha256,
};
use mruntime::{Error, Model, OpenOptions, Pool, Qwen2Config, Verify};
use serde::{Deserialize, Serialize};

/// The config of the specification's worked example.
const CFG: Qwen2Config = Qwen2Config {
    hidden_size: 2,
    intermediate_size: 1,
    num_layers: 1,
    num_heads: 1,
    num_kv_heads: 1,
    head_dim: 2,
    vocab_size: 3,
    max_position_embeddings: 128,
    rms_norm_eps: 1e-6,
    rope_theta: 1e6,
    tie_word_embeddings: true,
};

/// Bytes that lie at an offset, in hexadecimal digits.
type Piece = (usize, String);

#[derive(Serialize, Deserialize, PartialEq, Debug)]
struct Vectors {
    /// Bytes that are in no piece are zeros.
    valid: ValidFile,
    /// Each made from the valid file.
    invalid: Vec<InvalidFile>,
}

#[derive(Serialize, Deserialize, PartialEq, Debug)]
struct ValidFile {
    bytes: usize,
    root: String,
    sha256: String,
    pieces: Vec<Piece>,
    /// FP16 values of the source tensors, row by row.
    tensors: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize, PartialEq, Debug)]
struct InvalidFile {
    /// The field that is attacked, and how.
    name: String,
    step: u32,
    error: String,
    /// Its length.
    bytes: usize,
    /// What to put where.
    pieces: Vec<Piece>,
    /// The root digest that the caller expects, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    expected_root: Option<String>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    text.as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

/// Source tensors with the FP16 values 1, 2, 3 and so on.
struct Counting(Vec<Vec<u8>>);

impl Counting {
    fn new() -> Counting {
        let mut next = 0x3c00u16;
        let mut tensor = |elements| {
            let values = (0..elements).flat_map(|_| {
                next += 1;
                next.to_le_bytes()
            });
            values.collect()
        };
        Counting(qwen2_source_tensors(&CFG).iter().map(|t| tensor(t.elements())).collect())
    }
}

impl TensorSource for Counting {
    fn dtype(&self, _index: usize) -> SourceDtype {
        SourceDtype::F16
    }

    fn read(&self, index: usize, byte_offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        buf.copy_from_slice(&self.0[index][byte_offset as usize..][..buf.len()]);
        Ok(())
    }
}

fn valid_file() -> Vec<u8> {
    let layout = qwen2_weights_layout(&CFG);
    let mut arena = vec![0; layout.arena_bytes as usize];
    let mut counts = vec![Counts::default(); qwen2_source_count(&CFG)];
    let source = Counting::new();
    pack_arena_range(&CFG, &layout, &source, 0, &mut arena, &mut counts, &mut PackScratch::new()).unwrap();
    let report: Vec<_> =
        counts.into_iter().map(|counts| ReportEntry { dtype: SourceDtype::F16, counts }).collect();
    let generation = GenerationDefaults { stop_tokens: vec![2], bos_token: Some(1), ..Default::default() };
    let sections = [
        (GENERATION, generation.to_bytes(&CFG).unwrap()),
        (CONVERSION_REPORT, report_to_bytes(&report)),
        ("LICENSE", b"Do what you like.\n".to_vec()),
    ];
    let planned = sections.each_ref().map(|(name, bytes)| NewSection { name, bytes: bytes.len() as u64 });
    let contents = sections.each_ref().map(|(_, bytes)| bytes.as_slice());
    let (mut file, _) = plan_file(&CFG, &planned).unwrap().head(&contents, &[sha256(&arena)]);
    file.extend_from_slice(&arena);
    file
}

// Where things are in the valid file.
const DIRECTORY: usize = 512;
const ENTRY: usize = 96;
const CHUNK_TABLE: usize = 512 + 4 * ENTRY;
const PROLOGUE: usize = CHUNK_TABLE + 32;
const TENSOR_TABLE: usize = 960;
const GENERATION_AT: usize = TENSOR_TABLE + 8 * 96;
const REPORT: usize = GENERATION_AT + 128;
const LICENSE: usize = REPORT + 14 * 32;
const ARENA: usize = 2 << 20;

/// A file being changed.
struct Edit(Vec<u8>);

impl Edit {
    fn put(mut self, at: usize, bytes: &[u8]) -> Edit {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn u32(self, at: usize, value: u32) -> Edit {
        self.put(at, &value.to_le_bytes())
    }

    fn u64(self, at: usize, value: u64) -> Edit {
        self.put(at, &value.to_le_bytes())
    }

    fn f64(self, at: usize, value: f64) -> Edit {
        self.put(at, &value.to_le_bytes())
    }

    /// Changes the length.
    fn length(mut self, bytes: usize) -> Edit {
        self.0.resize(bytes, 0);
        self
    }

    /// Makes the digest of section `i` that of its changed content.
    fn section_digest(self, i: usize) -> Edit {
        let word = |at: usize| u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap()) as usize;
        let entry = DIRECTORY + ENTRY * i;
        let digest = sha256(&self.0[word(entry + 40)..][..word(entry + 48)]);
        self.put(entry + 56, &digest.0)
    }

    /// Makes the root digest anew, if the header's numbers leave something to make it of.
    fn root(self) -> Edit {
        let needed = prologue_bytes(&self.0[..512], self.0.len() as u64).unwrap_or(PROLOGUE);
        let zeroed = Edit(self.0[..needed].to_vec()).put(160, &[0; 32]);
        self.put(160, &sha256(&zeroed.0).0)
    }
}

/// Every invalid file: what is attacked and how, the error, the file.
fn cases() -> Vec<(String, &'static str, Edit)> {
    let valid = valid_file();
    let edit = || Edit(valid.clone());
    let mut cases: Vec<(String, &'static str, Edit)> = Vec::new();
    let mut add = |name: &str, error, edit: Edit| cases.push((name.to_owned(), error, edit));
    let file = valid.len() as u64;

    add("magic: text", "BadMagic", edit().put(0, b"GGUF"));
    add("magic: line ends changed", "BadMagic", edit().put(4, b"\n"));
    for bytes in [0, 7] {
        add(&format!("magic: {bytes} bytes"), "BadMagic", edit().length(bytes));
    }
    for bytes in [8, 511] {
        add(&format!("header: {bytes} bytes"), "HeaderTruncated", edit().length(bytes));
    }
    add("major: 0", "UnsupportedVersion", edit().put(8, &[0, 0]));
    add("major: 2", "UnsupportedVersion", edit().put(8, &[2, 0]).root());
    add("file_bytes: one more", "Truncated", edit().u64(32, file + 1).root());
    add("file_bytes: largest", "Truncated", edit().u64(32, u64::MAX).root());
    let boundaries = [
        512,
        CHUNK_TABLE,
        PROLOGUE,
        TENSOR_TABLE,
        GENERATION_AT,
        REPORT,
        LICENSE,
        LICENSE + 18,
        ARENA,
        valid.len(),
    ];
    for boundary in boundaries {
        for bytes in [boundary - 1, boundary, boundary + 1] {
            let error = match bytes {
                0..512 => "HeaderTruncated",
                _ if bytes < valid.len() => "Truncated",
                _ if bytes == valid.len() => continue,
                _ => "Overlong",
            };
            add(&format!("length: {bytes} bytes"), error, edit().length(bytes));
        }
    }
    add("file_bytes: one less", "Overlong", edit().u64(32, file - 1).root());
    add("file_bytes: 0", "Overlong", edit().u64(32, 0).root());
    add("header_bytes: 511", "BadHeaderBytes", edit().u32(12, 511).root());
    add("header_bytes: 0", "BadHeaderBytes", edit().u32(12, 0).root());
    for bit in [0, 63] {
        add(&format!("required_features: bit {bit}"), "UnsupportedFeatures", edit().u64(16, 1 << bit).root());
    }
    for chunk in [0, 1, 2 << 20, 8 << 20, u32::MAX] {
        add(&format!("chunk_bytes: {chunk}"), "BadChunkBytes", edit().u32(60, chunk).root());
    }
    for count in [65, u32::MAX] {
        add(&format!("section_count: {count}"), "TooManySections", edit().u32(56, count).root());
    }
    let too_large = ((64u64 << 20) / 32) << 22;
    add("arena_bytes: prologue of more than 64 MiB", "PrologueTooLarge", edit().u64(48, too_large).root());
    add("arena_bytes: largest", "PrologueTooLarge", edit().u64(48, u64::MAX).root());
    add("arena_bytes: prologue beyond the end", "PrologueOutsideFile", edit().u64(48, 1 << 40).root());
    add("root_digest: a bit", "RootMismatch", edit().put(160, &[valid[160] ^ 1]));
    add("hidden_size: root not made anew", "RootMismatch", edit().u32(68, 3));
    add("chunk_table: root not made anew", "RootMismatch", edit().put(CHUNK_TABLE, &[0; 32]));
    add("section_count: root not made anew", "RootMismatch", edit().u32(56, 3));
    add("expected_root: another", "UnexpectedRoot", edit());
    add("expected_root: another, of another architecture", "UnexpectedRoot", edit().u32(64, 2).root());
    add("config_flags: bit 1", "ReservedNotZero", edit().u32(100, 3).root());
    add("reserved_config: last byte", "ReservedNotZero", edit().put(127, &[1]).root());
    for at in [192, 511] {
        add(&format!("reserved: byte {at}"), "ReservedNotZero", edit().put(at, &[1]).root());
    }
    for architecture in [0, 2, u32::MAX] {
        add(
            &format!("architecture: {architecture}"),
            "UnsupportedArchitecture",
            edit().u32(64, architecture).root(),
        );
    }
    let sizes = [
        ("hidden_size", 65536),
        ("intermediate_size", 1048576),
        ("num_layers", 1024),
        ("num_heads", 1024),
        ("num_kv_heads", 1),
        ("head_dim", 512),
        ("vocab_size", 16777216),
        ("max_position_embeddings", 134217728),
    ];
    for (i, (field, most)) in sizes.into_iter().enumerate() {
        for value in [0, most + 1, u32::MAX] {
            add(&format!("{field}: {value}"), "BadConfig", edit().u32(68 + 4 * i, value).root());
        }
        if field != "max_position_embeddings" && field != "num_kv_heads" {
            // Within its limits, but then the arena has another length.
            let other = if field == "head_dim" {
                4
            } else if field == "vocab_size" {
                33
            } else {
                40
            };
            add(&format!("{field}: {other}"), "BadArenaBytes", edit().u32(68 + 4 * i, other).root());
        }
    }
    add("num_kv_heads: no divisor", "BadConfig", edit().u32(80, 3).u32(84, 2).root());
    add("head_dim: odd", "BadConfig", edit().u32(88, 3).root());
    for value in [0.0, 2.0, -1e-6, f64::NAN, f64::INFINITY] {
        add(&format!("rms_norm_eps: {value}"), "BadConfig", edit().f64(104, value).root());
    }
    for value in [0.5, 2e12, -1e6, f64::NAN, f64::INFINITY] {
        add(&format!("rope_theta: {value}"), "BadConfig", edit().f64(112, value).root());
    }
    add("config_flags: untied", "BadArenaBytes", edit().u32(100, 0).root());
    add("layout_fingerprint: zeros", "UnknownLayout", edit().put(128, &[0; 32]).root());
    for value in [0, 1216, 1281, 1344, 4 << 20] {
        add(&format!("arena_bytes: {value}"), "BadArenaBytes", edit().u64(48, value).root());
    }

    let (table, generation, report, license) =
        (DIRECTORY, DIRECTORY + ENTRY, DIRECTORY + 2 * ENTRY, DIRECTORY + 3 * ENTRY);
    let name = |text: &str| {
        let mut field = [0; 32];
        field[..text.len()].copy_from_slice(text.as_bytes());
        field
    };
    for bad in ["", "..", ".hidden", "a/b", "a\\b", "a b", "C:x", "x\0y", "\u{e9}"] {
        add(&format!("name: {bad:?}"), "BadSectionName", edit().put(license, &name(bad)).root());
    }
    for twice in ["tensor_table", "generation"] {
        add(&format!("name: {twice} twice"), "DuplicateSection", edit().put(license, &name(twice)).root());
    }
    add("flags: must be known", "UnknownRequiredSection", edit().u32(license + 32, 1).root());
    add("flags: bit 1", "ReservedNotZero", edit().u32(table + 32, 3).root());
    add("flags: bit 31", "ReservedNotZero", edit().u32(license + 32, 1 << 31).root());
    add("reserved: of an entry", "ReservedNotZero", edit().u32(generation + 36, 1).root());
    add("reserved_end: of an entry", "ReservedNotZero", edit().u64(report + 88, 1 << 63).root());
    for bytes in [(64 << 20) + 1, 2 << 30, u64::MAX, u64::MAX - LICENSE as u64 + 1] {
        add(
            &format!("bytes: {bytes} for LICENSE"),
            "SectionTooLarge",
            edit().u64(license + 48, bytes).root(),
        );
    }
    for (entry, what, right) in
        [(table, "tensor_table", 768), (generation, "generation", 128), (report, "conversion_report", 448)]
    {
        for bytes in [0, right - 1, right + 32] {
            add(
                &format!("bytes: {bytes} for {what}"),
                "BadSectionBytes",
                edit().u64(entry + 48, bytes).root(),
            );
        }
    }
    add(
        "name: of another length's section",
        "BadSectionBytes",
        edit().put(license, &name("conversion_report")).put(report, &name("x")).root(),
    );
    for (entry, what) in [(table, "tensor_table"), (generation, "generation"), (license, "LICENSE")] {
        let right = u64::from_le_bytes(valid[entry + 40..entry + 48].try_into().unwrap());
        for offset in [0, 512, right - 64, right - 1, right + 1, right + 64, ARENA as u64, u64::MAX, 1 << 63]
        {
            add(
                &format!("offset: {offset} for {what}"),
                "SectionMisplaced",
                edit().u64(entry + 40, offset).root(),
            );
        }
    }
    add(
        "offset: two sections at one place",
        "SectionMisplaced",
        edit().u64(license + 40, REPORT as u64).root(),
    );
    add(
        "name: no tensor_table",
        "MissingSection",
        edit().put(table, &name("other")).u32(table + 32, 0).root(),
    );
    for offset in [0, 64, ARENA as u64 - 64, ARENA as u64 + 1, 4 << 20, u64::MAX] {
        add(&format!("arena_offset: {offset}"), "BadArenaOffset", edit().u64(40, offset).root());
    }
    add(
        "bytes: LICENSE reaches into the arena",
        "BadArenaOffset",
        edit().u64(license + 48, ARENA as u64).root(),
    );
    add(
        "file_bytes: 64 more, and the file too",
        "BadFileBytes",
        edit().u64(32, file + 64).length(valid.len() + 64).root(),
    );
    add(
        "file_bytes: 64 less, and the file too",
        "BadFileBytes",
        edit().u64(32, file - 64).length(valid.len() - 64).root(),
    );

    for (i, what) in ["tensor_table", "generation", "conversion_report", "LICENSE"].into_iter().enumerate() {
        let entry = DIRECTORY + ENTRY * i;
        add(&format!("sha256: of {what}"), "SectionDamaged", edit().put(entry + 56, &[0; 32]).root());
    }
    for (at, what) in [
        (TENSOR_TABLE + 767, "tensor_table"),
        (GENERATION_AT, "generation"),
        (REPORT, "conversion_report"),
        (LICENSE + 17, "LICENSE"),
    ] {
        add(&format!("content of {what}"), "SectionDamaged", edit().put(at, &[valid[at] ^ 0x80]));
    }
    let fields = [
        ("name", 0),
        ("name's end", 63),
        ("kind", 64),
        ("k", 68),
        ("n", 72),
        ("reserved", 76),
        ("offset", 80),
        ("bytes", 88),
    ];
    for (field, at) in fields {
        for record in [0, 7] {
            let at = TENSOR_TABLE + 96 * record + at;
            let edit = edit().put(at, &[valid[at] ^ 0x40]).section_digest(0).root();
            add(&format!("tensor_table: {field} of record {record}"), "TensorTableMismatch", edit);
        }
    }
    for (field, at, value) in [
        ("dtype", 0, 0u64),
        ("dtype", 0, 4),
        ("reserved", 4, 1),
        ("exact", 8, 0),
        ("exact", 8, u64::MAX),
        ("rounded", 16, 1),
        ("flushed", 24, u64::MAX),
    ] {
        let edit = edit();
        let edit = if at < 8 { edit.u32(REPORT + at, value as u32) } else { edit.u64(REPORT + at, value) };
        add(&format!("conversion_report: {field} {value}"), "BadReport", edit.section_digest(2).root());
    }
    let nan = f32::NAN.to_bits();
    let generations = [
        ("flags", 0, 4),
        ("flags", 0, 1 << 31),
        ("bos_token", 4, 3),
        ("temperature", 8, (-1f32).to_bits()),
        ("temperature", 8, 101f32.to_bits()),
        ("temperature", 8, nan),
        ("top_p", 12, 0),
        ("top_p", 12, 2f32.to_bits()),
        ("top_p", 12, nan),
        ("min_p", 16, (-1f32).to_bits()),
        ("min_p", 16, 2f32.to_bits()),
        ("repetition_penalty", 20, 0),
        ("repetition_penalty", 20, f32::INFINITY.to_bits()),
        ("stop_count", 28, 17),
        ("stop_count", 28, u32::MAX),
        ("stop_count", 28, 0),
        ("stop_tokens", 32, 3),
        ("stop_tokens", 36, 1),
        ("reserved", 124, 1),
    ];
    for (field, at, value) in generations {
        let edit = edit().u32(GENERATION_AT + at, value).section_digest(1).root();
        add(&format!("generation: {field} {value:#x}"), "BadGeneration", edit);
    }
    let edit_bos = edit().u32(GENERATION_AT, 0).section_digest(1).root();
    add("generation: bos_token without its flag", "BadGeneration", edit_bos);

    // The smallest tokenizer in the licence's place; behind it is padding, so it may be longer.
    let tokenizer_bytes = 64 + 4352 + 256 + 4 * 256;
    let tokenizer = |field: Option<(usize, u32)>, more: i64| {
        let bytes = tokenizer_bytes as i64 + more;
        let edit =
            edit().put(LICENSE, &[0; 18]).put(license, &name(TOKENIZER)).u64(license + 48, bytes as u64);
        let edit = edit.u32(LICENSE + 4, 1).u32(LICENSE + 24, 1);
        let edit = if let Some((at, value)) = field { edit.u32(LICENSE + at, value) } else { edit };
        edit.section_digest(3).root()
    };
    let valid_one = tokenizer(None, 0).0;
    assert!(TokenizerSection::new(&valid_one[LICENSE..][..tokenizer_bytes]).is_ok());
    let fields = [
        ("flags", 0, 2),
        ("flags", 0, 1 << 31),
        ("word_split", 4, 0),
        ("word_split", 4, 4),
        ("digit_split", 8, 3),
        ("token_count", 12, 1),
        ("token_count", 12, 16_776_705),
        ("added_count", 16, 1),
        ("added_count", 16, u32::MAX),
        ("normalized_count", 20, u32::MAX),
        ("class_blocks", 24, 0),
        ("class_blocks", 24, 2),
        ("class_blocks", 24, 257),
        ("bucket_count", 28, u32::MAX),
        ("slot_count", 32, 1 << 30),
        ("text_bytes", 40, 1),
        ("reserved", 44, 1),
        ("reserved", 60, 1 << 31),
    ];
    for (field, at, value) in fields {
        add(&format!("tokenizer: {field} {value:#x}"), "BadTokenizer", tokenizer(Some((at, value)), 0));
    }
    for more in [-(tokenizer_bytes as i64), 63 - tokenizer_bytes as i64, -1, 1] {
        let bytes = tokenizer_bytes as i64 + more;
        add(&format!("tokenizer: {bytes} bytes"), "BadTokenizer", tokenizer(None, more));
    }

    add("chunk_table: another digest", "ChunkDamaged", edit().put(CHUNK_TABLE, &[0; 32]).root());
    for at in [ARENA, ARENA + 640, valid.len() - 1] {
        add(&format!("weights: byte {at}"), "ChunkDamaged", edit().put(at, &[valid[at] ^ 1]));
    }
    for at in [PROLOGUE, TENSOR_TABLE - 1, LICENSE + 18, ARENA - 1] {
        add(&format!("padding: byte {at}"), "PaddingNotZero", edit().put(at, &[1]));
    }
    cases
}

/// Runs of bytes of `new` that differ from `old`, or are not zero where there is no `old`.
fn pieces(old: &[u8], new: &[u8]) -> Vec<Piece> {
    let mut pieces: Vec<(usize, Vec<u8>)> = Vec::new();
    for (at, &byte) in new.iter().enumerate().filter(|&(at, &byte)| old.get(at).copied().unwrap_or(0) != byte)
    {
        match pieces.last_mut() {
            // A short gap is cheaper than a new piece.
            Some((start, bytes)) if at - (*start + bytes.len()) < 8 => {
                bytes.extend_from_slice(&new[*start + bytes.len()..at]);
                bytes.push(byte);
            }
            _ => pieces.push((at, vec![byte])),
        }
    }
    pieces.into_iter().map(|(at, bytes)| (at, hex(&bytes))).collect()
}

/// The number of the step that has this error, as the specification lists it.
fn step_of(error: &str) -> u32 {
    let spec =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../format-spec.md")).unwrap();
    let mut rows = spec.lines().map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
    let row = rows.find(|cells| cells.get(2) == Some(&format!("`{error}`").as_str()));
    row.unwrap_or_else(|| panic!("{error}"))[1].parse().unwrap()
}

fn vectors() -> Vectors {
    let valid = valid_file();
    let root = Digest(valid[160..192].try_into().unwrap());
    let names = qwen2_source_tensors(&CFG).into_iter().map(|t| t.name);
    let invalid = cases().into_iter().map(|(name, error, edit)| {
        let expected_root = (error == "UnexpectedRoot").then(|| "00".repeat(32));
        let pieces = pieces(&valid, &edit.0);
        InvalidFile {
            name,
            step: step_of(error),
            error: error.to_owned(),
            bytes: edit.0.len(),
            pieces,
            expected_root,
        }
    });
    Vectors {
        invalid: invalid.collect(),
        valid: ValidFile {
            bytes: valid.len(),
            root: root.to_string(),
            sha256: sha256(&valid).to_string(),
            pieces: pieces(&[], &valid),
            tensors: names.zip(Counting::new().0.iter().map(|bytes| hex(bytes))).collect(),
        },
    }
}

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors/files.json")
}

fn stored() -> Vectors {
    serde_json::from_slice(&std::fs::read(path()).unwrap()).unwrap()
}

/// One line for each file.
#[test]
#[ignore = "writes the vectors that the other tests read: cargo test -p mruntime-tests --test vectors -- --ignored"]
fn write_the_vectors() {
    let vectors = vectors();
    let line = |file: &InvalidFile| serde_json::to_string(file).unwrap();
    let invalid = vectors.invalid.iter().map(line).collect::<Vec<_>>().join(",\n");
    let valid = serde_json::to_string(&vectors.valid).unwrap();
    std::fs::write(path(), format!("{{\"valid\": {valid},\n\"invalid\": [\n{invalid}\n]}}\n")).unwrap();
}

#[test]
fn the_stored_vectors_are_those_of_the_specification() {
    assert!(stored() == vectors(), "write them anew and read the difference");
}

fn built(valid: &[u8], bytes: usize, pieces: &[Piece]) -> Vec<u8> {
    let mut file = valid.to_vec();
    file.resize(bytes, 0);
    for (at, digits) in pieces {
        let bytes = unhex(digits);
        file[*at..*at + bytes.len()].copy_from_slice(&bytes);
    }
    file
}

/// Opens a file, uses all its sections and checks everything.
fn check(path: &Path, expected_root: Option<Digest>, pool: &mut Pool) -> Result<(), Error> {
    let options = OpenOptions { verify: Verify::Header, expected_root, ..OpenOptions::default() };
    let model = Model::open(path, &options, pool)?;
    model.generation()?;
    let invalid = |problem| Error::Format { path: path.into(), problem };
    let report = model.section(CONVERSION_REPORT)?.unwrap();
    report_from_bytes(model.config(), &report).map_err(invalid)?;
    model.section("LICENSE")?;
    if let Some(tokenizer) = model.section(TOKENIZER)? {
        TokenizerSection::new(&tokenizer).map_err(invalid)?;
    }
    model.verify(pool)
}

#[test]
fn every_file_is_refused_at_its_step() {
    let (vectors, mut pool) = (stored(), Pool::new(1).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.mrt");
    let valid = built(&[], vectors.valid.bytes, &vectors.valid.pieces);
    assert_eq!(sha256(&valid).to_string(), vectors.valid.sha256);
    std::fs::write(&path, &valid).unwrap();
    check(&path, Some(vectors.valid.root.parse().unwrap()), &mut pool).unwrap();

    for file in &vectors.invalid {
        std::fs::write(&path, built(&valid, file.bytes, &file.pieces)).unwrap();
        let expected_root = file.expected_root.as_ref().map(|root| root.parse().unwrap());
        let problem = match check(&path, expected_root, &mut pool) {
            Err(Error::Format { problem, .. }) => problem,
            Err(Error::Damaged { problems, .. }) => problems[0].clone(),
            other => panic!("{}: {other:?}", file.name),
        };
        let variant = format!("{problem:?}");
        let variant: String = variant.chars().take_while(char::is_ascii_alphanumeric).collect();
        assert_eq!(
            (variant.as_str(), step_of(&variant)),
            (file.error.as_str(), file.step),
            "{}: {problem}",
            file.name
        );
        assert_eq!(problem.to_string().lines().count(), 1);
    }
}

/// Each row of the tables of header and directory names the errors of a wrong value: there is a file for each.
#[test]
fn every_field_is_attacked() {
    let spec =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../format-spec.md")).unwrap();
    let invalid = stored().invalid;
    let mut fields = 0;
    let (header_and_directory, _) = spec.split_once("## 5. Chunk table\n").unwrap();
    for row in header_and_directory.lines().filter(|line| line.split('|').count() == 7) {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let (Ok(_), Ok(_), Some(field)) =
            (cells[1].parse::<u32>(), cells[2].parse::<u32>(), cells[3].strip_prefix('`'))
        else {
            continue;
        };
        let field = field.trim_end_matches('`');
        fields += 1;
        for error in
            cells[5].split(", ").map(|error| error.trim_matches('`')).filter(|error| !error.is_empty())
        {
            let attacked =
                |file: &InvalidFile| file.error == error && file.name.starts_with(&format!("{field}:"));
            assert!(invalid.iter().any(attacked), "{field}: {error}");
        }
    }
    assert_eq!(fields, 27 + 7);
    // And each step has one.
    for step in 1..=34 {
        assert!(invalid.iter().any(|file| file.step == step), "step {step}");
    }
}
