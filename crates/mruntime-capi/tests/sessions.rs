//! Sessions as a C program uses them: cancelled from another thread, forked, saved, with a fast lane.

mod common;

use std::ffi::{c_char, c_void};
use std::ptr::null_mut;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::{Setup, c_string, last_error, refused};
use mruntime_capi::mruntime_status::*;
use mruntime_capi::*;

/// What the callbacks get.
struct Seen {
    session: *mut mruntime_session,
    tokens: Vec<u32>,
    nested: Option<mruntime_status>,
    cancel_at: usize,
}

extern "C" fn note(user: *mut c_void, token: u32) -> i32 {
    // SAFETY: the test passes a `Seen`.
    let seen = unsafe { &mut *user.cast::<Seen>() };
    seen.tokens.push(token);
    // SAFETY: an open session, which is in use.
    seen.nested = Some(unsafe { mruntime_session_reset(seen.session) });
    if seen.tokens.len() == seen.cancel_at {
        // SAFETY: an open session.
        assert_eq!(unsafe { mruntime_session_cancel(seen.session) }, MRUNTIME_OK);
    }
    0
}

#[test]
fn a_session_refuses_a_second_call_can_be_cancelled_and_goes_on() {
    let mut setup = Setup::new();
    let session = setup.session;
    let mut seen = Seen { session, tokens: Vec::new(), nested: None, cancel_at: 5 };
    let user: *mut c_void = (&raw mut seen).cast();
    let mut done = mruntime_generated { size: size_of::<mruntime_generated>(), ..Default::default() };
    // SAFETY: valid pointers.
    unsafe {
        assert_eq!(mruntime_session_feed(session, [100, 101, 102].as_ptr(), 3), MRUNTIME_OK);
        assert_eq!(mruntime_session_generate(session, 20, Some(note), user, &mut done), MRUNTIME_OK);
        assert_eq!((done.tokens, done.stop), (5, mruntime_stop::MRUNTIME_STOP_CANCELLED as u32));
        assert_eq!(seen.nested, Some(MRUNTIME_BUSY));
        assert_eq!(mruntime_session_generate(session, 4, Some(note), user, &mut done), MRUNTIME_OK);
        assert_eq!((done.tokens, done.stop), (4, mruntime_stop::MRUNTIME_STOP_MAX_TOKENS as u32));
        // The same in one go, in a session that outlives its model's handle.
        let mut fork = null_mut();
        assert_eq!(mruntime_session_truncate(session, 3), MRUNTIME_OK);
        assert_eq!(mruntime_session_fork(session, &mut fork), MRUNTIME_OK);
        mruntime_model_close(&mut setup.model);
        assert!(setup.model.is_null());
        let mut again = Seen { session: fork, tokens: Vec::new(), nested: None, cancel_at: 0 };
        let user = (&raw mut again).cast();
        assert_eq!(mruntime_session_generate(fork, 9, Some(note), user, null_mut()), MRUNTIME_OK);
        assert_eq!(again.tokens, seen.tokens);
        mruntime_session_close(&mut fork);
    }
}

/// A handle that threads share, as the header allows for a call that can be cancelled.
#[derive(Clone, Copy)]
struct Shared(*mut mruntime_session);

// SAFETY: the tests keep to the header's thread rules: one call at a time, and mruntime_session_cancel at any time.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn cancel(&self) {
        // SAFETY: an open session.
        assert_eq!(unsafe { mruntime_session_cancel(self.0) }, MRUNTIME_OK);
    }
}

struct Meeting {
    tokens: AtomicUsize,
    /// Both threads wait here twice: for generation to be under way, and for the call to cancel to have returned.
    barrier: Barrier,
}

extern "C" fn meet_at_the_fifth(user: *mut c_void, _: u32) -> i32 {
    // SAFETY: the test passes a `Meeting`.
    let meeting = unsafe { &*user.cast::<Meeting>() };
    if meeting.tokens.fetch_add(1, Ordering::Relaxed) == 4 {
        meeting.barrier.wait();
        meeting.barrier.wait();
    }
    0
}

/// The tokens of the text.
fn text(session: *const mruntime_session) -> Vec<u32> {
    let (mut tokens, mut count) = (vec![0; 600], 0);
    // SAFETY: valid pointers and capacity.
    let status = unsafe { mruntime_session_tokens(session, tokens.as_mut_ptr(), tokens.len(), &mut count) };
    assert_eq!(status, MRUNTIME_OK, "{}", last_error());
    tokens.truncate(count);
    tokens
}

/// The text after `n` more tokens.
fn continued(session: *mut mruntime_session, n: u64) -> Vec<u32> {
    // SAFETY: an open session; nothing else is needed.
    let status = unsafe { mruntime_session_generate(session, n, None, null_mut(), null_mut()) };
    assert_eq!(status, MRUNTIME_OK, "{}", last_error());
    text(session)
}

