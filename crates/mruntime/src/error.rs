//! What can go wrong: one line that says what, where and what to do.

/// An error of the runtime.
#[derive(Debug, thiserror::Error)]
pub enum Error {
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
}
