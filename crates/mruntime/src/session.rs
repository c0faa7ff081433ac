//! A conversation: a KV cache together with the tokens of the text, so that only new tokens are computed.
//!
//! By the numerics contract, tokens that are not computed again, because a session was cut, forked, saved and loaded,
//! or because a prompt begins as the one before did, leave the same bits as those that are; not so on a fast lane.

use std::ops::ControlFlow;

use mrt_format::Qwen2Config;

use crate::error::Error;
use crate::forward::{Scratch, check_ids, qwen2_forward};
use crate::generate::{GenerateOptions, Generated, qwen2_generate};
use crate::kv_cache::KvCache;
use crate::pool::Pool;
use crate::sampling::{Sampler, sample};
use crate::weights::Qwen2Weights;

/// The state of one conversation. The weights may be shared by any number of sessions.
pub struct Session<'a> {
    pub(crate) cfg: Qwen2Config,
    weights: Qwen2Weights<'a>,
    pub(crate) kv: KvCache<'a>,
    pub(crate) scratch: Scratch<'a>,
    /// The text. The cache holds all of it or all but the last token, which has been chosen and not been computed.
    pub(crate) tokens: Vec<u32>,
    /// Whether the scratch memory has the logits of the last token.
    pub(crate) has_logits: bool,
}

impl<'a> Session<'a> {
    /// An empty conversation over an empty cache.
    ///
    /// # Panics
    /// If `kv` is not empty.
    pub fn new(cfg: Qwen2Config, weights: Qwen2Weights<'a>, kv: KvCache<'a>, scratch: Scratch<'a>) -> Self {
        assert!(kv.is_empty(), "the tokens of a cache that is not empty are unknown");
        // One more than fits: the last token that is chosen may have no room in the cache.
        let tokens = Vec::with_capacity(kv.context() + 1);
        Session { cfg, weights, kv, scratch, tokens, has_logits: false }
    }

    /// The text so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Positions of the context.
    pub fn context(&self) -> usize {
        self.kv.context()
    }

    /// The working memory and what it is set to.
    pub fn scratch(&self) -> &Scratch<'a> {
        &self.scratch
    }

    /// Says how many threads of a pool work from now on; see [`Scratch::set_threads`].
    ///
    /// # Panics
    /// When a number is 0.
    pub fn set_threads(&mut self, prefill: usize, decode: usize) {
        self.scratch.set_threads(prefill, decode);
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.truncate(0);
    }

    /// Forgets the tokens from `len` on.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn truncate(&mut self, len: usize) {
        assert!(len <= self.tokens.len(), "a text of {} tokens cut to {len}", self.tokens.len());
        if len < self.tokens.len() {
            self.tokens.truncate(len);
            self.kv.truncate(len.min(self.kv.len()));
            self.has_logits = false;
        }
    }

    /// A second session with the same text, numerics and numbers of threads, in memory of its own: what both have in common
    /// is computed once. `kv` and `scratch` are new ones for the same model; the context may have another size.
    ///
    /// # Errors
    /// When the text does not fit into the context of `kv`.
    ///
    /// # Panics
    /// If `kv` was made for another model.
    pub fn fork(&self, mut kv: KvCache<'a>, mut scratch: Scratch<'a>) -> Result<Session<'a>, Error> {
        // The last token may have no room; it has none here then, either.
        if self.kv.len() > kv.context() || self.tokens.len() > kv.context() + 1 {
            let (tokens, context) = (self.tokens.len(), kv.context());
            return Err(Error::ContextFull { tokens, used: 0, context });
        }
        kv.copy_from(&self.kv);
        scratch.set_numerics(self.scratch.numerics());
        let (prefill, decode) = self.scratch.threads();
        scratch.set_threads(prefill, decode);
        let mut tokens = Vec::with_capacity(kv.context() + 1);
        tokens.extend_from_slice(&self.tokens);
        Ok(Session { cfg: self.cfg, weights: self.weights, kv, scratch, tokens, has_logits: false })
    }

    /// Tokens at the beginning of `prompt` that the cache holds, so that they need not be computed.
    pub fn reusable(&self, prompt: &[u32]) -> usize {
        let same = self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        same.min(self.kv.len())
    }

    /// Whether `tokens` can follow the first `used` tokens of a text.
    ///
    /// # Errors
    /// When there are none, they do not fit into the context, or one is outside the vocabulary.
    pub fn check_tokens(&self, tokens: &[u32], used: usize) -> Result<(), Error> {
        if tokens.is_empty() {
            return Err(Error::NoTokens);
        }
        let context = self.kv.context();
        if tokens.len() > context.saturating_sub(used) {
            return Err(Error::ContextFull { tokens: tokens.len(), used, context });
        }
        check_ids(&self.cfg, tokens)
    }

    /// Computes the tokens that the cache does not hold, with the logits of the last one.
    fn compute(&mut self, pool: &mut Pool) -> Result<(), Error> {
        let Session { cfg, weights, kv, scratch, tokens, has_logits } = self;
        // The logits live in the scratch arena; while the forward pass has the rest of it, they are held here.
        let logits = std::mem::take(&mut scratch.logits);
        let result = qwen2_forward(cfg, weights, kv, scratch, &tokens[kv.len()..], logits, pool);
        scratch.logits = logits;
        *has_logits = result.is_ok();
        result
    }
}

