//! Brings mapped weights into memory before they are used.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use crate::platform::{Mapping, is_cached};

/// Bytes that are brought in at a time: large enough for a disk's full rate, small enough to stop soon.
pub(crate) const PIECE: usize = 4 << 20;

/// Bytes for each look at whether the page cache has them.
const LOOK: usize = 8 << 20;

/// A thread that brings in a range of a mapping from its beginning to its end, and ends. Dropping this ends it sooner,
/// after the piece that it is at.
///
/// When the page cache has all of it, there is nothing to do: mapping it ahead saves nothing where the threads that use
/// it would do so on their way, and as long as a piece of small pages is being mapped, the process gets no other memory.
pub(crate) struct Background {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Starts the thread. `mapping` is of `file`, from `offset`. A system that refuses the thread leaves the pages to be
    /// brought in by their first use.
    pub(crate) fn start(mapping: Arc<Mapping>, file: File, offset: u64, range: Range<usize>) -> Background {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let work = move || {
            let cached = |at: usize| is_cached(&file, offset + at as u64);
            if range.clone().step_by(LOOK).all(cached) {
                return;
            }
            for piece in pieces(range) {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                mapping.populate(piece);
            }
        };
        let thread = thread::Builder::new().name("mruntime-prefault".into()).spawn(work).ok();
        Background { stop, thread }
    }
}

#[cfg(test)]
impl Background {
    fn wait(mut self) {
        self.thread.take().expect("a thread").join().unwrap();
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to panic at.
            let _ = thread.join();
        }
    }
}

/// `range` cut at multiples of [`PIECE`], which are the boundaries of huge pages too.
pub(crate) fn pieces(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let Range { start, end } = range;
    let first = start - start % PIECE;
    (first..end).step_by(PIECE).map(move |at| at.max(start)..(at + PIECE).min(end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_whole_range_once_cut_at_multiples() {
        for range in [0..0, 0..1, 5..PIECE, 7..3 * PIECE, PIECE..2 * PIECE, PIECE - 1..PIECE + 1] {
            let pieces: Vec<_> = pieces(range.clone()).collect();
            let ends: Vec<_> = pieces.iter().map(|piece| piece.end).collect();
            assert!(pieces.windows(2).all(|two| two[0].end == two[1].start && two[1].start % PIECE == 0));
            assert_eq!(pieces.iter().map(Range::len).sum::<usize>(), range.len());
            assert_eq!(pieces.first().map_or(range.start, |piece| piece.start), range.start);
            assert_eq!(ends.last().map_or(range.start, |&end| end), range.end);
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_not_in_the_page_cache_is_brought_in() {
        use std::io::Write;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let bytes = 3 * LOOK + 5;
        file.write_all(&vec![1; bytes]).unwrap();
        let mapping = Arc::new(Mapping::new(file.as_file(), 0, bytes).unwrap());
        let cached = |at: usize| is_cached(file.as_file(), at as u64);
        let system_tells = cached(0);
        file.as_file().sync_all().unwrap();
        crate::platform::drop_cache(file.as_file());
        // A file system in memory keeps its pages. Only the first piece, which is not in the range, is looked at before.
        if system_tells && !cached(0) {
            Background::start(mapping, file.reopen().unwrap(), 0, PIECE..bytes).wait();
            assert!((PIECE..bytes).step_by(PIECE).all(cached));
        }
    }
}
