//! The conversion report for people and for programs.

use std::cmp::Reverse;
use std::io::{self, Write};
use std::path::Path;

use mrt_format::{Counts, ReportEntry, SourceDtype, qwen2_source_tensors};
use mruntime::Qwen2Config;
use serde_json::{Value, json};

use crate::{Converted, TokenizerKind};

/// The report as one JSON object: digests, sizes, totals and every source tensor.
///
/// `overflowed` is always 0, because a value that FP16 cannot hold stops the conversion.
pub fn to_json(cfg: &Qwen2Config, converted: &Converted) -> Value {
    let tensors: Vec<_> = qwen2_source_tensors(cfg)
        .into_iter()
        .zip(&converted.report)
        .map(|(tensor, entry)| {
            let Counts { exact, rounded, flushed } = entry.counts;
            json!({
                "name": tensor.name, "dtype": dtype_name(entry.dtype), "shape": tensor.shape,
                "exact": exact, "rounded": rounded, "flushed": flushed, "overflowed": 0,
            })
        })
        .collect();
    let Counts { exact, rounded, flushed } = total(&converted.report);
    let (tokenizer, reason) = match &converted.tokenizer {
        TokenizerKind::None => (None, None),
        TokenizerKind::Prepacked => (Some("prepacked"), None),
        TokenizerKind::Json(reason) => (Some("json"), Some(reason)),
    };
    json!({
        "tokenizer": tokenizer, "tokenizer_not_prepacked": reason,
        "root": converted.root.to_string(), "sha256": converted.sha256.to_string(),
        "file_bytes": converted.file_bytes, "arena_bytes": converted.arena_bytes,
        "exact": exact, "rounded": rounded, "flushed": flushed, "overflowed": 0, "tensors": tensors,
    })
}

/// Tensors that the summary lists; the JSON report has all.
const LISTED: usize = 10;

/// Writes digests, sizes and totals, and the tensors with the most values that FP16 does not hold exactly.
///
/// # Errors
/// Those of `out`.
pub fn write_summary(
    out: &mut impl Write,
    path: &Path,
    cfg: &Qwen2Config,
    converted: &Converted,
) -> io::Result<()> {
    let Counts { exact, rounded, flushed } = total(&converted.report);
    let Converted { file_bytes, arena_bytes, root, sha256, report, tokenizer } = converted;
    writeln!(out, "{}: {file_bytes} bytes, {arena_bytes} of them weights", path.display())?;
    writeln!(out, "weights: {exact} exact, {rounded} rounded, {flushed} flushed to zero")?;
    let tensors = qwen2_source_tensors(cfg);
    let changed = |entry: &ReportEntry| entry.counts.rounded + entry.counts.flushed;
    let mut inexact: Vec<_> = tensors.iter().zip(report).filter(|(_, entry)| changed(entry) > 0).collect();
    inexact.sort_by_key(|(_, entry)| Reverse(changed(entry)));
    for (tensor, entry) in inexact.iter().take(LISTED) {
        let Counts { exact, rounded, flushed } = entry.counts;
        let dtype = dtype_name(entry.dtype);
        writeln!(out, "  {} ({dtype}): {exact} exact, {rounded} rounded, {flushed} flushed", tensor.name)?;
    }
    if inexact.len() > LISTED {
        writeln!(out, "  and {} tensors with fewer such values", inexact.len() - LISTED)?;
    }
    match tokenizer {
        TokenizerKind::None => writeln!(out, "tokenizer: none")?,
        TokenizerKind::Prepacked => writeln!(out, "tokenizer: prepacked")?,
        TokenizerKind::Json(reason) => writeln!(out, "tokenizer: as JSON only; {reason}")?,
    }
    writeln!(out, "root:    {root}")?;
    writeln!(out, "sha256:  {sha256}")
}

fn total(report: &[ReportEntry]) -> Counts {
    let mut sum = Counts::default();
    report.iter().for_each(|entry| sum += entry.counts);
    sum
}

/// The dtype as safetensors writes it.
fn dtype_name(dtype: SourceDtype) -> &'static str {
    match dtype {
        SourceDtype::Bf16 => "BF16",
        SourceDtype::F16 => "F16",
        SourceDtype::F32 => "F32",
    }
}
