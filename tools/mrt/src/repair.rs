//! `mrt repair`: fetches what is damaged or missing in a file from another copy of it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use mrt_format::Digest;
use mruntime::Pool;
use serde_json::{Value, json};

use crate::file::{FileError, MrtFile, open_regular};
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
/// checked before it is written, so that a repair that was stopped can be started again. A file that was too short
/// gets its last piece last, and only when all else is whole: until then no reader takes it for a model.
pub fn repair(path: &Path, other: &Path, root: Option<&Digest>, pool: &mut Pool) -> mr_cli::Result<Repaired> {
    let existed = path.exists();
    let target = open_regular(path, File::options().read(true).write(true).create(true).truncate(false))?;
    let io_error = |e: io::Error| FileError::new(path, e);
    let target_len = target.metadata().map_err(io_error)?.len();
    let source = open_regular(other, File::options().read(true))?;
    let same = same_file(&target, &source).map_err(io_error)?;
    if same {
        return Err(FileError::new(path, "is the file that --from names; name another copy").into());
    }
    // A prologue is good if it is whole, and the expected one if there is an expectation.
    let mine = MrtFile::open_part(path, target.try_clone().map_err(io_error)?, root).ok();
    let theirs = MrtFile::open_part(other, source.try_clone().map_err(io_error)?, root);
    let mut fetched = Vec::new();
    let plan = match (mine, theirs) {
        (Some(mine), Ok(theirs)) if mine.prologue.root() != theirs.prologue.root() => {
            let (found, needed) = (theirs.prologue.root(), mine.prologue.root());
            let problem = format!("is a copy of another file: its root digest is {found}, not {needed}");
            return Err(theirs.error(problem).into());
        }
        (Some(mine), _) => mine,
        (None, Ok(theirs)) => {
            fetched.push(("header, directory and chunk table".to_owned(), 0, theirs.head.len() as u64));
            theirs
        }
        (None, Err(problem)) => {
            if !existed {
                std::fs::remove_file(path).map_err(io_error)?;
            }
            return Err(format!(
                "{}: has no whole header, and neither has the other copy: {problem}",
                path.display()
            )
            .into());
        }
    };
    let prologue = &plan.prologue;
    if !fetched.is_empty() {
        target.write_all_at(&plan.head, 0).map_err(io_error)?;
    }

    // Nothing is left to the other copy but bytes: what they must be, the digests say.
    let pieces = pieces(prologue);
    let total = prologue.file_bytes();
    let ends_file = |piece: Piece| {
        let (offset, bytes) = piece.range(prologue);
        target_len < total && offset + bytes == total
    };
    let attempt = |piece: Piece, buffer: &mut Vec<u8>| {
        let (offset, bytes) = piece.range(prologue);
        let buffer = aligned(buffer, bytes as usize);
        let mut is_good =
            |file: &File| file.read_exact_at(buffer, offset).is_ok() && piece.check(prologue, buffer).is_ok();
        if is_good(&target) {
            return Ok(State::Good);
        }
        if !is_good(&source) {
            return Ok(State::Missing);
        }
        if !ends_file(piece) {
            target
                .write_all_at(buffer, offset)
                .map_err(|e| FileError::new(path, format!("cannot be written: {e}")))?;
        }
        Ok(State::Fetched)
    };
    let states = on_all_pieces(&plan, &pieces, pool, attempt)?;
    let named = |piece: Piece| {
        let (offset, bytes) = piece.range(prologue);
        (piece.name(prologue), offset, offset + bytes)
    };
    let of_state = |state| pieces.iter().zip(&states).filter(move |(_, s)| **s == state).map(|(p, _)| *p);
    let missing: Vec<_> = of_state(State::Missing).map(named).collect();
    fetched.extend(of_state(State::Fetched).filter(|p| missing.is_empty() || !ends_file(*p)).map(named));
    if missing.is_empty() {
        target.sync_data().map_err(io_error)?;
        let mut buffer = Vec::new();
        for piece in of_state(State::Fetched).filter(|piece| ends_file(*piece)) {
            let (offset, bytes) = piece.range(prologue);
            buffer.resize(bytes as usize, 0);
            source.read_exact_at(&mut buffer, offset).map_err(|e| FileError::new(other, e))?;
            piece.check(prologue, &buffer).map_err(|e| FileError::new(other, e))?;
            target.write_all_at(&buffer, offset).map_err(io_error)?;
        }
        target.set_len(total).map_err(io_error)?;
    }
    target.sync_all().map_err(io_error)?;
    Ok(Repaired { root: *prologue.root(), fetched, missing })
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
