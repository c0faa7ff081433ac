//! Sessions: a text and its KV cache, fed and continued token by token.

use std::ffi::{c_char, c_void};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use mruntime::{
    Error, Isa, Limits, Pool, Qwen2Arenas, Qwen2Weights, Sampler, SamplingOptions, Session,
    create_qwen2_arenas, qwen2_init_kv_cache, qwen2_init_scratch, session_feed, session_logits, session_next,
};

use crate::model::{Shared, close, mruntime_model};
use crate::options::{mruntime_generated, mruntime_sampling, mruntime_session_options, mruntime_stop};
use crate::pointers::{c_text, check_pointer, fill, read_sized, reference, sized, slice, store, write_sized};
use crate::status::{Failure, guard, mruntime_status};

/// A text, with its KV cache.
pub struct mruntime_session {
    /// Set by another thread to end the call that runs.
    cancel: AtomicBool,
    state: Mutex<State>,
}

/// What the header's thread rules rest on.
const _: () = {
    const fn threads_may_share<T: Send + Sync>() {}
    threads_may_share::<mruntime_model>();
    threads_may_share::<mruntime_session>();
};

/// What a session works with.
pub(crate) struct State {
    /// Borrows `arenas` and the weights in `shared`; before both, so that it is dropped before them.
    session: Session<'static>,
    sampler: Sampler,
    /// Of its own, if it does not share the model's.
    pool: Option<Pool>,
    limits: Limits,
    _arenas: Qwen2Arenas,
    pub shared: Arc<Shared>,
}

/// What a session's options say about memory.
pub(crate) fn limits(shared: &Shared, options: &mruntime_session_options) -> Limits {
    const CONTEXT: usize = 4096;
    const BATCH: usize = 512;
    let or = |number: usize, default| if number == 0 { default } else { number };
    let trained = shared.model.config().max_position_embeddings as usize;
    Limits {
        context: or(usize::try_from(options.context).unwrap_or(usize::MAX), trained.min(CONTEXT)),
        batch: or(options.batch as usize, BATCH),
        threads: or(options.threads as usize, shared.threads),
    }
}

impl State {
    /// A session with memory of its own, filled by `start`.
    fn new(
        shared: &Arc<Shared>,
        limits: Limits,
        own_pool: bool,
        options: SamplingOptions,
        start: impl FnOnce(
            Qwen2Weights<'static>,
            mruntime::KvCache<'static>,
            mruntime::Scratch<'static>,
        ) -> Result<Session<'static>, Error>,
    ) -> Result<State, Failure> {
        let shared = Arc::clone(shared);
        let (cfg, isa) = (*shared.model.config(), Isa::detect());
        let mut arenas = create_qwen2_arenas(&cfg, &limits)?;
        // SAFETY: an arena's memory and the weights are not in these structures but behind pointers, and stay where they
        // are when the structures move. Until `session` is dropped, nobody uses the arenas and nobody drops any of them:
        // `State` owns the arenas and a share of the model, and drops `session` first. If this function fails before
        // `State` exists, whatever borrows them is dropped in `start` or at its call, before `arenas` and `shared`.
        let (weights, kv_arena, scratch_arena) = unsafe {
            (
                extend(&shared.model).weights(),
                extend_mut(&mut arenas.kv_cache),
                extend_mut(&mut arenas.scratch),
            )
        };
        let kv = qwen2_init_kv_cache(&cfg, limits.context, &mut kv_arena.bump())?;
        let scratch = qwen2_init_scratch(&cfg, &limits, isa, &mut scratch_arena.bump())?;
        let session = start(weights, kv, scratch)?;
        let pool = if own_pool { Some(Pool::new(limits.threads)?) } else { None };
        let sampler = Sampler::new(options, cfg.vocab_size as usize, isa)?;
        Ok(State { session, sampler, pool, limits, _arenas: arenas, shared })
    }

