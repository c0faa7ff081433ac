//! Text: tokenizer and chat template of the model.

use std::ffi::{c_char, c_void};
use std::sync::OnceLock;

use mruntime::Model;
use mruntime_text::{ChatTemplate, SpecialTokens, StreamDecoder, TextError, Tokenizer};

use crate::model::{Shared, mruntime_model};
use crate::options::{mruntime_generated, mruntime_stop};
use crate::pointers::{c_text, fill, reference, sized, slice, text, write_sized};
use crate::session::mruntime_session;
use crate::status::{Failure, guard, mruntime_status};

/// What text needs, made at its first use.
#[derive(Default)]
pub(crate) struct Text {
    tokenizer: OnceLock<Result<Tokenizer<'static>, (mruntime_status, String)>>,
    template: OnceLock<Result<ChatTemplate, (mruntime_status, String)>>,
}

impl Shared {
    pub(crate) fn tokenizer(&self) -> Result<&Tokenizer<'_>, Failure> {
        let make = || {
            // SAFETY: `Shared` never moves, being in an `Arc` since it was made, and it drops the tokenizer before the
            // model. The tokenizer is given out for a borrow of `Shared` only.
            let model: &'static Model = unsafe { &*std::ptr::from_ref(&self.model) };
            Tokenizer::from_model(model).map_err(remember)
        };
        self.text.tokenizer.get_or_init(make).as_ref().map_err(recall)
    }

    fn template(&self) -> Result<&ChatTemplate, Failure> {
        let none = || (mruntime_status::MRUNTIME_NOT_FOUND, "the model has no chat template".to_owned());
        let make = || ChatTemplate::from_model(&self.model).map_err(remember)?.ok_or_else(none);
        self.text.template.get_or_init(make).as_ref().map_err(recall)
    }
}

impl From<&TextError> for mruntime_status {
    fn from(error: &TextError) -> mruntime_status {
        match error {
            TextError::Model(error) => error.into(),
            TextError::Prepacked(problem) => problem.into(),
            TextError::NoTokenizer => mruntime_status::MRUNTIME_NOT_FOUND,
            TextError::Encode(_) | TextError::Template { .. } => mruntime_status::MRUNTIME_TEXT_FAILED,
            _ => mruntime_status::MRUNTIME_FORMAT,
        }
    }
}

fn remember(error: TextError) -> (mruntime_status, String) {
    ((&error).into(), error.to_string())
}

fn recall((status, message): &(mruntime_status, String)) -> Failure {
    Failure::new(*status, message)
}

impl From<TextError> for Failure {
    fn from(error: TextError) -> Failure {
        Failure::new((&error).into(), error.to_string())
    }
}

/// What becomes of special tokens, such as <|im_end|>, that stand in a text.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum mruntime_special {
    /// They are text like any other: for text that nobody vouches for.
    MRUNTIME_SPECIAL_AS_TEXT = 0,
    /// They become their token: for text that a chat template wrote.
    MRUNTIME_SPECIAL_PARSE = 1,
}

fn special(number: u32) -> Result<SpecialTokens, Failure> {
    match number {
        0 => Ok(SpecialTokens::AsText),
        1 => Ok(SpecialTokens::Parse),
        _ => Err(Failure::argument(format!("special is {number}; it must be 0 or 1"))),
    }
}

/// Turns a text of `length` bytes into tokens. `special` is an mruntime_special.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_tokenize(
    model: *const mruntime_model,
    utf8: *const c_char,
    length: usize,
    special: u32,
    tokens: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let tokenizer = reference(model, "model")?.0.tokenizer()?;
        let found = tokenizer.encode(text(utf8, length, "utf8")?, self::special(special)?)?;
        fill(&found, &[], tokens, capacity, count)
    })
}

