//! How a call ends: a status, and a text that says more.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use mruntime::{Error, FormatError};

/// How a call ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum mruntime_status {
    /// It did what it should.
    MRUNTIME_OK = 0,
    /// An argument is a null pointer, not UTF-8, out of its range, or a structure of a wrong size.
    MRUNTIME_INVALID_ARGUMENT = 1,
    /// The system could not read or write a file.
    MRUNTIME_IO = 2,
    /// A file is of another kind, version or model than it should be, or a session file is damaged.
    MRUNTIME_FORMAT = 3,
    /// A model file is damaged or truncated: get it again.
    MRUNTIME_DAMAGED = 4,
    /// Memory or a thread cannot be had.
    MRUNTIME_MEMORY = 5,
    /// The tokens do not fit into the context.
    MRUNTIME_CONTEXT_FULL = 6,
    /// mruntime_session_cancel was called.
    MRUNTIME_CANCELLED = 7,
    /// Another call is using the session.
    MRUNTIME_BUSY = 8,
    /// The buffer is too small; the length that is needed was returned.
    MRUNTIME_BUFFER_TOO_SMALL = 9,
    /// The model has nothing of the kind, such as a section or a chat template.
    MRUNTIME_NOT_FOUND = 10,
    /// The tokenizer or the chat template failed on this text.
    MRUNTIME_TEXT_FAILED = 11,
    /// A mistake in the library.
    MRUNTIME_INTERNAL = 12,
}

/// Why a call failed.
pub(crate) struct Failure {
    pub status: mruntime_status,
    message: String,
}

impl Failure {
    pub(crate) fn new(status: mruntime_status, message: impl Into<String>) -> Failure {
        Failure { status, message: message.into() }
    }

    pub(crate) fn argument(message: impl Into<String>) -> Failure {
        Failure::new(mruntime_status::MRUNTIME_INVALID_ARGUMENT, message)
    }
}

impl From<&Error> for mruntime_status {
    fn from(error: &Error) -> mruntime_status {
        use mruntime_status::*;
        match error {
            Error::Io { .. } => MRUNTIME_IO,
            Error::Format { problem, .. } => problem.into(),
            Error::SessionFile { .. } | Error::WeightArena { .. } => MRUNTIME_FORMAT,
            Error::Damaged { .. } => MRUNTIME_DAMAGED,
            Error::Memory { .. } | Error::ArenaFull { .. } => MRUNTIME_MEMORY,
            Error::ContextFull { .. } => MRUNTIME_CONTEXT_FULL,
            Error::Threads { threads, .. } if (1..=mruntime::pool::MAX_THREADS).contains(threads) => {
                MRUNTIME_MEMORY
            }
            _ => MRUNTIME_INVALID_ARGUMENT,
        }
    }
}

impl From<&FormatError> for mruntime_status {
    fn from(problem: &FormatError) -> mruntime_status {
        match problem {
            FormatError::HeaderTruncated { .. }
            | FormatError::Truncated { .. }
            | FormatError::Overlong { .. }
            | FormatError::BadHeaderBytes { .. }
            | FormatError::BadChunkBytes { .. }
            | FormatError::TooManySections { .. }
            | FormatError::PrologueTooLarge { .. }
            | FormatError::PrologueOutsideFile { .. }
            | FormatError::RootMismatch { .. }
            | FormatError::SectionDamaged { .. }
            | FormatError::ChunkDamaged { .. }
            | FormatError::PaddingNotZero { .. } => mruntime_status::MRUNTIME_DAMAGED,
            _ => mruntime_status::MRUNTIME_FORMAT,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::new((&error).into(), error.to_string())
    }
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs the body of a function of the interface: no panic leaves it, and a failure becomes the thread's last error.
pub(crate) fn guard(body: impl FnOnce() -> Result<(), Failure>) -> mruntime_status {
    // Whatever a panic leaves half done is in a session, whose lock it has poisoned.
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return mruntime_status::MRUNTIME_OK,
        Ok(Err(failure)) => failure,
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            let failure =
                Failure::new(mruntime_status::MRUNTIME_INTERNAL, format!("a mistake in mruntime: {text}"));
            // Dropping a payload may run anything.
            std::mem::forget(payload);
            failure
        }
    };
    let message = CString::new(failure.message.replace('\0', " ")).unwrap_or_default();
    // Fails only in a thread that is ending, where nobody asks for it any more.
    let _ = LAST_ERROR.try_with(|last| last.replace(message));
    failure.status
}

/// What went wrong in the last call of this thread that failed: one line of UTF-8, empty if none did. It is valid until
/// the next call of this thread that fails.
///
/// Any thread; each has its own.
#[unsafe(no_mangle)]
pub extern "C" fn mruntime_last_error() -> *const c_char {
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    #[test]
    fn a_panic_becomes_a_status_and_a_text() {
        let status = guard(|| panic!("seven {}", "dwarfs"));
        assert_eq!(status, mruntime_status::MRUNTIME_INTERNAL);
        // SAFETY: the text is valid until the next failure.
        let text = unsafe { CStr::from_ptr(mruntime_last_error()) };
        assert_eq!(text.to_str(), Ok("a mistake in mruntime: seven dwarfs"));
        std::thread::spawn(|| {
            // SAFETY: as above.
            let text = unsafe { CStr::from_ptr(mruntime_last_error()) };
            assert!(text.is_empty(), "another thread's error");
        })
        .join()
        .unwrap();
    }
}
