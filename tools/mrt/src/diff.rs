//! `mrt diff`: what two files have in common and what not.

use std::collections::BTreeMap;
use std::io::Write;

use mr_cli::{FileError, progress_bar};
use mrt_format::{CHUNK_BYTES, Prologue, Qwen2Config, TensorEntry};
use serde_json::json;

use crate::file::MrtFile;

/// Something that differs.
pub struct Difference {
    kind: &'static str,
    name: String,
    change: Change,
}

enum Change {
    /// What each of the two files has; `None` where a file has no such thing.
    Other(Option<String>, Option<String>),
    /// How many FP16 values of a tensor differ in their bits, padding included, and of how many.
    Values(u64, u64),
}

/// Compares config fields, sections by digest, and tensors: by chunk digests where those settle it, else by value.
pub fn diff(a: &MrtFile, b: &MrtFile) -> Result<Vec<Difference>, FileError> {
    if a.prologue.root() == b.prologue.root() {
        return Ok(Vec::new());
    }
    let mut differences = Vec::new();
    let mut add = |kind, name: &str, a: Option<String>, b: Option<String>| {
        if a != b {
            differences.push(Difference { kind, name: name.to_owned(), change: Change::Other(a, b) });
        }
    };
    let version = |p: &Prologue| Some(format!("{}.{}", p.version().0, p.version().1));
    add("format", "version", version(&a.prologue), version(&b.prologue));
    for ((name, a), (_, b)) in fields(a.prologue.config()).into_iter().zip(fields(b.prologue.config())) {
        add("config", name, Some(a), Some(b));
    }
    let sections = |file: &MrtFile| {
        let digests = file.prologue.sections().iter().map(|s| (s.name.clone(), s.sha256.to_string()));
        digests.collect::<BTreeMap<_, _>>()
    };
    let (in_a, in_b) = (sections(a), sections(b));
    for name in in_a.keys().chain(in_b.keys().filter(|name| !in_a.contains_key(*name))) {
        add("section", name, in_a.get(name).cloned(), in_b.get(name).cloned());
    }
    let order = |file: &MrtFile| {
        let names: Vec<_> = file.prologue.sections().iter().map(|s| s.name.as_str()).collect();
        Some(names.join(", "))
    };
    if in_a.keys().eq(in_b.keys()) {
        add("section", "order", order(a), order(b));
    }
    let tensors = |file: &MrtFile| {
        let tensors = file.prologue.layout().tensors(file.prologue.config());
        tensors.map(|t| (t.name(), t)).collect::<BTreeMap<_, _>>()
    };
    let (in_a, in_b) = (tensors(a), tensors(b));
    for (name, t) in &in_a {
        let u = in_b.get(name);
        add("tensor", name, Some(shape(t)), u.map(shape));
    }
    for (name, u) in in_b.iter().filter(|(name, _)| !in_a.contains_key(*name)) {
        add("tensor", name, None, Some(shape(u)));
    }
    let bar = progress_bar("comparing", a.prologue.layout().arena_bytes);
    for (name, t) in &in_a {
        if let Some(u) = in_b.get(name).filter(|u| (t.k, t.n) == (u.k, u.n)) {
            let differing = differing_values(a, b, t, u)?;
            if differing > 0 {
                let change = Change::Values(differing, t.span.bytes / 2);
                differences.push(Difference { kind: "tensor", name: name.clone(), change });
            }
        }
        bar.inc(t.span.bytes);
    }
    Ok(differences)
}

fn shape(tensor: &TensorEntry) -> String {
    format!("{} x {}", tensor.n, tensor.k)
}

fn fields(cfg: &Qwen2Config) -> [(&'static str, String); 11] {
    [
        ("hidden_size", cfg.hidden_size.to_string()),
        ("intermediate_size", cfg.intermediate_size.to_string()),
        ("num_layers", cfg.num_layers.to_string()),
        ("num_heads", cfg.num_heads.to_string()),
        ("num_kv_heads", cfg.num_kv_heads.to_string()),
        ("head_dim", cfg.head_dim.to_string()),
        ("vocab_size", cfg.vocab_size.to_string()),
        ("max_position_embeddings", cfg.max_position_embeddings.to_string()),
        ("rms_norm_eps", format!("{:e}", cfg.rms_norm_eps)),
        ("rope_theta", cfg.rope_theta.to_string()),
        ("tie_word_embeddings", cfg.tie_word_embeddings.to_string()),
    ]
}

/// How many values of a tensor differ.
fn differing_values(a: &MrtFile, b: &MrtFile, t: &TensorEntry, u: &TensorEntry) -> Result<u64, FileError> {
    let same_place = t.span == u.span;
    let (mut from_a, mut from_b) = (Vec::new(), Vec::new());
    let mut differing = 0;
    let mut at = 0;
    while at < t.span.bytes {
        // Up to the end of a chunk of the first file.
        let chunk = (t.span.offset + at) / CHUNK_BYTES;
        let bytes = ((chunk + 1) * CHUNK_BYTES - (t.span.offset + at)).min(t.span.bytes - at);
        let i = chunk as usize;
        let equal_chunks = same_place
            && i < b.prologue.chunk_count()
            && a.prologue.chunk(i).bytes == b.prologue.chunk(i).bytes
            && a.prologue.chunk_digest(i) == b.prologue.chunk_digest(i);
        if !equal_chunks {
            for (file, span, out) in [(a, t.span, &mut from_a), (b, u.span, &mut from_b)] {
                out.resize(bytes as usize, 0);
                file.read(file.prologue.arena_offset() + span.offset + at, out)?;
            }
            let pairs = from_a.as_chunks::<2>().0.iter().zip(from_b.as_chunks::<2>().0);
            differing += pairs.filter(|(a, b)| a != b).count() as u64;
        }
        at += bytes;
    }
    Ok(differing)
}

/// One line for each difference.
pub fn write_text(out: &mut impl Write, a: &MrtFile, b: &MrtFile, list: &[Difference]) -> mr_cli::Result<()> {
    for Difference { kind, name, change } in list {
        match change {
            Change::Values(differing, all) => {
                writeln!(out, "{kind} {name}: {differing} of {all} values differ")?
            }
            Change::Other(Some(a), Some(b)) => writeln!(out, "{kind} {name}: {a} -> {b}")?,
            Change::Other(Some(_), None) => writeln!(out, "{kind} {name}: only in the first file")?,
            Change::Other(None, _) => writeln!(out, "{kind} {name}: only in the second file")?,
        }
    }
    match a.prologue.root() == b.prologue.root() {
        true => {
            let root = a.prologue.root();
            writeln!(
                out,
                "the files are the same by their digests, root {root}; mrt verify checks their bytes"
            )?;
        }
        false if list.is_empty() => writeln!(out, "the files differ in bits of the header alone")?,
        false => {}
    }
    Ok(())
}

/// The differences as one JSON object.
pub fn write_json(out: &mut impl Write, a: &MrtFile, b: &MrtFile, list: &[Difference]) -> mr_cli::Result<()> {
    let entry = |d: &Difference| match &d.change {
        Change::Values(differing, all) => {
            json!({"kind": d.kind, "name": d.name, "differing": differing, "values": all})
        }
        Change::Other(a, b) => json!({"kind": d.kind, "name": d.name, "a": a, "b": b}),
    };
    let object = json!({
        "same": a.prologue.root() == b.prologue.root(),
        "roots": [a.prologue.root().to_string(), b.prologue.root().to_string()],
        "differences": list.iter().map(entry).collect::<Vec<_>>(),
    });
    writeln!(out, "{object}")?;
    Ok(())
}
