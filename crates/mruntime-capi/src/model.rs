//! Models: opening, looking at, checking.

use std::ffi::{c_char, c_void};
use std::path::Path;
use std::sync::Arc;

use mruntime::{Backing, Model, OpenOptions, Pool};

use crate::options::{fast_numerics, mruntime_session_options};
use crate::options::{mruntime_info, mruntime_memory, mruntime_open_options, mruntime_sampling};
use crate::pointers::{c_text, fill, read_sized, reference, slice, store, write_sized};
use crate::session::limits;
use crate::shared_pool::SharedPool;
use crate::status::{Failure, guard, mruntime_status};

/// An open model.
pub struct mruntime_model(pub(crate) Arc<Shared>);

/// What a model's sessions share and keep alive.
pub(crate) struct Shared {
    /// Before `model`, which it borrows.
    #[cfg(feature = "text")]
    pub text: crate::text::Text,
    pub model: Model,
    pub pool: SharedPool,
    pub threads: usize,
    pub stop_tokens: Vec<u32>,
}

/// Opens a model with what `open` makes of the options and a pool.
///
/// # Safety
/// As `mruntime_model_open`.
unsafe fn open_model(
    options: *const mruntime_open_options,
    model: *mut *mut mruntime_model,
    open: impl FnOnce(&OpenOptions, &mut Pool) -> Result<Model, Failure>,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    unsafe { store(model, std::ptr::null_mut(), "model") }?;
    // SAFETY: as above.
    let options = unsafe { read_sized(options, "options") }?;
    // SAFETY: as above.
    let open_options = unsafe { options.check() }?;
    let threads = if options.threads == 0 { mruntime::performance_cores() } else { options.threads as usize };
    let mut pool = Pool::new(threads)?;
    let opened = open(&open_options, &mut pool)?;
    let stop_tokens = opened.generation()?.stop_tokens;
    let shared = Arc::new(Shared {
        #[cfg(feature = "text")]
        text: crate::text::Text::default(),
        model: opened,
        pool: SharedPool::new(pool),
        threads,
        stop_tokens,
    });
    // SAFETY: the caller's promise.
    unsafe { store(model, Box::into_raw(Box::new(mruntime_model(shared))), "model") }
}

/// Opens the file at `path`. `options` may be NULL. On failure, `*model` is NULL.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_model_open(
    path: *const c_char,
    options: *const mruntime_open_options,
    model: *mut *mut mruntime_model,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let open = |options: &OpenOptions, pool: &mut Pool| {
            Ok(Model::open(Path::new(c_text(path, "path")?), options, pool)?)
        };
        open_model(options, model, open)
    })
}

/// Opens a model that is a part of an open file, for example an uncompressed asset of an Android package: `length` bytes
/// from `offset`; 0 for all up to the end of the file. `descriptor` is a file descriptor, on Windows a HANDLE. It is
/// duplicated, so it may be closed afterwards; its position is neither used nor changed. On failure, `*model` is NULL.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_model_open_fd(
    descriptor: isize,
    offset: u64,
    length: u64,
    options: *const mruntime_open_options,
    model: *mut *mut mruntime_model,
) -> mruntime_status {
    let open = |options: &OpenOptions, pool: &mut Pool| {
        let path = format!("(descriptor {descriptor})");
        let io_error = |source| mruntime::Error::Io { path: (&path).into(), source };
        // SAFETY: the caller's promise.
        let file = unsafe { duplicate(descriptor) }.map_err(io_error)?;
        let bytes = file.metadata().map_err(io_error)?.len();
        let Some(left) = bytes.checked_sub(offset) else {
            return Err(Failure::argument(format!(
                "offset {offset} is after the end of the file of {bytes} bytes"
            )));
        };
        let length = if length == 0 { left } else { length };
        if length > left {
            return Err(Failure::argument(format!(
                "{length} bytes from {offset} are more than the file's {bytes} bytes"
            )));
        }
        Ok(Model::open_within(file, offset, length, Path::new(&path), options, pool)?)
    };
    // SAFETY: the caller's promise.
    guard(|| unsafe { open_model(options, model, open) })
}

/// A second descriptor for the same file.
#[cfg(not(windows))]
unsafe fn duplicate(descriptor: isize) -> std::io::Result<std::fs::File> {
    use std::os::fd::BorrowedFd;
    let Some(descriptor) = i32::try_from(descriptor).ok().filter(|&number| number >= 0) else {
        return Err(std::io::Error::other("not a file descriptor"));
    };
    // SAFETY: not negative. If it is not open, duplicating it fails.
    Ok(unsafe { BorrowedFd::borrow_raw(descriptor) }.try_clone_to_owned()?.into())
}

/// A second handle for the same file.
#[cfg(windows)]
unsafe fn duplicate(handle: isize) -> std::io::Result<std::fs::File> {
    use std::os::windows::io::BorrowedHandle;
    // SAFETY: that it is an open handle is the caller's promise.
    Ok(unsafe { BorrowedHandle::borrow_raw(handle as *mut c_void) }.try_clone_to_owned()?.into())
}

