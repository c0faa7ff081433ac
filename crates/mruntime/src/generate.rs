//! Generation: prefill the prompt, then sample and decode one token at a time.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use mrt_format::Qwen2Config;

use crate::error::Error;
use crate::forward::{Scratch, qwen2_forward};
use crate::kv_cache::KvCache;
use crate::pool::Pool;
use crate::sampling::{Sampler, sample};
use crate::weights::Qwen2Weights;

/// When to stop.
#[derive(Clone, Copy, Debug)]
pub struct GenerateOptions<'a> {
    /// The most tokens to generate.
    pub max_new_tokens: usize,
    /// Tokens that end the answer; they are not part of it.
    pub stop_tokens: &'a [u32],
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// This stop token was chosen.
    StopToken(u32),
    /// As many tokens as allowed were generated.
    MaxNewTokens,
    /// The context has no room for another token.
    ContextFull,
    /// The callback said so.
    Callback,
}

/// What [`qwen2_generate`] did.
#[derive(Clone, Copy, Debug)]
pub struct Generated {
    /// Tokens of the prompt that were prefilled.
    pub prompt_tokens: usize,
    /// Tokens that were generated and handed to the callback.
    pub new_tokens: usize,
    /// Why it ended.
    pub reason: StopReason,
    /// Time from the call to the first token's logits.
    pub prefill: Duration,
    /// Time from then to the end.
    pub decode: Duration,
}

/// Prefills `prompt` at the next positions of `kv`, then generates; `on_token` gets each token and can stop.
///
/// Afterwards `kv` holds the prompt and all new tokens but the last, and after [`StopReason::StopToken`] that one too. The
/// sampler is told of new tokens; tokens of the prompt (for the repetition penalty) are the caller's to
/// [`observe`](Sampler::observe).
///
/// # Errors
/// As [`qwen2_forward`], for the prompt: the cache is then as it was.
///
/// # Panics
/// As [`qwen2_forward`], and when `on_token` does; `scratch` cannot be used any more then.
#[expect(clippy::too_many_arguments, reason = "flat: all state that takes part is named at the call")]
pub fn qwen2_generate(
    cfg: &Qwen2Config,
    weights: &Qwen2Weights<'_>,
    kv: &mut KvCache<'_>,
    scratch: &mut Scratch<'_>,
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions<'_>,
    pool: &mut Pool,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated, Error> {
    let start = Instant::now();
    // The logits live in the scratch arena; while the forward pass has the rest of it, they are held here.
    let logits = std::mem::take(&mut scratch.logits);
    let mut forward = |tokens: &[u32], kv: &mut KvCache<'_>, logits: &mut [f32]| {
        qwen2_forward(cfg, weights, kv, scratch, tokens, logits, pool)
    };
    let mut result = forward(prompt, kv, logits);
    let prefill = start.elapsed();
    let mut new_tokens = 0;
    let reason = loop {
        if result.is_err() || new_tokens == options.max_new_tokens {
            break StopReason::MaxNewTokens;
        }
        let token = sample(sampler, logits);
        if options.stop_tokens.contains(&token) {
            break StopReason::StopToken(token);
        }
        sampler.observe(token);
        new_tokens += 1;
        if on_token(token).is_break() {
            break StopReason::Callback;
        }
        if new_tokens == options.max_new_tokens {
            break StopReason::MaxNewTokens;
        }
        if kv.len() == kv.context() {
            break StopReason::ContextFull;
        }
        result = forward(&[token], kv, logits);
    };
    scratch.logits = logits;
    let decode = start.elapsed() - prefill;
    result.map(|()| Generated { prompt_tokens: prompt.len(), new_tokens, reason, prefill, decode })
}
