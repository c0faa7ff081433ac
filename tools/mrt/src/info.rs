//! `mrt info`: what a file holds.

use std::io::Write;

use mr_cli::FileError;
use mrt_format::{
    ARENA_ALIGN, CONVERSION_REPORT, Counts, GENERATION, GenerationDefaults, ORIGIN, Qwen2Config, ReportEntry,
    SourceDtype, TensorKind, qwen2_source_tensors, report_from_bytes,
};
use serde_json::{Value, json};

use crate::file::MrtFile;

/// Sections that are shown, read and checked.
struct Details {
    report: Option<Vec<ReportEntry>>,
    generation: Option<GenerationDefaults>,
    origin: Option<String>,
    parameters: u64,
}

impl Details {
    fn read(file: &MrtFile) -> Result<Self, FileError> {
        let cfg = file.prologue.config();
        let report = match file.section(CONVERSION_REPORT)? {
            Some(bytes) => Some(report_from_bytes(cfg, &bytes).map_err(|e| file.error(e))?),
            None => None,
        };
        let generation = match file.section(GENERATION)? {
            Some(bytes) => Some(GenerationDefaults::from_bytes(cfg, &bytes).map_err(|e| file.error(e))?),
            None => None,
        };
        let origin = file.section(ORIGIN)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let parameters = qwen2_source_tensors(cfg).iter().map(|tensor| tensor.elements()).sum();
        Ok(Details { report, generation, origin, parameters })
    }

    fn counts(&self) -> Option<Counts> {
        let mut sum = Counts::default();
        self.report.as_ref()?.iter().for_each(|entry| sum += entry.counts);
        Some(sum)
    }

