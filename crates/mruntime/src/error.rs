//! What can go wrong: one line that says what, where and what to do.

use std::path::PathBuf;

use mrt_format::FormatError;

/// An error of the runtime.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or mapped.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file is not what the format says.
    #[error("{}: {problem}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The rule that it breaks.
        #[source]
        problem: FormatError,
    },
    /// A full check has found damage.
    #[error("{}: damaged: {}; get the file again", path.display(), list_damage(problems))]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Every damaged section, padding and chunk.
        problems: Vec<FormatError>,
    },
    /// A model in memory at an address where its weights cannot be used.
    #[error("the model begins at address {address:#x}; align its bytes to 64")]
    Unaligned {
        /// Where it begins.
        address: usize,
    },
    /// A pool of this many threads cannot be had.
    #[error("cannot run on {threads} threads: {reason}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// Why not.
        reason: String,
    },
    /// An arena of this size cannot be had.
    #[error("cannot allocate {bytes} bytes of memory: {reason}")]
    Memory {
        /// How many bytes were asked for.
        bytes: u64,
        /// Why not.
        reason: String,
    },
    /// An arena is smaller than what is to be put into it.
    #[error("the arena is too small: {wanted} bytes wanted, {left} left")]
    ArenaFull {
        /// The size of the next piece in bytes.
        wanted: u64,
        /// The bytes that are left.
        left: u64,
    },
    /// A weight arena that is not as the layout says.
    #[error(
        "the weight arena has {bytes} bytes at address {address:#x}; it must have {expected} at a multiple of 64"
    )]
    WeightArena {
        /// Bytes that the layout has.
        expected: u64,
        /// Bytes that the arena has.
        bytes: u64,
        /// Where the arena begins.
        address: usize,
    },
    /// A context of no positions, or longer than the model knows.
    #[error("a context of {context} tokens; this model takes from 1 to {trained}")]
    Context {
        /// Positions asked for.
        context: usize,
        /// Positions that the model was trained for.
        trained: usize,
    },
    /// A batch or number of threads that is zero.
    #[error("a batch of {batch} tokens on {threads} threads; both must be at least 1")]
    Limits {
        /// Tokens of a prefill step.
        batch: usize,
        /// Threads.
        threads: usize,
    },
    /// Nothing to run the model on.
    #[error("no tokens: the prompt is empty")]
    NoTokens,
    /// More tokens than there is room for.
    #[error("{tokens} tokens do not fit into the context of {context}, of which {used} are used")]
    ContextFull {
        /// Tokens to be added.
        tokens: usize,
        /// Positions in use.
        used: usize,
        /// Positions in all.
        context: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token {id} at index {index} is outside the vocabulary of {vocab} tokens")]
    TokenId {
        /// The id.
        id: u32,
        /// Where in the tokens.
        index: usize,
        /// Size of the vocabulary.
        vocab: u32,
    },
    /// A sampling option outside its range.
    #[error("{option} is {value}; it must be {expected}")]
    Sampling {
        /// Its name.
        option: &'static str,
        /// Its value.
        value: f32,
        /// What it may be.
        expected: &'static str,
    },
}

/// Damaged places in a list; chunks that follow one another are one place.
fn list_damage(problems: &[FormatError]) -> String {
    let is_next = |a: &FormatError, b: &FormatError| {
        matches!((a, b), (FormatError::ChunkDamaged { index: a, .. }, FormatError::ChunkDamaged { index: b, .. })
            if a + 1 == *b)
    };
    let places = problems.chunk_by(is_next).map(|run| match (&run[0], &run[run.len() - 1]) {
        (
            FormatError::ChunkDamaged { index: a, offset, .. },
            FormatError::ChunkDamaged { index: b, end, .. },
        ) => {
            let chunks = if a == b { format!("chunk {a}") } else { format!("chunks {a} to {b}") };
            format!("{chunks} (bytes {offset} to {end})")
        }
        (FormatError::SectionDamaged { name, offset, end }, _) => {
            format!("section {name} (bytes {offset} to {end})")
        }
        (FormatError::PaddingNotZero { offset }, _) => format!("padding (byte {offset})"),
        (problem, _) => problem.to_string(),
    });
    places.collect::<Vec<_>>().join(", ")
}
