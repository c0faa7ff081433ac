//! A conversation: a KV cache together with the tokens that it holds, so that only new tokens are prefilled.

use std::ops::ControlFlow;

use mrt_format::Qwen2Config;

use crate::error::Error;
use crate::forward::Scratch;
use crate::generate::{GenerateOptions, Generated, qwen2_generate};
use crate::kv_cache::KvCache;
use crate::pool::Pool;
use crate::sampling::Sampler;
use crate::weights::Qwen2Weights;

/// The state of one conversation. The weights may be shared by any number of sessions.
pub struct Session<'a> {
    cfg: Qwen2Config,
    weights: Qwen2Weights<'a>,
    kv: KvCache<'a>,
    scratch: Scratch<'a>,
    /// The tokens in the cache, in order.
    tokens: Vec<u32>,
}

impl<'a> Session<'a> {
    /// An empty conversation over an empty cache.
    ///
    /// # Panics
    /// If `kv` is not empty.
    pub fn new(cfg: Qwen2Config, weights: Qwen2Weights<'a>, kv: KvCache<'a>, scratch: Scratch<'a>) -> Self {
        assert!(kv.is_empty(), "the tokens of a cache that is not empty are unknown");
        // One more than fits: the last generated token is noted before it is known not to be in the cache.
        let tokens = Vec::with_capacity(kv.context() + 1);
        Session { cfg, weights, kv, scratch, tokens }
    }

    /// The tokens that the cache holds.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Positions of the context.
    pub fn context(&self) -> usize {
        self.kv.context()
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.kv.truncate(0);
        self.tokens.clear();
    }
}

/// Generates after `prompt`, the tokens of the whole conversation so far. Of them, what the cache already holds (the
/// longest common prefix) is not computed again: by the numerics contract the answer has the same bits.
///
/// # Errors
/// When the prompt is empty or does not fit into the context, or a token id is outside the vocabulary.
pub fn session_generate(
    session: &mut Session<'_>,
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions<'_>,
    pool: &mut Pool,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated, Error> {
    let Session { cfg, weights, kv, scratch, tokens } = session;
    if prompt.len() > kv.context() {
        return Err(Error::ContextFull { tokens: prompt.len(), used: 0, context: kv.context() });
    }
    let common = tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
    // The last token is computed in any case: its logits are wanted.
    let reused = common.min(prompt.len().saturating_sub(1));
    kv.truncate(reused);
    tokens.truncate(reused);
    sampler.forget();
    for &token in prompt {
        sampler.observe(token);
    }
    let new = &prompt[reused..];
    tokens.extend_from_slice(new);
    let result = qwen2_generate(cfg, weights, kv, scratch, new, sampler, options, pool, |token| {
        tokens.push(token);
        on_token(token)
    });
    tokens.truncate(kv.len());
    result
}