/// Appends `tokens` to the text.
///
/// # Errors
/// When there are none, they do not fit into the context, or one is outside the vocabulary. The text is then as it was.
///
/// # Panics
/// As [`qwen2_forward`]; the session cannot be used any more then.
pub fn session_feed(session: &mut Session<'_>, tokens: &[u32], pool: &mut Pool) -> Result<(), Error> {
    session.check_tokens(tokens, session.tokens.len())?;
    session.tokens.extend_from_slice(tokens);
    session.compute(pool)
}

/// Makes `prompt` the text. Of it, what the cache already holds (the longest common prefix) is not computed again; the
/// number of these tokens is returned.
///
/// # Errors
/// As [`session_feed`].
///
/// # Panics
/// As [`session_feed`].
pub fn session_prefill(session: &mut Session<'_>, prompt: &[u32], pool: &mut Pool) -> Result<usize, Error> {
    session.check_tokens(prompt, 0)?;
    let reused = session.reusable(prompt);
    session.truncate(reused);
    if reused < prompt.len() {
        session_feed(session, &prompt[reused..], pool)?;
    }
    Ok(reused)
}

/// The logits (f32, one for each token id) that follow the text. They may be changed, for example to forbid tokens (by
/// negative infinity), before [`session_next`] chooses by them.
///
/// # Errors
/// When the text is empty, or its last token has no room in the context.
///
/// # Panics
/// As [`session_feed`].
pub fn session_logits<'s>(session: &'s mut Session<'_>, pool: &mut Pool) -> Result<&'s mut [f32], Error> {
    if !session.has_logits {
        let Some(last) = session.tokens.len().checked_sub(1) else { return Err(Error::NoTokens) };
        // A forked or loaded session has no logits. Its last token is computed again.
        session.kv.truncate(last.min(session.kv.len()));
        session.compute(pool)?;
    }
    Ok(session.scratch.logits)
}

/// Chooses the next token by the logits and appends it to the text. It is computed when it is needed: by the next call.
///
/// The sampler is told of the token. Tokens of the text (for the repetition penalty) are the caller's to
/// [`observe`](Sampler::observe).
///
/// # Errors
/// As [`session_logits`].
///
/// # Panics
/// As [`session_feed`].
pub fn session_next(session: &mut Session<'_>, sampler: &mut Sampler, pool: &mut Pool) -> Result<u32, Error> {
    let token = sample(sampler, session_logits(session, pool)?);
    sampler.observe(token);
    session.tokens.push(token);
    session.has_logits = false;
    Ok(token)
}