    /// Runs `f` with the session's pool, or with the model's when it is its turn.
    fn with_pool<T>(&mut self, f: impl FnOnce(&mut Session<'static>, &mut Sampler, &mut Pool) -> T) -> T {
        let State { session, sampler, pool, shared, .. } = self;
        match pool {
            Some(pool) => f(session, sampler, pool),
            None => shared.pool.with(|pool| f(session, sampler, pool)),
        }
    }

    /// Appends tokens to the text. If it fails or is cancelled, the text is as it was.
    pub(crate) fn feed(&mut self, tokens: &[u32], cancel: &AtomicBool) -> Result<(), Failure> {
        // All of them, before the first prefill step.
        self.session.check_tokens(tokens, self.session.tokens().len())?;
        self.append(tokens, cancel)
    }

    /// Appends tokens that were checked, a prefill step at a time.
    fn append(&mut self, tokens: &[u32], cancel: &AtomicBool) -> Result<(), Failure> {
        let before = self.session.tokens().len();
        let result = tokens.chunks(self.limits.batch).try_for_each(|step| {
            check_cancel(cancel)?;
            Ok(self.with_pool(|session, _, pool| session_feed(session, step, pool))?)
        });
        if result.is_err() {
            self.session.truncate(before);
        }
        result
    }

    fn next(&mut self) -> Result<u32, Failure> {
        self.sampler.forget();
        self.session.tokens().iter().for_each(|&token| self.sampler.observe(token));
        Ok(self.with_pool(session_next)?)
    }

    /// Generates; see `mruntime_session_generate`. `on_token` returns whether to go on.
    pub(crate) fn generate(
        &mut self,
        max_tokens: u64,
        cancel: &AtomicBool,
        mut on_token: impl FnMut(u32) -> bool,
    ) -> Result<mruntime_generated, Failure> {
        let stop = mruntime_stop::MRUNTIME_STOP_MAX_TOKENS as u32;
        let mut done = mruntime_generated { stop, ..Default::default() };
        while done.tokens < max_tokens {
            if cancel.load(Ordering::Relaxed) {
                done.stop = mruntime_stop::MRUNTIME_STOP_CANCELLED as u32;
                break;
            }
            if self.session.tokens().len() > self.session.context() {
                done.stop = mruntime_stop::MRUNTIME_STOP_CONTEXT_FULL as u32;
                break;
            }
            let token = self.next()?;
            if self.shared.stop_tokens.contains(&token) {
                self.session.truncate(self.session.tokens().len() - 1);
                (done.stop, done.stop_token) = (mruntime_stop::MRUNTIME_STOP_TOKEN as u32, token);
                break;
            }
            done.tokens += 1;
            if !on_token(token) {
                done.stop = mruntime_stop::MRUNTIME_STOP_CALLBACK as u32;
                break;
            }
        }
        Ok(done)
    }
}

fn check_cancel(cancel: &AtomicBool) -> Result<(), Failure> {
    match cancel.load(Ordering::Relaxed) {
        true => Err(Failure::new(mruntime_status::MRUNTIME_CANCELLED, "cancelled")),
        false => Ok(()),
    }
}

/// # Safety
/// The result must not be used after `value`'s owner moves what it borrows, or drops it.
unsafe fn extend<T>(value: &T) -> &'static T {
    // SAFETY: the caller's duty.
    unsafe { &*std::ptr::from_ref(value) }
}

/// # Safety
/// As [`extend`]; and nobody else may use `value` as long as the result is in use.
unsafe fn extend_mut<T>(value: &mut T) -> &'static mut T {
    // SAFETY: the caller's duty.
    unsafe { &mut *std::ptr::from_mut(value) }
}

impl mruntime_session {
    pub(crate) fn lock(&self) -> Result<MutexGuard<'_, State>, Failure> {
        match self.state.try_lock() {
            Ok(state) => Ok(state),
            Err(TryLockError::WouldBlock) => {
                Err(Failure::new(mruntime_status::MRUNTIME_BUSY, "another call is using the session"))
            }
            Err(TryLockError::Poisoned(_)) => {
                let message = "an earlier call failed half way: close the session";
                Err(Failure::new(mruntime_status::MRUNTIME_INTERNAL, message))
            }
        }
    }

    /// The session for a call that can be cancelled.
    pub(crate) fn start(&self) -> Result<(MutexGuard<'_, State>, &AtomicBool), Failure> {
        let state = self.lock()?;
        self.cancel.store(false, Ordering::Relaxed);
        Ok((state, &self.cancel))
    }

    fn into_handle(state: State) -> *mut mruntime_session {
        Box::into_raw(Box::new(mruntime_session { cancel: AtomicBool::new(false), state: Mutex::new(state) }))
    }
}

