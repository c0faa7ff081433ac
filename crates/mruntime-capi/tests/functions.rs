//! What the functions do for a program that uses them as it should, beside what Rust's do.

mod common;

use std::ffi::{CStr, c_char};
use std::ptr::{null, null_mut};

use common::{Setup, last_error, refused};
use mruntime::{Limits, Model, OpenOptions, Pool, SamplingOptions, qwen2_memory_sizes};
use mruntime_capi::mruntime_status::*;
use mruntime_capi::*;

#[track_caller]
fn ok(status: mruntime_status) {
    assert_eq!(status, MRUNTIME_OK, "{}", last_error());
}

/// What a function puts into a buffer, whose size is asked for first.
fn filled<T: Copy + Default>(mut fill: impl FnMut(*mut T, usize, *mut usize) -> mruntime_status) -> Vec<T> {
    let mut length = 0;
    ok(fill(null_mut(), 0, &mut length));
    // Text has a zero byte at its end that is not counted.
    let mut buffer = vec![T::default(); length + 1];
    ok(fill(buffer.as_mut_ptr(), buffer.len(), &mut length));
    buffer.truncate(length);
    buffer
}

fn section(model: *const mruntime_model, name: &CStr) -> Vec<u8> {
    // SAFETY: an open model and valid pointers.
    filled(|buffer, capacity, length| unsafe {
        mruntime_model_section(model, name.as_ptr(), buffer, capacity, length)
    })
}

fn stop_tokens(model: *const mruntime_model) -> Vec<u32> {
    // SAFETY: as above.
    filled(|buffer, capacity, length| unsafe { mruntime_model_stop_tokens(model, buffer, capacity, length) })
}

fn tokenize(model: *const mruntime_model, text: &str, special: mruntime_special) -> Vec<u32> {
    // SAFETY: as above; the text has the length that is given.
    filled(|buffer, capacity, length| unsafe {
        mruntime_tokenize(model, text.as_ptr().cast(), text.len(), special as u32, buffer, capacity, length)
    })
}

fn detokenize(model: *const mruntime_model, tokens: &[u32]) -> String {
    // SAFETY: as above; there are as many tokens as said.
    let text = filled(|buffer: *mut u8, capacity, length| unsafe {
        mruntime_detokenize(model, tokens.as_ptr(), tokens.len(), 0, buffer.cast(), capacity, length)
    });
    String::from_utf8(text).unwrap()
}

fn text(session: *const mruntime_session) -> Vec<u32> {
    // SAFETY: an open session and valid pointers.
    filled(|buffer, capacity, length| unsafe { mruntime_session_tokens(session, buffer, capacity, length) })
}

fn info(model: *const mruntime_model) -> mruntime_info {
    let mut info = mruntime_info { size: size_of::<mruntime_info>(), ..Default::default() };
    // SAFETY: an open model and valid pointers.
    ok(unsafe { mruntime_model_info(model, &mut info) });
    info
}

/// Bytes of a file at a multiple of 64.
#[repr(align(64))]
struct Line([u8; 64]);

