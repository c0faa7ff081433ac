//! What a C program can do wrong gives a status and a text, and leaves everything usable.

mod common;

use std::ffi::{c_char, c_void};
use std::ptr::{null, null_mut};

use common::{Setup, c_string, refused};
use mruntime_capi::mruntime_status::*;
use mruntime_capi::*;

extern "C" fn go_on(_: *mut c_void, _: u32) -> i32 {
    0
}

#[test]
fn null_pointers_are_refused_by_every_function() {
    let setup = Setup::new();
    let Setup { model, session, .. } = setup;
    let (m, s) = (null_mut::<mruntime_model>(), null_mut::<mruntime_session>());
    let (mut new_model, mut new_session) = (null_mut(), null_mut());
    let (mut count, mut token, mut logits) = (0usize, 0u32, null_mut::<f32>());
    let name = c_string(&setup.path);
    // SAFETY: null pointers, which must be refused, and valid ones.
    let statuses = unsafe {
        [
            mruntime_model_open(null(), null(), &mut new_model),
            mruntime_model_open(name.as_ptr(), null(), null_mut()),
            mruntime_model_open_fd(0, 0, 0, null(), null_mut()),
            mruntime_model_open_memory(null(), 4096, null(), &mut new_model),
            mruntime_model_info(m, &mut mruntime_info::default()),
            mruntime_model_info(model, null_mut()),
            mruntime_model_verify(m),
            mruntime_model_section(m, c"LICENSE".as_ptr(), null_mut(), 0, &mut count),
            mruntime_model_section(model, null(), null_mut(), 0, &mut count),
            mruntime_model_section(model, c"tokenizer.json".as_ptr(), null_mut(), 0, null_mut()),
            mruntime_model_stop_tokens(m, null_mut(), 0, &mut count),
            mruntime_model_stop_tokens(model, null_mut(), 0, null_mut()),
            mruntime_model_sampling(m, &mut mruntime_sampling::default()),
            mruntime_model_sampling(model, null_mut()),
            mruntime_memory_sizes(m, null(), &mut mruntime_memory::default()),
            mruntime_memory_sizes(model, null(), null_mut()),
            mruntime_session_create(m, null(), &mut new_session),
            mruntime_session_create(model, null(), null_mut()),
            mruntime_session_fork(s, &mut new_session),
            mruntime_session_fork(session, null_mut()),
            mruntime_session_reset(s),
            mruntime_session_truncate(s, 0),
            mruntime_session_tokens(s, null_mut(), 0, &mut count),
            mruntime_session_tokens(session, null_mut(), 0, null_mut()),
            mruntime_session_feed(s, &token, 1),
            mruntime_session_feed(session, null(), 1),
            mruntime_session_prefill(s, &token, 1, null_mut()),
            mruntime_session_prefill(session, null(), 1, null_mut()),
            mruntime_session_logits(s, &mut logits, &mut count),
            mruntime_session_logits(session, null_mut(), &mut count),
            mruntime_session_logits(session, &mut logits, null_mut()),
            mruntime_session_set_sampling(s, &mruntime_sampling::default()),
            mruntime_session_set_sampling(session, null()),
            mruntime_session_next(s, &mut token),
            mruntime_session_next(session, null_mut()),
            mruntime_session_generate(s, 1, Some(go_on), null_mut(), null_mut()),
            mruntime_session_cancel(s),
            mruntime_session_save(s, name.as_ptr()),
            mruntime_session_save(session, null()),
            mruntime_session_load(s, name.as_ptr()),
            mruntime_session_load(session, null()),
            mruntime_tokenize(m, c"a".as_ptr(), 1, 0, null_mut(), 0, &mut count),
            mruntime_tokenize(model, null(), 1, 0, null_mut(), 0, &mut count),
            mruntime_tokenize(model, c"a".as_ptr(), 1, 0, null_mut(), 0, null_mut()),
            mruntime_detokenize(m, &token, 1, 0, null_mut(), 0, &mut count),
            mruntime_detokenize(model, null(), 1, 0, null_mut(), 0, &mut count),
            mruntime_apply_chat_template(m, null(), 0, 1, null_mut(), 0, &mut count),
            mruntime_session_feed_text(s, c"a".as_ptr(), 1, 0),
            mruntime_session_feed_text(session, null(), 1, 0),
            mruntime_session_generate_text(s, 1, None, null_mut(), null_mut()),
        ]
    };
    for (i, status) in statuses.into_iter().enumerate() {
        assert_eq!(status, MRUNTIME_INVALID_ARGUMENT, "call {i}");
    }
    assert!(new_model.is_null() && new_session.is_null());
    // SAFETY: null handles are left.
    unsafe {
        mruntime_model_close(null_mut());
        mruntime_session_close(&mut new_session);
    }
}

