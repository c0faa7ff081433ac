//! Writing a file: where everything goes, then all bytes before the arena.

use zerocopy::IntoBytes;

use crate::config::Qwen2Config;
use crate::digest::{Digest, sha256};
use crate::error::FormatError;
use crate::fingerprint::layout_fingerprint;
use crate::header::{
    ARENA_ALIGN, CHUNK_BYTES, HEADER_BYTES, RawHeader, RawSection, SECTION_ALIGN, SECTION_FLAG_REQUIRED,
};
use crate::layout::qwen2_weights_layout;
use crate::prologue::{Prologue, prologue_bytes, root_digest};
use crate::section::{TENSOR_TABLE, tensor_table};

/// A section to be written.
#[derive(Clone, Copy, Debug)]
pub struct NewSection<'a> {
    /// Name, by the rules of [`Section::name`](crate::Section::name).
    pub name: &'a str,
    /// Length of the content in bytes.
    pub bytes: u64,
}

/// Where everything of a new file goes.
pub struct FilePlan {
    header: RawHeader,
    directory: Vec<RawSection>,
    prologue: Prologue,
}

/// Plans a file with the tensor table and then `sections`, in this order.
///
/// # Errors
/// What a reader would find wrong with the file: an invalid config, or a bad name or length of a section.
pub fn plan_file(cfg: &Qwen2Config, sections: &[NewSection]) -> Result<FilePlan, FormatError> {
    cfg.validate().map_err(FormatError::BadConfig)?;
    let table_bytes = tensor_table(cfg).len() as u64;
    let sections = [&[NewSection { name: TENSOR_TABLE, bytes: table_bytes }], sections].concat();

    let mut header = RawHeader::new(cfg);
    header.layout_fingerprint = layout_fingerprint();
    header.section_count = u32::try_from(sections.len()).unwrap_or(u32::MAX).into();
    header.arena_bytes = qwen2_weights_layout(cfg).arena_bytes.into();
    // The length is not known yet, and the limits come before it: nothing is allocated for a file beyond them.
    header.file_bytes = u64::MAX.into();
    let mut end = prologue_bytes(header.as_bytes(), u64::MAX)? as u64;

    let mut directory = Vec::with_capacity(sections.len());
    for (index, section) in sections.iter().enumerate() {
        let mut name = [0; 32];
        match name.get_mut(..section.name.len()) {
            Some(field) if !section.name.contains('\0') => field.copy_from_slice(section.name.as_bytes()),
            _ => return Err(FormatError::BadSectionName { index, name: section.name.into() }),
        }
        let offset = end.next_multiple_of(SECTION_ALIGN);
        // A length beyond the limit must not wrap before the check below refuses it.
        end = offset.saturating_add(section.bytes).min(u64::MAX / 2);
        directory.push(RawSection {
            name,
            flags: if section.name == TENSOR_TABLE { SECTION_FLAG_REQUIRED } else { 0 }.into(),
            reserved: 0.into(),
            offset: offset.into(),
            bytes: section.bytes.into(),
            sha256: Digest([0; 32]),
            reserved_end: [0; 8],
        });
    }
    header.arena_offset = end.next_multiple_of(ARENA_ALIGN).into();
    header.file_bytes = (header.arena_offset.get() + header.arena_bytes.get()).into();

    // What a reader refuses is not written: its own code checks the plan, with digests still zero.
    let chunks = vec![Digest([0; 32]); header.arena_bytes.get().div_ceil(CHUNK_BYTES) as usize];
    let (prologue, _) = encode(&header, &directory, &chunks);
    let prologue = Prologue::parse(&prologue, header.file_bytes.get())?;
    Ok(FilePlan { header, directory, prologue })
}

impl FilePlan {
    /// Where things are: sections, arena, chunks. Digests in it are zero.
    pub fn prologue(&self) -> &Prologue {
        &self.prologue
    }