/// Creates a session with an empty text; it chooses the most probable tokens until it is told otherwise. `options` may be
/// NULL. All memory that tokens are computed in is taken here: to feed, prefill and generate tokens allocates nothing. On
/// failure, `*session` is NULL.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_create(
    model: *const mruntime_model,
    options: *const mruntime_session_options,
    session: *mut *mut mruntime_session,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        store(session, std::ptr::null_mut(), "session")?;
        let shared = &reference(model, "model")?.0;
        let options = read_sized(options, "options")?;
        let (numerics, cfg) = (options.numerics()?, *shared.model.config());
        let decode_threads =
            if options.decode_threads == 0 { usize::MAX } else { options.decode_threads as usize };
        let state = State::new(
            shared,
            limits(shared, &options),
            options.threads != 0,
            SamplingOptions::GREEDY,
            |weights, kv, mut scratch| {
                scratch.set_numerics(numerics);
                scratch.set_threads(usize::MAX, decode_threads);
                Ok(Session::new(cfg, weights, kv, scratch))
            },
        )?;
        store(session, mruntime_session::into_handle(state), "session")
    })
}

/// Creates a second session with the same text, options and way to choose tokens (its random numbers start at the seed),
/// in memory of its own: what texts have in common is computed once. On failure, `*fork` is NULL.
///
/// One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_fork(
    session: *const mruntime_session,
    fork: *mut *mut mruntime_session,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        store(fork, std::ptr::null_mut(), "fork")?;
        let state = reference(session, "session")?.lock()?;
        let State { session, sampler, pool, limits, shared, .. } = &*state;
        let forked = State::new(shared, *limits, pool.is_some(), sampler.options(), |_, kv, scratch| {
            session.fork(kv, scratch)
        })?;
        store(fork, mruntime_session::into_handle(forked), "fork")
    })
}

/// Closes a session and sets the handle to NULL; one that is NULL already is left.
///
/// Any thread, when no other one uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_close(session: *mut *mut mruntime_session) {
    // SAFETY: the caller's promise.
    unsafe { close(session) }
}

/// Makes the text empty.
///
/// One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_reset(session: *mut mruntime_session) -> mruntime_status {
    // SAFETY: the caller's promise.
    unsafe { mruntime_session_truncate(session, 0) }
}

/// Cuts the text to its first `length` tokens.
///
/// One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_truncate(
    session: *mut mruntime_session,
    length: usize,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let mut state = reference(session, "session")?.lock()?;
        let tokens = state.session.tokens().len();
        if length > tokens {
            return Err(Failure::argument(format!("length is {length}; the text has {tokens} tokens")));
        }
        state.session.truncate(length);
        Ok(())
    })
}

/// Copies the tokens of the text.
///
/// One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_tokens(
    session: *const mruntime_session,
    buffer: *mut u32,
    capacity: usize,
    length: *mut usize,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let state = reference(session, "session")?.lock()?;
        fill(state.session.tokens(), &[], buffer, capacity, length)
    })
}

/// Appends tokens to the text and computes them. If it fails or is cancelled, the text is as it was.
///
/// One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_feed(
    session: *mut mruntime_session,
    tokens: *const u32,
    count: usize,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let (mut state, cancel) = reference(session, "session")?.start()?;
        state.feed(slice(tokens, count, "tokens")?, cancel)
    })
}

/// Makes `tokens` the text, such as the whole conversation so far. Of it, what the session already holds, the longest
/// common prefix, is not computed again; its length is stored in `*reused`, which may be NULL. If the tokens are refused,
/// the text is as it was; if it is cancelled, the text is that prefix.
///
/// One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_prefill(
    session: *mut mruntime_session,
    tokens: *const u32,
    count: usize,
    reused: *mut usize,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let (mut state, cancel) = reference(session, "session")?.start()?;
        let tokens = slice(tokens, count, "tokens")?;
        if !reused.is_null() {
            check_pointer(reused, "reused")?;
        }
        state.session.check_tokens(tokens, 0)?;
        let common = state.session.reusable(tokens);
        state.session.truncate(common);
        state.append(&tokens[common..], cancel)?;
        if reused.is_null() { Ok(()) } else { store(reused, common, "reused") }
    })
}

/// Gives the logits that follow the text, one for each token id. They may be changed, for example to forbid tokens (by
/// -INFINITY), before mruntime_session_next chooses by them. Valid until the next call with this session.
///
/// One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_logits(
    session: *mut mruntime_session,
    logits: *mut *mut f32,
    count: *mut usize,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let mut state = reference(session, "session")?.lock()?;
        check_pointer(logits, "logits")?;
        check_pointer(count, "count")?;
        let (pointer, len) = state.with_pool(|session, _, pool| {
            session_logits(session, pool).map(|logits| (logits.as_mut_ptr(), logits.len()))
        })?;
        store(logits, pointer, "logits")?;
        store(count, len, "count")
    })
}

