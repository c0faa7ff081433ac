//! A `.mrt` file, opened: its prologue validated, its weight arena mapped or read.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mrt_format::{
    CHUNK_BYTES, Digest, FormatError, GENERATION, GenerationDefaults, HEADER_BYTES, Prologue, Qwen2Config,
    TENSOR_TABLE, prologue_bytes,
};

use crate::arena::{ALIGNMENT, Arena, HUGE_PAGE};
use crate::error::Error;
use crate::platform::{Mapping, read_some};
use crate::pool::{Chunks, Pool};
use crate::prefault;
use crate::weights::Qwen2Weights;

/// Where the weights live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// In the page cache: the file is mapped, which takes microseconds and no memory of the process's own.
    ///
    /// Nobody may write to the file or truncate it as long as the model is open (replacing it by renaming another
    /// one over it is fine): a truncated mapping ends the process. Where that cannot be relied on, use `Read`.
    ///
    /// A file inside another one whose weights do not begin at a multiple of 64 bytes there cannot be used in
    /// place; it is read.
    #[default]
    Map,
    /// In memory of the process's own, in huge pages where the system has them: read in parallel when the model is
    /// opened. The file is not needed afterwards, except by [`Model::section`] and [`Model::verify`].
    Read,
}

/// When mapped weights are brought into memory. Their file's pages may be on disk only; and where they are in memory,
/// each has to be made known to the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prefault {
    /// By their first use.
    #[default]
    OnUse,
    /// By a thread that opening starts, as far as they are not in the page cache, in the order in which a forward pass
    /// uses them: for whoever generates at once. They are read at the disk's rate while the first pass computes. The
    /// thread ends when it is done, or with the model.
    Background,
    /// By the pool, before opening returns: no later use waits for the disk, as long as the system keeps the pages.
    AtOpen,
}

/// What is checked when a model is opened.
///
/// There is no check on first use: the weights are used by plain loads from memory, all of them for the first token, so
/// that it would be a full check with a worse moment, and a check in the background would find damage after wrong
/// tokens have been given out. Whoever wants that calls [`Model::verify`] when there is time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Header, directory, chunk table and tensor table; microseconds. A section is checked when it is used.
    #[default]
    Header,
    /// Every byte, see [`Model::verify`].
    Full,
}

/// How a model is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// Where the weights live.
    pub backing: Backing,
    /// When mapped weights are brought into memory.
    pub prefault: Prefault,
    /// Whether the weights are locked in memory, so that the system cannot take their pages back. Most systems allow it
    /// for a few MiB only, unless told otherwise.
    pub lock: bool,
    /// What is checked.
    pub verify: Verify,
    /// The root digest that the file must have, if it is known from elsewhere.
    pub expected_root: Option<Digest>,
}

/// An opened `.mrt` file.
pub struct Model {
    /// For messages.
    path: PathBuf,
    source: Source,
    prologue: Prologue,
    /// All that comes before the arena, if that is mapped: the sections are used in place then.
    front: Option<Mapping>,
    arena: WeightArena,
}

/// The file's bytes.
enum Source {
    /// A file, or a part of it that begins at `offset`.
    File {
        file: File,
        offset: u64,
    },
    Memory(&'static [u8]),
}

enum WeightArena {
    Mapped {
        mapping: Arc<Mapping>,
        /// Stopped when the model is dropped.
        _background: Option<prefault::Background>,
    },
    Read(Arena),
    Static(&'static [u8]),
}

impl Model {
    /// Opens the file at `path`. The pool is used by [`Backing::Read`], [`Prefault::AtOpen`] and [`Verify::Full`].
    ///
    /// # Errors
    /// When the file cannot be read, breaks a rule of the format, is damaged where it is checked, has not the expected
    /// root, or when the memory cannot be had.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions, pool: &mut Pool) -> Result<Self, Error> {
        let path = path.as_ref();
        let io_error = |source| Error::Io { path: path.into(), source };
        // Opening a pipe would wait for its writer, so the kind of file is looked at first.
        if !std::fs::metadata(path).map_err(io_error)?.is_file() {
            return Err(not_a_file(path));
        }
        let file = File::open(path).map_err(io_error)?;
        let bytes = file.metadata().map_err(io_error)?.len();
        Self::open_within(file, 0, bytes, path, options, pool)
    }

