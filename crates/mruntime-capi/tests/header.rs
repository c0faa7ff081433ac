//! The committed header is what cbindgen makes of this crate.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("include/mruntime.h")
}

fn generate() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(folder.join("cbindgen.toml")).unwrap();
    let mut header = Vec::new();
    cbindgen::generate_with_config(folder, config).unwrap().write(&mut header);
    String::from_utf8(header).unwrap()
}

#[test]
fn the_header_is_up_to_date() {
    let committed = std::fs::read_to_string(path()).unwrap_or_default().replace('\r', "");
    assert!(
        generate() == committed,
        "include/mruntime.h is out of date: cargo test -p mruntime-capi --test header -- --ignored"
    );
}

#[test]
#[ignore = "writes include/mruntime.h"]
fn write_the_header() {
    std::fs::write(path(), generate()).unwrap();
}
