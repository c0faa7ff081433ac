//! Structures that a program fills, or has filled.

use mruntime::{
    Backing, Digest, GenerationDefaults, Isa, Numerics, OpenOptions, Prefault, SamplingOptions, Verify,
};

use crate::pointers::{WithSize, reference};
use crate::status::Failure;

/// How a model is opened. All zeros, or a null pointer, are the defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mruntime_open_options {
    /// sizeof(mruntime_open_options)
    pub size: usize,
    /// The root digest that the file must have, 32 bytes; NULL for any.
    pub expected_root: *const u8,
    /// Threads of the pool that the model's sessions share; 0 for one on each fast physical core.
    pub threads: u32,
    /// 0: the weights are mapped, and stay in the page cache. Nobody may truncate the file or write to it while it is
    /// open; replacing it by renaming another one over it is fine. 1: they are read into memory of the process's own.
    pub read: u32,
    /// 0: header, directory and tables are checked, sections when they are used. 1: every byte is.
    pub verify: u32,
    /// When mapped weights are brought into memory. 0: by their first use; 1: by a thread, meanwhile; 2: at opening.
    pub prefault: u32,
    /// 1: the weights are locked in memory, or opening fails. 0: they are not.
    pub lock: u32,
    /// 0
    pub reserved: u32,
}

/// A session's memory and threads. All zeros, or a null pointer, are the defaults.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct mruntime_session_options {
    /// sizeof(mruntime_session_options)
    pub size: usize,
    /// The most tokens of a text, prompt and answers together, but for a last one that nothing follows; 0 for 4096, or what
    /// the model was trained for.
    pub context: u64,
    /// Tokens of a prefill step; 0 for 512.
    pub batch: u32,
    /// 0: the session shares the model's pool with other sessions, a prefill step or token at a time. Otherwise it has a
    /// pool of its own of so many threads.
    pub threads: u32,
    /// 0: the same bits on every machine, for any number of threads and any batches. 1: what this machine is faster at, at
    /// the price of that; see fast_numerics of mruntime_info.
    pub numerics: u32,
    /// At most so many threads of the pool work when a step has one token only, as in generation; 0 for all. Such steps are
    /// bound by memory and can be fastest on fewer. The results are the same.
    pub decode_threads: u32,
}

/// How tokens are chosen. All zeros: the most probable one, always.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct mruntime_sampling {
    /// sizeof(mruntime_sampling)
    pub size: usize,
    /// Where the random numbers start: the same seed, the same choices.
    pub seed: u64,
    /// Divides the logits; 0 chooses the largest.
    pub temperature: f32,
    /// Only so many largest logits; 0 for all.
    pub top_k: u32,
    /// Only the most probable tokens whose probabilities sum to at least this; 0 or 1 for all.
    pub top_p: f32,
    /// Only tokens at least this probable relative to the most probable one; 0 for all.
    pub min_p: f32,
    /// Positive logits of tokens that occurred are divided by this, negative ones multiplied; 0 or 1 for none.
    pub repetition_penalty: f32,
    /// 0
    pub reserved: u32,
}

/// What a model is.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct mruntime_info {
    /// sizeof(mruntime_info)
    pub size: usize,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of the weights.
    pub weight_bytes: u64,
    /// The root digest (SHA-256), which names the content of the whole file.
    pub root: [u8; 32],
    /// Token ids are below this.
    pub vocab_size: u32,
    /// The longest context that the model was trained for.
    pub max_context: u32,
    /// Layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Width of the MLP.
    pub intermediate_size: u32,
    /// Query heads of a layer.
    pub heads: u32,
    /// Key and value heads of a layer.
    pub kv_heads: u32,
    /// Width of a head.
    pub head_dim: u32,
    /// 1 if the weights are mapped, 0 if they were read or given.
    pub mapped: u32,
    /// Threads of the pool that the model's sessions share.
    pub threads: u32,
    /// What numerics 1 of a session means on this machine: 0 the same as 0, for there is nothing faster; otherwise the
    /// number of a fast lane: 1 BF16 products, 2 FP16, 3 FP16 with FMLAL for one row, 4 KleidiAI's in FP16, 5 BF16
    /// products of AMX.
    pub fast_numerics: u32,
    /// 0
    pub reserved: u32,
}

