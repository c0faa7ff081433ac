//! A mapped model takes no memory of the process's own: its weights stay in the page cache. The one test of its
//! program, so that the process is fresh.

#![forbid(unsafe_code)]
#![cfg(target_os = "linux")]

use mruntime::qwen2_memory_sizes;
use mruntime::{Backing, Limits};
use mruntime_tests::{Run, smollm2, with_model};

/// A field of /proc/self/status, in bytes.
fn status(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).expect(field);
    1024 * line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap()
}

#[test]
fn anonymous_memory_is_kv_cache_scratch_and_little_else() {
    // Code's data, thread stacks, the test itself.
    const CONSTANT: u64 = 8_000_000;
    let model = smollm2();
    assert_eq!(model.backing(), Some(Backing::Map));
    let cfg = model.config();
    let run = Run { batch: 512, ..Run::usual() };
    let limits = Limits { context: 1024, batch: run.batch, threads: run.threads };
    let sizes = qwen2_memory_sizes(cfg, &limits).unwrap();
    // Conversion has left some.
    let before = status("RssAnon");
    with_model(cfg, model.arena(), limits.context, run, |mut ready| {
        let prompt: Vec<u32> = (1000..2016).collect();
        ready.generate(&prompt, 8);
        let (anonymous, file) = (status("RssAnon").saturating_sub(before), status("RssFile"));
        assert!(file > sizes.weights, "{file} bytes of mapped files, {} of weights", sizes.weights);
        // The context is filled to the end, so all of both is in use.
        let expected = sizes.kv_cache + sizes.scratch;
        let (least, most) = (expected / 10 * 9, expected / 10 * 11 + CONSTANT);
        assert!(
            (least..most).contains(&anonymous),
            "{anonymous} bytes of anonymous memory, expected {expected}"
        );
        assert!(sizes.weights > most, "weights that were copied would be noticed");
    });
}
