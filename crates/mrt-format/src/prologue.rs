//! Reading a file: the numbered validation algorithm of `format-spec.md`.

use zerocopy::FromBytes;

use crate::config::{ARCHITECTURE_QWEN2, Qwen2Config};
use crate::digest::{Digest, Sha256, arena_digest, sha256};
use crate::error::FormatError;
use crate::fingerprint::LAYOUT_FINGERPRINT;
use crate::header::{
    ARENA_ALIGN, CHUNK_BYTES, CONFIG_FLAG_TIED, FORMAT_MAJOR, FORMAT_MINOR, HEADER_BYTES, MAGIC,
    MAX_PROLOGUE_BYTES, MAX_SECTION_BYTES, MAX_SECTIONS, ROOT_DIGEST_OFFSET, RawHeader, RawSection,
    SECTION_ALIGN, SECTION_FLAG_REQUIRED,
};
use crate::layout::{Qwen2Layout, Span, qwen2_weights_layout};
use crate::section::{KNOWN_SECTIONS, TENSOR_TABLE, check_tensor_table, fixed_section_bytes};

/// How many bytes from the start of the file [`Prologue::parse`] needs: header, directory and chunk table, at
/// most 64 MiB.
///
/// `first` holds the first 512 bytes of the file (all, if there are fewer), `actual_file_bytes` is the file's
/// length.
///
/// # Errors
/// The first failing step from 1 to 11.
pub fn prologue_bytes(first: &[u8], actual_file_bytes: u64) -> Result<usize, FormatError> {
    // Step 1
    if !first.starts_with(&MAGIC) {
        return Err(FormatError::BadMagic { found: first[..first.len().min(MAGIC.len())].to_vec() });
    }
    // Step 2
    let Ok((header, _)) = RawHeader::ref_from_prefix(first) else {
        return Err(FormatError::HeaderTruncated { actual: first.len() as u64 });
    };
    // Step 3
    let (major, minor) = (header.major.get(), header.minor.get());
    if major != FORMAT_MAJOR {
        return Err(FormatError::UnsupportedVersion { major, minor });
    }
    // Step 4
    let expected = header.file_bytes.get();
    if actual_file_bytes < expected {
        return Err(FormatError::Truncated { actual: actual_file_bytes, expected });
    }
    // Step 5
    if actual_file_bytes > expected {
        return Err(FormatError::Overlong { actual: actual_file_bytes, expected });
    }
    // Step 6
    if header.header_bytes != HEADER_BYTES as u32 {
        return Err(FormatError::BadHeaderBytes { found: header.header_bytes.get() });
    }
    // Step 7
    if header.required_features != 0 {
        return Err(FormatError::UnsupportedFeatures { bits: header.required_features.get() });
    }
    // Step 8
    if header.chunk_bytes != CHUNK_BYTES as u32 {
        return Err(FormatError::BadChunkBytes { found: header.chunk_bytes.get() });
    }
    // Step 9
    if header.section_count.get() as usize > MAX_SECTIONS {
        return Err(FormatError::TooManySections { found: header.section_count.get() });
    }
    // Step 10
    let (_, needed) = header.table_bounds();
    if needed > MAX_PROLOGUE_BYTES {
        return Err(FormatError::PrologueTooLarge { found: needed });
    }
    // Step 11
    if needed > actual_file_bytes {
        return Err(FormatError::PrologueOutsideFile { needed, actual: actual_file_bytes });
    }
    Ok(needed as usize)
}

/// A section of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Name, unique in the file: letters, digits, `_`, `-` and `.`, not beginning with a `.`; at most 32.
    pub name: String,
    /// Whether a reader that does not know the section must refuse the file.
    pub required: bool,
    /// First byte, counted from the start of the file.
    pub offset: u64,
    /// Length in bytes, at most 64 MiB.
    pub bytes: u64,
    /// SHA-256 of the content.
    pub sha256: Digest,
}

/// Header, directory and chunk table of a file, validated: every number in it may be relied on.
#[derive(Clone, Debug, PartialEq)]
pub struct Prologue {
    config: Qwen2Config,
    layout: Qwen2Layout,
    version: (u16, u16),
    root: Digest,
    sections: Vec<Section>,
    chunks: Vec<Digest>,
    prologue_bytes: u64,
    arena_offset: u64,
    file_bytes: u64,
}