/// Opens a model in memory, such as one that is linked into the program. The bytes must begin at a multiple of 64, and stay
/// unchanged until the model and all its sessions are closed. On failure, `*model` is NULL.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_model_open_memory(
    bytes: *const c_void,
    length: usize,
    options: *const mruntime_open_options,
    model: *mut *mut mruntime_model,
) -> mruntime_status {
    // SAFETY: the caller's promise, which lasts as long as anything that was made of the model.
    guard(|| unsafe {
        let open = |options: &OpenOptions, pool: &mut Pool| {
            let bytes = slice::<u8>(bytes.cast(), length, "bytes")?;
            Ok(Model::from_static(bytes, options, pool)?)
        };
        open_model(options, model, open)
    })
}

/// Closes a model and sets the handle to NULL; one that is NULL already is left. Sessions stay usable, and keep what they
/// need of the model.
///
/// Any thread, when no other one uses the handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_model_close(model: *mut *mut mruntime_model) {
    // SAFETY: the caller's promise.
    unsafe { close(model) }
}

/// Drops what a handle points at and sets it to null.
///
/// # Safety
/// `handle` is null, or points at null or at a pointer that a function of the interface gave out.
pub(crate) unsafe fn close<T>(handle: *mut *mut T) {
    guard(|| {
        // SAFETY: the caller's promise.
        let pointer = *unsafe { reference(handle, "handle") }?;
        if !pointer.is_null() {
            // SAFETY: as above.
            unsafe { store(handle, std::ptr::null_mut(), "handle") }?;
            // SAFETY: it comes from `Box::into_raw`, and nobody has dropped it, for the handle was not null.
            drop(unsafe { Box::from_raw(pointer) });
        }
        Ok(())
    });
}

/// Tells what the model is.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_model_info(
    model: *const mruntime_model,
    info: *mut mruntime_info,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let Shared { model, threads, .. } = &*reference(model, "model")?.0;
        let cfg = model.config();
        let value = mruntime_info {
            size: 0,
            file_bytes: model.prologue().file_bytes(),
            weight_bytes: model.arena().len() as u64,
            root: model.root().0,
            vocab_size: cfg.vocab_size,
            max_context: cfg.max_position_embeddings,
            layers: cfg.num_layers,
            hidden_size: cfg.hidden_size,
            intermediate_size: cfg.intermediate_size,
            heads: cfg.num_heads,
            kv_heads: cfg.num_kv_heads,
            head_dim: cfg.head_dim,
            mapped: (model.backing() == Some(Backing::Map)).into(),
            threads: *threads as u32,
            fast_numerics: fast_numerics().id(),
            reserved: 0,
        };
        write_sized(info, value, "info")
    })
}

/// Checks every byte of the model against its digests; MRUNTIME_DAMAGED if there are other ones, and the last error says
/// which.
///
/// Any thread; it uses the model's pool.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_model_verify(model: *const mruntime_model) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let shared = &reference(model, "model")?.0;
        Ok(shared.pool.with(|pool| shared.model.verify(pool))?)
    })
}

/// Copies a section of the file, such as "tokenizer.json" or "LICENSE"; MRUNTIME_NOT_FOUND if there is none of that name.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_model_section(
    model: *const mruntime_model,
    name: *const c_char,
    buffer: *mut u8,
    capacity: usize,
    length: *mut usize,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let name = c_text(name, "name")?;
        let content = reference(model, "model")?.0.model.section(name)?;
        let none =
            || Failure::new(mruntime_status::MRUNTIME_NOT_FOUND, format!("the model has no section {name}"));
        fill(&content.ok_or_else(none)?, &[], buffer, capacity, length)
    })
}

/// Copies the tokens that end an answer, for programs that choose token by token with mruntime_session_next.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_model_stop_tokens(
    model: *const mruntime_model,
    buffer: *mut u32,
    capacity: usize,
    length: *mut usize,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe { fill(&reference(model, "model")?.0.stop_tokens, &[], buffer, capacity, length) })
}

/// How the model's makers want tokens to be chosen. The seed is 0.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_model_sampling(
    model: *const mruntime_model,
    sampling: *mut mruntime_sampling,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let defaults = reference(model, "model")?.0.model.generation()?;
        write_sized(sampling, mruntime_sampling::from_defaults(&defaults), "sampling")
    })
}

/// Tells how many bytes a session with these options would need, before anything is allocated.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mruntime_memory_sizes(
    model: *const mruntime_model,
    options: *const mruntime_session_options,
    memory: *mut mruntime_memory,
) -> mruntime_status {
    // SAFETY: the caller's promise.
    guard(|| unsafe {
        let shared = &*reference(model, "model")?.0;
        let options = read_sized(options, "options")?;
        options.numerics()?;
        let limits = limits(shared, &options);
        let mruntime::MemorySizes { weights, kv_cache, scratch } =
            mruntime::qwen2_memory_sizes(shared.model.config(), &limits)?;
        write_sized(memory, mruntime_memory { size: 0, weights, kv_cache, scratch }, "memory")
    })
}
