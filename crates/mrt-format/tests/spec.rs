//! What `format-spec.md` states is what the code does: its tables and test vectors are computed here.

use std::fmt::Write;
use std::io;

use mrt_format::{
    CHUNK_BYTES, Counts, Digest, LAYOUT_FINGERPRINT, NewSection, ORIGIN, PackScratch, Prologue, Qwen2Config,
    SourceDtype, TensorSource, pack_arena_range, plan_file, qwen2_source_count, qwen2_source_tensors,
    qwen2_weights_layout, sha256,
};

/// Whether the specification has these lines, one after the other.
#[track_caller]
fn assert_in_spec(lines: &str) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../format-spec.md");
    let spec = std::fs::read_to_string(path).unwrap();
    assert!(spec.contains(lines), "not in format-spec.md:\n{lines}");
}

struct F32Source(Vec<Vec<f32>>);

impl TensorSource for F32Source {
    fn dtype(&self, _index: usize) -> SourceDtype {
        SourceDtype::F32
    }

    fn read(&self, index: usize, byte_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let values = &self.0[index][byte_offset as usize / 4..];
        for (bytes, value) in buf.as_chunks_mut().0.iter_mut().zip(values) {
            *bytes = value.to_le_bytes();
        }
        Ok(())
    }
}

fn pack(cfg: &Qwen2Config, source: &F32Source) -> Vec<u8> {
    let layout = qwen2_weights_layout(cfg);
    let mut arena = vec![0; layout.arena_bytes as usize];
    let mut counts = vec![Counts::default(); qwen2_source_count(cfg)];
    pack_arena_range(cfg, &layout, source, 0, &mut arena, &mut counts, &mut PackScratch::new()).unwrap();
    arena
}

/// The config of the fingerprint, as the specification gives it.
const FINGERPRINT_CONFIG: Qwen2Config = Qwen2Config {
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

/// The arena of the fingerprint, from the generator as the specification gives it.
fn fingerprint_arena() -> Vec<u8> {
    let mut state = 0u64;
    let mut next = || {
        state = state.wrapping_add(0x9e3779b97f4a7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d049bb133111eb);
        z ^= z >> 31;
        let bf16 = (z & 0x807f) as u32 | ((100 + (z >> 32) % 40) << 7) as u32;
        f32::from_bits(bf16 << 16)
    };
    let tensors = qwen2_source_tensors(&FINGERPRINT_CONFIG);
    let values = tensors.iter().map(|tensor| (0..tensor.elements()).map(|_| next()).collect());
    pack(&FINGERPRINT_CONFIG, &F32Source(values.collect()))
}

#[test]
fn layout_fingerprint() {
    let arena = fingerprint_arena();
    assert_eq!(sha256(&arena), LAYOUT_FINGERPRINT);
    assert_in_spec(&format!("    {LAYOUT_FINGERPRINT}\n"));
    let mut table = String::new();
    for tensor in qwen2_weights_layout(&FINGERPRINT_CONFIG).tensors(&FINGERPRINT_CONFIG) {
        let bytes = &arena[tensor.span.offset as usize..tensor.span.end() as usize];
        let (kind, offset, length, digest) =
            (tensor.kind, tensor.span.offset, tensor.span.bytes, sha256(bytes));
        let kind = kind as u32;
        writeln!(
            table,
            "| `{tensor}` | {kind} | {} | {} | {offset} | {length} | `{digest}` |",
            tensor.k, tensor.n
        )
        .unwrap();
    }
    assert_in_spec(&table);
}

#[test]
fn whole_file() {
    let arena = fingerprint_arena();
    let origin = b"test vector\n";
    let plan =
        plan_file(&FINGERPRINT_CONFIG, &[NewSection { name: ORIGIN, bytes: origin.len() as u64 }]).unwrap();
    let chunks: Vec<Digest> = arena.chunks(CHUNK_BYTES as usize).map(sha256).collect();
    let (mut file, root) = plan.head(&[origin], &chunks);
    file.extend_from_slice(&arena);
    let prologue = Prologue::parse(&file, file.len() as u64).unwrap();
    prologue.check_chunk(0, &arena).unwrap();
    assert_in_spec(&format!(
        "| length | {} |\n| root digest | `{root}` |\n| SHA-256 of the file | `{}` |\n",
        file.len(),
        sha256(&file)
    ));
}

#[test]
fn worked_example() {
    let cfg = Qwen2Config {
        hidden_size: 2,
        intermediate_size: 1,
        num_layers: 1,
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: 2,
        vocab_size: 3,
        tie_word_embeddings: true,
        ..FINGERPRINT_CONFIG
    };
    let source = F32Source(vec![
        vec![1.0, 1.0],
        vec![1.0, 2.0, 3.0, 4.0],
        vec![0.5, -0.5],
        vec![5.0, 6.0, 7.0, 8.0],
        vec![1.5, -1.5],
        vec![9.0, 10.0, 11.0, 12.0],
        vec![2.5, -2.5],
        vec![1.0, 0.0, 0.0, 1.0],
        vec![1.0, 1.0],
        vec![13.0, 14.0],
        vec![15.0, 16.0],
        vec![17.0, 18.0],
        vec![1.0, 1.0],
        vec![0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
    ]);
    let arena = pack(&cfg, &source);
    for tensor in qwen2_weights_layout(&cfg).tensors(&cfg) {
        let name = tensor.name();
        let (offset, end) = (tensor.span.offset as usize, tensor.span.end() as usize);
        let mut dump = String::new();
        for (i, row) in arena[offset..end].chunks(64).enumerate() {
            let (used, spare) = row.split_at(16);
            assert_eq!(spare, [0; 48]);
            let hex: Vec<_> = used.chunks(2).map(|pair| format!("{:02x}{:02x}", pair[0], pair[1])).collect();
            writeln!(dump, "    {:04x}  {}", offset + 64 * i, hex.join(" ")).unwrap();
        }
        if ["layers.0.qkv", "layers.0.gate_up", "lm_head"].contains(&name.as_str()) {
            assert_in_spec(&dump);
        }
    }
}

/// Each variant of the error type is a row of the specification's table of steps.
#[test]
fn validation_steps() {
    let source = include_str!("../src/error.rs");
    let mut step = 0;
    let mut expected = None;
    for line in source.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("/// Step ") {
            let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
            step += 1;
            assert_eq!(digits, step.to_string(), "steps follow one another");
            expected = Some(step);
        } else if line.starts_with(|first: char| first.is_ascii_uppercase())
            && let Some(step) = expected.take()
        {
            let name: String = line.chars().take_while(char::is_ascii_alphanumeric).collect();
            assert_in_spec(&format!("| {step} | `{name}` |"));
        }
    }
    assert_eq!((step, expected), (34, None));
}