impl Prologue {
    /// Validates the first [`prologue_bytes`] bytes of a file of `actual_file_bytes` bytes.
    ///
    /// # Errors
    /// The first failing step from 1 to 27, but for 13.
    pub fn parse(bytes: &[u8], actual_file_bytes: u64) -> Result<Prologue, FormatError> {
        Self::parse_pinned(bytes, actual_file_bytes, None)
    }

    /// As [`parse`](Self::parse), for a caller that knows the root digest from elsewhere: another file's fields are not
    /// looked at.
    ///
    /// # Errors
    /// The first failing step from 1 to 27.
    pub fn parse_pinned(
        bytes: &[u8],
        actual_file_bytes: u64,
        expected_root: Option<&Digest>,
    ) -> Result<Prologue, FormatError> {
        let needed = prologue_bytes(bytes, actual_file_bytes)?;
        let Some(bytes) = bytes.get(..needed) else {
            return Err(FormatError::PrologueOutsideFile {
                needed: needed as u64,
                actual: bytes.len() as u64,
            });
        };
        let (header, _) = RawHeader::ref_from_prefix(bytes).expect("step 2 saw 512 bytes");
        let (table_offset, _) = header.table_bounds();
        let (directory, table) = bytes[HEADER_BYTES..].split_at(table_offset as usize - HEADER_BYTES);
        let directory = <[RawSection]>::ref_from_bytes(directory).expect("section_count entries");
        let chunks = <[Digest]>::ref_from_bytes(table).expect("one digest per chunk");

        // Step 12
        let root = root_digest(bytes);
        if header.root_digest != root {
            return Err(FormatError::RootMismatch { computed: root, recorded: header.root_digest });
        }
        // Step 13
        if let Some(expected) = expected_root.filter(|expected| **expected != root) {
            return Err(FormatError::UnexpectedRoot { found: root, expected: *expected });
        }
        // Step 14
        if header.minor <= FORMAT_MINOR {
            check_reserved(header, directory)?;
        }
        // Step 15
        if header.architecture != ARCHITECTURE_QWEN2 {
            return Err(FormatError::UnsupportedArchitecture { found: header.architecture.get() });
        }
        // Step 16
        let config = header.config();
        config.validate().map_err(FormatError::BadConfig)?;
        // Step 17
        if header.layout_fingerprint != LAYOUT_FINGERPRINT {
            return Err(FormatError::UnknownLayout { found: header.layout_fingerprint });
        }
        // Step 18
        let layout = qwen2_weights_layout(&config);
        if header.arena_bytes != layout.arena_bytes {
            return Err(FormatError::BadArenaBytes {
                found: header.arena_bytes.get(),
                expected: layout.arena_bytes,
            });
        }
        // Steps 19 to 24
        let mut sections = Vec::with_capacity(directory.len());
        let mut end = needed as u64;
        for raw in directory {
            let section = parse_section(raw, &sections, &config, end)?;
            end = section.offset + section.bytes;
            sections.push(section);
        }
        // Step 25
        if !sections.iter().any(|section| section.name == TENSOR_TABLE) {
            return Err(FormatError::MissingSection { name: TENSOR_TABLE.to_owned() });
        }
        // Step 26
        let arena_offset = end.next_multiple_of(ARENA_ALIGN);
        if header.arena_offset != arena_offset {
            return Err(FormatError::BadArenaOffset {
                found: header.arena_offset.get(),
                expected: arena_offset,
            });
        }
        // Step 27
        let file_bytes = arena_offset + layout.arena_bytes;
        if header.file_bytes != file_bytes {
            return Err(FormatError::BadFileBytes { found: header.file_bytes.get(), expected: file_bytes });
        }
        Ok(Prologue {
            config,
            layout,
            version: (header.major.get(), header.minor.get()),
            root,
            sections,
            chunks: chunks.to_vec(),
            prologue_bytes: needed as u64,
            arena_offset,
            file_bytes,
        })
    }

    /// The model's config.
    pub fn config(&self) -> &Qwen2Config {
        &self.config
    }

    /// The arena's layout, computed from the config.
    pub fn layout(&self) -> &Qwen2Layout {
        &self.layout
    }

    /// Format version: major, minor.
    pub fn version(&self) -> (u16, u16) {
        self.version
    }

    /// The root digest, which names the content of the whole file.
    pub fn root(&self) -> &Digest {
        &self.root
    }

    /// The sections, in the order of their offsets.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The section of this name.
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// First byte of the arena in the file, a multiple of 2 MiB. The arena's length is
    /// `layout().arena_bytes`.
    pub fn arena_offset(&self) -> u64 {
        self.arena_offset
    }