#[test]
fn a_call_that_fails_stores_nothing() {
    let setup = Setup::new();
    let (mut logits, mut count) = (null_mut::<f32>(), 7);
    let mut generated = mruntime_generated { tokens: 7, ..Default::default() };
    // SAFETY: null pointers, which must be refused, and valid ones.
    unsafe {
        assert_eq!(mruntime_session_feed(setup.session, [104, 105].as_ptr(), 2), MRUNTIME_OK);
        let none = mruntime_session_logits(setup.session, &mut logits, null_mut());
        refused(none, MRUNTIME_INVALID_ARGUMENT, "count is a null pointer");
        let none = mruntime_session_logits(setup.session, null_mut(), &mut count);
        refused(none, MRUNTIME_INVALID_ARGUMENT, "logits is a null pointer");
        // Before anything is generated.
        let status = mruntime_session_generate(setup.session, 3, Some(go_on), null_mut(), &mut generated);
        refused(status, MRUNTIME_INVALID_ARGUMENT, "generated says that it has 0 bytes");
        let status = mruntime_session_generate_text(setup.session, 3, None, null_mut(), &mut generated);
        refused(status, MRUNTIME_INVALID_ARGUMENT, "generated says that it has 0 bytes");
        assert!(logits.is_null() && generated.tokens == 7);
        assert_eq!(mruntime_session_tokens(setup.session, null_mut(), 0, &mut count), MRUNTIME_OK);
        assert_eq!(count, 2);
    }
}

