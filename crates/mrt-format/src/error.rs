//! What can be wrong with a `.mrt` file.

use crate::config::ConfigError;
use crate::digest::Digest;

/// Why a `.mrt` file is refused: one variant per step of the validation algorithm in `format-spec.md`, in its
/// order.
///
/// The text is one line without the file's name.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the texts say what the fields are")]
pub enum FormatError {
    /// Step 1.
    #[error("not a .mrt file: it begins with \"{}\"", .found.escape_ascii())]
    BadMagic { found: Vec<u8> },
    /// Step 2.
    #[error("truncated: {actual} bytes are fewer than the header's 512; get the file again")]
    HeaderTruncated { actual: u64 },
    /// Step 3.
    #[error(
        "format version {major}.{minor}; this reader knows major version 1: update it, or convert the model again"
    )]
    UnsupportedVersion { major: u16, minor: u16 },
    /// Step 4.
    #[error("truncated: {actual} of {expected} bytes; get the file again")]
    Truncated { actual: u64, expected: u64 },
    /// Step 5.
    #[error("the file has {actual} bytes but says that it has {expected}; get the file again")]
    Overlong { actual: u64, expected: u64 },
    /// Step 6.
    #[error("header_bytes is {found}, must be 512")]
    BadHeaderBytes { found: u32 },
    /// Step 7.
    #[error(
        "needs features that this reader does not have (bits {bits:#x}): update it, or convert the model again"
    )]
    UnsupportedFeatures { bits: u64 },
    /// Step 8.
    #[error("chunk_bytes is {found}, must be 4194304")]
    BadChunkBytes { found: u32 },
    /// Step 9.
    #[error("section_count is {found}, may be at most 64")]
    TooManySections { found: u32 },
    /// Step 10.
    #[error("header, directory and chunk table would take {found} bytes, may take at most 67108864")]
    PrologueTooLarge { found: u64 },
    /// Step 11.
    #[error("header, directory and chunk table take {needed} bytes, but there are only {actual}")]
    PrologueOutsideFile { needed: u64, actual: u64 },
    /// Step 12.
    #[error(
        "header, directory or chunk table is damaged (root digest {computed}, recorded {recorded}); get the file again"
    )]
    RootMismatch { computed: Digest, recorded: Digest },
    /// Step 13, if the caller expects a certain root digest.
    #[error("another file than expected: its root digest is {found}, not {expected}")]
    UnexpectedRoot { found: Digest, expected: Digest },
    /// Step 14.
    #[error("the reserved field at byte {offset} is not zero")]
    ReservedNotZero { offset: u64 },
    /// Step 15.
    #[error("architecture {found} is unknown to this reader, which knows 1 (Qwen2)")]
    UnsupportedArchitecture { found: u32 },
    /// Step 16.
    #[error("config: {0}")]
    BadConfig(#[source] ConfigError),
    /// Step 17.
    #[error(
        "weights are packed in a layout that this reader does not know (fingerprint {found}): convert the model again"
    )]
    UnknownLayout { found: Digest },
    /// Step 18.
    #[error("arena_bytes is {found}, but the config makes {expected}")]
    BadArenaBytes { found: u64, expected: u64 },
    /// Step 19.
    #[error("section {index} has an invalid name \"{}\"", .name.escape_ascii())]
    BadSectionName { index: usize, name: Vec<u8> },
    /// Step 20.
    #[error("section {name} is in the directory twice")]
    DuplicateSection { name: String },
    /// Step 21.
    #[error("needs section {name}, which this reader does not know: update it, or convert the model again")]
    UnknownRequiredSection { name: String },
    /// Step 22.
    #[error("section {name} has {found} bytes, may have at most 67108864")]
    SectionTooLarge { name: String, found: u64 },
    /// Step 23.
    #[error("section {name} has {found} bytes, but the config makes {expected}")]
    BadSectionBytes { name: String, found: u64, expected: u64 },
    /// Step 24.
    #[error("section {name} is at byte {found}, must be at {expected}")]
    SectionMisplaced { name: String, found: u64, expected: u64 },
    /// Step 25.
    #[error("has no section {name}")]
    MissingSection { name: String },
    /// Step 26.
    #[error("arena_offset is {found}, must be {expected}")]
    BadArenaOffset { found: u64, expected: u64 },
    /// Step 27.
    #[error("file_bytes is {found}, must be {expected}")]
    BadFileBytes { found: u64, expected: u64 },
    /// Step 28, when a section is used.
    #[error("section {name} is damaged (bytes {offset} to {end}); get the file again")]
    SectionDamaged { name: String, offset: u64, end: u64 },
    /// Step 29, when the tensor table is used.
    #[error("tensor_table differs from what the config makes at {tensor}: convert the model again")]
    TensorTableMismatch { tensor: String },
    /// Step 30, when the conversion report is used.
    #[error("conversion_report: {field} of {tensor} is {value}")]
    BadReport { tensor: String, field: &'static str, value: u64 },
    /// Step 31, when the generation defaults are used.
    #[error("generation: {field} is {value}, must be {expected}")]
    BadGeneration { field: &'static str, value: String, expected: String },
    /// Step 32, when the tokenizer is used.
    #[error("tokenizer: {field} is {value}, must be {expected}; convert the model again")]
    BadTokenizer { field: &'static str, value: u64, expected: &'static str },
    /// Step 33, when a chunk of the arena is checked.
    #[error("chunk {index} of the weights is damaged (bytes {offset} to {end}); get the file again")]
    ChunkDamaged { index: usize, offset: u64, end: u64 },
    /// Step 34, when everything is checked.
    #[error("the padding at byte {offset} is not zero")]
    PaddingNotZero { offset: u64 },
}
