//! `mrt verify FILE` beside SHA-256 of the same bytes in memory, on all cores, in turn:
//!
//! ```sh
//! cargo bench -p mrt --bench verify -- FILE.mrt
//! ```

#![forbid(unsafe_code)]

use std::hint::black_box;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mrt_format::{CHUNK_BYTES, sha256};

const ROUNDS: usize = 11;

fn main() -> ExitCode {
    // Cargo adds --bench.
    let Some(path) = std::env::args_os().skip(1).find(|arg| arg != "--bench").map(PathBuf::from) else {
        eprintln!("name a .mrt file");
        return ExitCode::from(2);
    };
    let threads = mruntime::performance_cores();
    let bytes = std::fs::read(&path).expect("a file that can be read");
    let verify = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mrt"));
        let status = command.arg("verify").arg(&path).stdout(Stdio::null()).status();
        assert!(status.expect("a program that can be started").success(), "{} is damaged", path.display());
    };
    let (mut in_memory, mut by_tool) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        in_memory.push(time(|| hash(&bytes, threads)));
        by_tool.push(time(verify));
    }
    let rate = |times: &mut Vec<Duration>| {
        times.sort();
        bytes.len() as f64 / 1e9 / times[ROUNDS / 2].as_secs_f64()
    };
    let (in_memory, by_tool) = (rate(&mut in_memory), rate(&mut by_tool));
    println!(
        "{threads} threads, medians of {ROUNDS}: SHA-256 in memory {in_memory:.2} GB/s, mrt verify {by_tool:.2} GB/s"
    );
    println!("mrt verify reaches {:.1} %", 100.0 * by_tool / in_memory);
    ExitCode::SUCCESS
}

fn time(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// Digests of all chunks, each by the next thread that is free.
fn hash(bytes: &[u8], threads: usize) {
    let chunks: Vec<_> = bytes.chunks(CHUNK_BYTES as usize).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    black_box(sha256(chunk));
                }
            });
        }
    });
}
