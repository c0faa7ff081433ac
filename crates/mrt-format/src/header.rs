//! The fixed fields at the start of a file, as bytes.

use zerocopy::little_endian::{F64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::config::{ARCHITECTURE_QWEN2, Qwen2Config};
use crate::digest::Digest;

/// First bytes of every file. A byte above 127, both kinds of line end and a control-Z show damage by
/// transfers that take the file for a text, as in PNG.
pub const MAGIC: [u8; 8] = *b"\x89MRT\r\n\x1a\n";
/// Major version of the format that this crate reads and writes.
pub const FORMAT_MAJOR: u16 = 1;
/// Minor version of the format that this crate writes; it reads every minor version of its major version.
pub const FORMAT_MINOR: u16 = 0;
/// Length of the header.
pub const HEADER_BYTES: usize = 512;
/// Bytes of the arena that one entry of the chunk table covers.
pub const CHUNK_BYTES: u64 = 4 << 20;
/// The arena starts at a multiple of this, so that huge pages can map it.
pub const ARENA_ALIGN: u64 = 2 << 20;
/// Every section starts at a multiple of this.
pub const SECTION_ALIGN: u64 = 64;
/// Most sections of a file.
pub const MAX_SECTIONS: usize = 64;
/// Most bytes of a section.
pub const MAX_SECTION_BYTES: u64 = 64 << 20;
/// Most bytes of header, directory and chunk table together.
pub const MAX_PROLOGUE_BYTES: u64 = 64 << 20;

pub(crate) const CONFIG_FLAG_TIED: u32 = 1;
pub(crate) const SECTION_FLAG_REQUIRED: u32 = 1;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub magic: [u8; 8],
    pub major: U16,
    pub minor: U16,
    pub header_bytes: U32,
    pub required_features: U64,
    pub optional_features: U64,
    pub file_bytes: U64,
    pub arena_offset: U64,
    pub arena_bytes: U64,
    pub section_count: U32,
    pub chunk_bytes: U32,
    pub architecture: U32,
    pub hidden_size: U32,
    pub intermediate_size: U32,
    pub num_layers: U32,
    pub num_heads: U32,
    pub num_kv_heads: U32,
    pub head_dim: U32,
    pub vocab_size: U32,
    pub max_position_embeddings: U32,
    pub config_flags: U32,
    pub rms_norm_eps: F64,
    pub rope_theta: F64,
    pub reserved_config: [u8; 8],
    pub layout_fingerprint: Digest,
    pub root_digest: Digest,
    pub reserved: [u8; 320],
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);
/// Where the root digest stands; it is taken as zeros when it is computed.
pub(crate) const ROOT_DIGEST_OFFSET: usize = std::mem::offset_of!(RawHeader, root_digest);
const _: () = assert!(ROOT_DIGEST_OFFSET == 160);

/// One entry of the section directory.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawSection {
    pub name: [u8; 32],
    pub flags: U32,
    pub reserved: U32,
    pub offset: U64,
    pub bytes: U64,
    pub sha256: Digest,
    pub reserved_end: [u8; 8],
}

const _: () = assert!(size_of::<RawSection>() == 96);

impl RawHeader {
    /// A header of the version that this crate writes; sizes, offsets and digests are still zero.
    pub fn new(cfg: &Qwen2Config) -> RawHeader {
        RawHeader {
            magic: MAGIC,
            major: FORMAT_MAJOR.into(),
            minor: FORMAT_MINOR.into(),
            header_bytes: (HEADER_BYTES as u32).into(),
            chunk_bytes: (CHUNK_BYTES as u32).into(),
            architecture: ARCHITECTURE_QWEN2.into(),
            hidden_size: cfg.hidden_size.into(),
            intermediate_size: cfg.intermediate_size.into(),
            num_layers: cfg.num_layers.into(),
            num_heads: cfg.num_heads.into(),
            num_kv_heads: cfg.num_kv_heads.into(),
            head_dim: cfg.head_dim.into(),
            vocab_size: cfg.vocab_size.into(),
            max_position_embeddings: cfg.max_position_embeddings.into(),
            config_flags: if cfg.tie_word_embeddings { CONFIG_FLAG_TIED } else { 0 }.into(),
            rms_norm_eps: cfg.rms_norm_eps.into(),
            rope_theta: cfg.rope_theta.into(),
            ..RawHeader::read_from_bytes(&[0; HEADER_BYTES]).expect("every byte is a valid field")
        }
    }

    /// The config as it stands, not validated.
    pub fn config(&self) -> Qwen2Config {
        Qwen2Config {
            hidden_size: self.hidden_size.get(),
            intermediate_size: self.intermediate_size.get(),
            num_layers: self.num_layers.get(),
            num_heads: self.num_heads.get(),
            num_kv_heads: self.num_kv_heads.get(),
            head_dim: self.head_dim.get(),
            vocab_size: self.vocab_size.get(),
            max_position_embeddings: self.max_position_embeddings.get(),
            rms_norm_eps: self.rms_norm_eps.get(),
            rope_theta: self.rope_theta.get(),
            tie_word_embeddings: self.config_flags.get() & CONFIG_FLAG_TIED != 0,
        }
    }

    /// Where the directory ends and the chunk table begins, and where that ends: the length of the prologue.
    pub fn table_bounds(&self) -> (u64, u64) {
        let directory = u64::from(self.section_count.get()) * size_of::<RawSection>() as u64;
        let start = HEADER_BYTES as u64 + directory;
        let chunks = self.arena_bytes.get().div_ceil(CHUNK_BYTES);
        (start, start + chunks * size_of::<Digest>() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows of the specification's table for the fields of a struct, from their places in it.
    macro_rules! rows {
        ($raw:ty: $($field:ident)*) => {
            [$({
                let size = |raw: &$raw| size_of_val(&raw.$field);
                let zero = <$raw>::read_from_bytes(&[0; size_of::<$raw>()]).unwrap();
                format!("| {} | {} | `{}` |", std::mem::offset_of!($raw, $field), size(&zero), stringify!($field))
            }),*]
        };
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let spec =
            std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../format-spec.md")).unwrap();
        let header = rows![RawHeader: magic major minor header_bytes required_features optional_features file_bytes
            arena_offset arena_bytes section_count chunk_bytes architecture hidden_size intermediate_size num_layers
            num_heads num_kv_heads head_dim vocab_size max_position_embeddings config_flags rms_norm_eps rope_theta
            reserved_config layout_fingerprint root_digest reserved];
        let directory = rows![RawSection: name flags reserved offset bytes sha256 reserved_end];
        for row in header.iter().chain(&directory) {
            assert!(spec.contains(row), "not in format-spec.md: {row}");
        }
    }
}
