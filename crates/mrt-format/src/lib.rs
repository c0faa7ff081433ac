//! The `.mrt` model file: header, sections, weight layout, packing, digests and validation.
//!
//! The crate does no I/O: it turns bytes into checked structures and structures into bytes. `format-spec.md` in the
//! repository's root specifies the format; names are the same there and here.

#![forbid(unsafe_code)]

mod config;
mod layout;
mod pack;
mod source;
#[cfg(test)]
mod test_model;

pub use config::{ARCHITECTURE_QWEN2, ConfigError, Qwen2Config};
pub use layout::{
    LayerLayout, PANEL, Qwen2Layout, ROW_BYTES, Span, TensorEntry, TensorKind, TensorRole, panel_bytes,
    panels_bytes, qwen2_weights_layout, vector_bytes,
};
pub use pack::{Counts, PackError, PackScratch, SourceDtype, TensorSource, pack_arena_range};
pub use source::{SourceTensor, qwen2_source_count, qwen2_source_tensors};