    /// Length of the file.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Number of chunks of the arena.
    pub fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// Where chunk `i` is in the arena: 4 MiB, the last one what is left.
    pub fn chunk(&self, i: usize) -> Span {
        let offset = i as u64 * CHUNK_BYTES;
        Span { offset, bytes: CHUNK_BYTES.min(self.layout.arena_bytes - offset) }
    }

    /// SHA-256 of chunk `i`.
    pub fn chunk_digest(&self, i: usize) -> &Digest {
        &self.chunks[i]
    }

    /// Names the weights: [`arena_digest`].
    pub fn arena_digest(&self) -> Digest {
        arena_digest(&self.chunks)
    }

    /// The parts of the file that must be zeros, as offset and length: before each section and before the
    /// arena. No digest covers them.
    pub fn padding(&self) -> impl Iterator<Item = (u64, u64)> {
        let starts = self.sections.iter().map(|section| section.offset).chain([self.arena_offset]);
        let ends = self.sections.iter().map(|section| section.offset + section.bytes);
        std::iter::once(self.prologue_bytes).chain(ends).zip(starts).map(|(end, start)| (end, start - end))
    }

    /// Step 28: checks the content of section `name`.
    ///
    /// # Errors
    /// [`FormatError::MissingSection`], [`FormatError::SectionDamaged`].
    pub fn check_section(&self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        let section =
            self.section(name).ok_or_else(|| FormatError::MissingSection { name: name.to_owned() })?;
        if bytes.len() as u64 == section.bytes && sha256(bytes) == section.sha256 {
            return Ok(());
        }
        let end = section.offset + section.bytes;
        Err(FormatError::SectionDamaged { name: name.to_owned(), offset: section.offset, end })
    }

    /// Steps 28 and 29: checks the content of the tensor table, which must be what the config makes.
    ///
    /// # Errors
    /// [`FormatError::SectionDamaged`], [`FormatError::TensorTableMismatch`].
    pub fn check_tensor_table(&self, bytes: &[u8]) -> Result<(), FormatError> {
        self.check_section(TENSOR_TABLE, bytes)?;
        check_tensor_table(&self.config, bytes)
    }

    /// Step 33: checks chunk `i` of the arena.
    ///
    /// # Errors
    /// [`FormatError::ChunkDamaged`].
    pub fn check_chunk(&self, i: usize, bytes: &[u8]) -> Result<(), FormatError> {
        let chunk = self.chunk(i);
        if bytes.len() as u64 == chunk.bytes && sha256(bytes) == self.chunks[i] {
            return Ok(());
        }
        let offset = self.arena_offset + chunk.offset;
        Err(FormatError::ChunkDamaged { index: i, offset, end: offset + chunk.bytes })
    }

    /// Step 34: checks padding that begins at byte `offset` of the file.
    ///
    /// # Errors
    /// [`FormatError::PaddingNotZero`] with the first byte that is not zero.
    pub fn check_padding(&self, offset: u64, bytes: &[u8]) -> Result<(), FormatError> {
        match bytes.iter().position(|&byte| byte != 0) {
            Some(i) => Err(FormatError::PaddingNotZero { offset: offset + i as u64 }),
            None => Ok(()),
        }
    }
}

/// SHA-256 of a prologue, its own place taken as zeros.
pub(crate) fn root_digest(prologue: &[u8]) -> Digest {
    let (before, rest) = prologue.split_at(ROOT_DIGEST_OFFSET);
    let mut hasher = Sha256::default();
    for part in [before, &[0; size_of::<Digest>()], &rest[size_of::<Digest>()..]] {
        hasher.update(part);
    }
    hasher.finish()
}

/// Step 14: all that version 1.0 does not define is zero.
fn check_reserved(header: &RawHeader, directory: &[RawSection]) -> Result<(), FormatError> {
    let header_fields = [
        (std::mem::offset_of!(RawHeader, config_flags), header.config_flags.get() & !CONFIG_FLAG_TIED == 0),
        (std::mem::offset_of!(RawHeader, reserved_config), header.reserved_config == [0; 8]),
        (std::mem::offset_of!(RawHeader, reserved), header.reserved == [0; 320]),
    ];
    let section_fields = directory.iter().enumerate().flat_map(|(i, raw)| {
        let at = HEADER_BYTES + i * size_of::<RawSection>();
        [
            (at + std::mem::offset_of!(RawSection, flags), raw.flags.get() & !SECTION_FLAG_REQUIRED == 0),
            (at + std::mem::offset_of!(RawSection, reserved), raw.reserved == 0),
            (at + std::mem::offset_of!(RawSection, reserved_end), raw.reserved_end == [0; 8]),
        ]
    });
    match header_fields.into_iter().chain(section_fields).find(|(_, zero)| !zero) {
        Some((offset, _)) => Err(FormatError::ReservedNotZero { offset: offset as u64 }),
        None => Ok(()),
    }
}

