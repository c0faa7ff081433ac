//! Damaged, truncated and foreign files: the status says whether getting the file again helps, whichever function finds it.

mod common;

use std::ffi::CStr;
use std::path::PathBuf;
use std::ptr::{null, null_mut};

use common::{Setup, c_string, refused};
use mruntime::{Model, OpenOptions, Pool};
use mruntime_capi::mruntime_status::*;
use mruntime_capi::*;

/// A model file of which damaged copies are made.
struct File {
    setup: Setup,
    good: Vec<u8>,
    model: Model,
}

impl File {
    fn new() -> File {
        let setup = Setup::new();
        let good = std::fs::read(&setup.path).unwrap();
        let model = Model::open(&setup.path, &OpenOptions::default(), &mut Pool::new(1).unwrap()).unwrap();
        File { setup, good, model }
    }

    fn section(&self, name: &str) -> usize {
        self.model.prologue().section(name).unwrap().offset as usize
    }

    /// A copy of its first `length` bytes, with one bit of byte `at` changed.
    fn copy(&self, at: Option<usize>, length: usize) -> PathBuf {
        let mut bytes = self.good[..length].to_vec();
        if let Some(at) = at {
            bytes[at] ^= 1;
        }
        let path = self.setup.path.with_file_name(format!("{at:?}-{length}.mrt"));
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn damaged(&self, at: usize) -> PathBuf {
        self.copy(Some(at), self.good.len())
    }
}

/// Opens a file in memory of the process's own, so that it may be truncated.
fn open(path: &std::path::Path, verify: u32, model: &mut *mut mruntime_model) -> mruntime_status {
    let size = size_of::<mruntime_open_options>();
    let options = mruntime_open_options { size, threads: 1, read: 1, verify, ..Default::default() };
    // SAFETY: valid pointers.
    unsafe { mruntime_model_open(c_string(path).as_ptr(), &options, model) }
}

fn tokenize(model: *const mruntime_model) -> mruntime_status {
    // SAFETY: an open model and valid pointers.
    unsafe { mruntime_tokenize(model, c"a".as_ptr(), 1, 0, null_mut(), 0, &mut 0) }
}

fn apply_chat_template(model: *const mruntime_model) -> mruntime_status {
    // SAFETY: as above.
    unsafe { mruntime_apply_chat_template(model, null(), 0, 1, null_mut(), 0, &mut 0) }
}

type Use = fn(*const mruntime_model) -> mruntime_status;

/// Sections that are checked when they are used.
const USES: [(&CStr, Use); 2] = [(c"tokenizer", tokenize), (c"chat_template", apply_chat_template)];

fn section(model: *const mruntime_model, name: &CStr) -> mruntime_status {
    // SAFETY: as above.
    unsafe { mruntime_model_section(model, name.as_ptr(), null_mut(), 0, &mut 0) }
}

#[test]
fn what_getting_the_file_again_cures_is_damaged() {
    let file = File::new();
    let (all, mut model) = (file.good.len(), null_mut());
    let directory = file.damaged(512);
    refused(open(&directory, 0, &mut model), MRUNTIME_DAMAGED, "header, directory or chunk table is damaged");
    for length in [100, all - 1] {
        refused(open(&file.copy(None, length), 0, &mut model), MRUNTIME_DAMAGED, "truncated");
    }
    let generation = file.damaged(file.section("generation"));
    refused(open(&generation, 0, &mut model), MRUNTIME_DAMAGED, "section generation is damaged");
    let weights = file.damaged(file.model.prologue().arena_offset() as usize);
    refused(open(&weights, 1, &mut model), MRUNTIME_DAMAGED, "chunk 0");

    for (name, using_it) in USES {
        let path = file.damaged(file.section(name.to_str().unwrap()));
        assert_eq!(open(&path, 0, &mut model), MRUNTIME_OK);
        let message = format!("section {} is damaged", name.to_str().unwrap());
        refused(section(model, name), MRUNTIME_DAMAGED, &message);
        refused(using_it(model), MRUNTIME_DAMAGED, &message);
        // SAFETY: an open model.
        refused(unsafe { mruntime_model_verify(model) }, MRUNTIME_DAMAGED, name.to_str().unwrap());
        // SAFETY: a handle of the interface.
        unsafe { mruntime_model_close(&mut model) };
    }
}

#[test]
fn what_is_another_format_or_another_files_is_not_damaged() {
    let file = File::new();
    let mut model = null_mut();
    refused(open(&file.damaged(0), 0, &mut model), MRUNTIME_FORMAT, "not a .mrt file");
    refused(open(&file.damaged(8), 0, &mut model), MRUNTIME_FORMAT, "format version");
    assert!(model.is_null());
}

#[test]
fn what_the_system_cannot_read_is_an_io_error_also_for_text() {
    let file = File::new();
    let (path, mut model) = (file.copy(None, file.good.len()), null_mut());
    assert_eq!(open(&path, 0, &mut model), MRUNTIME_OK);
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1000).unwrap();
    refused(section(model, c"tokenizer"), MRUNTIME_IO, "the file is shorter than it should be");
    refused(tokenize(model), MRUNTIME_IO, "the file is shorter than it should be");
    refused(apply_chat_template(model), MRUNTIME_IO, "the file is shorter than it should be");
    // SAFETY: a handle of the interface.
    unsafe { mruntime_model_close(&mut model) };
}
