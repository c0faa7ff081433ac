//! Processes and sessions share one copy of the weights: by the proportional set sizes (PSS) that Linux counts, in which a
//! page that n processes share counts as one n-th for each.

#![forbid(unsafe_code)]
#![cfg(target_os = "linux")]

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

use mruntime::{Backing, Limits, Model, OpenOptions, Pool, qwen2_memory_sizes};
use mruntime_tests::{PROCESS_BYTES, Run, smollm2_file, with_model};

const PROCESSES: u64 = 3;
const SESSIONS: u64 = 2;
const CONTEXT: usize = 256;
const FILE: &str = "SHARING_TEST_FILE";

/// One of the processes: opens the file, runs two sessions, and stays until its input ends.
#[test]
#[ignore = "a part of the other test"]
fn child() {
    let Ok(file) = std::env::var(FILE) else { return };
    let model = Model::open(file, &OpenOptions::default(), &mut Pool::new(1).unwrap()).unwrap();
    assert_eq!(model.backing(), Some(Backing::Map));
    let run = Run { batch: 64, ..Run::usual() };
    let prompt: Vec<u32> = (1000..1000 + CONTEXT as u32).collect();
    let mut logits = vec![0.0; model.config().vocab_size as usize];
    with_model(model.config(), model.arena(), CONTEXT, run, |mut first| {
        with_model(model.config(), model.arena(), CONTEXT, run, |mut second| {
            first.forward(&prompt, &mut logits);
            second.forward(&prompt, &mut logits);
            println!("\nready");
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        });
    });
}

/// A field of /proc/PID/smaps_rollup, in bytes.
fn memory(process: &Child, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", process.id())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).expect(field);
    1024 * line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap()
}

#[test]
fn processes_and_sessions_share_the_weights() {
    // The code of each process.
    const CODE: u64 = 10_000_000;
    let (_folder, path) = smollm2_file();
    let model = Model::open(&path, &OpenOptions::default(), &mut Pool::new(1).unwrap()).unwrap();
    let limits = Limits { context: CONTEXT, batch: 64, threads: 2 };
    let sizes = qwen2_memory_sizes(model.config(), &limits).unwrap();
    drop(model);
    let start = |_| {
        let program = std::env::current_exe().unwrap();
        let mut command = Command::new(program);
        command.args(["--ignored", "--exact", "child", "--nocapture"]).env(FILE, &path);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
    };
    let mut processes: Vec<Child> = (0..PROCESSES).map(start).collect();
    for process in &mut processes {
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        assert!(lines.map_while(Result::ok).any(|line| line == "ready"));
    }
    let file: u64 = processes.iter().map(|process| memory(process, "Pss_File")).sum();
    let most = sizes.weights + PROCESSES * CODE;
    assert!(
        file > sizes.weights / 10 * 9 && file < most,
        "{file} bytes of files, {} of weights",
        sizes.weights
    );
    for process in &processes {
        let anonymous = memory(process, "Pss_Anon");
        let expected = SESSIONS * (sizes.kv_cache + sizes.scratch) + PROCESS_BYTES;
        assert!(anonymous.abs_diff(expected) <= expected / 10, "{anonymous} is not {expected} within 10 %");
    }
    for mut process in processes {
        process.kill().unwrap();
        process.wait().unwrap();
    }
}