    /// Opens the `bytes` bytes of `file` from `offset`, for example an uncompressed asset of an Android package.
    /// `path` is for messages.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_within(
        file: File,
        offset: u64,
        bytes: u64,
        path: &Path,
        options: &OpenOptions,
        pool: &mut Pool,
    ) -> Result<Self, Error> {
        let metadata = file.metadata().map_err(|source| Error::Io { path: path.into(), source })?;
        if !metadata.is_file() {
            return Err(not_a_file(path));
        }
        let source = Source::File { file, offset };
        let prologue = read_prologue(&source, bytes, options, path)?;
        let front = map_front(&source, &prologue, options.backing, path)?;
        let arena = open_arena(&source, &prologue, options, path, pool)?;
        // Where the weights had to be read, nothing stays mapped.
        let front = front.filter(|_| matches!(arena, WeightArena::Mapped { .. }));
        Self { path: path.into(), source, prologue, front, arena }.checked(options, pool)
    }

    /// Opens a model that is linked into the program; the weights are used in place.
    ///
    /// # Errors
    /// As [`open`](Self::open); and when `bytes` does not begin at a multiple of 64 bytes.
    pub fn from_static(bytes: &'static [u8], options: &OpenOptions, pool: &mut Pool) -> Result<Self, Error> {
        let address = bytes.as_ptr().addr();
        if !address.is_multiple_of(ALIGNMENT) {
            return Err(Error::Unaligned { address });
        }
        let path = PathBuf::from("(model in memory)");
        let source = Source::Memory(bytes);
        let prologue = read_prologue(&source, bytes.len() as u64, options, &path)?;
        let arena = WeightArena::Static(&bytes[prologue.arena_offset() as usize..]);
        Self { path, source, prologue, front: None, arena }.checked(options, pool)
    }

    /// The last steps of opening.
    fn checked(self, options: &OpenOptions, pool: &mut Pool) -> Result<Self, Error> {
        let table = self.section_content(TENSOR_TABLE)?.unwrap_or_default();
        self.prologue.check_tensor_table(&table).map_err(|problem| self.invalid(problem))?;
        Qwen2Weights::from_arena(self.config(), self.arena())?;
        if options.lock {
            self.lock().map_err(|source| Error::Io { path: self.path.clone(), source })?;
        }
        if options.verify == Verify::Full {
            self.verify(pool)?;
        }
        Ok(self)
    }

    /// The model's config.
    pub fn config(&self) -> &Qwen2Config {
        self.prologue.config()
    }

    /// The root digest, which names the content of the whole file.
    pub fn root(&self) -> &Digest {
        self.prologue.root()
    }

    /// Header, directory and chunk table.
    pub fn prologue(&self) -> &Prologue {
        &self.prologue
    }

