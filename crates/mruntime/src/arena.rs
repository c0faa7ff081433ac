//! Memory for weights, KV cache and scratch: allocated once, cut up once, never grown.

use std::io;

use crate::error::Error;
use crate::platform::{advise_huge_pages, lock_anonymous};
use bytemuck::Pod;
use memmap2::{MmapMut, MmapOptions};

/// The size of a huge page on x86-64 and (with 4 KiB base pages) on Arm64: arenas begin at a multiple of it, so that
/// the system can back them with huge pages, which are read a third faster than small ones.
pub const HUGE_PAGE: usize = 2 << 20;

/// Slices in an arena begin at a multiple of a cache line.
pub const ALIGNMENT: usize = 64;

/// The bytes that a slice of `len` elements takes up in an arena, padding included. Sums of these are what
/// [`Bump::alloc`] needs, to the byte. An impossible size is `u64::MAX`, which no arena has.
pub const fn aligned_bytes<T>(len: usize) -> u64 {
    let bytes = (len as u64).saturating_mul(size_of::<T>() as u64);
    match bytes.checked_next_multiple_of(ALIGNMENT as u64) {
        Some(bytes) => bytes,
        None => u64::MAX,
    }
}

/// One anonymous, zeroed allocation that begins at a multiple of [`HUGE_PAGE`]. Pages that are never touched take no
/// memory.
pub struct Arena {
    map: MmapMut,
    start: usize,
    len: usize,
}

impl Arena {
    /// Allocates `bytes` bytes of zeros, in huge pages where the system has them: for what will be used as a whole, or from its
    /// beginning on.
    ///
    /// # Errors
    /// When the system refuses them.
    pub fn new(bytes: u64) -> Result<Self, Error> {
        let arena = Self::map(bytes)?;
        advise_huge_pages(&arena.map, arena.start, arena.len, true);
        Ok(arena)
    }

    /// Allocates `bytes` bytes of zeros in small pages: for what is used here and there at first. Of a KV cache, the
    /// first tokens touch a few KiB in each layer; with huge pages, the system would have to zero 2 MiB for each.
    ///
    /// # Errors
    /// When the system refuses them.
    pub fn sparse(bytes: u64) -> Result<Self, Error> {
        let arena = Self::map(bytes)?;
        advise_huge_pages(&arena.map, arena.start, arena.len, false);
        Ok(arena)
    }

    /// Locks the arena in memory.
    pub(crate) fn lock(&self) -> io::Result<()> {
        lock_anonymous(&self.map)
    }

    fn map(bytes: u64) -> Result<Self, Error> {
        let refused = |reason: String| Error::Memory { bytes, reason };
        let len = usize::try_from(bytes).map_err(|_| refused("more than this machine can address".into()))?;
        let with_room = len.checked_add(HUGE_PAGE).filter(|&n| isize::try_from(n).is_ok());
        let with_room = with_room.ok_or_else(|| refused("more than this machine can address".into()))?;
        let map = MmapOptions::new().len(with_room).map_anon().map_err(|error| refused(error.to_string()))?;
        let start = map.as_ptr().addr().next_multiple_of(HUGE_PAGE) - map.as_ptr().addr();
        Ok(Self { map, start, len })
    }

    /// The arena's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map[self.start..self.start + self.len]
    }

    /// The arena's bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.start..self.start + self.len]
    }

    /// Cuts the arena up from its beginning. What an earlier use has written is still there.
    pub fn bump(&mut self) -> Bump<'_> {
        Bump { free: self.bytes_mut() }
    }
}

/// The part of an arena that is not cut up yet.
pub struct Bump<'a> {
    free: &'a mut [u8],
}

impl<'a> Bump<'a> {
    /// Cuts off the next `len` elements, [`aligned_bytes`] bytes, at a multiple of [`ALIGNMENT`]. In a fresh arena
    /// they are zeros.
    ///
    /// # Errors
    /// When fewer bytes are left.
    pub fn alloc<T: Pod>(&mut self, len: usize) -> Result<&'a mut [T], Error> {
        const { assert!(align_of::<T>() <= ALIGNMENT) };
        let (wanted, left) = (aligned_bytes::<T>(len), self.free.len() as u64);
        if wanted > left {
            return Err(Error::ArenaFull { wanted, left });
        }
        let (piece, free) = std::mem::take(&mut self.free).split_at_mut(wanted as usize);
        self.free = free;
        Ok(bytemuck::cast_slice_mut(&mut piece[..len * size_of::<T>()]))
    }

    /// The bytes that are left.
    pub fn left(&self) -> u64 {
        self.free.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_zeroed_aligned_apart_and_as_large_as_computed() {
        let bytes = aligned_bytes::<f32>(5)
            + aligned_bytes::<u8>(1)
            + aligned_bytes::<u64>(0)
            + aligned_bytes::<u16>(32);
        assert_eq!(bytes, 64 + 64 + 64);
        let mut arena = Arena::new(bytes).unwrap();
        assert!(arena.bytes().as_ptr().addr().is_multiple_of(HUGE_PAGE));
        let mut bump = arena.bump();
        let a = bump.alloc::<f32>(5).unwrap();
        let b = bump.alloc::<u8>(1).unwrap();
        let c = bump.alloc::<u64>(0).unwrap();
        let d = bump.alloc::<u16>(32).unwrap();
        assert_eq!((bump.left(), c.len()), (0, 0));
        assert!(a.iter().all(|&x| x == 0.0) && b[0] == 0 && d.iter().all(|&x| x == 0));
        let starts = [a.as_ptr().addr(), b.as_ptr().addr(), d.as_ptr().addr()];
        assert_eq!(starts.map(|address| address % ALIGNMENT), [0, 0, 0]);
        a.fill(1.0);
        b.fill(2);
        d.fill(3);
        assert!(a.iter().all(|&x| x == 1.0) && b[0] == 2 && d.iter().all(|&x| x == 3));
        // A second use begins at the same place and finds what the first has left.
        assert_eq!(arena.bump().alloc::<f32>(5).unwrap(), [1.0; 5]);
    }

    #[test]
    fn a_full_arena_says_what_is_missing() {
        let mut arena = Arena::new(100).unwrap();
        let mut bump = arena.bump();
        bump.alloc::<f32>(16).unwrap();
        let error = bump.alloc::<f32>(1).unwrap_err();
        assert_eq!(error.to_string(), "the arena is too small: 64 bytes wanted, 36 left");
        assert_eq!(bump.left(), 36);
        assert!(bump.alloc::<u64>(usize::MAX).is_err());
    }

    #[test]
    fn impossible_sizes_are_refused_with_their_number() {
        for bytes in [u64::MAX, i64::MAX as u64, 1 << 60] {
            let error = Arena::new(bytes).err().unwrap().to_string();
            assert!(error.starts_with(&format!("cannot allocate {bytes} bytes of memory: ")), "{error}");
        }
        assert_eq!(aligned_bytes::<f32>(usize::MAX), u64::MAX);
        assert!(Arena::new(0).unwrap().bytes().is_empty());
        assert_eq!(Arena::sparse(3).unwrap().bytes(), [0; 3]);
    }
}
