//! A part of a file as memory.

use std::fs::File;
use std::io;

use memmap2::{Mmap, MmapOptions};

/// A part of a file, mapped read-only: its pages are the page cache's, shared by all processes that map the file.
pub(crate) struct Mapping(Mmap);

impl Mapping {
    /// Maps `bytes` bytes of `file` from `offset`, any number, and asks for huge pages on Linux. The address of the first byte is
    /// congruent to `offset` modulo the page size; where the file system has huge pages, modulo theirs.
    pub(crate) fn new(file: &File, offset: u64, bytes: usize) -> io::Result<Self> {
        // SAFETY: the mapping is read-only, never remapped and lives as long as the value, so the borrow checker
        // covers this process's own uses. What it cannot cover is another process that writes to the file or
        // truncates it; that is the documented duty of whoever chooses `Backing::Map`, as with an executable
        // file. The damage would be bounded: the bytes are only ever read as u8 or FP16, every bit pattern of which is
        // valid, and no offset, length or index is taken from them.
        let map = unsafe { MmapOptions::new().offset(offset).len(bytes).map(file)? };
        // Advice that a kernel or file system does not know leaves a slower mapping, not a wrong one.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self(map))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}
