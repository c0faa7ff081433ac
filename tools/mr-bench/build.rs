//! Notes the commit that the program is built from, where it is built in a checkout.

#![forbid(unsafe_code)]

use std::process::Command;

fn main() {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
    };
    if let Some(commit) = git(&["describe", "--always", "--dirty", "--abbrev=12"]) {
        println!("cargo::rustc-env=MR_COMMIT={commit}");
    }
    // Every change of the checked-out commit is logged there; a directory that is no checkout is looked at once.
    let log = git(&["rev-parse", "--git-path", "logs/HEAD"]).unwrap_or_else(|| "build.rs".into());
    println!("cargo::rerun-if-changed={log}");
    println!("cargo::rerun-if-changed=src");
}