#[test]
fn another_thread_cancels_a_running_generate_and_it_goes_on_as_if_nothing_had_been() {
    let setup = Setup::new();
    let session = Shared(setup.session);
    let mut fork = null_mut();
    // SAFETY: valid pointers.
    unsafe {
        assert_eq!(mruntime_session_feed(session.0, [100, 101].as_ptr(), 2), MRUNTIME_OK);
        assert_eq!(mruntime_session_fork(session.0, &mut fork), MRUNTIME_OK);
    }
    let meeting = Meeting { tokens: AtomicUsize::new(0), barrier: Barrier::new(2) };
    let mut done = mruntime_generated { size: size_of::<mruntime_generated>(), ..Default::default() };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            meeting.barrier.wait();
            session.cancel();
            meeting.barrier.wait();
        });
        let user = (&raw const meeting).cast_mut().cast();
        // SAFETY: an open session; the callback only reads what it gets.
        let status =
            unsafe { mruntime_session_generate(session.0, 300, Some(meet_at_the_fifth), user, &mut done) };
        assert_eq!(status, MRUNTIME_OK, "{}", last_error());
    });
    assert_eq!((done.tokens, done.stop), (5, mruntime_stop::MRUNTIME_STOP_CANCELLED as u32));
    assert_eq!(text(session.0).len(), 7);
    assert_eq!(continued(session.0, 5), continued(fork, 10));
    // SAFETY: a handle of the interface.
    unsafe { mruntime_session_close(&mut fork) };
}

#[test]
fn another_thread_cancels_a_running_feed_and_the_text_is_as_it_was() {
    let setup = Setup::new();
    let mut handle = null_mut();
    // So many steps that another thread finds the time.
    let options = mruntime_session_options {
        size: size_of::<mruntime_session_options>(),
        batch: 1,
        ..Default::default()
    };
    // SAFETY: valid pointers.
    unsafe {
        assert_eq!(mruntime_session_create(setup.model, &options, &mut handle), MRUNTIME_OK);
        for session in [handle, setup.session] {
            assert_eq!(mruntime_session_feed(session, [100, 101].as_ptr(), 2), MRUNTIME_OK);
        }
    }
    let (session, started, ended) = (Shared(handle), Barrier::new(2), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            started.wait();
            while !ended.load(Ordering::Relaxed) {
                session.cancel();
            }
        });
        started.wait();
        // SAFETY: an open session and 500 tokens.
        let status = unsafe { mruntime_session_feed(session.0, [102; 500].as_ptr(), 500) };
        ended.store(true, Ordering::Relaxed);
        refused(status, MRUNTIME_CANCELLED, "cancelled");
    });
    assert_eq!(text(handle), [100, 101]);
    assert_eq!(continued(handle, 10), continued(setup.session, 10));
    // SAFETY: a handle of the interface.
    unsafe { mruntime_session_close(&mut handle) };
}

#[test]
fn numerics_are_a_sessions_own_and_go_with_its_forks_and_files() {
    /// mruntime_session_options as a program knows it that was compiled before there were `numerics`.
    #[repr(C)]
    struct Older {
        size: usize,
        context: u64,
        batch: u32,
        threads: u32,
    }
    let setup = Setup::new();
    let (mut older, mut fast, mut fork) = (null_mut(), null_mut(), null_mut());
    let known = Older { size: size_of::<Older>(), context: 0, batch: 0, threads: 0 };
    let options = mruntime_session_options {
        size: size_of::<mruntime_session_options>(),
        numerics: 1,
        ..Default::default()
    };
    let mut info = mruntime_info { size: size_of::<mruntime_info>(), ..Default::default() };
    let prompt: Vec<u32> = (100..140).collect();
    let (fast_file, exact_file) = (setup.path.with_file_name("fast"), setup.path.with_file_name("exact"));
    let (fast_file, exact_file) = (c_string(&fast_file), c_string(&exact_file));
    // SAFETY: valid pointers; the size of `known` is that of the whole structure.
    unsafe {
        assert_eq!(mruntime_model_info(setup.model, &mut info), MRUNTIME_OK);
        assert_eq!(mruntime_session_create(setup.model, (&raw const known).cast(), &mut older), MRUNTIME_OK);
        assert_eq!(mruntime_session_create(setup.model, &options, &mut fast), MRUNTIME_OK);
        for session in [older, fast, setup.session] {
            assert_eq!(mruntime_session_feed(session, prompt.as_ptr(), prompt.len()), MRUNTIME_OK);
        }
        assert_eq!(mruntime_session_fork(fast, &mut fork), MRUNTIME_OK);
        assert_eq!(mruntime_session_save(fork, fast_file.as_ptr()), MRUNTIME_OK);
        assert_eq!(mruntime_session_save(older, exact_file.as_ptr()), MRUNTIME_OK);
        assert_eq!(mruntime_session_load(fast, fast_file.as_ptr()), MRUNTIME_OK);
        assert_eq!(mruntime_session_load(setup.session, exact_file.as_ptr()), MRUNTIME_OK);
        let crossed = mruntime_session_load(setup.session, fast_file.as_ptr());
        match info.fast_numerics {
            0 => assert_eq!(crossed, MRUNTIME_OK, "there is no other than exact"),
            lane => refused(
                crossed,
                MRUNTIME_FORMAT,
                &format!("computed with numerics {lane}; this session has 0"),
            ),
        }
    }
    assert_eq!(continued(older, 10), continued(setup.session, 10));
    assert_eq!(continued(fast, 10), continued(fork, 10));
    for session in [&mut older, &mut fast, &mut fork] {
        // SAFETY: handles of the interface.
        unsafe { mruntime_session_close(session) };
    }
}

