//! All that differs from one operating system to another: mapping and its advice, reading at an offset, making a name
//! durable, counting cores and memory.

#[cfg(any(target_os = "linux", target_os = "android"))]
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

#[cfg(unix)]
use memmap2::Advice;
use memmap2::{Mmap, MmapMut, MmapOptions};

use crate::pool::MAX_THREADS;

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

    /// Locks all pages in memory.
    pub(crate) fn lock(&self) -> io::Result<()> {
        #[cfg(unix)]
        return self.0.lock();
        #[cfg(not(unix))]
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Brings the pages of `range` into memory and maps them, before they are used. Where the system cannot map ahead
    /// it is asked to read ahead; advice that is not taken leaves the pages to be brought in by their first use.
    pub(crate) fn populate(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        if self.0.advise_range(Advice::PopulateRead, range.start, range.len()).is_ok() {
            return;
        }
        #[cfg(unix)]
        let _ = self.0.advise_range(Advice::WillNeed, range.start, range.len());
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Locks the pages of anonymous memory.
pub(crate) fn lock_anonymous(map: &MmapMut) -> io::Result<()> {
    #[cfg(unix)]
    return map.lock();
    #[cfg(not(unix))]
    {
        let _ = map;
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Asks for huge pages in a part of anonymous memory, or for small ones. Advice that is not taken leaves slower memory.
#[cfg(target_os = "linux")]
pub(crate) fn advise_huge_pages(map: &MmapMut, offset: usize, len: usize, huge: bool) {
    let advice = if huge { Advice::HugePage } else { Advice::NoHugePage };
    let _ = map.advise_range(advice, offset, len);
}

/// The size of pages is the system's affair here.
#[cfg(not(target_os = "linux"))]
pub(crate) fn advise_huge_pages(_map: &MmapMut, _offset: usize, _len: usize, _huge: bool) {}

/// Reads some bytes from `offset`, without moving the file's position where the system can do that.
#[cfg(unix)]
pub(crate) fn read_some(file: &File, offset: u64, out: &mut [u8]) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, out, offset)
}

/// Reads some bytes from `offset`. The file's position moves, but nothing here relies on it.
#[cfg(windows)]
pub(crate) fn read_some(file: &File, offset: u64, out: &mut [u8]) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, out, offset)
}

/// Sees to it that the names in a folder are on the disk.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    // Windows cannot open folders for this.
    if cfg!(not(unix)) {
        return Ok(());
    }
    sync_opened(File::open(folder))
}

fn sync_opened(folder: io::Result<File>) -> io::Result<()> {
    match folder {
        // Whoever may create files in a folder may not be allowed to read it.
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        folder => folder?.sync_all(),
    }
}

/// The number of cores to compute on: physical ones that this process may use, but neither those whose capacity is below
/// half of the largest one's nor Intel's efficient cores beside performance cores. The logical cores of a physical one
/// share its multipliers, caches and paths to memory; slow cores make fast ones wait at the end of each job.
pub fn performance_cores() -> usize {
    let all = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    fast_cores().map_or(all, |fast| fast.clamp(1, all))
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn fast_cores() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    Some(fast_cores_among(&cpu_list(list.trim())?, Path::new("/sys/devices")))
}

/// The numbers of a list in the kernel's manner, such as `0-3,8`.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn cpu_list(list: &str) -> Option<Vec<u32>> {
    let mut cpus = Vec::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cpus.extend(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?);
    }
    Some(cpus)
}

/// The number of physical cores of these logical ones without the slow, by what the kernel states in `devices`.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn fast_cores_among(cpus: &[u32], devices: &Path) -> usize {
    let read = |path: &str| std::fs::read_to_string(devices.join(path)).ok();
    let of_cpu = |cpu: u32, name: &str| read(&format!("system/cpu/cpu{cpu}/{name}"));
    // Intel's hybrid processors state no capacities, but which cores the counters of performance cores belong to.
    let performance = read("cpu_core/cpus").and_then(|list| cpu_list(list.trim())).unwrap_or_default();
    let speed = |cpu: u32| match of_cpu(cpu, "cpu_capacity").and_then(|text| text.trim().parse::<u64>().ok())
    {
        Some(capacity) => capacity,
        None => u64::from(performance.contains(&cpu)),
    };
    let most = cpus.iter().map(|&cpu| speed(cpu)).max().unwrap_or(0);
    let fast = cpus.iter().filter(|&&cpu| 2 * speed(cpu) >= most);
    // Logical cores of the same physical one have the same siblings.
    let siblings = |cpu: u32| of_cpu(cpu, "topology/thread_siblings_list").unwrap_or_else(|| cpu.to_string());
    fast.map(|&cpu| siblings(cpu)).collect::<BTreeSet<_>>().len()
}

