//! What can go wrong: one line that says what, where and what to do.

use std::fmt;
use std::path::PathBuf;

use mrt_format::FormatError;

use crate::pool::MAX_THREADS;

/// An error of the runtime.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read or mapped.
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file is not what the format says.
    Format {
        /// The file.
        path: PathBuf,
        /// The rule that it breaks.
        problem: FormatError,
    },
    /// A full check has found damage.
    Damaged {
        /// The file.
        path: PathBuf,
        /// Every damaged section, padding and chunk.
        problems: Vec<FormatError>,
    },
    /// A model in memory at an address where its weights cannot be used.
    Unaligned {
        /// Where it begins.
        address: usize,
    },
    /// A pool of this many threads cannot be had.
    Threads {
        /// How many were asked for.
        threads: usize,
        /// Why not.
        reason: String,
    },
    /// An arena of this size cannot be had.
    Memory {
        /// How many bytes were asked for.
        bytes: u64,
        /// Why not.
        reason: String,
    },
    /// An arena is smaller than what is to be put into it.
    ArenaFull {
        /// The size of the next piece in bytes.
        wanted: u64,
        /// The bytes that are left.
        left: u64,
    },
    /// A weight arena that is not as the layout says.
    WeightArena {
        /// Bytes that the layout has.
        expected: u64,
        /// Bytes that the arena has.
        bytes: u64,
        /// Where the arena begins.
        address: usize,
    },
    /// A context of no positions, or longer than the model knows.
    Context {
        /// Positions asked for.
        context: usize,
        /// Bytes that its KV cache would need.
        bytes: u64,
        /// Positions that the model was trained for.
        trained: usize,
    },
    /// A batch that is zero, or a number of threads that no pool has.
    Limits {
        /// Tokens of a prefill step.
        batch: usize,
        /// Threads.
        threads: usize,
    },
    /// Nothing to run the model on.
    NoTokens,
    /// More tokens than there is room for.
    ContextFull {
        /// Tokens to be added.
        tokens: usize,
        /// Positions in use.
        used: usize,
        /// Positions in all.
        context: usize,
    },
    /// A token id outside the vocabulary.
    TokenId {
        /// The id.
        id: u32,
        /// Where in the tokens.
        index: usize,
        /// Size of the vocabulary.
        vocab: u32,
    },
    /// A sampling option outside its range.
    Sampling {
        /// Its name.
        option: &'static str,
        /// Its value.
        value: f32,
        /// What it may be.
        expected: &'static str,
    },
    /// A file that does not hold a session which this one can go on with.
    SessionFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        problem: String,
    },
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            Error::Format { problem, .. } => Some(problem),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io { path, source } => write!(f, "{}: {source}", path.display()),
            Error::Format { path, problem } => write!(f, "{}: {problem}", path.display()),
            Error::Damaged { path, problems } => {
                write!(f, "{}: damaged: {}; get the file again", path.display(), list_damage(problems))
            }
            Error::Unaligned { address } => {
                write!(f, "the model begins at address {address:#x}; align its bytes to 64")
            }
            Error::Threads { threads, reason } => write!(f, "cannot run on {threads} threads: {reason}"),
            Error::Memory { bytes, reason } => write!(f, "cannot allocate {bytes} bytes of memory: {reason}"),
            Error::ArenaFull { wanted, left } => {
                write!(f, "the arena is too small: {wanted} bytes wanted, {left} left")
            }
            Error::WeightArena { expected, bytes, address } => write!(
                f,
                "the weight arena has {bytes} bytes at address {address:#x}; it must have {expected} at a multiple of 64"
            ),
            Error::Context { context, bytes, trained } => write!(
                f,
                "a context of {context} tokens, whose KV cache would need {bytes} bytes; this model takes from 1 to \
                 {trained} tokens"
            ),
            Error::Limits { batch, threads } => {
                write!(
                    f,
                    "a batch of {batch} tokens on {threads} threads; both must be at least 1, threads at most {MAX_THREADS}"
                )
            }
            Error::NoTokens => f.write_str("no tokens: the prompt is empty"),
            Error::ContextFull { tokens, used, context } => write!(
                f,
                "{tokens} tokens do not fit into the context of {context}, of which {used} are used"
            ),
            Error::TokenId { id, index, vocab } => {
                write!(f, "token {id} at index {index} is outside the vocabulary of {vocab} tokens")
            }
            Error::Sampling { option, value, expected } => {
                write!(f, "{option} is {value}; it must be {expected}")
            }
            Error::SessionFile { path, problem } => write!(f, "{}: {problem}", path.display()),
        }
    }
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