#[test]
fn tokens_are_refused_before_any_is_computed_and_the_text_stays() {
    let setup = Setup::new();
    let size = size_of::<mruntime_session_options>();
    let options = mruntime_session_options { size, context: 64, batch: 4, ..Default::default() };
    let (mut session, mut logits, mut count) = (null_mut(), null_mut(), 0);
    let mut bad: Vec<u32> = (100..130).collect();
    bad[20] = 999_999;
    let mut reused = 77;
    // SAFETY: valid pointers and counts; the logits are written while they are valid.
    unsafe {
        assert_eq!(mruntime_session_create(setup.model, &options, &mut session), MRUNTIME_OK);
        assert_eq!(mruntime_session_feed(session, [100, 101].as_ptr(), 2), MRUNTIME_OK);
        // Logits that were changed are lost as soon as anything is computed or cut.
        assert_eq!(mruntime_session_logits(session, &mut logits, &mut count), MRUNTIME_OK);
        std::slice::from_raw_parts_mut(logits, count)[65] = f32::MAX;
        refused(
            mruntime_session_feed(session, [102; 63].as_ptr(), 63),
            MRUNTIME_CONTEXT_FULL,
            "63 tokens do not fit into the context of 64, of which 2 are used",
        );
        refused(
            mruntime_session_feed(session, bad.as_ptr(), bad.len()),
            MRUNTIME_INVALID_ARGUMENT,
            "token 999999 at index 20 is outside",
        );
        refused(
            mruntime_session_prefill(session, [102; 100].as_ptr(), 100, &mut reused),
            MRUNTIME_CONTEXT_FULL,
            "100 tokens do not fit into the context of 64, of which 0 are used",
        );
        refused(
            mruntime_session_prefill(session, bad.as_ptr(), bad.len(), &mut reused),
            MRUNTIME_INVALID_ARGUMENT,
            "token 999999 at index 20 is outside",
        );
        assert_eq!((text(session), reused), (vec![100, 101], 77));
        let mut token = 0;
        assert_eq!(mruntime_session_next(session, &mut token), MRUNTIME_OK);
        assert_eq!(token, 65);
        // All that fits.
        assert_eq!(mruntime_session_prefill(session, [102; 64].as_ptr(), 64, &mut reused), MRUNTIME_OK);
        assert_eq!((text(session), reused), (vec![102; 64], 0));
        mruntime_session_close(&mut session);
    }
}

extern "C" fn stop_at_once(user: *mut c_void, _: *const c_char, _: usize) -> i32 {
    // SAFETY: the test passes a number.
    unsafe { *user.cast::<u32>() += 1 };
    1
}

#[test]
fn a_callback_that_said_stop_is_not_called_again_for_what_its_token_left_over() {
    // The tokens of the first bytes of characters of several bytes. After two of them there is a U+FFFD to be given out, and
    // the beginning of another character left.
    let first_bytes = 0xC2..=0xF4;
    let setup = Setup::new();
    let session = setup.session;
    let mut left_over = 0;
    for seed in 0..64 {
        let size = size_of::<mruntime_sampling>();
        let sampling = mruntime_sampling { size, seed, temperature: 1.0, ..Default::default() };
        let (mut logits, mut count, mut calls) = (null_mut(), 0, 0u32);
        let mut done = mruntime_generated { size: size_of::<mruntime_generated>(), ..Default::default() };
        // SAFETY: valid pointers; the logits are written while they are valid.
        unsafe {
            assert_eq!(mruntime_session_prefill(session, [100].as_ptr(), 1, null_mut()), MRUNTIME_OK);
            assert_eq!(mruntime_session_set_sampling(session, &sampling), MRUNTIME_OK);
            assert_eq!(mruntime_session_logits(session, &mut logits, &mut count), MRUNTIME_OK);
            std::slice::from_raw_parts_mut(logits, count)[0xE4] = 1000.0;
            let user = (&raw mut calls).cast();
            let status = mruntime_session_generate_text(session, 8, Some(stop_at_once), user, &mut done);
            assert_eq!(status, MRUNTIME_OK, "{}", last_error());
        }
        assert!(calls <= 1, "called {calls} times");
        let stopped = done.stop == mruntime_stop::MRUNTIME_STOP_CALLBACK as u32;
        left_over +=
            usize::from(stopped && text(session)[1..].iter().all(|token| first_bytes.contains(token)));
    }
    assert!(left_over > 0);
}