/// Steps 19 to 24 for one entry of the directory; `end` is where what stands before the section ends.
fn parse_section(
    raw: &RawSection,
    earlier: &[Section],
    config: &Qwen2Config,
    end: u64,
) -> Result<Section, FormatError> {
    // Step 19
    let Some(name) = section_name(&raw.name) else {
        let length = raw.name.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        return Err(FormatError::BadSectionName { index: earlier.len(), name: raw.name[..length].to_vec() });
    };
    // Step 20
    if earlier.iter().any(|section| section.name == name) {
        return Err(FormatError::DuplicateSection { name });
    }
    // Step 21
    let required = raw.flags.get() & SECTION_FLAG_REQUIRED != 0;
    if required && !KNOWN_SECTIONS.contains(&name.as_str()) {
        return Err(FormatError::UnknownRequiredSection { name });
    }
    // Step 22
    let bytes = raw.bytes.get();
    if bytes > MAX_SECTION_BYTES {
        return Err(FormatError::SectionTooLarge { name, found: bytes });
    }
    // Step 23
    if let Some(expected) = fixed_section_bytes(config, &name).filter(|&expected| expected != bytes) {
        return Err(FormatError::BadSectionBytes { name, found: bytes, expected });
    }
    // Step 24
    let offset = end.next_multiple_of(SECTION_ALIGN);
    if raw.offset != offset {
        return Err(FormatError::SectionMisplaced { name, found: raw.offset.get(), expected: offset });
    }
    Ok(Section { name, required, offset, bytes, sha256: raw.sha256 })
}