    /// The weights.
    pub fn weights(&self) -> Qwen2Weights<'_> {
        Qwen2Weights::from_arena(self.config(), self.arena()).expect("opening has checked the arena")
    }

    /// The weight arena.
    pub fn arena(&self) -> &[u8] {
        match &self.arena {
            WeightArena::Mapped { mapping, .. } => mapping.bytes(),
            WeightArena::Read(arena) => arena.bytes(),
            WeightArena::Static(bytes) => bytes,
        }
    }

    /// Where the weights live, which may be `Read` although `Map` was asked for; `None` for a static slice.
    pub fn backing(&self) -> Option<Backing> {
        match self.arena {
            WeightArena::Mapped { .. } => Some(Backing::Map),
            WeightArena::Read(_) => Some(Backing::Read),
            WeightArena::Static(_) => None,
        }
    }

    /// Whether the arena begins at a multiple of 2 MiB in memory, without which the system cannot use huge pages.
    pub fn is_huge_page_aligned(&self) -> bool {
        self.arena().as_ptr().addr().is_multiple_of(HUGE_PAGE)
    }

    /// The content of section `name`, after its digest was checked; `None` when the file has no such section. It is
    /// used in place if the weights are.
    ///
    /// # Errors
    /// When it cannot be read or is damaged.
    pub fn section(&self, name: &str) -> Result<Option<Cow<'_, [u8]>>, Error> {
        let content = self.section_content(name)?;
        if let Some(content) = &content {
            self.prologue.check_section(name, content).map_err(|problem| self.invalid(problem))?;
        }
        Ok(content)
    }

    /// The model's sampling defaults and stop tokens; those of [`GenerationDefaults::default`] when the file has none.
    ///
    /// # Errors
    /// When the section cannot be read or is damaged.
    pub fn generation(&self) -> Result<GenerationDefaults, Error> {
        let Some(content) = self.section(GENERATION)? else { return Ok(GenerationDefaults::default()) };
        GenerationDefaults::from_bytes(self.config(), &content).map_err(|problem| self.invalid(problem))
    }

    /// Checks all that opening has not: the digest of every section, that the padding is zero, and the digest of every
    /// chunk of the arena, from the very bytes that [`weights`](Self::weights) gives out.
    ///
    /// # Errors
    /// [`Error::Damaged`] with every place that is wrong, or the first piece that cannot be read.
    pub fn verify(&self, pool: &mut Pool) -> Result<(), Error> {
        let mut problems = Vec::new();
        for section in self.prologue.sections() {
            let content = self.read(section.offset, section.bytes)?;
            problems.extend(self.prologue.check_section(&section.name, &content).err());
        }
        for (offset, bytes) in self.prologue.padding() {
            let padding = self.read(offset, bytes)?;
            problems.extend(self.prologue.check_padding(offset, &padding).err());
        }
        let mut chunks = vec![None; self.prologue.chunk_count()];
        let arena = self.arena();
        pool.run_split(Chunks::new(&mut chunks, 1), |_, i, problem| {
            let chunk = self.prologue.chunk(i);
            let bytes = &arena[chunk.offset as usize..][..chunk.bytes as usize];
            problem[0] = self.prologue.check_chunk(i, bytes).err();
        });
        problems.extend(chunks.into_iter().flatten());
        match problems.as_slice() {
            [] => Ok(()),
            _ => Err(Error::Damaged { path: self.path.clone(), problems }),
        }
    }

    fn lock(&self) -> io::Result<()> {
        let locked = match &self.arena {
            WeightArena::Mapped { mapping, .. } => mapping.lock(),
            WeightArena::Read(arena) => arena.lock(),
            WeightArena::Static(_) => Err(io::ErrorKind::Unsupported.into()),
        };
        let bytes = self.arena().len();
        locked.map_err(|e| io::Error::new(e.kind(), format!("cannot lock {bytes} bytes in memory: {e}")))
    }

    fn section_content(&self, name: &str) -> Result<Option<Cow<'_, [u8]>>, Error> {
        let Some(section) = self.prologue.section(name) else { return Ok(None) };
        let range = || section.offset as usize..(section.offset + section.bytes) as usize;
        Ok(Some(match (&self.source, &self.front) {
            (Source::Memory(bytes), _) => Cow::Borrowed(&bytes[range()]),
            (_, Some(front)) => Cow::Borrowed(&front.bytes()[range()]),
            _ => Cow::Owned(self.read(section.offset, section.bytes)?),
        }))
    }

    fn read(&self, offset: u64, bytes: u64) -> Result<Vec<u8>, Error> {
        let mut content = vec![0; bytes as usize];
        self.source
            .read(offset, &mut content)
            .map_err(|source| Error::Io { path: self.path.clone(), source })?;
        Ok(content)
    }

    fn invalid(&self, problem: FormatError) -> Error {
        Error::Format { path: self.path.clone(), problem }
    }
}

fn not_a_file(path: &Path) -> Error {
    Error::Io { path: path.into(), source: io::Error::other("not a regular file") }
}

impl Source {
    /// Reads from byte `offset` of the model without moving the file's position, which others may share.
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        match self {
            Source::File { file, offset: start } => read_at(file, start + offset, out),
            Source::Memory(bytes) => {
                out.copy_from_slice(&bytes[offset as usize..][..out.len()]);
                Ok(())
            }
        }
    }
}

