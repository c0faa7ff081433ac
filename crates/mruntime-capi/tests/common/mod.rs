//! What the tests share.

use std::ffi::CStr;
use std::path::PathBuf;
use std::ptr::{null, null_mut};

use mruntime_capi::mruntime_status::*;
use mruntime_capi::*;
use mruntime_tests::TinyModel;

/// A tiny model with a tokenizer, and a session.
pub struct Setup {
    _folder: tempfile::TempDir,
    pub path: PathBuf,
    pub model: *mut mruntime_model,
    pub session: *mut mruntime_session,
}

impl Setup {
    pub fn new() -> Setup {
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
        let generation =
            r#"{"do_sample": true, "temperature": 0.7, "top_k": 20, "eos_token_id": [319, 317]}"#;
        std::fs::write(hf.join("generation_config.json"), generation).unwrap();
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
        Setup { _folder: folder, path, model, session }
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

pub fn c_string(path: &std::path::Path) -> std::ffi::CString {
    std::ffi::CString::new(path.to_str().unwrap()).unwrap()
}

pub fn last_error() -> String {
    // SAFETY: a text that ends with a zero byte, valid until the next failure of this thread.
    unsafe { CStr::from_ptr(mruntime_last_error()) }.to_str().unwrap().to_owned()
}

#[track_caller]
pub fn refused(status: mruntime_status, expected: mruntime_status, message: &str) {
    assert_eq!(status, expected, "{}", last_error());
    assert!(last_error().contains(message), "{}", last_error());
}
