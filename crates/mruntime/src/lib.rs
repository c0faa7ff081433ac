//! The embeddable runtime: maps a `.mrt` file and runs the Qwen2 model in it.

#![deny(unsafe_code)]

pub mod arena;
pub mod error;
#[expect(unsafe_code, reason = "hands parts of borrowed data to other threads")]
pub mod pool;

pub use arena::{Arena, Bump, aligned_bytes};
pub use error::Error;
pub use pool::{Chunks, PerWorker, Pool, Split};
