//! Brings a file into the page cache in huge pages, so that processes that map it start and run at their fastest.
//!
//! How pages are kept is decided when they come into the cache: a file that was copied there in small pieces stays in
//! small pages, until it is dropped and read again by the mapping that asks for huge ones.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Instant;

use mr_cli::{ModelSource, Pages, Result};
use mrt_format::qwen2_weights_layout;
use mruntime::arena::HUGE_PAGE;
use mruntime::{OpenOptions, Pool, Prefault};
use rustix::fs::{Advice, fadvise};
use serde_json::{Value, json};

use crate::file::MrtFile;

const HUGE: u64 = HUGE_PAGE as u64;

/// How the weights lie in the page cache.
#[derive(Clone, Copy)]
pub struct State {
    /// KiB of the weights, and of those that huge pages could hold.
    weights: u64,
    most_huge: u64,
    /// KiB in huge pages.
    huge: u64,
    /// Milliseconds that it took to map all of them, and to read those that were not in memory.
    mapping: f64,
}

impl State {
    /// Whether it is nearly as it should be; where free memory is in small pieces, a few pages stay small.
    pub fn is_huge(&self) -> bool {
        self.huge >= self.most_huge / 10 * 9
    }

    /// Whether reading the file anew may pay: a twentieth in small pages takes longer to map than all the rest.
    fn can_gain(&self) -> bool {
        self.huge < self.most_huge / 100 * 99
    }

    fn to_json(self) -> Value {
        json!({ "weights_kib": self.weights, "huge_kib": self.huge, "mapping_ms": self.mapping })
    }
}

/// Warms the file; returns how it was found, and how it is now.
pub fn warm(path: &Path) -> Result<(State, State)> {
    // One thread: the read-ahead of two would cut into each other's huge pages.
    let pool = &mut Pool::new(1)?;
    let found = bring_in(path, pool)?;
    let error = |e: io::Error| format!("{}: {e}", path.display());
    if found.can_gain() {
        drop_cached(path).map_err(error)?;
        bring_in(path, pool)?;
    }
    // Reading on from the head would bring the first weights in in small pages, so it comes last.
    let head = MrtFile::open(path)?.prologue.arena_offset();
    let copy = |file: File| io::copy(&mut file.take(head), &mut io::sink());
    File::open(path).and_then(copy).map_err(error)?;
    // Once more for the time that it takes from now on.
    Ok((found, bring_in(path, pool)?))
}

/// Maps all weights of the file.
fn bring_in(path: &Path, pool: &mut Pool) -> Result<State> {
    let options = OpenOptions { prefault: Prefault::AtOpen, ..OpenOptions::default() };
    let start = Instant::now();
    let model = ModelSource::file(path.into()).open(&options, pool)?;
    let mapping = start.elapsed().as_secs_f64() * 1e3;
    let pages = Pages::of(model.arena()).ok_or("this system does not tell which pages are huge")?;
    // All but an embedding table of its own, of which a few columns are used.
    let (start, end) =
        (qwen2_weights_layout(model.config()).layer0.attn_norm.offset, model.arena().len() as u64);
    let most_huge = (end / HUGE * HUGE).saturating_sub(start.next_multiple_of(HUGE));
    Ok(State { weights: (end - start) >> 10, most_huge: most_huge >> 10, huge: pages.huge(), mapping })
}

/// Takes the file out of the page cache, but for pages that other processes have mapped.
fn drop_cached(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    // Pages that are not written yet would stay.
    file.sync_all()?;
    Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
}

/// Writes both states as text.
pub fn write_text(out: &mut impl Write, path: &Path, found: State, now: State) -> io::Result<()> {
    for (when, State { weights, huge, mapping, .. }) in [("found", found), ("now", now)] {
        let (path, weights, huge) = (path.display(), weights >> 10, huge >> 10);
        writeln!(
            out,
            "{path}: {when}: {huge} of {weights} MiB of weights in huge pages, mapped in {mapping:.1} ms"
        )?;
    }
    Ok(())
}

/// Writes both states as one JSON object.
pub fn write_json(out: &mut impl Write, path: &Path, found: State, now: State) -> io::Result<()> {
    let file = path.display().to_string();
    writeln!(out, "{}", json!({ "file": file, "found": found.to_json(), "now": now.to_json() }))
}
