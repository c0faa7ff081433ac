//! What a C program can do wrong gives a status and a text, and leaves everything usable.

use std::ffi::{CStr, c_char, c_void};
use std::path::PathBuf;
use std::ptr::{null, null_mut};

use mruntime_capi::mruntime_status::*;
use mruntime_capi::*;
use mruntime_tests::TinyModel;

/// A tiny model with a tokenizer, and a session.
struct Setup {
    folder: tempfile::TempDir,
    path: PathBuf,
    model: *mut mruntime_model,
    session: *mut mruntime_session,
}

impl Setup {
    fn new() -> Setup {
        let folder = tempfile::tempdir().unwrap();
        let hf = folder.path().join("hf");
        std::fs::create_dir(&hf).unwrap();
        let tiny = TinyModel::named("tied");
        let fixture =
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tools/mruntime_chat/tests/fixture");
        for from in [tiny.dir.clone(), fixture] {
            for file in std::fs::read_dir(from).unwrap() {
                let file = file.unwrap();
                std::fs::copy(file.path(), hf.join(file.file_name())).unwrap();
            }
        }
        let path = folder.path().join("tiny.mrt");
        TinyModel { dir: hf, ..tiny }.convert(&path, 1);
        let (mut model, mut session) = (null_mut(), null_mut());
        let options = mruntime_open_options {
            size: size_of::<mruntime_open_options>(),
            threads: 2,
            ..mruntime_open_options::default()
        };
        let name = c_string(&path);
        // SAFETY: valid pointers.
        unsafe {
            assert_eq!(
                mruntime_model_open(name.as_ptr(), &options, &mut model),
                MRUNTIME_OK,
                "{}",
                last_error()
            );
            assert_eq!(mruntime_session_create(model, null(), &mut session), MRUNTIME_OK, "{}", last_error());
        }
        Setup { folder, path, model, session }
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        // SAFETY: handles of the interface, or null.
        unsafe {
            mruntime_model_close(&mut self.model);
            mruntime_session_close(&mut self.session);
        }
        assert!(self.model.is_null() && self.session.is_null());
    }
}

fn c_string(path: &std::path::Path) -> std::ffi::CString {
    std::ffi::CString::new(path.to_str().unwrap()).unwrap()
}

fn last_error() -> String {
    // SAFETY: a text that ends with a zero byte, valid until the next failure of this thread.
    unsafe { CStr::from_ptr(mruntime_last_error()) }.to_str().unwrap().to_owned()
}

#[track_caller]
fn refused(status: mruntime_status, expected: mruntime_status, message: &str) {
    assert_eq!(status, expected, "{}", last_error());
    assert!(last_error().contains(message), "{}", last_error());
}

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
            mruntime_session_set_sampling(s, null()),
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
    refused(create(|o| o.threads = 5000), MRUNTIME_INVALID_ARGUMENT, "cannot run on 5000 threads");

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
        let not = setup.folder.path().join("hf/config.json");
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
    let mut done = mruntime_generated::default();
    // SAFETY: valid pointers.
    unsafe {
        assert_eq!(mruntime_session_feed(session, [100, 101, 102].as_ptr(), 3), MRUNTIME_OK);
        assert_eq!(mruntime_session_generate(session, 20, Some(note), user, &mut done), MRUNTIME_OK);
        assert_eq!((done.tokens, done.stop), (5, mruntime_stop::MRUNTIME_STOP_CANCELLED));
        assert_eq!(seen.nested, Some(MRUNTIME_BUSY));
        assert_eq!(mruntime_session_generate(session, 4, Some(note), user, &mut done), MRUNTIME_OK);
        assert_eq!((done.tokens, done.stop), (4, mruntime_stop::MRUNTIME_STOP_MAX_TOKENS));
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
