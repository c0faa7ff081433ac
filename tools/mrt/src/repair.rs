//! `mrt repair`: fetches what is damaged or missing in a file from another copy of it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use mr_cli::FileError;
use mrt_format::{CHUNK_BYTES, Digest, MAGIC};
use mruntime::Pool;
use serde_json::{Value, json};

use crate::file::{MrtFile, open_regular};
use crate::piece::{Piece, pieces};
use crate::verify::{aligned, on_all_pieces};

/// What a repair has done.
pub struct Repaired {
    /// Root digest of the file.
    pub root: Digest,
    /// Names and byte ranges of the pieces that were fetched.
    pub fetched: Vec<(String, u64, u64)>,
    /// Those that the other copy has not either.
    pub missing: Vec<(String, u64, u64)>,
}

impl Repaired {
    /// The result as one JSON object.
    pub fn to_json(&self) -> Value {
        let list = |pieces: &[(String, u64, u64)]| -> Value {
            pieces.iter().map(|(name, from, to)| json!({"piece": name, "bytes": [from, to]})).collect()
        };
        json!({
            "ok": self.missing.is_empty(), "root": self.root.to_string(), "fetched": list(&self.fetched),
            "missing": list(&self.missing),
        })
    }
}

/// Repairs `path`, which may be cut short or not exist, from `other`, which may have damage of its own. Every piece is
/// checked before it is written, so that a repair that was stopped can be started again. A file that is too short, or has
/// no whole header, is a byte too long until all of it is whole: no reader takes it for a model before.
pub fn repair(path: &Path, other: &Path, root: Option<&Digest>, pool: &mut Pool) -> mr_cli::Result<Repaired> {
    let io_error = |e: io::Error| FileError::new(path, e);
    let source = open_regular(other, File::options().read(true))?;
    // A prologue is good if it is whole, and the expected one if there is an expectation.
    let theirs = MrtFile::open_part(other, source.try_clone().map_err(io_error)?, root);
    let is_new = !path.exists();
    if let (true, Err(problem)) = (is_new, &theirs) {
        return Err(problem.to_string().into());
    }
    let target = open_regular(path, File::options().read(true).write(true).create(true).truncate(false))?;
    let target_len = target.metadata().map_err(io_error)?.len();
    if same_file(&target, &source).map_err(io_error)? {
        return Err(FileError::new(path, "is the file that --from names; name another copy").into());
    }
    let mine = MrtFile::open_part(path, target.try_clone().map_err(io_error)?, None).ok();
    if let (Some(mine), Some(root)) = (&mine, root)
        && mine.prologue.root() != root
    {
        let problem = format!("is another file: its root digest is {}, not {root}", mine.prologue.root());
        return Err(FileError::new(path, problem).into());
    }
    let mut fetched = Vec::new();
    let plan = match (mine, theirs) {
        (Some(mine), Ok(theirs)) if mine.prologue.root() != theirs.prologue.root() => {
            let (found, needed) = (theirs.prologue.root(), mine.prologue.root());
            let problem = format!("is a copy of another file: its root digest is {found}, not {needed}");
            return Err(theirs.error(problem).into());
        }
        (Some(mine), _) => mine,
        (None, Ok(theirs)) if may_be_copy(&target, &theirs).map_err(io_error)? => {
            fetched.push(("header, directory and chunk table".to_owned(), 0, theirs.head.len() as u64));
            theirs
        }
        (None, Ok(_)) => {
            let problem =
                format!("has nothing of {}; remove it, or name the file to repair", other.display());
            return Err(FileError::new(path, problem).into());
        }
        (None, Err(problem)) => {
            let problem = format!("has no whole header, and neither has the other copy: {problem}");
            return Err(FileError::new(path, problem).into());
        }
    };
    let prologue = &plan.prologue;
    let total = prologue.file_bytes();
    if target_len != total || !fetched.is_empty() {
        let begun = target.set_len(total + 1).and_then(|()| target.write_all_at(&plan.head, 0));
        if begun.is_err() && is_new {
            let _ = std::fs::remove_file(path);
        }
        begun.map_err(io_error)?;
    }

    // Nothing is left to the other copy but bytes: what they must be, the digests say.
    let pieces = pieces(prologue);
    let attempt = |piece: Piece, buffer: &mut Vec<u8>| {
        let (offset, bytes) = piece.range(prologue);
        if offset + bytes <= target_len && is_good(piece, &plan, &target, buffer) {
            return Ok(State::Good);
        }
        if !is_good(piece, &plan, &source, buffer) {
            return Ok(State::Missing);
        }
        target
            .write_all_at(aligned(buffer, bytes as usize), offset)
            .map_err(|e| FileError::new(path, format!("cannot be written: {e}")))?;
        Ok(State::Fetched)
    };
    let states = on_all_pieces(&plan, &pieces, pool, attempt)?;
    let of_state = |state| {
        let pieces = pieces.iter().zip(&states).filter(move |(_, s)| **s == state);
        pieces.map(|(piece, _)| {
            let (offset, bytes) = piece.range(prologue);
            (piece.name(prologue), offset, offset + bytes)
        })
    };
    fetched.extend(of_state(State::Fetched));
    let missing: Vec<_> = of_state(State::Missing).collect();
    target.sync_all().map_err(io_error)?;
    if missing.is_empty() {
        target.set_len(total).and_then(|()| target.sync_all()).map_err(io_error)?;
    }
    Ok(Repaired { root: *prologue.root(), fetched, missing })
}

/// Whether `file`, which has no whole header, is a damaged or unfinished copy of `whole` and nothing else that a repair
/// would destroy: one chunk of its weights is right, or it is the beginning of a model before the first one, or all zeros.
fn may_be_copy(file: &File, whole: &MrtFile) -> io::Result<bool> {
    let (prologue, mut buffer) = (&whole.prologue, Vec::new());
    if (0..prologue.chunk_count()).any(|i| is_good(Piece::Chunk(i), whole, file, &mut buffer)) {
        return Ok(true);
    }
    let len = file.metadata()?.len();
    let mut magic = [0; MAGIC.len()];
    let magic = &mut magic[..len.min(MAGIC.len() as u64) as usize];
    file.read_exact_at(magic, 0)?;
    if MAGIC.starts_with(magic) && len < prologue.arena_offset() + prologue.chunk(0).bytes {
        return Ok(true);
    }
    for offset in (0..len).step_by(CHUNK_BYTES as usize) {
        buffer.resize((len - offset).min(CHUNK_BYTES) as usize, 0);
        file.read_exact_at(&mut buffer, offset)?;
        if buffer.iter().any(|&byte| byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether `file` has a piece of `plan` as it must be; the piece is in `buffer` then.
fn is_good(piece: Piece, plan: &MrtFile, file: &File, buffer: &mut Vec<u8>) -> bool {
    let (offset, bytes) = piece.range(&plan.prologue);
    let buffer = aligned(buffer, bytes as usize);
    file.read_exact_at(buffer, offset).is_ok() && piece.check(&plan.prologue, buffer).is_ok()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Good,
    Fetched,
    Missing,
}

fn same_file(a: &File, b: &File) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let (a, b) = (a.metadata()?, b.metadata()?);
    Ok((a.dev(), a.ino()) == (b.dev(), b.ino()))
}
