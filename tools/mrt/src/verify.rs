//! `mrt verify`: every byte of a file against its digests.

use std::io::Write;

use indicatif::{ProgressBar, ProgressStyle};
use mrt_format::{
    CHUNK_BYTES, CONVERSION_REPORT, FormatError, GENERATION, GenerationDefaults, TENSOR_TABLE,
    report_from_bytes,
};
use mruntime::{Chunks, PerWorker, Pool};
use serde_json::{Value, json};

use crate::file::{FileError, MrtFile};

/// Checks sections, padding and, on all threads, the chunks of the arena. Returns all that is wrong, in the order of
/// the file's parts.
pub fn verify(file: &MrtFile, pool: &mut Pool) -> Result<Vec<FormatError>, FileError> {
    let prologue = &file.prologue;
    let mut damage = Vec::new();
    for section in prologue.sections() {
        let mut content = vec![0; section.bytes as usize];
        file.read(section.offset, &mut content)?;
        damage.extend(check_section(file, &section.name, &content).err());
    }
    for (offset, bytes) in prologue.padding() {
        let mut padding = vec![0; bytes as usize];
        file.read(offset, &mut padding)?;
        damage.extend(prologue.check_padding(offset, &padding).err());
    }
    damage.extend(bad_chunks(file, pool)?);
    Ok(damage)
}

fn check_section(file: &MrtFile, name: &str, content: &[u8]) -> Result<(), FormatError> {
    let prologue = &file.prologue;
    prologue.check_section(name, content)?;
    match name {
        TENSOR_TABLE => prologue.check_tensor_table(content),
        CONVERSION_REPORT => report_from_bytes(prologue.config(), content).map(drop),
        GENERATION => GenerationDefaults::from_bytes(prologue.config(), content).map(drop),
        _ => Ok(()),
    }
}

fn bad_chunks(file: &MrtFile, pool: &mut Pool) -> Result<Vec<FormatError>, FileError> {
    let prologue = &file.prologue;
    let style = ProgressStyle::with_template(
        "checking {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
    );
    let bar =
        ProgressBar::new(prologue.layout().arena_bytes).with_style(style.expect("the template is valid"));
    let mut buffers = vec![vec![0; CHUNK_BYTES as usize]; pool.threads()];
    let mut results: Vec<_> = (0..prologue.chunk_count()).map(|_| Ok(None)).collect();
    pool.run_split(
        (Chunks::new(&mut results, 1), PerWorker::new(&mut buffers, 1)),
        |_, i, (result, buffer)| {
            let span = prologue.chunk(i);
            let chunk = &mut buffer[0][..span.bytes as usize];
            let read = file.read(prologue.arena_offset() + span.offset, chunk);
            result[0] = read.map(|()| prologue.check_chunk(i, chunk).err());
            bar.inc(span.bytes);
        },
    );
    bar.finish_and_clear();
    let results: Vec<_> = results.into_iter().collect::<Result<_, _>>()?;
    Ok(results.into_iter().flatten().collect())
}

/// The names of the tensors that lie in a range of the arena.
fn tensors_in(file: &MrtFile, offset: u64, end: u64) -> Vec<String> {
    let prologue = &file.prologue;
    let tensors = prologue.layout().tensors(prologue.config());
    tensors.filter(|t| t.span.offset < end && offset < t.span.end()).map(|t| t.name()).collect()
}

/// The tensors that a damaged chunk holds parts of.
fn tensors_of(file: &MrtFile, damage: &FormatError) -> Vec<String> {
    let start = file.prologue.arena_offset();
    match damage {
        FormatError::ChunkDamaged { offset, end, .. } => tensors_in(file, offset - start, end - start),
        _ => Vec::new(),
    }
}

/// One line for each damaged part, or one that all is well.
pub fn write_text(out: &mut impl Write, file: &MrtFile, damage: &[FormatError]) -> mr_cli::Result<()> {
    let (path, prologue) = (file.path.display(), &file.prologue);
    for problem in damage {
        let tensors = tensors_of(file, problem);
        let of =
            if tensors.is_empty() { String::new() } else { format!("; it holds {}", tensors.join(", ")) };
        writeln!(out, "{path}: {problem}{of}")?;
    }
    if damage.is_empty() {
        let (sections, chunks) = (prologue.sections().len(), prologue.chunk_count());
        writeln!(out, "{path}: all {sections} sections and {chunks} chunks are as the digests say")?;
        writeln!(out, "root: {}", prologue.root())?;
    }
    Ok(())
}

/// The result as one JSON object; byte ranges are those of the file, their ends excluded.
pub fn write_json(out: &mut impl Write, file: &MrtFile, damage: &[FormatError]) -> mr_cli::Result<()> {
    let entry = |problem: &FormatError| -> Value {
        let mut entry = json!({ "problem": problem.to_string() });
        match problem {
            FormatError::ChunkDamaged { index, offset, end } => {
                entry["chunk"] = json!(index);
                entry["bytes"] = json!([offset, end]);
                entry["tensors"] = json!(tensors_of(file, problem));
            }
            FormatError::SectionDamaged { name, offset, end } => {
                entry["section"] = json!(name);
                entry["bytes"] = json!([offset, end]);
            }
            FormatError::PaddingNotZero { offset } => entry["bytes"] = json!([offset, offset + 1]),
            _ => {}
        }
        entry
    };
    let object = json!({
        "ok": damage.is_empty(),
        "root": file.prologue.root().to_string(),
        "sections": file.prologue.sections().len(),
        "chunks": file.prologue.chunk_count(),
        "damage": damage.iter().map(entry).collect::<Vec<_>>(),
    });
    writeln!(out, "{object}")?;
    Ok(())
}
