//! A file in pieces that can be checked alone: prologue, sections, padding, chunks of the arena.

use mrt_format::{
    CONVERSION_REPORT, FormatError, GENERATION, GenerationDefaults, Prologue, TENSOR_TABLE, TOKENIZER,
    TokenizerSection, report_from_bytes,
};

/// A part of a file behind its prologue.
#[derive(Clone, Copy, Debug)]
pub enum Piece {
    /// Section of this index in the directory.
    Section(usize),
    /// Padding.
    Padding { offset: u64, bytes: u64 },
    /// Chunk of this index.
    Chunk(usize),
}

/// All pieces behind the prologue, in the order of their offsets. Padding of no bytes is left out.
pub fn pieces(prologue: &Prologue) -> Vec<Piece> {
    let padding = prologue.padding().map(|(offset, bytes)| Piece::Padding { offset, bytes });
    let sections = (0..prologue.sections().len()).map(Piece::Section);
    let chunks = (0..prologue.chunk_count()).map(Piece::Chunk);
    let mut pieces: Vec<_> = padding.chain(sections).chain(chunks).collect();
    pieces.retain(|piece| !matches!(piece, Piece::Padding { bytes: 0, .. }));
    // Stable, so that a section of no bytes stays before what follows at its offset.
    pieces.sort_by_key(|piece| piece.range(prologue).0);
    pieces
}

impl Piece {
    /// Its first byte in the file, and its length.
    pub fn range(self, prologue: &Prologue) -> (u64, u64) {
        match self {
            Piece::Section(i) => (prologue.sections()[i].offset, prologue.sections()[i].bytes),
            Piece::Padding { offset, bytes } => (offset, bytes),
            Piece::Chunk(i) => {
                let span = prologue.chunk(i);
                (prologue.arena_offset() + span.offset, span.bytes)
            }
        }
    }

    /// Checks its content: the digest, and what can be known of the content itself.
    pub fn check(self, prologue: &Prologue, content: &[u8]) -> Result<(), FormatError> {
        match self {
            Piece::Section(i) => {
                let name = prologue.sections()[i].name.as_str();
                prologue.check_section(name, content)?;
                match name {
                    TENSOR_TABLE => prologue.check_tensor_table(content),
                    CONVERSION_REPORT => report_from_bytes(prologue.config(), content).map(drop),
                    GENERATION => GenerationDefaults::from_bytes(prologue.config(), content).map(drop),
                    TOKENIZER => TokenizerSection::new(content).map(drop),
                    _ => Ok(()),
                }
            }
            Piece::Padding { offset, .. } => prologue.check_padding(offset, content),
            Piece::Chunk(i) => prologue.check_chunk(i, content),
        }
    }

    /// What it is, for messages.
    pub fn name(self, prologue: &Prologue) -> String {
        match self {
            Piece::Section(i) => format!("section {}", prologue.sections()[i].name),
            Piece::Padding { .. } => "padding".to_owned(),
            Piece::Chunk(i) => format!("chunk {i} of the weights"),
        }
    }

    /// The names of the tensors that it holds parts of.
    pub fn tensors(self, prologue: &Prologue) -> Vec<String> {
        let Piece::Chunk(i) = self else { return Vec::new() };
        let span = prologue.chunk(i);
        let tensors = prologue.layout().tensors(prologue.config());
        let overlaps = |t: &mrt_format::TensorEntry| t.span.offset < span.end() && span.offset < t.span.end();
        tensors.filter(overlaps).map(|t| t.name()).collect()
    }
}