/// The name in a zero-padded field, if it is valid.
fn section_name(field: &[u8; 32]) -> Option<String> {
    let length = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    let (name, padding) = field.split_at(length);
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-.".contains(byte);
    let valid =
        !name.is_empty() && name[0] != b'.' && name.iter().all(allowed) && padding.iter().all(|&b| b == 0);
    valid.then(|| name.iter().map(|&byte| char::from(byte)).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    use super::*;
    use crate::test_model::{QWEN2_0_5B, TINY};
    use crate::{LAYOUT_FINGERPRINT, NewSection, plan_file};

    /// A prologue of a small model with two sections besides the tensor table, and its file's length.
    fn valid() -> (Vec<u8>, u64) {
        let contents: [&[u8]; 2] = [b"{% for message in messages %}", &[7; 64]];
        let sections =
            [NewSection { name: "chat_template", bytes: 29 }, NewSection { name: "LICENSE", bytes: 64 }];
        let plan = plan_file(&TINY, &sections).unwrap();
        let (mut head, _) = plan.head(&contents, &[Digest([5; 32])]);
        let file_bytes = plan.prologue().file_bytes();
        head.truncate(prologue_bytes(&head, file_bytes).unwrap());
        (head, file_bytes)
    }

    /// What `parse` says after `change` to the header and the directory, the root digest being made anew.
    fn parse_changed(
        change: impl FnOnce(&mut RawHeader, &mut [RawSection]),
    ) -> Result<Prologue, FormatError> {
        let (mut bytes, _) = valid();
        let (header, rest) = RawHeader::mut_from_prefix(&mut bytes).unwrap();
        let (directory, _) = <[RawSection]>::mut_from_prefix_with_elems(rest, 3).unwrap();
        change(header, directory);
        let actual = header.file_bytes.get();
        parse_with_root(bytes, actual)
    }

    fn parse_with_root(mut bytes: Vec<u8>, actual: u64) -> Result<Prologue, FormatError> {
        if let Some(covered) = prologue_bytes(&bytes, actual).ok().and_then(|needed| bytes.get(..needed)) {
            let root = root_digest(covered);
            bytes[ROOT_DIGEST_OFFSET..][..32].copy_from_slice(&root.0);
        }
        Prologue::parse(&bytes, actual)
    }

    fn name_field(name: &str) -> [u8; 32] {
        let mut field = [0; 32];
        field[..name.len()].copy_from_slice(name.as_bytes());
        field
    }

    #[test]
    fn a_valid_prologue_is_read() {
        let (bytes, file_bytes) = valid();
        let prologue = Prologue::parse(&bytes, file_bytes).unwrap();
        assert_eq!(prologue.config(), &TINY);
        assert_eq!(prologue.layout(), &qwen2_weights_layout(&TINY));
        assert_eq!(prologue.version(), (1, 0));
        assert_eq!(prologue.root().0, bytes[160..192]);
        let names: Vec<_> = prologue.sections().iter().map(|section| section.name.as_str()).collect();
        assert_eq!(names, ["tensor_table", "chat_template", "LICENSE"]);
        let at: Vec<_> = prologue.sections().iter().map(|section| (section.offset, section.bytes)).collect();
        // 512 + 3 * 96 + 32 = 832 bytes of prologue; 15 records of 96 bytes in the table.
        assert_eq!(at, [(832, 1440), (2304, 29), (2368, 64)]);
        assert_eq!(
            prologue.padding().collect::<Vec<_>>(),
            [(832, 0), (2272, 32), (2333, 35), (2432, (2 << 20) - 2432)]
        );
        assert_eq!(prologue.arena_offset(), 2 << 20);
        assert_eq!(prologue.file_bytes(), (2 << 20) + 86528);
        assert_eq!(prologue.chunk_count(), 1);
        assert_eq!(prologue.chunk(0), Span { offset: 0, bytes: 86528 });
        assert_eq!(prologue.chunk_digest(0), &Digest([5; 32]));
        assert_eq!(prologue.section("LICENSE").unwrap().sha256, sha256(&[7; 64]));
        assert!(prologue.section("generation").is_none());
    }

    #[test]
    fn real_models_have_small_prologues() {
        let plan = plan_file(&QWEN2_0_5B, &[]).unwrap();
        let prologue = plan.prologue();
        assert_eq!(prologue.chunk_count() as u64, prologue.layout().arena_bytes.div_ceil(4 << 20));
        let last = prologue.chunk(prologue.chunk_count() - 1);
        assert_eq!(last.end(), prologue.layout().arena_bytes);
        // 512 + 96 + 32 * 236 bytes of prologue; the tensor table at the next multiple of 64.
        assert_eq!(prologue.padding().next(), Some((8160, 32)));
    }

    #[test]
    fn steps_1_to_11() {
        let (bytes, length) = valid();
        let check = |offset: usize, new: &[u8], actual: u64| {
            let mut bytes = bytes.clone();
            bytes[offset..][..new.len()].copy_from_slice(new);
            assert_eq!(Prologue::parse(&bytes, actual).err(), prologue_bytes(&bytes[..512], actual).err());
            Prologue::parse(&bytes, actual).unwrap_err()
        };
        let magic = check(0, b"GGUF", length);
        assert_eq!(magic, FormatError::BadMagic { found: b"GGUF\r\n\x1a\n".to_vec() });
        assert_eq!(magic.to_string(), r#"not a .mrt file: it begins with "GGUF\r\n\x1a\n""#);
        assert_eq!(prologue_bytes(b"", 0), Err(FormatError::BadMagic { found: vec![] }));
        assert_eq!(prologue_bytes(&bytes[..7], 7), Err(FormatError::BadMagic { found: bytes[..7].to_vec() }));
        for short in [8, 12, 511] {
            let error = FormatError::HeaderTruncated { actual: short as u64 };
            assert_eq!(prologue_bytes(&bytes[..short], short as u64), Err(error));
        }
        assert_eq!(check(8, &[2, 0, 3, 0], length), FormatError::UnsupportedVersion { major: 2, minor: 3 });
        assert_eq!(check(8, &[0, 0], length), FormatError::UnsupportedVersion { major: 0, minor: 0 });
        let truncated = check(0, &[], length - 1);
        assert_eq!(truncated, FormatError::Truncated { actual: length - 1, expected: length });
        assert!(truncated.to_string().starts_with(&format!("truncated: {} of {length} bytes", length - 1)));
        assert_eq!(check(0, &[], 512), FormatError::Truncated { actual: 512, expected: length });
        assert_eq!(check(0, &[], length + 1), FormatError::Overlong { actual: length + 1, expected: length });
        assert_eq!(check(12, &[0, 1, 0, 0], length), FormatError::BadHeaderBytes { found: 256 });
        assert_eq!(check(23, &[0x80], length), FormatError::UnsupportedFeatures { bits: 1 << 63 });
        assert_eq!(check(60, &[0; 4], length), FormatError::BadChunkBytes { found: 0 });
        assert_eq!(check(56, &[65], length), FormatError::TooManySections { found: 65 });
        assert_eq!(check(56, &[0xff; 4], length), FormatError::TooManySections { found: u32::MAX });
        let chunks: u64 = (64 << 20) / 32;
        let arena = (chunks * CHUNK_BYTES).to_le_bytes();
        let found = 512 + 3 * 96 + (64 << 20);
        assert_eq!(check(48, &arena, length), FormatError::PrologueTooLarge { found });
        let found = 512 + 3 * 96 + 32 * (1 << 42);
        assert_eq!(check(48, &[0xff; 8], length), FormatError::PrologueTooLarge { found });
        let arena = (100_000 * CHUNK_BYTES).to_le_bytes();
        let needed = 512 + 3 * 96 + 32 * 100_000;
        assert_eq!(check(48, &arena, length), FormatError::PrologueOutsideFile { needed, actual: length });
    }

    #[test]
    fn fewer_bytes_than_needed() {
        let (bytes, length) = valid();
        let error = FormatError::PrologueOutsideFile { needed: 832, actual: 831 };
        assert_eq!(Prologue::parse(&bytes[..831], length), Err(error));
        // More do not matter.
        let more = [bytes.as_slice(), &[1; 100]].concat();
        assert_eq!(Prologue::parse(&more, length), Prologue::parse(&bytes, length));
    }

    #[test]
    fn steps_12_and_13() {
        let (mut bytes, length) = valid();
        let root = *Prologue::parse(&bytes, length).unwrap().root();
        bytes[831] ^= 1;
        let error = Prologue::parse(&bytes, length).unwrap_err();
        assert!(matches!(error, FormatError::RootMismatch { recorded, .. } if recorded == root));
        bytes[831] ^= 1;
        assert!(Prologue::parse_pinned(&bytes, length, Some(&root)).is_ok());
        let expected = Digest([1; 32]);
        assert_eq!(
            Prologue::parse_pinned(&bytes, length, Some(&expected)),
            Err(FormatError::UnexpectedRoot { found: root, expected })
        );
    }

    #[test]
    fn step_14() {
        type Change = fn(&mut RawHeader, &mut [RawSection]);
        let cases: [(u64, Change); 6] = [
            (100, |header, _| header.config_flags = 2.into()),
            (120, |header, _| header.reserved_config[7] = 1),
            (192, |header, _| header.reserved[319] = 1),
            (512 + 32, |_, directory| directory[0].flags = 3.into()),
            (512 + 96 + 36, |_, directory| directory[1].reserved = 1.into()),
            (512 + 192 + 88, |_, directory| directory[2].reserved_end[0] = 1),
        ];
        for (offset, change) in cases {
            assert_eq!(parse_changed(change), Err(FormatError::ReservedNotZero { offset }));
            // A later minor version may use what 1.0 reserves; whoever must know of it has a feature bit.
            let newer = parse_changed(|header, directory| {
                change(header, directory);
                header.minor = 1.into();
            });
            assert_eq!(newer.unwrap().version(), (1, 1));
        }
        assert!(parse_changed(|header, _| header.optional_features = u64::MAX.into()).is_ok());
    }

    #[test]
    fn steps_15_to_18() {
        let error = parse_changed(|header, _| header.architecture = 2.into());
        assert_eq!(error, Err(FormatError::UnsupportedArchitecture { found: 2 }));
        let error = parse_changed(|header, _| header.num_kv_heads = 4.into()).unwrap_err();
        assert_eq!(error.to_string(), "config: num_kv_heads is 4, must be a divisor of num_heads = 6");
        let error = parse_changed(|header, _| header.rms_norm_eps = f64::NAN.into());
        assert!(matches!(error, Err(FormatError::BadConfig(bad)) if bad.field == "rms_norm_eps"));
        let found = Digest([9; 32]);
        let error = parse_changed(|header, _| header.layout_fingerprint = found);
        assert_eq!(error, Err(FormatError::UnknownLayout { found }));
        let error = parse_changed(|header, _| header.arena_bytes = (86528 - 64).into());
        assert_eq!(error, Err(FormatError::BadArenaBytes { found: 86464, expected: 86528 }));
        // Another config of valid numbers makes another arena.
        let error = parse_changed(|header, _| header.num_layers = 1.into());
        assert!(matches!(error, Err(FormatError::BadArenaBytes { found: 86528, .. })));
        let error = parse_changed(|header, _| header.config_flags = 1.into());
        assert!(matches!(error, Err(FormatError::BadArenaBytes { found: 86528, .. })));
    }

    #[test]
    fn step_19() {
        for name in ["", ".", "..", ".hidden", "a/b", "a\\b", "a b", "C:", "nul\0inside", "\u{e9}", "line\n"]
        {
            let error = parse_changed(|_, directory| directory[2].name = name_field(name));
            assert_eq!(error, Err(FormatError::BadSectionName { index: 2, name: name.into() }), "{name:?}");
        }
        for name in ["a", "A-z_0.9", "tokenizer.model..", "exactly-32-letters-are-all-right"] {
            let prologue = parse_changed(|_, directory| directory[2].name = name_field(name)).unwrap();
            assert_eq!(prologue.sections()[2].name, name);
        }
    }

    #[test]
    fn steps_20_to_25() {
        let name = || "tensor_table".to_owned();
        let error = parse_changed(|_, directory| directory[2].name = directory[0].name);
        assert_eq!(error, Err(FormatError::DuplicateSection { name: name() }));
        let error = parse_changed(|_, directory| directory[2].flags = 1.into());
        assert_eq!(error, Err(FormatError::UnknownRequiredSection { name: "LICENSE".to_owned() }));
        assert!(parse_changed(|_, directory| directory[1].flags = 1.into()).is_ok());
        for found in [(64 << 20) + 1, u64::MAX] {
            let error = parse_changed(|_, directory| directory[1].bytes = found.into());
            assert_eq!(error, Err(FormatError::SectionTooLarge { name: "chat_template".to_owned(), found }));
        }
        let error = parse_changed(|_, directory| directory[0].bytes = 1344.into());
        assert_eq!(error, Err(FormatError::BadSectionBytes { name: name(), found: 1344, expected: 1440 }));
        for (section, expected) in [("generation", 128), ("conversion_report", 27 * 32)] {
            let error = parse_changed(|_, directory| directory[1].name = name_field(section));
            let expected = FormatError::BadSectionBytes { name: section.to_owned(), found: 29, expected };
            assert_eq!(error, Err(expected));
        }
        for found in [0, 2303, 2305, 2304 + 64, 2 << 20, u64::MAX] {
            let error = parse_changed(|_, directory| directory[1].offset = found.into());
            let name = "chat_template".to_owned();
            assert_eq!(error, Err(FormatError::SectionMisplaced { name, found, expected: 2304 }));
        }
        // A longer section pushes the next one on: they cannot overlap.
        let error = parse_changed(|_, directory| directory[1].bytes = 65.into());
        let name = "LICENSE".to_owned();
        assert_eq!(error, Err(FormatError::SectionMisplaced { name, found: 2368, expected: 2432 }));
        let error = parse_changed(|_, directory| {
            directory[0].name = name_field("other");
            directory[0].flags = 0.into();
        });
        assert_eq!(error, Err(FormatError::MissingSection { name: "tensor_table".to_owned() }));
    }

    #[test]
    fn steps_26_and_27() {
        let expected = 2 << 20;
        for found in [0, 64, 1 << 20, 4 << 20, u64::MAX] {
            let error = parse_changed(|header, _| header.arena_offset = found.into());
            assert_eq!(error, Err(FormatError::BadArenaOffset { found, expected }));
        }
        let expected = (2 << 20) + 86528;
        for found in [832, expected - 1, expected + 1, u64::MAX] {
            let error = parse_changed(|header, _| header.file_bytes = found.into());
            assert_eq!(error, Err(FormatError::BadFileBytes { found, expected }));
        }
    }

    #[test]
    fn contents_are_checked() {
        let (bytes, length) = valid();
        let prologue = Prologue::parse(&bytes, length).unwrap();
        assert_eq!(prologue.check_section("LICENSE", &[7; 64]), Ok(()));
        let damaged = FormatError::SectionDamaged { name: "LICENSE".to_owned(), offset: 2368, end: 2432 };
        assert_eq!(prologue.check_section("LICENSE", &[8; 64]), Err(damaged.clone()));
        assert_eq!(prologue.check_section("LICENSE", &[7; 63]), Err(damaged));
        let missing = FormatError::MissingSection { name: "origin".to_owned() };
        assert_eq!(prologue.check_section("origin", &[]), Err(missing));

        let damaged = FormatError::ChunkDamaged { index: 0, offset: 2 << 20, end: length };
        assert_eq!(prologue.check_chunk(0, &vec![0; 86528]), Err(damaged));
        assert_eq!(prologue.check_padding(100, &[0; 9]), Ok(()));
        assert_eq!(prologue.check_padding(100, &[0, 0, 1]), Err(FormatError::PaddingNotZero { offset: 102 }));

        let mut table = crate::tensor_table(&TINY);
        assert_eq!(prologue.check_tensor_table(&table), Ok(()));
        table[96 * 3 + 80] ^= 64;
        let damaged = FormatError::SectionDamaged { name: "tensor_table".to_owned(), offset: 832, end: 2272 };
        assert_eq!(prologue.check_tensor_table(&table), Err(damaged));
        let lying = parse_changed(|_, directory| directory[0].sha256 = sha256(&table)).unwrap();
        let tensor = "layers.0.attn_out".to_owned();
        assert_eq!(lying.check_tensor_table(&table), Err(FormatError::TensorTableMismatch { tensor }));
    }

    #[test]
    fn every_flipped_bit_is_refused() {
        let (bytes, length) = valid();
        for bit in 0..8 * bytes.len() {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Prologue::parse(&bytes, length).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let (bytes, length) = valid();
        for actual in 0..bytes.len() {
            assert!(Prologue::parse(&bytes[..actual], actual as u64).is_err());
            assert!(Prologue::parse(&bytes[..actual], length).is_err());
        }
    }

    /// What holds of every prologue that `parse` accepts.
    fn check_accepted(prologue: &Prologue, actual: u64) {
        assert_eq!(prologue.file_bytes(), actual);
        assert_eq!(prologue.config().validate(), Ok(()));
        assert_eq!(prologue.arena_offset() % ARENA_ALIGN, 0);
        assert_eq!(prologue.arena_offset() + prologue.layout().arena_bytes, actual);
        let mut end = prologue.prologue_bytes;
        for section in prologue.sections() {
            assert!(section.offset >= end && section.offset % 64 == 0);
            end = section.offset + section.bytes;
        }
        assert!(end <= prologue.arena_offset());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(bytes: Vec<u8>, actual: u64) {
            prop_assert!(Prologue::parse(&bytes, actual).is_err());
        }

        #[test]
        fn arbitrary_headers_do_not_panic(header: [[u8; 32]; 16], rest: Vec<u8>, sections in 0u32..70) {
            let mut bytes = [header.as_flattened(), &rest].concat();
            let (raw, _) = RawHeader::mut_from_prefix(&mut bytes).unwrap();
            raw.magic = MAGIC;
            raw.major = FORMAT_MAJOR.into();
            raw.header_bytes = 512.into();
            raw.required_features = 0.into();
            raw.chunk_bytes = (CHUNK_BYTES as u32).into();
            raw.section_count = sections.into();
            let actual = raw.file_bytes.get();
            prop_assert!(parse_with_root(bytes, actual).is_err());
        }

        #[test]
        fn mutated_prologues_do_not_panic(changes in prop::collection::vec((0usize..832, any::<u8>()), 1..8)) {
            let (mut bytes, _) = valid();
            for (offset, byte) in changes {
                bytes[offset] = byte;
            }
            let actual = u64::from_le_bytes(bytes[32..40].try_into().unwrap());
            if let Ok(prologue) = parse_with_root(bytes, actual) {
                check_accepted(&prologue, actual);
            }
        }

        #[test]
        fn mutated_fields_do_not_panic(
            changes in prop::collection::vec((0usize..832 / 8, prop_oneof![
                any::<u64>(), Just(0), Just(1), Just(u64::MAX), Just(1 << 32), Just(1 << 63), (0u64..1 << 24),
            ]), 1..4),
        ) {
            let (mut bytes, _) = valid();
            for (field, value) in changes {
                bytes[8 * field..][..8].copy_from_slice(&value.to_le_bytes());
            }
            let actual = u64::from_le_bytes(bytes[32..40].try_into().unwrap());
            if let Ok(prologue) = parse_with_root(bytes, actual) {
                check_accepted(&prologue, actual);
            }
        }
    }

    #[test]
    fn the_header_holds_the_fingerprint_and_the_config() {
        let (bytes, _) = valid();
        assert_eq!(bytes[128..160], *LAYOUT_FINGERPRINT.as_bytes());
        assert_eq!(bytes[68..72], 40u32.to_le_bytes());
        assert_eq!(bytes[112..120], 1e6f64.to_le_bytes());
    }
}
