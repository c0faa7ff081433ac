//! The C interface of `mruntime`. `include/mruntime.h` is made from this crate's public items and their documentation.
//!
//! Every function catches panics and turns them into [`mruntime_status::MRUNTIME_INTERNAL`]. Handles are pointers to
//! [`mruntime_model`] and [`mruntime_session`]; a session keeps its model open.
//!
//! A thread pool runs one job at a time, and a token is some hundred jobs. So a model has one pool, which its sessions
//! share, a prefill step or a token at a time, in the order in which they ask: however many sessions generate, there are as
//! many busy threads as were asked for. A session that must not wait for others gets a pool of its own by its options.

#![allow(non_camel_case_types, reason = "the names that C knows")]
#![allow(clippy::missing_safety_doc, reason = "the rules for pointers stand at the head of the C header")]

mod model;
mod options;
mod pointers;
mod session;
mod shared_pool;
mod status;
#[cfg(feature = "text")]
mod text;

pub use model::*;
pub use options::*;
pub use session::*;
pub use status::*;
#[cfg(feature = "text")]
pub use text::*;

use std::ffi::{CStr, c_char};

/// Version of this interface. It grows when a program that was compiled for an earlier one would no longer work.
pub const MRUNTIME_ABI_VERSION: u32 = 1;

const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(version) => version,
    Err(_) => panic!("a version without zero bytes"),
};

/// The interface's version of the library that is running. It must equal MRUNTIME_ABI_VERSION.
///
/// Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn mruntime_abi_version() -> u32 {
    MRUNTIME_ABI_VERSION
}

/// The library's version, such as "0.1.0".
///
/// Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn mruntime_version() -> *const c_char {
    VERSION.as_ptr()
}