#[test]
fn wrong_sizes_and_values_are_refused() {
    let setup = Setup::new();
    let Setup { model, session, .. } = setup;
    let name = c_string(&setup.path);
    let mut other = null_mut();
    let mut create = |change: fn(&mut mruntime_session_options)| {
        let mut options =
            mruntime_session_options { size: size_of::<mruntime_session_options>(), ..Default::default() };
        change(&mut options);
        // SAFETY: valid pointers.
        unsafe { mruntime_session_create(model, &options, &mut other) }
    };
    refused(create(|o| o.size = 0), MRUNTIME_INVALID_ARGUMENT, "set its size to sizeof");
    refused(create(|o| o.size = 1 << 30), MRUNTIME_INVALID_ARGUMENT, "set its size to sizeof");
    refused(create(|o| o.context = 1 << 50), MRUNTIME_INVALID_ARGUMENT, "bytes");
    refused(
        create(|o| o.threads = 5000),
        MRUNTIME_INVALID_ARGUMENT,
        "on 5000 threads; both must be at least 1",
    );
    refused(create(|o| o.batch = u32::MAX), MRUNTIME_MEMORY, " bytes of memory: ");
    refused(create(|o| o.numerics = 2), MRUNTIME_INVALID_ARGUMENT, "numerics is 2; it must be from 0 to 1");

    // A newer program's structure: more fields, which must be 0.
    #[repr(C)]
    struct Newer(mruntime_session_options, u64);
    let known = mruntime_session_options { size: size_of::<Newer>(), ..Default::default() };
    for (more, expected) in [(0, MRUNTIME_OK), (1, MRUNTIME_INVALID_ARGUMENT)] {
        let options = Newer(known, more);
        let mut new = null_mut();
        // SAFETY: the size that it states is that of the whole structure.
        let status = unsafe { mruntime_session_create(model, (&raw const options).cast(), &mut new) };
        assert_eq!(status, expected);
        // SAFETY: a handle or null.
        unsafe { mruntime_session_close(&mut new) };
    }
    // An older program's structure is filled as far as it goes.
    let mut info = mruntime_info { size: 16, weight_bytes: 77, ..Default::default() };
    // SAFETY: valid pointers.
    assert_eq!(unsafe { mruntime_model_info(model, &mut info) }, MRUNTIME_OK);
    assert!(info.file_bytes > 2 << 20 && info.weight_bytes == 77 && info.size == 16);

    let sampling = |change: fn(&mut mruntime_sampling)| {
        let mut sampling = mruntime_sampling { size: size_of::<mruntime_sampling>(), ..Default::default() };
        change(&mut sampling);
        // SAFETY: valid pointers.
        unsafe { mruntime_session_set_sampling(session, &sampling) }
    };
    refused(sampling(|s| s.top_p = 2.0), MRUNTIME_INVALID_ARGUMENT, "top_p is 2");
    refused(sampling(|s| s.temperature = f32::NAN), MRUNTIME_INVALID_ARGUMENT, "temperature is NaN");
    assert_eq!(sampling(|s| s.temperature = 0.5), MRUNTIME_OK);

    let open = |change: fn(&mut mruntime_open_options)| {
        let mut options =
            mruntime_open_options { size: size_of::<mruntime_open_options>(), ..Default::default() };
        change(&mut options);
        let mut new = null_mut();
        // SAFETY: valid pointers.
        unsafe { mruntime_model_open(name.as_ptr(), &options, &mut new) }
    };
    refused(open(|o| o.read = 2), MRUNTIME_INVALID_ARGUMENT, "read is 2");
    refused(open(|o| o.verify = 9), MRUNTIME_INVALID_ARGUMENT, "verify is 9");
    refused(open(|o| o.expected_root = [7; 32].as_ptr()), MRUNTIME_FORMAT, "another file than expected");

    // SAFETY: valid pointers.
    unsafe {
        refused(mruntime_session_truncate(session, 1), MRUNTIME_INVALID_ARGUMENT, "the text has 0 tokens");
        refused(
            mruntime_session_feed(session, &u32::MAX, 1),
            MRUNTIME_INVALID_ARGUMENT,
            "outside the vocabulary",
        );
        refused(mruntime_session_feed(session, null(), 0), MRUNTIME_INVALID_ARGUMENT, "no tokens");
        let (mut token, mut logits, mut count) = (0, null_mut(), 0);
        refused(mruntime_session_next(session, &mut token), MRUNTIME_INVALID_ARGUMENT, "no tokens");
        refused(
            mruntime_session_logits(session, &mut logits, &mut count),
            MRUNTIME_INVALID_ARGUMENT,
            "no tokens",
        );
        let none = mruntime_model_section(model, c"no".as_ptr(), null_mut(), 0, &mut count);
        refused(none, MRUNTIME_NOT_FOUND, "the model has no section no");
    }
}

#[test]
fn bad_utf8_and_bad_files_are_refused() {
    let setup = Setup::new();
    let Setup { model, session, .. } = setup;
    let bad: *const c_char = c"\xff\xfe".as_ptr();
    let mut count = 0;
    let (mut new, utf8) = (null_mut(), "is not UTF-8");
    // SAFETY: valid pointers.
    unsafe {
        refused(mruntime_model_open(bad, null(), &mut new), MRUNTIME_INVALID_ARGUMENT, utf8);
        refused(mruntime_session_save(session, bad), MRUNTIME_INVALID_ARGUMENT, utf8);
        let tokenized = mruntime_tokenize(model, bad, 2, 0, null_mut(), 0, &mut count);
        refused(tokenized, MRUNTIME_INVALID_ARGUMENT, utf8);
        refused(mruntime_session_feed_text(session, bad, 2, 0), MRUNTIME_INVALID_ARGUMENT, utf8);
        let message = mruntime_message { role: c"user".as_ptr(), content: bad };
        let applied = mruntime_apply_chat_template(model, &message, 1, 1, null_mut(), 0, &mut count);
        assert_ne!(applied, MRUNTIME_OK);

        refused(mruntime_model_open(c"/nowhere.mrt".as_ptr(), null(), &mut new), MRUNTIME_IO, "/nowhere.mrt");
        refused(mruntime_model_open_fd(-1, 0, 0, null(), &mut new), MRUNTIME_IO, "not a file descriptor");
        refused(mruntime_model_open_fd(1 << 20, 0, 0, null(), &mut new), MRUNTIME_IO, "(descriptor 1048576)");
        let unaligned =
            mruntime_model_open_memory([0u64; 9].as_ptr().byte_add(1).cast(), 64, null(), &mut new);
        refused(unaligned, MRUNTIME_INVALID_ARGUMENT, "align its bytes to 64");
        let not = setup.path.with_file_name("hf").join("config.json");
        refused(
            mruntime_model_open(c_string(&not).as_ptr(), null(), &mut new),
            MRUNTIME_FORMAT,
            "not a .mrt file",
        );
        refused(
            mruntime_session_load(session, c_string(&not).as_ptr()),
            MRUNTIME_FORMAT,
            "not a session file",
        );
    }
    assert!(new.is_null());
}