#[test]
fn a_model_from_a_descriptor_or_memory_is_the_one_that_its_path_opens() {
    let setup = Setup::new();
    let file = std::fs::read(&setup.path).unwrap();
    let mut models = vec![setup.model];

    #[cfg(unix)]
    {
        use std::os::fd::AsRawFd;
        // Something in front of it, and in the second something behind it.
        for (offset, behind, length) in [(4096, 0, 0), (192, 100, file.len())] {
            let package = setup.path.with_file_name(format!("package-{offset}"));
            std::fs::write(&package, [&vec![7; offset], &*file, &vec![7; behind]].concat()).unwrap();
            let package = std::fs::File::open(package).unwrap();
            let (descriptor, mut model) = (package.as_raw_fd() as isize, null_mut());
            let (offset, length) = (offset as u64, length as u64);
            // SAFETY: an open descriptor and valid pointers.
            ok(unsafe { mruntime_model_open_fd(descriptor, offset, length, null(), &mut model) });
            assert_eq!(info(model).mapped, 1);
            models.push(model);

            let all = (offset as usize + file.len() + behind) as u64;
            let mut none = null_mut();
            // SAFETY: as above.
            let status = unsafe { mruntime_model_open_fd(descriptor, all + 1, 0, null(), &mut none) };
            refused(status, MRUNTIME_INVALID_ARGUMENT, "is after the end of the file");
            // SAFETY: as above.
            let status = unsafe { mruntime_model_open_fd(descriptor, offset, all, null(), &mut none) };
            refused(status, MRUNTIME_INVALID_ARGUMENT, &format!("are more than the file's {all} bytes"));
            assert!(none.is_null());
        }
    }
    let line = |chunk: &[u8]| {
        let mut line = Line([0; 64]);
        line.0[..chunk.len()].copy_from_slice(chunk);
        line
    };
    let lines: Vec<Line> = file.chunks(64).map(line).collect();
    let mut model = null_mut();
    // SAFETY: so many bytes, which stay until the model is closed.
    ok(unsafe { mruntime_model_open_memory(lines.as_ptr().cast(), file.len(), null(), &mut model) });
    assert_eq!(info(model).mapped, 0);
    models.push(model);

    let mut answers = Vec::new();
    for &model in &models {
        assert_eq!(info(model).root, info(setup.model).root);
        assert_eq!(section(model, c"tokenizer.json"), section(setup.model, c"tokenizer.json"));
        let mut session = null_mut();
        // SAFETY: an open model and valid pointers.
        unsafe {
            ok(mruntime_model_verify(model));
            ok(mruntime_session_create(model, null(), &mut session));
            ok(mruntime_session_feed(session, [100, 101].as_ptr(), 2));
            ok(mruntime_session_generate(session, 10, None, null_mut(), null_mut()));
            answers.push(text(session));
            mruntime_session_close(&mut session);
        }
    }
    assert!(answers[0].len() > 2 && answers.iter().all(|answer| *answer == answers[0]));
    for mut model in models.split_off(1) {
        // SAFETY: a handle of the interface.
        unsafe { mruntime_model_close(&mut model) };
    }
}

#[test]
fn a_model_tells_what_it_does_in_rust() {
    let setup = Setup::new();
    let rust = Model::open(&setup.path, &OpenOptions::default(), &mut Pool::new(1).unwrap()).unwrap();
    assert_eq!(section(setup.model, c"tokenizer.json"), *rust.section("tokenizer.json").unwrap().unwrap());

    let generation = rust.generation().unwrap();
    assert_eq!(generation.stop_tokens, [319, 317]);
    assert_eq!(stop_tokens(setup.model), generation.stop_tokens);

    let mut sampling = mruntime_sampling { size: size_of::<mruntime_sampling>(), ..Default::default() };
    // SAFETY: valid pointers.
    ok(unsafe { mruntime_model_sampling(setup.model, &mut sampling) });
    let mruntime_sampling { seed, temperature, top_k, top_p, min_p, repetition_penalty, .. } = sampling;
    let options = SamplingOptions { temperature, top_k, top_p, min_p, repetition_penalty, seed };
    assert_eq!(options, SamplingOptions::from_defaults(&generation, 0));
    assert_ne!(options, SamplingOptions::GREEDY);
    // SAFETY: as above.
    ok(unsafe { mruntime_session_set_sampling(setup.session, &sampling) });

    for (context, batch, threads) in [(300, 7, 3), (0, 0, 0)] {
        let size = size_of::<mruntime_session_options>();
        let options = mruntime_session_options { size, context, batch, threads, ..Default::default() };
        let mut memory = mruntime_memory { size: size_of::<mruntime_memory>(), ..Default::default() };
        // SAFETY: as above.
        ok(unsafe { mruntime_memory_sizes(setup.model, &options, &mut memory) });
        let limits = match context {
            // The model was trained for no more, and `Setup` opens it with two threads.
            0 => Limits { context: 512, batch: 512, threads: 2 },
            _ => Limits { context: 300, batch: 7, threads: 3 },
        };
        let sizes = qwen2_memory_sizes(rust.config(), &limits).unwrap();
        assert_eq!(
            (memory.weights, memory.kv_cache, memory.scratch),
            (sizes.weights, sizes.kv_cache, sizes.scratch)
        );
    }
}

