//! A mapped model takes no memory of the process's own: its weights stay in the page cache.

#![forbid(unsafe_code)]
#![cfg(target_os = "linux")]

use std::process::Command;

use mruntime::{Backing, Limits, Model, OpenOptions, Pool, qwen2_memory_sizes};
use mruntime_tests::{PROCESS_BYTES, Run, smollm2_file, with_model};

const FILE: &str = "MEMORY_TEST_FILE";

/// A field of /proc/self/status, in bytes.
fn status(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).expect(field);
    1024 * line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap()
}

/// A fresh process: opens the file, fills the context to its end, and looks at itself.
#[test]
#[ignore = "a part of the other test"]
fn child() {
    let Ok(file) = std::env::var(FILE) else { return };
    let model = Model::open(file, &OpenOptions::default(), &mut Pool::new(1).unwrap()).unwrap();
    assert_eq!(model.backing(), Some(Backing::Map));
    for context in [512, 1024] {
        let run = Run { batch: context / 2, ..Run::usual() };
        let limits = Limits { context, batch: run.batch, threads: run.threads };
        let sizes = qwen2_memory_sizes(model.config(), &limits).unwrap();
        with_model(model.config(), model.arena(), context, run, |mut ready| {
            let prompt: Vec<u32> = (1000..1000 + context as u32 - 8).collect();
            ready.generate(&prompt, 8);
            let (anonymous, file) = (status("RssAnon"), status("RssFile"));
            let expected = sizes.kv_cache + sizes.scratch + PROCESS_BYTES;
            assert!(
                anonymous.abs_diff(expected) <= expected / 10,
                "{anonymous} is not {expected} within 10 %"
            );
            assert!(file > sizes.weights, "{file} bytes of mapped files, {} of weights", sizes.weights);
        });
    }
}

#[test]
fn anonymous_memory_is_kv_cache_scratch_and_a_constant() {
    let (_folder, path) = smollm2_file();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "child", "--nocapture"]).env(FILE, &path);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    // A name that no test has would be a success, too.
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}