    /// The element types of the tensors that the file was made of, each once.
    fn dtypes(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for entry in self.report.iter().flatten() {
            let name = match entry.dtype {
                SourceDtype::Bf16 => "BF16",
                SourceDtype::F16 => "F16",
                SourceDtype::F32 => "F32",
            };
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

/// Writes a page for people.
pub fn write_text(out: &mut impl Write, file: &MrtFile, tensors: bool) -> mr_cli::Result<()> {
    let prologue = &file.prologue;
    let details = Details::read(file)?;
    let (major, minor) = prologue.version();
    writeln!(out, "file        {}", file.path.display())?;
    writeln!(out, "format      {major}.{minor}")?;
    writeln!(out, "root        {}", prologue.root())?;
    write_config(out, prologue.config(), details.parameters)?;
    let (bytes, arena) = (prologue.file_bytes(), prologue.layout().arena_bytes);
    writeln!(out, "size        {bytes} bytes ({})", mebibytes(bytes))?;
    writeln!(
        out,
        "weights     {arena} bytes ({}) from byte {}, aligned to {}, in {} chunks",
        mebibytes(arena),
        prologue.arena_offset(),
        mebibytes(ARENA_ALIGN),
        prologue.chunk_count()
    )?;
    if let Some(Counts { exact, rounded, flushed }) = details.counts() {
        let dtypes = details.dtypes().join(", ");
        writeln!(
            out,
            "converted   from {dtypes}: {exact} exact, {rounded} rounded, {flushed} flushed to zero"
        )?;
    }
    if let Some(generation) = &details.generation {
        writeln!(out, "generation  {}", generation_text(generation))?;
    }
    for line in details.origin.iter().flat_map(|text| text.lines()) {
        // A text from elsewhere must not steer the terminal.
        let line: String = line.chars().filter(|c| !c.is_control()).collect();
        writeln!(out, "origin      {line}")?;
    }
    writeln!(out, "\n{:<32} {:>10} {:>10}  sha256", "section", "offset", "bytes")?;
    for section in prologue.sections() {
        writeln!(
            out,
            "{:<32} {:>10} {:>10}  {}",
            section.name, section.offset, section.bytes, section.sha256
        )?;
    }
    if tensors {
        writeln!(
            out,
            "\n{:<24} {:<7} {:>8} {:>8} {:>12} {:>12}",
            "tensor", "kind", "k", "n", "offset", "bytes"
        )?;
        for t in prologue.layout().tensors(prologue.config()) {
            let (name, kind, span) = (t.name(), kind_name(t.kind), t.span);
            writeln!(
                out,
                "{name:<24} {kind:<7} {:>8} {:>8} {:>12} {:>12}",
                t.k, t.n, span.offset, span.bytes
            )?;
        }
    }
    Ok(())
}

fn write_config(out: &mut impl Write, cfg: &Qwen2Config, parameters: u64) -> std::io::Result<()> {
    let head = if cfg.tie_word_embeddings { "tied" } else { "untied" };
    writeln!(
        out,
        "model       Qwen2, {parameters} parameters, {} layers, {head} embeddings",
        cfg.num_layers
    )?;
    writeln!(
        out,
        "            hidden size {}, intermediate size {}, vocabulary {}, context {}",
        cfg.hidden_size, cfg.intermediate_size, cfg.vocab_size, cfg.max_position_embeddings
    )?;
    writeln!(
        out,
        "            {} query heads and {} key-value heads of {}, RoPE base {}, RMSNorm epsilon {:e}",
        cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.rope_theta, cfg.rms_norm_eps
    )
}

fn generation_text(generation: &GenerationDefaults) -> String {
    let GenerationDefaults { temperature, top_k, top_p, min_p, repetition_penalty, .. } = generation;
    let how = if generation.do_sample { "sampled" } else { "greedy" };
    let bos = generation.bos_token.map_or_else(|| "none".into(), |id| id.to_string());
    format!(
        "{how} (temperature {temperature}, top-k {top_k}, top-p {top_p}, min-p {min_p}, repetition penalty \
         {repetition_penalty}), stop tokens {:?}, first token {bos}",
        generation.stop_tokens
    )
}

fn kind_name(kind: TensorKind) -> &'static str {
    match kind {
        TensorKind::Vector => "vector",
        TensorKind::Panels => "panels",
        TensorKind::PanelPairs => "pairs",
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// The shortest decimal of an f32 (0.8 and not 0.800000011920929), for JSON, whose numbers are f64.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().expect("a number's text is a number")
}

/// Writes one JSON object for programs; offsets of tensors count from the start of the arena.
pub fn write_json(out: &mut impl Write, file: &MrtFile, tensors: bool) -> mr_cli::Result<()> {
    let prologue = &file.prologue;
    let cfg = prologue.config();
    let details = Details::read(file)?;
    let (major, minor) = prologue.version();
    let sections: Vec<Value> = prologue
        .sections()
        .iter()
        .map(|s| {
            json!({
                "name": s.name, "required": s.required, "offset": s.offset, "bytes": s.bytes,
                "sha256": s.sha256.to_string(),
            })
        })
        .collect();
    let mut object = json!({
        "format": format!("{major}.{minor}"),
        "root": prologue.root().to_string(),
        "architecture": "qwen2",
        "parameters": details.parameters,
        "config": {
            "hidden_size": cfg.hidden_size, "intermediate_size": cfg.intermediate_size,
            "num_layers": cfg.num_layers, "num_heads": cfg.num_heads, "num_kv_heads": cfg.num_kv_heads,
            "head_dim": cfg.head_dim, "vocab_size": cfg.vocab_size,
            "max_position_embeddings": cfg.max_position_embeddings, "rms_norm_eps": cfg.rms_norm_eps,
            "rope_theta": cfg.rope_theta, "tie_word_embeddings": cfg.tie_word_embeddings,
        },
        "file_bytes": prologue.file_bytes(),
        "arena": {
            "offset": prologue.arena_offset(), "bytes": prologue.layout().arena_bytes, "alignment": ARENA_ALIGN,
            "chunks": prologue.chunk_count(),
        },
        "sections": sections,
        "origin": details.origin,
    });
    if let Some(Counts { exact, rounded, flushed }) = details.counts() {
        let dtypes = details.dtypes();
        object["conversion"] =
            json!({"dtypes": dtypes, "exact": exact, "rounded": rounded, "flushed": flushed});
    }
    if let Some(generation) = &details.generation {
        object["generation"] = json!({
            "do_sample": generation.do_sample, "temperature": decimal(generation.temperature), "top_k": generation.top_k,
            "top_p": decimal(generation.top_p), "min_p": decimal(generation.min_p),
            "repetition_penalty": decimal(generation.repetition_penalty), "bos_token": generation.bos_token,
            "stop_tokens": generation.stop_tokens,
        });
    }
    if tensors {
        let entries = prologue.layout().tensors(cfg).map(|t| {
            json!({
                "name": t.name(), "kind": kind_name(t.kind), "k": t.k, "n": t.n, "offset": t.span.offset,
                "bytes": t.span.bytes,
            })
        });
        object["tensors"] = entries.collect();
    }
    writeln!(out, "{object}")?;
    Ok(())
}