#[test]
fn the_versions_are_those_of_the_crate() {
    assert_eq!(mruntime_abi_version(), MRUNTIME_ABI_VERSION);
    // SAFETY: a text that ends with a zero byte.
    let version = unsafe { CStr::from_ptr(mruntime_version()) };
    assert_eq!(version.to_str(), Ok(env!("CARGO_PKG_VERSION")));
}

#[test]
fn logits_that_were_changed_choose_the_next_token() {
    let setup = Setup::new();
    let session = setup.session;
    let (mut logits, mut count, mut token) = (null_mut(), 0, 0);
    // SAFETY: valid pointers; the logits are used before the next call.
    unsafe {
        ok(mruntime_session_feed(session, [100, 101].as_ptr(), 2));
        ok(mruntime_session_logits(session, &mut logits, &mut count));
        assert_eq!(count, info(setup.model).vocab_size as usize);
        let largest = mruntime::argmax(std::slice::from_raw_parts(logits, count));
        ok(mruntime_session_next(session, &mut token));
        assert_eq!(token, largest);

        ok(mruntime_session_truncate(session, 2));
        ok(mruntime_session_logits(session, &mut logits, &mut count));
        let logits = std::slice::from_raw_parts_mut(logits, count);
        logits[token as usize] = f32::NEG_INFINITY;
        let second = mruntime::argmax(logits);
        ok(mruntime_session_next(session, &mut token));
        assert_ne!(token, largest);
        assert_eq!((token, text(session)), (second, vec![100, 101, second]));
    }
}

#[test]
fn text_is_fed_as_the_tokens_that_it_has() {
    let setup = Setup::new();
    for (special, last) in [
        (mruntime_special::MRUNTIME_SPECIAL_AS_TEXT, u32::from(b'>')),
        (mruntime_special::MRUNTIME_SPECIAL_PARSE, 319),
    ] {
        let written = "the é 😀<|im_end|>";
        let tokens = tokenize(setup.model, written, special);
        assert_eq!(tokens.last(), Some(&last));
        assert_eq!(detokenize(setup.model, &tokens), written);
        let utf8: *const c_char = written.as_ptr().cast();
        // SAFETY: an open session and a text of that length.
        unsafe {
            ok(mruntime_session_reset(setup.session));
            ok(mruntime_session_feed_text(setup.session, utf8, written.len(), special as u32));
        }
        assert_eq!(text(setup.session), tokens);
    }
}

#[test]
fn text_can_be_given_out_token_by_token_as_the_header_says() {
    let setup = Setup::new();
    let written = "aé😀 the \u{FFFD}end";
    let mut tokens = tokenize(setup.model, written, mruntime_special::MRUNTIME_SPECIAL_AS_TEXT);
    assert!(tokens.len() > written.chars().count(), "characters are split");
    // Bytes that are no character, in the middle and at the end.
    tokens.insert(1, 0xFF);
    tokens.push(0xF0);
    let (mut given_out, mut kept) = (String::new(), Vec::new());
    for &token in &tokens {
        kept.push(token);
        let piece = detokenize(setup.model, &kept);
        if !piece.ends_with('\u{FFFD}') {
            given_out += &piece;
            kept.clear();
        }
    }
    given_out += &detokenize(setup.model, &kept);
    assert_eq!(given_out, "a\u{FFFD}é😀 the \u{FFFD}end\u{FFFD}");
    assert_eq!(given_out, detokenize(setup.model, &tokens));
}