/// Fills `out` with the bytes from `offset`, without moving the file's position.
pub(crate) fn read_at(file: &File, mut offset: u64, mut out: &mut [u8]) -> io::Result<()> {
    while !out.is_empty() {
        match read_some(file, offset, out) {
            Ok(0) => {
                let reason = format!("there is no byte {offset}: the file is shorter than it should be");
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
            }
            Ok(n) => (offset, out) = (offset + n as u64, &mut out[n..]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads and validates the prologue of a model of `bytes` bytes.
fn read_prologue(source: &Source, bytes: u64, options: &OpenOptions, path: &Path) -> Result<Prologue, Error> {
    let io_error = |source| Error::Io { path: path.into(), source };
    let invalid = |problem| Error::Format { path: path.into(), problem };
    let mut prologue = vec![0; bytes.min(HEADER_BYTES as u64) as usize];
    source.read(0, &mut prologue).map_err(io_error)?;
    // The header is kept as it was read: in a file that changes it might be another one the next time.
    let first = prologue.len();
    prologue.resize(prologue_bytes(&prologue, bytes).map_err(invalid)?, 0);
    source.read(first as u64, &mut prologue[first..]).map_err(io_error)?;
    Prologue::parse_pinned(&prologue, bytes, options.expected_root.as_ref()).map_err(invalid)
}

/// Maps all that comes before the arena of a model in a file.
fn map_front(
    source: &Source,
    prologue: &Prologue,
    backing: Backing,
    path: &Path,
) -> Result<Option<Mapping>, Error> {
    let (Source::File { file, offset }, Backing::Map) = (source, backing) else { return Ok(None) };
    let io_error = |source| Error::Io { path: path.into(), source };
    Mapping::new(file, *offset, prologue.arena_offset() as usize).map(Some).map_err(io_error)
}

/// Maps the arena of a model in a file, or reads it.
fn open_arena(
    source: &Source,
    prologue: &Prologue,
    options: &OpenOptions,
    path: &Path,
    pool: &mut Pool,
) -> Result<WeightArena, Error> {
    let io_error = |source| Error::Io { path: path.into(), source };
    let (start, bytes) = (prologue.arena_offset(), prologue.layout().arena_bytes);
    if let (Source::File { file, offset }, Backing::Map) = (source, options.backing)
        && (offset + start).is_multiple_of(ALIGNMENT as u64)
    {
        let too_large = |_| io::Error::other(format!("{bytes} bytes of weights, too many for this machine"));
        let len = usize::try_from(bytes).map_err(too_large).map_err(io_error)?;
        let mapping = Mapping::new(file, offset + start, len).map_err(io_error)?;
        // Reading behind the file's end ends the process, so its length is looked at again after mapping.
        let (actual, expected) = (file.metadata().map_err(io_error)?.len(), offset + prologue.file_bytes());
        if actual < expected {
            let problem = FormatError::Truncated { actual, expected };
            return Err(Error::Format { path: path.into(), problem });
        }
        return prefault_mapping(mapping, file, offset + start, prologue, options.prefault, pool)
            .map_err(io_error);
    }
    let mut arena = Arena::new(bytes)?;
    let mut results: Vec<_> = (0..prologue.chunk_count()).map(|_| Ok(())).collect();
    let split = (Chunks::new(arena.bytes_mut(), CHUNK_BYTES as usize), Chunks::new(&mut results, 1));
    pool.run_split(split, |_, i, (chunk, result)| {
        result[0] = source.read(start + prologue.chunk(i).offset, chunk);
    });
    results.into_iter().collect::<io::Result<()>>().map_err(io_error)?;
    Ok(WeightArena::Read(arena))
}

/// A mapped arena, brought into memory as asked: all that a forward pass reads. An embedding table of its own is not of
/// that: a few columns of it are used, wherever they are.
fn prefault_mapping(
    mapping: Mapping,
    file: &File,
    offset: u64,
    prologue: &Prologue,
    when: Prefault,
    pool: &mut Pool,
) -> io::Result<WeightArena> {
    let start = prologue.layout().layer0.attn_norm.offset as usize;
    let range = start..mapping.bytes().len();
    let mapping = Arc::new(mapping);
    let mut background = None;
    match when {
        Prefault::OnUse => {}
        Prefault::Background => {
            let (mapping, file) = (Arc::clone(&mapping), file.try_clone()?);
            background = Some(prefault::Background::start(mapping, file, offset, range));
        }
        Prefault::AtOpen => {
            let pieces: Vec<_> = prefault::pieces(range).collect();
            pool.run(pieces.len(), |_, i| mapping.populate(pieces[i].clone()));
        }
    }
    Ok(WeightArena::Mapped { mapping, _background: background })
}

/// The bytes of a `.mrt` file that is linked into the program, aligned as [`Model::from_static`] wants them. The path is
/// that of `include_bytes!`.
///
/// ```ignore
/// static MODEL: &[u8] = mruntime::include_model!("../model.mrt");
/// let model = Model::from_static(MODEL, &OpenOptions::default(), &mut pool)?;
/// ```
#[macro_export]
macro_rules! include_model {
    ($path:expr) => {{
        #[repr(C, align(64))]
        struct Aligned<T: ?Sized>(T);
        static MODEL: &Aligned<[u8]> = &Aligned(*include_bytes!($path));
        &MODEL.0
    }};
}

#[cfg(test)]
mod tests {
    use super::*;
    use mrt_format::{NewSection, plan_file, qwen2_weights_layout, sha256};
    use std::io::Write;

    const CFG: Qwen2Config = Qwen2Config {
        hidden_size: 64,
        intermediate_size: 96,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        vocab_size: 100_000,
        max_position_embeddings: 128,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        tie_word_embeddings: true,
    };

    /// A file of four chunks with numbers in place of weights, and the offset of its arena.
    fn model_bytes() -> (Vec<u8>, usize) {
        let numbers = (0..qwen2_weights_layout(&CFG).arena_bytes / 4).map(|i| i as u32);
        let arena: Vec<u8> = numbers.flat_map(u32::to_le_bytes).collect();
        let contents: [&[u8]; 2] = [b"{}", b"No rights reserved"];
        let sections = ["config.json", "LICENSE"].into_iter().zip(contents);
        let sections: Vec<_> =
            sections.map(|(name, content)| NewSection { name, bytes: content.len() as u64 }).collect();
        let digests: Vec<_> = arena.chunks(CHUNK_BYTES as usize).map(sha256).collect();
        assert_eq!(digests.len(), 4);
        let (mut file, _) = plan_file(&CFG, &sections).unwrap().head(&contents, &digests);
        let start = file.len();
        file.extend_from_slice(&arena);
        (file, start)
    }

    fn file_of(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn all_options() -> [OpenOptions; 4] {
        let option = |backing, verify| OpenOptions { backing, verify, ..OpenOptions::default() };
        [
            option(Backing::Map, Verify::Header),
            option(Backing::Map, Verify::Full),
            option(Backing::Read, Verify::Header),
            option(Backing::Read, Verify::Full),
        ]
    }

    /// The error of opening `bytes` as a file, without the file's name.
    fn error_of(bytes: &[u8], options: &OpenOptions) -> String {
        let file = file_of(bytes);
        let mut pool = Pool::new(2).unwrap();
        let error = Model::open(&file, options, &mut pool).err().expect("an error").to_string();
        let path = format!("{}: ", file.path().display());
        error.strip_prefix(&path).unwrap_or_else(|| panic!("{error}")).to_owned()
    }

    #[test]
    fn every_way_gives_the_files_bytes() {
        let (bytes, start) = model_bytes();
        let file = file_of(&bytes);
        for threads in [1, 3] {
            let mut pool = Pool::new(threads).unwrap();
            for options in all_options() {
                let model = Model::open(&file, &options, &mut pool).unwrap();
                assert_eq!(model.config(), &CFG);
                assert_eq!(model.backing(), Some(options.backing));
                assert!(model.arena() == &bytes[start..]);
                assert_eq!(*model.section("LICENSE").unwrap().unwrap(), *b"No rights reserved");
                assert_eq!(model.section("README").unwrap(), None);
                assert_eq!(model.generation().unwrap(), GenerationDefaults::default());
                assert_eq!(model.weights().final_norm().len(), 64);
                model.verify(&mut pool).unwrap();
                let again = OpenOptions { expected_root: Some(*model.root()), ..options };
                assert!(Model::open(&file, &again, &mut pool).is_ok());
            }
        }
    }

    #[test]
    fn a_file_inside_another_one() {
        let (bytes, start) = model_bytes();
        let mut pool = Pool::new(2).unwrap();
        // In place where FP16 vectors can be loaded from, whatever the page; else read.
        for (offset, in_place) in [(0, true), (64, true), (4096 + 192, true), (1, false), (4096 + 32, false)]
        {
            let outer = [vec![7; offset], bytes.clone(), vec![8; 100]].concat();
            let file = file_of(&outer);
            for options in all_options() {
                let outer = file.reopen().unwrap();
                let (at, len) = (offset as u64, bytes.len() as u64);
                let model = Model::open_within(outer, at, len, file.path(), &options, &mut pool).unwrap();
                let expected = if in_place { options.backing } else { Backing::Read };
                assert_eq!(model.backing(), Some(expected), "{offset}");
                assert!(model.arena() == &bytes[start..]);
                model.verify(&mut pool).unwrap();
                let section = model.section("LICENSE").unwrap();
                assert_eq!(matches!(section, Some(Cow::Borrowed(_))), expected == Backing::Map, "{offset}");
            }
        }
    }

    #[test]
    fn a_slice_is_used_in_place() {
        let (bytes, start) = model_bytes();
        let mut pool = Pool::new(2).unwrap();
        let memory = Vec::leak(vec![0; bytes.len() + 64]);
        let aligned = memory.as_ptr().addr().next_multiple_of(64) - memory.as_ptr().addr();
        memory[aligned..][..bytes.len()].copy_from_slice(&bytes);
        let memory: &'static [u8] = memory;
        let options = OpenOptions { verify: Verify::Full, ..OpenOptions::default() };
        let model = Model::from_static(&memory[aligned..][..bytes.len()], &options, &mut pool).unwrap();
        assert_eq!(model.arena().as_ptr(), memory[aligned + start..].as_ptr());
        assert_eq!(model.backing(), None);
        assert_eq!(*model.section("config.json").unwrap().unwrap(), *b"{}");

        let error =
            Model::from_static(&memory[aligned + 2..], &options, &mut pool).err().unwrap().to_string();
        let address = memory.as_ptr().addr() + aligned + 2;
        assert_eq!(error, format!("the model begins at address {address:#x}; align its bytes to 64"));
        let empty = Model::from_static(&memory[aligned..aligned], &options, &mut pool).err().unwrap();
        assert!(empty.to_string().starts_with("(model in memory): not a .mrt file"), "{empty}");
    }

    #[test]
    fn what_is_linked_in_is_aligned() {
        static BYTES: &[u8] = include_model!("model.rs");
        assert!(BYTES.as_ptr().addr().is_multiple_of(ALIGNMENT));
        assert!(BYTES == include_bytes!("model.rs"));
    }

    #[test]
    fn weights_are_locked_or_opening_fails() {
        let (bytes, start) = model_bytes();
        let file = file_of(&bytes);
        let mut pool = Pool::new(1).unwrap();
        for backing in [Backing::Map, Backing::Read] {
            let options = OpenOptions { backing, lock: true, ..OpenOptions::default() };
            match Model::open(&file, &options, &mut pool) {
                Ok(model) => assert!(model.arena() == &bytes[start..]),
                Err(error) => assert!(error.to_string().contains("cannot lock"), "{error}"),
            }
        }
    }

    #[test]
    #[cfg(unix)]
    fn a_file_that_is_replaced_by_renaming_keeps_working() {
        let (bytes, start) = model_bytes();
        let dir = tempfile::tempdir().unwrap();
        let (path, new) = (dir.path().join("model.mrt"), dir.path().join("new"));
        std::fs::write(&path, &bytes).unwrap();
        let mut pool = Pool::new(2).unwrap();
        let model = Model::open(&path, &OpenOptions::default(), &mut pool).unwrap();
        std::fs::write(&new, b"another file").unwrap();
        std::fs::rename(&new, &path).unwrap();
        assert!(model.arena() == &bytes[start..]);
        assert_eq!(model.section("LICENSE").unwrap().unwrap().as_ref(), b"No rights reserved");
        model.verify(&mut pool).unwrap();
    }

    #[test]
    fn damage_is_found_and_named() {
        let (good, start) = model_bytes();
        let chunk = CHUNK_BYTES as usize;
        let mut bad = good.clone();
        for i in [5, chunk - 1, chunk + 9, good.len() - start - 1] {
            bad[start + i] ^= 1;
        }
        bad[start - 1] = 1;
        let license = good.windows(9).position(|text| text == b"No rights").unwrap();
        bad[license] ^= 1;
        let expected = format!(
            "damaged: section LICENSE (bytes {license} to {}), padding (byte {}), chunks 0 to 1 (bytes {start} to {}), \
             chunk 3 (bytes {} to {}); get the file again",
            license + 18,
            start - 1,
            start + 2 * chunk,
            start + 3 * chunk,
            good.len()
        );
        for options in all_options() {
            if options.verify == Verify::Full {
                assert_eq!(error_of(&bad, &options), expected);
                continue;
            }
            let file = file_of(&bad);
            let model = Model::open(&file, &options, &mut Pool::new(1).unwrap()).unwrap();
            assert!(model.section("config.json").is_ok());
            let error = model.section("LICENSE").unwrap_err().to_string();
            assert!(error.contains("section LICENSE is damaged"), "{error}");
        }
    }

    #[test]
    fn a_damaged_head_or_length_is_refused_at_once() {
        let (good, _) = model_bytes();
        let changed = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 1;
            bytes
        };
        let table = good.windows(4).rposition(|name| name == b"lm_h").unwrap();
        let longer = [good.as_slice(), &[0]].concat();
        for options in all_options() {
            let starts_with = |bytes: &[u8], expected: &str| {
                let error = error_of(bytes, &options);
                assert!(error.starts_with(expected), "{error}");
            };
            starts_with(&changed(0), "not a .mrt file: it begins with");
            starts_with(&changed(80), "header, directory or chunk table is damaged");
            starts_with(&changed(600), "header, directory or chunk table is damaged");
            starts_with(&changed(table), "section tensor_table is damaged");
            starts_with(&good[..good.len() - 1], "truncated: ");
            starts_with(&good[..100], "truncated: ");
            starts_with(&[], "not a .mrt file");
            starts_with(&longer, "the file has ");
            let other = OpenOptions { expected_root: Some(sha256(b"")), ..options };
            assert!(error_of(&good, &other).starts_with("another file than expected: its root digest is "));
        }
    }

    /// KiB of the mapping that begins at `bytes` that this process has pages of.
    // Emulated by qemu-user, which 64-bit Arm is tested with, /proc/self/smaps does not tell.
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    fn resident_kib(bytes: &[u8]) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let begin = format!("{:x}-", bytes.as_ptr().addr());
        let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&begin));
        let rss = lines.find_map(|line| line.strip_prefix("Rss:")?.trim().strip_suffix(" kB")).unwrap();
        rss.parse().unwrap()
    }

    #[test]
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    fn weights_are_brought_in_when_asked() {
        let (bytes, start) = model_bytes();
        let file = file_of(&bytes);
        let kib = ((bytes.len() - start) as u64).div_ceil(4096) * 4;
        let mut pool = Pool::new(2).unwrap();
        let mut open = |prefault| {
            let options = OpenOptions { prefault, ..OpenOptions::default() };
            Model::open(&file, &options, &mut pool).unwrap()
        };
        assert_eq!(resident_kib(open(Prefault::OnUse).arena()), 0);
        assert_eq!(resident_kib(open(Prefault::AtOpen).arena()), kib);
        // What is in the page cache is left to be mapped by its use.
        let model = open(Prefault::Background);
        assert!(model.arena() == &bytes[start..]);
        drop(open(Prefault::Background));
    }

    #[test]
    fn an_outer_file_that_ends_early_is_not_mapped() {
        let (bytes, _) = model_bytes();
        let file = file_of(&bytes[..bytes.len() - 5]);
        let mut pool = Pool::new(2).unwrap();
        for options in all_options() {
            let outer = file.reopen().unwrap();
            let opened = Model::open_within(outer, 0, bytes.len() as u64, file.path(), &options, &mut pool);
            let error = opened.err().unwrap().to_string();
            let expected = match options.backing {
                Backing::Map => format!("truncated: {} of {} bytes", bytes.len() - 5, bytes.len()),
                Backing::Read => format!("there is no byte {}", bytes.len() - 5),
            };
            assert!(error.contains(&expected), "{error}");
        }
    }

    #[test]
    fn what_is_not_a_file_is_refused_by_name() {
        let mut pool = Pool::new(1).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut error =
            |path: &Path| Model::open(path, &OpenOptions::default(), &mut pool).err().unwrap().to_string();
        assert_eq!(error(dir.path()), format!("{}: not a regular file", dir.path().display()));
        let missing = dir.path().join("missing.mrt");
        assert!(error(&missing).starts_with(&format!("{}: ", missing.display())));
        #[cfg(unix)]
        {
            let pipe = File::from(std::os::fd::OwnedFd::from(io::pipe().unwrap().0));
            let (path, options) = (Path::new("(pipe)"), OpenOptions::default());
            let error = Model::open_within(pipe, 0, 0, path, &options, &mut pool).err().unwrap();
            assert_eq!(error.to_string(), "(pipe): not a regular file");
        }
    }
}