/// Turns tokens into text, with a zero byte at its end that `*length` does not count. Bytes that are not UTF-8 become
/// U+FFFD. If `skip_special` is not 0, special tokens are left out.
///
/// A character may be split over several tokens. To give out a text while it grows, detokenize each new token together with
/// those that were kept: if the text ends with U+FFFD (bytes EF BF BD), keep them all, otherwise give it out and keep none.
/// At the end, give out what was kept.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_detokenize(
    model: *const mruntime_model,
    tokens: *const u32,
    count: usize,
    skip_special: u32,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let tokenizer = reference(model, "model")?.0.tokenizer()?;
        let text = tokenizer.decode(slice(tokens, count, "tokens")?, skip_special != 0);
        fill(text.as_bytes(), &[0], buffer.cast(), capacity, length)
    })
}

/// One message of a conversation. It stands in arrays, so it has no size and never grows.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct mruntime_message {
    /// "system", "user" or "assistant".
    pub role: *const c_char,
    /// What was said.
    pub content: *const c_char,
}

/// Writes a conversation as the model's chat template wants it, with a zero byte at its end that `*length` does not count.
/// If `add_generation_prompt` is not 0, the text ends where the answer begins. Special tokens that stand in messages are
/// not told from the template's own.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_apply_chat_template(
    model: *const mruntime_model,
    messages: *const mruntime_message,
    count: usize,
    add_generation_prompt: u32,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let template = reference(model, "model")?.0.template()?;
        let mut conversation = Vec::with_capacity(count.min(1024));
        for message in slice(messages, count, "messages")? {
            let (role, content) = (c_text(message.role, "role")?, c_text(message.content, "content")?);
            conversation.push(serde_json::json!({ "role": role, "content": content }));
        }
        let text = template.render(&conversation, None, add_generation_prompt != 0)?;
        fill(text.as_bytes(), &[0], buffer.cast(), capacity, length)
    })
}

/// mruntime_session_feed for a text of `length` bytes. `special` is an mruntime_special.
///
/// One thread at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_feed_text(
    session: *mut mruntime_session,
    utf8: *const c_char,
    length: usize,
    special: u32,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let (mut state, cancel) = reference(session, "session")?.start()?;
        let (text, special) = (text(utf8, length, "utf8")?, self::special(special)?);
        let tokens = state.shared.tokenizer()?.encode(text, special)?;
        state.feed(&tokens, cancel)
    })
}

/// Gets the text of an answer in pieces: whole characters, `length` bytes and a zero byte. Returns 0 to go on; after
/// another number it is not called again. It must return: no exception and no longjmp may leave it.
pub type mruntime_on_text =
    Option<unsafe extern "C" fn(user: *mut c_void, utf8: *const c_char, length: usize) -> i32>;

/// mruntime_session_generate, with text in place of tokens. Special tokens are left out.
///
/// One thread at a time; the callback runs in it, and must not use the session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_session_generate_text(
    session: *mut mruntime_session,
    max_tokens: u64,
    on_text: mruntime_on_text,
    user: *mut c_void,
    generated: *mut mruntime_generated,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let (mut state, cancel) = reference(session, "session")?.start()?;
        if !generated.is_null() {
            sized(generated, "generated")?;
        }
        let shared = std::sync::Arc::clone(&state.shared);
        let mut decoder = StreamDecoder::new(shared.tokenizer()?, true);
        let mut piece = Vec::new();
        let mut give = |text: &str| {
            let Some(on_text) = on_text.filter(|_| !text.is_empty()) else { return true };
            piece.clear();
            piece.extend_from_slice(text.as_bytes());
            piece.push(0);
            on_text(user, piece.as_ptr().cast(), text.len()) == 0
        };
        let done = state.generate(max_tokens, cancel, |token| give(decoder.push(token)))?;
        if done.stop != mruntime_stop::MRUNTIME_STOP_CALLBACK as u32 {
            give(decoder.finish());
        }
        if generated.is_null() { Ok(()) } else { write_sized(generated, done, "generated") }
    })
}
