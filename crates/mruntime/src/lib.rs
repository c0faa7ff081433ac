//! The embeddable runtime: maps a `.mrt` file and runs the Qwen2 model in it.

#![deny(unsafe_code)]

pub mod arena;
pub mod error;
mod forward;
mod generate;
#[cfg(feature = "safetensors")]
pub mod hf;
mod kv_cache;
mod model;
mod ops;
#[expect(unsafe_code, reason = "maps files and asks the system")]
mod platform;
#[expect(unsafe_code, reason = "hands parts of borrowed data to other threads")]
pub mod pool;
mod prefault;
mod sampling;
mod session;
mod session_file;
mod weights;

pub use arena::{Arena, Bump, aligned_bytes};
pub use error::Error;
pub use forward::{
    Limits, MemorySizes, Observation, Qwen2Arenas, Scratch, Stage, create_qwen2_arenas, qwen2_forward,
    qwen2_forward_observed, qwen2_init_scratch, qwen2_memory_sizes,
};
pub use generate::{GenerateOptions, Generated, StopReason, qwen2_generate};
pub use kv_cache::{KvCache, qwen2_init_kv_cache};
pub use model::{Backing, Model, OpenOptions, Prefault, Verify};
pub use mrt_format::{Digest, FormatError, GenerationDefaults, Qwen2Config};
pub use mrt_kernels::{FastLane, Isa, Numerics};
pub use platform::performance_cores;
pub use pool::{Blocks, Chunks, PerWorker, Pool, Split};
pub use sampling::{Sampler, SamplingOptions, argmax, sample};
pub use session::{Session, session_feed, session_generate, session_logits, session_next, session_prefill};
pub use weights::{LayerWeights, Qwen2Weights};
