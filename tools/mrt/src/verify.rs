//! `mrt verify`: every byte of a file against its digests.

use std::io::Write;

use mr_cli::{FileError, progress_bar};
use mrt_format::FormatError;
use mruntime::{Chunks, PerWorker, Pool};
use serde_json::{Value, json};

use crate::file::MrtFile;
use crate::piece::{Piece, pieces};

/// A piece that is not as the digests say, and what is wrong with it.
pub type Damage = (Piece, FormatError);

/// Checks sections, padding and the chunks of the arena on all threads. Returns all that is wrong, in the order of
/// the file.
pub fn verify(file: &MrtFile, pool: &mut Pool) -> Result<Vec<Damage>, FileError> {
    let prologue = &file.prologue;
    let pieces = pieces(prologue);
    let check = |piece: Piece, buffer: &mut Vec<u8>| {
        let (offset, bytes) = piece.range(prologue);
        let content = aligned(buffer, bytes as usize);
        file.read(offset, content)?;
        Ok(piece.check(prologue, content).err().map(|problem| (piece, problem)))
    };
    let results = on_all_pieces(file, &pieces, pool, check)?;
    Ok(results.into_iter().flatten().collect())
}

/// The first bytes of a buffer from a multiple of 64 in memory on. An allocator puts large buffers 16 bytes behind the
/// beginning of a page, where the system copies a file's content more slowly: verifying took a tenth longer (Zen 4).
pub fn aligned(buffer: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    buffer.resize(bytes + 64, 0);
    let start = buffer.as_ptr().align_offset(64);
    &mut buffer[start..start + bytes]
}

/// Calls `work` for each piece, with a buffer of the thread's own, and shows how far it is.
pub fn on_all_pieces<T: Send + 'static>(
    file: &MrtFile,
    pieces: &[Piece],
    pool: &mut Pool,
    work: impl Fn(Piece, &mut Vec<u8>) -> Result<T, FileError> + Sync,
) -> Result<Vec<T>, FileError> {
    let bar = progress_bar("checking", file.prologue.file_bytes());
    let mut buffers = vec![Vec::new(); pool.threads()];
    let mut results: Vec<Option<Result<T, FileError>>> = pieces.iter().map(|_| None).collect();
    pool.run_split(
        (Chunks::new(&mut results, 1), PerWorker::new(&mut buffers, 1)),
        |_, i, (result, buffer)| {
            result[0] = Some(work(pieces[i], &mut buffer[0]));
            bar.inc(pieces[i].range(&file.prologue).1);
        },
    );
    results.into_iter().map(|result| result.expect("every piece was worked on")).collect()
}

/// One line for each damaged part, or one that all is well.
pub fn write_text(out: &mut impl Write, file: &MrtFile, damage: &[Damage]) -> mr_cli::Result<()> {
    let (path, prologue) = (file.path.display(), &file.prologue);
    for (piece, problem) in damage {
        let tensors = piece.tensors(prologue);
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

/// The result as one JSON object; byte ranges are those of the file, their ends excluded. `signed_by` is the key's id.
pub fn write_json(
    out: &mut impl Write,
    file: &MrtFile,
    damage: &[Damage],
    signed_by: Option<&str>,
) -> mr_cli::Result<()> {
    let prologue = &file.prologue;
    let entry = |(piece, problem): &Damage| -> Value {
        let mut entry = json!({ "problem": problem.to_string() });
        let (offset, bytes) = piece.range(prologue);
        entry["bytes"] = json!([offset, offset + bytes]);
        match (piece, problem) {
            (Piece::Chunk(i), _) => {
                entry["chunk"] = json!(i);
                entry["tensors"] = json!(piece.tensors(prologue));
            }
            (Piece::Section(i), _) => entry["section"] = json!(prologue.sections()[*i].name),
            (Piece::Padding { .. }, FormatError::PaddingNotZero { offset }) => {
                entry["bytes"] = json!([offset, offset + 1]);
            }
            _ => {}
        }
        entry
    };
    let object = json!({
        "ok": damage.is_empty(),
        "root": prologue.root().to_string(),
        "signed_by": signed_by,
        "sections": prologue.sections().len(),
        "chunks": prologue.chunk_count(),
        "damage": damage.iter().map(entry).collect::<Vec<_>>(),
    });
    writeln!(out, "{object}")?;
    Ok(())
}