/// Says how tokens are chosen from now on. The random numbers start at the seed. It allocates what choosing needs.
///
/// One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_set_sampling(
    session: *mut mruntime_session,
    sampling: *const mruntime_sampling,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let mut state = reference(session, "session")?.lock()?;
        check_pointer(sampling, "sampling")?;
        let options = read_sized(sampling, "sampling")?.check()?;
        let vocab = state.shared.model.config().vocab_size as usize;
        state.sampler = Sampler::new(options, vocab, Isa::detect())?;
        Ok(())
    })
}

/// Chooses the next token and appends it to the text. Stop tokens, see mruntime_model_stop_tokens, are tokens like others
/// here.
///
/// One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_next(
    session: *mut mruntime_session,
    token: *mut u32,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let mut state = reference(session, "session")?.lock()?;
        check_pointer(token, "token")?;
        store(token, state.next()?, "token")
    })
}

/// Gets each new token. Returns 0 to go on; after another number it is not called again. It must return: no exception and no
/// longjmp may leave it.
pub type mruntime_on_token = Option<unsafe extern "C" fn(user: *mut c_void, token: u32) -> i32>;

/// Generates up to `max_tokens` tokens after the text and appends them to it. `on_token`, which gets `user`, may be NULL.
/// A stop token ends the answer; it does not become part of the text. `generated` says what was done, and may be NULL.
///
/// One thread at a time; the callback runs in it, and must not use the session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_generate(
    session: *mut mruntime_session,
    max_tokens: u64,
    on_token: mruntime_on_token,
    user: *mut c_void,
    generated: *mut mruntime_generated,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let (mut state, cancel) = reference(session, "session")?.start()?;
        if !generated.is_null() {
            sized(generated, "generated")?;
        }
        let go_on = |token| on_token.is_none_or(|on_token| on_token(user, token) == 0);
        let done = state.generate(max_tokens, cancel, go_on)?;
        if generated.is_null() { Ok(()) } else { write_sized(generated, done, "generated") }
    })
}

/// Ends the feed, prefill or generate call that is running with the session, after its current prefill step or token.
/// Without one, it does nothing.
///
/// Any thread, at any time before the session is closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_cancel(session: *const mruntime_session) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        reference(session, "session")?.cancel.store(true, Ordering::Relaxed);
        Ok(())
    })
}

/// Writes the session to a file, whole or not at all.
///
/// One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_save(
    session: *const mruntime_session,
    path: *const c_char,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let state = reference(session, "session")?.lock()?;
        Ok(state.session.save(Path::new(c_text(path, "path")?), state.shared.model.root())?)
    })
}

/// Takes over a session that was saved, with the same model and context. It goes on as that one would have, with numerics 0
/// bit for bit. How tokens are chosen is not part of it. On failure, the text is as it was, or empty if the file cannot be
/// read or holds what no session has.
///
/// One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_load(
    session: *mut mruntime_session,
    path: *const c_char,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let mut state = reference(session, "session")?.lock()?;
        let State { session, shared, .. } = &mut *state;
        Ok(session.load(Path::new(c_text(path, "path")?), shared.model.root())?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{mruntime_model_close, mruntime_model_open};
    use mruntime_tests::TinyModel;
    use std::ffi::CString;
    use std::ptr::{null, null_mut};

    #[test]
    fn threads_of_decoding_are_those_of_the_options_also_in_a_fork() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.mrt");
        TinyModel::named("tied").convert(&path, 1);
        let path = CString::new(path.to_str().unwrap()).unwrap();
        let (mut model, mut session, mut fork) = (null_mut(), null_mut(), null_mut());
        // SAFETY: valid pointers.
        unsafe {
            assert_eq!(mruntime_model_open(path.as_ptr(), null(), &mut model), mruntime_status::MRUNTIME_OK);
            for (decode_threads, expected) in [(0, usize::MAX), (1, 1), (7, 7)] {
                let size = size_of::<mruntime_session_options>();
                let options =
                    mruntime_session_options { size, threads: 2, decode_threads, ..Default::default() };
                let status = mruntime_session_create(model, &options, &mut session);
                assert_eq!(status, mruntime_status::MRUNTIME_OK);
                assert_eq!(mruntime_session_fork(session, &mut fork), mruntime_status::MRUNTIME_OK);
                for handle in [&mut session, &mut fork] {
                    let threads = (**handle).lock().ok().unwrap().session.scratch().threads();
                    assert_eq!(threads, (usize::MAX, expected));
                    mruntime_session_close(handle);
                }
            }
            mruntime_model_close(&mut model);
        }
    }
}