#[test]
fn closed_handles_are_null_and_refused() {
    let mut setup = Setup::new();
    let (mut token, mut new) = (0, null_mut());
    // SAFETY: a handle is null when it is closed; null handles are refused, and closing one again does nothing.
    unsafe {
        for _ in 0..2 {
            mruntime_session_close(&mut setup.session);
            assert!(setup.session.is_null());
            mruntime_model_close(&mut setup.model);
            assert!(setup.model.is_null());
        }
        refused(
            mruntime_session_next(setup.session, &mut token),
            MRUNTIME_INVALID_ARGUMENT,
            "session is a null pointer",
        );
        refused(
            mruntime_session_fork(setup.session, &mut new),
            MRUNTIME_INVALID_ARGUMENT,
            "session is a null pointer",
        );
        refused(
            mruntime_session_create(setup.model, null(), &mut new),
            MRUNTIME_INVALID_ARGUMENT,
            "model is a null pointer",
        );
    }
}

#[test]
fn buffers_are_filled_whole_or_not_at_all() {
    let setup = Setup::new();
    // SAFETY: valid pointers and capacities.
    unsafe {
        let tokens = [104, 105, 33];
        let mut count = 0;
        assert_eq!(mruntime_session_feed(setup.session, tokens.as_ptr(), 3), MRUNTIME_OK);
        assert_eq!(mruntime_session_tokens(setup.session, null_mut(), 0, &mut count), MRUNTIME_OK);
        assert_eq!(count, 3);
        let mut buffer = [9; 3];
        let status = mruntime_session_tokens(setup.session, buffer.as_mut_ptr(), 2, &mut count);
        refused(status, MRUNTIME_BUFFER_TOO_SMALL, "holds 2 elements, 3 are needed");
        assert_eq!((count, buffer), (3, [9; 3]));
        assert_eq!(mruntime_session_tokens(setup.session, buffer.as_mut_ptr(), 3, &mut count), MRUNTIME_OK);
        assert_eq!(buffer, tokens);

        let mut text = [7u8; 8];
        let text_buffer: *mut c_char = text.as_mut_ptr().cast();
        let mut detokenize = |capacity| {
            mruntime_detokenize(setup.model, tokens.as_ptr(), 3, 0, text_buffer, capacity, &mut count)
        };
        assert_eq!(detokenize(0), MRUNTIME_BUFFER_TOO_SMALL);
        assert_eq!(detokenize(8), MRUNTIME_OK);
        assert_eq!(text[count], 0, "a zero byte at the end");
        assert_eq!(detokenize_len(&setup, &tokens), count);
    }
}

fn detokenize_len(setup: &Setup, tokens: &[u32]) -> usize {
    let mut count = 0;
    // SAFETY: valid pointers.
    let status = unsafe {
        mruntime_detokenize(setup.model, tokens.as_ptr(), tokens.len(), 0, null_mut(), 0, &mut count)
    };
    assert_eq!(status, MRUNTIME_OK);
    count
}