/// Generates after `prompt`, the tokens of the whole conversation so far. Of them, what the cache already holds (the
/// longest common prefix) is not computed again: by the numerics contract the answer of exact numerics has the same bits.
///
/// # Errors
/// When the prompt is empty or does not fit into the context, or a token id is outside the vocabulary. The text is then as
/// it was.
///
/// # Panics
/// As [`session_feed`], and when `on_token` does; the session cannot be used any more then.
pub fn session_generate(
    session: &mut Session<'_>,
    prompt: &[u32],
    sampler: &mut Sampler,
    options: &GenerateOptions<'_>,
    pool: &mut Pool,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated, Error> {
    session.check_tokens(prompt, 0)?;
    // The last token is computed in any case: its logits are wanted.
    let reused = session.reusable(prompt).min(prompt.len() - 1);
    session.truncate(reused);
    session.has_logits = false;
    sampler.forget();
    for &token in prompt {
        sampler.observe(token);
    }
    let Session { cfg, weights, kv, scratch, tokens, .. } = session;
    let new = &prompt[reused..];
    tokens.extend_from_slice(new);
    qwen2_generate(cfg, weights, kv, scratch, new, sampler, options, pool, |token| {
        tokens.push(token);
        on_token(token)
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;
    use crate::forward::tests::{CFG, random_arena, tokens};
    use crate::{Isa, Limits, Qwen2Arenas, SamplingOptions, StopReason, create_qwen2_arenas};
    use crate::{qwen2_init_kv_cache, qwen2_init_scratch};

    const LIMITS: Limits = Limits { context: 100, batch: 16, threads: 2 };

    fn arenas(context: usize) -> (Qwen2Arenas, Limits) {
        let limits = Limits { context, ..LIMITS };
        (create_qwen2_arenas(&CFG, &limits).unwrap(), limits)
    }

    fn parts<'a>((arenas, limits): &'a mut (Qwen2Arenas, Limits)) -> (KvCache<'a>, Scratch<'a>) {
        let kv = qwen2_init_kv_cache(&CFG, limits.context, &mut arenas.kv_cache.bump()).unwrap();
        (kv, qwen2_init_scratch(&CFG, limits, Isa::detect(), &mut arenas.scratch.bump()).unwrap())
    }

    fn bits(logits: &[f32]) -> Vec<u32> {
        logits.iter().map(|x| x.to_bits()).collect()
    }

    /// What follows: `n` tokens and the logits after them.
    pub(crate) fn continuation(session: &mut Session<'_>, n: usize, pool: &mut Pool) -> (Vec<u32>, Vec<u32>) {
        let options = SamplingOptions { temperature: 1.0, seed: 7, ..SamplingOptions::GREEDY };
        let mut sampler = Sampler::new(options, CFG.vocab_size as usize, Isa::detect()).unwrap();
        let chosen = (0..n).map(|_| session_next(session, &mut sampler, pool).unwrap()).collect();
        (chosen, bits(session_logits(session, pool).unwrap()))
    }

    /// Calls `f` with a new session of that context.
    pub(crate) fn with_session<T>(context: usize, f: impl FnOnce(Session<'_>, &mut Pool) -> T) -> T {
        let (mut arenas, weights) = (arenas(context), random_arena());
        let weights = Qwen2Weights::from_arena(&CFG, weights.bytes()).unwrap();
        let (kv, scratch) = parts(&mut arenas);
        f(Session::new(CFG, weights, kv, scratch), &mut Pool::new(2).unwrap())
    }

    #[test]
    fn a_fork_continues_as_the_original_whatever_its_context() {
        for filled in [1, 31, 32, 33, 70] {
            for context in [100, 90, 400] {
                let mut other = arenas(context);
                with_session(100, |mut session, pool| {
                    session_feed(&mut session, &tokens(filled), pool).unwrap();
                    let (kv, scratch) = parts(&mut other);
                    session.set_threads(2, 1);
                    let mut fork = session.fork(kv, scratch).unwrap();
                    assert_eq!(fork.tokens(), session.tokens());
                    assert_eq!(fork.scratch().threads(), (2, 1));
                    let expected = continuation(&mut session, 10, pool);
                    assert!(continuation(&mut fork, 10, pool) == expected, "{filled} {context}");
                    // They have nothing in common from here on.
                    session_feed(&mut fork, &[3, 4], pool).unwrap();
                    let (kv, scratch) = (fork.tokens().len(), session.tokens().len());
                    assert_eq!((kv, scratch), (filled + 12, filled + 10));
                });
            }
        }
    }

    #[test]
    fn sessions_and_models_may_move_between_threads_and_be_shared() {
        fn threads_may_share<T: Send + Sync>() {}
        threads_may_share::<Session<'_>>();
        threads_may_share::<crate::Model>();
        threads_may_share::<Pool>();
    }

    #[test]
    fn a_fork_into_a_context_that_is_too_small_is_refused() {
        let mut other = arenas(20);
        with_session(100, |mut session, pool| {
            session_feed(&mut session, &tokens(21), pool).unwrap();
            let (kv, scratch) = parts(&mut other);
            let error = session.fork(kv, scratch).err().unwrap().to_string();
            assert_eq!(error, "21 tokens do not fit into the context of 20, of which 0 are used");
        });
    }

    #[test]
    fn what_is_reused_leaves_the_same_bits_as_what_is_computed() {
        let fresh = |text: &[u32]| {
            with_session(100, |mut session, pool| {
                assert_eq!(session_prefill(&mut session, text, pool).unwrap(), 0);
                continuation(&mut session, 5, pool)
            })
        };
        with_session(100, |mut session, pool| {
            let text = tokens(60);
            session_prefill(&mut session, &text[..50], pool).unwrap();
            // Longer, the same, shorter, and other from some token on.
            for (prompt, reused) in [
                (text.clone(), 50),
                (text.clone(), 60),
                (text[..20].to_vec(), 20),
                ([&text[..10], &[1, 2, 3]].concat(), 10),
            ] {
                assert_eq!(session_prefill(&mut session, &prompt, pool).unwrap(), reused);
                assert_eq!(session.tokens(), prompt);
                assert!(continuation(&mut session, 5, pool) == fresh(&prompt));
                session.truncate(prompt.len());
            }
        });
    }

    #[test]
    fn a_text_that_was_cut_goes_on_as_if_it_had_ended_there() {
        with_session(100, |mut session, pool| {
            session_feed(&mut session, &tokens(40), pool).unwrap();
            let expected = continuation(&mut session, 8, pool);
            for cut in [40, 43, 47, 48] {
                session.truncate(cut);
                let (rest, logits) = continuation(&mut session, 0, pool);
                assert!(rest.is_empty() && session.tokens()[40..] == expected.0[..cut - 40]);
                session_feed(&mut session, &expected.0[cut - 40..], pool).err();
                assert!(cut == 48 || bits(session_logits(&mut session, pool).unwrap()) == expected.1);
                assert!(cut < 48 || logits == expected.1);
            }
            session.reset();
            assert!(session.tokens().is_empty());
            assert!(matches!(session_logits(&mut session, pool), Err(Error::NoTokens)));
        });
    }

    #[test]
    fn generating_and_choosing_one_by_one_are_the_same() {
        with_session(100, |mut session, pool| {
            let prompt = tokens(30);
            session_prefill(&mut session, &prompt, pool).unwrap();
            let (expected, logits) = continuation(&mut session, 9, pool);
            let options = SamplingOptions { temperature: 1.0, seed: 7, ..SamplingOptions::GREEDY };
            let mut sampler = Sampler::new(options, CFG.vocab_size as usize, Isa::detect()).unwrap();
            let options = GenerateOptions { max_new_tokens: 9, stop_tokens: &[] };
            let all = |_| ControlFlow::Continue(());
            session_generate(&mut session, &prompt, &mut sampler, &options, pool, all).unwrap();
            assert_eq!(session.tokens()[30..], expected);
            assert!(bits(session_logits(&mut session, pool).unwrap()) == logits);
        });
    }

    #[test]
    fn another_thread_ends_generation_and_the_text_goes_on_as_if_nothing_had_been() {
        let prompt = tokens(30);
        let expected = with_session(100, |mut session, pool| {
            session_prefill(&mut session, &prompt, pool).unwrap();
            continuation(&mut session, 20, pool)
        });
        with_session(100, |mut session, pool| {
            let options = SamplingOptions { temperature: 1.0, seed: 7, ..SamplingOptions::GREEDY };
            let mut sampler = Sampler::new(options, CFG.vocab_size as usize, Isa::detect()).unwrap();
            let options = GenerateOptions { max_new_tokens: 60, stop_tokens: &[] };
            // Both threads meet twice: when the fifth token is there, and when the flag is set.
            let (cancel, meeting, mut seen) = (AtomicBool::new(false), Barrier::new(2), 0);
            let done = thread::scope(|scope| {
                scope.spawn(|| {
                    meeting.wait();
                    cancel.store(true, Ordering::Relaxed);
                    meeting.wait();
                });
                session_generate(&mut session, &prompt, &mut sampler, &options, pool, |_| {
                    seen += 1;
                    if seen == 5 {
                        meeting.wait();
                        meeting.wait();
                    }
                    if cancel.load(Ordering::Relaxed) {
                        ControlFlow::Break(())
                    } else {
                        ControlFlow::Continue(())
                    }
                })
            });
            let done = done.unwrap();
            assert_eq!((done.new_tokens, done.reason), (5, StopReason::Callback));
            for _ in 5..20 {
                session_next(&mut session, &mut sampler, pool).unwrap();
            }
            assert_eq!(session.tokens()[30..], expected.0);
            assert!(bits(session_logits(&mut session, pool).unwrap()) == expected.1);
        });
    }

    #[test]
    fn what_is_refused_changes_nothing() {
        with_session(20, |mut session, pool| {
            session_feed(&mut session, &tokens(18), pool).unwrap();
            let logits = bits(session_logits(&mut session, pool).unwrap());
            for bad in [&[][..], &[1, 2, 3], &[75]] {
                assert!(session_feed(&mut session, bad, pool).is_err());
                assert_eq!(session.tokens(), tokens(18));
                assert!(bits(session_logits(&mut session, pool).unwrap()) == logits);
            }
            assert!(session_prefill(&mut session, &tokens(21), pool).is_err());
            assert_eq!(session.tokens(), tokens(18));
            // One that is chosen and not computed yet is none of those that are refused.
            let mut sampler = Sampler::new(SamplingOptions::GREEDY, 75, Isa::detect()).unwrap();
            session_next(&mut session, &mut sampler, pool).unwrap();
            let error = session_feed(&mut session, &[75], pool).unwrap_err().to_string();
            assert_eq!(error, "token 75 at index 0 is outside the vocabulary of 75 tokens");
            session.truncate(18);
            // A last token is chosen for which there is no room.
            for _ in 0..3 {
                session_next(&mut session, &mut sampler, pool).unwrap();
            }
            let error = session_next(&mut session, &mut sampler, pool).unwrap_err().to_string();
            assert_eq!(error, "1 tokens do not fit into the context of 20, of which 20 are used");
            assert!(session_feed(&mut session, &[1], pool).is_err());
            assert_eq!(session.tokens().len(), 21);
        });
    }
}
