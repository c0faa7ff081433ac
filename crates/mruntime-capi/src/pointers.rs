//! Pointers from C: checked for null and alignment, then borrowed for the time of a call. That they point at what they
//! should is the caller's promise.

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;

use crate::status::{Failure, mruntime_status};

/// The value at `pointer`.
///
/// # Safety
/// If not null, it points at a valid `T` that nobody changes during the call.
pub(crate) unsafe fn reference<'a, T>(pointer: *const T, name: &str) -> Result<&'a T, Failure> {
    check_pointer(pointer, name)?;
    // SAFETY: not null and aligned; the rest is the caller's promise.
    Ok(unsafe { &*pointer })
}

/// Stores `value` at `pointer`, which need not be initialised.
///
/// # Safety
/// If not null, it points at memory for a `T` that nobody else uses during the call.
pub(crate) unsafe fn store<T>(pointer: *mut T, value: T, name: &str) -> Result<(), Failure> {
    check_pointer(pointer, name)?;
    // SAFETY: not null and aligned; the rest is the caller's promise.
    unsafe { pointer.write(value) };
    Ok(())
}

/// Refuses null and what is not aligned.
pub(crate) fn check_pointer<T>(pointer: *const T, name: &str) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(Failure::argument(format!("{name} is a null pointer")));
    }
    if !pointer.is_aligned() {
        return Err(Failure::argument(format!("{name} is not aligned")));
    }
    Ok(())
}

/// `len` elements at `pointer`, which may be null if there are none.
///
/// # Safety
/// As [`reference`], for all elements.
pub(crate) unsafe fn slice<'a, T>(pointer: *const T, len: usize, name: &str) -> Result<&'a [T], Failure> {
    if len == 0 {
        return Ok(&[]);
    }
    check_pointer(pointer, name)?;
    check_len::<T>(len, name)?;
    // SAFETY: not null, aligned, not larger than an object can be; the rest is the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(pointer, len) })
}

fn check_len<T>(len: usize, name: &str) -> Result<(), Failure> {
    match len.checked_mul(size_of::<T>()).and_then(|bytes| isize::try_from(bytes).ok()) {
        Some(_) => Ok(()),
        None => Err(Failure::argument(format!("{name}: {len} elements are more than memory holds"))),
    }
}

/// A text of `len` bytes.
///
/// # Safety
/// As [`slice`].
#[cfg(feature = "text")]
pub(crate) unsafe fn text<'a>(pointer: *const c_char, len: usize, name: &str) -> Result<&'a str, Failure> {
    // SAFETY: the caller's promise.
    utf8(unsafe { slice(pointer.cast(), len, name) }?, name)
}

/// A text that ends with a zero byte.
///
/// # Safety
/// As [`slice`], up to the zero byte.
pub(crate) unsafe fn c_text<'a>(pointer: *const c_char, name: &str) -> Result<&'a str, Failure> {
    check_pointer(pointer, name)?;
    // SAFETY: not null; that a zero byte follows is the caller's promise.
    utf8(unsafe { CStr::from_ptr(pointer) }.to_bytes(), name)
}

fn utf8<'a>(bytes: &'a [u8], name: &str) -> Result<&'a str, Failure> {
    std::str::from_utf8(bytes).map_err(|error| Failure::argument(format!("{name} is not UTF-8: {error}")))
}

/// Stores `values` in a buffer, and their number, `tail` not counted, at `length`. A null buffer asks for the number only.
///
/// # Safety
/// `length` as in [`store`]; `buffer`, if not null, points at memory for `capacity` elements that nobody else uses.
pub(crate) unsafe fn fill<T: Copy>(
    values: &[T],
    tail: &[T],
    buffer: *mut T,
    capacity: usize,
    length: *mut usize,
) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    unsafe { store(length, values.len(), "length") }?;
    if buffer.is_null() {
        return Ok(());
    }
    check_pointer(buffer, "buffer")?;
    check_len::<T>(capacity, "buffer")?;
    let needed = values.len() + tail.len();
    if capacity < needed {
        let message = format!("the buffer holds {capacity} elements, {needed} are needed");
        return Err(Failure::new(mruntime_status::MRUNTIME_BUFFER_TOO_SMALL, message));
    }
    for (at, piece) in [(0, values), (values.len(), tail)] {
        // SAFETY: `at + piece.len()` is at most `capacity`; Rust has no reference into the caller's memory.
        unsafe { buffer.add(at).copy_from_nonoverlapping(piece.as_ptr(), piece.len()) };
    }
    Ok(())
}

/// A structure that begins with its own size, a `usize`, and for which any bytes are valid.
///
/// # Safety
/// Both must be so, and the structure must be `repr(C)` without padding.
pub(crate) unsafe trait WithSize: Copy + Default {}

/// The structure at `pointer`, of which the caller may know fewer or more fields: what it does not know is 0; what we do
/// not know must be 0. Null is a structure of zeros.
///
/// # Safety
/// If not null, `pointer` points at a size and as many bytes as that says.
pub(crate) unsafe fn read_sized<T: WithSize>(pointer: *const T, name: &str) -> Result<T, Failure> {
    let mut value = T::default();
    if pointer.is_null() {
        return Ok(value);
    }
    // SAFETY: the caller's promise.
    let size = unsafe { sized(pointer, name) }?;
    // SAFETY: as above.
    let bytes = unsafe { slice::<MaybeUninit<u8>>(pointer.cast(), size, name) }?;
    let known = size.min(size_of::<T>());
    // SAFETY: `known` bytes are inside both; any bytes are a valid `T`.
    unsafe { (&raw mut value).cast::<MaybeUninit<u8>>().copy_from_nonoverlapping(bytes.as_ptr(), known) };
    // SAFETY: the caller has initialised the bytes that it counts.
    if bytes[known..].iter().any(|byte| unsafe { byte.assume_init() } != 0) {
        return Err(Failure::argument(format!(
            "{name} has options that this version of the library does not know"
        )));
    }
    Ok(value)
}

/// Stores `value` at `pointer`, as far as the caller knows it by the size that stands there.
///
/// # Safety
/// If not null, `pointer` points at a size and memory for as many bytes as that says, which nobody else uses.
pub(crate) unsafe fn write_sized<T: WithSize>(pointer: *mut T, value: T, name: &str) -> Result<(), Failure> {
    // SAFETY: the caller's promise.
    let size = unsafe { sized(pointer, name) }?;
    let known = size.min(size_of::<T>()) - size_of::<usize>();
    // SAFETY: the bytes after the size, as many as there are in both.
    unsafe {
        let from = (&raw const value).cast::<u8>().add(size_of::<usize>());
        pointer.cast::<u8>().add(size_of::<usize>()).copy_from_nonoverlapping(from, known);
    }
    Ok(())
}

/// The size that a structure says it has.
///
/// # Safety
/// If not null, `pointer` points at a size.
pub(crate) unsafe fn sized<T>(pointer: *const T, name: &str) -> Result<usize, Failure> {
    check_pointer(pointer, name)?;
    // SAFETY: not null and aligned; that a size stands there is the caller's promise.
    let size = unsafe { pointer.cast::<usize>().read() };
    if !(size_of::<usize>() + 1..=4096).contains(&size) {
        let message = format!("{name} says that it has {size} bytes: set its size to sizeof");
        return Err(Failure::argument(message));
    }
    Ok(size)
}
