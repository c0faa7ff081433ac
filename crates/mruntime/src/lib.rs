//! The embeddable runtime: maps a `.mrt` file and runs the Qwen2 model in it.
//!
//! [`Model::open`] maps the weights, [`create_qwen2_arenas`] allocates all else ([`qwen2_memory_sizes`] says how much, before
//! it does), and from then on nothing is allocated: [`qwen2_forward`] gives logits, [`qwen2_generate`] continues a text, and
//! a [`Session`] keeps the KV cache of a conversation, which can be cut, forked, saved and loaded. Texts are token ids here;
//! the crate `mruntime-text` makes them of strings.
//!
//! ```no_run
//! use mruntime::*;
//!
//! let mut pool = Pool::new(performance_cores())?;
//! let model = Model::open("model.mrt", &OpenOptions::default(), &mut pool)?;
//! let (cfg, isa) = (*model.config(), Isa::detect());
//! let limits = Limits { context: 2048, batch: 512, threads: pool.threads() };
//! let mut arenas = create_qwen2_arenas(&cfg, &limits)?;
//! let kv = qwen2_init_kv_cache(&cfg, limits.context, &mut arenas.kv_cache.bump())?;
//! let scratch = qwen2_init_scratch(&cfg, &limits, isa, &mut arenas.scratch.bump())?;
//! let mut session = Session::new(cfg, model.weights(), kv, scratch);
//! let mut sampler = Sampler::new(SamplingOptions::GREEDY, cfg.vocab_size as usize, isa)?;
//!
//! session_prefill(&mut session, &[785, 6722, 315, 9625, 374], &mut pool)?;
//! let next = session_next(&mut session, &mut sampler, &mut pool)?;
//! # Ok::<(), Error>(())
//! ```
//!
//! The logits of a text have the same bits on every instruction set, with any number of threads and however the text was
//! computed, unless [`Scratch::set_numerics`] says otherwise. [`Model`] and [`Session`] may move between threads, and any
//! number of sessions may borrow one model; a [`Pool`] runs one call at a time.

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