/// Of Apple's first performance level; Intel's processors have no levels.
#[cfg(any(target_os = "macos", target_os = "ios"))]
fn fast_cores() -> Option<usize> {
    let cores: std::ffi::c_int =
        sysctl(c"hw.perflevel0.physicalcpu").or_else(|| sysctl(c"hw.physicalcpu"))?;
    usize::try_from(cores).ok().filter(|&cores| cores > 0)
}

/// The bytes of memory that this machine has, if the system tells.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn physical_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The bytes of memory that this machine has, if the system tells.
#[cfg(any(target_os = "macos", target_os = "ios"))]
pub(crate) fn physical_memory() -> Option<u64> {
    sysctl(c"hw.memsize")
}

/// Nobody is asked here.
#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "macos", target_os = "ios")))]
pub(crate) fn physical_memory() -> Option<u64> {
    None
}

/// A number that the kernel states under `name`; none if there is no such name, or it is of another size than `T`.
#[cfg(any(target_os = "macos", target_os = "ios"))]
fn sysctl<T: bytemuck::Pod>(name: &std::ffi::CStr) -> Option<T> {
    use std::ffi::{c_char, c_int, c_void};
    unsafe extern "C" {
        fn sysctlbyname(
            name: *const c_char,
            old: *mut c_void,
            old_len: *mut usize,
            new: *mut c_void,
            new_len: usize,
        ) -> c_int;
    }
    let (mut value, mut len) = (T::zeroed(), size_of::<T>());
    // SAFETY: the value goes to `value`, whose size `len` says and for which any bytes are valid; nothing is set.
    let status = unsafe {
        sysctlbyname(name.as_ptr(), (&raw mut value).cast(), &raw mut len, std::ptr::null_mut(), 0)
    };
    (status == 0 && len == size_of::<T>()).then_some(value)
}

/// Nobody is asked here.
#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "macos", target_os = "ios")))]
fn fast_cores() -> Option<usize> {
    None
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

#[cfg(all(test, any(target_os = "linux", target_os = "android")))]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_may_only_be_written_to_is_not_synced() {
        assert!(sync_opened(Err(io::ErrorKind::PermissionDenied.into())).is_ok());
        assert!(sync_opened(Err(io::ErrorKind::NotFound.into())).is_err());
    }

    /// A folder with the files of logical cores: their siblings, and capacities where those are not 0.
    fn machine(cores: &[(&str, u64)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (cpu, (siblings, capacity)) in cores.iter().enumerate() {
            let cpu = folder.path().join(format!("system/cpu/cpu{cpu}"));
            std::fs::create_dir_all(cpu.join("topology")).unwrap();
            std::fs::write(cpu.join("topology/thread_siblings_list"), format!("{siblings}\n")).unwrap();
            if *capacity > 0 {
                std::fs::write(cpu.join("cpu_capacity"), format!("{capacity}\n")).unwrap();
            }
        }
        folder
    }

    #[test]
    fn logical_cores_of_one_physical_core_count_once() {
        let machine = machine(&[("0,2", 0), ("1,3", 0), ("0,2", 0), ("1,3", 0)]);
        assert_eq!(fast_cores_among(&[0, 1, 2, 3], machine.path()), 2);
        assert_eq!(fast_cores_among(&[0, 2], machine.path()), 1);
        assert_eq!(fast_cores_among(&[1, 2], machine.path()), 2);
    }

    #[test]
    fn slow_cores_do_not_count_beside_fast_ones() {
        let machine = machine(&[("0", 446), ("1", 446), ("2", 871), ("3", 1024)]);
        assert_eq!(fast_cores_among(&[0, 1, 2, 3], machine.path()), 2);
        assert_eq!(fast_cores_among(&[0, 1, 2], machine.path()), 3);
        assert_eq!(fast_cores_among(&[0, 1], machine.path()), 2);
    }

    #[test]
    fn efficient_cores_do_not_count_beside_performance_cores() {
        let machine = machine(&[("0-1", 0), ("0-1", 0), ("2-3", 0), ("2-3", 0), ("4", 0), ("5", 0)]);
        assert_eq!(fast_cores_among(&[0, 1, 2, 3, 4, 5], machine.path()), 4);
        std::fs::create_dir(machine.path().join("cpu_core")).unwrap();
        std::fs::write(machine.path().join("cpu_core/cpus"), "0-3\n").unwrap();
        assert_eq!(fast_cores_among(&[0, 1, 2, 3, 4, 5], machine.path()), 2);
        assert_eq!(fast_cores_among(&[4, 5], machine.path()), 2);
    }

    #[test]
    fn what_the_kernel_does_not_tell_counts() {
        let machine = tempfile::tempdir().unwrap();
        assert_eq!(fast_cores_among(&[0, 1, 5], machine.path()), 3);
    }

    #[test]
    fn lists_of_cpus() {
        assert_eq!(cpu_list("0-3,8,10-11"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(cpu_list("7"), Some(vec![7]));
        assert_eq!(cpu_list(""), None);
        assert_eq!(cpu_list("0-x"), None);
    }
}
