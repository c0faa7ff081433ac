//! The `.mrt` model file: header, sections, weight layout, packing, digests and validation.
//!
//! The crate does no I/O: it turns bytes into checked structures and structures into bytes. `format-spec.md`
//! in the repository's root specifies the format; names are the same there and here.

#![forbid(unsafe_code)]

mod config;
mod digest;
mod error;
mod fingerprint;
mod header;
mod layout;
mod pack;
mod plan;
mod prologue;
mod section;
mod source;
#[cfg(test)]
mod test_model;
mod tokenizer;
mod tokenizer_build;
mod unpack;

pub use config::{ARCHITECTURE_QWEN2, ConfigError, Qwen2Config};
pub use digest::{Digest, ParseDigestError, Sha256, arena_digest, sha256};
pub use error::FormatError;
pub use fingerprint::{LAYOUT_FINGERPRINT, layout_fingerprint};
pub use header::{
    ARENA_ALIGN, CHUNK_BYTES, FORMAT_MAJOR, FORMAT_MINOR, HEADER_BYTES, MAGIC, MAX_PROLOGUE_BYTES,
    MAX_SECTION_BYTES, MAX_SECTIONS, SECTION_ALIGN,
};
pub use layout::{
    LayerLayout, PANEL, Qwen2Layout, ROW_BYTES, Span, TensorEntry, TensorKind, TensorRole, panel_bytes,
    panels_bytes, qwen2_weights_layout, vector_bytes,
};
pub use pack::{Counts, PackError, PackScratch, SourceDtype, TensorSource, pack_arena_range};
pub use plan::{FilePlan, NewSection, plan_file};
pub use prologue::{Prologue, Section, prologue_bytes};
pub use section::{
    CHAT_TEMPLATE, CONVERSION_REPORT, GENERATION, GenerationDefaults, MAX_STOP_TOKENS, ORIGIN, ReportEntry,
    TENSOR_TABLE, TOKEN_NAMES, report_file_name, report_from_bytes, report_to_bytes, tensor_table,
};
pub use source::{SourceTensor, qwen2_source_count, qwen2_source_tensors};
pub use tokenizer::{
    AddedToken, AddedTokens, CLASS_DIGIT, CLASS_LETTER, CLASS_NFC_INERT, CLASS_NUMBER, CLASS_SPACE,
    CLASS_WORD, DigitSplit, MAX_TOKEN_TEXT, MAX_TOKENS, TOKENIZER, Token, TokenizerSection, WordSplit,
};
pub use tokenizer_build::{TokenizerParts, tokenizer_section};
pub use unpack::unpack_tensor;