    /// All bytes before the arena (prologue, sections and padding; up to `arena_offset`), and the root
    /// digest.
    ///
    /// # Panics
    /// If the contents (of the planned sections, without the tensor table) or the digests (of the arena's
    /// chunks) are not as many as planned, or a content has another length.
    pub fn head(&self, contents: &[&[u8]], chunks: &[Digest]) -> (Vec<u8>, Digest) {
        let table = tensor_table(self.prologue.config());
        let contents = [&[table.as_slice()], contents].concat();
        assert_eq!(contents.len(), self.directory.len(), "one content per section");
        assert_eq!(chunks.len(), self.prologue.chunk_count(), "one digest per chunk");

        let mut directory = self.directory.clone();
        for (raw, content) in directory.iter_mut().zip(&contents) {
            assert_eq!(content.len() as u64, raw.bytes.get(), "a section has its planned length");
            raw.sha256 = sha256(content);
        }
        let (mut head, root) = encode(&self.header, &directory, chunks);
        for (section, content) in self.prologue.sections().iter().zip(&contents) {
            head.resize(section.offset as usize, 0);
            head.extend_from_slice(content);
        }
        head.resize(self.prologue.arena_offset() as usize, 0);
        (head, root)
    }
}

/// The bytes of a prologue, and its root digest.
fn encode(header: &RawHeader, directory: &[RawSection], chunks: &[Digest]) -> (Vec<u8>, Digest) {
    let mut bytes = [header.as_bytes(), directory.as_bytes(), chunks.as_bytes()].concat();
    let root = root_digest(&bytes);
    let header = RawHeader { root_digest: root, ..*header };
    bytes[..HEADER_BYTES].copy_from_slice(header.as_bytes());
    (bytes, root)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_model::{QWEN2_0_5B, TINY};

    #[test]
    fn the_head_is_what_a_reader_checks() {
        let contents: [&[u8]; 3] = [b"", b"{}", &[3; 3_000_000]];
        let names = ["LICENSE", "config.json", "tokenizer.json"];
        let sections: Vec<_> = names
            .iter()
            .zip(contents)
            .map(|(name, content)| NewSection { name, bytes: content.len() as u64 })
            .collect();
        let plan = plan_file(&TINY, &sections).unwrap();
        let (head, root) = plan.head(&contents, &[Digest([1; 32])]);
        let length = head.len() as u64 + plan.prologue().layout().arena_bytes;
        let read = Prologue::parse(&head, length).unwrap();
        assert_eq!(read.root(), &root);
        assert_eq!(read.arena_offset(), head.len() as u64);
        assert_eq!(head.len(), 4 << 20);
        assert_eq!(read.chunk_digest(0), &Digest([1; 32]));
        let content = |name| {
            let section = read.section(name).unwrap();
            &head[section.offset as usize..][..section.bytes as usize]
        };
        for (name, expected) in names.into_iter().zip(contents) {
            assert_eq!(content(name), expected);
            assert_eq!(read.check_section(name, content(name)), Ok(()));
        }
        assert_eq!(read.check_tensor_table(content(TENSOR_TABLE)), Ok(()));
        for (offset, bytes) in read.padding() {
            assert_eq!(read.check_padding(offset, &head[offset as usize..][..bytes as usize]), Ok(()));
        }
    }

    #[test]
    fn what_a_reader_refuses_is_not_written() {
        let error = |name, bytes| plan_file(&TINY, &[NewSection { name, bytes }]).err().unwrap();
        let too_long = "a-name-of-more-than-32-characters";
        for name in ["", "a/b", "..", "nul\0", too_long] {
            assert_eq!(error(name, 1), FormatError::BadSectionName { index: 1, name: name.into() });
        }
        assert_eq!(
            error(TENSOR_TABLE, 1440),
            FormatError::DuplicateSection { name: TENSOR_TABLE.to_owned() }
        );
        for bytes in [(64 << 20) + 1, u64::MAX] {
            let expected = FormatError::SectionTooLarge { name: "a".to_owned(), found: bytes };
            assert_eq!(error("a", bytes), expected);
        }
        let name = "generation".to_owned();
        assert_eq!(
            error("generation", 127),
            FormatError::BadSectionBytes { name, found: 127, expected: 128 }
        );
        let many = vec![NewSection { name: "a", bytes: 0 }; 64];
        assert_eq!(plan_file(&TINY, &many).err(), Some(FormatError::TooManySections { found: 65 }));
        let cfg = Qwen2Config { num_heads: 0, ..TINY };
        assert!(matches!(plan_file(&cfg, &[]), Err(FormatError::BadConfig(_))));
        let cfg = Qwen2Config {
            hidden_size: 1 << 16,
            intermediate_size: 1 << 20,
            num_layers: 1 << 10,
            ..QWEN2_0_5B
        };
        assert!(matches!(plan_file(&cfg, &[]), Err(FormatError::PrologueTooLarge { .. })));
    }
}
