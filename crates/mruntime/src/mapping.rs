//! A part of a file as memory.

use std::fs::File;
use std::io;
use std::ops::Range;

#[cfg(unix)]
use memmap2::Advice;
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
        let _ = map.advise(Advice::HugePage);
        Ok(Self(map))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Brings the pages of `range` into memory and maps them, before they are used. Where the system cannot map ahead
    /// it is asked to read ahead; advice that is not taken leaves the pages to be brought in by their first use.
    pub(crate) fn populate(&self, range: Range<usize>) {
        let (offset, len) = (range.start, range.len());
        #[cfg(any(target_os = "linux", target_os = "android"))]
        if self.0.advise_range(Advice::PopulateRead, offset, len).is_ok() {
            return;
        }
        #[cfg(unix)]
        let _ = self.0.advise_range(Advice::WillNeed, offset, len);
    }
}

/// Whether the byte of `file` at `offset` is in the page cache, so that reading it waits for no disk; false also where the
/// system does not tell. Looking at a byte that is not there begins to read it.
#[cfg(target_os = "linux")]
pub(crate) fn is_cached(file: &File, offset: u64) -> bool {
    use std::os::fd::AsRawFd;
    let mut byte = 0u8;
    let buffer = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let (one, low, high) = (1 as libc::c_ulong, offset as libc::c_ulong, (offset >> 32) as libc::c_ulong);
    // SAFETY: preadv2(file, buffers, their number, offset in two halves, flags) writes to the one byte that the buffer
    // names, which lives until the call returns, and keeps nothing.
    let read = unsafe {
        libc::syscall(
            libc::SYS_preadv2,
            file.as_raw_fd(),
            &raw const buffer,
            one,
            low,
            high,
            libc::RWF_NOWAIT,
        )
    };
    read == 1
}

/// No such question can be asked here.
#[cfg(not(target_os = "linux"))]
pub(crate) fn is_cached(_file: &File, _offset: u64) -> bool {
    false
}

/// Takes the pages of `file` out of the page cache, if its file system can get them back.
#[cfg(all(test, target_os = "linux"))]
pub(crate) fn drop_cache(file: &File) {
    use std::os::fd::AsRawFd;
    // SAFETY: advice on an open file; it touches no memory.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}