/// Bytes that a session needs beside the weights.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct mruntime_memory {
    /// sizeof(mruntime_memory)
    pub size: usize,
    /// The weights, once for all sessions and, if they are mapped, for all processes.
    pub weights: u64,
    /// Keys and values: taken from the system as the context fills.
    pub kv_cache: u64,
    /// Activations and working memory of the threads.
    pub scratch: u64,
}

/// Why generation ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum mruntime_stop {
    /// As many tokens as allowed were generated.
    MRUNTIME_STOP_MAX_TOKENS = 0,
    /// The model ended its answer.
    MRUNTIME_STOP_TOKEN = 1,
    /// The context has no room for another token.
    MRUNTIME_STOP_CONTEXT_FULL = 2,
    /// The callback said so.
    MRUNTIME_STOP_CALLBACK = 3,
    /// mruntime_session_cancel was called.
    MRUNTIME_STOP_CANCELLED = 4,
}

/// What mruntime_session_generate did.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct mruntime_generated {
    /// sizeof(mruntime_generated)
    pub size: usize,
    /// Tokens that were handed to the callback.
    pub tokens: u64,
    /// Why it ended: an mruntime_stop.
    pub stop: u32,
    /// The token that ended it, if the model did.
    pub stop_token: u32,
}

impl Default for mruntime_open_options {
    fn default() -> Self {
        mruntime_open_options {
            size: 0,
            expected_root: std::ptr::null(),
            threads: 0,
            read: 0,
            verify: 0,
            prefault: 0,
            lock: 0,
            reserved: 0,
        }
    }
}

// SAFETY: repr(C), a size first, then numbers and raw pointers, for which any bytes are valid, without padding.
unsafe impl WithSize for mruntime_open_options {}
// SAFETY: as above.
unsafe impl WithSize for mruntime_session_options {}
// SAFETY: as above.
unsafe impl WithSize for mruntime_sampling {}
// SAFETY: as above.
unsafe impl WithSize for mruntime_info {}
// SAFETY: as above.
unsafe impl WithSize for mruntime_memory {}
// SAFETY: as above.
unsafe impl WithSize for mruntime_generated {}

/// One of `values`, by its number.
fn choice<T: Copy>(name: &str, number: u32, values: &[T]) -> Result<T, Failure> {
    let value = values.get(number as usize).copied();
    value.ok_or_else(|| {
        Failure::argument(format!("{name} is {number}; it must be from 0 to {}", values.len() - 1))
    })
}

impl mruntime_open_options {
    /// # Safety
    /// `expected_root` is null or points at 32 bytes.
    pub(crate) unsafe fn check(&self) -> Result<OpenOptions, Failure> {
        choice("reserved", self.reserved, &[()])?;
        let mut expected_root = None;
        if !self.expected_root.is_null() {
            // SAFETY: the caller's promise.
            expected_root = Some(Digest(*unsafe { reference(self.expected_root.cast(), "expected_root") }?));
        }
        Ok(OpenOptions {
            backing: choice("read", self.read, &[Backing::Map, Backing::Read])?,
            prefault: choice(
                "prefault",
                self.prefault,
                &[Prefault::OnUse, Prefault::Background, Prefault::AtOpen],
            )?,
            verify: choice("verify", self.verify, &[Verify::Header, Verify::Full])?,
            lock: choice("lock", self.lock, &[false, true])?,
            expected_root,
        })
    }
}

/// What numerics 1 of a session means.
pub(crate) fn fast_numerics() -> Numerics {
    Numerics::fast(Isa::detect()).unwrap_or(Numerics::Exact)
}

impl mruntime_session_options {
    pub(crate) fn numerics(&self) -> Result<Numerics, Failure> {
        choice("numerics", self.numerics, &[Numerics::Exact, fast_numerics()])
    }
}

impl mruntime_sampling {
    pub(crate) fn check(&self) -> Result<SamplingOptions, Failure> {
        choice("reserved", self.reserved, &[()])?;
        let unless_zero = |x: f32| if x == 0.0 { 1.0 } else { x };
        Ok(SamplingOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: unless_zero(self.top_p),
            min_p: self.min_p,
            repetition_penalty: unless_zero(self.repetition_penalty),
            seed: self.seed,
        })
    }

    pub(crate) fn from_defaults(defaults: &GenerationDefaults) -> mruntime_sampling {
        let SamplingOptions { temperature, top_k, top_p, min_p, repetition_penalty, seed } =
            SamplingOptions::from_defaults(defaults, 0);
        mruntime_sampling { size: 0, seed, temperature, top_k, top_p, min_p, repetition_penalty, reserved: 0 }
    }
}
